"""PPO from human feedback (Ouyang et al. 2022) of causal language models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from apt_kernels import gae, kl_penalty, policy_loss, value_loss

from ..scoring.expert_balance import add_balance
from ..scoring.output_head import Scoring, TokenScores
from ..training.config import split_options
from ..training.curves import read_numbers
from .all_processes import rows_of_all
from .policy_trainer import COPY, PolicyTrainer
from .rlhf_config import RLHFConfig
from .sequence_batch import SequenceBatch, at_last_token, checked_logps, minibatches


class RLHFTrainer(PolicyTrainer):
    """Trains a policy on its own responses: reward at their end, KL penalty at each token, PPO.

    Args:
        policy_model: called as `model(input_ids, attention_mask=…)`; Hugging Face, PEFT, DDP- or
            FSDP2-wrapped or any other. Dropout is left as it is: 0 is recommended.
        reward_model: a model or function, see `RewardSource`.
        ref_policy_model: None: the PEFT adapter disabled, else a frozen copy of the policy.
        optimizer: None: AdamW. The value head's parameters are added to one that is given.
        config: None, a mapping or an `RLHFConfig`.
        device: None: where the policy is.
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
        **options: fields of `RLHFConfig`, which replace those of `config`.
    """

    monitored = ("mean_reward", "mean_kl", "ppo_loss", "entropy")
    statistics: ClassVar = {"mean_reward": "mean_reward", "mean_kl": "mean_kl"}

    def __init__(
        self,
        policy_model: nn.Module,
        reward_model: Callable[..., Any],
        ref_policy_model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        config: RLHFConfig | Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        *,
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
        settings: RLHFConfig
        settings, options = split_options(config, RLHFConfig, options, RLHFTrainer)
        super().__init__(
            policy_model,
            reward_model,
            COPY if ref_policy_model is None else ref_policy_model,
            optimizer,
            settings,
            device,
            value_head=True,
            temperature=settings.temperature,
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

    @torch.no_grad()
    def generate_responses(
        self,
        prompts: Tensor,
        prompt_masks: Tensor | None = None,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        *,
        return_token_mask: bool = False,
    ) -> tuple[Tensor, ...]:
        """Returns `(responses, response_masks, log_probs)`, sampled from the policy.

        Args:
            prompts: `(B, P)`; padding may be on either side.
            prompt_masks: `(B, P)`, 1 = real token; None: all are.
            max_new_tokens: a response ends there, or with its end token.
            temperature: of the distribution.
            return_token_mask: also return the mask of response tokens, `(B, S)`, as the last.

        Returns:
            `(B, S)` ids, prompts included; `(B, S)`, 1 = real token; `(B, S-1)` log-probabilities
            of all tokens but the first, 0 where they are not of the response.
        """
        with self.autocast():
            rollout = self._sampler(prompts, prompt_masks, max_new_tokens, temperature)
        self._remember(rollout, temperature)
        batch = self._batch(rollout.responses, rollout.response_masks)
        self._score_in_parts(batch, self.config.batch_size, temperature)
        result = rollout.responses, rollout.response_masks, batch.columns["old_logps"]
        return (*result, rollout.token_mask) if return_token_mask else result

    @torch.no_grad()
    def compute_kl_penalty(
        self, responses: Tensor, response_masks: Tensor | None, policy_log_probs: Tensor,
        **tokens: Any,
    ) -> Tensor:  # fmt: skip
        """Returns the estimate of KL(policy || reference) at each token, `(B, S)`.

        It is 0 at padding and at prompts, as far as they are known, and at the first token, of
        which no model says anything.

        Args:
            responses: `(B, S)`, prompts included.
            response_masks: `(B, S)`, 1 = real token; None: all are.
            policy_log_probs: `(B, S-1)` of all tokens but the first, as `generate_responses`
                returns them; or `(B, S)`, whose first column is not read.
            **tokens: as `ppo_step`.
        """
        batch = self._batch(responses, response_masks, **tokens)
        if isinstance(policy_log_probs, Tensor) and policy_log_probs.shape == responses.shape:
            policy_log_probs = policy_log_probs[:, 1:]
        logps = checked_logps("policy_log_probs", policy_log_probs, batch)
        scored = self._score_in_parts(
            batch, self.config.batch_size, self._temperature_of(responses)
        )
        return F.pad(self._token_kl(logps, scored["ref_logps"], batch.response_tokens), (1, 0))

    def _token_kl(self, logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
        return kl_penalty(
            logps, ref_logps, self.config.kl_estimator, mask=mask, backend=self._backend
        )

    def compute_advantages(
        self, rewards: Tensor, values: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns `(advantages, returns)`, `(B, T)` each, over the response tokens alone.

        They are whitened over the tokens of all processes, which must all call this.

        Args:
            rewards: `(B, T)`, or `(B,)`: at each row's last token that counts.
            values: `(B, T)`, before each token.
            masks: `(B, T)`, 1 = token of the response.
        """
        rewards = at_last_token(rewards, masks) if rewards.dim() == 1 else rewards
        whiten = self.config.whiten_advantages
        groups = self._data_parallel_groups if whiten else []
        rewards, values, masks, own = rows_of_all(rewards, values.detach(), masks, groups)
        advantages, returns = gae(
            rewards, values, gamma=self.config.gamma, gae_lambda=self.config.gae_lambda, mask=masks,
            whiten=whiten, backend=self._backend,
        )  # fmt: skip
        return advantages[own], returns[own]

    def ppo_step(
        self,
        responses: Tensor,
        response_masks: Tensor | None,
        old_log_probs: Tensor,
        advantages: Tensor,
        returns: Tensor,
        *,
        old_values: Tensor | None = None,
        **tokens: Any,
    ) -> dict[str, float]:
        """Makes the epochs of PPO on what was sampled: one training step.

        Args:
            responses: `(B, S)`, prompts included.
            response_masks: `(B, S)`, 1 = real token; None: all are.
            old_log_probs: `(B, S-1)`, at sampling time.
            advantages: `(B, S-1)`.
            returns: `(B, S-1)`.
            old_values: `(B, S-1)`, at sampling time; None: those of the value head as it is.
            **tokens: `response_token_mask` or `prompt_lengths`, as `make_sequence_batch`; without
                them those of `generate_responses` where `responses` is what it returned last (then
                also its temperature counts, not the configuration's), else every real token but
                the first.

        Returns:
            The means over all updates of `ppo_loss, policy_loss, value_loss, entropy,
            clip_fraction, approx_kl`; and `explained_variance` before them.
        """
        batch = self._batch(responses, response_masks, old_log_probs=old_log_probs, **tokens)
        temperature = self._temperature_of(responses)
        if old_values is None:
            everything = batch.select(slice(None))
            scored = self._score_in_parts(everything, self.config.batch_size, temperature)
            old_values = scored["old_values"]
        given = {"advantages": advantages, "returns": returns, "old_values": old_values}
        for name, column in given.items():
            batch.columns[name] = checked_logps(name, column, batch)
        metrics = self._ppo(batch, temperature)
        self.finish_step(metrics)
        return {name: value for name, value in metrics.items() if name != "loss"}

    def train_step(
        self,
        prompts: Tensor,
        prompt_masks: Tensor | None = None,
        *,
        rows: Tensor | Sequence[int] | None = None,
    ) -> dict[str, float]:
        """Samples a response to each prompt, scores it and makes the epochs of PPO.

        Args:
            prompts: `(B, P)`; padding may be on either side.
            prompt_masks: `(B, P)`, 1 = real token; None: all are.
            rows: `(B,)`, the positions of the prompts among the rows of the data, for rewards that
                read them.

        Returns:
            `mean_reward`, `mean_kl` (to the reference, in nats a token), `ppo_loss, policy_loss,
            value_loss, entropy`, means over all updates; also `sequence_kl` (in nats a response),
            `response_length, cut_share` (of responses that did not end by themselves),
            `abstained_share` (of those without a reward), where several functions are added
            `reward_…` and `abstained_share_…` of each, `kl_coef, learning_rate` and the others of
            `ppo_step`.

        Raises:
            ValueError: an argument, a reward or a prompt does not fit; no parameter was changed.
            FloatingPointError: a loss or a gradient is not finite; that update was not made.
        """
        rollout = self._sample(prompts, prompt_masks, self.config.max_new_tokens)
        batch = self._batch_of(rollout, rows)
        measured = self._add_rewards(batch, self._rewards_of(batch))
        measured |= self._compare_with_reference(batch)
        if rollout.logps is not None:
            batch.columns["old_logps"] = checked_logps("the rollout's logps", rollout.logps, batch)
        updates = self._ppo(batch, self._temperature)
        metrics = {**read_numbers(measured, self._data_parallel_groups), **updates}
        metrics["kl_coef"] = self._kl_coef.value
        self._kl_coef.follow(metrics["mean_kl"])
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.finish_step(metrics)
        return {**{k: v for k, v in metrics.items() if k != "loss"}, "learning_rate": rate}

    @torch.no_grad()
    def _compare_with_reference(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """Gives the batch its advantages and returns; returns shares of what was measured."""
        columns = self._score_in_parts(batch, self.config.batch_size)
        every, tokens = batch.response_tokens, batch.tokens
        kl = self._token_kl(columns["old_logps"], columns["ref_logps"], every)
        token_rewards = at_last_token(self.config.reward_scale * columns["scores"], every)
        token_rewards = token_rewards - self._kl_coef.value * kl
        columns["advantages"], columns["returns"] = self.compute_advantages(
            token_rewards, columns["old_values"], tokens
        )
        return {
            "mean_kl": kl.sum() / self.count_over_processes(every.sum().double()),
            "sequence_kl": kl.sum() / self.count_over_processes(batch.rows),
        }

    def _ppo(self, batch: SequenceBatch, temperature: float) -> dict[str, float]:
        self._train_mode()
        columns = batch.columns
        groups = self._data_parallel_groups
        foretold = rows_of_all(columns["old_values"], columns["returns"], batch.tokens, groups)
        _, before = value_loss(*foretold[:3])
        updates = [
            self._update(batch.select(rows), temperature)
            for _ in range(self.config.ppo_epochs)
            for rows in minibatches(batch, self.config.batch_size, groups)
        ]
        means = {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
        return {**means, "explained_variance": float(before["explained_variance"])}

    def _update(self, batch: SequenceBatch, temperature: float) -> dict[str, float]:
        tokens = self.count_over_processes(batch.tokens.sum().double()).clamp(min=1)
        how = Scoring(temperature, True, self.value_head)

        def share(part: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
            scores, _ = self._score(part, how, compared=False)
            return self._share(scores, part, tokens)

        return self.update(batch.chunk(self.gradient_accumulation_steps), share, finish=False)

    def _share(
        self, scores: TokenScores, batch: SequenceBatch, tokens: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of PPO and metrics: the batch's share of the metrics of all `tokens`."""
        config, columns, mask = self.config, batch.columns, batch.tokens
        loss, of_policy = policy_loss(
            scores.logps,
            columns["old_logps"],
            columns["advantages"],
            mask,
            clip_low=config.clip_epsilon,
            clip_high=config.clip_epsilon,
            dual_clip=config.dual_clip,
            entropy=scores.entropy,
            entropy_coef=config.entropy_coef,
            normalizer=tokens,
            backend=self._backend,
        )
        assert scores.values is not None  # the policy has a value head
        of_values, _ = value_loss(
            scores.values,
            columns["returns"],
            mask,
            old_values=None if config.value_clip is None else columns["old_values"],
            clip_range=config.value_clip,
            normalizer=tokens,
            backend=self._backend,
        )
        loss = loss + config.value_loss_coef * of_values
        weight = mask.sum().double() / tokens
        means = {k: of_policy[k] * weight for k in ("entropy", "clip_fraction", "approx_kl")}
        metrics = {"ppo_loss": loss, "policy_loss": of_policy["policy_loss"]}
        metrics = {**metrics, "value_loss": of_values, **means}
        return add_balance(scores.balance, weight, loss, metrics)


def create_rlhf_trainer(
    policy_model: nn.Module,
    reward_model: Callable[..., Any],
    config: RLHFConfig | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> RLHFTrainer:
    """Returns an `RLHFTrainer`; keywords are options of `RLHFConfig` or of the trainer."""
    reference = kwargs.pop("ref_policy_model", None)
    return RLHFTrainer(policy_model, reward_model, reference, config=config, **kwargs)
