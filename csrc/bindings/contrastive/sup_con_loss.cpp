#include "cpu/contrastive/sup_con_loss.h"

#include "bindings/contrastive/similarity.h"

namespace apt {
namespace {

// Without classes the features are: a triangle.
SupCon arguments(const Tensor& features, const Tensor& labels, const OptionalTensor& classes,
                 const OptionalTensor& class_labels, const OptionalTensor& temperatures,
                 double temperature, bool normalize, int64_t self_offset) {
  SupCon a{};
  a.similarity =
      similarity_of(rows_of(features), rows_of(classes.has_value() ? *classes : features),
                    scale_of(temperatures, temperature), normalize);
  a.similarity.triangle = !classes.has_value();
  a.similarity.self_offset = self_offset;
  a.labels = a.column_labels = labels.const_data_ptr<int64_t>();
  if (classes.has_value()) a.column_labels = optional_data<int64_t>(class_labels);
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sup_con_loss_fwd_cpu(
    const Tensor& features, const Tensor& labels, const OptionalTensor& classes,
    const OptionalTensor& class_labels, const OptionalTensor& temperatures, double temperature,
    bool normalize, int64_t self_offset, bool need_slopes, const OptionalTensor& before) {
  SupCon a = arguments(features, labels, classes, class_labels, temperatures, temperature,
                       normalize, self_offset);
  const int64_t rows = features.size(0);
  const ScalarType type = accumulate_type(features);
  const Tensor losses = empty({rows}, type), right = empty({rows}, type);
  const Tensor slopes = empty_if(need_slopes, {rows}, ScalarType::Double);
  const Tensor stats = empty({rows, 2}, ScalarType::Double);
  const Tensor after = after_if(before);
  a.need_slopes = need_slopes;
  a.losses = losses.mutable_data_ptr();
  a.right = right.mutable_data_ptr();
  a.slopes = slopes.mutable_data_ptr<double>();
  a.stats = stats.mutable_data_ptr<double>();
  a.before = optional_data<double>(before);
  a.after = after_data(before, after);
  APT_CALL_KERNEL(sup_con_loss_fwd, a);
  return {losses, right, slopes, stats, after};
}

Tensor sup_con_loss_bwd_cpu(const Tensor& grad_losses, const OptionalTensor& grad_class_losses,
                            const Tensor& features, const Tensor& labels,
                            const OptionalTensor& classes, const OptionalTensor& class_labels,
                            const OptionalTensor& temperatures, double temperature, bool normalize,
                            int64_t self_offset, const Tensor& stats,
                            const OptionalTensor& class_stats, bool unrounded) {
  SupCon a = arguments(features, labels, classes, class_labels, temperatures, temperature,
                       normalize, self_offset);
  a.similarity.unrounded = unrounded;
  const Tensor grad = gradient_if(true, features, unrounded);
  a.grad_losses = grad_losses.const_data_ptr();
  a.grad_column_losses = optional_data(grad_class_losses);
  a.stats = const_cast<double*>(stats.const_data_ptr<double>());
  a.column_stats = optional_data<double>(class_stats);
  a.grad_rows = grad.mutable_data_ptr();
  APT_CALL_KERNEL(sup_con_loss_bwd, a);
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CPU, m) {
  m.impl("sup_con_loss_fwd", TORCH_BOX(&sup_con_loss_fwd_cpu));
  m.impl("sup_con_loss_bwd", TORCH_BOX(&sup_con_loss_bwd_cpu));
}

}  // namespace apt
