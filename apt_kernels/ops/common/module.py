"""The base of the loss modules: the options of a function, checked when the module is made."""

from __future__ import annotations

from typing import Any

from torch import nn


class LossModule(nn.Module):
    """A loss with its options. Each is an attribute, and `options` has all of them by name.

    An option that is an `nn.Parameter`, as a learned temperature, is a parameter of the module;
    `arguments` has the options and the parameters.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options: dict[str, Any] = {}
        self.add_options(**options)

    def add_options(self, **options: Any) -> None:
        """Adds the options that only some of a family's losses have."""
        for name, value in options.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.options[name] = value

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self.options, **self._parameters}

    def __getattr__(self, name: str) -> Any:
        options = self.__dict__.get("options", {})
        return options[name] if name in options else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        options = self.__dict__.get("options", {})
        if name not in options:
            super().__setattr__(name, value)
        elif isinstance(value, nn.Parameter):
            del options[name]
            self.register_parameter(name, value)
        else:
            options[name] = value

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items() if v is not None)
