// The types a kernel of any input type computes with.
#pragma once
#include <type_traits>

#include "common/simd.h"

namespace apt::APT_ISA {

// What is computed with: vectors of float for every input type but float64.
template <class T>
using ScalarOf = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class S>
using VectorOf = std::conditional_t<std::is_same_v<S, double>, double, VecF>;
template <class S>
constexpr int kWidth = std::is_same_v<S, double> ? 1 : kLanes;

}  // namespace apt::APT_ISA
