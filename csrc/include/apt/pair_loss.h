// What the launchers of losses of preference pairs share.
#pragma once

#include <cstdint>

#include "apt/codes.h"

namespace apt::cuda {

// How many floats of workspace the reduction of `pairs` losses needs; 0 for most.
int64_t pair_loss_workspace(int64_t pairs, Reduction reduction);

}  // namespace apt::cuda
