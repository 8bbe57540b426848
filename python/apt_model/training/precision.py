"""Options of a command: in which dtypes it computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

OWN = {"bfloat16": "bf16", "float16": "fp16"}  # the autocast of the same 16 bits


@dataclass(kw_only=True)
class PrecisionOptions:
    """Precision."""

    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={
            "help": "type of the parameters; of 16-bit ones the optimizer keeps float32 copies"
        },
    )
    autocast: Literal["none", "bf16", "fp16"] = field(
        default="none", metadata={"help": "type of the computation"}
    )

    def check(self) -> None:
        """Raises for two options that cannot be together."""
        own = OWN.get(self.dtype, self.autocast)
        if self.autocast not in ("none", own):
            raise ValueError(
                f"--dtype {self.dtype} and --autocast {self.autocast}: expected one kind of 16 "
                f"bits, --autocast none or {own}, as parameters of {self.dtype} lose what the "
                "other kind computes"
            )
