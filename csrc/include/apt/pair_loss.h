// What the launchers of losses of preference pairs share.
#pragma once

#include <cstdint>

namespace apt::cuda {

enum class Reduction : int { kNone = 0, kMean = 1, kSum = 2 };

// How many floats of workspace the reduction of `pairs` losses needs; 0 for most.
int64_t pair_loss_workspace(int64_t pairs, Reduction reduction);

}  // namespace apt::cuda
