// The scheduler of emulator.h: fibers that switch where a CUDA thread would wait.
#ifdef DEPICT_EMULATE

#include "emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers on the stack and goes on where the other stack left off.
extern "C" __attribute__((visibility("hidden"))) void depict_switch_stack(void** save, void* to);
asm(R"(
.text
.hidden depict_switch_stack
.globl depict_switch_stack
.type depict_switch_stack, @function
depict_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size depict_switch_stack, .-depict_switch_stack
)");
#endif

namespace depict::emulated {
namespace {

constexpr size_t kStackBytes = 64 << 10;

enum class State { ready, at_warp, at_barrier, done };
enum class Written { unfenced, fenced, published };  // this thread's shared memory, for tensor cores

struct Copy {
  void* to;
  const void* from;
  int bytes, size;
};

struct Fiber {
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
#if defined(__x86_64__)
  void* top = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;
  State state = State::done;
  int exchanges = 0;
  const char* waits_for = "";
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // copies in each committed group, oldest first
  Written written = Written::unfenced;
  std::unique_ptr<Attachment> attachment;
};

struct Warp {
  int arrived = 0;
  Slot slots[2][kWarp];
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<int> order, place;  // the order in which threads are asked, and where each stands in it
  const std::function<void()>* kernel = nullptr;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  int64_t block = 0, blocks = 0;
  int threads = 0, current = 0, live = 0, at_barrier = 0;
  std::string error;
#if defined(__x86_64__)
  void* home = nullptr;
#else
  ucontext_t home;
#endif
  void* home_fake_stack = nullptr;
  const void* home_bottom = nullptr;
  size_t home_size = 0;
};

Machine machine;
std::mutex mutex;
const char* (*handed_to)(const Launch*) = nullptr;

Fiber& here() { return *machine.fibers[machine.current]; }

void finish_switch(void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
  if (!machine.home_bottom) machine.home_bottom = bottom, machine.home_size = size;
#else
  (void)fake_stack;
#endif
}

// From fiber `from` (-1: the launching thread) to fiber `to` (-1: back).
void switch_to(int from, int to) {
#if defined(__SANITIZE_ADDRESS__)
  void** save = from < 0 ? &machine.home_fake_stack : &machine.fibers[from]->fake_stack;
  if (from >= 0 && machine.fibers[from]->state == State::done) save = nullptr;
  if (to < 0)
    __sanitizer_start_switch_fiber(save, machine.home_bottom, machine.home_size);
  else
    __sanitizer_start_switch_fiber(save, machine.fibers[to]->stack.get(), kStackBytes);
#endif
  if (to >= 0) machine.current = to;
#if defined(__x86_64__)
  depict_switch_stack(from < 0 ? &machine.home : &machine.fibers[from]->top,
                      to < 0 ? machine.home : machine.fibers[to]->top);
#else
  swapcontext(from < 0 ? &machine.home : &machine.fibers[from]->context,
              to < 0 ? &machine.home : &machine.fibers[to]->context);
#endif
  finish_switch(from < 0 ? machine.home_fake_stack : machine.fibers[from]->fake_stack);
}

// Goes to the next thread that can run; home when all are done or none can.
void yield() {
  const int from = machine.current, threads = machine.threads;
  for (int step = 1, at = machine.place[from]; step <= threads; ++step) {
    at = at + 1 < threads ? at + 1 : 0;
    const int to = machine.order[at];
    if (machine.fibers[to]->state != State::ready) continue;
    if (to != from) switch_to(from, to);
    return;
  }
  if (machine.live > 0 && machine.error.empty()) {
    machine.error = "the kernel hangs:";
    int said = 0;
    for (int i = 0; i < threads && said < 4; ++i)
      if (machine.fibers[i]->state != State::done) {
        machine.error += " thread " + std::to_string(i) + " waits at " + machine.fibers[i]->waits_for + ";";
        ++said;
      }
  }
  switch_to(from, -1);
}

void leave_barrier() {
  for (auto& fiber : machine.fibers)
    if (fiber->state == State::at_barrier) fiber->state = State::ready;
  machine.at_barrier = 0;
}

void enter_fiber() {
  finish_switch(nullptr);
  (*machine.kernel)();
  Fiber& fiber = here();
  if (!fiber.copies.empty())
    machine.error = "a thread ended with asynchronous copies that it had not waited for";
  if (fiber.attachment && machine.error.empty())
    if (const char* what = fiber.attachment->unfinished()) machine.error = what;
  fiber.state = State::done;
  --machine.live;
  if (machine.live > 0 && machine.at_barrier == machine.live) leave_barrier();
  yield();
  std::abort();  // a finished fiber is never resumed
}

void prepare(Fiber& fiber) {
  fiber.state = State::ready;
  fiber.exchanges = 0;
  fiber.copies.clear();
  fiber.groups.clear();
  fiber.written = Written::unfenced;
  fiber.attachment.reset();
#if defined(__SANITIZE_ADDRESS__)
  // A finished fiber never returns: what its last frames marked as out of bounds still is.
  __asan_unpoison_memory_region(fiber.stack.get(), kStackBytes);
#endif
#if defined(__x86_64__)
  auto address = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) / 64 * 64;
  void** top = reinterpret_cast<void**>(address);
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&enter_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.top = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter_fiber, 0);
#endif
}

}  // namespace

