"""Reward files are imported as Python imports a file; what they raise is one line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from apt_model.rl.reward_files import import_functions
from apt_model.rl.reward_functions import read_functions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _own_imports():
    """Leaves the path and the modules of this process as they were."""
    path, modules = list(sys.path), dict(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - set(modules):
        del sys.modules[name]
    sys.modules.update(modules)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(path, name="score"):
    (function,) = import_functions([f"{path}:{name}"])
    return function


DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Word:
    text: str
    weight: float = 0.5

def score(row, response):
    return Word(response).weight
"""


def test_dataclasses_of_postponed_annotations(tmp_path):
    assert load(write(tmp_path / "words.py", DATACLASS))({}, "a") == 0.5


def test_neighbours_of_the_file(tmp_path, monkeypatch):
    """Also where another reward file's folder has neighbours of the same names."""
    monkeypatch.chdir(tmp_path)
    for folder, value in (("one", 1.0), ("two", 2.0)):
        write(tmp_path / folder / "helper.py", f"VALUE = {value}")
        write(tmp_path / folder / "pack/__init__.py", f"MORE = {value}")
        text = "import helper, pack\ndef score(row, response): return helper.VALUE + pack.MORE"
        write(tmp_path / folder / "rewards.py", text)
    assert load("one/rewards.py")({}, "") == 2.0
    assert load("two/rewards.py")({}, "") == 4.0
    assert load(tmp_path / "one" / "rewards.py")({}, "") == 2.0


def test_a_file_in_a_package(tmp_path):
    for folder, value in (("one", 1.0), ("two", 2.0)):
        package = tmp_path / folder / "judges"
        write(package / "__init__.py", "")
        write(package / "inner/__init__.py", "")
        write(package / "words.py", f"VALUE = {value}")
        write(package / "inner/lists.py", "LIST = [1]")
        write(
            package / "inner/rewards.py",
            "from ..words import VALUE\nfrom . import lists\nimport lists as same\n"
            "def score(row, response): return VALUE + len(lists.LIST) + len(same.LIST)",
        )
        assert load(package / "inner" / "rewards.py")({}, "") == value + 2


def test_names_that_others_have(tmp_path):
    """json.py, torch.py and the like must not hide what this process uses under that name."""
    import json

    import torch

    for name in ("json", "torch", "my-reward", "reward.v2", "conftest"):
        function = load(write(tmp_path / f"{name}.py", "def score(row, response): return 3.0"))
        assert function({}, "") == 3.0
        assert sys.modules["json"] is json and sys.modules["torch"] is torch


POOL = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from helper import double

def one(text):
    return double(len(text))

def score(rows, responses):
    context = multiprocessing.get_context("{start}")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        return list(pool.map(one, responses))
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_functions_for_a_pool_of_processes(tmp_path, start):
    """In a process of its own: a pool's processes begin with what this one has imported."""
    write(tmp_path / "helper.py", "def double(x): return 2 * x")
    write(tmp_path / "pooled.py", POOL.format(start=start))
    code = (
        "from apt_model.rl.reward_functions import *\n"
        "if __name__ == '__main__':\n"
        f"    (score,) = read_functions([{str(tmp_path / 'pooled.py')!r} + ':score'])\n"
        "    print(score([Sampled({}, '', '', text, [], True) for text in ('a', 'bcd')]))\n"
    )
    script = write(tmp_path / "elsewhere" / "run.py", code)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, env=environment
    )
    assert done.stdout.strip() == "[2.0, 6.0]", done.stderr


def test_a_file_runs_once_however_often_it_is_named(tmp_path):
    file = write(tmp_path / "twice.py", "import itertools\ncount = itertools.count()\n"
                 "START = next(count)\ndef one(row, response): return START\n"
                 "def two(row, response): return next(count)\n")  # fmt: skip
    one, two = import_functions([f"{file}:one", f"{file}:two"])
    assert one({}, "") == 0 and two({}, "") == 1 and one.__globals__ is two.__globals__


OBJECTS = """
class Judge:
    def __init__(self): self.seen = 0
    def __call__(self, row, response):
        self.seen += 1
        return self.seen
    @staticmethod
    def fixed(row, response): return 7.0

judge = Judge()
"""


def test_classes_objects_and_attributes(tmp_path):
    file = write(tmp_path / "objects.py", OBJECTS)
    for name in ("Judge", "judge"):
        function = load(file, name)
        assert [function({}, ""), function({}, "")] == [1, 2]
    assert load(file, "Judge.fixed")({}, "") == 7.0
    (function,) = read_functions([f"{file}:Judge"])
    assert function.name == "Judge"


def test_modules_by_name(tmp_path, monkeypatch):
    write(tmp_path / "suite" / "__init__.py", "")
    write(tmp_path / "suite" / "words.py", "def score(row, response): return 4.0")
    monkeypatch.chdir(tmp_path)
    assert load("suite.words")({}, "") == 4.0
    assert load("operator", "contains")({"a": 1}, "a") is True


RAISING = {
    "SyntaxError: .*({file}:2)": "x = 1\ndef score(row, response) return 1\n",
    "NameError: name 'nothing' is not defined ({file}:3)": "x = 1\n\ny = nothing\n",
    "KeyError: 'KEY' ({file}:2)": "import os\nos.environ['KEY']\n",
    "ModuleNotFoundError: No module named 'not_installed' ({file}:1)": "import not_installed\n",
    "SystemExit: 3 ({file}:2)": "import sys\nsys.exit(3)\n",
    "ImportError: attempted relative import with no known parent package ({file}:1)":
        "from .other import x\n",
    "ValueError: of two lines ({file}:1)": "raise ValueError('of two\\nlines')\n",
    "IndentationError: .*({file}:2)": "def score(row, response):\nreturn 1\n",
    "AttributeError: module 'raising' has no attribute 'score'": "def other(): pass\n",
    "expected a function, got float 0.5": "score = 0.5\n",
    "RuntimeError: deep ({folder}/helper.py:2)": "import helper\nhelper.fail()\n",
    "TypeError: score.__init__() missing 1 required positional argument: 'x'":
        "class score:\n    def __init__(self, x): pass\n",
}  # fmt: skip


@pytest.mark.parametrize("message", RAISING)
def test_what_a_file_raises_is_one_line_with_its_place(tmp_path, message):
    file = write(tmp_path / "raising.py", RAISING[message])
    write(tmp_path / "helper.py", "def fail():\n    raise RuntimeError('deep')\n")
    with pytest.raises(ValueError) as caught:
        load(file)
    text = str(caught.value)
    parts = message.format(file=file, folder=tmp_path).split(".*")
    assert "\n" not in text and re.search(".*".join(map(re.escape, parts)), text), text
    assert text.startswith(f"--reward {file}:score: ")
    assert message.endswith((")", ".*)")) == ("raising" not in sys.modules)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rewards", "must be FILE.py:NAME or package.module:NAME, got 'rewards'"),
        ("rewards.py", "must be FILE.py:NAME"),
        ("rewards.py:", "must be FILE.py:NAME"),
        ("nowhere.py:score", "FileNotFoundError: .*nowhere.py is not a file"),
        ("no_such_module:score", "ModuleNotFoundError: No module named 'no_such_module'$"),
        ("json:nothing", "AttributeError: module 'json' has no attribute 'nothing'$"),
    ],
)
def test_names_that_mean_nothing(name, message):
    with pytest.raises(ValueError, match=message):
        import_functions([name])
