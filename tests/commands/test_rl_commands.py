"""The commands that train reward models and policies, on a tiny model; held-out figures."""

import errno
import json
import os
import shutil
import signal
import sys
import types
from functools import partial

import pytest
import safetensors.torch
import torch

from apt_model.commands.evaluation import Evaluation
from apt_model.commands.main import main
from apt_model.commands.reward_folder import load_text_reward
from commands import test_cli
from commands.test_cli import GOOD, parameters, rows, write
from support.tiny_models import tiny_llama

model_folder = test_cli.model_folder
REWARD = '''
import os

calls = []

def happy(row, response):
    """The share of words that the row wants."""
    words = response.split()
    return sum(word in row["wanted"] for word in words) / max(len(words), 1)

def failing(row, response):
    raise KeyError(response)

def counted(row, response):
    calls.append(1)
    if str(len(calls)) == os.environ.get("FAILS_AT"):
        raise ConnectionError("the server is gone")
    return happy(row, response)
'''


def prompts(count, start=0):
    return [
        {"prompt": f"a film w{i % 40}", "wanted": ["w7", "w8", "w9", "was", "a", "film", *GOOD]}
        for i in range(start, start + count)
    ]


@pytest.fixture
def files(tmp_path):
    return {
        "pairs": write(tmp_path / "pairs.jsonl", rows(24)),
        "held_out": write(tmp_path / "held_out.jsonl", rows(60)[24:]),
        "prompts": write(tmp_path / "prompts.jsonl", prompts(16)),
        "held_out_prompts": write(tmp_path / "held.jsonl", prompts(8, 16)),
        "reward": write(tmp_path / "rewards.py", [REWARD.encode()]),
    }


def command(name, model_folder, data, output, *more):
    return [
        name, f"--model={model_folder}", f"--data={data}", f"--output={output}",
        "--batch-size=4", "--device=cpu", *more,
    ]  # fmt: skip


def summary_of(output):
    return json.loads((output / "summary.json").read_text())


def train_rewards(model_folder, files, output, *more):
    return main(command(
        "train-reward-model", model_folder, files["pairs"], output,
        f"--eval={files['held_out']}", "--epochs=6", "--learning-rate=3e-3", *more,
    ))  # fmt: skip


SAMPLING = ("--max-new-tokens=4", "--learning-rate=3e-2", "--eval-every=4", "--kl-coef=0.01")


def grpo(model_folder, files, output, *more):
    own = any(option.startswith("--reward=") for option in more)
    return command(
        "train-grpo", model_folder, files["prompts"], output, "--epochs=4",
        *([] if own else [f"--reward={files['reward']}:happy"]),
        f"--eval={files['held_out_prompts']}", *SAMPLING, *more,
    )  # fmt: skip


def test_a_reward_model_learns_and_rewards_a_policy(model_folder, files, tmp_path, capsys):
    output = tmp_path / "rewards"
    assert train_rewards(model_folder, files, output, "--eval-every=6", "--head-layers=2") == 0
    summary = summary_of(output)
    assert summary["before"]["accuracy"] < 0.8 and summary["after"]["accuracy"] > 0.9
    assert [r["step"] for r in summary["held_out"]] == [6, 12, 18, 24, 30, 36]
    assert summary["after"] == min(summary["held_out"], key=lambda r: r["loss"])
    assert summary["pairs"] == 24 and summary["held_out_pairs"] == 36
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    held_out = summary["curves"]["held_out_accuracy"]
    assert held_out[5] == summary["held_out"][0]["accuracy"] and held_out[4] is None
    reward = load_text_reward(output / "model", "cpu", batch_size=2)
    measured = rows(60)[24:]
    chosen, rejected = (
        torch.tensor(reward([row["prompt"] for row in measured], [row[k] for row in measured]))
        for k in ("chosen", "rejected")
    )
    for key, value in (
        ("accuracy", (chosen > rejected).float().mean()), ("chosen_reward_mean", chosen.mean()),
    ):  # fmt: skip
        assert summary["after"][key] == pytest.approx(value.item(), abs=1e-5)

    policy = tmp_path / "policy"
    assert main(command(
        "train-rlhf", model_folder, files["prompts"], policy, *SAMPLING,
        f"--reward-model={output / 'model'}",
    )) == 0  # fmt: skip
    assert abs(summary_of(policy)["last_step"]["mean_reward"]) > 0.1
    capsys.readouterr()


