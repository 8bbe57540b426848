"""Which choices there are for responses that did not end by themselves."""

from __future__ import annotations

from typing import Any

from ..training.config import check_number

CUT_RESPONSES = ("keep", "mask", "penalty")


def check_cut_responses(config: Any) -> None:
    """Raises ValueError unless the fields cut_responses and cut_penalty can be."""
    if config.cut_responses not in CUT_RESPONSES:
        raise ValueError(
            f"{type(config).__name__}.cut_responses must be one of {CUT_RESPONSES}, "
            f"got {config.cut_responses!r}"
        )
    check_number(config, "cut_penalty", at_least=0)
