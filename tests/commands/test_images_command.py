"""`pretrain-contrastive` on images with the encoders and image processors of transformers."""

import json

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
