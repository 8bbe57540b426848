"""Runs checks in this process, as the JSON on standard input says; see sanitized.run_checks."""

from __future__ import annotations

import json
import sys

import torch

from . import kernels
from .checks import CHECKS


def main() -> None:
    torch.set_num_threads(1)
    order = json.load(sys.stdin)
    for job in order["jobs"]:
        print(f"== {job['label']}", flush=True)
        emulation = kernels(order["sanitizer"], tuple(map(tuple, job["patches"])))
        for name in job["checks"] or CHECKS:
            try:
                CHECKS[name](emulation)
            except Exception as error:
                if not order["go_on"]:
                    raise
                print(f"{type(error).__name__}: {error}", flush=True)
    print("== finished", flush=True)


main()
