// A training loop asks for the same large gradient every step. Fresh memory costs it more than the
// kernel: 0.26 ms a MB in 4 KiB page faults, 0.1 ms a MB in huge ones (the system zeroes them; a
// virtual machine may have to fetch them from its host, 1 ms a MB). So the last block freed is
// kept, marked MADV_FREE: the system takes its pages back when it needs memory, and no sooner.
#include "bindings/common/large_memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/empty.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <mutex>
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
  TORCH_CHECK_WITH(OutOfMemoryError, raw != MAP_FAILED, "apt_kernels: no memory for ", size,
                   " bytes");
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

class LargeAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    const size_t size = round_up(n);
    Block block = take();
    if (block.size < size || block.size / 2 > size) {
      unmap(block);
      block = map(size);
    }
    return {block.data, new Block(block), &LargeAllocator::free, c10::DeviceType::CPU};
  }
  void copy_data(void* to, const void* from, size_t n) const override {
    default_copy_data(to, from, n);
  }
  size_t release() {
    const Block block = take();
    unmap(block);
    return block.size;
  }
  // Never destroyed: tensors may outlive every static.
  static LargeAllocator& instance() {
    static LargeAllocator* allocator = new LargeAllocator;
    return *allocator;
  }

 private:
  Block take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(kept_, Block{});
  }
  static void free(void* context) {
    Block* freed = static_cast<Block*>(context);
    Block block = *freed;
    delete freed;
#if defined(MADV_FREE)
    madvise(block.data, block.size, MADV_FREE);
    LargeAllocator& self = instance();
    {
      const std::lock_guard<std::mutex> lock(self.mutex_);
      std::swap(block, self.kept_);
    }
#endif
    unmap(block);
  }

  std::mutex mutex_;
  Block kept_;
};

}  // namespace

at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const at::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
  if (at::detail::computeStorageNbytesContiguous(sizes, c10::elementSize(dtype)) < kLarge) {
    return at::empty(sizes, options);
  }
  at::Tensor t =
      at::detail::empty_generic(sizes, &LargeAllocator::instance(),
                                c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    at::native::fill_empty_deterministic_(t);
  }
  return t;
}

size_t empty_cache() { return LargeAllocator::instance().release(); }
#else
at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::empty(sizes, options);
}
size_t empty_cache() { return 0; }
#endif

}  // namespace apt
