// The Bradley-Terry loss of a reward model and its gradients, in one launch.
#include "apt/bradley_terry_loss.h"
#include "preference/pair_loss.cuh"

namespace apt::cuda {
namespace {

// -log S(c - r - margin) + center_coef (c + r)^2. Bytes: 2 rewards and a margin a pair.
template <typename T>
struct BradleyTerryLoss {
  const T* chosen;
  const T* rejected;
  const float* margins;  // null: `margin`
  float margin;
  float center_coef;

  __device__ PairResult operator()(int64_t i) const {
    const float c = to_float(chosen[i]), r = to_float(rejected[i]);
    const float x = (c - r) - (margins ? margins[i] : margin);
    const float total = center_coef == 0.0f ? 0.0f : c + r;  // 0 * inf would be NaN
    const float center = center_coef * total;
    const float pull = sigmoid(-x), push = 2.0f * center;
    return {center * total - log_sigmoid(x), push - pull, push + pull};
  }
};

}  // namespace

cudaError_t bradley_terry_loss_fwd(const void* chosen, const void* rejected, DType dtype,
                                   const float* margins, int64_t B, double margin,
                                   double center_coef, Reduction reduction, float* loss,
                                   float* grads, float* workspace, cudaStream_t stream) {
  return dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const BradleyTerryLoss<T> pair = {static_cast<const T*>(chosen),
                                      static_cast<const T*>(rejected), margins,
                                      static_cast<float>(margin), static_cast<float>(center_coef)};
    return launch_pair_loss(pair, B, reduction, loss, grads, workspace, stream);
  });
}

}  // namespace apt::cuda
