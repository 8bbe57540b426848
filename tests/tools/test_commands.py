"""The command `apt-kernels`, as its users call it."""

from __future__ import annotations

import csv
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import apt_kernels
from apt_kernels import registry
from apt_kernels.commands import check, comparison, info, scaling, tables
from apt_kernels.commands.main import main

BENCH = ["bench", "--op", "gae", "--shape", "4096 x 8", "--against", "eager", "--seconds", "0.01"]


def test_the_module_is_the_command():
    run = subprocess.run(
        [sys.executable, "-m", "apt_kernels", "--version"], capture_output=True, text=True
    )
    assert run.stdout == f"apt-kernels {apt_kernels.__version__}\n" and run.returncode == 0


def test_info_tells_what_every_operation_uses(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in registry.OPS:
        first = apt_kernels.backends()["operations"][name]["cpu"][0]
        assert re.search(rf"^{name} +cpu +{first} ", out, re.M), name
    assert torch.__version__ in out and "instruction set" in out
    assert main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(json.dumps(info.facts()))
    assert told["operations"] == apt_kernels.backends()["operations"]


@pytest.mark.parametrize("asked, why", [("baseline", "asked for"), ("avx2", "asked for")])
def test_info_tells_why_the_instruction_set(asked, why):
    if "avx" not in apt_kernels.backends()["native"]:
        pytest.skip("this processor has one instruction set only")
    run = subprocess.run(
        [sys.executable, "-m", "apt_kernels", "info", "--json"],
        env={**os.environ, "APT_KERNELS_ISA": asked},
        capture_output=True,
        text=True,
    )
    told = json.loads(run.stdout)["instruction_set"]
    assert told == f"{asked}: asked for by APT_KERNELS_ISA"


def test_check_passes_here(capsys):
    assert main(["check", "--op", "gae", "sequence_logps", "--seconds", "0"]) == 0
    told = re.search(r"(\d+) of (\d+) calls .* 0 failed\n", capsys.readouterr().out)
    assert told and told[1] == told[2] and int(told[1]) > 50


def test_check_in_little_time_says_so_and_sees_every_group(capsys):
    groups = check.selected([])
    first = check.in_turn(groups)[: len(groups)]
    seen = {(c.operation, c.device, c.backend, c.dtype) for c in first}
    assert len(seen) == len(groups) and {c.operation for c in first} == set(registry.OPS)
    assert main(["check", "--op", "gae", "--seconds", "0.2"]) == 0
    assert "--seconds 0 checks all" in capsys.readouterr().out


def test_check_gives_a_command_that_repeats_a_failure(capsys, monkeypatch):
    right = registry.OPS["gae"].reference

    def wrong(*args, **kwargs):
        advantages, returns = right(*args, **kwargs)
        return advantages + 1, returns

    monkeypatch.setitem(registry.OPS, "gae", replace(registry.OPS["gae"], reference=wrong))
    assert main(["check", "--op", "gae", "--seconds", "1"]) == 1
    out = capsys.readouterr().out
    code = re.search(r'^  python -c "(.*)"$', out, re.M)[1]
    assert "FAILED gae: AssertionError: output 0 of" in out
    with pytest.raises(AssertionError, match="output 0 of"):
        exec(code, {})
    monkeypatch.undo()
    exec(code, {})  # the operation itself is right


def test_bench_writes_a_table_a_file_and_a_page(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main([*BENCH, "--output", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "median of ratios" in out and "x ours" in out and "\x1b[" not in out
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [r["variant"] for r in rows] == ["fused", "eager"] and float(rows[0]["ms"]) > 0
    text = (folder / "results.html").read_text()
    assert text.count("<svg") >= 2 and "http" not in text and "<script" not in text
    assert f"gae 4096 x 8, float32, forward, 1t: eager {float(rows[1]['ms']):.3g} ms" in text


def test_bench_replaces_no_results_unless_asked(tmp_path, capsys):
    (tmp_path / "results.csv").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main([*BENCH, "--output", str(tmp_path)])
    assert stop.value.code == 2 and "--overwrite replaces them" in capsys.readouterr().err
    assert (tmp_path / "results.csv").read_text() == "mine"
    assert main([*BENCH, "--output", str(tmp_path), "--overwrite"]) == 0
    earlier = tmp_path / "earlier.csv"
    (tmp_path / "results.csv").rename(earlier)
    assert main([*BENCH, "--output", str(tmp_path / "two"), "--compare", str(earlier)]) == 0
    assert "now / before" in capsys.readouterr().out
    assert "Against the earlier run" in (tmp_path / "two" / "results.html").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--op", "nothing"], "--op: expected names among"),
        (["--op", "gae", "--shape", "no such"], "expected a benchmark, got none"),
        (["--op", "gae", "--threads", "0"], "--threads: expected numbers of at least 1, got 0"),
        (["--op", "gae", "--scale", "V"], r"--scale: expected an axis of gae \(B\), got 'V'"),
        (["--op", "gae", "--compare", "none.csv"], "--compare: expected a CSV file .* none.csv"),
    ],
)
def test_bench_refuses_what_it_cannot_do(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_bench_with_threads_and_an_axis(tmp_path, capsys):
    arguments = ["--threads", "1", "2", "--scale", "B", "--output", str(tmp_path)]
    assert main([*BENCH, *arguments]) == 0
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert {(r["threads"], r["size"]) for r in rows} == {
        (threads, str(size)) for threads in ("1", "2") for size in (256, 512, 1024, 2048, 4096)
    }
    assert torch.get_num_threads() == 1
    text = (tmp_path / "results.html").read_text()
    assert "<h2>Scaling</h2>" in text and text.count("<polyline") == 4


def _axes():
    for name, axes in scaling.AXES.items():
        yield from ((name, axis) for axis in axes)


@pytest.mark.parametrize("name, axis", list(_axes()))
def test_parts_of_an_axis_are_calls(name, axis):
    """The function and the plain PyTorch beside it still compute the same."""
    op = registry.OPS[name]
    bench = op.benchmarks[0]
    part = bench.make(bench.dtypes[0])
    for other in sorted(scaling.AXES[name], key=lambda other: other == axis):
        size, part = next(iter(scaling.sizes(op, part, other)))
    argument, dimension = scaling.AXES[name][axis]
    call = inspect.signature(op.function).bind(*part.args, **part.kwargs)
    assert call.arguments[argument].shape[dimension] == size
    if bench.comparable:
        comparison.check(op, bench.eager, part, bench.dtypes[0], backward=False)


def test_colours_and_verdicts(monkeypatch):
    row = dict.fromkeys(tables.FIELDS, "") | {
        "operation": "gae", "shape": "s", "dtype": "float32", "pass": "forward", "threads": "1",
        "variant": "fused", "ms": "1", "ms_p20": "0.9", "ms_p80": "1.1", "fused_speedup": "1",
        "ratio": "ratio of medians", "extra_mib": "0.0",
    }  # fmt: skip
    slower = row | {"variant": "eager", "ms": "2", "fused_speedup": "2"}
    faster = row | {"variant": "peer", "ms": "0.5", "fused_speedup": "0.5"}
    monkeypatch.setattr(tables, "has_colours", lambda: True)
    lines = tables.results_table([row, slower, faster])
    assert lines[0].startswith("\x1b[1m") and "\x1b" not in lines[1]
    assert lines[2].startswith("\x1b[32m") and lines[3].startswith("\x1b[31m")
    assert "ratio of medians" in tables.legend([row, slower])
    before = row | {"ms": "2", "ms_p20": "1.8", "ms_p80": "2.2"}
    assert tables.compared([row], [before])[0][3:] == ("0.5", "better")
    assert tables.compared([before], [row])[0][3:] == ("2", "worse")
    assert tables.compared([row], [row])[0][3:] == ("1", "")


def test_no_colours_where_they_are_not_wanted(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not tables.has_colours()
    monkeypatch.delenv("NO_COLOR")
    assert tables.has_colours()
