"""linear_policy_loss in Triton: the kernels of its parts, with the gradients formed in one call.

Products, in units of tokens that count x D x V multiply-adds (the number needed in brackets): loss
alone 1 [1]; with grad_hidden 3 [2]; with both gradients 4 [3]: the logits are computed again, for
keeping them would take the memory that this operation is there to save. Otherwise as
`linear_token_logprobs` and `policy_loss`.
"""

from apt_kernels.triton.head.linear_token_logprobs import (
    linear_token_logprobs_bwd,
    linear_token_logprobs_fwd,
)
from apt_kernels.triton.policy.policy_loss import policy_loss_fwd


def linear_policy_loss_fwd(
    upstream, hidden, weight, bias, token_ids, mask, temperature_tensor, old_logps, advantages,
    rollout_weights, ref_logps, normalizer, temperature, softcap, logit_scale, loss_type,
    ratio_level, kl_estimator, aggregation, clip_low, clip_high, dual_clip, sapo_temperature_pos,
    sapo_temperature_neg, kl_coef, entropy_coef, need_hidden, need_weight, need_bias,
):  # fmt: skip
    """(loss, metrics (7,), grad_hidden, grad_weight, grad_bias); gradients (0,) if not needed.

    The gradients are of upstream * loss, in the dtypes of their inputs.
    """
    inputs = (hidden, weight, bias, token_ids, mask.reshape(-1), temperature_tensor)
    head = (temperature, softcap, logit_scale)
    needed = (need_hidden, need_weight, need_bias)
    need_entropy = entropy_coef != 0 and any(needed)
    logps, entropy, lse, _ = linear_token_logprobs_fwd(*inputs, *head, True, False)
    loss, metrics, grad_logps, grad_entropy, factors = policy_loss_fwd(
        logps.view(mask.shape), old_logps, advantages, mask, rollout_weights, ref_logps,
        entropy.view(mask.shape), normalizer, loss_type, ratio_level, kl_estimator, aggregation,
        clip_low, clip_high, dual_clip, sapo_temperature_pos, sapo_temperature_neg, kl_coef,
        entropy_coef, need_entropy,
    )  # fmt: skip
    if not any(needed):
        return loss, metrics, *(hidden.new_empty(0) for _ in range(3))
    if upstream is not None:
        factors = factors * upstream
    grads = linear_token_logprobs_bwd(
        (grad_logps * factors).view(-1),
        (grad_entropy * factors).view(-1) if need_entropy else None,
        *inputs, lse, entropy, *head, *needed,
    )  # fmt: skip
    return loss, metrics, *grads
