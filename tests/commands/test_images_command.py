"""`pretrain-contrastive` on images with the encoders and image processors of transformers."""

import json
import types

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from apt_model.commands.arguments import read_options
from apt_model.commands.images import load_views, read_processor, width_of
from apt_model.commands.main import main
from apt_model.commands.pretrain_contrastive import Options
from apt_model.data.images import load_images

SMALL = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip
MEAN, SPREAD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.5]


def vit(folder, with_processor=True, size=16):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    ViTModel(ViTConfig(**SMALL)).save_pretrained(folder)
    if with_processor:
        ViTImageProcessorPil(
            size={"height": size, "width": size}, image_mean=MEAN, image_std=SPREAD
        ).save_pretrained(folder)
    return folder


def resnet(folder):
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    ConvNextImageProcessorPil(
        size={"shortest_edge": 24}, crop_pct=1.0, image_mean=MEAN, image_std=SPREAD
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(8):
        pixels = generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.PNG")
    (folder / "broken.png").write_bytes(b"text")
    return folder


def arguments(model, data, output, *more):
    return [f"--model={model}", f"--data={data}", f"--output={output}", "--batch-size=4",
            "--hidden-dim=8", "--projection-dim=4", "--device=cpu", *more]  # fmt: skip


def options_of(*given):
    return read_options("pretrain-contrastive", Options, arguments(*given))


@pytest.mark.parametrize("make", [vit, resnet])
def test_the_image_processor_of_the_model_is_applied_and_saved(tmp_path, images, make, capsys):
    model, output = make(tmp_path / "model"), tmp_path / "out"
    run = ["pretrain-contrastive", *arguments(model, images, output, f"--eval={images}")]
    assert main(run) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["samples"] == summary["held_out_samples"] == 8
    assert summary["images_skipped"] == 1 and "broken.png: is no image" in capsys.readouterr().err
    saved, given = (AutoImageProcessor.from_pretrained(f) for f in (output / "model", model))
    assert saved.to_dict() == given.to_dict() and list(saved.image_mean) == MEAN
    trained, start = (AutoModel.from_pretrained(f) for f in (output / "model", model))
    assert type(trained) is type(start)
    different = [not torch.equal(a, b) for a, b in
                 zip(trained.parameters(), start.parameters(), strict=True)]  # fmt: skip
    assert any(different)


def test_images_are_those_of_the_processor(tmp_path, images):
    options = options_of(vit(tmp_path / "model"), images, tmp_path / "out")
    processor = read_processor(options)
    views = load_views(options, images, 0, processor)
    with Image.open(images / "0.PNG") as image:
        expected = processor(images=image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(views._images[:1], expected)
    assert views._images.shape == (8, 3, 16, 16)
    assert width_of(AutoModel.from_pretrained(tmp_path / "model"), views) == 16


def test_sizes(tmp_path, images):
    """An option, the processor, the configuration: the first that says something."""
    bare = vit(tmp_path / "bare", with_processor=False)
    whole = vit(tmp_path / "whole", size=24)
    for model, given, size in ((bare, [], 16), (bare, ["--image-size=8"], 8), (whole, [], 24),
                               (whole, ["--image-size=16"], 16)):  # fmt: skip
        options = options_of(model, images, tmp_path / "out", *given)
        processor = read_processor(options)
        assert (processor is None) == (model is bare)
        assert load_views(options, images, 0, processor)._images.shape[-2:] == (size, size)
    options = options_of(whole, images, tmp_path / "out")
    views = load_views(options, images, 0, read_processor(options))
    with pytest.raises(ValueError, match=r"the model does not take images of shape \(3, 24, 24\)"):
        width_of(AutoModel.from_pretrained(whole), views)


def test_transparent_pixels_and_enormous_files(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        Image.new("RGBA", (8, 8), (i, 0, 0, 0)).save(folder / f"{i}.png")
    Image.new("RGB", (50, 50)).save(folder / "large.png")
    options = options_of(vit(tmp_path / "model", False), folder, tmp_path / "out",
                         "--background=#00ff00", "--max-pixels=2000")  # fmt: skip
    views = load_views(options, folder, 0)
    assert len(views) == 4 and "has more than 2000 pixels" in capsys.readouterr().err
    assert (views._images[:, 1] == 1).all() and (views._images[:, 0] == 0).all()
    run = arguments(tmp_path / "model", folder, tmp_path / "out", "--background=no color")
    assert main(["pretrain-contrastive", *run]) == 1
    assert "--background: expected a color" in capsys.readouterr().err


class ProcessorOfTimm:
    """Scales and normalizes as `TimmWrapperImageProcessor` does, which needs timm."""

    def __init__(self, pretrained_cfg):
        self.data_config = {"mean": tuple(MEAN), "std": tuple(SPREAD), **pretrained_cfg}

    def __call__(self, images, return_tensors):
        height, width = self.data_config["input_size"][1:]
        if not isinstance(images, torch.Tensor):
            pixels = np.asarray(images.resize((width, height)), dtype=np.float32) / 255
            images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        mean, spread = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, SPREAD))
        return {"pixel_values": (images - mean) / spread}

    def save_pretrained(self, folder):
        """Writes nothing: the model's configuration has it."""


def test_models_of_timm_have_their_processor_in_the_configuration(tmp_path, images, monkeypatch):
    def configured(folder):
        return types.SimpleNamespace(to_dict=lambda: {"model_type": "timm_wrapper"})

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", configured)
    made = ProcessorOfTimm({"input_size": (3, 12, 12)})
    monkeypatch.setattr("transformers.AutoImageProcessor.from_pretrained", lambda folder: made)
    folder = tmp_path / "model"
    folder.mkdir()
    for given, size in (([], 12), (["--image-size=8"], 8)):
        options = options_of(folder, images, tmp_path / "out", *given)
        views = load_views(options, images, 0, read_processor(options))
        assert views._images.shape == (8, 3, size, size)
    array = tmp_path / "images.npy"
    pixels = np.random.default_rng(0).random((4, 3, 12, 12), dtype=np.float32)
    np.save(array, pixels)
    options = options_of(folder, array, tmp_path / "out")
    mean, spread = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, SPREAD))
    expected = (torch.from_numpy(pixels) - mean) / spread
    torch.testing.assert_close(load_views(options, array, 0, made)._images, expected)
    loaded = load_images(images, processor=made)
    assert loaded.shape[1] == 3 and loaded.min() < 0


def test_a_model_that_asserts_its_size_is_named(tmp_path, images):
    class Asserts(torch.nn.Linear):
        def forward(self, pixels):
            raise AssertionError("Input height (32) does not match model (64).")

    views = load_views(options_of(vit(tmp_path / "model"), images, tmp_path / "out"), images, 0)
    with pytest.raises(ValueError, match="the model does not take images of shape"):
        width_of(Asserts(1, 1), views)
