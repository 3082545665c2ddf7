// Scheduling: deals bands of cell rows to threads, adds what they found in a fixed order.
//
// Every band writes to a place of its own and the order of additions does not depend on which thread did
// what, so results are bitwise the same for any number of threads.
#include "upsample.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"

namespace depict::cpu {
namespace {

const InstructionSet* const kAll[] = {
#if defined(__x86_64__)
    &kAvx512,
    &kAvx2,
#endif
    &kBaseline,
};

const InstructionSet* best_instruction_set() {
  for (const InstructionSet* set : kAll)
    if (set->supported()) return set;
  return &kBaseline;
}

std::atomic<const InstructionSet*> in_use{nullptr};

const InstructionSet& instruction_set() {
  const InstructionSet* set = in_use.load(std::memory_order_acquire);
  if (!set) {
    set = best_instruction_set();
    in_use.store(set, std::memory_order_release);
  }
  return *set;
}

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

// Tasks 0 .. count - 1 that may run in any order once the phases before are done. `work(worker, task)` must
// not throw; the worker's number selects scratch memory that was allocated before.
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
template <int N>
void run(const Executor& executor, Phase (&phases)[N]) {
  struct Shared {
    Phase* phases;
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
        for (int i = 0; i < N; ++i) {
          Phase& phase = shared.phases[i];
          for (int64_t task; (task = phase.next.fetch_add(1)) < phase.count;) {
            phase.call(phase.work, worker, task);
            phase.done.fetch_add(1, std::memory_order_release);
          }
          while (phase.done.load(std::memory_order_acquire) < phase.count) std::this_thread::yield();
        }
      },
      &shared);
}

constexpr int64_t kScaled = 1 << 15;         // elements of the gradient that a task scales
constexpr int64_t kPrivateCounts = 1 << 17;  // entries of a thread's own confusion matrix, 1 MiB

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Cell rows dealt out together: enough that the rows between bands weigh little, few enough that there is
// work for many threads, and the same for any number of them.
int64_t band_height(int64_t height) { return std::clamp<int64_t>(height / 16, 1, 8); }

// Owns the weight tables of one call.
template <class T>
struct Tables {
  PixelWeights<T> pixel;
  Buffer<T> weights;
  Buffer<double> pair, row;

  Tables(const Axis& y, const Axis& x) {
    const int64_t width = x.out, padded = width + kMaxPixels;
    weights = allocate<T>(2 * padded);
    pair = allocate<double>(2 * padded);
    const auto set = [&](int64_t at, double upper) {
      pair[2 * at] = 1.0 - upper;
      pair[2 * at + 1] = upper;
      weights[at] = static_cast<T>(1.0 - upper);
      weights[padded + at] = static_cast<T>(upper);
    };
    for (int64_t j = -1; j < x.in; ++j)
      for (int64_t at = x.begin(j); at < x.begin(j + 1); ++at) set(at, x.weight(j, at));
    for (int64_t at = width; at < padded; ++at) set(at, pair[2 * width - 1]);
    row = allocate<double>(y.out);
    for (int64_t i = -1; i < y.in; ++i)
      for (int64_t at = y.begin(i); at < y.begin(i + 1); ++at) row[at] = y.weight(i, at);
    pixel = {weights.get(), weights.get() + padded, pair.get(), row.get()};
  }
};

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

std::vector<Worker> workers(const Executor& executor, int64_t scratch_bytes) {
  std::vector<Worker> all(static_cast<size_t>(executor.workers));
  for (Worker& worker : all) {
    worker.scratch = allocate<char>(scratch_bytes);
    worker.unset = scratch_bytes;
  }
  return all;
}

}  // namespace

template <class T>
CrossEntropyResult cross_entropy(const CrossEntropyProblem<T>& problem, const Executor& executor) {
  const LogitsView<T>& view = problem.logits;
  const Kernels<T>& k = kernels<T>();
  CrossEntropyTask<T> task{};
  task.logits = view;
  task.packed = {view.batch,
                 view.classes,
                 round_up(view.classes, kLanePadding),
                 {view.height, problem.height},
                 {view.width, problem.width}};
  const Tables<T> tables(task.packed.y, task.packed.x);
  task.pixel = tables.pixel;
  task.target = problem.target;
  task.load_labels = k.label_loader(problem.target.type);
  task.ignore_index = problem.ignore_index;
  task.weight = problem.weight;
  task.hit = 1.0 - problem.label_smoothing;
  task.smoothing = problem.label_smoothing / static_cast<double>(view.classes);
  task.total_weight = static_cast<double>(view.classes);
  if (problem.weight && task.smoothing != 0) {  // 0 times an infinite sum of weights would be NaN
    task.total_weight = 0;
    for (int64_t c = 0; c < view.classes; ++c) task.total_weight += problem.weight[c];
  }
  task.pixel_gradient = problem.pixel_gradient;
  task.want_loss = problem.want_loss;
  task.pixel_loss = problem.pixel_loss;

  const int64_t cell_rows = view.batch * (view.height + 1);
  task.band = band_height(view.height);
  task.bands = (view.height + task.band) / task.band;  // of h + 1 cell rows
  task.gradient = problem.gradient;
  Buffer<T> edges;
  if (problem.gradient)
    edges = allocate<T>(view.batch * (task.bands - 1) * 2 * view.width * task.packed.lanes);
  task.edges = edges.get();

  std::vector<CrossEntropyPartial> partial(static_cast<size_t>(cell_rows), CrossEntropyPartial{0, 0, -1});
  std::vector<Worker> worker = workers(executor, k.cross_entropy_scratch(task));

  double loss = 0, scale = 1.0;
  int64_t bad = -1;
  const auto sweep = [&](int w, int64_t index) {
    k.cross_entropy(task, index, worker[static_cast<size_t>(w)].zeroed(), partial.data());
  };
  const auto add_up = [&](int, int64_t) {
    double weight = 0;
    for (const CrossEntropyPartial& part : partial) {
      loss += part.loss;
      weight += part.weight;
      if (part.bad >= 0 && (bad < 0 || part.bad < bad)) bad = part.bad;
    }
    // Infinite weights multiply terms of both signs. What they multiply in the end is positive.
    if (std::isinf(weight)) loss = weight;
    if (std::isinf(task.total_weight) && !std::isfinite(loss)) loss = task.total_weight;
    if (!problem.mean) return;
    // Without a valid pixel loss and gradient are 0, also where weights make the sum 0.
    scale = weight == 0 ? 0.0 : 1.0 / weight;
    loss = weight == 0 ? 0.0 : loss / weight;
  };
  const auto gather = [&](int, int64_t index) { k.gather(task, index); };
  const int64_t elements = view.batch * view.classes * view.height * view.width;
  const auto rescale = [&](int, int64_t index) {
    const int64_t first = index * kScaled;
    if (scale != 1.0)
      k.scale(problem.gradient + first, std::min(kScaled, elements - first), static_cast<T>(scale));
  };
  Phase phases[] = {
      Phase(view.batch * task.bands, sweep),
      Phase(problem.gradient ? view.batch * (task.bands - 1) : 0, gather), Phase(1, add_up),
      Phase(problem.gradient && problem.mean ? (elements + kScaled - 1) / kScaled : 0, rescale)};
  run(executor, phases);
  return {loss, bad};
}

