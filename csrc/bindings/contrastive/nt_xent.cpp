// NT-Xent is InfoNCE's kernel on the triangle of the similarities of both views.
#include "bindings/contrastive/similarity.h"
#include "cpu/contrastive/info_nce.h"

namespace apt {
namespace {

InfoNCE arguments(const Tensor& z1, const Tensor& z2, const OptionalTensor& temperatures,
                  double temperature, bool normalize) {
  const Rows views = stacked_rows(z1, z2);
  InfoNCE a{};
  a.similarity = similarity_of(views, views, scale_of(temperatures, temperature), normalize);
  a.similarity.triangle = true;
  a.similarity.self_offset = 0;
  a.similarity.label_offset = z1.size(0);
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> nt_xent_fwd_cpu(
    const Tensor& z1, const Tensor& z2, const OptionalTensor& temperatures, double temperature,
    bool normalize, bool need_slopes, const OptionalTensor& before) {
  InfoNCE a = arguments(z1, z2, temperatures, temperature, normalize);
  const int64_t rows = 2 * z1.size(0);
  const ScalarType type = accumulate_type(z1);
  const Tensor losses = empty({rows}, type), right = empty({rows}, type);
  const Tensor slopes = empty_if(need_slopes, {rows}, ScalarType::Double);
  const Tensor stats = empty({rows, 2}, ScalarType::Double);
  const Tensor after = after_if(before);
  a.need_slopes = need_slopes;
  a.losses = losses.mutable_data_ptr();
  a.right = right.mutable_data_ptr();
  a.slopes = slopes.mutable_data_ptr<double>();
  a.row_stats = stats.mutable_data_ptr<double>();
  a.before = optional_data<double>(before);
  a.after = after_data(before, after);
  APT_CALL_KERNEL(info_nce_fwd, a);
  return {losses, right, slopes, stats, after};
}

Tensor nt_xent_bwd_cpu(const Tensor& grad_losses, const Tensor& z1, const Tensor& z2,
                       const OptionalTensor& temperatures, double temperature, bool normalize,
                       const Tensor& stats, bool unrounded) {
  InfoNCE a = arguments(z1, z2, temperatures, temperature, normalize);
  a.similarity.unrounded = unrounded;
  const Tensor grad =
      empty_large({2 * z1.size(0), z1.size(1)}, unrounded ? accumulate_type(z1) : z1.scalar_type());
  a.grad_losses = grad_losses.const_data_ptr();
  a.row_stats = const_cast<double*>(stats.const_data_ptr<double>());
  a.grad_rows = grad.mutable_data_ptr();
  APT_CALL_KERNEL(info_nce_bwd, a);
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CPU, m) {
  m.impl("nt_xent_fwd", TORCH_BOX(&nt_xent_fwd_cpu));
  m.impl("nt_xent_bwd", TORCH_BOX(&nt_xent_bwd_cpu));
}

}  // namespace apt
