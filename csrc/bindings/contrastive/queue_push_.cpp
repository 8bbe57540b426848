#include "cpu/contrastive/queue_push_.h"

#include "bindings/common/operators.h"

namespace apt {
namespace {

void queue_push_fwd_cpu(const Tensor& queue, const Tensor& pointer, const Tensor& keys) {
  const bool both =
      (queue.scalar_type() == ScalarType::Double) == (keys.scalar_type() == ScalarType::Double);
  Tensor taken = both ? keys : to(keys, queue.scalar_type());
  if (overlap(Bytes(taken), Bytes(queue))) taken = clone(taken);  // keys that are columns of it
  int64_t* next = pointer.mutable_data_ptr<int64_t>();
  QueuePush a{};
  a.queue_dtype = dtype_of(queue);
  a.key_dtype = dtype_of(taken);
  a.features = queue.size(0);
  a.size = queue.size(1);
  a.keys_count = taken.size(0);
  a.queue = queue.mutable_data_ptr();
  a.queue_feature_stride = queue.stride(0);
  a.queue_column_stride = queue.stride(1);
  a.keys = taken.const_data_ptr();
  a.key_stride = taken.stride(0);
  a.key_feature_stride = taken.stride(1);
  a.first_column = (*next % a.size + a.size) % a.size;
  APT_CALL_KERNEL(queue_push_fwd, a);
  *next = (a.first_column + a.keys_count) % a.size;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CPU, m) { m.impl("queue_push_fwd", TORCH_BOX(&queue_push_fwd_cpu)); }

}  // namespace apt
