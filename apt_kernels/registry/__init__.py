"""OPS: what tests, benchmarks and the README need to know of every operation.

No operation imports this. One module an operation, each with an `OP`; adding it to `OPS` gives the
operation accuracy tests of output and every gradient on every backend, rejection tests, one-graph
tests, an `opcheck` of every operator call, a benchmark row and a README row.
"""

from __future__ import annotations

from . import (
    bradley_terry_loss,
    dpo_loss,
    gae,
    group_advantages,
    kl_penalty,
    policy_loss,
    sequence_logps,
    token_logprobs,
    value_loss,
)
from .entry import Benchmark, Op, Rejected, Sample

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        token_logprobs.OP,
        sequence_logps.OP,
        dpo_loss.OP,
        bradley_terry_loss.OP,
        policy_loss.OP,
        value_loss.OP,
        kl_penalty.OP,
        group_advantages.OP,
        gae.OP,
    )
}

__all__ = ["OPS", "Benchmark", "Op", "Rejected", "Sample"]
