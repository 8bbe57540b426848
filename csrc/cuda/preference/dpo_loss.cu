// The losses of DPO and its family, their rewards and gradients, in one launch.
#include <cfloat>
#include <cmath>

#include "apt/dpo_loss.h"
#include "preference/pair_loss.cuh"

namespace apt::cuda {
namespace {

// Constants of a loss, formed on the host in double.
struct DpoConstants {
  float beta;
  float label_smoothing;
  float extra;           // discopop's tau, simpo's gamma
  float half_over_beta;  // 1 / (2 beta)
  float robust_scale;    // 1 / (1 - 2 label_smoothing)
  float log_right;       // log(1 - label_smoothing)
  float log_wrong;       // log(label_smoothing)
};

// A loss of the difference d = c - r has opposite gradients.
__device__ inline PairResult of_difference(float loss, float grad) { return {loss, grad, -grad}; }

// a b, and 0 where a is: b may be infinite there.
__device__ inline float product(float a, float b) { return a == 0.0f ? 0.0f : a * b; }

// -(1 - s) log S(x) - s log S(-x), x = beta d - margin; `sign` -1 for robust, which adds the last.
__device__ inline PairResult smoothed_sigmoid(float x, float sign, const DpoConstants& k) {
  const float right = 1.0f - k.label_smoothing, wrong = sign * k.label_smoothing;
  const float loss = -right * log_sigmoid(x) - product(wrong, log_sigmoid(-x));
  return of_difference(loss, k.beta * (wrong * sigmoid(x) - right * sigmoid(-x)));
}

__device__ inline PairResult exo_pair(float x, const DpoConstants& k) {
  const float right = sigmoid(x), wrong = sigmoid(-x);
  const float loss =
      product(right, log_sigmoid(x) - k.log_right) + product(wrong, log_sigmoid(-x) - k.log_wrong);
  return of_difference(loss, k.beta * product(right * wrong, x - (k.log_right - k.log_wrong)));
}

// -log S(x) (1 - m) + exp(-x) m, m = S(x / tau); exp(-x) m in one exponential: it is inf * 0 else.
__device__ inline PairResult discopop(float x, const DpoConstants& k) {
  const float scaled = x / k.extra;
  const float rest = sigmoid(-scaled), slope = sigmoid(scaled) * rest / k.extra;
  const float above = x < -FLT_MAX ? -FLT_MAX : x;  // -inf + inf would be NaN
  const float exponential = expf(log_sigmoid(scaled) - above);
  const float loss = exponential - log_sigmoid(x) * rest;
  const float grad =
      exponential * (rest / k.extra - 1.0f) + product(slope, log_sigmoid(x)) - sigmoid(-x) * rest;
  return of_difference(loss, k.beta * grad);
}

// log(1 - e^x), x < 0 (Maechler 2012): each form is exact on its side of -log 2.
__device__ inline float log1mexp(float x) {
  return x > -0.6931472f ? logf(-expm1f(x)) : log1pf(-expf(x));
}

__device__ inline PairResult orpo(float chosen, float rejected, const DpoConstants& k) {
  const float log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected));
  const float grad = -k.beta * sigmoid(-log_odds);
  return {-k.beta * log_sigmoid(log_odds), -grad / expm1f(chosen), grad / expm1f(rejected)};
}

__device__ inline PairResult nca_pair(float c, float r, const DpoConstants& k) {
  const float x = k.beta * c, y = k.beta * r;
  return {-log_sigmoid(x) - 0.5f * log_sigmoid(-x) - 0.5f * log_sigmoid(-y),
          k.beta * (0.5f * sigmoid(x) - sigmoid(-x)), 0.5f * k.beta * sigmoid(y)};
}

__device__ inline PairResult bco_pair(float c, float r, const DpoConstants& k) {
  const float x = k.beta * c, y = k.beta * r;
  return {-log_sigmoid(x) - log_sigmoid(-y), -k.beta * sigmoid(-x), k.beta * sigmoid(y)};
}

__device__ inline PairResult apo_zero(float c, float r, const DpoConstants& k) {
  const float x = k.beta * c, y = k.beta * r;
  const float rising = sigmoid(x), falling = sigmoid(-x), other = sigmoid(y);
  return {falling + other, -k.beta * rising * falling, k.beta * other * sigmoid(-y)};
}

