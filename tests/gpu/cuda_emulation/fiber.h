// Fibers: stacks and switches between them, announced to the sanitizers. Never built with
// -fsanitize itself; EMULATE_ASAN or EMULATE_TSAN says what the kernels were built with.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#ifdef EMULATE_ASAN
extern "C" void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom,
                                                size_t* size);
#endif
#ifdef EMULATE_TSAN
extern "C" void* __tsan_get_current_fiber();
extern "C" void* __tsan_create_fiber(unsigned flags);
extern "C" void __tsan_destroy_fiber(void* fiber);
extern "C" void __tsan_switch_to_fiber(void* fiber, unsigned flags);
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
#endif

namespace cuda_emulation {

// What happened before a release happens before what follows an acquire of the same object. Only
// barriers and exchanges do this, never the switch of fibers, so that TSan sees CUDA's order alone.
struct HappensBefore {
#ifdef EMULATE_TSAN
  void release() { __tsan_release(this); }
  void acquire() { __tsan_acquire(this); }
#else
  void release() {}
  void acquire() {}
#endif
  char address = 0;
};

#if defined(__x86_64__)
// Saves the registers that a function must keep on the stack, stores the stack pointer, takes the
// other one. swapcontext() does the same with two system calls, 30 times slower.
extern "C" void cuda_emulation_switch(void** from, void* to);
#define CUDA_EMULATION_DEFINE_SWITCH                                                 \
  asm(".text\n.globl cuda_emulation_switch\n.type cuda_emulation_switch,@function\n" \
      "cuda_emulation_switch:\n"                                                     \
      "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"      \
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"                                          \
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n"      \
      ".size cuda_emulation_switch, .-cuda_emulation_switch\n");
#else
#define CUDA_EMULATION_DEFINE_SWITCH
#endif

class Fiber {
 public:
  static constexpr size_t kStackBytes = 64 << 10;

  // Makes the fiber begin at `entry`, which must not return, when it is next resumed.
  void start(void (*entry)()) {
    allocate_stack();
    char* top = stack_ + kStackBytes;
#if defined(__x86_64__)
    void** frame = reinterpret_cast<void**>(top) - 8;  // six registers, entry, return address
    for (int i = 0; i < 8; ++i) frame[i] = nullptr;
    frame[6] = reinterpret_cast<void*>(entry);
    stack_pointer_ = frame;
#else
    (void)top;
    getcontext(&context_);
    context_.uc_stack = {stack_, 0, kStackBytes};
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
#ifdef EMULATE_TSAN
    if (tsan_ != nullptr) __tsan_destroy_fiber(tsan_);
    tsan_ = __tsan_create_fiber(0);
#endif
  }

  // Runs the fiber until it suspends itself.
  void resume() {
#ifdef EMULATE_TSAN
    main_tsan_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_, 1);  // 1: the switch orders nothing
#endif
#ifdef EMULATE_ASAN
    void* fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, stack_, kStackBytes);
#endif
    switch_context(main_, *this);
#ifdef EMULATE_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // To be called first on a new fiber.
  static void entered() {
#ifdef EMULATE_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &main_stack_, &main_stack_bytes_);
#endif
  }

  // Goes back to resume(); the last time, what ASan keeps of this stack is given up.
  void suspend(bool last) {
    (void)last;
#ifdef EMULATE_TSAN
    __tsan_switch_to_fiber(main_tsan_, 1);
#endif
#ifdef EMULATE_ASAN
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, main_stack_, main_stack_bytes_);
#endif
    switch_context(*this, main_);
#ifdef EMULATE_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, &main_stack_, &main_stack_bytes_);
#endif
  }

 private:
  // One page that faults below the stack. TSan forgets what it knows of a mapping that is made
  // anew.
  void allocate_stack() {
#ifndef EMULATE_TSAN
    if (stack_ != nullptr) return;
#endif
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    if (stack_ == nullptr) {
      void* memory = mmap(nullptr, page + kStackBytes, PROT_NONE, flags, -1, 0);
      if (memory == MAP_FAILED) abort();
      stack_ = static_cast<char*>(memory) + page;
    }
    void* stack = mmap(stack_, kStackBytes, PROT_READ | PROT_WRITE, flags | MAP_FIXED, -1, 0);
    if (stack == MAP_FAILED) abort();
  }

#if defined(__x86_64__)
  static void switch_context(Fiber& from, Fiber& to) {
    cuda_emulation_switch(&from.stack_pointer_, to.stack_pointer_);
  }
  void* stack_pointer_ = nullptr;
#else
  static void switch_context(Fiber& from, Fiber& to) { swapcontext(&from.context_, &to.context_); }
  ucontext_t context_;
#endif
  char* stack_ = nullptr;
  static Fiber main_;
#ifdef EMULATE_TSAN
  void* tsan_ = nullptr;
  static void* main_tsan_;
#endif
#ifdef EMULATE_ASAN
  static const void* main_stack_;
  static size_t main_stack_bytes_;
#endif
};

}  // namespace cuda_emulation
