"""The base of the loss modules: the options of a function, checked when the module is made."""

from __future__ import annotations

from typing import Any

from torch import nn


class LossModule(nn.Module):
    """A loss with its options. Each is an attribute, and `options` has all of them by name."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def __getattr__(self, name: str) -> Any:
        options = self.__dict__.get("options", {})
        return options[name] if name in options else super().__getattr__(name)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items() if v is not None)
