"""The commands `apt-model pretrain-mlm` and `pretrain-contrastive` on tiny models and data."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from apt_model.commands.evaluation import mean_over_rows
from apt_model.commands.main import main
from apt_model.commands.pretraining import evaluate
from apt_model.data.images import ImageViews, load_images
from apt_model.data.order import ShuffledBatches
from apt_model.data.rows import BadRow
from apt_model.data.sentences import segments, split_sentences
from apt_model.data.texts import SentencePairs, Text, TextViews, load_texts
from apt_model.pretraining import mlm_pretrain
from support.tiny_encoders import VOCABULARY, tiny_bert

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a.", "b."]
WORDS += [f"w{i}" for i in range(VOCABULARY - len(WORDS))]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("encoder")
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip
    tiny_bert().float().save_pretrained(folder)
    return folder


def summary_class(output):
    """The class of transformers that a folder was saved of."""
    return json.loads((output / "model" / "config.json").read_text())["architectures"][0]


def texts(count):
    return [f"w{i % 5} w{i % 5} w{i % 7} a. w{i % 3} w{i % 5} b. w{i % 7} a." for i in range(count)]


@pytest.fixture
def lines(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts(24)) + "\n\n")
    return file


def run(command, data, output, *more):
    return main(
        [command, f"--data={data}", f"--output={output}", "--device=cpu", "--batch-size=8", *more]
    )


@pytest.mark.parametrize("nsp", [False, True])
def test_mlm_on_lines_learns_and_leaves_a_model(model_folder, lines, tmp_path, nsp, capsys):
    output = tmp_path / "out"
    more = ["--nsp", "--segment-sentences=1"] if nsp else ["--whole-word"]
    options = [f"--model={model_folder}", "--learning-rate=3e-3", "--warmup-steps=2", *more]
    assert run("pretrain-mlm", lines, output, "--epochs=10", f"--eval-data={lines}", *options) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["total_steps"] == (60 if nsp else 30)
    assert summary["after"]["mlm_loss"] < 0.8 * summary["before"]["mlm_loss"]
    assert ("nsp_loss" in summary["after"]) == nsp
    assert summary["curves"]["learning_rate"][:3] == pytest.approx([1.5e-3, 3e-3, 3e-3])
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert '"finished": true' in capsys.readouterr().out
    from transformers import (
        AutoModel,
        AutoModelForMaskedLM,
        AutoModelForPreTraining,
        AutoTokenizer,
    )

    AutoModel.from_pretrained(output / "model")
    assert AutoTokenizer.from_pretrained(output / "model").mask_token_id == 4
    assert not (output / "model" / "heads.pt").exists()  # they are the model's own
    made = AutoModelForPreTraining if nsp else AutoModelForMaskedLM
    assert type(made.from_pretrained(output / "model")).__name__ == summary_class(output)
    first = summary["after"]
    again = tmp_path / "again"
    more = [*options, f"--model={output / 'model'}", f"--eval-data={lines}", "--max-steps=1"]
    assert run("pretrain-mlm", lines, again, *more) == 0
    before = json.loads((again / "summary.json").read_text())["before"]
    assert before == pytest.approx(
        {k: first[k] for k in before}, abs=1e-5
    )  # a second stage begins where this one ended
    if nsp:
        assert first["total_loss"] == pytest.approx(first["mlm_loss"] + first["nsp_loss"])
    else:
        assert first["total_loss"] == pytest.approx(first["mlm_loss"], abs=1e-12)


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_contrastive_on_json_lines(model_folder, tmp_path, method):
    data = tmp_path / "texts.jsonl"
    rows = [{"text": text} for text in texts(12)]
    rows += [{"text": f"w{i} w1", "positive": f"w{i} w2"} for i in range(12)]
    data.write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "out"
    options = [f"--model={model_folder}", f"--method={method}", "--hidden-dim=16", "--epochs=3",
               "--queue-size=32", "--learning-rate=1e-3", "--mask-prob=0.1", "--swap-prob=0.1",
               "--cache-chunk=6"]  # fmt: skip
    assert run("pretrain-contrastive", data, output, *options) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["total_steps"] == 9 and summary["settings"]["method"] == method
    from transformers import AutoModel

    trained = AutoModel.from_pretrained(output / "model")
    start = tiny_bert().float().embeddings.word_embeddings.weight
    assert not torch.equal(trained.embeddings.word_embeddings.weight, start)
    assert (output / "model" / "projection.pt").exists()


def write_images(folder, count=10):
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(count):
        pixels = generator.integers(0, 255, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("kind", ["folder", "npy", "npz"])
def test_contrastive_on_images(tmp_path, kind, capsys):
    if kind == "folder":
        data = write_images(tmp_path / "images")
        (data / "broken.png").write_bytes(b"no image")
    else:
        images = np.random.default_rng(0).random((20, 8, 8))
        data = tmp_path / f"images.{kind}"
        np.save(data, images) if kind == "npy" else np.savez(data, images=images)
    output = tmp_path / "out"
    more = ["--image-size=8", "--hidden-dim=16", "--epochs=2"]
    assert run("pretrain-contrastive", data, output, *more, f"--eval-data={data}") == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["finished"] and summary["after"]["loss"] > 0
    state = torch.load(output / "model" / "encoder.pt", weights_only=True)
    assert state["layers.0.weight"].shape[1] == (3 if kind == "folder" else 1)
    if kind == "folder":
        assert "broken.png" in capsys.readouterr().err
        assert run("pretrain-contrastive", data, output, *more, "--bad-rows=fail") == 1
        assert "broken.png" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_contrastive_on_images_in_16_bits(tmp_path, dtype, method):
    data = write_images(tmp_path / "images")
    more = [f"--dtype={dtype}", f"--method={method}", "--queue-size=16", "--image-size=8"]
    output = tmp_path / "out"
    options = [*more, "--hidden-dim=16", f"--eval-data={data}"]
    assert run("pretrain-contrastive", data, output, *options) == 0
    assert json.loads((output / "summary.json").read_text())["after"]["loss"] > 0
    state = torch.load(output / "model" / "encoder.pt", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("nsp", [False, True])
def test_random_words_are_tokens_where_the_embedding_is_padded(
    model_folder, lines, tmp_path, nsp, monkeypatch
):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(model_folder)
    model.resize_token_embeddings(2 * VOCABULARY)
    folder = shutil.copytree(model_folder, tmp_path / "padded")
    model.save_pretrained(folder)
    drawn = []
    real = mlm_pretrain.make_masked_batch

    def spying(config, input_ids, *batch, **options):
        made = real(config, input_ids, *batch, **options)
        changed = made.input_ids != input_ids
        drawn.extend(made.input_ids[changed & (made.input_ids != config.mask_token_id)].tolist())
        assert config.vocab_size == 2 * VOCABULARY
        return made

    monkeypatch.setattr(mlm_pretrain, "make_masked_batch", spying)
    more = ["--nsp", "--segment-sentences=1"] if nsp else []
    options = [f"--model={folder}", "--mask-prob=0.9", "--epochs=8", *more]
    assert run("pretrain-mlm", lines, tmp_path / "out", *options) == 0
    assert len(drawn) > 50 and len(set(drawn)) > 20
    assert all(5 <= token < VOCABULARY for token in drawn)


def test_a_stopped_run_continues_to_the_same_model(model_folder, lines, tmp_path, monkeypatch):
    options = [f"--model={model_folder}", "--epochs=3", "--nsp", "--segment-sentences=1"]
    assert run("pretrain-mlm", lines, tmp_path / "one", *options) == 0
    real, steps = mlm_pretrain.MLMPretrainer.train_step, []

    def interrupting(trainer, **batch):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(trainer, **batch)

    monkeypatch.setattr(mlm_pretrain.MLMPretrainer, "train_step", interrupting)
    assert run("pretrain-mlm", lines, tmp_path / "stopped", *options) == 130
    assert not (tmp_path / "stopped" / "model").exists()
    assert run("pretrain-mlm", lines, tmp_path / "stopped", *options) == 0
    assert len(steps) == 18  # no step was made twice
    from safetensors.torch import load_file

    ours, theirs = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("stopped", "one")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert run("pretrain-mlm", lines, tmp_path / "stopped", *options, "--mask-prob=0.2") == 1


@pytest.mark.parametrize(
    ("command", "option", "message"),
    [
        ("pretrain-mlm", "--model=nowhere", "nowhere is not a folder"),
        ("pretrain-mlm", "--data=nowhere", "nowhere does not exist"),
        ("pretrain-mlm", "--mask-prob=2", "mask_prob"),
        ("pretrain-mlm", "--batch-size=0", "--batch-size must be at least 1"),
        ("pretrain-mlm", "--warmup-steps=-1", "--warmup-steps must not be negative"),
        ("pretrain-mlm", "--segment-sentences=0", "--segment-sentences must be at least 1"),
        ("pretrain-mlm", "--nsp --whole-word", "cannot be used with --nsp"),
        ("pretrain-contrastive", "--temperature=0", "temperature"),
        ("pretrain-contrastive", "--cache-chunk=0", "cache_chunk"),
        ("pretrain-contrastive", "--batch-size=1", "two samples or more"),
        ("pretrain-mlm", "--output=/dev/null/out", "/dev/null/out cannot be written"),
    ],
)
def test_wrong_options_are_errors_of_one_line(
    model_folder, lines, tmp_path, command, option, message, capsys
):
    options = [f"--model={model_folder}", *option.split()]
    assert run(command, lines, tmp_path / "out", *options) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out" / "model").exists()


def test_help_needs_no_torch(capsys):
    for command in ("pretrain-mlm", "pretrain-contrastive"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0 and "(default: " in capsys.readouterr().out


# Data


def test_rows_that_cannot_be_used_are_named(model_folder, tmp_path, capsys):
    file = tmp_path / "texts.jsonl"
    bad = {
        b"{broken": "not JSON",
        b"[1]": "must be an object with a 'text'",
        b'{"text": 3}': "'text' must be a string",
        b'{"text": "a", "positive": " "}': "'positive' must be a string that is not empty",
    }
    for line, message in bad.items():
        file.write_bytes(b'{"text": "w1"}\n\n' + line + b"\n")
        reported = []
        assert load_texts(file, report=reported.append) == [Text("w1")]
        assert len(reported) == 1 and reported[0].startswith(f"{file}:3: ")
        assert message in reported[0]
        with pytest.raises(BadRow, match=r"texts\.jsonl:3: "):
            load_texts(file, fail_on_bad_row=True)
    empty = tmp_path / "empty.txt"
    options = [f"--model={model_folder}"]
    useless = {"": "no row can be used", "[SEP] never [CLS]": "1: has no tokens but special ones"}
    for command in ("pretrain-mlm", "pretrain-contrastive"):
        for text, message in useless.items():
            empty.write_text(f"{text}\n \n")
            assert run(command, empty, tmp_path / "out", *options) == 1
            error = capsys.readouterr().err
            assert message in error and "no row can be used" in error
    empty.write_text("w1 w2 w3 a.\n")
    assert run("pretrain-mlm", empty, tmp_path / "out", *options, "--nsp", "--bad-rows=fail") == 1
    assert "empty.txt:1: has no two segments" in capsys.readouterr().err
    empty.write_bytes(b"one \xff\n")
    with pytest.raises(BadRow, match="no row"):
        load_texts(empty, report=lambda message: None)


def test_segments():
    text = "One. Two!  Three? Four.\nFive. Six. Seven."
    sentences = split_sentences(text)
    assert segments(sentences, 4) == ["One. Two! Three?", "Four. Five. Six. Seven."]
    assert segments(["One.", "Two."], 3) == ["One.", "Two."] and segments(["One."], 3) == ["One."]
    assert segments([], 2) == [] and segments(sentences, 1)[-1] == "Seven."


def test_views_of_texts(model_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = [Text(text) for text in texts(6)] + [Text("w1 w2", "w3")]
    plain = TextViews(rows, tokenizer, 16)([5, 6], 0)
    assert torch.equal(plain["input_ids_1"][0], plain["input_ids_2"][0])
    assert plain["input_ids_2"][1, :3].tolist() == [2, 10, 3]
    assert plain["attention_mask_2"][1].sum() == 3
    changed = TextViews(rows, tokenizer, 16, 0, 0.2, 0.3, 0.3)
    first, again, other = changed([0, 1, 2], 4), changed([0, 1, 2], 4), changed([0, 1, 2], 5)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert first["input_ids_1"].shape != other["input_ids_1"].shape or not torch.equal(
        first["input_ids_1"], other["input_ids_1"]
    )
    for k in (1, 2):
        ids, mask = first[f"input_ids_{k}"], first[f"attention_mask_{k}"]
        assert (ids[:, 0] == 2).all() and ((ids == 3).sum(1) == 1).all()
        assert ((ids != 0) == (mask == 1)).all()


def test_views_of_images(tmp_path):
    images = load_images(write_images(tmp_path / "images", 4), 6, 1)
    assert images.shape == (4, 1, 6, 6) and images.min() >= 0 and images.max() <= 1
    same = ImageViews(images, 0, 0, 0, 0, 0, 0)([0, 2], 0)
    for k in (1, 2):
        torch.testing.assert_close(same[f"input_ids_{k}"], images[[0, 2]], rtol=0, atol=1e-5)
    views = ImageViews(images)
    first, again = views([0, 1], 3), views([0, 1], 3)
    assert torch.equal(first["input_ids_1"], again["input_ids_1"])
    for other in (views([0, 1], 4), ImageViews(images, 1)([0, 1], 3)):
        assert not torch.equal(first["input_ids_1"], other["input_ids_1"])
    assert not torch.equal(first["input_ids_1"], first["input_ids_2"])
    flipped = ImageViews(images, 0, 0, 0, 0, 0, 0, flip=True)
    seen = [flipped([1], step)["input_ids_1"] for step in range(12)]
    turned = [torch.allclose(view, images[[1]].flip(-1), atol=1e-5) for view in seen]
    assert 0 < sum(turned) < 12
    for shape, expected in (((5, 4, 4), 1), ((5, 3, 4, 4), 3), ((5, 6, 6, 3), 3)):
        file = tmp_path / "array.npy"
        np.save(file, np.full(shape, 255, dtype=np.uint8))
        loaded = load_images(file)
        assert loaded.shape[:2] == (5, expected) and (loaded == 1).all()
    np.save(file, np.zeros((3, 3)))
    with pytest.raises(ValueError, match="array of images"):
        load_images(file)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no image can be used"):
        load_images(tmp_path / "none", 8)


MODES = {
    "png": ("I;16", np.uint16),
    "tif": ("I;16B", np.dtype(">u2")),
    "tiff": ("I", np.int32),
    "pgm": ("I", np.uint16),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [*MODES, "float"])
def test_grey_images_of_more_than_8_bits_are_scaled_to_1(tmp_path, suffix, channels):
    grey = np.random.default_rng(0).integers(0, 2**16, (6, 6), dtype=np.uint16)
    grey[0, 0], grey[0, 1] = 0, 2**16 - 1
    file = tmp_path / f"0.{'tif' if suffix == 'float' else suffix}"
    mode, dtype = MODES.get(suffix, ("F", np.float32))
    stored = (grey / 65535).astype(dtype) if mode == "F" else grey.astype(dtype)
    Image.fromarray(stored).save(file)
    with Image.open(file) as image:
        assert image.mode == mode
    pixels = load_images(tmp_path, 6, channels)
    expected = torch.from_numpy(grey / 65535).float().expand(1, channels, 6, 6)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
    larger = load_images(tmp_path, 12, channels)
    assert larger.shape == (1, channels, 12, 12) and larger.min() == 0 and larger.max() == 1


def test_images_beyond_the_range_of_their_kind_are_named(tmp_path):
    for name, pixels in (("a.tif", [[0.0, 1.5]]), ("b.tif", [[np.nan, 0]]), ("c.tif", [[-0.5, 1]])):
        Image.fromarray(np.array(pixels, dtype=np.float32)).save(tmp_path / name)
    Image.fromarray(np.array([[-1, 70000]], dtype=np.int32)).save(tmp_path / "d.tif")
    Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).save(tmp_path / "e.tif")
    reported = []
    assert load_images(tmp_path, 4, report=reported.append).shape == (1, 3, 4, 4)
    assert len(reported) == 4 and all("expected 0 (black) to " in line for line in reported)
    with pytest.raises(ValueError, match=r"a\.tif: values from 0\.0 to 1\.5, expected .* to 1 "):
        load_images(tmp_path, 4, fail_on_bad_image=True)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", ">u2", "int16", "uint32", "int64"])
def test_integer_arrays_are_divided_by_the_largest_of_their_dtype(tmp_path, dtype):
    file = tmp_path / "array.npy"
    largest = np.iinfo(dtype).max
    array = np.array([0, largest, largest // 3, largest // 2], dtype=dtype).reshape(1, 2, 2)
    np.save(file, array)
    expected = torch.tensor([0, 1, 1 / 3, 1 / 2]).view(1, 1, 2, 2)
    torch.testing.assert_close(load_images(file), expected, rtol=0, atol=1 / 128)
    if array.dtype.itemsize > 1:
        np.save(file, array // largest * 255)
        with pytest.raises(ValueError, match=rf"up to 255 would be black: 1 is {largest}"):
            load_images(file)


class Counting:
    """Data and a trainer that remember the sizes of the batches."""

    def __init__(self, samples):
        self.samples, self.rows = samples, []

    def __len__(self):
        return self.samples

    def __call__(self, rows, step):
        self.rows.append(rows)
        return {"rows": rows}

    def eval_step(self, rows):
        return {"loss": 0.0 if len(rows) == 1 else 1.0}


@pytest.mark.parametrize(
    ("samples", "batch_size", "sizes"),
    [(21, 20, [10, 11]), (5, 2, [2, 3]), (3, 2, [3]), (4, 1, [2, 2]), (1, 8, [1]), (8, 8, [8])],
)
def test_no_sample_is_evaluated_alone(samples, batch_size, sizes):
    data = Counting(samples)
    metrics = evaluate(data, data, batch_size, at_least=2)
    assert [len(rows) for rows in data.rows] == sizes
    assert [row for rows in data.rows for row in rows] == list(range(samples))
    assert metrics == {"loss": float(samples > 1)}
    assert mean_over_rows([], 8, data.eval_step) == {}


def test_one_held_out_sample_is_refused(tmp_path, capsys):
    data, held_out = tmp_path / "data.npy", tmp_path / "one.npy"
    np.save(data, np.random.default_rng(0).random((8, 8, 8)))
    np.save(held_out, np.zeros((1, 8, 8)))
    output = tmp_path / "out"
    assert run("pretrain-contrastive", data, output, f"--eval-data={held_out}") == 1
    assert "one.npy must hold two samples or more" in capsys.readouterr().err


def test_batches_of_epochs():
    batches = ShuffledBatches(10, 4, 1, lambda rows, step: {"rows": rows, "step": step})
    assert batches.per_epoch == 3 and batches[4]["step"] == 4
    epochs = [[row for s in range(3) for row in batches[3 * e + s]["rows"]] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10)) and epochs[0] != epochs[1]
    whole = ShuffledBatches(10, 4, 1, lambda rows, step: rows, whole=True)
    assert whole.per_epoch == 2 and [len(whole[s]) for s in range(4)] == [4] * 4
    assert ShuffledBatches(3, 4, 1, lambda rows, step: rows, whole=True).per_epoch == 1


def test_pairs_of_sentences_are_mixed_in_every_batch(model_folder):
    """Their labels are drawn from other random numbers than the order of the batches."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    documents = [[f"w{i % 9} w1", f"w{i % 7} w2"] for i in range(160)]
    for seed in (0, 3):
        pairs = SentencePairs(documents, tokenizer, 16, seed)
        batches = ShuffledBatches(len(pairs), 32, seed, pairs)
        pairs.per_epoch = batches.per_epoch
        labels = [batches[step]["nsp_labels"] for step in range(10)]
        assert all(4 < label.sum() < 28 for label in labels)
        assert sum(int(label.sum()) for label in labels[:5]) == 80
        assert not torch.equal(torch.cat(labels[:5]), torch.cat(labels[5:]))
