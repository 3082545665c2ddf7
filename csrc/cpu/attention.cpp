// Scheduling of attention: which blocks meet when.
#include "attention.h"

#include <algorithm>
#include <deque>
#include <utility>
#include <vector>

#include "schedule.h"

namespace depict::cpu {
namespace {

// An even number of parts of about three blocks: with several heads work for many threads in every round, and
// a part's blocks meet others while they are in the cache. The same whatever the batch and the threads, and
// with it the order of every sum.
int64_t parts_for(int64_t blocks) { return blocks < 4 ? 1 : std::min<int64_t>(16, (blocks + 3) / 6 * 2); }

// Consecutive blocks, dealt to a few parts of nearly the same size.
struct Parts {
  int64_t blocks, count;

  explicit Parts(int64_t blocks) : blocks(blocks), count(blocks == 0 ? 0 : parts_for(blocks)) {}
  int64_t begin(int64_t part) const { return part * blocks / count; }
};

// Pairs of parts in rounds, no part twice in a round: what meets in a round adds to places of its own, and
// every place is added to in the order of the rounds, for any number of threads.
using Round = std::vector<std::pair<int64_t, int64_t>>;
using Rounds = std::vector<Round>;

// Every part with itself, then every two parts once, as the players of a tournament.
Rounds tournament(int64_t parts) {
  Rounds rounds(1);
  for (int64_t a = 0; a < parts; ++a) rounds[0].emplace_back(a, a);
  const int64_t players = parts + parts % 2, circle = players - 1;
  for (int64_t r = 0; parts > 1 && r < circle; ++r) {
    Round round;
    for (int64_t k = 0; k < players / 2; ++k) {
      const int64_t a = k == 0 ? circle : (r + k) % circle, b = (r + circle - k) % circle;
      if (a < parts && b < parts) round.emplace_back(std::min(a, b), std::max(a, b));
    }
    rounds.push_back(round);
  }
  return rounds;
}

// Every part of one with every part of the other.
Rounds meetings(int64_t ones, int64_t others) {
  Rounds rounds(static_cast<size_t>(std::max(ones, others)));
  for (int64_t r = 0; r < std::max(ones, others); ++r)
    for (int64_t k = 0; k < std::min(ones, others); ++k) {
      const int64_t shifted = (k + r) % std::max(ones, others);
      rounds[static_cast<size_t>(r)].emplace_back(ones < others ? k : shifted, ones < others ? shifted : k);
    }
  return rounds;
}

// One round as the work of a phase: calls each(head, block, block, scratch) for the pairs of two parts.
template <class T, class Each>
struct RoundWork {
  const Round& round;
  const Parts &rows, &columns;
  std::vector<Worker>& workers;
  const Each& each;
  bool symmetric;

  void operator()(int worker, int64_t index) const {
    const int64_t pairs = static_cast<int64_t>(round.size()), head = index / pairs;
    const auto [a, b] = round[static_cast<size_t>(index % pairs)];
    for (int64_t i = rows.begin(a); i < rows.begin(a + 1); ++i)
      for (int64_t j = symmetric && a == b ? i : columns.begin(b); j < columns.begin(b + 1); ++j)
        each(head, i, j, tiles(workers, worker));
  }

