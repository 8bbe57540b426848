"""The loss that keeps the experts of a mixture evenly used (Fedus et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .model_access import base_model

FLAG, COEFFICIENT = "output_router_logits", "router_aux_loss_coef"
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_k", "moe_top_k", "top_k")


class ExpertBalance:
    """Listens to the routers of a model, and returns their balancing loss.

    transformers adds that loss where it is given labels, which no trainer here does. So the trunk
    is asked for its routers' logits while it runs, and the loss is transformers' own of them.

    Args:
        model: any; most have no experts, and then this does nothing.
        coefficient: weight of the loss; None: the configuration's `router_aux_loss_coef`.
    """

    def __init__(self, model: nn.Module, coefficient: float | None = None) -> None:
        inner = base_model(model)
        self._config = config = getattr(inner, "config", None)
        has_experts = isinstance(getattr(config, FLAG, None), bool)
        if coefficient and not has_experts:
            raise ValueError(
                f"router_aux_loss_coef: expected a mixture of experts, got {type(inner).__name__}"
            )
        known = getattr(config, COEFFICIENT, None) if coefficient is None else coefficient
        self._coefficient = float(known or 0.0)
        self._listens = has_experts and self._coefficient > 0
        self._inner, self._trunk = inner, getattr(inner, "base_model", inner)

    def __bool__(self) -> bool:
        return self._listens

    @contextmanager
    def listening(self, attention_mask: Tensor | None) -> Iterator[list[Tensor]]:
        """Within this context the losses of passes with a graph are collected, weighted.

        Args:
            attention_mask: `(B, S)`, 1 = real token, of the pass; None: all are.
        """
        losses: list[Tensor] = []
        if not self._listens:
            yield losses
            return

        def hear(module: nn.Module, _given: Any, output: Any) -> None:
            loss = getattr(output, "aux_loss", None)  # the model's own, as it masks padding
            if loss is None and module is self._trunk and not self._makes_loss(module):
                loss = self._loss(getattr(output, "router_logits", None), attention_mask)
            if isinstance(loss, Tensor) and loss.requires_grad:
                losses.append(self._coefficient * loss)

        asked = getattr(self._config, FLAG)
        setattr(self._config, FLAG, True)
        hooks = [m.register_forward_hook(hear) for m in {self._inner, self._trunk}]
        try:
            yield losses
        finally:
            for hook in hooks:
                hook.remove()
            setattr(self._config, FLAG, asked)

    def _makes_loss(self, trunk: nn.Module) -> bool:
        """Returns whether the model around a trunk makes the loss: those that make logits do."""
        getter = getattr(self._inner, "get_output_embeddings", None)
        return self._inner is not trunk and callable(getter) and getter() is not None

    def _loss(self, logits: Any, attention_mask: Tensor | None) -> Tensor | None:
        if not logits:
            return None
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        experts, chosen = _number(self._config, EXPERTS), _number(self._config, CHOSEN)
        if experts is None or chosen is None:
            raise ValueError(
                "router_aux_loss_coef: the model's configuration does not tell how many experts "
                "there are; 0 trains without their balancing loss"
            )
        return load_balancing_loss_func(tuple(logits), experts, chosen, attention_mask)


def add_balance(
    balance: Tensor | None, part: float | Tensor, loss: Tensor, metrics: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns a share of loss and metrics with a part of a balancing loss, where there is one."""
    if balance is None:
        return loss, metrics
    return loss + balance * part, {**metrics, "balance_loss": balance.detach() * part}


def _number(config: Any, names: tuple[str, ...]) -> int | None:
    return next((n for name in names if isinstance(n := getattr(config, name, None), int)), None)
