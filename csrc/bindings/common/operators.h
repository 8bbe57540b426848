// What every binding needs, on PyTorch's stable ABI: one build serves every PyTorch from
// TORCH_TARGET_VERSION on. Tensors here are on the CPU.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/common/types.h"

namespace apt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}
// PyTorch turns std::invalid_argument into a ValueError.
#define APT_CHECK_VALUE(condition, ...) \
  if (!(condition)) throw std::invalid_argument(apt::message(__VA_ARGS__))

// PyTorch's number of a type.
inline int32_t code_of(ScalarType type) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
}

// An uninitialised contiguous tensor.
Tensor empty(Sizes sizes, ScalarType type);
// The same for results of any size: large ones are on huge pages, and the last block freed is kept
// for the next call. PyTorch cannot resize a large one.
Tensor empty_large(Sizes sizes, ScalarType type);
// A tensor of no dimensions.
Tensor scalar(double value, ScalarType type);
// The only element.
double number(const Tensor& t);

DType dtype_of(const Tensor& t);
// Scalars of a row are kept in float, or in double where the input is.
inline ScalarType accumulate_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// From a tensor's first byte to the end of its last.
struct Bytes {
  uintptr_t begin, end;
  explicit Bytes(const Tensor& t);
};
inline bool overlap(const Bytes& a, const Bytes& b) { return a.begin < b.end && b.begin < a.end; }

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
const void* row_temperatures(const OptionalTensor& temperatures, const OptionalTensor& mask);

}  // namespace apt
