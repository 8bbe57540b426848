// A training loop asks for the same large gradient every step. Fresh memory costs it more than the
// kernel: 0.26 ms a MB in 4 KiB page faults, 0.1 ms a MB in huge ones (the system zeroes them; a
// virtual machine may have to fetch them from its host, 1 ms a MB). So the last block freed is
// kept, marked MADV_FREE: the system takes its pages back when it needs memory, and no sooner.
#include "bindings/common/large_memory.h"

#include "bindings/common/operators.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <mutex>
#include <new>
#include <utility>

namespace apt {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// Below this, malloc reuses freed memory by itself (its mmap threshold grows to 32 MiB).
constexpr size_t kLarge = size_t{32} << 20;

size_t round_up(size_t n) { return (n + kHugePage - 1) / kHugePage * kHugePage; }

struct Block {
  void* data = nullptr;
  size_t size = 0;  // a multiple of kHugePage
};

Block map(size_t size) {
  void* raw =
      mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t first = round_up(begin);
  if (first > begin) munmap(raw, first - begin);
  const size_t rest = begin + kHugePage - first;
  if (rest > 0) munmap(reinterpret_cast<void*>(first + size), rest);
  madvise(reinterpret_cast<void*>(first), size, MADV_HUGEPAGE);
  return {reinterpret_cast<void*>(first), size};
}

void unmap(Block block) {
  if (block.data != nullptr) munmap(block.data, block.size);
}

// Never destroyed: tensors may outlive every static.
class Kept {
 public:
  static Kept& instance() {
    static Kept* kept = new Kept;
    return *kept;
  }
  Block take() { return exchange({}); }
  Block allocate(size_t bytes) {
    const size_t size = round_up(bytes);
    Block block = take();
    if (block.size < size || block.size / 2 > size) {
      unmap(block);
      block = map(size);
    }
    return block;
  }
  void free(Block block) {
#if defined(MADV_FREE)
    madvise(block.data, block.size, MADV_FREE);
    block = exchange(block);
#endif
    unmap(block);
  }

 private:
  Block exchange(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(block_, block);
  }

  std::mutex mutex_;
  Block block_;
};

}  // namespace

Tensor empty_large(Sizes sizes, ScalarType type) {
  size_t bytes = aoti_torch_dtype_element_size(code_of(type));
  for (const int64_t size : sizes) bytes *= size_t(size);
  if (bytes < kLarge) return empty(sizes, type);
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i]) strides[i] = stride;
  const Block block = Kept::instance().allocate(bytes);
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(block.data, sizes, strides, cpu, type,
                                  [block](void*) { Kept::instance().free(block); });
}

size_t empty_cache() {
  const Block block = Kept::instance().take();
  unmap(block);
  return block.size;
}
#else
Tensor empty_large(Sizes sizes, ScalarType type) { return empty(sizes, type); }
size_t empty_cache() { return 0; }
#endif

}  // namespace apt
