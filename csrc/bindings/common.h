// What every binding needs: element types and accumulate types.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "bindings/large_memory.h"
#include "cpu/types.h"

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

}  // namespace apt
