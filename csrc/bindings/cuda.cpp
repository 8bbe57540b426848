// The module apt_kernels._C_cuda: registers the CUDA kernels with PyTorch through its stable ABI.
// It loads beside a CPU build of PyTorch too. The schemas are in apt_kernels/ops; the arguments
// mean what they mean in the other files of csrc/bindings/.
#include <Python.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "apt/bradley_terry_loss.h"
#include "apt/dpo_loss.h"
#include "apt/gae.h"
#include "apt/mlm_mask.h"
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
      : guard_(t.get_device_index()), stream_(current_stream(t.get_device_index())) {}
  cudaStream_t stream() const { return stream_; }

 private:
  // Of the library that a CUDA build of PyTorch has loaded by now; a CPU build has none to link to.
  using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);
  static CurrentStream find_current_stream() {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return nullptr;
    return reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }
  static cudaStream_t current_stream(int32_t device) {
    static const CurrentStream find = find_current_stream();
    void* stream = nullptr;
    STD_TORCH_CHECK(find != nullptr && find(device, &stream) == TORCH_SUCCESS,
                    "the current stream of device ", device, " cannot be had");
    return static_cast<cudaStream_t>(stream);
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
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
      : loss(empty(reduction == Reduction::none ? std::vector<int64_t>{B} : std::vector<int64_t>{},
                   ScalarType::Float, like)),
        grads(empty({2, B}, ScalarType::Float, like)),
        workspace(empty({pair_loss_workspace(B, reduction)}, ScalarType::Float, like)) {}
  Tensor loss, grads, workspace;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> dpo_loss_fwd_cuda(
    Tensor policy_chosen, Tensor policy_rejected, OptionalTensor ref_chosen,
    OptionalTensor ref_rejected, int64_t loss_type, int64_t reduction, double beta,
    double label_smoothing, double discopop_tau, double simpo_gamma) {
  const OnDeviceOf device(policy_chosen);
  const int64_t B = policy_chosen.size(0);
  const auto type = static_cast<DpoLossType>(loss_type);
  const double extra = type == DpoLossType::discopop ? discopop_tau
                       : type == DpoLossType::simpo  ? simpo_gamma
                                                     : 0.0;
  const DpoOptions options = {type, static_cast<Reduction>(reduction), beta, label_smoothing,
                              extra};
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

GaeInput gae_input(const OptionalTensor& t, bool time_major) {
  if (!t.has_value()) return {};
  if (t->dim() == 1) return {t->data_ptr(), t->stride(0), t->stride(0)};
  return {t->data_ptr(), t->stride(time_major ? 1 : 0), t->stride(time_major ? 0 : 1)};
}

std::tuple<Tensor, Tensor> gae_fwd_cuda(Tensor rewards, Tensor values, OptionalTensor mask,
                                        OptionalTensor terminated, OptionalTensor truncated,
                                        OptionalTensor bootstrap, OptionalTensor cu_seqlens,
                                        double gamma, double gae_lambda, bool whiten,
                                        bool time_major) {
  const OnDeviceOf device(rewards);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < rewards.dim(); ++i) shape.push_back(rewards.size(i));
  const Tensor advantages = empty(shape, ScalarType::Float, rewards);
  const Tensor returns = empty(shape, ScalarType::Float, rewards);
  const Tensor workspace = empty({whiten ? kGaeWorkspace : 0}, ScalarType::Double, rewards);
  OptionalTensor flat_mask;
  if (whiten && mask.has_value()) flat_mask = torch::stable::contiguous(*mask);
  Gae a = {};
  a.dtype = dtype_of(rewards);
  const bool packed = cu_seqlens.has_value();
  a.rows = packed ? cu_seqlens->size(0) - 1 : rewards.size(time_major ? 1 : 0);
  a.length = rewards.size(packed || time_major ? 0 : 1);
  a.cu_seqlens = pointer<const int64_t>(cu_seqlens);
  a.rewards = gae_input(rewards, time_major);
  a.values = gae_input(values, time_major);
  a.mask = gae_input(mask, time_major);
  a.terminated = gae_input(terminated, time_major);
  a.truncated = gae_input(truncated, time_major);
  a.bootstrap = gae_input(bootstrap, time_major);
  a.bootstrap_per_step =
      bootstrap.has_value() && (packed ? bootstrap->size(0) != a.rows : bootstrap->dim() == 2);
  a.gamma = static_cast<float>(gamma);
  a.decay = static_cast<float>(gamma * gae_lambda);
  a.out_row_stride = time_major ? 1 : a.length;
  a.out_step_stride = time_major ? a.rows : 1;
  a.advantages = pointer<float>(advantages);
  a.returns = pointer<float>(returns);
  a.flat_mask = pointer<const bool>(flat_mask);
  a.workspace = whiten ? pointer<double>(workspace) : nullptr;
  check(gae_fwd(a, device.stream()), "gae_fwd");
  return {advantages, returns};
}

IntegerMask integer_mask(const OptionalTensor& mask) {
  if (!mask.has_value()) return {nullptr, 0};
  return {mask->data_ptr(), static_cast<int>(mask->element_size())};
}

SpecialRuns special_runs_of(const std::vector<int64_t>& runs) {
  SpecialRuns result = {};
  result.count = static_cast<int>(runs.size() / 2);
  STD_TORCH_CHECK(result.count <= kMaxSpecialRuns, "special_token_ids: expected at most ",
                  kMaxSpecialRuns, " runs of consecutive ids on a GPU, got ", result.count);
  for (int r = 0; r < result.count; ++r) {
    result.first[r] = static_cast<int>(runs[2 * r]);
    result.size[r] = static_cast<int>(runs[2 * r + 1]);
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor> mlm_mask_fwd_cuda(
    Tensor input_ids, OptionalTensor attention_mask, OptionalTensor special_tokens_mask,
    OptionalTensor sample_ids, OptionalTensor word_ids, std::vector<int64_t> special_runs,
    int64_t mask_token_id, int64_t word_count, int64_t chosen_below, int64_t mask_below,
    int64_t random_below, int64_t seed_low, int64_t seed_high, int64_t step, bool at_least_one) {
  const OnDeviceOf device(input_ids);
  const std::vector<int64_t> shape = {input_ids.size(0), input_ids.size(1)};
  const Tensor masked_ids = empty(shape, input_ids.scalar_type(), input_ids);
  const Tensor labels = empty(shape, input_ids.scalar_type(), input_ids);
  const Tensor positions = empty(shape, ScalarType::Bool, input_ids);
  const MlmMask a = {shape[0],
                     shape[1],
                     static_cast<int>(input_ids.element_size()),
                     input_ids.data_ptr(),
                     integer_mask(attention_mask),
                     integer_mask(special_tokens_mask),
                     pointer<const int64_t>(sample_ids),
                     pointer<const int64_t>(word_ids),
                     special_runs_of(special_runs),
                     static_cast<int>(mask_token_id),
                     static_cast<uint32_t>(word_count),
                     chosen_below,
                     mask_below,
                     random_below,
                     static_cast<uint32_t>(seed_low),
                     static_cast<uint32_t>(seed_high),
                     static_cast<uint32_t>(step),
                     at_least_one,
                     masked_ids.data_ptr(),
                     labels.data_ptr(),
                     pointer<bool>(positions)};
  check(mlm_mask_fwd(a, device.stream()), "mlm_mask_fwd");
  return {masked_ids, labels, positions};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CUDA, m) {
  m.impl("gae_fwd", TORCH_BOX(&gae_fwd_cuda));
  m.impl("mlm_mask_fwd", TORCH_BOX(&mlm_mask_fwd_cuda));
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