def test_rlhf_learns_from_a_function(model_folder, files, tmp_path, capsys):
    policy = tmp_path / "policy"
    assert main(command(
        "train-rlhf", model_folder, files["prompts"], policy, "--epochs=6", *SAMPLING,
        f"--reward={files['reward']}:happy", f"--eval={files['held_out_prompts']}",
        "--ppo-epochs=2", "--gamma=1",
    )) == 0  # fmt: skip
    summary = summary_of(policy)
    assert summary["after"]["mean_reward"] > summary["before"]["mean_reward"] + 0.3
    assert summary["before"]["sequence_kl"] == pytest.approx(0, abs=1e-5)
    assert summary["prompts"] == 16 and summary["total_steps"] == 24
    assert {"mean_reward", "mean_kl", "ppo_loss"} <= set(summary["curves"])
    assert {p.name for p in policy.iterdir()} - {"best.pt"} == {
        "checkpoint.pt", "curves.png", "model", "run.yaml", "summary.json",
    }  # fmt: skip
    assert not torch.equal(
        parameters(policy)["lm_head.weight"], tiny_llama().float().lm_head.weight
    )
    assert '"finished": true' in capsys.readouterr().out


def test_grpo_learns_from_a_function_and_continues(model_folder, files, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(grpo(model_folder, files, whole)) == 0
    summary = summary_of(whole)
    assert summary["after"]["mean_reward"] > summary["before"]["mean_reward"] + 0.3
    assert summary["after"] == max(summary["held_out"], key=lambda r: r["mean_reward"])
    from apt_model.commands import policies as policy_run

    made, make = [], policy_run.make_batch

    def interrupting(*batch):
        made.append(1)
        if len(made) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return make(*batch)

    monkeypatch.setattr(policy_run, "make_batch", interrupting)
    assert main(grpo(model_folder, files, stopped)) == 130
    half = summary_of(stopped)
    assert 0 < half["total_steps"] < 16 and not (stopped / "model").exists()
    assert main(grpo(model_folder, files, stopped)) == 0
    again = summary_of(stopped)
    for key in ("held_out", "curves", "before", "after"):
        assert again[key] == summary[key], key
    ours, theirs = parameters(stopped), parameters(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def dpo_that_gets_worse(model_folder, files, output, *more):
    """Held-out pairs that prefer the opposite: the first measurement is the best."""
    swap = {"chosen": "rejected", "rejected": "chosen"}
    held_out = [{swap.get(k, k): v for k, v in row.items()} for row in rows(30)[24:]]
    write(files["held_out"], held_out)
    return command("train-dpo", model_folder, files["pairs"], output, "--learning-rate=3e-3",
                   f"--eval={files['held_out']}", *more)  # fmt: skip


COUNTED = "--reward={reward}:counted"


@pytest.fixture(scope="module")
def whole_counted(model_folder, tmp_path_factory):
    """A run of 16 steps of 16 rewards, with 8 more before them and after every fourth."""
    folder = tmp_path_factory.mktemp("counted")
    files = {
        "prompts": write(folder / "prompts.jsonl", prompts(16)),
        "held_out_prompts": write(folder / "held.jsonl", prompts(8, 16)),
        "reward": write(folder / "rewards.py", [REWARD.encode()]),
    }
    assert main(grpo(model_folder, files, folder / "out", COUNTED.format(**files))) == 0
    return files, folder / "out"


@pytest.mark.parametrize(("fails_at", "steps"), [(90, 4), (76, 4), (290, 16)])
def test_what_was_trained_is_kept_where_a_reward_fails(
    model_folder, whole_counted, tmp_path, monkeypatch, capsys, fails_at, steps
):
    """In step 5, and in the held-out measurements after step 4 and after the last one."""
    files, whole = whole_counted
    output = tmp_path / "out"
    run = grpo(model_folder, files, output, COUNTED.format(**files))
    monkeypatch.setenv("FAILS_AT", str(fails_at))
    assert main(run) == 1
    assert "the server is gone" in capsys.readouterr().err
    state = torch.load(output / "checkpoint.pt", weights_only=True)
    assert state["trainer"]["total_steps"] == steps and not (output / "model").exists()
    monkeypatch.delenv("FAILS_AT")
    assert main(run) == 0
    assert f"continuing after step {steps}" in capsys.readouterr().err
    summary, expected = summary_of(output), summary_of(whole)
    for key in ("held_out", "curves", "before", "after"):
        assert summary[key] == expected[key], key
    ours, theirs = parameters(output), parameters(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_with_another_reward_is_not_continued(model_folder, files, tmp_path, capsys):
    run = grpo(model_folder, files, tmp_path / "out", "--epochs=1")
    assert main(run) == 0
    before = files["reward"].read_bytes()
    files["reward"].write_bytes(before + b"\n\n")
    assert main(run) == 1
    assert "a run with other settings (reward_sha256: " in capsys.readouterr().err
    files["reward"].write_bytes(before)
    assert main(run) == 0
    other = COUNTED.format(**files)
    assert main(grpo(model_folder, files, tmp_path / "out", "--epochs=1", other)) == 1
    assert "(reward: 'happy' there, 'counted' here)" in capsys.readouterr().err


def test_other_held_out_rows_are_measured_anew(model_folder, files, tmp_path):
    run = grpo(model_folder, files, tmp_path / "out", "--epochs=1")
    assert main(run) == 0
    first = summary_of(tmp_path / "out")
    write(files["held_out_prompts"], prompts(5, 30))
    assert main([*run, "--epochs=2", "--eval-every=2"]) == 0
    second = summary_of(tmp_path / "out")
    assert [r["step"] for r in first["held_out"]] == [4]
    assert [r["step"] for r in second["held_out"]] == [4, 6, 8]
    assert second["held_out"][0] != first["held_out"][0] and second["total_steps"] == 8


def test_a_reward_model_takes_rows_of_the_same_prompt(model_folder, files, tmp_path, capsys):
    pairs = [{**row, "prompt": f"a film w{i % 3}"} for i, row in enumerate(rows(8))]
    write(files["pairs"], pairs)
    judge = tmp_path / "judge"
    assert main(command("train-reward-model", model_folder, files["pairs"], judge)) == 0
    for name in ("train-grpo", "train-rlhf"):
        arguments = command(name, model_folder, files["pairs"], tmp_path / name,
                            "--max-new-tokens=2", f"--reward-model={judge / 'model'}")  # fmt: skip
        assert main(arguments) == 0
        assert summary_of(tmp_path / name)["total_steps"] == 2
    weights = safetensors.torch.load_file(judge / "model" / "model.safetensors")
    weights["score.weight"] += 1
    safetensors.torch.save_file(weights, judge / "model" / "model.safetensors", {"format": "pt"})
    assert main(arguments) == 1
    assert "other settings (reward_model_sha256: " in capsys.readouterr().err


def test_the_best_state_is_kept_and_a_run_that_stagnates_ends(model_folder, files, tmp_path):
    options = partial(dpo_that_gets_worse, model_folder, files)
    output, shorter = tmp_path / "out", tmp_path / "shorter"
    assert main(options(output, "--epochs=20", "--eval-every=6", "--patience=3")) == 0
    summary = summary_of(output)
    losses = [record["loss"] for record in summary["held_out"]]
    assert losses == sorted(losses) and summary["total_steps"] == 24 and len(losses) == 4
    assert summary["after"] == summary["held_out"][0]
    assert main(options(shorter, "--epochs=1")) == 0
    theirs = parameters(shorter)
    for _ in range(2):  # asked again it leaves the finished run as it is
        ours = parameters(output)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert main(options(output, "--epochs=20", "--eval-every=6", "--patience=3")) == 0
        assert summary_of(output) == summary


def test_the_best_state_outlives_a_model_that_could_not_be_saved(
    model_folder, files, tmp_path, monkeypatch, capsys
):
    from transformers import PreTrainedTokenizerBase

    options = partial(dpo_that_gets_worse, model_folder, files)
    output, shorter = tmp_path / "out", tmp_path / "shorter"
    assert main(options(shorter, "--epochs=1")) == 0
    real = PreTrainedTokenizerBase.save_pretrained

    def refused(tokenizer, folder, **options):
        if ".try-" in str(folder):  # the try before the first step
            return real(tokenizer, folder, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    run = options(output, "--epochs=3", "--eval-every=6")
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", refused)
    assert main(run) == 1
    assert f"{output / 'model'} cannot be written: [Errno 28]" in capsys.readouterr().err
    left = sorted(path.name for path in output.iterdir())
    assert left == ["best.pt", "checkpoint.pt", "curves.png", "run.yaml"]
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", real)
    best = (output / "best.pt").read_bytes()
    (output / "best.pt").unlink()
    assert main(run) == 1
    assert f"{output / 'best.pt'} is missing" in capsys.readouterr().err
    (output / "best.pt").write_bytes(best)
    assert main(run) == 0
    summary = summary_of(output)
    assert summary["after"] == summary["held_out"][0] != summary["held_out"][-1]
    ours, theirs = parameters(output), parameters(shorter)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (output / "best.pt").exists()  # the last state is another one


@pytest.mark.parametrize("same", [False, True])
def test_a_model_of_an_earlier_run_is_not_taken_for_this_one_s(
    model_folder, files, tmp_path, monkeypatch, same
):
    """Not by its settings either: the model folder it starts from has other parameters."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

    start, output = tmp_path / "start", tmp_path / "out"
    shutil.copytree(model_folder, start)
    first = command("train-dpo", start, files["pairs"], output, "--learning-rate=1e-4")
    assert main(first) == 0
    earlier = parameters(output)
    again = first if same else [*first, "--learning-rate=1e-2"]
    model = AutoModelForCausalLM.from_pretrained(start)
    torch.nn.init.constant_(model.model.norm.weight, 2.0)
    model.save_pretrained(start)

    real = PreTrainedTokenizerBase.save_pretrained

    def interrupted(tokenizer, folder, **options):
        if ".try-" in str(folder):  # the try before the first step
            return real(tokenizer, folder, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", interrupted)
        assert main([*again, "--restart"]) == 130
    kept = parameters(output)
    assert all(torch.equal(kept[name], earlier[name]) for name in earlier)
    assert main(again) == 0
    state = torch.load(output / "checkpoint.pt", weights_only=True)["trainer"]
    trained = state["modules"]["policy"]
    assert all(torch.equal(value, trained[name]) for name, value in parameters(output).items())
    assert not all(torch.equal(value, earlier[k]) for k, value in parameters(output).items())


def test_a_restart_that_fails_at_once_loses_nothing(model_folder, files, tmp_path, monkeypatch):
    run = command("train-dpo", model_folder, files["pairs"], tmp_path / "out")
    assert main(run) == 0

    def contents():
        return {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}

    before = contents()
    monkeypatch.setattr("apt_model.commands.pairs.collate", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([*run, "--restart"])
    assert contents() == before


def test_measuring_does_not_change_what_training_draws(tmp_path):
    class Trainer:
        total_steps = 1
        curves = types.SimpleNamespace(annotate=lambda values: None)

        def state_dict(self, include_frozen):
            return {"modules": {}}

    seen = []
    evaluation = Evaluation(
        lambda: seen.append(torch.rand(2).tolist()) or {"loss": 1.0}, "loss", False, 1, 2,
        tmp_path / "best.pt",
    )  # fmt: skip
    state = torch.get_rng_state()
    evaluation.start()
    evaluation.start()
    for step in range(1, 5):
        Trainer.total_steps = step
        torch.rand(1)
        state = torch.get_rng_state()
        evaluation.after_step(Trainer(), False)
        assert evaluation.stagnates == (step > 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(seen) == 5 and all(drawn == seen[0] for drawn in seen)
    other = Evaluation(lambda: {}, "loss", False, 1, 2, tmp_path / "best.pt")
    other.load_state_dict(evaluation.state_dict())
    assert other.stagnates and other.best == {"step": 1, "loss": 1.0}
    other.best = {"step": 0, "loss": 2.0}  # of a checkpoint that is older than the file
    other.start()
    assert other.best == {"step": 1, "loss": 1.0}


def test_curves_for_tensorboard(model_folder, files, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.folder = folder

        def add_scalar(self, name, value, step):
            written.append((self.folder, name, step))

        def close(self):
            written.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    folder = tmp_path / "board"
    arguments = command("train-dpo", model_folder, files["pairs"], tmp_path / "out")
    assert main([*arguments, f"--tensorboard={folder}"]) == 0
    assert (str(folder), "loss", 6) in written and written[-1] == "closed"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main([*arguments, f"--tensorboard={folder}", "--restart"]) == 1


WRONG = [
    (["--reward=rewards"], "--reward must be FILE.py:NAME"),
    (["--reward=nowhere.py:happy"], "FileNotFoundError"),
    (["--reward=json:nothing"], "AttributeError"),
    ([], "one of --reward and --reward-model"),
    (["--reward=json:loads"], "reward json:loads: it is called with a row and a response"),
    (
        ["--reward", "operator:contains", "--reward-weight", "1", "2"],
        "for each of 1 rewards, got 2",
    ),
    (["--reward=operator:contains", "--reward-weight=nan"], "expected finite numbers"),
    (["--reward=operator:contains", "--stop="], "--stop: expected texts, got an empty one"),
    (["--reward=operator:contains", "--cut-penalty=-1"], "--cut-penalty must not be negative"),
    (["--reward=json:loads", "--reward-model=."], "one of --reward and --reward-model"),
    (["--reward-model=."], "Unrecognized model in ."),
    (["--reward=json:loads", "--group-size=0"], "--group-size must be at least 1"),
    (["--reward=operator:contains", "--kl-coef=-1"], "GRPOConfig.kl_coef"),
    (
        ["--reward=operator:contains", "--max-length=3"],
        "'prompt' has 3 tokens, at most 2 leave room",
    ),
    (["--reward=json:loads", "--patience=2"], "--patience needs --eval"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_errors(model_folder, files, tmp_path, capsys, options, message):
    arguments = command(
        "train-grpo", model_folder, files["prompts"], tmp_path / "out", "--bad-rows=fail"
    )
    assert main([*arguments, *options]) == 1
    error = capsys.readouterr().err
    assert message in error and len([line for line in error.splitlines() if "error:" in line]) == 1
    assert not (tmp_path / "out").exists()


def test_a_reward_that_fails_names_function_row_and_line(model_folder, files, tmp_path, capsys):
    arguments = command("train-grpo", model_folder, files["prompts"], tmp_path / "out",
                        "--max-new-tokens=2", f"--reward={files['reward']}:failing")  # fmt: skip
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: reward {files['reward']}:failing failed on {files['prompts']}:" in error
    assert ": KeyError: '" in error and error.endswith(f"({files['reward']}:12)")


@pytest.mark.parametrize("name", ["train-grpo", "train-rlhf"])
def test_the_same_prompt_in_several_rows(model_folder, files, tmp_path, name):
    """Each response is scored with its own row, in held-out figures too."""
    write(tmp_path / "ids.py", [b"def number(row, response): return row['id']\n"])
    write(files["prompts"], [{"prompt": "a film", "id": i} for i in (1, 2, 4, 5)])
    write(files["held_out_prompts"], [{"prompt": "a film", "id": 10}, {"prompt": "zzz", "id": 20},
                                      {"prompt": "qqq", "id": 30}])  # fmt: skip
    assert main(command(
        name, model_folder, files["prompts"], tmp_path / "out", "--max-new-tokens=2",
        f"--reward={tmp_path / 'ids.py'}:number", f"--eval={files['held_out_prompts']}",
    )) == 0  # fmt: skip
    summary = summary_of(tmp_path / "out")
    assert summary["curves"]["mean_reward"] == [3.0]
    assert summary["before"]["mean_reward"] == summary["after"]["mean_reward"] == 20.0


REWARDS = b"""
from __future__ import annotations
from dataclasses import dataclass
from lengths import count

@dataclass
class Word:
    text: str

def words(row, response, finished, token_ids):
    assert len(token_ids) >= count(response)
    return count(Word(response).text)

async def even(row, response):
    return None if row["id"] % 2 else 1.0
"""


def test_several_rewards_with_weights_and_rows_that_abstain(model_folder, files, tmp_path):
    write(tmp_path / "lengths.py", [b"def count(text): return len(text.split())\n"])
    file = write(tmp_path / "some.py", [REWARDS])
    rows_of_ids = [{"prompt": "a film", "id": i} for i in range(4)]
    write(files["prompts"], rows_of_ids)
    write(files["held_out_prompts"], rows_of_ids[:3])
    run = command(
        "train-grpo", model_folder, files["prompts"], tmp_path / "out", "--max-new-tokens=4",
        "--reward", f"{file}:words", f"{file}:even", "--reward-weight", "0.5", "-2",
        f"--eval={files['held_out_prompts']}",
    )  # fmt: skip
    assert main(run) == 0
    summary = summary_of(tmp_path / "out")
    curves, before = summary["curves"], summary["before"]
    assert curves["reward_even"] == [1.0] and curves["abstained_share_even"] == [0.5]
    assert curves["abstained_share"] == [0.0] and 0 <= curves["cut_share"][0] <= 1
    mean = 0.5 * curves["reward_words"][0] - 2 * 0.5
    assert curves["mean_reward"][0] == pytest.approx(mean)
    assert before["reward_even"] == pytest.approx(1) and before[
        "abstained_share_even"
    ] == pytest.approx(1 / 3)
    assert before["mean_reward"] == pytest.approx(0.5 * before["reward_words"] - 2 * 2 / 3)
    assert main([*run[:-4], "1", "1", run[-1]]) == 1  # other weights: another run


@pytest.mark.parametrize("name", ["train-grpo", "train-rlhf"])
def test_stop_strings_and_cut_responses(model_folder, files, tmp_path, name):
    lengths = {}
    for stop in ((), ("w1", "was", "film", "w2", "w3", "a")):
        output = tmp_path / str(len(stop))
        assert main(command(
            name, model_folder, files["prompts"], output, "--max-new-tokens=12",
            f"--reward={files['reward']}:happy", "--cut-responses=mask",
            *(["--stop", *stop] if stop else []),
        )) == 0  # fmt: skip
        curves = summary_of(output)["curves"]
        lengths[bool(stop)] = sum(curves["response_length"])
        assert all(0 <= share <= 1 for share in curves["cut_share"])
    assert lengths[True] < lengths[False]


def test_a_reward_model_sees_what_was_written(model_folder, files, tmp_path):
    """Without an end token where the response was cut."""
    judge = tmp_path / "judge"
    assert main(command("train-reward-model", model_folder, files["pairs"], judge)) == 0
    reward = load_text_reward(judge / "model", "cpu")
    cut, whole = reward(["a film"] * 2, ["was good"] * 2, [False, True])
    assert reward(["a film"], ["was good"]) == [pytest.approx(whole)] and cut != whole


def test_what_is_outside_the_recommended_range_is_told(model_folder, files, tmp_path, capsys):
    arguments = grpo(model_folder, files, tmp_path / "out", "--epochs=1", "--group-size=3")
    assert main(arguments) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "recommended" in line]
    assert notes == [
        "apt-model: --learning-rate 0.03 is outside of 1e-06 to 1e-05, which is recommended",
        "apt-model: --group-size 3 is outside of 4 to 8, which is recommended",
    ]


RECOMMENDED = {
    "train-dpo": {
        "beta": (0.05, 0.5), "label_smoothing": (0, 0.1), "learning_rate": (1e-6, 1e-5),
    },
    "train-grpo": {"group_size": (4, 8), "learning_rate": (1e-6, 1e-5)},
    "train-rlhf": {
        "ppo_epochs": (4, 8), "clip_epsilon": (0.1, 0.3), "kl_coef": (0.01, 0.2),
        "learning_rate": (1e-6, 1e-5),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RECOMMENDED)
def test_help_names_the_ranges_that_are_checked(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option, (low, high) in RECOMMENDED[name].items():
        words = f"recommended {low:g}-{high:g}".replace("e-0", "e-")
        name_of_value = f"--{option.replace('_', '-')} {option.upper()} "
        assert words in text.split(name_of_value)[1].split(" --")[0], option


OF_PROMPTS = ["longer prompts cannot be used", "one less than --max-length", "sampling ends there"]


@pytest.mark.parametrize(
    ("name", "recommended"),
    [
        ("train-reward-model", ["(default: own)", "1e-6-1e-5", "--center-coef"]),
        (
            "train-grpo",
            ["recommended 4-8", "relative first", "1e-6-1e-5", "(default: 0.2)", *OF_PROMPTS],
        ),
        (
            "train-rlhf",
            ["recommended 4-8", "0.1-0.3", "0.01-0.2", "1e-6-1e-5", "(default: 0.95)", *OF_PROMPTS],
        ),
    ],
)
def test_help_names_the_recommended_ranges(name, recommended, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    of_prompts = name != "train-reward-model"
    assert ("half of --max-length" in text) != of_prompts and ("cut beyond" in text) != of_prompts
    for words in [*recommended, "--eval", "--tensorboard", "JSON lines"]:
        assert words in text, words
