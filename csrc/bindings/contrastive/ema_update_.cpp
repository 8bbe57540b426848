#include "cpu/contrastive/ema_update_.h"

#include <ATen/ops/empty_like.h>

#include <map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "bindings/common/operators.h"

namespace apt {
namespace {

// Pairs that wait for one call of the kernel a pair of dtypes, and the memory they need until then.
class Pending {
 public:
  void add(const Tensor& target, Tensor source) {
    if (!seen_.insert(target.const_data_ptr()).second) {
      run();  // a tied tensor comes twice: in turn, as separate calls would
      seen_.insert(target.const_data_ptr());
    }
    Tensor packed = target;
    if (!target.is_non_overlapping_and_dense() || source.strides() != target.strides()) {
      packed = target.contiguous();
      source = source.contiguous();
      if (!packed.is_same(target)) scattered_.emplace_back(target, packed);
    }
    const auto dtypes = std::make_pair(dtype_of(target), dtype_of(source));
    groups_[dtypes].push_back({packed.mutable_data_ptr(), source.const_data_ptr(), packed.numel()});
    alive_.push_back(std::move(source));
    target.unsafeGetTensorImpl()->bump_version();
  }
  void run() {
    for (const auto& [dtypes, tensors] : groups_) {
      const EmaUpdate a{dtypes.first, dtypes.second, tensors.data(), int64_t(tensors.size()),
                        weight_};
      APT_CALL_KERNEL(ema_update_fwd, a);
    }
    for (const auto& [target, packed] : scattered_) target.copy_(packed);
    groups_.clear();
    scattered_.clear();
    alive_.clear();
    seen_.clear();
  }
  explicit Pending(double weight) : weight_(weight) {}

 private:
  double weight_;
  std::map<std::pair<DType, DType>, std::vector<EmaTensor>> groups_;
  std::vector<std::pair<Tensor, Tensor>> scattered_;
  std::vector<Tensor> alive_;
  std::unordered_set<const void*> seen_;
};

void ema_update_fwd_cpu(at::TensorList targets, at::TensorList sources, double momentum) {
  Pending pending(1 - momentum);
  for (size_t i = 0; i < targets.size(); ++i) {
    const Tensor &target = targets[i], &source = sources[i];
    if (!target.is_floating_point() || momentum == 0) {
      target.copy_(source);
    } else if (momentum != 1 && target.numel() != 0) {
      const bool half = target.scalar_type() != at::kDouble;
      const bool taken =
          source.is_floating_point() && (source.scalar_type() != at::kDouble) == half;
      pending.add(target, taken ? source : source.to(half ? at::kFloat : at::kDouble));
    }
  }
  pending.run();
}

}  // namespace

TORCH_LIBRARY_IMPL(apt, CPU, m) { m.impl("ema_update_fwd", ema_update_fwd_cpu); }

}  // namespace apt
