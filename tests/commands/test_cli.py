"""The command `apt-model train-dpo` on a tiny model, in this process and as a program."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from apt_model.commands import main as cli
from apt_model.commands.main import main
from apt_model.data.order import ShuffledBatches, of_rows
from apt_model.data.preferences import (
    PairTokenizer,
    PreferencePair,
    collate,
    load_pairs,
)
from apt_model.data.rows import REPORTED_ROWS, BadRow
from apt_model.training.checkpoint import Checkpoint
from apt_model.training.files import write_whole
from support.tiny_models import VOCABULARY, tiny_llama

GOOD = ["happy", "fine", "great"]
BAD = ["awful", "poor", "dull"]
MODEL_BYTES = 30_000  # room for the model of these tests, not for its checkpoint


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "a", "film", "was", *GOOD, *BAD]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("model")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    tiny_llama().float().save_pretrained(folder)
    return folder


def rows(count):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 3, (count, 2), generator=generator).tolist()
    return [
        {
            "prompt": f"a film w{i % 40}",
            "chosen": f"was {GOOD[good]} w{i % 7}",
            "rejected": f"was {BAD[bad]}",
        }
        for i, (good, bad) in enumerate(drawn)
    ]


def write(path, lines):
    path.write_bytes(
        b"".join(
            (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n"
            for line in lines
        )
    )
    return path


def test_missing_packages_are_named_before_anything_is_read(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "matplotlib" else name)
    assert main(["train-dpo", "--model", "nowhere", "--data", "nothing"]) == 1
    assert "missing packages: matplotlib (pip install" in capsys.readouterr().err


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "pairs.jsonl", rows(24))


def arguments(model_folder, data, output, *more):
    return [
        "train-dpo",
        f"--model={model_folder}",
        f"--data={data}",
        f"--output={output}",
        "--batch-size=4",
        "--device=cpu",
        *more,
    ]


LEARNING = ("--learning-rate=3e-3", "--epochs=4", "--warmup-steps=2")


def parameters(output):
    from safetensors.torch import load_file

    return load_file(output / "model" / "model.safetensors")


def test_a_run_learns_and_leaves_a_model_curves_and_a_summary(model_folder, data, tmp_path, capsys):
    held_out = write(tmp_path / "held_out.jsonl", rows(60)[24:])
    output = tmp_path / "out"
    options = arguments(model_folder, data, output, f"--eval-data={held_out}", *LEARNING)
    assert main(options) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["before"]["accuracy"] == 0.5 and summary["after"]["accuracy"] > 0.9
    assert summary["total_steps"] == 24 and len(summary["curves"]["loss"]) == 24
    assert summary["curves"]["learning_rate"][:3] == pytest.approx([1.5e-3, 3e-3, 3e-3])
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoint.pt",
        "curves.png",
        "model",
        "run.yaml",
        "summary.json",
    ]
    assert '"finished": true' in capsys.readouterr().out

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(output / "model")
    assert not torch.equal(model.lm_head.weight, tiny_llama().float().lm_head.weight)
    assert AutoTokenizer.from_pretrained(output / "model")("a film")["input_ids"] == [3, 4]


def test_a_stopped_run_continues_to_the_same_model(model_folder, data, tmp_path, monkeypatch):
    assert main(arguments(model_folder, data, tmp_path / "whole", *LEARNING)) == 0
    stopped = arguments(
        model_folder, data, tmp_path / "stopped", "--train-last-layers=1", *LEARNING
    )
    reference = arguments(model_folder, data, tmp_path / "one", "--train-last-layers=1", *LEARNING)
    assert main(reference) == 0
    collated = []

    def interrupting(batch):
        collated.append(1)
        if len(collated) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return collate(batch)

    monkeypatch.setattr("apt_model.commands.pairs.collate", interrupting)
    assert main(stopped) == 130
    assert json.loads((tmp_path / "stopped" / "summary.json").read_text())["total_steps"] == 5
    assert not (tmp_path / "stopped" / "model").exists()
    assert main(stopped) == 0
    assert len(collated) == 24  # no step was made twice
    assert (tmp_path / "stopped" / "checkpoint.pt").stat().st_size < (
        0.8 * (tmp_path / "whole" / "checkpoint.pt").stat().st_size
    )
    ours, theirs = parameters(tmp_path / "stopped"), parameters(tmp_path / "one")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    before, after = (
        json.loads((tmp_path / run / "summary.json").read_text())["curves"]
        for run in ("one", "stopped")
    )
    assert before == after


def test_a_run_with_other_settings_is_not_continued(model_folder, data, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(arguments(model_folder, data, output)) == 0
    assert main(arguments(model_folder, data, output, "--beta=0.2")) == 1
    assert "beta: 0.1 there" in capsys.readouterr().err
    assert main(arguments(model_folder, data, output, "--beta=0.2", "--restart")) == 0
    write(data, rows(20))
    assert main(arguments(model_folder, data, output, "--beta=0.2")) == 1
    assert "data_sha256" in capsys.readouterr().err


def test_a_checkpoint_is_whole_or_the_old_one(tmp_path, monkeypatch):
    class Trainer:
        total_steps = 1

        def state_dict(self, include_frozen):
            return {"steps": 1}

    checkpoint = Checkpoint(tmp_path / "new" / "checkpoint.pt", {"seed": 0})
    checkpoint.save(Trainer())
    whole = checkpoint.path.read_bytes()

    def failing(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(Trainer())
    assert checkpoint.path.read_bytes() == whole
    assert list(checkpoint.path.parent.iterdir()) == [checkpoint.path]


@contextmanager
def full_disk(room=20_000):
    """A limit on the size of a file stands for it: Python ignores its signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("room", "file", "left"),
    [(20_000, "model", []), (MODEL_BYTES, "checkpoint.pt", ["run.yaml"])],
    ids=["before the run", "in the run"],
)
def test_a_full_disk_is_an_error_of_one_line(
    model_folder, data, tmp_path, capsys, room, file, left
):
    with full_disk(room):
        assert main(arguments(model_folder, data, tmp_path / "out")) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and f"{tmp_path}/out/{file} cannot be written: " in errors[0]
    assert "File too large" in errors[0]
    assert [path.name for path in (tmp_path / "out").glob("*")] == left


