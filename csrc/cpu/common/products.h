// Products of blocks of rows, as the losses over an output head and the contrastive losses need
// them. With left [m, width], right [n, width] and coefficients c [m, n] of their rows:
//   dots          c = left right^T
//   add_to_left   out [m, width] (+)= c right
//   add_to_right  out [n, width] (+)= c^T left
// One type for each way of multiplying: Products of float and double here, of bfloat16 in
// bfloat16_products.h. Each has Scalar, the type of the coefficients and sums; Element, that of the
// rows; Block, rows in the forms its products read; Scratch; kTileColumns, the size of right blocks
// that multiplies fastest. A row of dots, and of sums for the left, has the same bits however many
// rows there are.
#pragma once
#include <algorithm>

#include "common/micro_kernels.h"
#include "common/parallel.h"
#include "common/transpose.h"
#include "common/workspace.h"

namespace apt::APT_ISA {

void multiply(const PanelProduct<float>& p);
void multiply(const PanelProduct<double>& p);

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Blocks are cut at multiples of this: of every panel, and of the words of bfloat16 products.
#if defined(__aarch64__)
constexpr int64_t kCut = 96;
#else
constexpr int64_t kCut = 32;
#endif

// Of the rows [left, left + rows) of one block and [right, right + columns) of another, both cut at
// multiples of kCut.
template <class A>
struct Coefficients {
  A* data;
  int64_t stride, rows, columns, left, right;
  A* operator[](int64_t r) const { return data + r * stride; }
};

// The right block of dots, the left one; how many sums are taken of its rows, 0 for none.
struct Uses {
  bool right_of_dots, left_of_dots;
  int64_t sums;
};
// Fewer sums do not repay the packing of rows that could be read where they lie: measured, D = 576
// and 768. Where rows lie a multiple of kConflict apart, they do so earlier.
constexpr int64_t kRepaidBySums = 512, kRepaidInConflict = 96;

// Where a stride is a multiple of kConflict bytes, the rows of a strip share too few places in the
// first cache. A line more puts them apart.
constexpr int64_t kConflict = 1024, kLine = 64;
template <class E>
constexpr int64_t apart(int64_t stride) {
  constexpr int64_t size = sizeof(E);
  return stride * size % kConflict ? stride : stride + kLine / size;
}

// Calls done(first, count) for the rows of a product that are complete.
template <class Done>
RowsDone rows_done(const Done& done) {
  return {[](const void* state, int64_t first, int64_t count) {
            (*static_cast<const Done*>(state))(first, count);
          },
          &done};
}
struct Nothing {
  void operator()(int64_t, int64_t) const {}
};

// A vector of T as words of float, of which `count` matter; the others are 0.
template <class T>
VecU float_words(const T* p, int64_t count) {
  return bit_cast<VecU>(count >= kLanes ? load(p) : load_partial(p, count, 0.f));
}

constexpr int64_t kPackGrain = 64;  // rows whose packing is worth a thread

template <class S>
struct Products {
  using Scalar = S;
  using Element = S;
  static constexpr int64_t kTileColumns = 256;
  static constexpr int64_t kPanel = kPanelVectors * kLanes * int64_t(sizeof(float)) / sizeof(S);

  struct Block {
    int64_t longest, width, stride;  // stride: of rows in room()
    const S* rows = nullptr;         // of the left one
    int64_t rows_stride = 0;
    Workspace<S> columns;  // [longest / kPanel][width][kPanel]
    // Panels of the width for sums: packed, or in rows that lie where whole panels are.
    const S* panels = nullptr;
    int64_t panel_size = 0, panel_step = 0;
    Block(int64_t most, int64_t w, Uses uses)
        : longest(most),
          width(w),
          stride(apart<S>(w)),
          columns(uses.right_of_dots ? round_up(most, kPanel) * w : 0),
          left_(uses.left_of_dots),
          sums_(uses.sums) {}
    S* room() {
      if (own_.size() == 0) own_.allocate(longest * stride);
      return own_.data();
    }
    const S* panel_at(int64_t row) const { return panels + row * panel_step; }
    // n rows of S, or of a type that is converted to it.
    template <class T>
    void use(const T* data, int64_t n, int64_t data_stride) {
      const bool pack = sums_ && !use_panels_in_place(data, data_stride);
      if (pack) {
        if (!packed_.size()) packed_.allocate(round_up(width, kPanel) * longest);
        panels = packed_.data(), panel_size = longest * kPanel, panel_step = kPanel;
      }
      parallel_for(round_up(n, kCut) / kCut, kPackGrain / kCut, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * kCut, size = std::min(end * kCut, n) - first;
        if (columns.size()) pack_columns(data, data_stride, first, size);
        if (pack) pack_panels(data, data_stride, first, size);
      });
      if (left_) use_rows(data, n, data_stride);
    }

