// The logits of an output head in tiles that stay in cache.
// The vocabulary is divided among the threads, so each reads its part of the weight once, owns its
// part of the weight's gradient, and calls the BLAS alone: a product inside a parallel region runs
// on one thread, and threads meet once a group of rows instead of once a product.
// T is the storage type of the tensors, A the type of the arithmetic: float, or double for double.
#pragma once
#include <algorithm>

#include "blas.h"
#include "linear_head.h"
#include "linear_rows.h"
#include "parallel.h"
#include "workspace.h"

namespace apt::APT_ISA {

// Measured, 1 core with 1 MiB of L2: products of 256 rows and 512 columns reach 96 % of the peak.
// A call with more columns is slower (51 % at a whole vocabulary of 15261): the BLAS packs them.
constexpr int64_t kRowBlock = 256, kTileColumns = 512;
// Rows are taken in groups: of each, a thread holds at most this much of the hidden's gradient.
constexpr int64_t kGroupBytes = int64_t{8} << 20;

template <class T>
void to_arithmetic(const T* in, float* out, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(out + i, load(in + i));
  for (; i < size; ++i) out[i] = to_float(in[i]);
}
inline void to_arithmetic(const double* in, double* out, int64_t size) {
  std::copy_n(in, size, out);
}
template <class T>
void from_arithmetic(const float* in, T* out, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(out + i, load(in + i));
  for (; i < size; ++i) from_float(in[i], out + i);
}
inline void from_arithmetic(const double* in, double* out, int64_t size) {
  std::copy_n(in, size, out);
}
template <class T>
auto arithmetic_value(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return to_float(x);
  }
}

template <class A>
Matrix matrix(const A* data, int64_t rows, int64_t columns, int64_t stride) {
  constexpr DType dtype = std::is_same_v<A, double> ? DType::f64 : DType::f32;
  return {const_cast<A*>(data), dtype, rows, columns, stride, 1};
}

template <class T, class A>
class Tiles {
 public:
  static constexpr bool kSame = std::is_same_v<T, A>;
  const LinearHead& head;
  int64_t features, workers, columns, count;  // columns of a tile, number of tiles

  explicit Tiles(const LinearHead& h) : head(h), features(h.features), workers(max_threads()) {
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t wanted = ceil_div(ceil_div(h.vocab, kTileColumns), workers) * workers;
    columns = ceil_div(ceil_div(h.vocab, wanted), int64_t{16}) * 16;
    count = ceil_div(h.vocab, columns);
  }
  int64_t tiles_per_worker() const { return (count + workers - 1) / workers; }
  int64_t begin(int64_t tile) const { return tile * columns; }
  int64_t width(int64_t tile) const { return std::min(columns, head.vocab - begin(tile)); }
  int64_t group_rows() const {
    return std::max<int64_t>(kRowBlock, kGroupBytes / int64_t(sizeof(A)) / features);
  }
  int64_t picked(int64_t tile, int64_t token) const {
    const int64_t at = token - begin(tile);
    return at >= 0 && at < width(tile) ? at : -1;
  }

  // body(worker, first tile, last tile), in parallel; a worker without tiles is called too.
  template <class Body>
  void each_worker(const Body& body) const {
    parallel_for(workers, 1, [&](int64_t first, int64_t last) {
      for (int64_t w = first; w < last; ++w)
        body(w, w * count / workers, (w + 1) * count / workers);
    });
  }

  // The hidden states of some rows (ascending) side by side: where they lie, or copied.
  const A* gather(const int64_t* rows, int64_t size, Workspace<A>& copy) const {
    const T* hidden = static_cast<const T*>(head.hidden);
    if constexpr (kSame)
      if (size == 0 || rows[size - 1] - rows[0] == size - 1)
        return hidden + (size ? rows[0] : 0) * features;
    if (copy.size() < size * features) copy.allocate(size * features);
    parallel_for(size, 16, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        to_arithmetic(hidden + rows[i] * features, copy.data() + i * features, features);
    });
    return copy.data();
  }
  int64_t weight_scratch() const { return kSame ? 0 : columns * features; }
  const A* weight(int64_t tile, A* scratch) const {
    const T* source = static_cast<const T*>(head.weight) + begin(tile) * features;
    if constexpr (kSame) {
      return source;
    } else {
      to_arithmetic(source, scratch, width(tile) * features);
      return scratch;
    }
  }

  // out [rows, width(tile)]. The bias goes in first: the product is added to it.
  void logits(const A* hidden, int64_t rows, const A* weight, int64_t tile, A* out) const {
    const int64_t w = width(tile);
    if (head.bias) {
      const T* bias = static_cast<const T*>(head.bias) + begin(tile);
      for (int64_t v = 0; v < w; ++v) out[v] = A(head.logit_scale) * arithmetic_value(bias[v]);
      for (int64_t r = 1; r < rows; ++r) std::copy_n(out, w, out + r * w);
    }
    multiply(matrix(out, rows, w, w), matrix(hidden, rows, features, features),
             transposed(matrix(weight, w, features, features)), head.bias ? 1 : 0,
             head.logit_scale);
  }
};

}  // namespace apt::APT_ISA
