"""The pooled output of an encoder for several views: as one batch, and in parts where asked."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from ..scoring.model_access import FSDPModule
from .created_modules import CreatedModulesLoop
from .encoder import Encoder
from .gradient_cache import in_parts
from .projection_head import has_batch_norm
from .views import View, joined, pool


class PooledFeatures:
    """Computes the features of views.

    Args:
        encoder: of token ids or of images.
        hidden_size: width of its output.
        pooling: "mean" of the real tokens, or the "first" one.
        loop: whose device and autocast are used.
        part: how many rows at a time; None: the loop's `gradient_accumulation_steps` decide.
    """

    def __init__(
        self, encoder: nn.Module, hidden_size: int, pooling: str, loop: CreatedModulesLoop,
        part: int | None,
    ) -> None:  # fmt: skip
        self._module, self._encoder = encoder, Encoder(encoder)
        self._hidden_size, self._pooling = hidden_size, pooling
        self._loop, self._part = loop, part
        self._views_apart = has_batch_norm(encoder)
        self._sharded = isinstance(encoder, FSDPModule)

    def __call__(self, views: list[View]) -> list[Tensor]:
        """Returns `(B, H)` of every view, with the graph that is wanted now.

        Views of floats are cast to the dtype of the encoder's parameters.
        """
        views = [self.cast(view) for view in views]
        whole = None if self._views_apart else joined(views, self._encoder.takes_mask)
        if whole is None:
            return [self._of(view) for view in views]
        return list(self._of(whole).tensor_split(len(views)))

    def cast(self, view: View) -> View:
        """Returns the view, floats in the dtype of the encoder's parameters."""
        if not view.inputs.is_floating_point():
            return view
        dtypes = (p.dtype for p in self._module.parameters() if p.is_floating_point())
        return View(view.inputs.to(next(dtypes, view.inputs.dtype)), view.mask)

    def _of(self, view: View) -> Tensor:
        def run(rows: slice) -> Tensor:
            inputs, mask = view.rows(rows)
            with self._loop.autocast():
                features = pool(self._encoder(inputs, mask).hidden, mask, self._pooling)
            if features.shape[-1] != self._hidden_size:
                raise ValueError(
                    f"the encoder's output has width {features.shape[-1]}, "
                    f"hidden_size is {self._hidden_size}"
                )
            return features

        rows = len(view.inputs)
        if self._part is None:
            parts = min(rows, self._loop.gradient_accumulation_steps)
        else:
            parts = math.ceil(rows / self._part)
            if self._sharded:  # its collectives need as many calls in every process
                parts = self._loop.most_over_processes(parts)
        bounds = [part * rows // parts for part in range(parts + 1)]
        slices = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
        if len(slices) == 1 or not torch.is_grad_enabled():
            return torch.cat([run(rows) for rows in slices])
        return in_parts(run, slices, self._loop.device, self._loop._gradients_synchronized)


def widened(embeddings: Tensor) -> Tensor:
    """Returns 16-bit embeddings as float32."""
    narrow = embeddings.dtype in (torch.float16, torch.bfloat16)
    return embeddings.float() if narrow else embeddings