def save_safetensors(path):
    save_file({"a": torch.zeros(9000)}, path)


def mistaken(path):
    path.write_text("half")
    raise RuntimeError("a mistake in the program")


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (lambda path: path.write_text("a" * 30_000), OSError, "model cannot be written: .*too lar"),
        (save_safetensors, OSError, "model cannot be written: .*too large"),
        (mistaken, RuntimeError, "^a mistake in the program"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path, write, error, message):
    path = tmp_path / "model"

    def write_folder(folder):
        folder.mkdir()
        write(folder / "file")

    for make in (write, write_folder):
        with full_disk(), pytest.raises(error, match=message):
            write_whole(path, make)
        assert list(tmp_path.iterdir()) == []
    path.mkdir()
    (path / "old").write_text("old")
    with full_disk(), pytest.raises(error, match=message):
        write_whole(path, write_folder)
    assert list(tmp_path.rglob("*")) == [path, path / "old"]


def test_a_folder_stays_whole_while_it_is_replaced(tmp_path, monkeypatch):
    path, real = tmp_path / "model", shutil.rmtree

    def write(name):
        def into(folder):
            folder.mkdir()
            (folder / name).write_text(name)

        return into

    write_whole(path, write("old"))

    def interrupted(folder, *args, **options):
        real(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, write("new"))
    assert list(tmp_path.rglob("*")) == [path, path / "new"]


ONE = rows(1)[0]
BAD_ROWS = {
    b"{broken": "not JSON",
    b"\xff\xfe": "not JSON",
    b"[1]": "must be an object with prompt, chosen, rejected, got list",
    json.dumps({"prompt": "a", "chosen": "b"}).encode(): "has no 'rejected'",
    json.dumps({**ONE, "chosen": 3}).encode(): "'chosen' must be a string, got int",
    json.dumps({**ONE, "rejected": " "}).encode(): "'rejected' is empty",
    json.dumps({**ONE, "rejected": ONE["chosen"]}).encode(): "are the same",
    json.dumps({**ONE, "rejected": ONE["chosen"] + " "}).encode(): "the same in their first",
}


@pytest.mark.parametrize("line", BAD_ROWS)
def test_a_bad_row_is_named_and_skipped_or_fatal(model_folder, tmp_path, line, capsys):
    good = rows(3)
    data = write(tmp_path / "pairs.jsonl", [good[0], b"", line, good[1], good[2]])
    message = f"{data}:3: "
    assert main(arguments(model_folder, data, tmp_path / "skip")) == 0
    reported = [text for text in capsys.readouterr().err.splitlines() if message in text]
    assert len(reported) == 1 and BAD_ROWS[line] in reported[0] and "skipped" in reported[0]
    summary = json.loads((tmp_path / "skip" / "summary.json").read_text())
    assert summary["pairs"] == 3
    assert main(arguments(model_folder, data, tmp_path / "fail", "--bad-rows=fail")) == 1
    error = capsys.readouterr().err
    assert message in error and BAD_ROWS[line] in error
    assert not (tmp_path / "fail").exists()


