// The scheduler of emulator.h: blocks, threads, barriers, exchanges, shared memory.
#include "emulator.h"

#include <cuda_runtime.h>

#include <cstdio>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "traffic.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_emulation {

CUDA_EMULATION_DEFINE_SWITCH
Fiber Fiber::main_;
#ifdef EMULATE_TSAN
void* Fiber::main_tsan_;
#endif
#ifdef EMULATE_ASAN
const void* Fiber::main_stack_;
size_t Fiber::main_stack_bytes_;
#endif

namespace {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxMasks = 8;                  // of the exchanges of one warp
constexpr int kMaxVariables = 32;             // of shared memory
constexpr size_t kMaxSharedBytes = 99 << 10;  // what every architecture since sm_80 has

enum class State { kRunnable, kAtBarrier, kAtExchange, kFinished };
enum Order { kForward, kReverse, kRandom };

struct Thread {
  Fiber fiber;
  int index;  // within the block
  State state;
  int line;  // of the last barrier or exchange
  int predicate;
};

// The lanes of one mask meet again and again. A lane may be in the next meeting while others have
// not read the values of this one, hence two sides, used in turn.
struct Meeting {
  struct Side {
    unsigned arrived = 0;
    int line = 0;
    uint64_t values[kWarpSize];
    HappensBefore order;
  };
  Side sides[2];
  bool next_side[kWarpSize] = {};
};

struct Warp {
  unsigned alive = 0;
  unsigned masks[kMaxMasks] = {};  // 0: none yet
  Meeting meetings[kMaxMasks];  // of the masks; no map: TSan must not see memory of threads freed
};

struct SharedVariable {
  const void* key;
  char* memory;
};

struct Block {
  const std::function<void()>* body;
  std::vector<std::unique_ptr<Thread>> threads;  // kept from block to block; the first `size` run
  int size = 0, alive = 0;
  std::vector<Warp> warps;
  std::vector<SharedVariable> shared;
  char* dynamic_shared = nullptr;
  Thread* current = nullptr;
  int predicate_sum = 0;
  unsigned barriers = 0;
  HappensBefore barrier_order[2];
  HappensBefore kernel_end;
};

Block block;
Traffic traffic;
Order thread_order = kForward;
std::mt19937 random_numbers;
std::string error;  // of the kernel that ran last; empty: none

// Shared memory comes from the heap, so that ASan watches its bounds. TSan must not see one block's
// memory again in another block of the kernel, hence memory of its own there.
#ifdef EMULATE_TSAN
constexpr size_t kArenaBytes = size_t{256} << 20;
char* arena = nullptr;
size_t arena_used = 0;
void begin_shared() {
  arena_used = 0;
  if (arena != nullptr) return;
  void* memory = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  arena = static_cast<char*>(memory);
}
char* allocate_shared(size_t bytes) {
  char* memory = arena + arena_used;
  arena_used += (bytes + 255) / 256 * 256;
  if (arena_used > kArenaBytes) abort();
  for (size_t i = 0; i < bytes; ++i) static_cast<volatile char*>(memory)[i] = -1;
  return memory;
}
void free_shared(char*) {}
#else
void begin_shared() {}
char* allocate_shared(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes) != 0) abort();
  memset(memory, 0xff, bytes);  // NaN as a float or a double, -1 as an integer
  return static_cast<char*>(memory);
}
void free_shared(char* memory) { free(memory); }
#endif

// How many threads wait where, for the message of an error.
std::string whereabouts() {
  std::map<std::string, int> counts;
  for (int i = 0; i < block.size; ++i) {
    const Thread& thread = *block.threads[i];
    const std::string line = std::to_string(thread.line);
    switch (thread.state) {
      case State::kRunnable:
        counts["running"]++;
        break;
      case State::kAtBarrier:
        counts["at the barrier of line " + line]++;
        break;
      case State::kAtExchange:
        counts["at the exchange of line " + line]++;
        break;
      case State::kFinished:
        counts["finished"]++;
    }
  }
  std::string text;
  for (const auto& [place, count] : counts) {
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " " + place;
  }
  return text;
}

