"""The commands in two processes, as torchrun starts them: equal to one process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apt_model.commands.main import main
from commands import test_cli, test_cli_pretraining
from commands.test_cli import rows, write
from commands.test_rl_commands import REWARD, prompts

ROOT = Path(__file__).parents[2]
causal_folder = test_cli.model_folder
encoder_folder = test_cli_pretraining.model_folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    texts = folder / "texts.txt"
    texts.write_text("\n".join(test_cli_pretraining.texts(21)))
    return {
        "pairs": write(folder / "pairs.jsonl", rows(21)),
        "held_out": write(folder / "held_out.jsonl", rows(30)[21:]),
        "texts": texts,
        "prompts": write(folder / "prompts.jsonl", prompts(8)),
        "reward": write(folder / "rewards.py", [REWARD.encode()]),
    }


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def start(arguments, count=2):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}",
         "--standalone", "-m", "apt_model.commands.main", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        start_new_session=True,
    )  # fmt: skip


def end(program, timeout=240):
    try:
        return *program.communicate(timeout=timeout), program.returncode
    finally:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)


def torchrun(*arguments):
    return end(start(arguments))


SHARED = ("--device=cpu", "--batch-size=8", "--learning-rate=3e-3", "--epochs=2")


def arguments(name, files, causal, encoder, output):
    kinds = {
        "train-dpo": [f"--data={files['pairs']}", f"--eval={files['held_out']}"],
        "train-reward-model": [f"--data={files['pairs']}", "--dropout=0", "--pooling=mean",
                               "--gradient-accumulation-steps=2"],
        "pretrain-mlm": [f"--data={files['texts']}", f"--eval={files['texts']}"],
        "pretrain-contrastive": [f"--data={files['texts']}", "--hidden-dim=16", "--delete-prob=0",
                                 "--method=simclr"],
    }  # fmt: skip
    model = encoder if name.startswith("pretrain") else causal
    return [name, f"--model={model}", f"--output={output}", *SHARED, *kinds[name]]


# Softmax does not depend on the first, the batch norm of contrastive learning not on the second:
# their gradients are rounding alone, which AdamW makes steps of
NO_GRADIENT = ("key.bias", "layer.1.output.LayerNorm.bias")


def weights(output):
    return load_file(output / "model" / "model.safetensors")


def assert_equal(ours, theirs, tolerance=2e-4):
    one, two = (json.loads((output / "summary.json").read_text()) for output in (theirs, ours))
    assert two["total_steps"] == one["total_steps"] and two["finished"]
    for name in ("before", "after"):
        assert two[name] == pytest.approx(one[name], abs=2e-4), name
    assert two["curves"]["loss"] == pytest.approx(one["curves"]["loss"], abs=2e-4)
    expected = weights(theirs)
    for name, value in weights(ours).items():
        if name.endswith(NO_GRADIENT):
            continue
        torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    "name", ["train-dpo", "train-reward-model", "pretrain-mlm", "pretrain-contrastive"]
)
def test_two_processes_train_as_one(name, files, causal_folder, encoder_folder, tmp_path):
    given = (files, causal_folder, encoder_folder)
    assert main(arguments(name, *given, tmp_path / "one")) == 0
    out, err, status = torchrun(*arguments(name, *given, tmp_path / "two"))
    assert status == 0, err
    assert out.count('"finished": true') == 1  # one run, not two
    assert_equal(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("program", [["--no-python", "apt-model"], ["-m", "apt_model"]])
def test_torchrun_starts_the_command(program, files, causal_folder, tmp_path):
    """As it is written in the documentation, with the program that the installation makes."""
    settings = (ROOT / "pyproject.toml").read_text()
    module, function = re.search(r'^apt-model = "(.+):(.+)"$', settings, re.MULTILINE).groups()
    program_file = tmp_path / "bin" / "apt-model"
    program_file.parent.mkdir()
    program_file.write_text(
        f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
    )
    program_file.chmod(0o755)
    path = os.pathsep.join([str(program_file.parent), os.environ["PATH"]])
    done = subprocess.run(
        [Path(sys.executable).with_name("torchrun"), "--nproc-per-node", "2", "--standalone",
         *program, "train-dpo", f"--model={causal_folder}", f"--data={files['pairs']}",
         f"--output={tmp_path / 'out'}", "--device=cpu", "--max-steps=1"],
        capture_output=True, text=True, timeout=240, env={**environment(), "PATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total_steps"] == 1  # one run, not two


def test_two_processes_of_fsdp_train_as_one(files, causal_folder, encoder_folder, tmp_path):
    run = arguments("train-dpo", files, causal_folder, encoder_folder, tmp_path / "one")
    assert main(run) == 0
    sharded = [*run, f"--output={tmp_path / 'two'}", "--fsdp"]
    _, err, status = torchrun(*sharded, "--max-steps=3")  # stopped and continued
    assert status == 0, err
    _, err, status = torchrun(*sharded)
    assert status == 0 and "continuing after step 3" in err, err
    assert_equal(tmp_path / "two", tmp_path / "one")
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model")
    assert main([*sharded, "--epochs=3"]) == 0  # by one process


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_two_processes_of_16_bits_train_as_one(
    dtype, sharded, files, causal_folder, encoder_folder, tmp_path
):
    """The float32 copies of 16-bit parameters are each process's own, or its part of them."""
    run = arguments("train-dpo", files, causal_folder, encoder_folder, tmp_path / "one")
    run += [f"--dtype={dtype}", "--learning-rate=1e-3", "--epochs=6"]
    assert main(run) == 0
    given = [*run, f"--output={tmp_path / 'two'}", *(["--fsdp"] if sharded else [])]
    for more in (["--max-steps=7"], []):  # stopped and continued
        _, err, status = torchrun(*given, *more)
        assert status == 0, err
    one, two = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two"))
    assert one["before"]["loss"] - one["after"]["loss"] > 0.01
    assert two["after"] == pytest.approx(one["after"], abs=5e-3)
    assert two["curves"]["loss"] == pytest.approx(one["curves"]["loss"], abs=1e-2)
    expected, moved = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert {value.dtype for value in moved.values()} == {getattr(torch, dtype)}
    for name, value in moved.items():
        torch.testing.assert_close(value, expected[name], rtol=0.02, atol=2e-3, msg=name)


