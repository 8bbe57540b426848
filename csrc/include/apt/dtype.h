// Element types the CUDA launchers take; accumulation is always float.
#pragma once

namespace apt::cuda {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace apt::cuda
