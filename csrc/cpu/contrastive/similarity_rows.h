// Rows of any strides and dtype as unit rows of float or double, and gradients on their way back
// through the normalisation. One code for float vectors and for double, a lane at a time.
#pragma once
#include <algorithm>

#include "common/logistic.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "contrastive/similarity.h"

namespace apt::APT_ISA {

template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  using V = VecF;
  static constexpr int64_t kCount = kLanes;
};
template <>
struct Lanes<double> {
  using V = double;
  static constexpr int64_t kCount = 1;
};
inline double load(const double* p) { return *p; }
inline void store(double* p, double v) { *p = v; }
inline double vmax(double a, double b) { return a > b ? a : b; }
inline double sum(double v) { return v; }
inline double max(double v) { return v; }
inline double exp2(double y) { return std::exp2(y); }
inline double to_float(double x) { return x; }
inline void from_float(double x, double* out) { *out = x; }
inline void from_float(double x, float* out) { *out = float(x); }
inline void from_float(float x, double* out) { *out = x; }

// Calls body(T*) with a null pointer of the element type.
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(static_cast<float*>(nullptr));
    case DType::bf16:
      return body(static_cast<BFloat16*>(nullptr));
    case DType::f16:
      return body(static_cast<Half*>(nullptr));
    case DType::f64:
      return body(static_cast<double*>(nullptr));
  }
}

template <class A, class T>
void load_row(const T* x, int64_t width, A factor, A* out) {
  int64_t c = 0;
  if constexpr (std::is_same_v<A, float> && !std::is_same_v<T, double>)
    for (; c + kLanes <= width; c += kLanes) store(out + c, load(x + c) * factor);
  for (; c < width; ++c) out[c] = A(to_float(x[c])) * factor;
}

// Rows whose elements lie apart are read together, as neighbours may lie side by side: a queue
// [width, count] is passed transposed.
constexpr int64_t kRowsTogether = 16;

// `count` rows from `first` on, times their factors (null: 1), so far apart. A row of factor 0 is 0
// whatever it holds.
template <class A>
void load_rows(const Rows& rows, int64_t first, int64_t count, const A* factors, A* out,
               int64_t stride) {
  with_type(rows.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t done = 0; done < count;) {
      const int64_t row = first + done, part = row >= rows.first_count;
      const int64_t end = part ? rows.count : rows.first_count, step = rows.column_stride[part];
      const int64_t together = step == 1 ? 1 : std::min({kRowsTogether, count - done, end - row});
      const T* x = static_cast<const T*>(rows.data[part]) +
                   (row - part * rows.first_count) * rows.row_stride[part];
      A* to = out + done * stride;
      if (step == 1) {
        load_row(x, rows.width, factors ? factors[row] : A(1), to);
      } else {
        for (int64_t c = 0; c < rows.width; ++c)
          for (int64_t r = 0; r < together; ++r)
            to[r * stride + c] = A(to_float(x[r * rows.row_stride[part] + c * step])) *
                                 (factors ? factors[row + r] : A(1));
      }
      for (int64_t r = 0; factors && r < together; ++r)
        if (factors[row + r] == 0) std::fill_n(to + r * stride, rows.width, A(0));
      done += together;
    }
  });
}

template <class A>
void load_rows(const Rows& rows, int64_t first, int64_t count, const A* factors, A* out) {
  load_rows(rows, first, count, factors, out, rows.width);
}

