"""A plugin of pytest: every case is a line of the results, and a case that has one is not run."""

from __future__ import annotations

import os
from pathlib import Path

from records import Records

PHASE = "device case"


def _records() -> Records:
    return Records(Path(os.environ["APT_QUICK_RESULTS"]), os.environ["APT_QUICK_STATE"])


def _name(nodeid: str) -> str:
    return nodeid.rsplit("::", 1)[-1]


def pytest_collection_modifyitems(config, items):
    known = _records().finished(PHASE)
    done = [item for item in items if _name(item.nodeid) in known]
    items[:] = [item for item in items if _name(item.nodeid) not in known]
    config.hook.pytest_deselected(items=done)


def pytest_runtest_logreport(report):
    if report.when == "call" or (report.when == "setup" and not report.passed):
        why = "" if report.passed else str(report.longrepr).strip().splitlines()[-1][:400]
        values = {"status": report.outcome, "why": why, "seconds": report.duration}
        _records().append(PHASE, _name(report.nodeid), finished=True, **values)
