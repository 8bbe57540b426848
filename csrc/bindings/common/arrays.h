// NumPy arrays in the place of tensors: contiguous, of the expected dtypes (checked in Python).
#pragma once
#include <pybind11/numpy.h>

#include <optional>
#include <vector>

namespace apt {

using Array = pybind11::array;
using OptionalArray = std::optional<Array>;

template <class T>
const T* optional_data(const OptionalArray& a) {
  return a.has_value() ? static_cast<const T*>(a->data()) : nullptr;
}

inline Array empty_array(const pybind11::dtype& dtype, const Array& like) {
  return Array(dtype, std::vector<pybind11::ssize_t>(like.shape(), like.shape() + like.ndim()));
}

}  // namespace apt
