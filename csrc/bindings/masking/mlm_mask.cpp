#include "cpu/masking/mlm_mask.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bindings/common/arrays.h"
#include "bindings/common/operators.h"

namespace apt {
namespace {

IntegerMask integer_mask(const OptionalTensor& mask) {
  if (!mask.has_value()) return {nullptr, 0};
  return {mask->const_data_ptr(), int(mask->element_size())};
}
IntegerMask integer_mask(const OptionalArray& mask) {
  if (!mask.has_value()) return {nullptr, 0};
  return {mask->data(), int(mask->itemsize())};
}

// What does not depend on whether tensors or arrays came.
struct Numbers {
  std::vector<int64_t> special_runs;  // first, count, first, count, ...
  int64_t mask_token_id, word_count, chosen_below, mask_below, random_below, seed_low, seed_high;
  int64_t step;
  bool at_least_one;
};

MlmMask arguments(const Numbers& n) {
  MlmMask a{};
  a.special_runs = reinterpret_cast<const SpecialRun*>(n.special_runs.data());
  a.special_run_count = int64_t(n.special_runs.size()) / 2;
  a.mask_token_id = n.mask_token_id;
  a.word_count = n.word_count;
  a.chosen_below = n.chosen_below;
  a.mask_below = n.mask_below;
  a.random_below = n.random_below;
  a.key = uint64_t(n.seed_high) << 32 | uint64_t(n.seed_low);
  a.step = uint32_t(n.step);
  a.at_least_one = n.at_least_one;
  return a;
}

std::tuple<Tensor, Tensor, Tensor> mlm_mask_fwd_cpu(
    const Tensor& input_ids, const OptionalTensor& attention_mask,
    const OptionalTensor& special_tokens_mask, const OptionalTensor& sample_ids,
    const OptionalTensor& word_ids, const std::vector<int64_t>& special_runs, int64_t mask_token_id,
    int64_t word_count, int64_t chosen_below, int64_t mask_below, int64_t random_below,
    int64_t seed_low, int64_t seed_high, int64_t step, bool at_least_one) {
  const Numbers numbers{special_runs, mask_token_id, word_count, chosen_below, mask_below,
                        random_below, seed_low,      seed_high,  step,         at_least_one};
  const Tensor masked_ids = empty_large(input_ids.sizes(), input_ids.scalar_type());
  const Tensor labels = empty_large(input_ids.sizes(), input_ids.scalar_type());
  const Tensor positions = empty(input_ids.sizes(), ScalarType::Bool);
  MlmMask a = arguments(numbers);
  a.rows = input_ids.size(0);
  a.length = input_ids.size(1);
  a.id_bytes = int(input_ids.element_size());
  a.input_ids = input_ids.const_data_ptr();
  a.attention_mask = integer_mask(attention_mask);
  a.special_tokens_mask = integer_mask(special_tokens_mask);
  a.sample_ids = optional_data<int64_t>(sample_ids);
  a.word_ids = optional_data<int64_t>(word_ids);
  a.masked_ids = masked_ids.mutable_data_ptr();
  a.labels = labels.mutable_data_ptr();
  a.mask_positions = positions.mutable_data_ptr<bool>();
  APT_CALL_KERNEL(mlm_mask_fwd, a);
  return {masked_ids, labels, positions};
}

std::tuple<Array, Array, Array> mlm_mask_fwd_arrays(
    const Array& input_ids, const OptionalArray& attention_mask,
    const OptionalArray& special_tokens_mask, const OptionalArray& sample_ids,
    const OptionalArray& word_ids, const std::vector<int64_t>& special_runs, int64_t mask_token_id,
    int64_t word_count, int64_t chosen_below, int64_t mask_below, int64_t random_below,
    int64_t seed_low, int64_t seed_high, int64_t step, bool at_least_one) {
  const Numbers numbers{special_runs, mask_token_id, word_count, chosen_below, mask_below,
                        random_below, seed_low,      seed_high,  step,         at_least_one};
  Array masked_ids = empty_array(input_ids.dtype(), input_ids);
  Array labels = empty_array(input_ids.dtype(), input_ids);
  Array positions = empty_array(pybind11::dtype::of<bool>(), input_ids);
  MlmMask a = arguments(numbers);
  a.rows = input_ids.shape(0);
  a.length = input_ids.shape(1);
  a.id_bytes = int(input_ids.itemsize());
  a.input_ids = input_ids.data();
  a.attention_mask = integer_mask(attention_mask);
  a.special_tokens_mask = integer_mask(special_tokens_mask);
  a.sample_ids = optional_data<int64_t>(sample_ids);
  a.word_ids = optional_data<int64_t>(word_ids);
  a.masked_ids = masked_ids.mutable_data();
  a.labels = labels.mutable_data();
  a.mask_positions = static_cast<bool*>(positions.mutable_data());
  {
    const pybind11::gil_scoped_release released;
    APT_CALL_KERNEL(mlm_mask_fwd, a);
  }
  return {masked_ids, labels, positions};
}

}  // namespace

void define_mlm_mask_arrays(pybind11::module_& m) {
  m.def("mlm_mask_fwd_arrays", &mlm_mask_fwd_arrays,
        "mlm_mask_fwd of contiguous NumPy arrays; arguments as in torch.ops.apt.");
}

STABLE_TORCH_LIBRARY_IMPL(apt, CPU, m) { m.impl("mlm_mask_fwd", TORCH_BOX(&mlm_mask_fwd_cpu)); }

}  // namespace apt
