#include "cpu/contrastive/ema_update_.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <utility>
#include <vector>

#include "bindings/common/operators.h"

namespace apt {
namespace {

bool is_floating_point(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return true;
    default:
      return false;
  }
}

bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

// Every place of its memory is one element, in any order of dimensions.
bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) != 1) dimensions.emplace_back(t.stride(i), t.size(i));
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool same_strides(const Tensor& a, const Tensor& b) {
  const Sizes strides = a.strides(), others = b.strides();
  return std::equal(strides.begin(), strides.end(), others.begin(), others.end());
}

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
  std::map<uintptr_t, uintptr_t> ends_;  // where the piece that begins at the key ends
};

// The source, or a copy of it if the target's memory holds its elements in other places.
Tensor apart(const Tensor& target, const Tensor& source) {
  const Bytes written(target), read(source);
  if (!overlap(written, read)) return source;
  const bool same = written.begin == read.begin && same_strides(target, source) &&
                    target.scalar_type() == source.scalar_type();
  return same ? source : clone(source);
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
    if (!is_dense(target) || !same_strides(source, target)) {
      packed = contiguous(target);
      source = contiguous(source);
      if (packed.data_ptr() != target.data_ptr()) scattered_.emplace_back(target, packed);
    }
    const auto dtypes = std::make_pair(dtype_of(target), dtype_of(source));
    groups_[dtypes].push_back({packed.mutable_data_ptr(), source.const_data_ptr(), packed.numel()});
    alive_.push_back(std::move(source));
  }
  void run() {
    for (const auto& [dtypes, tensors] : groups_) {
      const EmaUpdate a{dtypes.first, dtypes.second, tensors.data(), int64_t(tensors.size()),
                        weight_};
      APT_CALL_KERNEL(ema_update_fwd, a);
    }
    for (auto& [target, packed] : scattered_) copy_(target, packed);
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

void ema_update_fwd_cpu(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources,
                        double momentum) {
  Pending pending(1 - momentum);
  for (size_t i = 0; i < targets.size(); ++i) {
    Tensor target = targets[i];
    const bool copied = !is_floating_point(target) || momentum == 0;
    if (target.numel() == 0 || (momentum == 1 && !copied)) continue;
    pending.before(target, sources[i]);
    const Tensor source = apart(target, sources[i]);
    if (copied) {
      copy_(target, source);
      continue;
    }
    const bool taken = is_floating_point(source) && is_double(source) == is_double(target);
    pending.add(target, taken ? source : to(source, accumulate_type(target)));
  }
  pending.run();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CPU, m) { m.impl("ema_update_fwd", TORCH_BOX(&ema_update_fwd_cpu)); }

}  // namespace apt