int thread_index() { return machine.current; }
int64_t block_index() { return machine.block; }
int thread_count() { return machine.threads; }
int64_t block_count() { return machine.blocks; }
unsigned char* shared_memory() { return machine.shared; }
size_t shared_bytes() { return machine.shared_bytes; }
std::unique_ptr<Attachment>& attachment(int thread) { return machine.fibers[thread]->attachment; }
void fence_tensor_core_reads() {
  if (here().written == Written::unfenced) here().written = Written::fenced;
}
bool fenced_and_published() { return here().written == Written::published; }

void fail(const char* what) {
  if (machine.error.empty()) machine.error = what;
  switch_to(machine.current, -1);
  std::abort();
}

void barrier() {
  if (here().written == Written::fenced) here().written = Written::published;
  if (++machine.at_barrier == machine.live) {
    leave_barrier();
    // This thread goes on first or last, as the order has it.
    if (machine.place[machine.current] % 2) return;
    yield();
    return;
  }
  here().state = State::at_barrier;
  here().waits_for = "barrier";
  yield();
}

const Slot* exchange(const void* in, int bytes, const char* what) {
  const int lane = machine.current % kWarp;
  const int first = machine.current - lane;
  Warp& warp = machine.warps[machine.current / kWarp];
  Fiber& fiber = here();
  // Two sets of slots: nobody writes the other one before everybody has read it.
  Slot* slots = warp.slots[fiber.exchanges++ & 1];
  std::memset(slots[lane].bytes, 0xff, kSlotBytes);
  if (bytes) std::memcpy(slots[lane].bytes, in, bytes);
  fiber.waits_for = what;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    for (int i = 0; i < kWarp; ++i) {
      Fiber& other = *machine.fibers[first + i];
      if (other.waits_for != what) {
        static std::string text;
        text = std::string("lanes of one warp do different things: ") + what + " and " + other.waits_for;
        fail(text.c_str());
      }
      other.state = State::ready;
    }
    return slots;
  }
  fiber.state = State::at_warp;
  yield();
  return slots;
}

void copy_async(void* to, const void* from, int bytes, int size) {
  if (size != 4 && size != 8 && size != 16) fail("copy_async moves 4, 8 or 16 bytes");
  if (reinterpret_cast<uintptr_t>(to) % size || reinterpret_cast<uintptr_t>(from) % size)
    fail("copy_async: an address is not aligned to its size");
  here().copies.push_back({to, from, bytes, size});
}

void commit_copies() {
  Fiber& fiber = here();
  size_t closed = 0;
  for (size_t count : fiber.groups) closed += count;
  fiber.groups.push_back(fiber.copies.size() - closed);
}

void wait_for_copies(int groups_left) {
  Fiber& fiber = here();
  fiber.written = Written::unfenced;
  while (static_cast<int>(fiber.groups.size()) > groups_left) {
    const size_t count = fiber.groups.front();
    for (size_t i = 0; i < count; ++i) {
      const Copy& copy = fiber.copies[i];
      std::memset(copy.to, 0, copy.size);
      if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<std::ptrdiff_t>(count));
    fiber.groups.erase(fiber.groups.begin());
  }
}

const char* run(const Launch& launch, const std::function<void()>& kernel) {
  if (handed_to) return handed_to(&launch);
  const auto [blocks, threads, shared_bytes] = std::tuple(launch.blocks, launch.threads, launch.shared_bytes);
  static std::string error;
  const std::lock_guard<std::mutex> lock(mutex);
  error.clear();
  if (threads < kWarp || threads > 1024 || threads % kWarp) return "a block must have 1 to 32 whole warps";
  if (shared_bytes > 227 * 1024) return "a block has at most 227 KiB of shared memory";
  const char* text = std::getenv("DEPICT_EMULATE_SEED");
  const unsigned seed = text ? static_cast<unsigned>(std::strtoul(text, nullptr, 10)) : 0;

  machine.kernel = &kernel;
  machine.threads = threads;
  machine.blocks = blocks;
  machine.error.clear();
  while (static_cast<int>(machine.fibers.size()) < threads)
    machine.fibers.push_back(std::make_unique<Fiber>());
  for (size_t i = threads; i < machine.fibers.size(); ++i) machine.fibers[i]->state = State::done;
  machine.warps.assign(threads / kWarp, Warp{});
  machine.order.resize(threads);
  machine.place.resize(threads);
  std::iota(machine.order.begin(), machine.order.end(), 0);
  std::mt19937 random(seed);
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, shared_bytes ? shared_bytes : 1)) return "no memory for shared memory";
  machine.shared = static_cast<unsigned char*>(memory);
  machine.shared_bytes = shared_bytes;

  for (int64_t i = 0; i < blocks && machine.error.empty(); ++i) {
    machine.block = seed % 2 ? blocks - 1 - i : i;
    if (seed) std::shuffle(machine.order.begin(), machine.order.end(), random);
    for (int k = 0; k < threads; ++k) machine.place[machine.order[k]] = k;
    if (shared_bytes) std::memset(machine.shared, 0xff, shared_bytes);
    for (int k = 0; k < threads; ++k) prepare(*machine.fibers[k]);
    for (Warp& warp : machine.warps) warp.arrived = 0;
    machine.live = threads;
    machine.at_barrier = 0;
    switch_to(-1, machine.order[0]);
  }
  std::free(memory);
  machine.shared = nullptr;
  if (machine.error.empty()) return nullptr;
  error = machine.error;
  return error.c_str();
}

}  // namespace depict::emulated

// Launches go to `other` instead, which returns an error or null: tests execute the compiled kernels so.
extern "C" __attribute__((visibility("default"))) void depict_hand_launches_to(
    const char* (*other)(const depict::emulated::Launch*)) {
  depict::emulated::handed_to = other;
}

#endif
