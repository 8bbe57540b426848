"""What a run keeps, refuses, continues and tells: locks, checkpoints, reports, samples."""

import csv
import io
import json
import os
import signal
import struct
import subprocess
import sys
import types
import zipfile

import pytest
import torch

from apt_model.commands.main import main
from apt_model.training.files import (
    DamagedFile,
    FolderLock,
    load_tensors,
    save_tensors,
    sha256_of,
)
from apt_model.training.schedule import schedule
from commands import test_cli, test_cli_pretraining
from commands.test_cli import arguments, parameters, rows, write
from commands.test_rl_commands import REWARD, prompts, summary_of

model_folder = test_cli.model_folder
encoder_folder = test_cli_pretraining.model_folder


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "pairs.jsonl", rows(24))


@pytest.fixture
def run(model_folder, data, tmp_path):
    """Runs train-dpo with more options; returns the exit status."""

    def run(*more):
        return main(arguments(model_folder, data, tmp_path / "out", "--learning-rate=1e-3", *more))

    return run


def stop_at(monkeypatch, step):
    """Sends SIGINT before the step of this number, counted over all runs."""
    from apt_model.commands import pairs

    made, collate = [], pairs.collate

    def interrupting(batch):
        made.append(1)
        if len(made) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return collate(batch)

    monkeypatch.setattr(pairs, "collate", interrupting)


def same_parameters(one, two):
    ours, theirs = parameters(one), parameters(two)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


# Going on


def test_a_finished_run_goes_on_to_more_epochs(run, tmp_path):
    assert run("--epochs=1") == 0
    first = parameters(tmp_path / "out")
    assert run("--epochs=2") == 0
    assert summary_of(tmp_path / "out")["total_steps"] == 12
    assert not torch.equal(parameters(tmp_path / "out")["lm_head.weight"], first["lm_head.weight"])
    assert run("--epochs=2", f"--output={tmp_path / 'whole'}") == 0
    assert same_parameters(tmp_path / "out", tmp_path / "whole")


def test_a_finished_run_with_held_out_rows_goes_on_and_keeps_the_best(run, data, tmp_path):
    held_out = write(tmp_path / "held.jsonl", rows(40)[24:])
    for output, epochs in (("out", (1, 2, 2)), ("whole", (2,))):
        for number in epochs:
            given = (f"--eval={held_out}", "--eval-every=3", f"--epochs={number}")
            assert run(*given, f"--output={tmp_path / output}") == 0
    assert same_parameters(tmp_path / "out", tmp_path / "whole")
    for key in ("before", "after", "held_out", "curves"):
        assert summary_of(tmp_path / "out")[key] == summary_of(tmp_path / "whole")[key], key
    # Other pairs are preferred: no later state is better, and the saved model stays
    swap = {"chosen": "rejected", "rejected": "chosen"}
    write(held_out, [{swap.get(k, k): v for k, v in row.items()} for row in rows(40)[24:]])
    output = f"--output={tmp_path / 'worse'}"
    assert run(f"--eval={held_out}", "--eval-every=3", "--epochs=1", output) == 0
    saved = parameters(tmp_path / "worse")
    assert run(f"--eval={held_out}", "--eval-every=3", "--epochs=2", output) == 0
    assert summary_of(tmp_path / "worse")["after"]["step"] == 3
    assert all(torch.equal(v, saved[k]) for k, v in parameters(tmp_path / "worse").items())


def test_data_and_model_that_moved_but_are_the_same_continue(model_folder, data, run, tmp_path):
    import shutil

    assert run("--epochs=1") == 0
    moved = data.rename(tmp_path / "moved.jsonl")
    copied = shutil.copytree(model_folder, tmp_path / "model")
    same = arguments(copied, moved, tmp_path / "out", "--learning-rate=1e-3", "--epochs=2")
    assert main(same) == 0
    assert summary_of(tmp_path / "out")["total_steps"] == 12