@pytest.mark.parametrize("name", ["train-grpo", "train-rlhf"])
def test_two_processes_sample_and_learn(name, files, causal_folder, tmp_path):
    out, err, status = torchrun(
        name, f"--model={causal_folder}", f"--data={files['prompts']}", *SHARED, "--epochs=8",
        f"--output={tmp_path / 'out'}", f"--reward={files['reward']}:happy", "--kl-coef=0.01",
        f"--eval={files['prompts']}", "--max-new-tokens=4", "--learning-rate=2e-2",
    )  # fmt: skip
    assert status == 0, err
    summary = json.loads(out)
    assert summary["total_steps"] == 8
    assert summary["after"]["mean_reward"] > summary["before"]["mean_reward"] + 0.2


DYING = """
import os
def reward(row, response):
    if os.environ["RANK"] == "1":
        os._exit(3)
    return 1.0
"""
FAILING = """
import os
def reward(row, response):
    if os.environ["RANK"] == "1":
        raise ConnectionError("the server is gone")
    return 1.0
"""


@pytest.mark.parametrize(("text", "said"), [(DYING, ""), (FAILING, "the server is gone")])
def test_one_process_that_ends_ends_the_others(text, said, files, causal_folder, tmp_path):
    reward = write(tmp_path / "reward.py", [text.encode()])
    begin = time.monotonic()
    _, err, status = torchrun(
        "train-grpo", f"--model={causal_folder}", f"--data={files['prompts']}", *SHARED,
        f"--output={tmp_path / 'out'}", f"--reward={reward}:reward", "--max-new-tokens=2",
        "--process-timeout=60",
    )  # fmt: skip
    assert status != 0 and said in err
    assert time.monotonic() - begin < 120


def test_errors_of_options_are_said_once(files, causal_folder, encoder_folder, tmp_path):
    run = arguments("train-dpo", files, causal_folder, encoder_folder, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint.pt").write_bytes(b"garbage")
    _, err, status = torchrun(*run)
    assert status != 0 and err.count("checkpoint.pt is damaged") == 1


def test_a_signal_to_one_process_stops_all(files, causal_folder, encoder_folder, tmp_path):
    output = tmp_path / "out"
    run = arguments("train-dpo", files, causal_folder, encoder_folder, output)
    program = start([*run, "--epochs=5000", "--checkpoint-every=1"])
    deadline = time.monotonic() + 120
    while not (output / "checkpoint.pt").exists():
        assert program.poll() is None and time.monotonic() < deadline, program.communicate()
        time.sleep(0.1)
    program.send_signal(signal.SIGTERM)
    end(program)
    summary = json.loads((output / "summary.json").read_text())
    assert not summary["finished"] and summary["total_steps"] >= 1
