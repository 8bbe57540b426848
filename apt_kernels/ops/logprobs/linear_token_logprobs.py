"""Log-probabilities of tokens from hidden states, without the logits."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ... import checks, dispatch, reference
from ..common.autocast import as_autocast
from ..common.head import BACKWARD, FORWARD, check_head, check_tokens, head_logprobs

dispatch.register("linear_token_logprobs", FORWARD, BACKWARD)


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[False] = False,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: Tensor | None = ...,
    return_entropy: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of the logits logit_scale * (hidden @ weight^T + bias), which never exist.

    Tiles of logits are made, used and dropped; rows that the mask leaves out cost no product. M
    rows that count cost 2 M D V flops forward. Backward computes the logits again: 8 M D V in all,
    where an implementation that keeps the logits needs 6 M D V. With a frozen head (neither
    `weight` nor `bias` requires grad) and without the entropy the gradient is formed in the forward
    pass, 4 M D V in all. The weight's gradient is summed in float32. Workspace: a few MiB a thread.
    Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"; Wijmans 2024,
    "Cut your losses in large-vocabulary language models".

    Args:
        hidden: `(..., D)` float32, bfloat16, float16 or float64; any strides; differentiable.
        weight: `(V, D)`, the output embedding, differentiable. Where the dtypes of hidden states,
            weight and bias differ, all are converted to the widest. Under autocast they are
            converted to its dtype, as `F.linear` does; sums are float32 all the same.
        token_ids: `(...)` integers in [0, V).
        bias: `(V,)` or None, differentiable. A column of -inf is excluded from the vocabulary.
        temperature: a number above 0, or a tensor `(...)` of one per row (no gradient).
        softcap: bound of the tanh soft cap (Gemma 2), applied after `logit_scale`, or None.
        logit_scale: a factor of the logits, above 0 (Cohere, Granite).
        mask: `(...)`, True counts. Other rows may hold anything, and so may their ids: they are
            not read, their results are 0 and their gradients exactly 0.
        return_entropy: also return the entropy of softmax(z), `(...)`, in nats, differentiable.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        The log-probabilities in nats, `(...)` float32 (float64 for float64 inputs); or the pair
        `(logps, entropy)`. No rows: an empty tensor.

    Raises:
        ValueError, TypeError: a wrong argument. An id outside [0, V) or a temperature not above 0,
            in a row that counts, is a ValueError on the CPU; on a GPU the log-probability of such
            an id is NaN, and a tensor of temperatures is not looked at.
    """
    check_head(hidden, weight, bias, softcap, logit_scale)
    check_tokens(hidden, token_ids, temperature, mask)
    checks.flag("return_entropy", return_entropy)
    hidden, weight, bias = as_autocast(hidden, weight, bias)
    backend = dispatch.choose("linear_token_logprobs", hidden.device, backend, hidden.dtype)
    if backend == "reference":
        return reference.linear_token_logprobs(
            hidden,
            weight,
            token_ids,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            mask=mask,
            return_entropy=return_entropy,
        )
    logps, entropy = head_logprobs(
        hidden,
        weight,
        bias,
        token_ids,
        mask=mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        return_entropy=return_entropy,
        backend=backend,
    )
    return (logps, entropy) if return_entropy else logps
