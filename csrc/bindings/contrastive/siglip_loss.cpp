#include "cpu/contrastive/siglip_loss.h"

#include "bindings/contrastive/similarity.h"

namespace apt {
namespace {

SigLIP arguments(const Tensor& query, const Tensor& key, const OptionalTensor& temperatures,
                 double temperature, const OptionalTensor& biases, double logit_bias,
                 bool normalize, int64_t label_offset) {
  SigLIP a{};
  a.similarity =
      similarity_of(rows_of(query), rows_of(key), scale_of(temperatures, temperature), normalize);
  a.similarity.label_offset = label_offset;
  a.logit_bias = biases.has_value() ? number(*biases) : logit_bias;
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> siglip_loss_fwd_cpu(
    const Tensor& query, const Tensor& key, const OptionalTensor& temperatures, double temperature,
    const OptionalTensor& biases, double logit_bias, bool normalize, int64_t label_offset,
    bool need_slopes, const OptionalTensor& before) {
  SigLIP a =
      arguments(query, key, temperatures, temperature, biases, logit_bias, normalize, label_offset);
  const int64_t rows = query.size(0);
  const ScalarType type = accumulate_type(query);
  const Tensor losses = empty({rows}, type), right = empty({rows}, type);
  const Tensor slopes = empty_if(need_slopes, {rows}, ScalarType::Double);
  const Tensor bias_slopes = empty_if(need_slopes, {rows}, ScalarType::Double);
  const Tensor after = after_if(before);
  a.need_slopes = need_slopes;
  a.losses = losses.mutable_data_ptr();
  a.right = right.mutable_data_ptr();
  a.slopes = slopes.mutable_data_ptr<double>();
  a.bias_slopes = bias_slopes.mutable_data_ptr<double>();
  a.before = optional_data<double>(before);
  a.after = after_data(before, after);
  APT_CALL_KERNEL(siglip_loss_fwd, a);
  return {losses, right, slopes, bias_slopes, after};
}

std::tuple<Tensor, Tensor> siglip_loss_bwd_cpu(
    const OptionalTensor& grad_losses, const OptionalTensor& grad_column_losses,
    const Tensor& query, const Tensor& key, const OptionalTensor& temperatures, double temperature,
    const OptionalTensor& biases, double logit_bias, bool normalize, int64_t label_offset,
    bool need_query, bool need_key, bool unrounded) {
  SigLIP a =
      arguments(query, key, temperatures, temperature, biases, logit_bias, normalize, label_offset);
  a.similarity.unrounded = unrounded;
  const Tensor grad_query = gradient_if(need_query, query, unrounded);
  const Tensor grad_key = gradient_if(need_key, key, unrounded);
  a.grad_losses = optional_data(grad_losses);
  a.grad_column_losses = optional_data(grad_column_losses);
  a.grad_rows = data_if(need_query, grad_query);
  a.grad_columns = data_if(need_key, grad_key);
  APT_CALL_KERNEL(siglip_loss_bwd, a);
  return {grad_query, grad_key};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CPU, m) {
  m.impl("siglip_loss_fwd", TORCH_BOX(&siglip_loss_fwd_cpu));
  m.impl("siglip_loss_bwd", TORCH_BOX(&siglip_loss_bwd_cpu));
}

}  // namespace apt
