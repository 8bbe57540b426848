"""Contrastive pretraining: SimCLR (Chen et al. 2020) and MoCo (He et al. 2020)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from apt_kernels import nt_xent

from ..data.augmentation import TextAugmentation
from ..scoring.model_access import vocabulary_size
from ..training.config import split_options
from ..training.loop import read_numbers
from .contrastive_config import ContrastiveConfig
from .created_modules import CreatedModulesLoop, bring_beside
from .features import PooledFeatures, widened
from .known_negatives import moco_loss, read_sample_ids
from .momentum import MomentumNetworks
from .projection_head import ProjectionHead, has_batch_norm
from .views import View, make_view, make_views

__all__ = [
    "ContrastiveConfig", "ContrastivePretrainer", "ProjectionHead", "TextAugmentation",
    "create_contrastive_pretrainer",
]  # fmt: skip


class ContrastivePretrainer(CreatedModulesLoop):
    """Trains an encoder to tell two views of one sample from the views of all others.

    Batch norm has the statistics of one view. Over several processes (a DDP- or FSDP2-wrapped
    encoder) the negatives come from all processes.

    Args:
        encoder: of token ids or of images; see `Encoder`.
        hidden_size: width of its output.
        optimizer: None: AdamW with the configuration's learning rate and weight decay.
        config: None, a mapping or a `ContrastiveConfig`.
        device: None: where the encoder is.
        cache_chunk: how many rows (of both views together) go through the encoder at a time: the
            memory of so many, the whole batch's gradients, for one more forward pass.
        gradient_accumulation_steps: into how many such parts a batch is cut instead.
        encoder_momentum: MoCo's second encoder; None: a copy.
        backend: of the kernels.
        **options: fields of the configuration, which replace its own; `autocast_dtype`,
            `scheduler`, `log`, as `TrainingLoop` has them.
    """

    monitored = ("loss", "accuracy")
    statistics: ClassVar = {"mean_loss": "loss", "mean_accuracy": "accuracy"}

    def __init__(
        self,
        encoder: nn.Module,
        hidden_size: int = 768,
        optimizer: Optimizer | None = None,
        config: ContrastiveConfig | Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        *,
        cache_chunk: int | None = None,
        gradient_accumulation_steps: int = 1,
        encoder_momentum: nn.Module | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        self.config, options = split_options(
            config, ContrastiveConfig, options, ContrastivePretrainer
        )
        c = self.config
        if cache_chunk is not None and (type(cache_chunk) is not int or cache_chunk < 1):
            raise ValueError(f"cache_chunk must be an int >= 1 or None, got {cache_chunk!r}")
        if encoder_momentum is not None and not c.use_momentum_encoder:
            raise ValueError("encoder_momentum is given, but use_momentum_encoder is False")
        self.encoder = encoder
        self.projection: nn.Module = nn.Identity()
        if c.use_projection:
            self.projection = ProjectionHead(
                hidden_size, c.hidden_dim, c.projection_dim, batch_norm=c.batch_norm
            )
        copied = copy.deepcopy(self.projection)  # before it is sharded
        super().__init__(
            "encoder",
            encoder,
            {"projection": self.projection},
            optimizer,
            device=device,
            learning_rate=c.learning_rate,
            weight_decay=c.weight_decay,
            max_grad_norm=c.max_grad_norm,
            gradient_accumulation_steps=gradient_accumulation_steps,
            **options,
        )
        self.hidden_size, self.cache_chunk, self._backend = hidden_size, cache_chunk, backend
        self._wanted: dict[str, Any] = {
            "device": self.device,
            "vocabulary_size": vocabulary_size(encoder),
        }
        self._features = PooledFeatures(encoder, hidden_size, c.pooling, self, cache_chunk)
        if has_batch_norm(encoder) and (cache_chunk or gradient_accumulation_steps > 1):
            warnings.warn("the encoder's batch norm will see parts of the batch", stacklevel=2)
        self._momentum: MomentumNetworks | None = None
        if c.use_momentum_encoder:
            bring_beside(encoder, copied)
            size = (c.projection_dim if c.use_projection else hidden_size, c.queue_size)
            self._momentum = MomentumNetworks(
                encoder, self.projection, copied, size, c.momentum, encoder_momentum, backend,
                self._data_parallel_groups,
            )  # fmt: skip
            self._key_features = PooledFeatures(
                self._momentum.encoder, hidden_size, c.pooling, self, cache_chunk
            )
            self.with_state["momentum"] = self._momentum
        momentum = self._momentum
        self.encoder_momentum = None if momentum is None else momentum.encoder
        self.projection_momentum = None if momentum is None else momentum.projection

    @property
    def queue(self) -> Tensor | None:
        """MoCo's keys, `(dim, K)`, each of unit length."""
        return None if self._momentum is None else self._momentum.queue

    @property
    def queue_ptr(self) -> int:
        """The column of the queue that the next key takes."""
        return int(self._momentum.pointer) if self._momentum else 0

    def register_queue(self) -> None:
        """Fills MoCo's queue with random keys of unit length and begins it anew."""
        if self._momentum is None:
            raise ValueError("there is no queue: use_momentum_encoder is False")
        self._momentum.register_queue()

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_momentum: bool = False
    ) -> Tensor:
        """Returns the embeddings, `(B, projection_dim)`, of unit length, in the networks' mode.

        Args:
            input_ids: `(B, S)` token ids, or images `(B, …)`.
            attention_mask: `(B, S)`, 1 = real token.
            use_momentum: of MoCo's momentum networks, without a graph.
        """
        if use_momentum and self._momentum is None:
            raise ValueError("there is no momentum encoder: use_momentum_encoder is False")
        view = make_view("input_ids", input_ids, attention_mask, **self._wanted)
        if use_momentum:
            return self._keys([view])[0]
        return F.normalize(self._embeddings([view])[0], dim=1)

    def compute_infonce_loss(
        self,
        z_i: Tensor,
        z_j: Tensor,
        queue: Tensor | None = None,
        same: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the mean loss, with its graph, and the share of rows that find their partner.

        Args:
            z_i: `(B, D)`, one view.
            z_j: `(B, D)`, the other.
            queue: `(D, K)`: MoCo's loss of z_i against its z_j and these; None: NT-Xent over both.
            same: `(B, K)`, True where a key of the queue is of the row's own sample, and no
                negative of it; None: nowhere.
        """
        options = {"temperature": self.config.temperature, "backend": self._backend}
        rows = len(z_i)
        if queue is not None:
            loss, correct = moco_loss(z_i, z_j, queue, same, **options)
        else:
            group = self._process_group()
            loss, correct = nt_xent(z_i, z_j, process_group=group, return_correct=True, **options)
            rows *= 2
        return loss, correct / max(rows, 1)

    def train_step(
        self,
        input_ids_1: Tensor,
        input_ids_2: Tensor,
        attention_mask_1: Tensor | None = None,
        attention_mask_2: Tensor | None = None,
        *,
        sample_ids: Tensor | Sequence[int] | None = None,
    ) -> dict[str, float]:
        """Makes one optimizer step on two views of B samples.

        Args:
            input_ids_1: `(B, S)` token ids, or images `(B, …)`.
            input_ids_2: `(B, T)`: row i is of the same sample.
            attention_mask_1: `(B, S)`, 1 = real token; None: all are.
            attention_mask_2: `(B, T)`.
            sample_ids: `(B,)`, a number at least 0 of each row's sample, alike for rows that say
                the same: MoCo takes no key of the queue with the row's own number as a negative.
                In a batch of SimCLR each number stands once. None: they are not known.

        Returns:
            `loss, accuracy`, before the update, over all processes.

        Raises:
            ValueError: an argument does not fit. FloatingPointError: the loss or a gradient is not
                finite. Either way no parameter was changed.
        """
        batch = (input_ids_1, input_ids_2, attention_mask_1, attention_mask_2)
        views = make_views(*batch, **self._wanted)
        rows = len(views[0].inputs)
        if rows == 1 and has_batch_norm(self.projection):
            raise ValueError("batch norm in the projection head needs two samples or more, got 1")
        ids = read_sample_ids(sample_ids, rows, once=self._momentum is None)
        self._train_mode()
        count = self.count_over_processes(rows)
        keys: list[Tensor] = []
        metrics = self.update([views], lambda views: self._share(views, count, keys, ids))
        if self._momentum is not None:
            self._momentum.follow()
            self._momentum.push(torch.cat(keys), None if ids is None else ids.repeat(len(keys)))
        return metrics

    @torch.no_grad()
    def eval_step(
        self, *views: Tensor, sample_ids: Tensor | Sequence[int] | None = None, **masks: Tensor
    ) -> dict[str, float]:
        """Returns `loss, accuracy` of all processes' batches, in evaluation mode.

        Always NT-Xent over both views, of the trained networks: MoCo's queue has no part in it, so
        that the figures do not change as it fills. They depend on the number of samples.

        Arguments as `train_step`.
        """
        options: dict[str, Any] = {**masks, **self._wanted}
        made = make_views(*views, **options)
        read_sample_ids(sample_ids, len(made[0].inputs), once=False)
        with self._evaluating(), self.autocast():
            loss, metrics = self._nt_xent(made, self.count_over_processes(len(made[0].inputs)))
        return read_numbers({"loss": loss, **metrics}, self._data_parallel_groups)

    def _embeddings(self, views: list[View]) -> list[Tensor]:
        """Returns what is compared, `(B, projection_dim)` of every view, float32 or wider."""
        features = self._features(views)
        with self.autocast():
            return [widened(self.projection(part)) for part in features]

    @torch.no_grad()
    def _keys(self, views: list[View]) -> list[Tensor]:
        projection = self.projection_momentum
        assert projection is not None
        features = self._key_features([self._features.cast(view) for view in views])
        with self.autocast():
            projected = [widened(projection(part)) for part in features]
        return [F.normalize(key, dim=1) for key in projected]

    def _nt_xent(self, views: list[View], count: int | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, accuracy = self.compute_infonce_loss(*self._embeddings(views))
        part = len(views[0].inputs) / count
        return loss / self._processes, {"accuracy": accuracy * part}

    def _share(
        self, views: list[View], count: int | Tensor, keys: list[Tensor], ids: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns this process's share of loss and metrics of `count` samples; adds MoCo's keys."""
        if self._momentum is None:
            return self._nt_xent(views, count)
        part = len(views[0].inputs) / count
        both = int(self.config.symmetric_loss)
        keys += self._keys(views[1 - both :])
        queries = self._embeddings(views[: 1 + both])
        results = [
            self.compute_infonce_loss(query, key, self.queue, self._momentum.same_samples(ids))
            for query, key in zip(queries, reversed(keys), strict=True)
        ]
        loss, accuracy = (sum(values) / len(results) for values in zip(*results, strict=True))
        return loss * part, {"accuracy": accuracy * part}


def create_contrastive_pretrainer(
    encoder: nn.Module,
    hidden_size: int = 768,
    config: ContrastiveConfig | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> ContrastivePretrainer:
    """Returns a `ContrastivePretrainer`; keywords are of `ContrastiveConfig` or of the trainer."""
    return ContrastivePretrainer(encoder, hidden_size, config=config, **kwargs)