template <class T>
int64_t label_map(const LabelProblem<T>& problem, const Executor& executor) {
  const LogitsView<T>& view = problem.logits;
  const Kernels<T>& k = kernels<T>();
  LabelTask<T> task{};
  task.logits = view;
  task.y = {view.height, problem.height};
  task.x = {view.width, problem.width};
  const Tables<T> tables(task.y, task.x);
  task.pixel = tables.pixel;
  task.labels = problem.labels;
  task.label_type = problem.label_type;
  task.target = problem.target;
  if (problem.target) task.load_labels = k.label_loader(problem.target->type);
  task.ignore_index = problem.ignore_index;

  std::vector<Worker> worker = workers(executor, k.label_scratch(task));
  // Small matrices are counted by each thread on its own. A large one is counted into at once by all, after a
  // look at the labels, since nothing may be added where one is bad.
  const int64_t counts = view.classes * view.classes;
  task.shared = problem.confusion && counts > kPrivateCounts;
  if (problem.confusion && !task.shared)
    for (Worker& each : worker) {
      each.confusion = allocate<int64_t>(counts);
      std::memset(each.confusion.get(), 0, static_cast<size_t>(counts) * sizeof(int64_t));
    }
  std::atomic<bool> any_bad{false};
  const auto look = [&](int w, int64_t index) {
    const LabelView& target = *problem.target;
    const int64_t b = index / problem.height, y = index % problem.height;
    int32_t labels[256];
    for (int64_t x = 0; x < problem.width; x += 256) {
      const int64_t first = b * target.stride[0] + y * target.stride[1] + x * target.stride[2];
      const int64_t wrong = task.load_labels(
          static_cast<const char*>(target.data) + first * kIntSize[static_cast<int>(target.type)],
          target.stride[2], std::min<int64_t>(256, problem.width - x), view.classes, task.ignore_index,
          labels);
      if (wrong < 0) continue;
      int64_t& bad = worker[static_cast<size_t>(w)].bad;
      const int64_t pixel = index * problem.width + x + wrong;
      if (bad < 0 || pixel < bad) bad = pixel;
      any_bad.store(true, std::memory_order_relaxed);
      return;
    }
  };
  const auto sweep = [&](int w, int64_t index) {
    Worker& own = worker[static_cast<size_t>(w)];
    if (any_bad.load(std::memory_order_relaxed)) return;  // set in the phase before, if at all
    k.labels(task, index, own.zeroed(), task.shared ? problem.confusion : own.confusion.get(), own.bad);
  };
  Phase phases[] = {Phase(task.shared ? view.batch * problem.height : 0, look),
                    Phase(view.batch * (view.height + 1), sweep)};
  run(executor, phases);
  int64_t bad = -1;
  for (const Worker& each : worker)
    if (each.bad >= 0 && (bad < 0 || each.bad < bad)) bad = each.bad;
  if (problem.confusion && !task.shared && bad < 0)
    for (const Worker& each : worker)
      for (int64_t i = 0; i < counts; ++i) problem.confusion[i] += each.confusion[i];
  return bad;
}

template CrossEntropyResult cross_entropy<float>(const CrossEntropyProblem<float>&, const Executor&);
template CrossEntropyResult cross_entropy<double>(const CrossEntropyProblem<double>&, const Executor&);
template int64_t label_map<float>(const LabelProblem<float>&, const Executor&);
template int64_t label_map<double>(const LabelProblem<double>&, const Executor&);

const char* instruction_sets() {
  static const std::string names = [] {
    std::string all;
    for (const InstructionSet* set : kAll)
      if (set->supported()) all += (all.empty() ? "" : " ") + std::string(set->name);
    return all;
  }();
  return names.c_str();
}

bool use_instruction_set(const char* name) {
  for (const InstructionSet* set : kAll)
    if (set->supported() && std::strcmp(set->name, name) == 0) {
      in_use.store(set, std::memory_order_release);
      return true;
    }
  return false;
}

const char* instruction_set_in_use() { return instruction_set().name; }

}  // namespace depict::cpu
