"""Several gloo processes on this machine that run one function of a test."""

from __future__ import annotations

import datetime
import os
import sys

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(seconds=300)


def run(work, folder, processes: int = 2, arguments: tuple = ()) -> None:
    """`work(rank, *arguments)` in every process; raises what one of them raised."""
    store = f"file://{folder}/store_{work.__name__}"
    torch.multiprocessing.spawn(_process, (processes, store, work, arguments), nprocs=processes)


def _process(rank: int, processes: int, store: str, work, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store, timeout=TIMEOUT, rank=rank, world_size=processes)
    work(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()
    # A thread of gloo that lets go of its last tensor while the interpreter is being torn down
    # aborts the process ("terminate called without an active exception"): end without teardown.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
