// Threads for the CPU kernels: PyTorch's own pool, reached without its headers.
#pragma once
#include <cstdint>
#include <functional>

namespace apt {

// Calls body(begin, end) on pieces of [0, size) of at least `grain`, in PyTorch's threads.
void parallel_for(int64_t size, int64_t grain, const std::function<void(int64_t, int64_t)>& body);
int max_threads();

}  // namespace apt
