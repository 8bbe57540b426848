// The logits of an output head in tiles that stay in cache.
// The vocabulary is divided among the threads, so each reads its part of the weight once, owns its
// part of the weight's gradient, and multiplies alone: threads meet once a group of rows instead of
// once a product. T is the storage type of the tensors, P how they are multiplied (products.h),
// A = P::Scalar the type of the arithmetic: float, or double for double.
#pragma once
#include <deque>

#include "common/packed_products.h"
#include "head/head.h"
#include "head/rows.h"

namespace apt::APT_ISA {

constexpr int64_t kRowBlock = 256;  // rows of a tile
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

// Rows as the products read them; of the same type, they are copied.
template <class T, class E>
void to_elements(const T* in, E* out, int64_t size) {
  if constexpr (sizeof(T) == sizeof(E)) {
    std::memcpy(out, in, size_t(size) * sizeof(E));
  } else {
    to_arithmetic(in, out, size);
  }
}

template <class T, class P>
class Tiles {
 public:
  using A = typename P::Scalar;
  using Element = typename P::Element;
  using Block = typename P::Block;
  static constexpr bool kSame = std::is_same_v<T, A>;  // gradients are summed where they belong
  const LinearHead& head;
  int64_t features, workers, columns, count;  // columns of a tile, number of tiles

  explicit Tiles(const LinearHead& h) : head(h), features(h.features), workers(max_threads()) {
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t wanted = ceil_div(ceil_div(h.vocab, P::kTileColumns), workers) * workers;
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
    use_rows(source, width(tile), block);
  }

  // The hidden states of some rows (ascending) side by side: where they lie, or copied.
  void gather(const int64_t* rows, int64_t size, Block& block) const {
    const T* hidden = static_cast<const T*>(head.hidden);
    if (size == 0 || rows[size - 1] - rows[0] == size - 1)
      return use_rows(hidden + (size ? rows[0] : 0) * features, size, block);
    copy_rows(size, block, [&](int64_t i) { return hidden + rows[i] * features; });
  }

  // out [rows, width(tile)] for the rows of `hidden` from `row` on.
  Coefficients<A> logits(const Block& hidden, int64_t row, int64_t rows, const Block& weight,
                         int64_t tile, A* out) const {
    const Coefficients<A> c{out, width(tile), rows, width(tile), row, 0};
    if (head.bias) {  // goes in first: the product is added to it
      const T* bias = static_cast<const T*>(head.bias) + begin(tile);
      for (int64_t v = 0; v < c.columns; ++v) out[v] = arithmetic_value(bias[v]);
      for (int64_t r = 1; r < rows; ++r) std::copy_n(out, c.columns, c[r]);
    }
    P::dots(c, hidden, weight, head.bias != nullptr);
    if (head.logit_scale != 1)
      for (int64_t i = 0; i < rows * c.columns; ++i) out[i] *= A(head.logit_scale);
    return c;
  }

 private:
  void use_rows(const T* source, int64_t size, Block& block) const {
    if constexpr (sizeof(T) == sizeof(Element))
      if (block.stride == features)
        return block.use(reinterpret_cast<const Element*>(source), size);
    copy_rows(size, block, [&](int64_t i) { return source + i * features; });
  }
  template <class Source>
  void copy_rows(int64_t size, Block& block, const Source& source) const {
    Element* room = block.room();
    parallel_for(size, 16, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        Element* row = room + i * block.stride;
        std::fill(row + features, row + block.stride, Element{});
        to_elements(source(i), row, features);
      }
    });
    block.use(room, size);
  }
};

// Fewer rows do not repay the packing of the weight.
constexpr int64_t kLeastPackedRows = 4;

// Calls body(T{}, P{}): how a head is stored and how it is best multiplied by that many rows.
template <class Body>
void with_head_products(DType dtype, [[maybe_unused]] int64_t rows, const Body& body) {
  if (dtype == DType::f64) return body(double{}, BlasProducts<double>{});
#if defined(__AVX512F__)
  if (rows >= kLeastPackedRows) {
    if (dtype == DType::bf16 && has_packed_products(DType::bf16))
      return body(BFloat16{}, PackedBFloat16Products{});
    if (has_packed_products(DType::f32)) {
      if (dtype == DType::f32) return body(float{}, PackedFloatProducts{});
      if (dtype == DType::bf16) return body(BFloat16{}, PackedFloatProducts{});
      return body(Half{}, PackedFloatProducts{});
    }
  }
#endif
  if (dtype == DType::f32) return body(float{}, BlasProducts<float>{});
  if (dtype == DType::bf16) return body(BFloat16{}, BlasProducts<float>{});
  body(Half{}, BlasProducts<float>{});
}

}  // namespace apt::APT_ISA