__device__ inline PairResult apo_down(float c, float d, const DpoConstants& k) {
  const float x = k.beta * c, y = k.beta * d;
  const float chosen = sigmoid(x), other = sigmoid(-y);
  const float grad = k.beta * sigmoid(y) * other;
  return {chosen + other, k.beta * chosen * sigmoid(-x) - grad, grad};
}

// The loss of the log-ratios c and r, which are the policy's own log-probabilities where there is
// no reference (simpo and orpo).
__device__ inline PairResult dpo_pair(DpoLossType type, float c, float r, const DpoConstants& k) {
  const float d = c - r, x = k.beta * d;
  switch (type) {
    case DpoLossType::sigmoid:
      return smoothed_sigmoid(x, 1.0f, k);
    case DpoLossType::robust: {
      const PairResult result = smoothed_sigmoid(x, -1.0f, k);
      return of_difference(k.robust_scale * result.loss, k.robust_scale * result.grad_chosen);
    }
    case DpoLossType::hinge:
      return x >= 1.0f ? of_difference(0.0f, 0.0f) : of_difference(1.0f - x, -k.beta);
    case DpoLossType::ipo: {
      const float distance = d - k.half_over_beta;
      return of_difference(distance * distance, 2.0f * distance);
    }
    case DpoLossType::exo_pair:
      return exo_pair(x, k);
    case DpoLossType::nca_pair:
      return nca_pair(c, r, k);
    case DpoLossType::bco_pair:
      return bco_pair(c, r, k);
    case DpoLossType::sppo_hard: {
      const float above = c - k.half_over_beta, below = r + k.half_over_beta;
      return {above * above + below * below, 2.0f * above, 2.0f * below};
    }
    case DpoLossType::apo_zero:
      return apo_zero(c, r, k);
    case DpoLossType::apo_down:
      return apo_down(c, d, k);
    case DpoLossType::discopop:
      return discopop(x, k);
    case DpoLossType::simpo:
      return smoothed_sigmoid(x - k.extra, 1.0f, k);
    case DpoLossType::orpo:
      return orpo(c, r, k);
  }
  return {NAN, NAN, NAN};
}

// Reads pair i and writes its rewards. Bytes: 4 inputs, 2 rewards (and 2 gradients) a pair.
template <typename T>
struct DpoLoss {
  const T* policy_chosen;
  const T* policy_rejected;
  const T* ref_chosen;  // null: the reference is 0
  const T* ref_rejected;
  float* chosen_rewards;
  float* rejected_rewards;
  DpoLossType type;
  DpoConstants constants;

  __device__ PairResult operator()(int64_t i) const {
    float c = to_float(policy_chosen[i]), r = to_float(policy_rejected[i]);
    if (ref_chosen != nullptr) {
      c -= to_float(ref_chosen[i]);
      r -= to_float(ref_rejected[i]);
    }
    chosen_rewards[i] = constants.beta * c;
    rejected_rewards[i] = constants.beta * r;
    return dpo_pair(type, c, r, constants);
  }
};

DpoConstants make_constants(const DpoOptions& options) {
  const double s = options.label_smoothing;
  return {static_cast<float>(options.beta),
          static_cast<float>(s),
          static_cast<float>(options.extra),
          static_cast<float>(0.5 / options.beta),
          static_cast<float>(1.0 / (1.0 - 2.0 * s)),
          static_cast<float>(std::log1p(-s)),
          static_cast<float>(std::log(s))};
}

}  // namespace

cudaError_t dpo_loss_fwd(const void* policy_chosen, const void* policy_rejected,
                         const void* ref_chosen, const void* ref_rejected, DType dtype, int64_t B,
                         const DpoOptions& options, float* loss, float* chosen_rewards,
                         float* rejected_rewards, float* grads, float* workspace,
                         cudaStream_t stream) {
  return dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const DpoLoss<T> pair = {static_cast<const T*>(policy_chosen),
                             static_cast<const T*>(policy_rejected),
                             static_cast<const T*>(ref_chosen),
                             static_cast<const T*>(ref_rejected),
                             chosen_rewards,
                             rejected_rewards,
                             options.loss_type,
                             make_constants(options)};
    return launch_pair_loss(pair, B, options.reduction, loss, grads, workspace, stream);
  });
}

}  // namespace apt::cuda
