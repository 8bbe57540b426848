// The logits of an output head in tiles that stay in cache.
// The vocabulary is divided among the threads, so each reads its part of the weight once, owns its
// part of the weight's gradient, and multiplies alone: threads meet once a group of rows instead of
// once a product. T is the storage type of the tensors, P how they are multiplied (products.h),
// A = P::Scalar the type of the arithmetic: float, or double for double.
#pragma once
#include <deque>

#include "common/bfloat16_products.h"
#include "head/head.h"
#include "head/rows.h"

namespace apt::APT_ISA {

constexpr int64_t kRowBlock = 256;  // rows of a tile
// Rows are taken in groups: of each, a thread holds at most this much of the hidden's gradient,
// and all threads together of the statistics of tiles.
constexpr int64_t kGroupBytes = int64_t{8} << 20;
// A small vocabulary is cut into smaller tiles, so that many threads have work.
constexpr int64_t kLeastTiles = 32, kLeastTileColumns = 64;

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

// Rows as the products read them; of the same type, they are copied.
template <class T, class E>
void to_elements(const T* in, E* out, int64_t size) {
  if constexpr (sizeof(T) == sizeof(E)) {
    std::memcpy(out, in, size_t(size) * sizeof(E));
  } else {
    to_arithmetic(in, out, size);
  }
}

constexpr int64_t kTileStatistics = 3;  // numbers of a row of a tile

template <class T, class P>
class Tiles {
 public:
  using A = typename P::Scalar;
  using Element = typename P::Element;
  using Block = typename P::Block;
  static constexpr bool kSame = std::is_same_v<T, A>;  // gradients are summed where they belong
  const LinearHead& head;
  int64_t features, workers;
  // Of a tile, and how many there are: by the vocabulary alone, as sums of rows go on tile by tile.
  int64_t columns, stride, count;

  explicit Tiles(const LinearHead& h) : head(h), features(h.features), workers(max_threads()) {
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t least = std::min(kLeastTiles, ceil_div(h.vocab, kLeastTileColumns));
    const int64_t wanted = std::max(ceil_div(h.vocab, kTileColumns), least);
    columns = round_up(ceil_div(h.vocab, wanted), kCut);
    stride = apart<A>(columns);
    count = ceil_div(h.vocab, columns);
  }
  int64_t tiles_per_worker() const { return (count + workers - 1) / workers; }
  int64_t begin(int64_t tile) const { return tile * columns; }
  int64_t width(int64_t tile) const { return std::min(columns, head.vocab - begin(tile)); }
  int64_t group_rows() const {
    return std::max<int64_t>(
        kRowBlock,
        kGroupBytes / (int64_t(sizeof(A)) * std::max(features, kTileStatistics * count)));
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
      P::finish();
    });
  }

  // The weight of one tile, a block a worker.
  std::deque<Block> weight_blocks(Uses uses) const {
    std::deque<Block> blocks;
    for (int64_t w = 0; w < workers; ++w) blocks.emplace_back(columns, features, uses);
    return blocks;
  }
  void load_weight(int64_t tile, Block& block) const {
    const T* source = static_cast<const T*>(head.weight) + begin(tile) * features;
    block.use(elements(source), width(tile), features);
  }

  // The hidden states of some rows (ascending) side by side: where they lie, or copied.
  void gather(const int64_t* rows, int64_t size, Block& block) const {
    const T* hidden = static_cast<const T*>(head.hidden);
    if (size == 0 || rows[size - 1] - rows[0] == size - 1)
      return block.use(elements(hidden + (size ? rows[0] : 0) * features), size, features);
    Element* room = block.room();
    parallel_for(size, 16, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        Element* row = room + i * block.stride;
        std::fill(row + features, row + block.stride, Element{});
        to_elements(hidden + rows[i] * features, row, features);
      }
    });
    block.use(room, size, block.stride);
  }

  // out [rows, width(tile)] for the rows of `hidden` from `row` on. use(r) sees each of them as
  // soon as it is complete.
  template <class Use>
  Coefficients<A> logits(const Block& hidden, int64_t row, int64_t rows, const Block& weight,
                         int64_t tile, A* out, const Use& use) const {
    const Coefficients<A> c{out, stride, rows, width(tile), row, 0};
    A bias[kTileColumns];
    for (int64_t v = 0; head.bias && v < c.columns; ++v)
      bias[v] = arithmetic_value((static_cast<const T*>(head.bias) + begin(tile))[v]);
    P::dots(c, hidden, weight, [&](int64_t first, int64_t done) {
      for (int64_t r = first; r < first + done; ++r) {
        for (int64_t v = 0; head.bias && v < c.columns; ++v) c[r][v] += bias[v];
        for (int64_t v = 0; head.logit_scale != 1 && v < c.columns; ++v)
          c[r][v] *= A(head.logit_scale);
        use(r);
      }
    });
    return c;
  }

 private:
  static constexpr int64_t kTileColumns = round_up(P::kTileColumns, kCut);
  static const auto* elements(const T* p) {
    if constexpr (sizeof(T) == sizeof(Element)) {
      return reinterpret_cast<const Element*>(p);
    } else {
      return p;
    }
  }
};

// Calls body(T{}, P{}): how a head is stored and how it is best multiplied.
template <class Body>
void with_head_products(DType dtype, const Body& body) {
  if (dtype == DType::f64) return body(double{}, Products<double>{});
#if defined(__AVX512F__)
  if (dtype == DType::bf16 && pair_products() != PairProducts::none)
    return body(BFloat16{}, BFloat16Products{});
#endif
  if (dtype == DType::f32) return body(float{}, Products<float>{});
  if (dtype == DType::bf16) return body(BFloat16{}, Products<float>{});
  body(Half{}, Products<float>{});
}

}  // namespace apt::APT_ISA
