"""The base of the GRPO and PPO trainers: a policy, its reference, its rewards and its rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apt_kernels import kl_penalty

from ..scoring.devices import evaluating, move_modules
from ..scoring.model_access import vocabulary_size
from ..scoring.next_token import NextTokenScorer
from ..scoring.output_head import Scoring, TokenScores
from ..scoring.value_head import ValueHead
from ..training.curves import read_numbers
from ..training.loop import TrainingLoop
from .kl_control import KLCoefficient
from .reference_model import START, ReferenceModel
from .response_end import StopRules, read_end_tokens
from .reward_source import Rewards, RewardSource
from .rollout import Rollout, Sampler
from .sequence_batch import SequenceBatch, make_sequence_batch

COPY = "copy"


class PolicyTrainer(TrainingLoop):
    """The models of a policy trainer and what is asked of them.

    Args:
        policy_model: called as `model(input_ids, attention_mask=…)`.
        reward_model: as `RewardSource` takes it, or None.
        ref_policy_model: a model; "copy": the PEFT adapter disabled, else a frozen copy of the
            policy; "start": a frozen copy of the policy as it is now, its adapter included; None:
            nothing.
        optimizer: None: AdamW. The value head's parameters are added to one that is given.
        config: checked; has learning_rate, weight_decay, max_grad_norm, max_length, kl_coef,
            target_kl, cut_responses and cut_penalty.
        device: None: where the policy is.
        value_head: whether there is one.
        temperature: of the distribution that is sampled and scored.
        rollout: samples instead of the policy, see `Sampler`.
        eos_token_id: one or several tokens that end a response; None: all that the tokenizer, the
            model's generation settings and its configuration name.
        stop_strings: texts that end a response too; they need the tokenizer.
        tokenizer: of the policy, as those of Hugging Face.
        pad_token_id: what follows the end of a response.
        use_hidden_states: False: always form the logits.
        backend: of the kernels.
        router_aux_loss_coef: weight of the balancing loss of a mixture of experts; None: the
            configuration's.
        **options: `gradient_accumulation_steps`, `autocast_dtype`, `scheduler`, `log`, as
            `TrainingLoop` has them.
    """

    def __init__(
        self,
        policy_model: nn.Module,
        reward_model: Callable[..., Any] | None,
        ref_policy_model: nn.Module | str | None,
        optimizer: Optimizer | None,
        config: Any,
        device: torch.device | str | None,
        value_head: bool,
        temperature: float,
        *,
        rollout: Callable[..., Any] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        tokenizer: Any = None,
        pad_token_id: int = 0,
        use_hidden_states: bool = True,
        backend: str | None = None,
        router_aux_loss_coef: float | None = None,
        **options: Any,
    ) -> None:
        self.config = config
        if not any(parameter.requires_grad for parameter in policy_model.parameters()):
            raise ValueError("policy_model: no parameter requires a gradient")
        device = move_modules([policy_model], device)
        modules: dict[str, nn.Module] = {"policy": policy_model}
        self.value_head = ValueHead(policy_model).wrapped_as(policy_model) if value_head else None
        if self.value_head is not None:
            modules["value_head"] = self.value_head
            if optimizer is not None:  # not as a group of its own: a scheduler may know the groups
                optimizer.param_groups[0]["params"].extend(self.value_head.parameters())
        super().__init__(
            modules,
            optimizer,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            device=device,
            max_grad_norm=config.max_grad_norm,
            **options,
        )
        self.policy_model = policy_model
        self.reward_model = reward_model
        self._rewards = None if reward_model is None else RewardSource(reward_model)
        if isinstance(reward_model, nn.Module):
            move_modules([reward_model], device)
        self._backend = backend
        self._policy = NextTokenScorer(
            policy_model, use_hidden_states, backend, router_aux_loss_coef
        )
        self._reference = self._reference_of(ref_policy_model)
        self.ref_policy_model = self._reference and self._reference.model
        self._kl_coef = KLCoefficient(config.kl_coef, config.target_kl)
        self.with_state["kl_coefficient"] = self._kl_coef
        self._temperature = temperature
        self._remembered: tuple[Rollout | None, float] = (None, temperature)
        self._vocabulary_size = vocabulary_size(policy_model)
        end_tokens = read_end_tokens(policy_model, eos_token_id, tokenizer)
        self._ends = StopRules(end_tokens, stop_strings, tokenizer)
        if config.cut_responses != "keep" and not self._ends:
            raise ValueError(
                f"cut_responses={config.cut_responses!r} needs what ends a response: no end token "
                "is known, pass eos_token_id or stop_strings"
            )
        self._sampler = Sampler(
            self._policy,
            self.device,
            max_length=config.max_length,
            vocabulary_size=self._vocabulary_size,
            rollout=rollout,
            rules=self._ends,
            pad_token_id=pad_token_id,
        )

    def _reference_of(self, model: nn.Module | str | None) -> ReferenceModel | None:
        """Returns the reference that `ref_policy_model` means, and makes it part of the state."""
        if isinstance(model, str) and model not in (COPY, START):
            raise ValueError(f"ref_policy_model must be a model, 'copy' or 'start', got {model!r}")
        if model is None:
            if self.config.target_kl is not None:
                raise ValueError("target_kl needs a reference: pass ref_policy_model")
            return None
        given = None if isinstance(model, str) and model == COPY else model
        reference = ReferenceModel(self._policy, given, self.device)
        self.with_state["reference"] = reference
        return reference

    def get_log_probs(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Returns log p(token t+1 | tokens up to t) under `model`, `(B, S-1)`, differentiable.

        Args:
            model: the policy, the reference or any other model.
            input_ids: `(B, S)`.
            attention_mask: `(B, S)`, 1 = real token; a padded token's log-probability is 0.
        """
        scorer = self._policy if model is self.policy_model else self._policy.of_model(model)
        with self.autocast():
            return scorer.log_probs(input_ids.to(self.device), attention_mask, None)

    def compute_rewards(
        self,
        responses: Tensor,
        response_masks: Tensor | None = None,
        response_token_mask: Tensor | None = None,
        **known: Any,
    ) -> Tensor:
        """Returns the reward model's rewards, `(B,)`, 0 where a row abstains.

        Args:
            responses: `(B, S)`.
            response_masks: `(B, S)`, 1 = real token; None: all are.
            response_token_mask: `(B, S)`, 1 = token of the response; None: all real ones but the
                first are.
            **known: `rows` and `finished`, as `make_sequence_batch`.
        """
        given = {} if response_token_mask is None else {"response_token_mask": response_token_mask}
        return self._rewards_of(self._batch(responses, response_masks, **given, **known)).values

    def _rewards_of(self, batch: SequenceBatch) -> Rewards:
        if self._rewards is None:
            raise ValueError("there are neither rewards nor a reward model: pass one of them")
        return self._rewards(
            batch.input_ids,
            batch.real,
            batch.counted.long(),
            batch.columns.get("rows"),
            batch.columns["finished"],
        )

    def _add_rewards(self, batch: SequenceBatch, rewards: Rewards) -> dict[str, Tensor]:
        """Gives the batch its scores, and what is learned from where a row abstains.

        Returns:
            Shares of what was measured: they add up over the processes.
        """
        columns = batch.columns
        columns["scores"] = rewards.values
        if self.config.cut_responses == "penalty":
            cut = ~columns["finished"]
            columns["scores"] = rewards.values - self.config.cut_penalty * cut
        if rewards.abstains is not None:
            columns["abstains"] = rewards.abstains
            learned = ~rewards.abstains
            columns["learned"] = columns.get("learned", learned) & learned
        return self._measured(batch, rewards)

    def _measured(self, batch: SequenceBatch, rewards: Rewards) -> dict[str, Tensor]:
        """Returns shares of the means over all processes: they add up."""
        every = torch.tensor(batch.rows, dtype=torch.double, device=self.device)
        named = {"": rewards, **{f"_{name}": part for name, part in rewards.parts.items()}}
        answered = [
            every if given.abstains is None else (~given.abstains).sum().double()
            for given in named.values()
        ]
        rows, *counts = self.count_over_processes(torch.stack([every, *answered])).clamp(min=1)
        measured = {
            "cut_share": (~batch.columns["finished"]).sum().double() / rows,
            "response_length": batch.response_tokens.sum().double() / rows,
        }
        for (name, given), own, of_all in zip(named.items(), answered, counts, strict=True):
            measured[f"reward{name}" if name else "mean_reward"] = given.values.sum() / of_all
            measured[f"abstained_share{name}"] = (every - own) / rows
        return measured

    def _batch(
        self, responses: Tensor, response_masks: Tensor | None = None, **tokens: Any
    ) -> SequenceBatch:
        """Returns the checked batch, with the column `finished`, on the trainer's device."""
        sampled, _ = self._remembered
        if sampled is not None and responses is sampled.responses:
            if not tokens.keys() & {"response_token_mask", "prompt_lengths"}:
                tokens["response_token_mask"] = sampled.token_mask
            tokens.setdefault("finished", sampled.finished)
        batch = make_sequence_batch(
            responses,
            response_masks,
            **tokens,
            device=self.device,
            vocabulary_size=self._vocabulary_size,
        )
        columns = batch.columns
        if "finished" not in columns:
            columns["finished"] = self._ends.finished(batch.input_ids, batch.counted)
        if self.config.cut_responses == "mask":
            columns["learned"] = columns["finished"]
        return batch

    def _remember(self, rollout: Rollout, temperature: float) -> None:
        """The tokens of the prompts and the temperature are known where these responses return."""
        self._remembered = rollout, temperature

    def _temperature_of(self, responses: Tensor) -> float:
        sampled, temperature = self._remembered
        known = sampled is not None and responses is sampled.responses
        return temperature if known else self._temperature

    def _sample(
        self, prompts: Tensor, masks: Tensor | None, max_new_tokens: int, copies: int = 1
    ) -> Rollout:
        with self.autocast():
            return self._sampler(prompts, masks, max_new_tokens, self._temperature, copies)

    def _batch_of(
        self, rollout: Rollout, rows: Tensor | Sequence[int] | None, copies: int = 1
    ) -> SequenceBatch:
        """Returns a rollout as a batch; `rows` are of its prompts, each sampled `copies` times."""
        known: dict[str, Any] = {"finished": rollout.finished}
        if rows is not None:
            known["rows"] = torch.as_tensor(rows).repeat_interleave(copies)
        return self._batch(
            rollout.responses,
            rollout.response_masks,
            response_token_mask=rollout.token_mask,
            **known,
        )

    def _score(
        self, batch: SequenceBatch, how: Scoring, *, compared: bool
    ) -> tuple[TokenScores, Tensor | None]:
        """Scores the responses; if `compared`, the reference's log-probabilities too."""

        def policy() -> TokenScores:
            return self._policy.score(*batch.sequences(), how=how)

        if not compared:
            return policy(), None
        reference = self._reference
        assert reference is not None
        return reference.beside(policy, lambda: reference(*batch.sequences(), how.temperature))

    @torch.no_grad()
    def eval_step(
        self,
        prompts: Tensor,
        prompt_masks: Tensor | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        *,
        rows: Tensor | Sequence[int] | None = None,
    ) -> dict[str, float]:
        """Returns what responses to the prompts of all processes are worth, in evaluation mode.

        Args:
            prompts: `(B, P)`; padding may be on either side.
            prompt_masks: `(B, P)`, 1 = real token; None: all are.
            max_new_tokens: instead of the configuration's.
            temperature: of the distribution; 0: always the likeliest token.
            rows: `(B,)`, the positions of the prompts among the rows of the data, for rewards that
                read them.

        Returns:
            `mean_reward` of the responses that have a reward and `abstained_share` of those that
            have none (the same of each function where several are added, as `reward_…` and
            `abstained_share_…`), `cut_share`, `response_length` in tokens and, where there is a
            reference, `sequence_kl`: log policy - log reference of the response, in nats.
        """
        room = self.config.max_new_tokens if max_new_tokens is None else max_new_tokens
        with self.autocast():
            rollout = self._sampler(prompts, prompt_masks, room, temperature)
        batch = self._batch_of(rollout, rows)
        measured = self._measured(batch, self._rewards_of(batch))
        if self._reference is not None:
            scored = self._score_in_parts(batch, batch.rows)
            differences = kl_penalty(scored["old_logps"], scored["ref_logps"], "k1")
            measured["sequence_kl"] = differences.sum() / self.count_over_processes(batch.rows)
        return read_numbers(measured, self._data_parallel_groups)

    @torch.no_grad()
    def _score_in_parts(
        self, batch: SequenceBatch, rows: int, temperature: float | None = None
    ) -> dict[str, Tensor]:
        """Gives the batch old_logps, old_values and ref_logps, `rows` rows at once."""
        at = self._temperature if temperature is None else temperature
        how = Scoring(at, value_head=self.value_head)
        found: dict[str, list[Tensor]] = {"old_logps": [], "old_values": [], "ref_logps": []}
        with evaluating(self.policy_model), self.autocast():
            for part in batch.chunk(-(-batch.rows // rows)):
                scores, ref_logps = self._score(part, how, compared=self._reference is not None)
                found["old_logps"].append(scores.logps)
                if scores.values is not None:
                    found["old_values"].append(scores.values)
                if ref_logps is not None:
                    found["ref_logps"].append(ref_logps)
        batch.columns.update({name: torch.cat(parts) for name, parts in found.items() if parts})
        return batch.columns
