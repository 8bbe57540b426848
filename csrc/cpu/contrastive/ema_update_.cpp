// target += weight (source - target) over many tensors (He 2020, MoCo, eq. 2).
// Passes: one, in place. Bytes: an element of both read, one written: 12 a parameter in float32,
// which is the floor. Parallel over the elements of all tensors together, whatever their sizes.
// Accuracy: float, one rounding to the target's dtype; float64 in float64.
#include "contrastive/ema_update_.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/simd.h"

namespace apt::APT_ISA {
namespace {

constexpr int64_t kGrain = 32768;  // elements: 400 KB, 20 us, several times a thread's start

template <class T, class S>
void update(void* target, const void* source, int64_t first, int64_t count, double weight) {
  T* t = static_cast<T*>(target) + first;
  const S* s = static_cast<const S*>(source) + first;
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t i = 0; i < count; ++i) t[i] += weight * (s[i] - t[i]);
  } else {
    const VecF w = splat(float(weight));
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const VecF x = load(t + i);
      store(t + i, x + w * (load(s + i) - x));
    }
    const VecF x = load_partial(t + i, count - i, 0.f);
    store_partial(t + i, count - i, x + w * (load_partial(s + i, count - i, 0.f) - x));
  }
}

using Update = void (*)(void*, const void*, int64_t, int64_t, double);

template <class T>
Update update_from(DType source) {
  return source == DType::f32    ? update<T, float>
         : source == DType::bf16 ? update<T, BFloat16>
                                 : update<T, Half>;
}

Update update_of(DType target, DType source) {
  return target == DType::f64    ? update<double, double>
         : target == DType::f32  ? update_from<float>(source)
         : target == DType::bf16 ? update_from<BFloat16>(source)
                                 : update_from<Half>(source);
}

}  // namespace

void ema_update_fwd(const EmaUpdate& a) {
  const Update update_elements = update_of(a.target_dtype, a.source_dtype);
  std::vector<int64_t> ends(a.tensor_count);  // elements up to and with a tensor
  int64_t total = 0;
  for (int64_t i = 0; i < a.tensor_count; ++i) ends[i] = total += a.tensors[i].count;
  parallel_for(total, kGrain, [&](int64_t begin, int64_t end) {
    int64_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; begin = ends[i], ++i) {
      const EmaTensor& pair = a.tensors[i];
      const int64_t first = begin - (ends[i] - pair.count), last = std::min(end, ends[i]);
      update_elements(pair.target, pair.source, first, last - begin, a.weight);
    }
  });
}

}  // namespace apt::APT_ISA
