// Products of bfloat16 pairs: a word holds elements 2k (in the lower half) and 2k + 1 of a row of
// the left factor, or of a column of the right one. k counts words.
#pragma once
#include <cstdint>

#include "common/panel_product.h"

namespace apt {

using PairProduct = PanelProduct<uint32_t, float>;  // a_step is 1

namespace avx512_bf16 {
void multiply_pairs(const PairProduct& p);
void multiply_pairs_in_tiles(const PairProduct& p);  // k: a multiple of 16
void release_tiles();  // after a thread's last product: they would cost every switch of threads
}  // namespace avx512_bf16

}  // namespace apt
