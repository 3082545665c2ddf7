// Scheduling: deals bands of cell rows to threads, adds what they found in a fixed order.
#include "upsample.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <deque>
#include <vector>

#include "schedule.h"

namespace depict::cpu {
namespace {

constexpr int64_t kScaled = 1 << 15;         // elements of the gradient that a task scales
constexpr int64_t kPrivateCounts = 1 << 17;  // entries of a thread's own confusion matrix, 1 MiB

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
  std::deque<Phase> phases;
  phases.emplace_back(view.batch * task.bands, sweep);
  phases.emplace_back(problem.gradient ? view.batch * (task.bands - 1) : 0, gather);
  phases.emplace_back(1, add_up);
  phases.emplace_back(problem.gradient && problem.mean ? (elements + kScaled - 1) / kScaled : 0, rescale);
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
  std::deque<Phase> phases;
  phases.emplace_back(task.shared ? view.batch * problem.height : 0, look);
  phases.emplace_back(view.batch * (view.height + 1), sweep);
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

}  // namespace depict::cpu
