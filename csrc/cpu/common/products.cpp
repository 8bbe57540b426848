#include "common/products.h"

namespace apt::APT_ISA {
namespace {

template <class S, class Vector>
struct Fused {
  using Word = S;
  using Sum = S;
  using V = Vector;
  using W = Vector;
  static V splat(S x) { return x - V{}; }
  static V add(V sum, V left, V right) { return sum + left * right; }
};

}  // namespace

void multiply(const PanelProduct<float>& p) { multiply_panels<Fused<float, VecF>>(p); }
void multiply(const PanelProduct<double>& p) { multiply_panels<Fused<double, VecD>>(p); }

}  // namespace apt::APT_ISA
