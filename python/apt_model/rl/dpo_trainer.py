"""Direct preference optimization (Rafailov et al. 2023) of causal language models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apt_kernels import dpo_loss, sequence_logps

from ..scoring.devices import evaluating
from ..scoring.expert_balance import add_balance
from ..scoring.model_access import vocabulary_size
from ..scoring.next_token import NextTokenScorer
from ..training.config import split_options
from .batch_checks import check_responses
from .dpo_config import DPOConfig
from .pair_batch import PairBatch, make_pair_batch
from .pair_trainer import PairTrainer
from .reference_model import ReferenceModel


class DPOTrainer(PairTrainer):
    """Trains a policy on preference pairs.

    Args:
        policy_model: called as `model(input_ids, attention_mask=…)`; Hugging Face, PEFT, DDP- or
            FSDP2-wrapped or any other. Dropout is left as it is: 0 is recommended.
        ref_policy_model: None: the PEFT adapter disabled, else a frozen copy of the policy;
            "start": a frozen copy of the policy as it is now, its adapter included.
        optimizer: None: AdamW with the configuration's learning rate.
        config: None, a mapping or a `DPOConfig`.
        device: None: where the policy is.
        precomputed_reference: make no reference: every step brings `ref_chosen_logps` and
            `ref_rejected_logps` (see `compute_reference_logps`).
        use_hidden_states: False: always form the logits.
        backend: of the kernels.
        router_aux_loss_coef: weight of the balancing loss of a mixture of experts; None: the
            configuration's.
        **options: fields of the configuration, which replace its own;
            `gradient_accumulation_steps`, `autocast_dtype`, `scheduler`, `log`, as `TrainingLoop`
            has them.
    """

    monitored = ("loss", "accuracy", "reward_margin")
    statistics: ClassVar = {
        "mean_chosen_reward": "chosen_reward",
        "mean_rejected_reward": "rejected_reward",
        "accuracy": "accuracy",
    }

    def __init__(
        self,
        policy_model: nn.Module,
        ref_policy_model: nn.Module | str | None = None,
        optimizer: Optimizer | None = None,
        config: DPOConfig | Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        *,
        precomputed_reference: bool = False,
        use_hidden_states: bool = True,
        backend: str | None = None,
        router_aux_loss_coef: float | None = None,
        **options: Any,
    ) -> None:
        self.config, options = split_options(config, DPOConfig, options, DPOTrainer)
        wants_reference = self.config.has_reference and not precomputed_reference
        if ref_policy_model is not None and not wants_reference:
            raise ValueError("ref_policy_model is given, but these options use no reference model")
        if self.config.needs_whole_batch and options.get("gradient_accumulation_steps", 1) != 1:
            raise ValueError(f"{self.config.loss_type} cannot be cut: accumulate over 1 step")
        super().__init__(
            {"policy": policy_model},
            optimizer,
            learning_rate=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            device=device,
            max_grad_norm=self.config.max_grad_norm,
            **options,
        )
        self.policy_model = policy_model
        self._backend = backend
        self._policy = NextTokenScorer(
            policy_model, use_hidden_states, backend, router_aux_loss_coef
        )
        self._reference = self.ref_policy_model = None
        if wants_reference:
            self._reference = ReferenceModel(self._policy, ref_policy_model, self.device)
            self.ref_policy_model = self._reference.model
            self.with_state["reference"] = self._reference
        self._vocabulary_size = vocabulary_size(policy_model)

    def get_log_probs(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Returns log p(token t+1 | tokens up to t) under `model`, `(B, S-1)`, differentiable.

        Args:
            model: the policy, the reference or any other model.
            input_ids: `(B, S)`.
            attention_mask: `(B, S)`, 1 = real token; a padded token's log-probability is 0.
            labels: `(B, S)`: the tokens to score instead of `input_ids`; -100 gives 0.
        """
        scorer = self._policy if model is self.policy_model else self._policy.of_model(model)
        with self.autocast():
            return scorer.log_probs(input_ids.to(self.device), attention_mask, labels)

    def compute_dpo_loss(
        self,
        chosen_ids: Tensor,
        rejected_ids: Tensor,
        chosen_mask: Tensor | None = None,
        rejected_mask: Tensor | None = None,
        **batch: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the mean loss of the pairs, with its graph, and the metrics as 0-dim tensors.

        The metrics are the metrics of `train_step`. An accuracy counts a tie as one half.

        Args:
            chosen_ids: `(B, S)`.
            rejected_ids: `(B, T)`.
            chosen_mask: `(B, S)`, 1 = real token; padding on either side.
            rejected_mask: `(B, T)`.
            **batch: `prompt_lengths`, `chosen_response_mask`, `rejected_response_mask`,
                `ref_chosen_logps`, `ref_rejected_logps`, as `make_pair_batch` has them.
        """
        pairs = self._batch(chosen_ids, rejected_ids, chosen_mask, rejected_mask, **batch)
        return self._share_of_all(pairs)

    def train_step(
        self,
        chosen_ids: Tensor,
        rejected_ids: Tensor,
        chosen_mask: Tensor | None = None,
        rejected_mask: Tensor | None = None,
        **batch: Any,
    ) -> dict[str, float]:
        """Makes one optimizer step on a batch of pairs, in `gradient_accumulation_steps` parts.

        Args: as `compute_dpo_loss`.

        Returns:
            `loss, chosen_reward, rejected_reward, reward_margin, accuracy`, before the update.

        Raises:
            ValueError: an argument does not fit. FloatingPointError: the loss or a gradient is not
                finite. Either way no parameter was changed.
        """
        pairs = self._batch(chosen_ids, rejected_ids, chosen_mask, rejected_mask, **batch)
        return self._train_on(pairs)

    def train_micro_batches(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Makes one optimizer step on several batches, as if they were one.

        Args:
            batches: the arguments of `train_step` of each; sizes and lengths may differ.
        """
        if self.config.needs_whole_batch and len(batches) > 1:
            raise ValueError(f"{self.config.loss_type} needs all pairs in one batch")
        return super().train_micro_batches(batches)

    @torch.no_grad()
    def compute_reference_logps(self, *args: Any, **batch: Any) -> tuple[Tensor, Tensor]:
        """Returns `ref_chosen_logps, ref_rejected_logps`, `(B,)` each, to be given to a step.

        With `precomputed_reference` they are the untrained policy's: an error after a step.

        Args: as `compute_dpo_loss`.
        """
        pairs = self._batch(*args, **batch)
        score: Any = self._reference
        if score is None:
            if not self.config.has_reference or self.total_steps:
                raise RuntimeError("there is no reference, or the policy no longer is its own")
            score = self._policy
        with self.autocast(), evaluating(self.policy_model):
            chosen, rejected = self._answer_logps(score, pairs)[0].unbind()
            return chosen, rejected

    def _batch(self, *args: Any, **batch: Any) -> PairBatch:
        pairs = make_pair_batch(
            *args, **batch, device=self.device, vocabulary_size=self._vocabulary_size
        )
        check_responses("chosen_ids", pairs.counted[0])
        check_responses("rejected_ids", pairs.counted[1])
        if pairs.ref_logps is not None and not self.config.has_reference:
            raise ValueError("ref_chosen_logps are given, but these options use no reference")
        return pairs

    def _answer_logps(
        self, score: Callable[..., Tensor], batch: PairBatch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the answers' log-probabilities `(2, B)`, the tokens' and which count."""
        ids, attention_mask, counted = batch.sequences()
        logps, counted = score(ids, attention_mask, counted), counted[:, 1:]
        answers = sequence_logps(
            logps, counted, average=self.config.averages_logps, backend=self._backend
        )
        return answers.unflatten(0, (2, -1)), logps, counted

    def _loss(
        self, logps: Tensor, ref_logps: Tensor | None, counted: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss, summed over pairs, and both rewards of log-probabilities `(2, B)`."""
        lengths: dict[str, Tensor] = {}
        if self.config.loss_type == "sigmoid_norm":
            of_chosen, of_rejected = counted.sum(-1)
            lengths = {"chosen_lengths": of_chosen, "rejected_lengths": of_rejected}
        ref_chosen, ref_rejected = (None, None) if ref_logps is None else ref_logps.unbind()
        chosen, rejected = logps
        options: dict[str, Any] = {**lengths, **self.config.loss_options()}
        return dpo_loss(
            chosen, rejected, ref_chosen, ref_rejected, backend=self._backend, **options
        )

    def _share(self, batch: PairBatch, count: int | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the batch's share of the loss and metrics of `count` pairs."""
        ref_logps = batch.ref_logps
        reference = self._reference if ref_logps is None else None
        if ref_logps is None and reference is None and self.config.has_reference:
            raise ValueError("without a reference model each step needs ref_chosen_logps")
        balance: list[Tensor] = []

        def score(ids: Tensor, attention_mask: Tensor | None, mask: Tensor) -> Tensor:
            scores = self._policy.score(ids, attention_mask, mask)
            balance.extend([] if scores.balance is None else [scores.balance])
            return scores.logps

        policy: Any = partial(self._answer_logps, score, batch)
        if reference is None:
            logps, token_logps, counted = policy()
        else:
            theirs: Any = partial(self._answer_logps, reference, batch)
            (logps, token_logps, counted), (ref_logps, *_) = reference.beside(policy, theirs)
        loss, chosen, rejected = self._loss(logps, ref_logps, batch.counted)
        if self.config.sft_coef:
            of_chosen = token_logps[: batch.pairs], counted[: batch.pairs]
            mean_logps = sequence_logps(*of_chosen, average=True, backend=self._backend)
            loss = loss - self.config.sft_coef * mean_logps.sum()
        sums = {
            "chosen_reward": chosen.sum(),
            "rejected_reward": rejected.sum(),
            "reward_margin": (chosen - rejected).sum(),
            "accuracy": 0.5 * (1 + (chosen - rejected).sign()).sum(),
        }
        shares = {name: value / count for name, value in sums.items()}
        kept = balance[0] if balance else None
        return add_balance(kept, batch.pairs / count, loss / count, shares)


def create_dpo_trainer(
    policy_model: nn.Module,
    ref_policy_model: nn.Module | None = None,
    config: DPOConfig | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> DPOTrainer:
    """Returns a `DPOTrainer`; keywords are options of `DPOConfig` or of the trainer."""
    return DPOTrainer(policy_model, ref_policy_model, config=config, **kwargs)