def test_options_that_change_no_mathematics_may_change(run, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert run("--epochs=2") == 130
    more = ("--eval-every=4", f"--eval={data}", "--checkpoint-every=2", "--samples=1",
            "--sample-tokens=2", "--report-to=csv", "--gradient-checkpointing",
            "--bad-rows=fail")  # fmt: skip
    assert run("--epochs=2", *more) == 0
    summary = summary_of(tmp_path / "out")
    assert summary["total_steps"] == 12 and summary["after"]["step"] == 12
    assert run("--epochs=2", f"--output={tmp_path / 'whole'}") == 0
    assert same_parameters(tmp_path / "out", tmp_path / "whole")
    assert run("--epochs=3", "--batch-size=8") == 1


def test_after_a_signal_the_command_says_how_to_go_on(run, capsys, monkeypatch):
    stop_at(monkeypatch, 3)
    assert run("--epochs=2", "--restart") == 130
    said = [line for line in capsys.readouterr().err.splitlines() if "to continue: " in line]
    assert len(said) == 1 and said[0].startswith("apt-model: stopped after step 3; ")
    words = said[0].split("to continue: ")[1].split()
    assert words[:2] == ["apt-model", "train-dpo"] and "--restart" not in words
    assert main(words[1:]) == 0
    assert "continuing after step 3" in capsys.readouterr().err


def test_a_number_of_steps_wins_over_epochs(run, tmp_path):
    assert run("--max-steps=8") == 0  # an epoch has 6
    assert summary_of(tmp_path / "out")["total_steps"] == 8


# Schedules


def rates_of(name, warmup, total, options=None):
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    made = schedule(name, warmup, total, options)(optimizer)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return rates


def test_schedules_by_name():
    assert rates_of("constant", 2, 4) == [1.0, 2.0, 2.0, 2.0]
    assert rates_of("linear", 2, 6) == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0, 0.5])
    cosine = [1 + torch.cos(torch.tensor(torch.pi * i / 4)).item() for i in range(4)]
    assert rates_of("cosine", 0, 4) == pytest.approx(cosine)
    lowest = rates_of("cosine_with_min_lr", 0, 50, {"min_lr_rate": 0.5})
    assert min(lowest) == pytest.approx(1.0, abs=0.01) and lowest[0] == 2.0
    assert schedule("constant", 0, 5) is None
    for name, options, message in (
        ("steep", {}, "--schedule steep: .*cosine, "),
        ("reduce_lr_on_plateau", {}, "follows a measured figure"),
        ("cosine", {"min": 1}, "--schedule cosine: "),
        ("constant", {"min": 1}, "--schedule-options: constant has none, got min"),
    ):
        with pytest.raises(ValueError, match=message):
            schedule(name, 1, 5, options)


