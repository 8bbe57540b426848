#include "bindings/common/operators.h"

#include <algorithm>

namespace apt {

Tensor empty(Sizes sizes, ScalarType type) {
  constexpr size_t kMostDimensions = 8;
  STD_TORCH_CHECK(sizes.size() <= kMostDimensions, "expected at most ", kMostDimensions,
                  " dimensions, got ", sizes.size());
  int64_t strides[kMostDimensions], stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1))
    strides[i] = stride;
  static const int32_t cpu = aoti_torch_device_type_cpu();
  AtenTensorHandle handle = nullptr;
  // The dispatcher's way, torch::stable::empty, takes a microsecond more.
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(),
                                                         strides, code_of(type), cpu, 0, &handle));
  return Tensor(handle);
}

Tensor scalar(double value, ScalarType type) {
  const Tensor t = empty({}, type);
  switch (type) {
    case ScalarType::Double:
      *t.mutable_data_ptr<double>() = value;
      break;
    case ScalarType::Long:
      *t.mutable_data_ptr<int64_t>() = int64_t(value);
      break;
    default:
      *t.mutable_data_ptr<float>() = float(value);
  }
  return t;
}

double number(const Tensor& t) {
  double value = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_item_float64(t.get(), &value));
  return value;
}

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      throw std::invalid_argument(message("expected a floating-point tensor, got ",
                                          torch::headeronly::toString(t.scalar_type())));
  }
}

Bytes::Bytes(const Tensor& t) : begin(reinterpret_cast<uintptr_t>(t.const_data_ptr())) {
  int64_t elements = t.numel() == 0 ? 0 : 1;
  for (int64_t i = 0; elements > 0 && i < t.dim(); ++i) elements += (t.size(i) - 1) * t.stride(i);
  end = begin + size_t(elements) * t.element_size();
}

const void* row_temperatures(const OptionalTensor& temperatures, const OptionalTensor& mask) {
  if (!temperatures.has_value()) return nullptr;
  const Tensor values = to(*temperatures, ScalarType::Double);
  OptionalTensor counts;
  if (mask.has_value()) counts = contiguous(*mask);
  const bool* counted = optional_data<bool>(counts);
  const double* value = values.const_data_ptr<double>();
  for (int64_t row = 0; row < values.numel(); ++row) {
    const bool read = counted == nullptr || counted[row];
    APT_CHECK_VALUE(
        !read || (value[row] > 0 && value[row] < std::numeric_limits<double>::infinity()),
        "temperature: expected finite numbers above 0 where the mask counts, got ", value[row],
        " in row ", row);
  }
  return temperatures->const_data_ptr();
}

}  // namespace apt
