// What every binding needs: element types and accumulate types.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>

#include "bindings/common/large_memory.h"
#include "cpu/common/types.h"

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

// Ends the error of an id that is out of range, where it is the mark of tokens that do not count.
inline const char* mask_hint(int64_t id) {
  return id == -100 ? "; pass mask=(ids != -100) to leave out tokens marked by -100" : "";
}

// One temperature a row, null for none; above 0 where the mask counts.
inline const void* row_temperatures(const OptionalTensor& temperatures,
                                    const OptionalTensor& mask) {
  if (!temperatures.has_value()) return nullptr;
  const Tensor values = temperatures->to(at::kDouble);
  const Tensor counts = mask.has_value() ? mask->contiguous() : Tensor();
  for (int64_t row = 0; row < values.numel(); ++row) {
    const double value = values.const_data_ptr<double>()[row];
    const bool read = !counts.defined() || counts.const_data_ptr<bool>()[row];
    TORCH_CHECK_VALUE(!read || (value > 0 && value < std::numeric_limits<double>::infinity()),
                      "temperature: expected finite numbers above 0 where the mask counts, got ",
                      value, " in row ", row);
  }
  return temperatures->const_data_ptr();
}

}  // namespace apt
