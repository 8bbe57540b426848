// Runs CUDA kernels on the CPU, one fiber for each CUDA thread, one block after the other.
//
// A thread runs until it reaches a barrier or an exchange within its warp; then the next one runs.
// Found on the way: barriers that not all threads reach, or at different lines; deadlocks;
// exchanges with lanes that are absent or elsewhere; use of unwritten shared memory (it is filled
// with NaN). Built with AddressSanitizer, ThreadSanitizer: accesses out of bounds and data races as
// well. Such an error ends the kernel; the launcher's cudaGetLastError() reports it. Not covered:
// atomics, cooperative groups, inline PTX, asynchronous copies, time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

struct dim3;

namespace cuda_emulation {

// What kernel<<<grid, block, shared_bytes, stream>>>(arguments) becomes; `body` is one thread.
void launch(const std::function<void()>& body, dim3 grid, dim3 block, size_t shared_bytes = 0,
            const void* stream = nullptr);

// Waits until every thread of the block is at the barrier of this line; returns the sum of the
// predicates.
int barrier(int line, int predicate);

// Waits until every lane of `mask` is at this line; returns the 32 values that they brought.
const uint64_t* exchange(unsigned mask, uint64_t value, int line);
int lane();
unsigned ballot(unsigned mask, bool predicate, int line);

// Ends the kernel with an error. It does not return: the thread is never resumed.
[[noreturn]] void fail(const char* message, int line);

template <typename T>
T shuffle(unsigned mask, T value, int source, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "wider values are not shuffled by CUDA");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  const uint64_t* words = exchange(mask, word, line);
  if ((mask >> source & 1) == 0) fail("a shuffle reads from a lane outside its mask", line);
  std::memcpy(&value, &words[source], sizeof(T));
  return value;
}

// The block's variable that `key` stands for, filled with NaN when its first thread asks for it.
void* shared_memory(const void* key, size_t bytes);
template <typename T>
T& shared_variable(const void* key) {
  return *static_cast<T*>(shared_memory(key, sizeof(T)));
}
void* dynamic_shared_memory();

// Notes a load or store of a thread, for the count of warp requests; free where counting is off.
void count_access(const void* pointer, size_t bytes, int line, bool store);

}  // namespace cuda_emulation
