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
  if (temperatures.has_value()) temperature = temperatures->item().toDouble();
  TORCH_CHECK_VALUE(temperature > 0 && temperature < std::numeric_limits<double>::infinity(),
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
inline Tensor empty_if(bool wanted, at::IntArrayRef sizes, const at::TensorOptions& options) {
  return wanted ? at::empty(sizes, options) : at::empty({0}, options);
}
// unrounded: in the type of the sums.
inline Tensor gradient_if(bool wanted, const Tensor& of, bool unrounded) {
  const auto options = unrounded ? accumulate_options(of) : of.options();
  return wanted ? empty_large(of.sizes(), options) : at::empty({0}, options);
}
// What a call on some of the classes hands to the next; see the kernels' `before`.
inline Tensor after_if(const OptionalTensor& before) {
  if (!before.has_value()) return at::empty({0}, at::TensorOptions().dtype(at::kDouble));
  TORCH_CHECK(before->is_contiguous());
  return at::empty(before->sizes(), before->options());
}
inline double* after_data(const OptionalTensor& before, const Tensor& after) {
  return before.has_value() ? after.mutable_data_ptr<double>() : nullptr;
}
inline void* data_if(bool wanted, const Tensor& t) {
  return wanted ? t.mutable_data_ptr() : nullptr;
}

}  // namespace apt
