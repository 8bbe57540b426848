#include "cpu/contrastive/ema_update_.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <utility>
#include <vector>

#include "bindings/common/operators.h"

namespace apt {
namespace {

using Address = uintptr_t;

// From a tensor's first byte to the end of its last.
struct Bytes {
  Address begin, end;
  explicit Bytes(const Tensor& t) : begin(reinterpret_cast<Address>(t.const_data_ptr())) {
    int64_t elements = t.numel() == 0 ? 0 : 1;
    for (int64_t i = 0; elements > 0 && i < t.dim(); ++i) {
      elements += (t.size(i) - 1) * t.stride(i);
    }
    end = begin + elements * t.itemsize();
  }
};

// Pieces of memory, merged where they meet: one is found in the logarithm of their number.
class Memory {
 public:
  bool overlaps(const Bytes& b) const {
    if (b.begin == b.end) return false;
    const auto after = ends_.lower_bound(b.end);
    return after != ends_.begin() && std::prev(after)->second > b.begin;
  }
  void add(Bytes b) {
    auto next = ends_.upper_bound(b.begin);
    if (next != ends_.begin() && std::prev(next)->second >= b.begin) {
      --next;
      b.begin = next->first;
    }
    while (next != ends_.end() && next->first <= b.end) {
      b.end = std::max(b.end, next->second);
      next = ends_.erase(next);
    }
    ends_.emplace_hint(next, b.begin, b.end);
  }
  void clear() { ends_.clear(); }

 private:
  std::map<Address, Address> ends_;  // where the piece that begins at the key ends
};

// The source, or a copy of it if the target's memory holds its elements in other places.
Tensor apart(const Tensor& target, const Tensor& source) {
  const Bytes written(target), read(source);
  if (written.end <= read.begin || read.end <= written.begin) return source;
  const bool same = written.begin == read.begin && target.strides() == source.strides() &&
                    target.scalar_type() == source.scalar_type();
  return same ? source : source.clone();
}

// Pairs that wait for one call of the kernel a pair of dtypes, and the memory they need until then.
class Pending {
 public:
  explicit Pending(double weight) : weight_(weight) {}
  // Runs what waits if this pair needs its result, or changes what it reads: pairs take effect one
  // after the other.
  void before(const Tensor& target, const Tensor& source) {
    const Bytes written(target), read(source);
    if (written_.overlaps(written) || written_.overlaps(read) || read_.overlaps(written)) run();
    written_.add(written);
    read_.add(read);
  }
  void add(const Tensor& target, Tensor source) {
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
    written_.clear();
    read_.clear();
  }

 private:
  double weight_;
  std::map<std::pair<DType, DType>, std::vector<EmaTensor>> groups_;
  std::vector<std::pair<Tensor, Tensor>> scattered_;
  std::vector<Tensor> alive_;
  Memory written_, read_;
};

void ema_update_fwd_cpu(at::TensorList targets, at::TensorList sources, double momentum) {
  Pending pending(1 - momentum);
  for (size_t i = 0; i < targets.size(); ++i) {
    const Tensor& target = targets[i];
    const bool copied = !target.is_floating_point() || momentum == 0;
    if (target.numel() == 0 || (momentum == 1 && !copied)) continue;
    pending.before(target, sources[i]);
    const Tensor source = apart(target, sources[i]);
    if (copied) {
      target.copy_(source);
      continue;
    }
    const bool half = target.scalar_type() != at::kDouble;
    const bool taken = source.is_floating_point() && (source.scalar_type() != at::kDouble) == half;
    pending.add(target, taken ? source : source.to(half ? at::kFloat : at::kDouble));
  }
  pending.run();
}

}  // namespace

TORCH_LIBRARY_IMPL(apt, CPU, m) { m.impl("ema_update_fwd", ema_update_fwd_cpu); }

}  // namespace apt
