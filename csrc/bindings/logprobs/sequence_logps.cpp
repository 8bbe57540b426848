#include "cpu/logprobs/sequence_logps.h"

#include "bindings/common/operators.h"

namespace apt {
namespace {

SequenceLogps arguments(const Tensor& like, const Tensor& mask) {
  SequenceLogps a{};
  a.dtype = dtype_of(like);
  a.rows = mask.size(0);
  a.length = mask.size(1);
  a.mask = mask.const_data_ptr<bool>();
  return a;
}

std::tuple<Tensor, Tensor> sequence_logps_fwd_cpu(const Tensor& logps, const Tensor& mask,
                                                  bool average) {
  const Tensor sums = empty({logps.size(0)}, accumulate_type(logps));
  const Tensor tokens = empty({average ? logps.size(0) : 0}, sums.scalar_type());
  SequenceLogps a = arguments(logps, mask);
  a.logps = logps.const_data_ptr();
  a.row_stride = logps.stride(0);
  a.column_stride = logps.stride(1);
  a.sums = sums.mutable_data_ptr();
  a.tokens = average ? tokens.mutable_data_ptr() : nullptr;
  APT_CALL_KERNEL(sequence_logps_fwd, a);
  return {sums, tokens};
}

Tensor sequence_logps_bwd_cpu(const Tensor& grad, const Tensor& mask) {
  const Tensor grad_logps = empty_large(mask.sizes(), grad.scalar_type());
  SequenceLogps a = arguments(grad, mask);
  a.grad = grad.const_data_ptr();
  a.grad_logps = grad_logps.mutable_data_ptr();
  APT_CALL_KERNEL(sequence_logps_bwd, a);
  return grad_logps;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CPU, m) {
  m.impl("sequence_logps_fwd", TORCH_BOX(&sequence_logps_fwd_cpu));
  m.impl("sequence_logps_bwd", TORCH_BOX(&sequence_logps_bwd_cpu));
}

}  // namespace apt