template <class A>
double dot(const A* a, const A* b, int64_t width) {
  constexpr int64_t kSums = 8;  // that many additions at a time
  double sums[kSums] = {};
  int64_t c = 0;
  for (; c + kSums <= width; c += kSums)
    for (int64_t k = 0; k < kSums; ++k) sums[k] += double(a[c + k]) * b[c + k];
  for (; c < width; ++c) sums[0] += double(a[c]) * b[c];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

constexpr int64_t kRowGrain = 64;  // rows that are worth a thread
constexpr double kSmallestSquaredNorm = 1e-24;

// 1/|x| of every row, 0 for a row without a direction, NaN for one that is not finite; all 1 if not
// normalised.
template <class A>
void inverse_norms(const Rows& rows, bool normalize, A* out) {
  if (!normalize) {
    std::fill_n(out, rows.count, A(1));
    return;
  }
  parallel_for(rows.count, kRowGrain, [&](int64_t begin, int64_t end) {
    Workspace<A> x(kRowsTogether * rows.width);
    for (int64_t row = begin; row < end; row += kRowsTogether) {
      const int64_t count = std::min(kRowsTogether, end - row);
      load_rows<A>(rows, row, count, nullptr, x.data());
      for (int64_t r = 0; r < count; ++r) {
        const A* p = x.data() + r * rows.width;
        const double squared = dot(p, p, rows.width);
        const double inverse = squared <= kSmallestSquaredNorm ? 0 : 1 / std::sqrt(squared);
        out[row + r] = squared < kInf ? A(inverse) : std::numeric_limits<A>::quiet_NaN();
      }
    }
  });
}

// The gradient of one side: sums over tiles of coefficient * unit row, in the memory of the result
// where that has the type of the sums.
template <class A>
class Gradient {
 public:
  Gradient(const Rows& rows, void* out, bool unrounded)
      : rows_(rows), out_(out), in_place_(unrounded || rows.dtype == kSums) {
    if (out == nullptr) return;
    if (!in_place_) own_.allocate(rows.count * rows.width);
    sums_ = in_place_ ? static_cast<A*>(out) : own_.data();
    parallel_for(rows.count, kRowGrain, [&](int64_t begin, int64_t end) {
      std::fill_n(row(begin), (end - begin) * rows_.width, A(0));
    });
  }
  explicit operator bool() const { return sums_ != nullptr; }
  A* row(int64_t i) { return sums_ + i * rows_.width; }

  // out = scale * inverse * (g - (g . u) u), or scale * g if not normalised.
  void finish(const A* inverse, bool normalize, double scale) {
    if (sums_ == nullptr) return;
    parallel_for(rows_.count, kRowGrain, [&](int64_t begin, int64_t end) {
      Workspace<A> unit(rows_.width);
      for (int64_t i = begin; i < end; ++i) {
        A along = 0, factor = A(scale);
        if (normalize) {
          load_rows(rows_, i, 1, inverse, unit.data());
          along = A(dot(row(i), unit.data(), rows_.width));
          factor = A(scale * inverse[i]);
        }
        if (factor == 0) std::fill_n(row(i), rows_.width, A(0));  // no direction, no gradient
        if (normalize && factor != 0) {
          for (int64_t c = 0; c < rows_.width; ++c) row(i)[c] = row(i)[c] - along * unit.data()[c];
        }
        store_row(i, factor);
      }
    });
  }

 private:
  static constexpr DType kSums = sizeof(A) == 8 ? DType::f64 : DType::f32;

  void store_row(int64_t i, A factor) {
    with_type(in_place_ ? kSums : rows_.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      T* out = static_cast<T*>(out_) + i * rows_.width;
      for (int64_t c = 0; c < rows_.width; ++c) from_float(row(i)[c] * factor, out + c);
    });
  }

  Rows rows_;
  void* out_;
  bool in_place_;
  Workspace<A> own_;
  A* sums_ = nullptr;
};

// Adds coefficient(i) times the unit rows of each other to the gradients of the pairs (i, i +
// offset). Positives come in here and not in the products: beside their coefficient the many small
// ones of a row would lose digits.
template <class A, class Coefficient>
void add_pairs(const Rows& left, const A* left_inverse, Gradient<A>& grad_left, const Rows& right,
               const A* right_inverse, Gradient<A>& grad_right, int64_t offset,
               const Coefficient& coefficient) {
  const int64_t first = std::max<int64_t>(0, -offset), width = left.width;
  const int64_t pairs = std::min(left.count, right.count - offset) - first;
  if (pairs <= 0) return;
  parallel_for(pairs, kRowGrain, [&](int64_t begin, int64_t end) {
    Workspace<A> u(width), v(width);
    for (int64_t i = first + begin; i < first + end; ++i) {
      const A c = coefficient(i);
      load_rows(left, i, 1, left_inverse, u.data());
      load_rows(right, i + offset, 1, right_inverse, v.data());
      for (int64_t k = 0; k < width; ++k) {
        if (grad_left) grad_left.row(i)[k] += c * v.data()[k];
        if (grad_right) grad_right.row(i + offset)[k] += c * u.data()[k];
      }
    }
  });
}

}  // namespace apt::APT_ISA