void set_error(const std::string& message) {
  error = message + "; block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
          ", " + std::to_string(blockIdx.z) + "), threads: " + whereabouts();
}

void run_thread() {
  Fiber::entered();
  Thread* thread = block.current;
  (*block.body)();
  block.kernel_end.release();
  thread->state = State::kFinished;
  thread->fiber.suspend(true);
}

void start_threads(unsigned shared_bytes) {
  block.alive = block.size;
  block.warps.assign((block.size + kWarpSize - 1) / kWarpSize, Warp());
  block.dynamic_shared = shared_bytes > 0 ? allocate_shared(shared_bytes) : nullptr;
  for (int i = 0; i < block.size; ++i) {
    if (i == static_cast<int>(block.threads.size())) {
      block.threads.push_back(std::make_unique<Thread>());
    }
    Thread& thread = *block.threads[i];
    thread.index = i;
    thread.state = State::kRunnable;
    thread.line = 0;
    thread.fiber.start(run_thread);
    block.warps[i / kWarpSize].alive |= 1u << i % kWarpSize;
  }
}

void run(Thread& thread) {
  const unsigned i = thread.index;
  threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  block.current = &thread;
  thread.fiber.resume();
  if (thread.state == State::kFinished) {
    block.alive--;
    block.warps[i / kWarpSize].alive &= ~(1u << i % kWarpSize);
  }
}

// No thread can run: they go on if all of them are at one barrier.
void open_barrier() {
  int waiting = 0, line = 0, sum = 0;
  bool same_line = true;
  for (int i = 0; i < block.size; ++i) {
    const Thread& thread = *block.threads[i];
    if (thread.state != State::kAtBarrier) continue;
    same_line = same_line && (waiting == 0 || thread.line == line);
    line = thread.line;
    sum += thread.predicate;
    waiting++;
  }
  if (waiting < block.alive) return set_error("deadlock");
  if (!same_line) return set_error("threads of one block wait at different barriers");
  if (waiting < block.size) return set_error("a barrier that finished threads never reach");
  block.predicate_sum = sum;
  block.barriers++;
  for (int i = 0; i < block.size; ++i) block.threads[i]->state = State::kRunnable;
}

void run_block(std::vector<int>& order, size_t shared_bytes) {
  start_threads(shared_bytes);
  if (thread_order == kRandom) std::shuffle(order.begin(), order.end(), random_numbers);
  while (block.alive > 0 && error.empty()) {
    bool progress = false;
    for (const int i : order) {
      Thread& thread = *block.threads[i];
      if (thread.state != State::kRunnable) continue;
      run(thread);
      progress = true;
      if (!error.empty()) break;
    }
    if (!progress) open_barrier();
  }
  traffic.end_block();
  for (const SharedVariable& variable : block.shared) free_shared(variable.memory);
  block.shared.clear();
  if (block.dynamic_shared != nullptr) free_shared(block.dynamic_shared);
}

}  // namespace

void launch(const std::function<void()>& body, dim3 grid, dim3 size, size_t shared_bytes,
            const void*) {
  error.clear();
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  if (threads == 0 || threads > kMaxThreads || shared_bytes > kMaxSharedBytes || grid.x == 0 ||
      grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    error = "invalid launch configuration";
    return;
  }
  gridDim = grid;
  blockDim = size;
  block.body = &body;
  block.size = static_cast<int>(threads);
  block.shared.reserve(kMaxVariables);
  begin_shared();
  std::vector<int> order(block.size);
  for (int i = 0; i < block.size; ++i) {
    order[i] = thread_order == kReverse ? block.size - 1 - i : i;
  }
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x && error.empty(); ++x) {
        blockIdx = {x, y, z};
        run_block(order, shared_bytes);
      }
    }
  }
  block.kernel_end.acquire();
}

