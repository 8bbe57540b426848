"""A process of a phase: `python worker.py PHASE` (see pool.py for what it reads and writes)."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from faults import ends_the_process, failure

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DIES_WITH_ITS_PARENT = 1  # PR_SET_PDEATHSIG of prctl
MODULES = {
    "facts": "facts",
    "accuracy": "accuracy",
    "warm": "warm",
    "rows": "rows",
    "counters": "counters",
    "device": "device_tests",
    "sanitizer": "sanitizer",
    "tuning": "tuning",
}


def release() -> None:
    """Memory of the last item, so that the next one finds what a process of its own would."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def main() -> None:
    ctypes.CDLL(None).prctl(DIES_WITH_ITS_PARENT, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is for the log
    phase = importlib.import_module(MODULES[sys.argv[1]])

    def answer(**line) -> None:
        answers.write(json.dumps(line) + "\n")

    answer(ready=True)
    for item in map(str.strip, sys.stdin):
        leaving = False
        try:
            for values in phase.measure(item):
                answer(item=item, **values)
        except Exception as error:
            traceback.print_exc()
            answer(item=item, **failure(error))
            leaving = ends_the_process(error)
        answer(finished=item, leaving=leaving)
        if leaving:
            return
        release()


if __name__ == "__main__":
    sys.path[:0] = [str(path) for path in (HERE.parent, ROOT, ROOT / "tests")]
    main()
