#include "cpu/logprobs/linear_cross_entropy.h"

#include "bindings/head/head.h"

namespace apt {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_fwd_cpu(
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& labels,
    const OptionalTensor& normalizer, int64_t ignore_index, double label_smoothing, double softcap,
    double logit_scale, int64_t reduction, bool need_hidden, bool need_weight, bool need_bias) {
  constexpr int64_t kMean = 1, kSum = 2;
  APT_CHECK_VALUE(reduction == kMean || reduction == kSum, "reduction: expected 1 or 2");
  LinearCrossEntropy a{};
  a.head = linear_head(hidden, weight, bias, softcap, logit_scale);
  const HeadGradientTensors grad(a.head, hidden.scalar_type(), need_hidden, need_weight, need_bias);
  a.labels = labels.const_data_ptr<int64_t>();
  a.ignore_index = ignore_index;
  a.label_smoothing = label_smoothing;
  a.mean = reduction == kMean;
  const double divisor = normalizer.has_value() ? number(*normalizer) : 0;
  a.normalizer = normalizer.has_value() ? &divisor : nullptr;
  const int64_t bad = APT_CALL_KERNEL(linear_cross_entropy_fwd, a);
  APT_CHECK_VALUE(bad < 0, "labels: expected ", ignore_index, " or labels in [0, ", a.head.vocab,
                  "), got ", a.labels[std::max<int64_t>(bad, 0)], " in row ", bad);
  return {scalar(a.loss, accumulate_type(hidden)), scalar(a.correct, ScalarType::Long), grad.hidden,
          grad.weight, grad.bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CPU, m) {
  m.impl("linear_cross_entropy_fwd", TORCH_BOX(&linear_cross_entropy_fwd_cpu));
}

}  // namespace apt
