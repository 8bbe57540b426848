"""Liger's chunked losses from hidden states under their own names. Nothing of Liger is imported.

Liger takes the weight in another order in the two classes, and so do these.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checks
from ..codes import DPO_LOSS_TYPES
from ..ops.logprobs.linear_token_logprobs import linear_token_logprobs
from ..ops.logprobs.sequence_logps import sequence_logps
from ..ops.policy.linear_policy_loss import linear_policy_loss
from ..ops.preference.dpo_loss import dpo_loss

# Liger's loss type -> ours, and our aggregation
GRPO_LOSS_TYPES = {
    "grpo": ("clip", "sequence_mean"),
    "bnpo": ("clip", "token_mean"),
    "dr_grpo": ("clip", "token_sum"),
    "dapo": ("clip", "token_mean"),
    "cispo": ("cispo", "token_mean"),
    "sapo": ("sapo", "sequence_mean"),
}


class LigerFusedLinearDPOLoss(nn.Module):
    """`dpo_loss` of hidden states: the first half of the rows is chosen, the second rejected.

    Args:
        ignore_index: the target of positions that do not count.
        beta: temperature of the DPO loss.
        alpha: weight of the mean -log p of the chosen tokens, with `compute_nll_loss`.
        compute_nll_loss: add that term.
        compiled: not used; the kernels are compiled.
        use_ref_model: compare with a reference; `forward` then takes its hidden states.
        average_log_prob: the mean of a row's log-probabilities instead of the sum.
        chunk_size: not used; tiles of logits have a size of their own.
        loss_type: a loss of `dpo_loss`.
        label_smoothing: counts for every loss that has a smoothed form, also where Liger ignores it
            ("sigmoid").
        discopop_tau: temperature of "discopop".
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        served = tuple(name for name in DPO_LOSS_TYPES if name not in ("ipo", "simpo", "orpo"))
        checks.choice("loss_type", loss_type, served)
        self.ignore_index, self.alpha, self.compute_nll_loss = ignore_index, alpha, compute_nll_loss
        self.use_ref_model, self.average_log_prob = use_ref_model, average_log_prob
        self.options: dict[str, Any] = {
            "beta": beta,
            "loss_type": loss_type,
            "label_smoothing": label_smoothing,
        }
        if loss_type == "discopop":
            self.options["discopop_tau"] = discopop_tau

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and what Liger returns with it.

        Args:
            lin_weight: `(V, D)`, differentiable.
            _input: `(2 B, T, D)` hidden states, differentiable.
            target: `(2 B, T)` integers in [0, V), or `ignore_index`.
            bias: `(V,)`, differentiable.
            ref_input: `(2 B, T, D)`, of the reference.
            ref_weight: `(V, D)`.
            ref_bias: `(V,)`.

        Returns:
            `(loss, (chosen_logps, rejected_logps, mean of the chosen logits, of the rejected
            logits, nll_loss, chosen_rewards, rejected_rewards))`.
        """
        mask = target != self.ignore_index
        ids = torch.where(mask, target, 0)
        logps = linear_token_logprobs(_input, lin_weight, ids, bias=bias, mask=mask)
        sums = sequence_logps(logps, mask, average=self.average_log_prob)
        chosen, rejected = sums.chunk(2)
        references: tuple[Tensor | None, ...] = (None, None)
        if self.use_ref_model:
            if ref_input is None or ref_weight is None:
                missing = "ref_input" if ref_input is None else "ref_weight"
                raise ValueError(f"{missing}: expected a tensor with use_ref_model, got None")
            with torch.no_grad():
                of_ref = linear_token_logprobs(ref_input, ref_weight, ids, bias=ref_bias, mask=mask)
                references = sequence_logps(of_ref, mask, average=self.average_log_prob).chunk(2)
        options: dict[str, Any] = {"reference_free": not self.use_ref_model, **self.options}
        ref_chosen, ref_rejected = references
        loss, *rewards = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, **options)
        nll = loss.new_zeros(())
        if self.compute_nll_loss:
            count = mask[: len(mask) // 2].sum().clamp(min=1)
            nll = -logps[: len(mask) // 2].sum() / count
            loss = loss + self.alpha * nll
        means = (_mean_logit(x, lin_weight, bias) for x in _input.detach().chunk(2))
        return loss, (chosen, rejected, *means, nll, *rewards)


class LigerFusedLinearGRPOLoss(nn.Module):
    """`linear_policy_loss` by the name of Liger's class.

    Args:
        beta: weight of the KL term.
        compiled: not used; the kernels are compiled.
        use_ref_model: take the reference's log-probabilities from `ref_input` where
            `ref_per_token_logps` is not given. Else the policy is then its own reference.
        chunk_size: not used; tiles of logits have a size of their own.
        epsilon_low: how far below 1 the ratio may fall.
        epsilon_high: how far above 1 it may rise. In "cispo" it is the bound itself, from 1 on;
            `linear_policy_loss` has 1 + clip_high there.
        loss_type: one of `GRPO_LOSS_TYPES`. "luspo" and "vespo" are not served.
        max_completion_length: the tokens that "dr_grpo" divides a row by.
        importance_sampling_level: "token", or "sequence" for GSPO.
        sapo_temperature_pos: of "sapo" where the advantage is positive.
        sapo_temperature_neg: of "sapo" elsewhere.
        temperature: the logits are divided by it.
        delta: a bound of the ratio above 1 + epsilon_high (INTELLECT-2), or None.
        use_bias_correction_kl: multiply the KL term by the ratio of its token.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
    ) -> None:
        super().__init__()
        checks.choice("loss_type", loss_type, tuple(GRPO_LOSS_TYPES))
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("max_completion_length: expected a number with dr_grpo, got None")
        if use_bias_correction_kl and importance_sampling_level != "token":
            raise ValueError(
                "use_bias_correction_kl: expected False with ratios of sequences, got True"
            )
        ours, aggregation = GRPO_LOSS_TYPES[loss_type]
        self.beta, self.use_ref_model, self.loss_type = beta, use_ref_model, loss_type
        self.max_completion_length = max_completion_length
        self.options: dict[str, Any] = {
            "loss_type": ours,
            "aggregation": aggregation,
            "ratio_level": importance_sampling_level,
            "temperature": temperature,
            "kl_estimator": "unbiased_k3" if use_bias_correction_kl else "k3",
        }
        if ours == "clip":
            if delta is not None and delta < 1 + epsilon_high:
                raise ValueError(f"delta: expected at least 1 + epsilon_high or None, got {delta}")
            self.options |= {"clip_low": epsilon_low, "clip_high": epsilon_high}
            self.options["dual_clip"] = delta
        elif ours == "cispo":
            if epsilon_high < 1:
                raise ValueError(
                    f"epsilon_high: expected the bound of cispo's ratio, from 1 on, got "
                    f"{epsilon_high}"
                )
            self.options |= {"clip_low": 1.0, "clip_high": epsilon_high - 1}
        else:
            self.options["sapo_temperature_pos"] = sapo_temperature_pos
            self.options["sapo_temperature_neg"] = sapo_temperature_neg

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and its metrics.

        Args:
            _input: `(B, T, D)` hidden states, differentiable.
            lin_weight: `(V, D)`, differentiable.
            selected_token_ids: `(B, T)` integers in [0, V).
            attention_mask: `(B, T)`, 1 = token that counts.
            advantages: `(B,)`.
            bias: `(V,)`, differentiable.
            ref_per_token_logps: `(B, T)`, of the reference.
            old_per_token_logps: `(B, T)`, at sampling time; None: the policy's own.
            ref_input: `(B, T, D)`, of the reference.
            ref_weight: `(V, D)`.
            ref_bias: `(V,)`.
            vllm_is_ratio: `(B, T)` or `(B, 1)`, factors of the tokens' losses.
            num_items_in_batch: tokens of all processes and steps, for "dapo" and "cispo".

        Returns:
            `(loss, (mean KL where beta is not 0, share of clipped tokens))`. In "cispo" the share
            counts tokens of either sign of the advantage; Liger counts positive ones.
        """
        mask = attention_mask.bool()
        kl_coef = self.beta
        if kl_coef and ref_per_token_logps is None:
            if not self.use_ref_model:
                kl_coef = 0.0  # the policy is its own reference: no divergence, no gradient
            elif ref_input is None or ref_weight is None:
                raise ValueError(
                    "ref_per_token_logps: expected a tensor, or ref_input and ref_weight, with "
                    "use_ref_model, got None"
                )
            else:
                temperature: Any = self.options["temperature"]
                with torch.no_grad():
                    ref_per_token_logps = linear_token_logprobs(
                        ref_input,
                        ref_weight,
                        selected_token_ids,
                        bias=ref_bias,
                        mask=mask,
                        temperature=temperature,
                    )
        if vllm_is_ratio is not None:
            vllm_is_ratio = vllm_is_ratio.expand(mask.shape)
        loss, metrics = linear_policy_loss(
            _input,
            lin_weight,
            selected_token_ids,
            old_per_token_logps,
            advantages,
            mask,
            bias=bias,
            ref_logps=ref_per_token_logps if kl_coef else None,
            kl_coef=kl_coef,
            rollout_weights=vllm_is_ratio,
            normalizer=self._normalizer(mask, num_items_in_batch),
            **self.options,
        )
        clipped = (metrics["clip_fraction"],)
        return loss, ((metrics["ref_kl"],) if self.beta else ()) + clipped

    def _normalizer(
        self, mask: Tensor, num_items_in_batch: float | Tensor | None
    ) -> float | Tensor | None:
        """Returns what the sum is divided by; None: the tokens of this batch."""
        if self.loss_type in ("grpo", "sapo"):
            return float(len(mask))
        if self.loss_type == "dr_grpo":
            return float(len(mask)) * float(self.max_completion_length or 0)
        if self.loss_type == "bnpo":
            return None
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if num_items_in_batch is None:
            if world == 1:
                return None
            num_items_in_batch = mask.sum().float()
            dist.all_reduce(num_items_in_batch)
        return torch.as_tensor(num_items_in_batch, dtype=torch.float32).clamp(min=world) / world


@torch.no_grad()
def _mean_logit(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns the mean of all logits: that of the mean hidden state with the mean row."""
    mean = hidden.float().mean((0, 1)) @ weight.float().mean(0)
    return mean if bias is None else mean + bias.float().mean()
