"""Options from dataclasses: flags, YAML files, help."""

import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from apt_model.commands import arguments
from apt_model.commands.main import TRAINING, main
from apt_model.commands.options import TrainingOptions
from commands import test_cli
from commands.test_cli import rows, write

model_folder = test_cli.model_folder


@dataclass(kw_only=True)
class Sizes:
    """Sizes."""

    length: int = field(metadata={"help": "tokens, at most 100%", "metavar": "N"})
    rate: float = field(default=1e-6, metadata={"help": "a rate", "recommended": (1e-6, 1e-5)})
    limit: float | None = field(default=1.0, metadata={"help": "none: no limit"})
    files: tuple[Path, ...] = field(default=(), metadata={"help": "files"})
    kind: Literal["a", "b"] = field(default="a", metadata={"help": "a kind"})
    whole: bool = field(default=False, metadata={"help": "the whole", "names": ("--all",)})
    place: Path | None = field(default=None, metadata={"help": "a place", "decides": False})

    def check(self):
        arguments.check_at_least(self, 1, "length")


@dataclass(kw_only=True)
class Command:
    """Does 100% of something."""

    sizes: Sizes


def read(*given):
    return arguments.read_options("some-command", Command, given).sizes


def test_a_flag_of_several_values_that_comes_again_adds_to_them(tmp_path):
    """On the command line, as in `--reward a.py:f --reward b.py:g`; it still replaces a file's."""
    file = tmp_path / "run.yaml"
    file.write_text("length: 3\nfiles: [x, y]\n")
    given = ("--files", "a", "--files=b", "--files", "c", "d")
    for more in (("--length=3",), (f"--config={file}",)):
        assert [str(path) for path in read(*more, *given).files] == ["a", "b", "c", "d"]
    assert [str(path) for path in read(f"--config={file}").files] == ["x", "y"]


def test_flags_become_fields():
    assert read("--length=3") == Sizes(length=3)
    sizes = read("--length", "3", "--rate=2", "--limit=none", "--files", "a", "b", "--all")
    assert sizes == Sizes(length=3, rate=2.0, limit=None, files=(Path("a"), Path("b")), whole=True)
    assert read("--length=3", "--whole", "--no-whole").whole is False
    for wrong in (["--length=x"], ["--length=3", "--kind=c"], [], ["--length=3", "--len=4"]):
        with pytest.raises(SystemExit) as ended:
            read(*wrong)
        assert ended.value.code == 2


def test_a_file_gives_options_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("length: 3\nrate: 1e-5\nfiles: [a, b]\nlimit: null\nall: true\nplace: x\n")
    from_file = Sizes(
        length=3, rate=1e-5, files=(Path("a"), Path("b")), limit=None, whole=True, place=Path("x")
    )
    assert read(f"--config={file}") == from_file
    changed = read("--config", str(file), "--length=4", "--files=c", "--no-whole")
    assert changed == dataclasses.replace(from_file, length=4, files=(Path("c"),), whole=False)
    file.write_text(yaml.safe_dump(arguments.as_mapping(Command(sizes=changed))))
    assert read(f"--config={file}") == changed  # what is written is read again


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lenght: 3", r"'lenght' is no option of some-command \(did you mean length\?\); .*: all"),
        ("length: {a: 3}", "length: expected a value, got a mapping"),
        ("- 3", "expected a mapping of options, got list"),
        ("length: [3", "is no YAML"),
        (b"length: \xff", "is no YAML"),
    ],
)
def test_what_a_file_cannot_say_is_an_error_that_names_it(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = message.replace(": all", ": files, kind, length, limit, place, rate, whole$")
    with pytest.raises(ValueError, match=rf"run\.yaml.*{message}"):
        read(f"--config={file}")


def test_help_says_types_defaults_and_ranges(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "Does 100% of something.", "tokens, at most 100% (required)", "sizes:",
        "a rate; recommended 1e-6-1e-5 (default: 1e-06)", "--all, --no-all, --whole, --no-whole",
        "usage: apt-model some-command --length N [OPTIONS]",
    ):  # fmt: skip
        assert words in text, words


def test_groups_check_and_warn(capsys):
    with pytest.raises(ValueError, match="--length must be at least 1, got 0"):
        arguments.check(Command(sizes=Sizes(length=0)))
    arguments.check(Command(sizes=Sizes(length=1, rate=1e-2)))
    assert "--rate 0.01 is outside of 1e-06 to 1e-05" in capsys.readouterr().err


def test_what_decides_the_result():
    deciding = arguments.deciding(Command(sizes=Sizes(length=1, files=(Path("a"),))))
    assert deciding == {"length": 1, "rate": 1e-6, "limit": 1.0, "kind": "a", "whole": False}


@pytest.mark.parametrize("command", TRAINING)
def test_every_command_has_the_options_of_a_run_and_help_needs_no_torch(command):
    program = (
        "import sys\nfrom apt_model.commands.main import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for flag in ("--eval", "--eval-every", "--patience", "--restart", "--schedule", "--max-steps",
                 "--weight-decay", "--gradient-checkpointing", "--config", "--seed"):  # fmt: skip
        assert re.search(rf"^  {flag}[ ,]", done.stdout, re.M), flag


def test_help_names_every_loss_type():
    from apt_kernels.ops.preference.dpo_loss import _LOSS_TYPES
    from apt_model.commands.train_dpo import DPOOptions

    text = DPOOptions.__dataclass_fields__["loss_type"].metadata["help"]
    named = text.partition(", as ")[0].replace(" (Rafailov et al. 2023)", "").replace(" or ", ", ")
    assert sorted(named.split(", ")) == sorted(_LOSS_TYPES)


def test_no_two_groups_of_a_command_have_an_option_of_the_same_name():
    import importlib

    for command in TRAINING:
        module = importlib.import_module(f"apt_model.commands.{command.replace('-', '_')}")
        groups = arguments.groups_of(module.Options).values()
        names = [field.name for group in groups for field in dataclasses.fields(group)]
        assert len(names) == len(set(names)), command


def test_a_run_from_a_file_leaves_one_that_repeats_it(model_folder, tmp_path):
    data = write(tmp_path / "pairs.jsonl", rows(8))
    config = tmp_path / "dpo.yaml"
    config.write_text(
        f"model: {model_folder}\ndata: {data}\nbatch-size: 4\noutput: {tmp_path / 'one'}\n"
        "learning_rate: 1e-3\ndevice: cpu\nepochs: 3\n"
    )
    assert main(["train-dpo", f"--config={config}", "--epochs=1"]) == 0
    written = tmp_path / "one" / "run.yaml"
    assert yaml.safe_load(written.read_text())["epochs"] == 1
    assert main(["train-dpo", f"--config={written}", f"--output={tmp_path / 'two'}"]) == 0
    one, two = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two"))
    assert one == two and one["total_steps"] == 2


def test_schedule_options_are_checked():
    for wrong in ("a", "a=b"):
        with pytest.raises(ValueError, match=f"expected NAME=NUMBER, got '{wrong}'"):
            TrainingOptions(schedule_options=(wrong,)).check()
    options = TrainingOptions(schedule_options=("min_lr_rate=0.1", "num_cycles=2"))
    assert options.read_schedule_options() == {"min_lr_rate": 0.1, "num_cycles": 2}
