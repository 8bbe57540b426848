"""Responses sampled from a policy: with a KV cache where its model offers one, else without."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from ..scoring.devices import evaluating
from ..scoring.model_access import FSDPModule, base_model, has_adapter, without_wrapper
from ..scoring.next_token import NextTokenScorer
from .batch_checks import check_real_rows, check_vocabulary, checked_ids, checked_mask
from .response_end import FoundEnds, StopRules, read_end_tokens

TABLES_OF_POSITIONS = ("wpe", "position_embeddings", "position_embedding", "embed_positions")


@dataclass
class Rollout:
    """The sampled responses.

    Attributes:
        responses: `(N, S)`, prompt and response of each.
        response_masks: `(N, S)`, 1 = real token.
        token_mask: `(N, S)`, 1 = token of the response, its end token included.
        logps: `(N, S-1)`, log-probabilities where they were sampled, or None.
        finished: `(N,)`, whether the response ended by itself; False: it was cut. None: not known.
    """

    responses: Tensor
    response_masks: Tensor
    token_mask: Tensor
    logps: Tensor | None = None
    finished: Tensor | None = None


class Sampler:
    """Samples responses of a policy, or has a `rollout` callable do it.

    Args:
        policy: the scorer of the policy.
        device: where the prompts are moved.
        max_length: of prompt and response together, in tokens; None: unlimited. A model that has a
            table of its positions is never asked beyond it.
        vocabulary_size: of the policy, or None.
        rollout: called as `rollout(prompts, prompt_masks, max_new_tokens, temperature)` with
            left-padded prompts; returns a `Rollout`, its fields as a mapping or as a tuple (a
            server's answer, say; `logps` and `finished` may be left out).
        rules: what ends a response.
        pad_token_id: what follows an end.
    """

    def __init__(
        self,
        policy: NextTokenScorer,
        device: torch.device,
        *,
        max_length: int | None = None,
        vocabulary_size: int | None = None,
        rollout: Callable[..., Any] | None = None,
        rules: StopRules | None = None,
        pad_token_id: int = 0,
    ) -> None:
        if rollout is not None and not callable(rollout):
            raise TypeError(f"rollout must be callable, got {type(rollout).__name__}")
        self._policy = policy
        self._device = device
        self._max_length = max_length
        self._vocabulary_size = vocabulary_size
        self._rollout = rollout
        self.rules = StopRules(read_end_tokens(policy.model)) if rules is None else rules
        self._pad = pad_token_id
        self._positions = _positions_of(policy.model)
        config = getattr(base_model(policy.model), "config", None)
        most = getattr(config, "max_position_embeddings", 0)
        self._most_positions = most if isinstance(most, int) else 0

    @torch.no_grad()
    def __call__(
        self,
        prompts: Tensor,
        prompt_masks: Tensor | None,
        max_new_tokens: int,
        temperature: float = 1.0,
        copies: int = 1,
    ) -> Rollout:
        """Returns `copies` responses to each prompt, one after the other.

        Args:
            prompts: `(B, P)`; padding may be on either side.
            prompt_masks: `(B, P)`, 1 = real token; None: all are.
            max_new_tokens: of a response.
            temperature: of the distribution; 0: always the likeliest token.
            copies: responses a prompt.
        """
        ids, mask = self._left_padded(prompts, prompt_masks)
        ids, mask = ids.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        rooms = self._rooms(mask, max_new_tokens)
        if self._rollout is not None:
            room = int(rooms.min())
            return self._read(self._rollout(ids, mask, room, temperature), len(ids))
        room = int(rooms.max())
        model = self._policy.model
        generator = _generator(model)
        ends = FoundEnds(self.rules, len(ids), ids.device)
        with evaluating(model):
            if generator is not None:
                new = self._generate(generator, ids, mask, room, temperature, ends)
            else:
                new = self._without_cache(ids, mask, room, temperature, ends)
        lengths, finished = ends.lengths(new, rooms.squeeze(1))
        new = new[:, : int(lengths.max())]
        real = torch.arange(new.shape[1], device=new.device) < lengths.unsqueeze(1)
        return Rollout(
            torch.cat([ids, new.masked_fill(~real, self._pad)], 1),
            torch.cat([mask, real.long()], 1),
            torch.cat([torch.zeros_like(mask), real.long()], 1),
            finished=finished,
        )

    def _left_padded(self, prompts: Tensor, prompt_masks: Tensor | None) -> tuple[Tensor, Tensor]:
        ids = checked_ids("prompts", prompts, self._device)
        mask = checked_mask("prompt_masks", prompt_masks, ids)
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        check_real_rows("prompt_masks", mask.cpu())  # sampling waits for the device anyway
        longest = int(mask.sum(-1).max())
        limit, whose = self._limit()
        if limit is not None and longest >= limit:
            raise ValueError(
                f"a prompt has {longest} tokens, no room for a response within {whose}"
            )
        order = mask.long().argsort(dim=-1, stable=True)[:, -longest:]
        mask = mask.gather(1, order)
        ids = ids.gather(1, order).masked_fill(~mask, self._pad)
        check_vocabulary("prompts", ids.masked_fill(~mask, 0), self._vocabulary_size)
        return ids, mask.long()

    def _rooms(self, mask: Tensor, max_new_tokens: int) -> Tensor:
        """How many tokens each response may have, `(B, 1)`: a long prompt shortens its own alone.

        All rows are sampled as far as the longest goes; those that have ended must not come to
        positions that the model does not have: where its number of them is not known for sure, all
        end where the longest must.
        """
        lengths = mask.sum(-1, keepdim=True)
        rooms = torch.full_like(lengths, max_new_tokens)
        limit, _ = self._limit()
        if limit is None:
            return rooms
        rooms = rooms.clamp(max=limit - lengths)
        known = self._most_positions if self._policy.takes_positions else 0
        return rooms.clamp(max=max(known, limit) - int(lengths.max()))

    def _limit(self) -> tuple[int | None, str]:
        """Returns how many tokens prompt and response may have, and what says so."""
        if self._max_length is None and self._positions is None:
            return None, ""
        if self._positions is None or (self._max_length or math.inf) <= self._positions:
            return self._max_length, f"max_length={self._max_length}"
        return self._positions, f"the model's {self._positions} positions"

    def _generate(
        self, generator: Any, ids: Tensor, mask: Tensor, room: int, temperature: float,
        ends: FoundEnds,
    ) -> Tensor:  # fmt: skip
        from transformers import GenerationConfig, StoppingCriteriaList

        settings = GenerationConfig(  # the policy's own distribution: nothing cut
            max_new_tokens=room,
            do_sample=temperature > 0,
            **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
            eos_token_id=self.rules.tokens or None,
            pad_token_id=self._pad,
            use_cache=True,
        )
        width = ids.shape[1]
        stop = lambda ids, scores, **more: ends.stopped_by_text(ids[:, width:])  # noqa: E731
        more = {"synced_gpus": True} if isinstance(self._policy.model, FSDPModule) else {}
        if self.rules.strings:
            more["stopping_criteria"] = StoppingCriteriaList([stop])
        with _generation_config(generator, settings):
            output = generator.generate(
                input_ids=ids, attention_mask=mask, generation_config=settings, **more
            )
        return output[:, width:]

    def _without_cache(
        self, ids: Tensor, mask: Tensor, room: int, temperature: float, ends: FoundEnds
    ) -> Tensor:
        width = ids.shape[1]
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        sharded = isinstance(self._policy.model, FSDPModule)  # then all make the same calls
        for _ in range(room):
            logits = self._policy.next_logits(ids, mask)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if temperature > 0:
                token = Categorical(logits=logits / temperature).sample()
            else:
                token = logits.argmax(-1)
            ids = torch.cat([ids, token.unsqueeze(1)], 1)
            mask = torch.cat([mask, (~ended).long().unsqueeze(1)], 1)
            ended = ended | self.rules.is_end(token) | ends.stopped_by_text(ids[:, width:])
            if not sharded and bool(ended.all()):
                break
        return ids[:, width:]

    def _read(self, result: Any, rows: int) -> Rollout:
        if isinstance(result, Mapping):
            result = Rollout(**result)
        elif isinstance(result, (tuple, list)):
            result = Rollout(*result)
        if not isinstance(result, Rollout):
            raise TypeError(
                "rollout must return a Rollout, a mapping or a tuple of responses, response_masks, "
                f"token_mask and maybe logps and finished, got {type(result).__name__}"
            )
        ids = checked_ids("the rollout's responses", result.responses, self._device)
        if len(ids) != rows:
            raise ValueError(f"the rollout must answer {rows} prompts, got {len(ids)} responses")
        masks: list[Any] = [
            checked_mask(f"the rollout's {name}", mask, ids)
            for name, mask in (
                ("response_masks", result.response_masks), ("token_mask", result.token_mask),
            )
        ]  # fmt: skip
        real, tokens = (mask.long() for mask in masks)
        finished = result.finished
        if finished is not None:
            finished = torch.as_tensor(finished).to(self._device) != 0
            if finished.shape != (rows,):
                raise ValueError(
                    f"the rollout's finished must be ({rows},), got {tuple(finished.shape)}"
                )
        return Rollout(ids, real, tokens, result.logps, finished)


def _positions_of(model: nn.Module) -> int | None:
    """Returns how many positions a model has a table of; None: it computes them, for any length."""
    inner = base_model(model)
    config = getattr(inner, "config", None)
    nested = getattr(config, "get_text_config", None)
    known = getattr(nested() if callable(nested) else config, "max_position_embeddings", None)
    parts = {name for name, part in inner.named_modules() if isinstance(part, nn.Embedding)}
    tables = {*parts, *(name for name, _ in inner.named_buffers())}
    has_table = any(name.endswith(TABLES_OF_POSITIONS) for name in tables)
    return known if has_table and isinstance(known, int) and known > 0 else None


def _generator(model: nn.Module) -> Any:
    """Returns whose `generate` samples with a KV cache; None where there is none."""
    inner = base_model(model)
    if not (callable(getattr(inner, "generate", None)) and hasattr(inner, "generation_config")):
        return None
    adapted = without_wrapper(model)
    adapters = adapted.peft_config.values() if has_adapter(model) else ()
    learned_prompt = any(getattr(a, "is_prompt_learning", False) for a in adapters)
    return adapted if learned_prompt else inner


@contextmanager
def _generation_config(generator: nn.Module, settings: Any) -> Iterator[None]:
    """The model's own settings would fill in what `settings` leaves open: a penalty, a cut."""
    owner = base_model(generator)
    own, owner.generation_config = owner.generation_config, settings
    try:
        yield
    finally:
        owner.generation_config = own