   private:
    template <class T>
    bool use_panels_in_place(const T* data, int64_t data_stride) {
      if constexpr (std::is_same_v<T, S>)
        if (width % kPanel == 0 &&
            sums_ <= (apart<S>(data_stride) == data_stride ? kRepaidBySums : kRepaidInConflict)) {
          panels = data, panel_size = kPanel, panel_step = data_stride;
          return true;
        }
      return false;
    }

    template <class T>
    void use_rows(const T* data, int64_t n, int64_t data_stride) {
      if constexpr (std::is_same_v<T, S>)
        if (data == own_.data() || data_stride == apart<S>(data_stride)) {
          rows = data, rows_stride = data_stride;
          return;
        }
      rows = room(), rows_stride = stride;
      parallel_for(n, kPackGrain, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
          convert(data + r * data_stride, width, own_.data() + r * stride);
      });
    }

    template <class T>
    void pack_columns(const T* data, int64_t data_stride, int64_t first, int64_t size) {
      S* out = columns.data();
      const auto at = [&](int64_t r, int64_t c) {
        return out + (r / kPanel * width + c) * kPanel + r % kPanel;
      };
      if constexpr (std::is_same_v<S, float>) {
        transpose_words(
            size, round_up(size, kPanel), width,
            [&](int64_t r, int64_t c, int64_t count) {
              const T* p = data + (first + r) * data_stride + c;
              __builtin_prefetch(p + kLanes * data_stride);
              return float_words(p, count);
            },
            [&](int64_t r, int64_t c, VecU words) {
              std::memcpy(at(first + r, c), &words, sizeof words);
            });
      } else {
        for (int64_t r = first; r < first + round_up(size, kPanel); ++r)
          for (int64_t c = 0; c < width; ++c)
            *at(r, c) = r < first + size ? data[r * data_stride + c] : S(0);
      }
    }

    template <class T>
    void pack_panels(const T* data, int64_t data_stride, int64_t first, int64_t size) {
      for (int64_t r = first; r < first + size; ++r)
        for (int64_t c = 0; c < width; c += kPanel) {
          S* to = packed_.data() + (c / kPanel * longest + r) * kPanel;
          const T* from = data + r * data_stride + c;
          if (width - c >= kPanel) {
            convert(from, kPanel, to);
          } else {
            convert(from, width - c, to);
            std::fill(to + (width - c), to + kPanel, S(0));
          }
        }
    }

    template <class T>
    static void convert(const T* in, int64_t size, S* out) {
      int64_t i = 0;
      if constexpr (std::is_same_v<S, float>)
        for (; i + kLanes <= size; i += kLanes) store(out + i, load(in + i));
      for (; i < size; ++i) out[i] = number(in[i]);
    }
    static double number(double x) { return x; }
    template <class T>
    static float number(T x) {
      return to_float(x);
    }

    bool left_;
    int64_t sums_;
    Workspace<S> own_, packed_;
  };
  struct Scratch {
    Scratch(int64_t, int64_t) {}
  };

  // done(first, count) is called for rows of c as they are complete.
  template <class Done = Nothing>
  static void dots(const Coefficients<S>& c, const Block& left, const Block& right,
                   const Done& done = {}) {
    multiply({c.rows, c.columns, left.width, left.rows + c.left * left.rows_stride,
              left.rows_stride, 1, right.columns.data() + c.right * right.width,
              right.width * kPanel, kPanel, c.data, c.stride, false, rows_done(done)});
  }
  static void add_to_left(S* out, const Coefficients<S>& c, const Block& right, Scratch&,
                          bool accumulate) {
    multiply({c.rows, right.width, c.columns, c.data, c.stride, 1, right.panel_at(c.right),
              right.panel_size, right.panel_step, out, right.width, accumulate});
  }
  static void add_to_right(S* out, const Coefficients<S>& c, const Block& left, Scratch&,
                           bool accumulate) {
    multiply({c.columns, left.width, c.rows, c.data, 1, c.stride, left.panel_at(c.left),
              left.panel_size, left.panel_step, out, left.width, accumulate});
  }
  static void finish() {}
};

}  // namespace apt::APT_ISA
