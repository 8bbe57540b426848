#include "cpu/preference/bradley_terry_loss.h"

#include "bindings/preference/pair_loss.h"

namespace apt {
namespace {

std::tuple<Tensor, Tensor> bradley_terry_loss_fwd_cpu(const Tensor& chosen, const Tensor& rejected,
                                                      const OptionalTensor& margins, double margin,
                                                      double center_coef, int64_t reduction) {
  const PairTensors results(chosen.size(0), reduction, accumulate_type(chosen));
  APT_CALL_KERNEL(bradley_terry_loss_fwd,
                  {dtype_of(chosen), chosen.const_data_ptr(), rejected.const_data_ptr(),
                   optional_data(margins), margin, center_coef, results.outputs});
  return {results.loss, results.grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CPU, m) {
  m.impl("bradley_terry_loss_fwd", TORCH_BOX(&bradley_terry_loss_fwd_cpu));
}

}  // namespace apt
