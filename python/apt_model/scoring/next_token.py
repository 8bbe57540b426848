"""Log-probabilities of the next tokens under any causal model, without its logits where possible.

A model that exposes its output embedding (`get_output_embeddings()`, an `nn.Linear`) is called with
that layer's forward replaced: it scores the hidden states it is given by
`apt_kernels.linear_token_logprobs`, so the logits never exist. The model's own forward runs
otherwise unchanged, and so do the hooks of DDP, FSDP2 and adapters around it.

Some models scale or cap their logits (Gemma's soft cap, Cohere's and Granite's scale). The scale
and the cap are not looked up by name. They are measured: on the first call the layer answers with
known numbers, and the logits of the model tell both. Both ways are then compared on the first
tokens of the first batch; a model whose two answers differ (an adapter or a hook on the head,
columns that are cut or masked) is scored from its logits, with one warning that says why.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_kernels import linear_token_logprobs, token_logprobs

from .expert_balance import ExpertBalance
from .hidden_states import Positions
from .model_access import (
    FSDPModule,
    as_autocast,
    base_model,
    input_embedding,
    logits_of,
    without_wrapper,
)
from .output_head import LOGPS_ONLY, OutputHead, Scoring, TokenScores

PROBED_TOKENS = 8
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # of the largest logit; float32 may be TF32
HALF_TOLERANCE = 0.03  # four roundings of a bfloat16 logit


class NextTokenScorer:
    """Scores the tokens of a batch under one model.

    Args:
        model: takes `(input_ids, attention_mask=…)`, returns logits `(B, S, V)`.
        use_hidden_states: False: always from the logits.
        backend: of the kernels.
        router_aux_loss_coef: of a mixture of experts, see `ExpertBalance`.
    """

    def __init__(
        self,
        model: nn.Module,
        use_hidden_states: bool = True,
        backend: str | None = None,
        router_aux_loss_coef: float | None = None,
    ) -> None:
        self.model = model
        self.backend = backend
        self._wants_hidden_states = use_hidden_states
        self.vocabulary_size: int | None = None  # known after the first call
        inner = base_model(model)
        accepted = inspect.signature(inner.forward).parameters
        self._positions = Positions(model)
        self._balance = ExpertBalance(model, router_aux_loss_coef)
        self._options = {"use_cache": False} if "use_cache" in accepted else {}
        self._head = self._find_head(inner) if use_hidden_states else None
        self._head_is_checked = False

    def _find_head(self, inner: nn.Module) -> OutputHead | None:
        getter = getattr(inner, "get_output_embeddings", None)
        if not callable(getter) or hasattr(self.model, "_orig_mod"):
            return None
        layer = getter()
        if layer is None:
            return None
        head = OutputHead(layer)
        if not head.is_unchanged():
            self._warn(f"its output embedding is a {type(layer).__name__}, not a plain nn.Linear")
            return None
        return head

    def of_model(self, model: nn.Module) -> NextTokenScorer:
        """Returns a scorer of `model` with the same options."""
        return NextTokenScorer(model, self._wants_hidden_states, self.backend)

    @property
    def takes_positions(self) -> bool:
        """Whether the model is told the positions of its tokens."""
        return self._positions.are_told

    @property
    def uses_hidden_states(self) -> bool:
        """Whether the logits are never formed (after the first call: checked)."""
        return self._head is not None

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Returns log p(token t+1 | tokens up to t), `(B, S-1)`, 0 where `mask` is false.

        Args:
            input_ids: `(B, S)`.
            attention_mask: `(B, S)`, 1 = real token; None: all are. Positions count real tokens.
            mask: `(B, S)`, bool: the tokens to score; None: all but the first.
            token_ids: `(B, S)`: the tokens to score instead of `input_ids`.
            temperature: the logits are divided by it.
        """
        how = Scoring(temperature)
        return self.score(input_ids, attention_mask, mask, token_ids, how).logps

    def score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        how: Scoring = LOGPS_ONLY,
    ) -> TokenScores:
        """Returns log-probabilities and, of the same pass, entropies and values; see `__call__`."""
        token_ids = input_ids if token_ids is None else token_ids
        if self._head is not None and not self._head_is_checked and input_ids.shape[1] > 1:
            self._check_head(input_ids[:1, :PROBED_TOKENS])
        score = self._from_logits if self._head is None else self._from_hidden
        with self._balance.listening(attention_mask) as losses:
            scores = score(input_ids, attention_mask, mask, token_ids, how)
        scores.balance = losses[0] if losses else None
        return scores

    def next_logits(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Returns the logits `(B, V)` after the last column, so padding must be on the left."""
        return self._call(self.model, input_ids, attention_mask)[:, -1]

    def log_probs(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        """Returns the same for real tokens after real ones, of `labels` where given (-100: 0)."""
        real = None if attention_mask is None else attention_mask.to(input_ids.device)
        mask = None if real is None else (real != 0) & F.pad(real[:, :-1] != 0, (1, 0))
        if labels is not None:
            labels = labels.to(input_ids.device)
            mask = labels != -100 if mask is None else mask & (labels != -100)
        return self(input_ids, real, mask, labels)

    def _call(self, model: nn.Module, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        ids, positions = self._positions(ids, attention_mask)
        output = model(ids, attention_mask=attention_mask, **self._options, **positions)
        return logits_of(output)[:, -ids.shape[1] :]  # a learned prompt stands in front

    def _from_logits(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        mask: Tensor | None,
        token_ids: Tensor,
        how: Scoring,
    ) -> TokenScores:
        valued: list[Tensor] = []
        source = how.value_source
        hook = source and source.register_forward_pre_hook(lambda _, args: valued.append(args[0]))
        try:
            logits = self._call(self.model, ids, attention_mask)
        finally:
            if hook:
                hook.remove()
        self.vocabulary_size = logits.shape[-1]
        results: Any = token_logprobs(
            logits[:, :-1],
            token_ids[:, 1:],
            temperature=how.temperature,
            mask=None if mask is None else mask[:, 1:],
            return_entropy=how.entropy,
            backend=self.backend,
        )
        logps, entropy = results if how.entropy else (results, None)
        hidden = (valued[0] if valued else logits)[:, -ids.shape[1] :]
        return TokenScores(logps, entropy, how.values(hidden))

    def _from_hidden(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        mask: Tensor | None,
        token_ids: Tensor,
        how: Scoring,
    ) -> TokenScores:
        # Targets are shifted, not the hidden states: a slice of those would be one more copy
        targets = torch.cat([token_ids[:, 1:], token_ids.new_zeros(len(ids), 1)], dim=1)
        scored = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        scored = torch.cat([scored[:, 1:], scored.new_zeros(len(ids), 1)], dim=1)
        head = self._head
        assert head is not None
        found: list[TokenScores] = []

        def score(hidden: Tensor) -> Tensor:
            hidden = hidden[:, -targets.shape[1] :]
            weight = head.layer.weight if tied is None else tied
            narrowed, weight, bias = as_autocast(hidden, weight, head.layer.bias)
            results: Any = linear_token_logprobs(
                narrowed,
                weight,
                targets,
                bias=bias,
                temperature=how.temperature,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
                mask=scored,
                return_entropy=how.entropy,
                backend=self.backend,
            )
            logps, entropy = results if how.entropy else (results, None)
            entropy = None if entropy is None else entropy[:, :-1]
            found.append(TokenScores(logps, entropy, how.values(hidden)))
            return logps.unsqueeze(-1).clone()  # FSDP2 hooks no views

        with head.adding_rows(input_embedding(self.model)) as tied, head.answering(score):
            output = self._call(self.model, ids, attention_mask)
        if len(found) != 1:
            raise ValueError(f"its output embedding ran {len(found)} times in one forward pass")
        scores = found[0]
        if self.model is not without_wrapper(self.model) or isinstance(self.model, FSDPModule):
            # Their backward hooks sit on the model's output: it must be part of the graph
            scores.logps = scores.logps + 0 * output.squeeze(-1)
        self.vocabulary_size = head.layer.weight.shape[0]
        scores.logps = scores.logps[:, :-1]
        return scores

    @torch.no_grad()
    def _check_head(self, ids: Tensor) -> None:
        """Finds the scale and cap of the logits; gives up a head that cannot be trusted."""
        self._head_is_checked = True
        head = self._head
        assert head is not None
        with head.answers() as answers:
            logits = self._same_random_state(ids, lambda: self._call(self.model, ids, None))
        expected = token_logprobs(logits[:, :-1], ids[:, 1:], backend=self.backend)
        try:
            call = partial(self._call, self.model, ids, None)
            head.probe(lambda: self._same_random_state(ids, call), ids.device)
            score = partial(self._from_hidden, ids, None, None, ids, Scoring())
            logps = self._same_random_state(ids, lambda: score().logps)
        except Exception as error:
            return self._give_up(f"its head cannot be replaced: {type(error).__name__}: {error}")
        dtype = head.layer.weight.dtype
        if torch.is_autocast_enabled(ids.device.type):
            dtype = torch.get_autocast_dtype(ids.device.type)
        if logits.shape[-1] != self.vocabulary_size:
            return self._give_up(
                f"it makes {logits.shape[-1]} logits from {self.vocabulary_size} embedding rows"
            )
        own = head.finished(answers[-1])[:, -ids.shape[1] :]
        largest = own.masked_fill(~own.isfinite(), 0).abs().max().clamp(min=1)
        close: dict[str, Any] = {"rtol": 0, "equal_nan": True}
        close["atol"] = TOLERANCE.get(dtype, HALF_TOLERANCE) * float(largest)
        if not torch.allclose(own.to(logits.dtype), logits, **close):
            self._give_up("it changes some of its logits")
        elif not torch.allclose(logps, expected, **close):
            self._give_up("the log-probabilities of its hidden states differ from its logits'")

    def _same_random_state(self, ids: Tensor, call: Callable[[], Tensor]) -> Tensor:
        """Returns `call()` and leaves the random state as it was, so dropout is alike each time."""
        with torch.random.fork_rng([ids.device] if ids.is_cuda else []):
            return call()

    def _give_up(self, reason: str) -> None:
        self._head = None
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        name = type(base_model(self.model)).__name__
        warnings.warn(f"{name} is scored from its logits: {reason}", stacklevel=2)