def test_the_warm_up_is_a_share_of_the_steps(run, tmp_path, capsys):
    assert run("--schedule=linear", "--warmup-ratio=0.34") == 0
    rates = summary_of(tmp_path / "out")["curves"]["learning_rate"]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert run("--warmup-ratio=0.3", "--warmup-steps=2", "--restart") == 1
    assert "--warmup-ratio must be" in capsys.readouterr().err
    assert run("--schedule=none", "--restart") == 1
    assert "--schedule none: " in capsys.readouterr().err


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_run_stopped_in_its_warm_up_continues_in_it(run, tmp_path, monkeypatch, schedule):
    given = ("--warmup-steps=5", f"--schedule={schedule}")
    assert run(*given, f"--output={tmp_path / 'whole'}") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run(*given) == 130
    assert run(*given) == 0
    rates = [summary_of(tmp_path / n)["curves"]["learning_rate"] for n in ("out", "whole")]
    assert rates[0] == rates[1] and rates[0][:3] == pytest.approx([2e-4, 4e-4, 6e-4])
    assert same_parameters(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("norms_too", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_weight_decay_shrinks_weights(run, tmp_path, decay, norms_too):
    more = ["--decay-norms-and-biases"] if norms_too else []
    assert run(f"--weight-decay={decay}", "--learning-rate=1e-2", "--max-steps=1", *more) == 0
    assert run("--weight-decay=0", "--learning-rate=1e-2", "--max-steps=1", "--restart",
               f"--output={tmp_path / 'none'}") == 0  # fmt: skip
    start = test_cli.tiny_llama().float().state_dict()
    ours, theirs = (parameters(tmp_path / n) for n in ("out", "none"))
    for name, shrinks in (("lm_head.weight", True), ("model.norm.weight", norms_too)):
        expected = theirs[name] - 1e-2 * decay * shrinks * start[name]
        torch.testing.assert_close(ours[name], expected)


def test_the_hash_of_a_folder_is_of_what_its_links_lead_to(tmp_path):
    """Images of a linked folder are trained on: another content is another run."""
    inside, outside = tmp_path / "data", tmp_path / "elsewhere"
    inside.mkdir()
    outside.mkdir()
    (inside / "own.png").write_bytes(b"own")
    (inside / "linked").symlink_to(outside, target_is_directory=True)
    (outside / "back").symlink_to(inside, target_is_directory=True)  # a loop
    (outside / "theirs.png").write_bytes(b"first")
    first = sha256_of(inside)
    assert sha256_of(inside) == first
    (outside / "theirs.png").write_bytes(b"other")
    assert sha256_of(inside) != first
    (outside / "theirs.png").write_bytes(b"first")
    copied = tmp_path / "copied"
    (copied / "linked").mkdir(parents=True)
    (copied / "own.png").write_bytes(b"own")
    (copied / "linked" / "theirs.png").write_bytes(b"first")
    assert sha256_of(copied) == first  # what is read is the same


# Files that are damaged, locked or left


@pytest.fixture
def stopped(run, tmp_path, monkeypatch):
    """A run stopped after step 4, with checkpoints of the steps 4 and 3."""
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert run("--checkpoint-every=3") == 130
    return tmp_path / "out"


def flipped(content):
    """A bit in the middle of the largest record: the gaps between records hold nothing."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        record = max(file.infolist(), key=lambda x: x.file_size)
    lengths = struct.unpack_from("<HH", content, record.header_offset + 26)  # of name and extra
    middle = record.header_offset + 30 + sum(lengths) + record.file_size // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def foreign(content):
    file = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, file)
    return file.getvalue()


def of_a_list(content):
    file = io.BytesIO()
    torch.save([1, 2], file)
    return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    [lambda c: b"", lambda c: b"garbage" * 99, foreign, of_a_list, lambda c: c[: len(c) // 2],
     lambda c: c[:-1], flipped],
    ids=["empty", "garbage", "foreign", "list", "truncated", "one byte short", "flipped"],
)  # fmt: skip
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_offered(
    damage, stopped, run, tmp_path, capsys
):
    file = stopped / "checkpoint.pt"
    file.write_bytes(damage(file.read_bytes()))
    assert run() == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and str(file) in errors[0]
    assert "--resume previous" in errors[0] and "--restart" in errors[0]
    assert run("--resume=previous") == 0
    assert "continuing after step 3" in capsys.readouterr().err
    assert run(f"--output={tmp_path / 'whole'}") == 0
    assert same_parameters(stopped, tmp_path / "whole")


def test_every_flipped_byte_is_seen_or_changes_nothing(tmp_path):
    state = {"a": torch.arange(40.0), "b": [1, "two", {"c": torch.ones(3, dtype=torch.long)}]}
    file = tmp_path / "state.pt"
    save_tensors(file, state)
    content, seen = file.read_bytes(), 0
    for place in range(0, len(content), 3):
        changed = bytearray(content)
        changed[place] ^= 4
        file.write_bytes(bytes(changed))
        try:
            read = load_tensors(file)
        except DamagedFile as error:
            assert str(file) in str(error)
            seen += 1
            continue
        assert torch.equal(read["a"], state["a"]) and str(read["b"]) == str(state["b"])
    assert seen > 100
    with zipfile.ZipFile(file, "w") as other:
        other.writestr("a", "b")
    with pytest.raises(DamagedFile, match=r"state\.pt is damaged, or no file of this program"):
        load_tensors(file)


def test_the_checkpoint_before_the_last_must_be_there(run, capsys):
    assert run("--resume=previous") == 1
    assert "checkpoint.previous.pt is missing: --resume previous" in capsys.readouterr().err


def test_a_damaged_summary_is_named_and_does_not_stop_a_resume(run, tmp_path, capsys):
    assert run("--epochs=1") == 0
    for text in ("{", "[1]", "{}"):
        (tmp_path / "out" / "summary.json").write_text(text)
        assert run("--epochs=1") == 0
        assert "summary.json is damaged" in capsys.readouterr().err
        assert summary_of(tmp_path / "out")["finished"]


def test_a_folder_has_one_run_at_a_time(run, tmp_path, capsys):
    output = tmp_path / "out"
    program = (
        "import sys, time\nfrom pathlib import Path\n"
        "from apt_model.training.files import FolderLock\n"
        "with FolderLock(Path(sys.argv[1])): print('taken', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(output)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        assert other.stdout.readline() == "taken\n"
        assert run() == 1
        message = f"{output} is written by another run (process {other.pid})"
        assert message in capsys.readouterr().err
        assert run(f"--output={tmp_path / 'free'}") == 0
    finally:
        other.kill()
        other.wait()
    assert (output / ".lock").exists()  # of a process that was killed
    assert run() == 0
    assert not (output / ".lock").exists()


def test_what_killed_processes_left_is_cleaned_up(run, tmp_path):
    output = tmp_path / "out"
    assert run("--epochs=1") == 0
    (output / ".checkpoint.pt.4242").write_bytes(b"half")
    (output / ".model.4242").mkdir()
    (output / ".model.4242" / "half").write_bytes(b"half")
    os.replace(output / "model", output / ".model.old")  # killed while it was replaced
    with FolderLock(output):
        assert (output / "model" / "config.json").exists()
    names = {path.name for path in output.iterdir()}
    assert not any(name.startswith(".") for name in names), names


def test_saving_is_tried_before_the_first_step(model_folder, data, tmp_path, monkeypatch, capsys):
    from apt_model.commands import train_dpo

    make_job, trained = train_dpo.make_job, []

    def refusing(folder):
        raise ValueError(f"{folder}: this model cannot be saved")

    def make(options):
        job = make_job(options)
        job.check_saving, job.train_step = refusing, lambda **batch: trained.append(1)
        return job

    monkeypatch.setattr(train_dpo, "make_job", make)
    assert main(arguments(model_folder, data, tmp_path / "out")) == 1
    assert f"{tmp_path / 'out' / 'model'}: this model cannot be saved" in capsys.readouterr().err
    assert not trained and not (tmp_path / "out").exists()


# What is told


def test_a_dry_run_says_what_would_be_done_and_leaves_nothing(run, tmp_path, capsys):
    assert run("--dry-run", "--epochs=2") == 0
    text = capsys.readouterr().out
    lines = {
        line.rpartition("  ")[0].strip(): line.split()[-1] for line in text.splitlines() if line
    }
    assert lines["pairs"] == "24" and lines["steps"] == "12" and "steps an epoch" in lines
    row = next(line for line in text.splitlines() if line.startswith("  chosen: "))
    words = row.split()[1:]  # of an answer the tokens count, of a prompt they do not
    assert words[:2] == ["a", "film"] and words[3:][0] == "[was]" and words[-1] == "[</s>]"
    assert "AdamW" in text and "frozen copy" in text and "median" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["pretrain-mlm", "pretrain-contrastive"])
def test_a_dry_run_of_encoders(command, encoder_folder, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(test_cli_pretraining.texts(20)))
    more = ["--mask-prob=0.9"] if command == "pretrain-mlm" else []
    given = [command, f"--model={encoder_folder}", f"--data={texts}", "--device=cpu", *more]
    assert main([*given, f"--output={tmp_path / 'out'}", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "input" in text and "[CLS]" in text
    if command == "pretrain-mlm":
        row = next(line for line in text.splitlines() if line.startswith("  input: "))
        assert row.count("[w") > 3 and "[[CLS]]" not in row


def test_samples_are_written_before_during_and_after(run, data, tmp_path, monkeypatch):
    given = ("--samples=2", "--sample-tokens=3", "--eval-every=4")
    assert run(*given, f"--output={tmp_path / 'whole'}") == 0
    lines = (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()
    read = [json.loads(line) for line in lines]
    assert [line["step"] for line in read] == [0, 0, 4, 4, 6, 6]
    assert read[0]["prompt"] == "a film w0"
    assert all(len(line["response"].split()) <= 3 for line in read)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert run(*given) == 130
    assert run(*given) == 0
    again = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert [line for line in again if json.loads(line)["step"] != 5] == lines
    assert same_parameters(tmp_path / "out", tmp_path / "whole")  # writing draws nothing


def test_samples_need_a_model_that_writes(model_folder, data, tmp_path, capsys):
    given = arguments(model_folder, data, tmp_path / "out", "--samples=1")
    assert main(["train-reward-model", *given[1:]]) == 1
    assert "--samples: train-reward-model trains no model that writes" in capsys.readouterr().err


def test_figures_go_into_a_table(run, data, tmp_path, monkeypatch):
    given = ("--report-to=csv", f"--eval={data}", "--eval-every=3")
    with monkeypatch.context() as patch:
        stop_at(patch, 10)  # held-out rows are collated too
        status = run(*given)
    assert status == 130 and run(*given) == 0
    with open(tmp_path / "out" / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    curves = summary_of(tmp_path / "out")["curves"]
    assert [float(row["step"]) for row in table] == [1, 2, 3, 4, 5, 6]
    for name, column in curves.items():
        assert [float(row[name]) if row[name] else None for row in table] == column, name


class Service:
    """Stands for wandb and mlflow: remembers what it was told."""

    def __init__(self):
        self.told, self.begun, self.ended, self.params = [], [], 0, None

    # wandb
    def init(self, *, project, name, dir, config, id, resume):
        self.begun.append(id)
        self.config = config
        return types.SimpleNamespace(
            id=id or "first", log=lambda r, step: self.told.append((step, r["loss"])),
            finish=self.end_run,
        )  # fmt: skip

    # mlflow
    def start_run(self, run_id, run_name):
        self.begun.append(run_id)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "first"))

    def log_params(self, params):
        self.params = params

    def log_metrics(self, record, step):
        self.told.append((step, record["loss"]))

    def end_run(self):
        self.ended += 1


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_figures_go_to_services_as_one_run(name, run, tmp_path, monkeypatch, capsys):
    service = Service()
    monkeypatch.setitem(sys.modules, name, service)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert run("--report-to", name) == 130
    assert run("--report-to", name) == 0
    losses = summary_of(tmp_path / "out")["curves"]["loss"]
    assert service.told == list(enumerate(losses, start=1))
    assert service.begun == [None, "first"] and service.ended == 2
    assert (service.params or service.config)["beta"] == 0.1
    monkeypatch.setitem(sys.modules, name, None)
    assert run("--report-to", name, "--restart") == 1
    assert f"--report-to {name} needs the package {name}" in capsys.readouterr().err


# Using what was trained


def test_a_trained_model_writes(run, tmp_path, capsys):
    assert run("--epochs=1") == 0
    data = write(tmp_path / "prompts.jsonl", [{"prompt": "a film w2"}])
    capsys.readouterr()
    given = [f"--model={tmp_path / 'out'}", f"--data={data}", "--max-new-tokens=3", "--device=cpu"]
    assert main(["generate", *given, "--prompt", "a film w0", "film"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["a film w0", "film", "a film w2"]
    assert all(len(line["response"].split()) <= 3 for line in lines)
    one = main(["generate", f"--model={tmp_path / 'out'}", "--prompt=film", "--max-new-tokens=3"])
    assert one == 0 and json.loads(capsys.readouterr().out) == lines[1]  # padding changes nothing
    assert main(["generate", *given[:1]]) == 1
    assert "give --prompt or --data" in capsys.readouterr().err


def test_a_trained_model_is_measured_again(run, data, tmp_path, capsys, model_folder):
    held_out = write(tmp_path / "held.jsonl", rows(40)[24:])
    assert run(f"--eval={held_out}") == 0
    capsys.readouterr()
    assert main(["evaluate", f"--run={tmp_path / 'out'}", f"--eval={held_out}"]) == 0
    figures = json.loads(capsys.readouterr().out)
    after = summary_of(tmp_path / "out")["after"]
    assert figures.pop("command") == "train-dpo"
    assert figures == pytest.approx({k: v for k, v in after.items() if k != "step"}, abs=1e-5)
    reward = write(tmp_path / "rewards.py", [REWARD.encode()])
    asked = write(tmp_path / "asked.jsonl", prompts(8))
    assert main([
        "train-grpo", f"--model={model_folder}", f"--data={asked}", f"--eval={asked}",
        f"--output={tmp_path / 'policy'}", f"--reward={reward}:happy", "--max-new-tokens=3",
        "--device=cpu", "--batch-size=4", "--learning-rate=1e-3", "--eval-every=1",
    ]) == 0  # fmt: skip
    capsys.readouterr()
    assert main(["evaluate", f"--run={tmp_path / 'policy'}", f"--eval={asked}"]) == 0
    figures = json.loads(capsys.readouterr().out)
    after = summary_of(tmp_path / "policy")["after"]
    assert figures.pop("command") == "train-grpo" and figures["sequence_kl"] != 0
    assert figures == pytest.approx({k: v for k, v in after.items() if k != "step"}, abs=1e-5)
    assert main(["evaluate", f"--run={tmp_path}", f"--eval={asked}"]) == 1


def test_an_adapter_is_merged(model_folder, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "adapter")
    given = ["merge", f"--model={tmp_path / 'adapter'}", f"--output={tmp_path / 'merged'}"]
    assert main(given) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits)
    assert main(given) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["merge", f"--model={model_folder}", f"--output={tmp_path / 'x'}"]) == 1
    assert "holds no adapter_config.json" in capsys.readouterr().err
