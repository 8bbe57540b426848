#include "cpu/contrastive/info_nce.h"

#include "bindings/contrastive/similarity.h"

namespace apt {
namespace {

using OptionalOffset = std::optional<int64_t>;

// With negatives these are the columns, and the keys each row's own positive.
InfoNCE arguments(const Tensor& query, const Tensor& key, const OptionalTensor& negatives,
                  const OptionalTensor& temperatures, double temperature, bool normalize,
                  int64_t label_offset, const OptionalOffset& self_offset) {
  InfoNCE a{};
  a.similarity = similarity_of(rows_of(query), rows_of(negatives.has_value() ? *negatives : key),
                               scale_of(temperatures, temperature), normalize);
  if (negatives.has_value()) {
    a.own = rows_of(key);
  } else {
    a.similarity.label_offset = label_offset;
  }
  if (self_offset.has_value()) a.similarity.self_offset = *self_offset;
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> info_nce_fwd_cpu(
    const Tensor& query, const Tensor& key, const OptionalTensor& negatives,
    const OptionalTensor& temperatures, double temperature, bool normalize, bool symmetric,
    int64_t label_offset, OptionalOffset self_offset, bool need_slopes,
    const OptionalTensor& before) {
  InfoNCE a = arguments(query, key, negatives, temperatures, temperature, normalize, label_offset,
                        self_offset);
  const int64_t rows = query.size(0);
  const ScalarType type = accumulate_type(query);
  const Tensor losses = empty({rows}, type), right = empty({rows}, type);
  const Tensor slopes = empty_if(need_slopes, {rows}, ScalarType::Double);
  const Tensor row_stats = empty({rows, 2}, ScalarType::Double);
  const bool both = symmetric && !before.has_value();
  const Tensor column_stats = empty({both ? rows : 0, 2}, ScalarType::Double);
  const Tensor after = after_if(before);
  a.symmetric = symmetric;
  a.need_slopes = need_slopes;
  a.losses = losses.mutable_data_ptr();
  a.right = right.mutable_data_ptr();
  a.slopes = slopes.mutable_data_ptr<double>();
  a.row_stats = row_stats.mutable_data_ptr<double>();
  a.column_stats = column_stats.mutable_data_ptr<double>();
  a.before = optional_data<double>(before);
  a.after = after_data(before, after);
  APT_CALL_KERNEL(info_nce_fwd, a);
  return {losses, right, slopes, row_stats, column_stats, after};
}

std::tuple<Tensor, Tensor, Tensor> info_nce_bwd_cpu(
    const OptionalTensor& grad_losses, const OptionalTensor& grad_column_losses,
    const Tensor& query, const Tensor& key, const OptionalTensor& negatives,
    const OptionalTensor& temperatures, double temperature, bool normalize, int64_t label_offset,
    OptionalOffset self_offset, const Tensor& row_stats, const Tensor& column_stats,
    bool need_query, bool need_key, bool need_negatives, bool unrounded) {
  InfoNCE a = arguments(query, key, negatives, temperatures, temperature, normalize, label_offset,
                        self_offset);
  a.similarity.unrounded = unrounded;
  const Tensor grad_query = gradient_if(need_query, query, unrounded);
  const Tensor grad_key = gradient_if(need_key, key, unrounded);
  const Tensor grad_negatives =
      gradient_if(need_negatives, negatives.has_value() ? *negatives : key, unrounded);
  a.grad_losses = optional_data(grad_losses);
  a.grad_column_losses = optional_data(grad_column_losses);
  a.row_stats = const_cast<double*>(row_stats.const_data_ptr<double>());
  a.column_stats = const_cast<double*>(column_stats.const_data_ptr<double>());
  a.grad_rows = data_if(need_query, grad_query);
  if (negatives.has_value()) {
    a.grad_columns = data_if(need_negatives, grad_negatives);
    a.grad_own = data_if(need_key, grad_key);
  } else {
    a.grad_columns = data_if(need_key, grad_key);
  }
  APT_CALL_KERNEL(info_nce_bwd, a);
  return {grad_query, grad_key, grad_negatives};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CPU, m) {
  m.impl("info_nce_fwd", TORCH_BOX(&info_nce_fwd_cpu));
  m.impl("info_nce_bwd", TORCH_BOX(&info_nce_bwd_cpu));
}

}  // namespace apt
