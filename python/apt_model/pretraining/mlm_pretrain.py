"""Masked-language modelling and next-sentence prediction (BERT; Devlin et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data.sentence_pairs import NSPDataBuilder
from ..scoring.model_access import vocabulary_size
from ..training.config import split_options
from ..training.loop import read_numbers
from ..training.schedule import warmup_of
from .created_modules import CreatedModulesLoop
from .encoder import Encoded, Encoder
from .masked_batch import MaskedBatch, make_masked_batch, masked
from .mlm_config import MLMConfig
from .mlm_head import MLMHead, NSPHead, make_mlm_head
from .own_head import OwnMLMHead, OwnNSPHead

__all__ = [
    "MLMConfig", "MLMHead", "MLMPretrainer", "NSPDataBuilder", "NSPHead", "create_mlm_pretrainer",
]  # fmt: skip
EVALUATION_STEP = 2**32 - 1  # of the masks: none of the training
SAMPLES_A_PROCESS = 2**32


class MLMPretrainer(CreatedModulesLoop):
    """Trains an encoder to predict masked tokens, and whether a segment follows another.

    The head runs at the masked tokens only. The masks depend on the seed, the step, the sample and
    the position alone: give `sample_ids` and they are the same whatever the batch size or the
    number of processes.

    Args:
        model: the encoder; see `Encoder`. A transformers model with heads of its own for masked
            tokens (`BertForMaskedLM`) and next sentences (`BertForPreTraining`) trains these.
        hidden_size: of its hidden states.
        optimizer: None: AdamW with the configuration's learning rate and weight decay.
        config: None, a mapping or an `MLMConfig`.
        device: None: where the model is.
        lm_head: None: the model's own head, else an `MLMHead`; an `nn.Linear`, or the model's input
            embedding (a tied decoder), as that head's decoder; any other module as the whole head.
        scheduler: replaces the warm-up.
        backend: of the kernels.
        **options: fields of the configuration, which replace its own;
            `gradient_accumulation_steps`, `autocast_dtype`, `log`, as `TrainingLoop` has them.
    """

    monitored = ("loss", "mlm_loss", "mlm_accuracy")
    statistics: ClassVar = {
        f"mean_{name}": name for name in ("mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy")
    }

    def __init__(
        self,
        model: nn.Module,
        hidden_size: int = 768,
        optimizer: Optimizer | None = None,
        config: MLMConfig | Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        *,
        lm_head: nn.Module | None = None,
        scheduler: Any = None,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        self.config, options = split_options(config, MLMConfig, options, MLMPretrainer)
        self.config.check_embedding(vocabulary_size(model))
        self.model = model
        self.hidden_size = hidden_size
        self.mlm_head = make_mlm_head(
            lm_head, hidden_size, self.config.vocab_size, self.config.hidden_act, backend, model
        )
        own = self.mlm_head if isinstance(self.mlm_head, OwnMLMHead) else None
        self.nsp_head: Any = None
        if self.config.use_nsp:
            if own is not None and own.has_nsp:
                self.nsp_head = OwnNSPHead(own, backend)
            else:
                self.nsp_head = NSPHead(hidden_size, backend)
        super().__init__(
            "model",
            model,
            {"mlm_head": self.mlm_head, "nsp_head": self.nsp_head},
            optimizer,
            device=device,
            learning_rate=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            max_grad_norm=self.config.max_grad_norm,
            scheduler=warmup_of(self.config.warmup_steps) if scheduler is None else scheduler,
            **options,
        )
        self._own_head = own
        self._encoder = Encoder(model, whole=own is not None)
        self._backend = backend

    def create_mlm_mask(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        word_ids: Tensor | None = None,
        sample_ids: Tensor | None = None,
        step: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `masked_input_ids, labels, mask_positions`, `(B, S)` each; nothing is modified.

        Args:
            input_ids: `(B, S)`.
            attention_mask: `(B, S)`, 1 = real token; None: all are. Padding is never masked.
            word_ids: `(B, S)`: neighbours of one number are masked as one word, below 0 never.
            sample_ids: `(B,)`, key of the rows' masks; None: their numbers.
            step: key of the masks; None: the steps made so far, so that each step has its own.
        """
        tensors = (attention_mask, word_ids, sample_ids)
        mask, words, samples = (None if t is None else t.to(self.device) for t in tensors)
        step = self.total_steps if step is None else step
        ids = input_ids.to(self.device)
        return masked(self.config, ids, mask, words, samples, step, self._backend)

    def compute_mlm_loss(self, hidden_states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean loss, with its graph, and the accuracy over the labels not -100 (or 0).

        Args: `(B, S, H)` and `(B, S)`.
        """
        labels = labels.flatten().to(self.device)
        positions = (labels != -100).nonzero().squeeze(-1)
        targets = labels[positions]
        with self.autocast():
            return self._mlm_share(hidden_states, positions, targets, len(positions))

    def compute_nsp_loss(self, pooled_output: Tensor, nsp_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean loss and the accuracy of `(B, H)` pooled outputs and `(B,)` labels."""
        if self.nsp_head is None:
            raise ValueError("the configuration has use_nsp = False")
        count = max(len(nsp_labels), 1)
        with self.autocast():
            loss, right = self.nsp_head(pooled_output, nsp_labels.to(self.device), count)
        return loss, right.double() / count

    def train_step(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        nsp_labels: Tensor | None = None,
        **batch: Any,
    ) -> dict[str, float]:
        """Masks a batch and makes one optimizer step, in `gradient_accumulation_steps` parts.

        Args:
            input_ids: `(B, S)`, not masked.
            attention_mask: `(B, S)`, 1 = real token; None: all are.
            nsp_labels: `(B,)`, 0 = the second segment follows, 1 = random; iff `use_nsp`.
            **batch: `token_type_ids`, `word_ids`, `sample_ids`, as `make_masked_batch` has them.

        Returns:
            `total_loss, mlm_loss, mlm_accuracy, num_masked` of all processes, before the update,
            and `nsp_loss, nsp_accuracy` iff `use_nsp`.

        Raises:
            ValueError: an argument does not fit. FloatingPointError: the loss or a gradient is not
                finite. Either way no parameter was changed.
        """
        whole = self._batch(0, input_ids, attention_mask, nsp_labels, **batch)
        return self._train(whole.chunk(self.gradient_accumulation_steps))

    def train_micro_batches(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Makes one optimizer step on several batches, as if they were one.

        Args:
            batches: the arguments of `train_step` of each; sizes and lengths may differ.
        """
        made, rows = [], 0
        for batch in batches:
            made.append(self._batch(rows, **batch))
            rows += len(made[-1].input_ids)
        return self._train(made)

    @torch.no_grad()
    def eval_step(self, *args: Any, **batch: Any) -> dict[str, float]:
        """Returns what `train_step` does, of all processes' batches, in evaluation mode.

        The masks are the same at every call, and none of the training's.
        """
        made = make_masked_batch(self.config, *args, step=EVALUATION_STEP, **batch).to(self.device)
        with self._evaluating(), self.autocast():
            loss, metrics = self._share(made, *self._counts_of_all([made]))
        return _result(read_numbers({"loss": loss, **metrics}, self._data_parallel_groups))

    def _batch(self, first_row: int, *args: Any, **batch: Any) -> MaskedBatch:
        return make_masked_batch(
            self.config,
            *args,
            **batch,
            step=self.total_steps,
            first_sample=self._process_index() * SAMPLES_A_PROCESS + first_row,
            backend=self._backend,
        )

    def _counts_of_all(self, batches: Sequence[MaskedBatch]) -> Iterator[int | Tensor]:
        """Returns how many masked tokens and how many sequences all processes have."""
        counts = sum(len(b.targets) for b in batches), sum(len(b.input_ids) for b in batches)
        return map(self.count_over_processes, counts)

    def _train(self, batches: list[MaskedBatch]) -> dict[str, float]:
        self._train_mode()
        tokens, rows = self._counts_of_all(batches)
        return _result(self.update(batches, lambda b: self._share(b.to(self.device), tokens, rows)))

    def _mlm_share(
        self, hidden: Tensor, positions: Tensor, targets: Tensor, count: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        if hidden.dim() != 3 or hidden.shape[-1] != self.hidden_size:
            wanted = f"(B, S, {self.hidden_size}), the hidden_size"
            raise ValueError(f"the hidden states must be {wanted}, got {tuple(hidden.shape)}")
        count = count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
        loss, right = self.mlm_head(hidden.flatten(0, 1)[positions], targets, count)
        return loss, right.double() / count

    def _mlm_of(self, batch: MaskedBatch, count: int | Tensor) -> tuple[Tensor, Tensor, Encoded]:
        """Returns the share of loss and accuracy, and what next sentences are predicted from."""
        inputs = batch.input_ids, batch.attention_mask, batch.token_type_ids
        if self._own_head is None:
            encoded = self._encoder(*inputs)
            share = self._mlm_share(encoded.hidden, batch.positions, batch.targets, count)
            return *share, encoded
        count = count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
        loss, correct, encoded = self._own_head.of_pass(
            partial(self._encoder.output, *inputs), batch.positions, batch.targets, count
        )
        return loss, correct.double() / count, encoded

    def _nsp_of(self, encoded: Encoded, labels: Any, count: int | Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.nsp_head, OwnNSPHead):
            assert encoded.nsp_logits is not None
            return self.nsp_head.loss_of(encoded.nsp_logits, labels, count)
        return self.nsp_head(encoded.pooled, labels, count)

    def _share(
        self, batch: MaskedBatch, tokens: int | Tensor, rows: int | Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the batch's share of the loss and metrics of so many tokens and rows."""
        mlm_loss, accuracy, encoded = self._mlm_of(batch, tokens)
        num_masked = torch.full((), float(len(batch.targets)), device=self.device)
        metrics = {"mlm_loss": mlm_loss, "mlm_accuracy": accuracy, "num_masked": num_masked}
        loss = self.config.mlm_loss_weight * mlm_loss
        if self.nsp_head is not None:
            nsp_loss, right = self._nsp_of(encoded, batch.nsp_labels, rows)
            loss = loss + self.config.nsp_loss_weight * nsp_loss
            metrics.update(nsp_loss=nsp_loss, nsp_accuracy=right.double() / rows)
        return loss, metrics


def _result(metrics: dict[str, float]) -> dict[str, float]:
    """Returns the metrics of a step by the names that scripts read."""
    num_masked = round(metrics.pop("num_masked"))
    return {"total_loss": metrics.pop("loss"), **metrics, "num_masked": num_masked}


def create_mlm_pretrainer(
    model: nn.Module,
    hidden_size: int = 768,
    config: MLMConfig | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> MLMPretrainer:
    """Returns an `MLMPretrainer`; keywords are options of `MLMConfig` or of the trainer."""
    return MLMPretrainer(model, hidden_size, config=config, **kwargs)
