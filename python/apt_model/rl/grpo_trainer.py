"""Group relative policy optimization (Shao et al. 2024, DeepSeekMath) of causal language models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from apt_kernels import policy_loss, value_loss

from ..scoring.expert_balance import add_balance
from ..scoring.output_head import Scoring
from ..training.config import split_options
from .groups import complete_rows, within_groups
from .grpo_config import GRPOConfig
from .policy_trainer import PolicyTrainer
from .reward_source import Rewards, checked_rewards
from .sequence_batch import SequenceBatch, checked_logps

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
        rollout: samples instead of the policy, as `Sampler`.
        eos_token_id: what ends a response, as `PolicyTrainer`.
        stop_strings: texts that end a response too.
        tokenizer: of the policy; needed for those texts, and its end token ends a response.
        pad_token_id: what follows the end of a response.
        use_hidden_states: False: always form the logits.
        backend: of the kernels.
        gradient_accumulation_steps: into how many parts a step cuts its batch.
        autocast_dtype: "bf16", "fp16" or None.
        scheduler: a torch scheduler, or what makes one of an optimizer; one step a training step.
        log: called with every step's record, or a TensorBoard writer.
        **options: fields of `GRPOConfig`, which replace those of `config`.
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
        rollout: Callable[..., Any] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        tokenizer: Any = None,
        pad_token_id: int = 0,
        use_hidden_states: bool = True,
        backend: str | None = None,
        gradient_accumulation_steps: int = 1,
        autocast_dtype: torch.dtype | str | None = None,
        scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
        log: Callable[[dict[str, float]], Any] | Any = None,
        **options: Any,
    ) -> None:
        settings: GRPOConfig
        settings, options = split_options(config, GRPOConfig, options, GRPOTrainer)
        super().__init__(
            policy_model,
            reward_model,
            ref_policy_model,
            optimizer,
            settings,
            device,
            value_head=settings.use_critic,
            temperature=settings.sampling_temperature,
            rollout=rollout,
            eos_token_id=eos_token_id,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
            pad_token_id=pad_token_id,
            use_hidden_states=use_hidden_states,
            backend=backend,
            gradient_accumulation_steps=gradient_accumulation_steps,
            autocast_dtype=autocast_dtype,
            scheduler=scheduler,
            log=log,
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
        advantages, variances = within_groups(rewards, size, self.config.advantage_type)
        return advantages / self.config.temperature, {
            "group_variance": variances.mean(),
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
        complete = complete_rows(batch.rows, size)
        given = None
        if rewards is not None:
            rewards = rewards.reshape(-1) if isinstance(rewards, Tensor) else rewards
            given = checked_rewards("rewards", rewards, batch.rows, self.device).first(complete)
        if complete < batch.rows:
            batch = batch.select(torch.arange(complete, device=self.device))
        metrics = self._train(batch, size, self._rewards_of(batch) if given is None else given)
        return {name: metrics[name] for name in self._returned()}

    def train_step_from_prompts(
        self,
        prompts: Tensor,
        prompt_masks: Tensor | None = None,
        max_new_tokens: int | None = None,
        *,
        rows: Tensor | Sequence[int] | None = None,
    ) -> dict[str, float]:
        """Samples a group of responses to each prompt, scores them and makes one step.

        Args:
            prompts: `(n, P)`, padded on either side.
            prompt_masks: `(n, P)`, 1 = real token; None: all are.
            max_new_tokens: instead of the configuration's.
            rows: `(n,)`, the positions of the prompts among the rows of the data, for rewards that
                read them.

        Returns:
            What `train_step` returns, `response_length`, the mean in tokens, `cut_share`, the share
            of responses that did not end by themselves, `abstained_share`, of those without a
            reward, and where several functions are added `reward_…` and `abstained_share_…` of
            each.
        """
        room = self.config.max_new_tokens if max_new_tokens is None else max_new_tokens
        size = self.config.group_size
        rollout = self._sample(prompts, prompt_masks, room, copies=size)
        batch = self._batch_of(rollout, rows, copies=size)
        if rollout.logps is not None:
            batch.columns["old_logps"] = checked_logps("the rollout's logps", rollout.logps, batch)
        metrics = self._train(batch, size, self._rewards_of(batch))
        of_rewards = [name for name in metrics if name.startswith(("reward_", "abstained_"))]
        names = (*self._returned(), "response_length", "cut_share", *of_rewards)
        return {name: metrics[name] for name in names}

    def _returned(self) -> tuple[str, ...]:
        more = ("value_loss",) if self.config.use_critic else ()
        return (*RETURNED, *more, "total_loss")

    def _train(self, batch: SequenceBatch, size: int, rewards: Rewards) -> dict[str, float]:
        measured = self._add_rewards(batch, rewards)
        columns = batch.columns
        advantages, variances = within_groups(
            columns["scores"], size, self.config.advantage_type, columns.get("abstains")
        )
        columns["advantages"] = advantages / self.config.temperature
        groups = self.count_over_processes(len(variances))
        measured["group_variance"] = variances.sum() / groups
        parts = batch.chunk(self.gradient_accumulation_steps)
        counts = self._counts(parts)

        def share(part: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
            loss, metrics = self._share(part, counts)
            return loss, {**metrics, **(measured if part is parts[0] else {})}

        self._train_mode()
        metrics = self.update(parts, share)
        self._kl_coef.follow(metrics["kl_divergence"])
        return {**metrics, "total_loss": metrics["loss"]}

    def _counts(self, parts: list[SequenceBatch]) -> dict[str, Any]:
        """Returns what the shares are divided by, of all parts and processes; at least 1."""
        rows = sum(part.rows for part in parts)
        tokens = sum(part.tokens.sum() for part in parts)
        counted = sum(part.tokens.any(-1).sum() for part in parts)
        divisors = {
            "token_mean": tokens,
            "token_sum": None,
            "dr_grpo": counted * self.config.max_new_tokens,
        }
        divisor = divisors.get(self.config.aggregation, counted)
        return {
            "rows": self.count_over_processes(rows),
            "tokens": self.count_over_processes(tokens).clamp(min=1),
            "loss": None if divisor is None else self.count_over_processes(divisor).clamp(min=1),
        }

    def _share(
        self, batch: SequenceBatch, counts: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the batch's share of the loss and metrics of `counts` rows and tokens."""
        config, columns, tokens = self.config, batch.columns, batch.tokens
        compared = self._reference is not None and self._kl_coef.value > 0
        how = Scoring(self._temperature, config.entropy_coef > 0, self.value_head)
        scores, ref_logps = self._score(batch, how, compared=compared)
        loss, measured = policy_loss(
            scores.logps,
            columns.get("old_logps"),
            columns["advantages"],
            tokens,
            ref_logps=ref_logps,
            kl_coef=self._kl_coef.value if compared else 0.0,
            entropy=scores.entropy,
            normalizer=counts["loss"],
            backend=self._backend,
            **config.surrogate(),
        )
        weight = tokens.sum().double() / counts["tokens"]
        metrics = {
            "mean_advantage": columns["advantages"].sum() / counts["rows"],
            "policy_loss": measured["policy_loss"],
            "kl_divergence": measured["ref_kl"] * weight,
            "clip_fraction": measured["clip_fraction"] * weight,
            "approx_kl": measured["approx_kl"] * weight,
        }
        if config.use_critic and "scores" in columns:
            assert scores.values is not None
            targets = columns["scores"].unsqueeze(-1).expand_as(scores.values)
            metrics["value_loss"], _ = value_loss(
                scores.values, targets, tokens, normalizer=counts["tokens"], backend=self._backend
            )
            loss = loss + config.value_loss_coef * metrics["value_loss"]
        return add_balance(scores.balance, batch.rows / counts["rows"], loss, metrics)


def create_grpo_trainer(
    policy_model: nn.Module,
    reward_model: Callable[..., Any] | None = None,
    config: GRPOConfig | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> GRPOTrainer:
    """Returns a `GRPOTrainer`; keywords are options of `GRPOConfig` or of the trainer."""
    return GRPOTrainer(policy_model, reward_model, config=config, **kwargs)
