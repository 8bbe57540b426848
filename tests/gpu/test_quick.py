"""The first ten minutes on a GPU, rehearsed without one: cut at a random moment and continued."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gpu.cuda_emulation.build import compile_object, kernel_objects, program
from gpu.cuda_emulation.sanitized import SIGNS, runtime

ROOT = Path(__file__).resolve().parents[2]
QUICK = ROOT / "benchmarks" / "gpu" / "quick"
ONLY = ["--on-cpu", "--only", "dpo_loss", "--samples", "2"]
# Phases in the order of the run: seconds of 540. What is left is for the last.
BUDGETS = {"facts": 20, "accuracy": 120, "warm": 120, "rows": 160, "counters": 55, "device": 70}
BUDGETS |= {"sanitizer": 55}


@pytest.fixture
def modules(monkeypatch):
    """A function that imports a module of benchmarks/gpu as a run without a GPU would."""
    monkeypatch.setenv("APT_QUICK_ON_CPU", "1")
    for folder in (ROOT / "benchmarks", QUICK.parent):
        monkeypatch.syspath_prepend(str(folder))
    import importlib

    return importlib.import_module


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, str(QUICK), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(*arguments: object) -> tuple[int, str]:
    process = start(*arguments)
    text, _ = process.communicate(timeout=600)
    return process.returncode, text


def lines_of(folder: Path) -> list[dict]:
    """Every line is whole, also of a run that was killed."""
    files = list(folder.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def results(lines: list[dict]) -> list[tuple]:
    """What was measured, without numbers."""
    kept = [r for r in lines if r["phase"] != "session" and "finished" not in r]
    return [(r["phase"], r["item"], r.get("variant"), r.get("pass"), r.get("name")) for r in kept]


def children_of(folder: Path) -> list[int]:
    """Processes that write to the results."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if f"APT_QUICK_RESULTS={folder}".encode() in environment:
            found.append(int(entry.name))
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    code, text = run()
    assert code == 2 and "no GPU that PyTorch can use" in text and "make bench" in text


def test_unknown_operation():
    code, text = run("--only", "nonesuch")
    assert code == 2 and "expected names among" in text


def test_a_run_that_is_killed_goes_on_where_it_ended(tmp_path):
    seed = random.randrange(1000)
    moment = random.Random(seed).uniform(4, 40)
    print(f"killed after {moment:.1f} s (seed {seed})")
    first = start(*ONLY, "--seconds", 240, "--output", tmp_path)
    time.sleep(moment)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    end = time.monotonic() + 60
    while children_of(tmp_path) and time.monotonic() < end:
        time.sleep(0.2)
    assert not children_of(tmp_path), "processes outlive the run"
    before = lines_of(tmp_path)

    for _ in range(4):  # one run is enough where the machine is not busy
        code, text = run(*ONLY, "--seconds", 240, "--output", tmp_path)
        assert code == 0, text
        after = lines_of(tmp_path)
        assert after[: len(before)] == before, "a line was lost"
        ends = {r["item"]: r for r in after if r["phase"] == "session"}
        # tools that are not installed are looked for again each time
        if not any(ends[name]["left"] for name in ("facts", "accuracy", "warm", "rows", "tuning")):
            break
    check_a_whole_run(after, before)
    check_page(next(tmp_path.glob("*.md")).read_text())
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl", ".md", ".log"}


def check_a_whole_run(lines: list[dict], before: list[dict]) -> None:
    ends = {r["item"]: r for r in lines if r["phase"] == "session"}
    assert {*BUDGETS, "tuning"} == set(ends)
    for phase, seconds in BUDGETS.items():
        assert ends[phase]["budget"] == pytest.approx(seconds * 240 / 540, abs=0.1)
        assert ends[phase]["seconds"] < ends[phase]["budget"] + 15, "the budget is kept"
    done = {r["item"] for r in before if r.get("finished")}
    again = [r["item"] for r in lines[len(before) :] if r["item"] in done and "finished" not in r]
    assert not [item for item in again if "|" in item and not item.startswith(("mem", "race"))]
    accuracy = [r for r in lines if r["phase"] == "accuracy" and "sample" in r]
    assert len({r["sample"] for r in accuracy}) == 2
    assert {r["dtype"] for r in accuracy} == {"float32", "bfloat16"}
    assert {r["status"] for r in accuracy} == {"passed"}
    rows = [r for r in lines if r["phase"] == "rows"]
    assert {"eager", "compiled"} < {r["variant"] for r in rows if "variant" in r}
    assert all(r["ms"] > 0 and r["sums"] for r in rows if "variant" in r)
    found = [r for r in results(lines) if r[0] in ("accuracy", "rows")]
    assert len(found) == len(set(found)), "something was measured twice"