def test_many_bad_rows_are_counted(tmp_path, model_folder):
    from transformers import AutoTokenizer

    tokenize = PairTokenizer(AutoTokenizer.from_pretrained(model_folder))
    messages = []
    data = write(tmp_path / "pairs.jsonl", [b"x"] * 30 + rows(1))
    assert len(load_pairs(data, tokenize, report=messages.append)) == 1
    assert len(messages) == 21 and "10 more rows" in messages[-1]
    with pytest.raises(BadRow, match="no row"):
        load_pairs(write(data, [b"x"]), tokenize, report=messages.append)


def test_texts_become_tokens(model_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    pair = PairTokenizer(tokenizer)("a film", "was fine", "was dull")
    assert pair == PreferencePair((3, 4), (5, 7, 2), (5, 11, 2))
    short = PairTokenizer(tokenizer, max_length=4, max_prompt_length=2)
    pair = short("film was a film", "a was fine", "film was dull")
    assert pair == PreferencePair((3, 4), (3, 5), (4, 5))
    with pytest.raises(BadRow, match="first 2 tokens"):
        short("a film", "was fine dull", "was fine great")
    with pytest.raises(ValueError, match="max_prompt_length"):
        PairTokenizer(tokenizer, max_length=4, max_prompt_length=4)
    tokenizer.chat_template = "{% for m in messages %}<s> {{ m.content }} was{% endfor %}"
    chat = PairTokenizer(tokenizer, chat_template=True)
    assert chat("a film", "fine", "dull").prompt == (1, 3, 4, 5)


def test_batches():
    pairs = [PreferencePair((1,) * (i % 3), (2, i), (3,) * (i + 1)) for i in range(10)]
    batch = collate(pairs[:4])
    assert batch["prompt_lengths"].tolist() == [0, 1, 2, 0]
    assert batch["rejected_ids"].tolist()[1] == [1, 3, 3, 0, 0]
    assert batch["rejected_mask"].tolist()[1] == [1, 1, 1, 0, 0]
    assert ShuffledBatches(10, 4, 1, of_rows(pairs, collate)).per_epoch == 3

    def epoch(number, seed=1):
        chosen = ShuffledBatches(10, 4, seed, of_rows(pairs, collate))
        drawn = [chosen[3 * number + step] for step in range(3)]
        return [ids[0] for b in drawn for ids in (b["rejected_mask"].sum(1, keepdim=True)).tolist()]

    assert epoch(0) == epoch(0) != epoch(1) and epoch(0) != epoch(0, seed=2)
    counted = sorted(epoch(1))
    assert counted == sorted(len(pair.prompt) + len(pair.rejected) for pair in pairs)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model=nowhere", "nowhere is not a folder"),
        ("--data=nowhere", "nowhere does not exist"),
        ("--beta=-1", "DPOConfig.beta"),
        ("--loss-type=none", "loss_type"),
        ("--batch-size=0", "--batch-size must be at least 1"),
        ("--warmup-steps=-1", "--warmup-steps must not be negative"),
        ("--train-last-layers=3", "the model has 2 layers"),
        ("--gradient-accumulation-steps=0", "--gradient-accumulation-steps must be"),
        ("--output=/dev/null/out", "/dev/null/out cannot be written: "),
    ],
)
def test_wrong_options_are_errors_of_one_line(
    model_folder, data, tmp_path, option, message, capsys
):
    assert main(arguments(model_folder, data, tmp_path / "out", option)) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out").exists()


def test_help_names_the_recommended_ranges(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train-dpo", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for words in ("0.05-0.5", "0-0.1", "1e-6-1e-5", "(default: 0.1)", "half of --max-length"):
        assert words in text
    assert f"the first {REPORTED_ROWS}" in text
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2


def test_as_a_program_it_stops_at_a_signal(model_folder, data, tmp_path):
    output = tmp_path / "out"
    options = arguments(model_folder, data, output, "--epochs=5000", "--checkpoint-every=1")
    program = subprocess.Popen(
        [sys.executable, "-m", "apt_model.commands.main", *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 240
    while not (output / "checkpoint.pt").exists():
        assert program.poll() is None and time.monotonic() < deadline, program.communicate()
        time.sleep(0.1)
    program.send_signal(signal.SIGTERM)
    out, err = program.communicate(timeout=120)
    assert program.returncode == 130, err
    assert '"finished": false' in out and "margin=" in err
    state = torch.load(output / "checkpoint.pt", weights_only=True)
    assert state["trainer"]["total_steps"] == json.loads(out)["total_steps"] >= 1
