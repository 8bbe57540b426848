"""Models as folders that others load; encoders of images; tokenizers without [CLS] and [SEP]."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from apt_model.data.images import SmallCNN
from apt_model.pretraining import create_contrastive_pretrainer, create_mlm_pretrainer
from apt_model.pretraining.encoder import Encoder
from apt_model.pretraining.encoder_folder import load_image_encoder, save_image_encoder
from apt_model.scoring import saving
from apt_model.scoring.saving import check_saving, save_model, save_sentence_transformer
from support.tiny_encoders import VOCABULARY, WIDTH, random_texts, tiny_bert
from support.tiny_models import tiny_llama


class NoTokenizer:
    def save_pretrained(self, folder):
        raise TypeError("these settings cannot be written")


def test_a_model_that_came_from_a_gguf_file_is_saved(tmp_path):
    model = tiny_llama().float()
    model.config.quantization_config = SimpleNamespace(quant_method="gguf")
    model.hf_quantizer = SimpleNamespace(quantization_config=model.config.quantization_config)
    model.is_quantized = True
    save_model(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("small", [0, saving.SMALL])
def test_what_cannot_be_saved_is_told_before(tmp_path, monkeypatch, small):
    monkeypatch.setattr(saving, "SMALL", small)
    model = tiny_llama()
    check_saving(model, None, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []  # nothing stays
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be saved: TypeError: these"):
        check_saving(model, NoTokenizer(), tmp_path / "model")
    model.generation_config.temperature = 0.5  # which counts only where one samples
    model.generation_config.do_sample = False
    model.config.own = object()
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be saved"):
        check_saving(model, None, tmp_path / "model")
    usage = SimpleNamespace(free=100)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="bytes of room, 100 are free"):
        check_saving(tiny_llama(), None, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("pooling", "mean"), [("mean", True), ("first", False)])
def test_sentence_transformers_finds_modules_and_pooling(tmp_path, pooling, mean):
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    save_sentence_transformer(tiny_bert(), tmp_path, tokenizer, pooling, WIDTH, 20)
    modules = json.loads((tmp_path / "modules.json").read_text())
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    assert kinds == ["Transformer", "Pooling", "Normalize"]
    assert all((tmp_path / module["path"]).is_dir() for module in modules)
    settings = json.loads((tmp_path / "1_Pooling" / "config.json").read_text())
    assert settings["pooling_mode_mean_tokens"] is mean
    assert settings["pooling_mode_cls_token"] is not mean
    assert settings["word_embedding_dimension"] == WIDTH
    text = json.loads((tmp_path / "sentence_bert_config.json").read_text())
    assert text["max_seq_length"] == 20
    transformers.AutoModel.from_pretrained(tmp_path)


def test_an_image_encoder_is_loaded_again(tmp_path):
    cnn = SmallCNN(3, width=8)
    save_image_encoder(cnn, tmp_path / "cnn")
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(load_image_encoder(tmp_path / "cnn")(images), cnn(images))
    with pytest.raises(ValueError, match="encoder: expected a model of transformers"):
        save_image_encoder(torch.nn.Linear(2, 2), tmp_path / "linear")
    (tmp_path / "cnn" / "encoder.json").write_text('{"kind": "LargeCNN"}')
    with pytest.raises(ValueError, match="kind: expected SmallCNN, got 'LargeCNN'"):
        load_image_encoder(tmp_path / "cnn")


STAGES = dict(depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8)
CONVOLUTIONAL = {
    "ResNet": dict(**STAGES, layer_type="basic"),
    "ConvNext": dict(num_stages=2, depths=[1, 1], hidden_sizes=[8, 16]),
    "RegNet": dict(**STAGES, groups_width=8),
    "MobileNetV2": dict(depth_multiplier=0.25, min_depth=8, depth_divisible_by=8, image_size=32),
}


@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_maps_of_convolutional_encoders_are_pooled(kind):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**CONVOLUTIONAL[kind])
    model = getattr(transformers, f"{kind}Model")(config).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        features, output = Encoder(model)(images).hidden, model(images)
    expected = output.pooler_output.flatten(1)
    torch.testing.assert_close(features, expected)
    assert features.shape == (4, expected.shape[1])
    trainer = create_contrastive_pretrainer(model, features.shape[1], hidden_dim=8)
    assert trainer.train_step(images, images.flip(3))["loss"] > 0


def test_maps_without_a_pooler_are_averaged():
    convolution = torch.nn.Conv2d(3, 5, 3)
    images = torch.randn(2, 3, 8, 8)
    expected = convolution(images).mean((2, 3))
    torch.testing.assert_close(Encoder(convolution)(images).hidden, expected)


def test_a_tokenizer_without_cls_and_sep_is_enough():
    """ESM's and nucleotide tokenizers have neither, and padding that no text needs."""
    none = dict.fromkeys(("cls_token_id", "sep_token_id", "pad_token_id"))
    options = {"vocab_size": VOCABULARY, "warmup_steps": 0, "mask_token_id": 4, **none}
    trainer = create_mlm_pretrainer(tiny_bert(heads="mlm"), WIDTH, mask_prob=0.5, **options)
    assert trainer.config.special_ids == (4,)
    assert trainer.train_step(**random_texts())["num_masked"] > 0
    with pytest.raises(ValueError, match="sep_token_id must be an id: use_nsp needs it"):
        create_mlm_pretrainer(tiny_bert(), WIDTH, use_nsp=True, **options)
    with pytest.raises(ValueError, match="mask_token_id must be an id"):
        create_mlm_pretrainer(tiny_bert(), WIDTH, **{**options, "mask_token_id": None})