def check_page(text: str) -> None:
    for heading in ("Machine", "Accuracy", "Rows", "Hardware counters", "Tests on the device"):
        assert f"## {heading}" in text
    assert "as in the sources" in text and "| `dpo_loss` | 2 / 2 | 2 / 2 |" in text
    tool = "compute-sanitizer"
    assert f"absent: {tool} is not installed (10 items)" in text or shutil.which(tool)


def test_rows_and_targets_are_in_the_registry(modules):
    targets = modules("targets")
    for operation, shapes in targets.ROWS.items():
        for shape in shapes:
            assert "cuda" in targets.benchmark(operation, shape).devices
    for operation, shape, part in targets.TARGETS:
        assert shape in targets.ROWS[operation]
        assert part in ("forward", "backward", "forward+backward")


def test_a_side_that_fails_takes_no_other_with_it(modules, monkeypatch):
    rows, calling = modules("rows"), modules("calling")

    def functions(operation, bench, variant):
        def no_memory(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory")

        yield "too large", no_memory
        yield "eager", bench.eager

    monkeypatch.setattr(calling, "functions", functions)
    found = list(rows.measure("dpo_loss|8 pairs|float32|peers"))
    assert {r["status"] for r in found if r["variant"] == "too large"} == {"out of memory"}
    assert all(r["ms"] > 0 for r in found if r["variant"] == "eager")


def page_of(modules, *records: dict) -> str:
    return modules("page").text([{"state": "x", "at": 0.0, **r} for r in records])


def row_of(variant: str, ms: float, **values) -> dict:
    times = {"ms": ms, "ms_p20": ms, "ms_p80": ms, "extra_mib": 0.0, "sums": [1.0]}
    place = {"operation": "token_logprobs", "shape": "8192 x 151936", "dtype": "bfloat16"}
    about = {"phase": "rows", "item": variant, "variant": variant, "pass": "forward"}
    return {**about, **place, **times, "bytes": 2_489_319_424, "flops": 0, **values}


def test_targets_and_floors_stand_beside_the_measured(modules):
    rate = {"phase": "facts", "item": "x"}
    text = page_of(
        modules,
        {**rate, "name": "copy", "rate": 4e12},
        {**rate, "name": "product", "rate": 8e14},
        row_of("ours: triton", 0.7),
        row_of("ours: native", 0.6),
        row_of("eager", 2.0, sums=[1.5]),
    )
    assert "0.7 (0.7, 0.7) | missed: 0.62 | 0.622 | 89 % |" in text
    assert "0.6 (0.6, 0.6) | met: 0.62 |" in text
    assert "DIFFER" in text.split("| eager |")[1].splitlines()[0]
    assert '("token_logprobs", "cuda"): ("native", "triton", "reference")' in text


def test_faults_are_on_the_page(modules):
    fault = {"phase": "accuracy", "item": "gae|float32|triton|3", "operation": "gae"}
    fault |= {"backend": "triton", "dtype": "float32", "sample": "long"}
    lost = {"phase": "rows", "item": "x", "status": "lost", "why": "took more than 60 s"}
    text = page_of(
        modules,
        {**fault, "status": "failed", "why": "output 0: element 7"},
        {**lost, "finished": True},
    )
    assert "| `gae` | 0 / 1 |" in text and "output 0: element 7" in text
    assert "lost: `x`" in text and "took more than 60 s" in text


NCU = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","launch__registers_per_thread"
"","","ns","byte",""
"0","_token_logprobs_fwd_kernel","612345","2489319424","40"
"""


def test_the_table_of_ncu(modules):
    (kernel,) = modules("counters").parsed(NCU)
    assert kernel["kernel"] == "_token_logprobs_fwd_kernel" and kernel["registers"] == "40"
    assert kernel["time"] == "612345" and kernel["read"] == "2489319424"


def test_a_worker_that_dies_or_hangs_is_replaced(modules, tmp_path, monkeypatch):
    pool, records = modules("pool"), modules("records").Records(tmp_path / "x.jsonl", "state")
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, sys, time\n"
        "print(json.dumps({'ready': True}), flush=True)\n"
        "for item in map(str.strip, sys.stdin):\n"
        "    if item == 'dies': os._exit(9)\n"
        "    if item == 'hangs': time.sleep(600)\n"
        "    print(json.dumps({'item': item, 'status': 'measured'}), flush=True)\n"
        "    print(json.dumps({'finished': item}), flush=True)\n"
    )
    monkeypatch.setattr(pool, "WORKER", worker)
    items = ["first", "dies", "second", "hangs", "third"]
    runs = pool.Pool("rows", records, tmp_path / "log", {})
    assert runs.run(items, 1, 1.0, time.monotonic() + 60) == []
    assert records.finished("rows") == set(items)
    lost = {r["item"]: r["why"] for r in records.read() if r.get("status") == "lost"}
    assert lost == {"dies": "ended with status 9", "hangs": "took more than 1 s"}
    cut = pool.Pool("rows", records, tmp_path / "log", {})
    assert cut.run(["hangs"], 1, 60.0, time.monotonic() + 3) == ["hangs"]


def test_results_of_other_sources_do_not_count(modules, tmp_path):
    of = modules("records").Records
    of(tmp_path / "x.jsonl", "old").append("rows", "a", finished=True)
    of(tmp_path / "x.jsonl", "now").append("rows", "b", finished=True)
    assert of(tmp_path / "x.jsonl", "now").finished("rows") == {"b"}
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write('{"phase": "rows", "item": "half of a li')
    assert of(tmp_path / "x.jsonl", "old").finished("rows") == {"a"}


def test_choices_of_the_tuning_exist(modules):
    pytest.importorskip("triton")
    settings = list(modules("tuning").settings())
    assert {"linear_token_logprobs", "nt_xent"} <= {s.operation for s in settings}
    for setting in settings:
        choice = setting.chosen()
        for candidate in setting.candidates.values():
            assert callable(candidate) == callable(choice), setting.name


# ---------------------------------------------------------------- the driver and the build


@pytest.fixture(scope="module")
def emulated_driver() -> Path:
    if runtime("address") is None:
        pytest.skip("this compiler has no AddressSanitizer")
    text = (QUICK.parent / "driver.cpp").read_text()
    driver = compile_object("driver.cpp", text, "address")
    return program([*kernel_objects("address"), driver], "address")


def test_the_driver_is_right_and_stays_in_its_memory(modules, emulated_driver):
    """On the emulator, with AddressSanitizer in the place of memcheck."""
    for case in modules("cuda_build").CASES:
        run = subprocess.run([emulated_driver, case], capture_output=True, text=True)
        assert run.returncode == 0 and run.stdout == f"{case}: right\n", run.stdout + run.stderr
        assert not any(sign in run.stderr for sign in SIGNS["address"]), run.stderr
    run = subprocess.run([emulated_driver], capture_output=True, text=True)
    assert run.stderr.splitlines()[1:] == list(modules("cuda_build").CASES)


def test_the_driver_sees_a_bug():
    if runtime("address") is None:
        pytest.skip("this compiler has no AddressSanitizer")
    bug = ("pair_loss.cuh", "i < out.pairs;", "i <= out.pairs;")
    text = (QUICK.parent / "driver.cpp").read_text()
    objects = [*kernel_objects("address", (bug,)), compile_object("driver.cpp", text, "address")]
    run = subprocess.run([program(objects, "address"), "dpo_loss"], capture_output=True, text=True)
    assert run.returncode != 0 or any(sign in run.stderr for sign in SIGNS["address"])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_kernels_of_one_architecture_are_callable_without_the_extension():
    """nvcc alone builds them; its operators are those of the package."""
    code = (
        "import importlib.util, sys\n"
        f"sys.path[:0] = [{str(QUICK.parent)!r}, {str(ROOT)!r}]\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: (\n"
        "    None if name.startswith('apt_kernels._C') else find(name, package))\n"
        "import cuda_build, torch, apt_kernels\n"
        "cuda_build.is_installed = lambda: False\n"
        "print(cuda_build.main())\n"
        "cuda_build.load()\n"
        "print(apt_kernels.backends()['native'])\n"
        "for name in cuda_build.operations():\n"
        "    assert 'native' in apt_kernels.backends()['operations'][name]['cuda'], name\n"
        "key = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print(key('apt::gae_fwd', 'CUDA'), key('apt::gae_fwd', 'CPU'))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "extension and driver built in" in run.stdout and "absent" in run.stdout
    assert run.stdout.endswith("True False\n")
