// Memory, instruction set and threads of one call of a CPU operator.
//
// Every task writes to a place of its own and the order of additions does not depend on which thread did
// what, so results are bitwise the same for any number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "kernels.h"

namespace depict::cpu {

const InstructionSet& instruction_set();

template <class T>
const Kernels<T>& kernels() {
  if constexpr (sizeof(T) == 4)
    return instruction_set().f32;
  else
    return instruction_set().f64;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> allocate(int64_t count) {
  void* p = nullptr;
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 64) / 64 * 64;
  if (posix_memalign(&p, 64, bytes) != 0) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(p));
}

struct alignas(64) Worker {
  Buffer<char> scratch;
  int64_t unset = 0;  // bytes of it still to be zeroed, by the thread that uses them
  Buffer<int64_t> confusion;
  int64_t bad = -1;

  void* zeroed() {
    std::memset(scratch.get(), 0, static_cast<size_t>(unset));
    unset = 0;
    return scratch.get();
  }
};

inline std::vector<Worker> workers(const Executor& executor, int64_t scratch_bytes) {
  std::vector<Worker> all(static_cast<size_t>(executor.workers));
  for (Worker& worker : all) {
    worker.scratch = allocate<char>(scratch_bytes);
    worker.unset = scratch_bytes;
  }
  return all;
}

// Tasks 0 .. count - 1 that may run in any order once the phases before are done. `work(worker, task)` must
// not throw and must outlive the phase; the worker's number selects scratch memory that was allocated before.
struct Phase {
  template <class Work>
  Phase(int64_t count, const Work& work)
      : count(count), work(&work), call([](const void* work, int worker, int64_t task) {
          (*static_cast<const Work*>(work))(worker, task);
        }) {}

  int64_t count;
  const void* work;
  void (*call)(const void*, int, int64_t);
  std::atomic<int64_t> next{0}, done{0};
};

// One parallel region for all phases: tasks go to the threads as they become free, and a phase waits for the
// tasks of the one before, not for threads that the operating system has not yet let run.
inline void run(const Executor& executor, std::deque<Phase>& phases) {
  struct Shared {
    std::deque<Phase>& phases;
    std::atomic<int> worker{0};
  } shared{phases};
  int64_t most = 1;
  for (const Phase& phase : phases) most = phase.count > most ? phase.count : most;
  const int workers = most < executor.workers ? static_cast<int>(most) : executor.workers;
  executor.run(
      workers,
      [](void* context) {
        Shared& shared = *static_cast<Shared*>(context);
        const int worker = shared.worker.fetch_add(1);
        for (Phase& phase : shared.phases) {
          for (int64_t task; (task = phase.next.fetch_add(1)) < phase.count;) {
            phase.call(phase.work, worker, task);
            phase.done.fetch_add(1, std::memory_order_release);
          }
          while (phase.done.load(std::memory_order_acquire) < phase.count) std::this_thread::yield();
        }
      },
      &shared);
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t blocks_of(int64_t tokens) { return (tokens + kTokens - 1) / kTokens; }

// The work of a phase that does `blocks` blocks of every head or image.
template <class Body>
auto by_block(int64_t blocks, const Body& body) {
  return [=](int worker, int64_t task) { body(worker, task / blocks, task % blocks); };
}

// The arrays of a task, one after the other in one piece of memory: glibc keeps what was freed in one piece
// for the next call, where several would be mapped afresh.
template <class T>
struct Memory {
  Buffer<T> buffer;
  int64_t used = 0;

  // Twice: to count, then with the memory there.
  T* numbers(int64_t count) {
    T* p = buffer ? buffer.get() + used : nullptr;
    used += round_up(count, 64 / sizeof(T));
    return p;
  }
  void provide() {
    buffer = allocate<T>(used);
    used = 0;
  }
};

constexpr int64_t kGroupBytes = 16 << 20;  // that a group's heads or images add, if it has more than one

// Calls body(first, count) for groups of `all` heads or images, at most `most` in one; `layout(count)` sets
// the task's arrays for one of them.
template <class T, class Layout, class Body>
void in_groups(int64_t all, int64_t most, Memory<T>& memory, const Layout& layout, const Body& body) {
  const auto size_of = [&](int64_t count) {
    memory.used = 0;
    layout(count);
    return memory.used;
  };
  const int64_t bytes = (size_of(2) - size_of(1)) * static_cast<int64_t>(sizeof(T));
  most = std::min(most, std::max<int64_t>(1, kGroupBytes / std::max<int64_t>(1, bytes)));
  const int64_t groups = (all + most - 1) / most;
  const int64_t largest = (all + groups - 1) / groups;
  size_of(largest);
  memory.provide();
  layout(largest);
  for (int64_t first = 0; first < all; first += largest) body(first, std::min(largest, all - first));
}

}  // namespace depict::cpu
