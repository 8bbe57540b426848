// Scratch memory of a kernel: not initialised, on huge pages where it is large.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace apt {

template <class T>
class Workspace {
 public:
  explicit Workspace(int64_t count = 0) { allocate(count); }
  void allocate(int64_t count) {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    constexpr size_t kCacheLine = 64, kHugePage = size_t{2} << 20;
    const size_t wanted = sizeof(T) * size_t(count > 0 ? count : 0);
    if (wanted == 0) return;
    const size_t alignment = wanted >= kHugePage ? kHugePage : kCacheLine;
    const size_t bytes = (wanted + kCacheLine - 1) / kCacheLine * kCacheLine;
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment, bytes) != 0) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (alignment == kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    data_ = static_cast<T*>(memory);
    size_ = count;
  }
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  T* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace apt
