#pragma once
#include <cstdint>

#include "common/isa.h"
#include "common/types.h"

namespace apt {

// Strides are in elements. One dtype is float64 only if both are.
struct QueuePush {
  DType queue_dtype, key_dtype;
  int64_t features, size, keys_count;  // queue [features, size], keys [keys_count, features]
  void* queue;
  int64_t queue_feature_stride, queue_column_stride;
  const void* keys;
  int64_t key_stride, key_feature_stride;
  int64_t first_column;  // of the first key, in [0, size)
};

}  // namespace apt

APT_DECLARE_KERNEL(void, queue_push_fwd, const apt::QueuePush&)