  // Zeroed at first: lanes without a token may be read, but not used.
  static T* tiles(std::vector<Worker>& workers, int worker) {
    return static_cast<T*>(workers[static_cast<size_t>(worker)].zeroed());
  }
};

template <class T>
AttentionTask<T> task_of(const AttentionProblem<T>& problem) {
  AttentionTask<T> task{};
  task.q = problem.q;
  task.w = problem.w;
  task.scale = problem.scale;
  task.q_blocks = blocks_of(problem.q.tokens);
  task.w_blocks = blocks_of(problem.w.tokens);
  return task;
}

template <class T>
constexpr int64_t kScratchBytes = kAttentionTiles * kTokens * kTokens * sizeof(T);

}  // namespace

template <class T>
void attention_forward(const AttentionProblem<T>& problem, const TokensView<T>& out, T* lse,
                       const Executor& executor) {
  const Kernels<T>& k = kernels<T>();
  const int64_t heads = problem.w.batch * problem.w.heads, dim = problem.w.dim;
  if (heads == 0 || problem.q.tokens == 0) return;
  AttentionTask<T> task = task_of(problem);
  const bool pairs = problem.symmetric && problem.scale > 0;
  Buffer<bool> by_row = allocate<bool>(heads);
  if (pairs) task.by_row = by_row.get();
  std::vector<Worker> worker = workers(executor, kScratchBytes<T>);

  const auto pack_keys = by_block(
      task.w_blocks, [&](int, int64_t head, int64_t block) { k.attention_pack_keys(task, head, block); });
  const auto pack_queries = by_block(
      task.q_blocks, [&](int, int64_t head, int64_t block) { k.attention_pack_queries(task, head, block); });
  const auto prepare = [&](int, int64_t head) { k.attention_prepare_pairs(task, head); };
  const auto pair = [&](int64_t head, int64_t i, int64_t j, T* own) {
    if (!task.by_row[head]) k.attention_forward_pair(task, head, i, j, own);
  };
  using Work = RoundWork<T, decltype(pair)>;
  const auto rows = by_block(task.q_blocks, [&](int w, int64_t head, int64_t block) {
    if (!pairs || task.by_row[head]) k.attention_forward_rows(task, head, block, Work::tiles(worker, w));
  });
  const auto finish = by_block(task.q_blocks, [&](int, int64_t head, int64_t block) {
    k.attention_finish(task, head, block, out, lse);
  });

  Memory<T> memory;
  const auto layout = [&](int64_t count) {
    const int64_t queries = count * task.q_blocks * kTokens, keys = count * task.w_blocks * kTokens;
    task.w_panel = memory.numbers(keys * dim);
    task.q_panel = problem.symmetric ? task.w_panel : memory.numbers(queries * dim);
    task.sum_q = memory.numbers(queries * dim);
    task.total = memory.numbers(queries);
    task.shift = memory.numbers(queries);
    if (!pairs) return;
    task.half = memory.numbers(queries);
    task.g = memory.numbers(queries);
    task.top = memory.numbers(count);
  };
  in_groups(heads, heads, memory, layout, [&](int64_t first, int64_t count) {
    task.first_head = first;
    const Parts parts(task.w_blocks);
    const Rounds rounds = pairs ? tournament(parts.count) : Rounds();
    std::deque<Work> work;
    std::deque<Phase> phases;
    phases.emplace_back(count * task.w_blocks, pack_keys);
    phases.emplace_back(count * task.q_blocks, pack_queries);
    phases.emplace_back(pairs ? count : 0, prepare);
    for (const Round& round : rounds) {
      work.push_back({round, parts, parts, worker, pair, true});
      phases.emplace_back(count * static_cast<int64_t>(round.size()), work.back());
    }
    phases.emplace_back(count * task.q_blocks, rows);
    phases.emplace_back(count * task.q_blocks, finish);
    run(executor, phases);
  });
}

template <class T>
void attention_backward(const AttentionProblem<T>& problem, const TokensView<const T>& grad,
                        const TokensView<const T>& out, const T* lse, const TokensView<T>& grad_q,
                        const TokensView<T>& grad_w, const Executor& executor) {
  const Kernels<T>& k = kernels<T>();
  const int64_t heads = problem.w.batch * problem.w.heads, dim = problem.w.dim;
  if (heads == 0 || problem.w.tokens == 0) return;
  AttentionTask<T> task = task_of(problem);
  task.grad = grad;
  task.out = out;
  task.given_lse = lse;
  std::vector<Worker> worker = workers(executor, kScratchBytes<T>);

  const auto pack_keys = by_block(
      task.w_blocks, [&](int, int64_t head, int64_t block) { k.attention_pack_keys(task, head, block); });
  const auto pack_queries = by_block(
      task.q_blocks, [&](int, int64_t head, int64_t block) { k.attention_pack_queries(task, head, block); });
  const auto each = [&](int64_t head, int64_t i, int64_t j, T* own) {
    (problem.symmetric ? k.attention_backward_pair : k.attention_backward_rows)(task, head, i, j, own);
  };
  const auto unpack_w = by_block(task.w_blocks, [&](int, int64_t head, int64_t block) {
    k.attention_unpack(task.sum_w + (head * task.w_blocks + block) * kTokens * dim, grad_w,
                       task.first_head + head, block);
  });
  const auto unpack_q = by_block(task.q_blocks, [&](int, int64_t head, int64_t block) {
    k.attention_unpack(task.sum_q + (head * task.q_blocks + block) * kTokens * dim, grad_q,
                       task.first_head + head, block);
  });

  Memory<T> memory;
  const auto layout = [&](int64_t count) {
    const int64_t queries = count * task.q_blocks * kTokens, keys = count * task.w_blocks * kTokens;
    task.w_panel = memory.numbers(keys * dim);
    task.q_panel = problem.symmetric ? task.w_panel : memory.numbers(queries * dim);
    task.grad_panel = memory.numbers(queries * dim);
    task.sum_w = memory.numbers(keys * dim);
    task.sum_q = problem.symmetric ? task.sum_w : memory.numbers(queries * dim);
    task.lse = memory.numbers(queries);
    task.delta = memory.numbers(queries);
  };
  in_groups(heads, heads, memory, layout, [&](int64_t first, int64_t count) {
    task.first_head = first;
    const Parts rows(task.q_blocks), columns(task.w_blocks);
    const Rounds rounds = problem.symmetric ? tournament(columns.count) : meetings(rows.count, columns.count);
    std::deque<RoundWork<T, decltype(each)>> work;
    std::deque<Phase> phases;
    phases.emplace_back(count * task.w_blocks, pack_keys);
    phases.emplace_back(count * task.q_blocks, pack_queries);
    for (const Round& round : rounds) {
      work.push_back({round, rows, columns, worker, each, problem.symmetric});
      phases.emplace_back(count * static_cast<int64_t>(round.size()), work.back());
    }
    phases.emplace_back(count * task.w_blocks, unpack_w);
    phases.emplace_back(problem.symmetric ? 0 : count * task.q_blocks, unpack_q);
    run(executor, phases);
  });
}

template void attention_forward<float>(const AttentionProblem<float>&, const TokensView<float>&, float*,
                                       const Executor&);
template void attention_forward<double>(const AttentionProblem<double>&, const TokensView<double>&, double*,
                                        const Executor&);
template void attention_backward<float>(const AttentionProblem<float>&, const TokensView<const float>&,
                                        const TokensView<const float>&, const float*,
                                        const TokensView<float>&, const TokensView<float>&, const Executor&);
template void attention_backward<double>(const AttentionProblem<double>&, const TokensView<const double>&,
                                         const TokensView<const double>&, const double*,
                                         const TokensView<double>&, const TokensView<double>&,
                                         const Executor&);

}  // namespace depict::cpu
