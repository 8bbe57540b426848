// The module apt_kernels._C_cuda: registers the CUDA kernels with PyTorch through its stable ABI
// (torch >= 2.13), so it compiles and loads beside a CPU build of PyTorch too. The schemas and the
// meaning of the arguments are those of csrc/bindings/; importing _C defines them first.
#include <Python.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "apt/bradley_terry_loss.h"
#include "apt/dpo_loss.h"
#include "apt/token_logprobs.h"

namespace apt::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Makes the tensor's device current for the time of a call and knows its stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t)
      : guard_(t.get_device_index()),
        stream_(torch::stable::accelerator::getCurrentStream(t.get_device_index())) {}
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_.nativeHandle()); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  torch::stable::accelerator::Stream stream_;
};

void check(cudaError_t error, const char* kernel) {
  STD_TORCH_CHECK(error == cudaSuccess, kernel, ": ", cudaGetErrorString(error));
}

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "the CUDA kernels take float32, bfloat16 and float16 tensors");
  }
}

template <typename T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <typename T>
T* pointer(const OptionalTensor& t) {
  return t.has_value() ? pointer<T>(*t) : nullptr;
}

Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype, const Tensor& like) {
  return torch::stable::empty(shape, dtype, std::nullopt, like.device());
}

LogitsRows rows_of(const Tensor& logits, const OptionalTensor& mask,
                   const OptionalTensor& temperatures, double temperature, double softcap) {
  return {logits.data_ptr(),
          dtype_of(logits),
          logits.size(0),
          logits.size(1),
          logits.size(2),
          logits.stride(0),
          logits.stride(1),
          pointer<const bool>(mask),
          pointer<const float>(temperatures),
          static_cast<float>(temperature),
          static_cast<float>(softcap)};
}

std::tuple<Tensor, Tensor, Tensor> token_logprobs_fwd_cuda(Tensor logits, Tensor token_ids,
                                                           OptionalTensor mask,
                                                           OptionalTensor temperatures,
                                                           double temperature, double softcap,
                                                           bool return_entropy) {
  const OnDeviceOf device(logits);
  const int64_t A = logits.size(0), B = logits.size(1), K = token_ids.size(2);
  const Tensor logps = empty({A, B, K}, ScalarType::Float, logits);
  const Tensor lse = empty({A, B}, ScalarType::Double, logits);
  const Tensor entropy = return_entropy ? empty({A, B}, ScalarType::Float, logits)
                                        : empty({0}, ScalarType::Float, logits);
  check(token_logprobs_fwd(rows_of(logits, mask, temperatures, temperature, softcap),
                           pointer<const int64_t>(token_ids), K, pointer<float>(logps),
                           return_entropy ? pointer<float>(entropy) : nullptr, pointer<double>(lse),
                           device.stream()),
        "token_logprobs_fwd");
  return {logps, entropy, lse};
}

Tensor token_logprobs_bwd_cuda(Tensor grad_logps, OptionalTensor grad_entropy, Tensor logits,
                               Tensor token_ids, OptionalTensor mask, OptionalTensor temperatures,
                               Tensor lse, Tensor entropy, double temperature, double softcap) {
  const OnDeviceOf device(logits);
  const Tensor grad_logits =
      empty({logits.size(0), logits.size(1), logits.size(2)}, logits.scalar_type(), logits);
  check(token_logprobs_bwd(pointer<const float>(grad_logps), pointer<const float>(grad_entropy),
                           rows_of(logits, mask, temperatures, temperature, softcap),
                           pointer<const int64_t>(token_ids), token_ids.size(2),
                           pointer<const double>(lse), pointer<const float>(entropy),
                           grad_logits.data_ptr(), device.stream()),
        "token_logprobs_bwd");
  return grad_logits;
}

// What every loss of pairs returns and needs: the loss, (2, B) gradients, workspace.
struct PairTensors {
  PairTensors(const Tensor& like, int64_t B, Reduction reduction)
      : loss(empty(reduction == Reduction::kNone ? std::vector<int64_t>{B} : std::vector<int64_t>{},
                   ScalarType::Float, like)),
        grads(empty({2, B}, ScalarType::Float, like)),
        workspace(empty({pair_loss_workspace(B, reduction)}, ScalarType::Float, like)) {}
  Tensor loss, grads, workspace;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> dpo_loss_fwd_cuda(
    Tensor policy_chosen, Tensor policy_rejected, OptionalTensor ref_chosen,
    OptionalTensor ref_rejected, int64_t loss_type, int64_t reduction, double beta,
    double label_smoothing, double extra) {
  const OnDeviceOf device(policy_chosen);
  const int64_t B = policy_chosen.size(0);
  const DpoOptions options = {static_cast<DpoLossType>(loss_type),
                              static_cast<Reduction>(reduction), beta, label_smoothing, extra};
  const PairTensors out(policy_chosen, B, options.reduction);
  const Tensor chosen_rewards = empty({B}, ScalarType::Float, policy_chosen);
  const Tensor rejected_rewards = empty({B}, ScalarType::Float, policy_chosen);
  check(dpo_loss_fwd(policy_chosen.data_ptr(), policy_rejected.data_ptr(),
                     pointer<void>(ref_chosen), pointer<void>(ref_rejected),
                     dtype_of(policy_chosen), B, options, pointer<float>(out.loss),
                     pointer<float>(chosen_rewards), pointer<float>(rejected_rewards),
                     pointer<float>(out.grads), pointer<float>(out.workspace), device.stream()),
        "dpo_loss_fwd");
  return {out.loss, chosen_rewards, rejected_rewards, out.grads};
}

std::tuple<Tensor, Tensor> bradley_terry_loss_fwd_cuda(Tensor chosen, Tensor rejected,
                                                       OptionalTensor margins, double margin,
                                                       double center_coef, int64_t reduction) {
  const OnDeviceOf device(chosen);
  const int64_t B = chosen.size(0);
  const Reduction kind = static_cast<Reduction>(reduction);
  const PairTensors out(chosen, B, kind);
  check(bradley_terry_loss_fwd(chosen.data_ptr(), rejected.data_ptr(), dtype_of(chosen),
                               pointer<const float>(margins), B, margin, center_coef, kind,
                               pointer<float>(out.loss), pointer<float>(out.grads),
                               pointer<float>(out.workspace), device.stream()),
        "bradley_terry_loss_fwd");
  return {out.loss, out.grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CUDA, m) {
  m.impl("token_logprobs_fwd", TORCH_BOX(&token_logprobs_fwd_cuda));
  m.impl("token_logprobs_bwd", TORCH_BOX(&token_logprobs_bwd_cuda));
  m.impl("dpo_loss_fwd", TORCH_BOX(&dpo_loss_fwd_cuda));
  m.impl("bradley_terry_loss_fwd", TORCH_BOX(&bradley_terry_loss_fwd_cuda));
}

}  // namespace apt::cuda

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda",
                                   "CUDA kernels of apt_kernels; they are in torch.ops.apt", -1,
                                   nullptr};
  return PyModule_Create(&definition);
}
