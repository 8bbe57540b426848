"""Group relative policy optimization (Shao et al. 2024, DeepSeekMath) of causal language models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apt_kernels import value_loss

from ..scoring.output_head import Scoring
from ..training.config import split_options
from .grpo_config import GRPOConfig
from .policy_trainer import PolicyTrainer
from .reward_source import checked_rewards
from .sequence_batch import SequenceBatch, complete_rows, group_variances

RETURNED = ("group_variance", "mean_reward", "policy_loss", "kl_divergence", "mean_advantage")


class GRPOTrainer(PolicyTrainer):
    """Trains a policy on groups of its own responses, each compared with the others of its group.

    Args:
        policy_model: called as `model(input_ids, attention_mask=…)`; Hugging Face, PEFT, DDP- or
            FSDP2-wrapped or any other.
        reward_model: a model or function, see `RewardSource`; None: every step brings rewards.
        optimizer: None: AdamW with the configuration's learning rate. The critic's parameters are
            added to one that is given.
        config: None, a mapping or a `GRPOConfig`.
        device: None: where the policy is.
        ref_policy_model: what the KL term compares with: a model, or "copy" for the PEFT adapter
            disabled or a frozen copy of the policy; None: there is no KL term.
        **options: fields of the configuration, which replace its own; `rollout`, `eos_token_id`,
            `pad_token_id`, `use_hidden_states`, `backend`, as `PolicyTrainer`;
            `gradient_accumulation_steps`, `autocast_dtype`, `scheduler`, `log`, as `TrainingLoop`
            has them.
    """

    monitored = ("mean_reward", "group_variance", "policy_loss")
    statistics: ClassVar = {name: name for name in RETURNED if name != "mean_advantage"}

    def __init__(
        self,
        policy_model: nn.Module,
        reward_model: Callable[..., Any] | None = None,
        optimizer: Optimizer | None = None,
        config: GRPOConfig | Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        *,
        ref_policy_model: nn.Module | str | None = None,
        **options: Any,
    ) -> None:
        config, options = split_options(config, GRPOConfig, options, GRPOTrainer)
        super().__init__(
            policy_model,
            reward_model,
            ref_policy_model,
            optimizer,
            config,
            device,
            value_head=config.use_critic,
            temperature=config.sampling_temperature,
            **options,
        )

    def compute_group_advantages(
        self, rewards: Tensor, group_size: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the advantages `(N,)` and `group_variance` (unbiased) and `mean_reward`.

        Args:
            rewards: `(N,)`, groups are consecutive; or `(n, group)`. An incomplete last group is
                dropped with a warning.
            group_size: instead of the configuration's.
        """
        size = self.config.group_size if group_size is None else group_size
        rewards = rewards.detach().reshape(-1)
        rewards = rewards[: complete_rows(len(rewards), size)]
        return self.config.advantages(rewards, size), {
            "group_variance": group_variances(rewards, size).mean(),
            "mean_reward": rewards.mean(),
        }

    def compute_policy_loss(
        self,
        responses: Tensor,
        response_masks: Tensor | None,
        advantages: Tensor,
        old_log_probs: Tensor | None = None,
        **tokens: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss, with its graph, and `policy_loss, kl_divergence, mean_advantage`.

        Args:
            responses: `(N, S)` or `(n, group, S)`, prompts included.
            response_masks: the same shape, 1 = real token; None: all are.
            advantages: `(N,)`.
            old_log_probs: `(N, S-1)`, at sampling time; None: those of the policy as it is.
            **tokens: `response_token_mask` or `prompt_lengths`, as `make_sequence_batch`; without
                them every real token but the first counts.
        """
        batch = self._batch(responses, response_masks, old_log_probs=old_log_probs, **tokens)
        batch.columns["advantages"] = advantages.detach().to(self.device).reshape(batch.rows)
        with self.autocast():
            loss, metrics = self._share(batch, self._counts([batch]))
        names = ("policy_loss", "kl_divergence", "mean_advantage")
        return loss, {name: metrics[name] for name in names}

    def train_step(
        self,
        responses: Tensor,
        response_masks: Tensor | None = None,
        rewards: Tensor | None = None,
        old_log_probs: Tensor | None = None,
        **tokens: Any,
    ) -> dict[str, float]:
        """Makes one optimizer step on sampled groups, in `gradient_accumulation_steps` parts.

        Args:
            responses: `(N, S)`, groups are consecutive rows; or `(n, group, S)`.
            response_masks: the same shape, 1 = real token; None: all are.
            rewards: one a row; None: the reward model's.
            old_log_probs: as `compute_policy_loss`.
            **tokens: as `compute_policy_loss`.

        Returns:
            `group_variance, mean_reward, policy_loss, kl_divergence` (to the reference, in nats a
            token, 0 without one), `mean_advantage, total_loss`, and `value_loss` with a critic.

        Raises:
            ValueError: an argument does not fit. FloatingPointError: the loss, a metric or a
                gradient is not finite. Either way no parameter was changed.
        """
        size = responses.shape[1] if responses.dim() == 3 else self.config.group_size
        batch = self._batch(responses, response_masks, old_log_probs=old_log_probs, **tokens)
        if rewards is not None:
            given = rewards.reshape(-1) if isinstance(rewards, Tensor) else rewards
            batch.columns["rewards"] = checked_rewards("rewards", given, batch.rows, self.device)
        complete = complete_rows(batch.rows, size)
        if complete < batch.rows:
            batch = batch.select(torch.arange(complete, device=self.device))
        if rewards is None:
            batch.columns["rewards"] = self._rewards_of(batch)
        return self._train(batch, size)

    def train_step_from_prompts(
        self,
        prompts: Tensor,
        prompt_masks: Tensor | None = None,
        max_new_tokens: int | None = None,
    ) -> dict[str, float]:
        """Samples a group of responses to each prompt, scores them and makes one step.

        Args:
            prompts: `(n, P)`, padded on either side.
            prompt_masks: `(n, P)`, 1 = real token; None: all are.
            max_new_tokens: instead of the configuration's.

        Returns:
            What `train_step` returns, and `response_length`, the mean in tokens.
        """
        room = self.config.max_new_tokens if max_new_tokens is None else max_new_tokens
        rollout = self._sample(prompts, prompt_masks, room, copies=self.config.group_size)
        metrics = self.train_step(
            rollout.responses,
            rollout.response_masks,
            old_log_probs=rollout.logps,
            response_token_mask=rollout.token_mask,
        )
        return {**metrics, "response_length": self.curves.columns["response_length"][-1]}

    def _train(self, batch: SequenceBatch, size: int) -> dict[str, float]:
        rewards = batch.columns["rewards"]
        batch.columns["advantages"] = self.config.advantages(rewards, size)
        batch.columns["group_variance"] = group_variances(rewards, size).repeat_interleave(size)
        parts = batch.chunk(self.gradient_accumulation_steps)
        counts = self._counts(parts)
        self._train_mode()
        metrics = self.update(parts, lambda part: self._share(part, counts))
        self._kl.follow(metrics["kl_divergence"])
        names = (*RETURNED, *(["value_loss"] if self.config.use_critic else []))
        return {**{name: metrics[name] for name in names}, "total_loss": metrics["loss"]}

    def _counts(self, parts: list[SequenceBatch]) -> dict[str, Any]:
        """Returns what the shares are divided by, of all parts and processes."""
        losses = [self.config.denominator(part.tokens) for part in parts]
        return {
            "rows": self.count_over_processes(sum(part.rows for part in parts)),
            "tokens": self.count_over_processes(sum(part.tokens.sum() for part in parts)),
            "loss": None if None in losses else self.count_over_processes(sum(losses)),
        }

    def _share(
        self, batch: SequenceBatch, counts: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the batch's share of the loss and metrics of `counts` rows and tokens."""
        columns, tokens = batch.columns, batch.tokens
        compared = self._reference is not None and self._kl.value > 0
        how = Scoring(self._temperature, self.config.entropy_coef > 0, self.value_head)
        scores, ref_logps = self._score(batch, how, compared=compared)
        loss, measured = self.config.loss(
            scores.logps,
            columns.get("old_logps"),
            columns["advantages"],
            tokens,
            ref_logps=ref_logps,
            kl_coef=self._kl.value if compared else 0.0,
            entropy=scores.entropy,
            normalizer=counts["loss"],
            backend=self._backend,
        )
        weight = tokens.sum().double() / counts["tokens"]
        metrics = {
            "mean_advantage": columns["advantages"].sum() / counts["rows"],
            "policy_loss": measured["policy_loss"],
            "kl_divergence": measured["ref_kl"] * weight,
            "clip_fraction": measured["clip_fraction"] * weight,
            "approx_kl": measured["approx_kl"] * weight,
            "response_length": tokens.sum().double() / counts["rows"],
        }
        if "rewards" not in columns:
            return loss, metrics
        metrics["mean_reward"] = columns["rewards"].sum() / counts["rows"]
        metrics["group_variance"] = columns["group_variance"].sum() / counts["rows"]
        if self.config.use_critic:
            targets = columns["rewards"].unsqueeze(-1).expand_as(scores.values)
            metrics["value_loss"], _ = value_loss(
                scores.values, targets, tokens, normalizer=counts["tokens"], backend=self._backend
            )
            loss = loss + self.config.value_loss_coef * metrics["value_loss"]
        return loss, metrics


def create_grpo_trainer(
    policy_model: nn.Module,
    reward_model: Callable[..., Any] | None = None,
    config: GRPOConfig | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> GRPOTrainer:
    """Returns a `GRPOTrainer`; keywords are options of `GRPOConfig` or of the trainer."""
    return GRPOTrainer(policy_model, reward_model, config=config, **kwargs)
