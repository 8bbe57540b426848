// Sums (or means) of the log-probabilities of a sequence where the mask counts.
// Passes: one. Bytes: the log-probabilities and the mask read, or the mask read and the gradient
// written. Parallel over rows.
// Accuracy: 8 floats a lane, then double.
#include "logprobs/sequence_logps.h"

#include <algorithm>

#include "common/parallel.h"
#include "common/simd.h"

namespace apt::APT_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements worth waking a thread for: 5 us

int64_t rows_of_grain(const SequenceLogps& a) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(a.length, 1));
}

// -1 where the mask counts.
VecI load_mask(const bool* p) {
  using Bytes = uint8_t __attribute__((vector_size(kLanes)));
  Bytes raw;
  std::memcpy(&raw, p, sizeof raw);
  return __builtin_convertvector(raw, VecI) != 0;
}

struct MaskedSum {
  double sum = 0;
  int64_t tokens = 0;
};

// Floats are summed in vectors over a block, and go on in double.
constexpr int64_t kBlock = 16 * kLanes;

template <class T>
void add_block(MaskedSum& row, const T* x, const bool* mask) {
  VecF sums[2] = {};
  VecI tokens{};
  for (int64_t j = 0; j < kBlock; j += 2 * kLanes)
    for (int u = 0; u < 2; ++u) {
      const VecI counts = load_mask(mask + j + u * kLanes);
      sums[u] += select(counts, load(x + j + u * kLanes), VecF{});
      tokens -= counts;
    }
  row.sum += sum(sums[0]) + double(sum(sums[1]));
  for (int lane = 0; lane < kLanes; ++lane) row.tokens += tokens[lane];
}

// Blocks begin at the first token that counts, and a last one is filled up: padding on either side
// does not change how the others are added.
template <class T>
MaskedSum masked_sum(const T* x, int64_t stride, const bool* mask, int64_t length) {
  MaskedSum row;
  for (int64_t i = std::find(mask, mask + length, true) - mask; i < length; i += kBlock) {
    const int64_t size = std::min(kBlock, length - i);
    if (stride == 1 && size == kBlock) {
      add_block(row, x + i, mask + i);
      continue;
    }
    float part[kBlock] = {};
    bool counts[kBlock] = {};
    for (int64_t j = 0; j < size; ++j) part[j] = to_float(x[(i + j) * stride]);
    std::copy_n(mask + i, size, counts);
    add_block(row, part, counts);
  }
  return row;
}
MaskedSum masked_sum(const double* x, int64_t stride, const bool* mask, int64_t length) {
  MaskedSum row;
  for (int64_t i = 0; i < length; ++i) {
    if (mask[i]) row.sum += x[i * stride];
    row.tokens += mask[i];
  }
  return row;
}

void spread(float grad, const bool* mask, int64_t length, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes)
    store(out + i, select(load_mask(mask + i), splat(grad), VecF{}));
  for (; i < length; ++i) out[i] = mask[i] ? grad : 0.f;
}
void spread(double grad, const bool* mask, int64_t length, double* out) {
  for (int64_t i = 0; i < length; ++i) out[i] = mask[i] ? grad : 0;
}

template <class T, class S>
void forward(const SequenceLogps& a) {
  parallel_for(a.rows, rows_of_grain(a), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const bool* mask = a.mask + row * a.length;
      const MaskedSum sum = masked_sum(static_cast<const T*>(a.logps) + row * a.row_stride,
                                       a.column_stride, mask, a.length);
      const double tokens = a.tokens ? double(std::max<int64_t>(sum.tokens, 1)) : 1;
      static_cast<S*>(a.sums)[row] = S(sum.sum / tokens);
      if (a.tokens) static_cast<S*>(a.tokens)[row] = S(tokens);
    }
  });
}

template <class S>
void backward(const SequenceLogps& a) {
  parallel_for(a.rows, rows_of_grain(a), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const bool* mask = a.mask + row * a.length;
      S* out = static_cast<S*>(a.grad_logps) + row * a.length;
      spread(static_cast<const S*>(a.grad)[row], mask, a.length, out);
    }
  });
}

}  // namespace

void sequence_logps_fwd(const SequenceLogps& a) {
  switch (a.dtype) {
    case DType::f32:
      return forward<float, float>(a);
    case DType::bf16:
      return forward<BFloat16, float>(a);
    case DType::f16:
      return forward<Half, float>(a);
    case DType::f64:
      return forward<double, double>(a);
  }
}

void sequence_logps_bwd(const SequenceLogps& a) {
  if (a.dtype == DType::f64) return backward<double>(a);
  backward<float>(a);
}

}  // namespace apt::APT_ISA
