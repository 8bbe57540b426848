// What every binding needs: element types, accumulate types and large allocations.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/types.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace apt {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    case at::kDouble:
      return DType::f64;
    default:
      TORCH_CHECK_TYPE(false, "expected a floating-point tensor, got ", t.scalar_type());
  }
}

// Scalars of a row are kept in float, or in double where the input is.
inline at::TensorOptions accumulate_options(const Tensor& t) {
  return t.options().dtype(t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

template <class T>
const T* optional_data(const OptionalTensor& t) {
  return t.has_value() ? t->const_data_ptr<T>() : nullptr;
}
inline const void* optional_data(const OptionalTensor& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

// Memory of a large result is asked for in huge pages: first-touch page faults of 4 KiB pages cost
// 0.26 ms a MB, more than most kernels here.
inline Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor t = at::empty(sizes, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kHugePage = size_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + t.nbytes()) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return t;
}

}  // namespace apt
