// The integers that kernels take for the options of operations, for the CPU and for CUDA. They are
// those of apt_kernels/codes.py; a test compares both.
#pragma once

namespace apt {

enum class Reduction : int { none = 0, mean = 1, sum = 2 };

enum class DpoLossType : int {
  sigmoid = 0,
  robust = 1,
  hinge = 2,
  ipo = 3,
  exo_pair = 4,
  nca_pair = 5,
  bco_pair = 6,
  sppo_hard = 7,
  apo_zero = 8,
  apo_down = 9,
  discopop = 10,
  simpo = 11,
  orpo = 12,
};
constexpr int kDpoLossTypes = 13;

enum class Aggregation : int {
  token_mean = 0,
  token_sum = 1,
  sequence_mean = 2,
  sequence_sum = 3,
  dr_grpo = 4,
};

enum class PolicyLossType : int { clip = 0, cispo = 1, sapo = 2, reinforce = 3 };

enum class RatioLevel : int { token = 0, sequence = 1 };

enum class KlEstimator : int { k1 = 1, k2 = 2, k3 = 3, unbiased_k3 = 4 };

enum class GroupAdvantageKind : int { relative = 0, normalized = 1, rank = 2, leave_one_out = 3 };

}  // namespace apt
