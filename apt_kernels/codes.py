"""The integers that kernels take for the options of operations, said once in Python.

The enumerators of csrc/include/apt and the constants of the Triton kernels have these values; a
test compares them.
"""

from __future__ import annotations

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

# dpo_loss: the types that the kernels know. A transformed type is one of these on other numbers.
DPO_LOSS_TYPES = {
    "sigmoid": 0, "robust": 1, "hinge": 2, "ipo": 3, "exo_pair": 4, "nca_pair": 5, "bco_pair": 6,
    "sppo_hard": 7, "apo_zero": 8, "apo_down": 9, "discopop": 10, "simpo": 11, "orpo": 12,
}  # fmt: skip

# The losses of tokens (B, T).
AGGREGATIONS = {
    "token_mean": 0, "token_sum": 1, "sequence_mean": 2, "sequence_sum": 3, "dr_grpo": 4,
}  # fmt: skip
POLICY_LOSS_TYPES = {"clip": 0, "cispo": 1, "sapo": 2, "reinforce": 3}
RATIO_LEVELS = {"token": 0, "sequence": 1}
KL_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3, "unbiased_k3": 4}

GROUP_ADVANTAGE_KINDS = {"relative": 0, "normalized": 1, "rank": 2, "leave_one_out": 3}
