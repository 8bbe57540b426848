// Arguments that the contrastive losses share.
#pragma once
#include "bindings/common/operators.h"
#include "cpu/contrastive/similarity.h"

namespace apt {

inline Rows rows_of(const Tensor& t) {
  Rows rows{};
  rows.dtype = dtype_of(t);
  rows.count = rows.first_count = t.size(0);
  rows.width = t.size(1);
  rows.data[0] = t.const_data_ptr();
  rows.row_stride[0] = t.stride(0);
  rows.column_stride[0] = t.stride(1);
  return rows;
}

inline Rows stacked_rows(const Tensor& first, const Tensor& second) {
  Rows rows = rows_of(first);
  rows.count += second.size(0);
  rows.data[1] = second.const_data_ptr();
  rows.row_stride[1] = second.stride(0);
  rows.column_stride[1] = second.stride(1);
  return rows;
}

// 1 / temperature; a tensor counts before the number.
inline double scale_of(const OptionalTensor& temperatures, double temperature) {
  if (temperatures.has_value()) temperature = number(*temperatures);
  APT_CHECK_VALUE(temperature > 0 && temperature < std::numeric_limits<double>::infinity(),
                  "temperature: expected a finite number above 0, got ", temperature);
  return 1 / temperature;
}

inline Similarity similarity_of(const Rows& rows, const Rows& columns, double scale,
                                bool normalize) {
  Similarity s{};
  s.rows = rows;
  s.columns = columns;
  s.wide = rows.dtype == DType::f64;
  s.normalize = normalize;
  s.scale = scale;
  s.self_offset = s.label_offset = kNowhere;
  return s;
}

// A result that was not asked for is empty.
inline Tensor empty_if(bool wanted, Sizes sizes, ScalarType type) {
  return wanted ? empty(sizes, type) : empty({0}, type);
}
// unrounded: in the type of the sums.
inline Tensor gradient_if(bool wanted, const Tensor& of, bool unrounded) {
  const ScalarType type = unrounded ? accumulate_type(of) : of.scalar_type();
  return wanted ? empty_large(of.sizes(), type) : empty({0}, type);
}
// What a call on some of the classes hands to the next; see the kernels' `before`.
inline Tensor after_if(const OptionalTensor& before) {
  if (!before.has_value()) return empty({0}, ScalarType::Double);
  STD_TORCH_CHECK(before->is_contiguous(), "before: expected no gaps");
  return empty(before->sizes(), before->scalar_type());
}
inline double* after_data(const OptionalTensor& before, const Tensor& after) {
  return before.has_value() ? after.mutable_data_ptr<double>() : nullptr;
}
inline void* data_if(bool wanted, const Tensor& t) {
  return wanted ? t.mutable_data_ptr() : nullptr;
}

}  // namespace apt
