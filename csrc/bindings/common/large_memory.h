// Memory of large results: on huge pages, and the last block freed is kept for the next call.
#pragma once
#include <ATen/core/Tensor.h>

namespace apt {

// An uninitialised contiguous CPU tensor (NaN under deterministic algorithms, as torch.empty).
at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options);

// Gives the kept block back to the system; returns its bytes.
size_t empty_cache();

}  // namespace apt