Meeting& meeting_of(Warp& warp, unsigned mask, int line) {
  for (int i = 0; i < kMaxMasks; ++i) {
    if (warp.masks[i] == 0) warp.masks[i] = mask;
    if (warp.masks[i] == mask) return warp.meetings[i];
  }
  fail("more different masks in one warp than the emulation has room for", line);
}

int lane() { return block.current->index % kWarpSize; }

void fail(const char* message, int line) {
  set_error(std::string(message) + " in line " + std::to_string(line));
  for (;;) block.current->fiber.suspend(false);
}

int barrier(int line, int predicate) {
  Thread* thread = block.current;
  HappensBefore& order = block.barrier_order[block.barriers % 2];
  thread->line = line;
  thread->predicate = predicate;
  thread->state = State::kAtBarrier;
  order.release();
  thread->fiber.suspend(false);
  order.acquire();
  return block.predicate_sum;
}

const uint64_t* exchange(unsigned mask, uint64_t value, int line) {
  Thread* thread = block.current;
  const int lane = thread->index % kWarpSize, first = thread->index - lane;
  Warp& warp = block.warps[thread->index / kWarpSize];
  thread->line = line;
  if ((mask >> lane & 1) == 0) fail("a lane that is not in the mask of its exchange", line);
  if ((mask & ~warp.alive) != 0) fail("an exchange with lanes that do not exist or finished", line);
  Meeting& meeting = meeting_of(warp, mask, line);
  Meeting::Side& side = meeting.sides[meeting.next_side[lane]];
  meeting.next_side[lane] = !meeting.next_side[lane];
  if (side.arrived != 0 && side.line != line)
    fail("lanes of one exchange at different lines", line);
  side.line = line;
  side.values[lane] = value;
  side.arrived |= 1u << lane;
  side.order.release();
  if (side.arrived == mask) {
    side.arrived = 0;
    for (int other = 0; other < kWarpSize; ++other) {
      if (mask >> other & 1) block.threads[first + other]->state = State::kRunnable;
    }
  } else {
    thread->state = State::kAtExchange;
    thread->fiber.suspend(false);
  }
  side.order.acquire();
  return side.values;
}

unsigned ballot(unsigned mask, bool predicate, int line) {
  const uint64_t* predicates = exchange(mask, predicate, line);
  unsigned result = 0;
  for (int i = 0; i < kWarpSize; ++i) {
    if ((mask >> i & 1) && predicates[i] != 0) result |= 1u << i;
  }
  return result;
}

void* shared_memory(const void* key, size_t bytes) {
  for (const SharedVariable& variable : block.shared) {
    if (variable.key == key) return variable.memory;
  }
  if (block.shared.size() == kMaxVariables) fail("too many shared variables", 0);
  block.shared.push_back({key, allocate_shared(bytes)});
  return block.shared.back().memory;
}

void* dynamic_shared_memory() { return block.dynamic_shared; }

void count_access(const void* pointer, size_t bytes, int line, bool store) {
  if (!traffic.counting) return;
  traffic.add(block.current->index, line, reinterpret_cast<uintptr_t>(pointer), bytes, store);
}

}  // namespace cuda_emulation

cudaError_t cudaGetLastError() {
  return cuda_emulation::error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

extern "C" {

const char* cuda_emulation_error() { return cuda_emulation::error.c_str(); }

// In which order the threads of a block run: 0 forward, 1 reverse, 2 random.
void cuda_emulation_set_order(int order, unsigned seed) {
  cuda_emulation::thread_order = static_cast<cuda_emulation::Order>(order);
  cuda_emulation::random_numbers.seed(seed);
}

void cuda_emulation_start_counting() { cuda_emulation::traffic.start(); }

// Requests, bytes and 32-byte sectors of the loads, then of the stores, since counting started.
void cuda_emulation_stop_counting(int64_t* counts) { cuda_emulation::traffic.stop(counts); }

}  // extern "C"
