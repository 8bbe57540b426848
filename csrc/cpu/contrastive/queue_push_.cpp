// Keys become columns of a ring buffer (He 2020, MoCo, algorithm 1).
// Passes: one. Bytes: each key read and written once, which is the floor. Parallel over features.
// Accuracy: a copy, or one rounding to the queue's dtype.
#include "contrastive/queue_push_.h"

#include <algorithm>

#include "common/parallel.h"
#include "common/simd.h"

namespace apt::APT_ISA {
namespace {

constexpr int64_t kGrain = 32768;      // elements of a task
constexpr int64_t kFeatureBlock = 16;  // a cache line of floats: read for 16 features, not for one

void convert(double x, double* out) { *out = x; }
template <class Q, class T>
void convert(T x, Q* out) {
  if constexpr (std::is_same_v<Q, T>) {
    *out = x;
  } else {
    from_float(to_float(x), out);
  }
}

template <class Q, class T>
void push_features(const QueuePush& a, int64_t begin, int64_t end) {
  const int64_t oldest = std::max<int64_t>(0, a.keys_count - a.size);
  for (int64_t block = begin; block < end; block += kFeatureBlock) {
    for (int64_t d = block; d < std::min(end, block + kFeatureBlock); ++d) {
      const T* key = static_cast<const T*>(a.keys) + d * a.key_feature_stride;
      Q* row = static_cast<Q*>(a.queue) + d * a.queue_feature_stride;
      int64_t column = (a.first_column + oldest) % a.size;
      for (int64_t i = oldest; i < a.keys_count; ++i) {
        convert(key[i * a.key_stride], row + column * a.queue_column_stride);
        if (++column == a.size) column = 0;
      }
    }
  }
}

using Push = void (*)(const QueuePush&, int64_t, int64_t);

template <class Q>
Push push_from(DType keys) {
  return keys == DType::f32    ? push_features<Q, float>
         : keys == DType::bf16 ? push_features<Q, BFloat16>
                               : push_features<Q, Half>;
}

Push push_of(DType queue, DType keys) {
  return queue == DType::f64    ? push_features<double, double>
         : queue == DType::f32  ? push_from<float>(keys)
         : queue == DType::bf16 ? push_from<BFloat16>(keys)
                                : push_from<Half>(keys);
}

}  // namespace

void queue_push_fwd(const QueuePush& a) {
  const Push push = push_of(a.queue_dtype, a.key_dtype);
  const int64_t columns = std::min(a.keys_count, a.size);
  parallel_for(a.features, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns)),
               [&](int64_t begin, int64_t end) { push(a, begin, end); });
}

}  // namespace apt::APT_ISA
