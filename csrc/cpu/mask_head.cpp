// Scheduling of the mask head.
#include "mask_head.h"

#include <deque>
#include <vector>

#include "schedule.h"

namespace depict::cpu {
namespace {

template <class T>
MaskHeadTask<T> task_of(const MaskHeadProblem<T>& problem) {
  MaskHeadTask<T> task{};
  task.patches = problem.patches;
  task.classes = problem.classes;
  task.weight = problem.weight;
  task.patch_blocks = blocks_of(problem.patches.tokens);
  task.class_blocks = blocks_of(problem.classes.tokens);
  return task;
}

// Images of a group: enough for every thread, no more, since what one image leaves in the cache serves the
// next.
template <class T>
int64_t images_for(const MaskHeadTask<T>& task, const Executor& executor) {
  constexpr int64_t kTasks = 4;  // of each thread
  return (kTasks * executor.workers + task.patch_blocks - 1) / task.patch_blocks;
}

// The sums of all blocks in their order.
template <class T>
void add_up(const double* sums, int64_t blocks, int64_t classes, T* grad_weight, T* grad_bias) {
  std::vector<double> total(static_cast<size_t>(2 * classes));
  for (int64_t i = 0; i < blocks; ++i)
    for (int64_t c = 0; c < 2 * classes; ++c) total[static_cast<size_t>(c)] += sums[i * 2 * classes + c];
  for (int64_t c = 0; c < classes; ++c) {
    grad_weight[c] = static_cast<T>(total[static_cast<size_t>(c)]);
    grad_bias[c] = static_cast<T>(total[static_cast<size_t>(classes + c)]);
  }
}

}  // namespace

template <class T>
void mask_head_forward(const MaskHeadProblem<T>& problem, const T* bias, double eps, T* logits,
                       const MaskHeadStatistics<T>& statistics, const Executor& executor) {
  const Kernels<T>& k = kernels<T>();
  MaskHeadTask<T> task = task_of(problem);
  task.bias = bias;
  task.eps = eps;
  task.logits = logits;
  task.made = statistics;
  const int64_t scratch = round_up(k.mask_head_scratch(task), 64 / sizeof(T));
  T* scratches;  // of every thread

  const auto pack = by_block(task.class_blocks, [&](int, int64_t image, int64_t block) {
    k.mask_head_pack_classes(task, image, block);
  });
  const auto forward = by_block(task.patch_blocks, [&](int w, int64_t image, int64_t block) {
    k.mask_head_forward(task, image, block, scratches + w * scratch);
  });
  Memory<T> memory;
  const auto layout = [&](int64_t count) {
    scratches = memory.numbers(executor.workers * scratch);
    task.class_panel = memory.numbers(count * task.class_blocks * kTokens * task.classes.dim);
  };
  in_groups(problem.patches.batch, images_for(task, executor), memory, layout,
            [&](int64_t first, int64_t count) {
              task.first_image = first;
              std::deque<Phase> phases;
              phases.emplace_back(count * task.class_blocks, pack);
              phases.emplace_back(count * task.patch_blocks, forward);
              run(executor, phases);
            });
}

template <class T>
void mask_head_backward(const MaskHeadProblem<T>& problem, const T* grad,
                        const MaskHeadStatistics<const T>& statistics, const TokensView<T>& grad_patches,
                        const TokensView<T>& grad_classes, T* grad_weight, T* grad_bias,
                        const Executor& executor) {
  const Kernels<T>& k = kernels<T>();
  const int64_t dim = problem.patches.dim, batch = problem.patches.batch;
  MaskHeadTask<T> task = task_of(problem);
  task.grad = grad;
  task.given = statistics;
  const int64_t blocks = batch * task.patch_blocks, classes = problem.classes.tokens;
  Buffer<double> sums = allocate<double>(blocks * 2 * classes);
  task.sums = sums.get();
  const int64_t parts = (dim + kMaskHeadWidth - 1) / kMaskHeadWidth;
  const int64_t scratch = round_up(k.mask_head_scratch(task), 64 / sizeof(T));
  T* scratches;  // of every thread

  const auto pack = by_block(task.class_blocks, [&](int, int64_t image, int64_t block) {
    k.mask_head_pack_classes(task, image, block);
  });
  const auto backward = by_block(task.patch_blocks, [&](int w, int64_t image, int64_t block) {
    k.mask_head_backward(task, image, block, grad_patches, scratches + w * scratch);
  });
  const auto sum = by_block(task.class_blocks * parts, [&](int, int64_t image, int64_t i) {
    k.mask_head_sum_classes(task, image, i / parts, i % parts);
  });
  const auto finish = by_block(task.class_blocks, [&](int, int64_t image, int64_t block) {
    k.mask_head_finish_classes(task, image, block, grad_classes);
  });
  Memory<T> memory;
  const auto layout = [&](int64_t count) {
    scratches = memory.numbers(executor.workers * scratch);
    task.patch_panel = memory.numbers(count * task.patch_blocks * kTokens * dim);
    task.class_panel = memory.numbers(count * task.class_blocks * kTokens * dim);
    task.sum_classes = memory.numbers(count * task.class_blocks * kTokens * dim);
    task.turned = memory.numbers(count * task.patch_blocks * task.class_blocks * kTokens * kTokens);
  };
  in_groups(batch, images_for(task, executor), memory, layout, [&](int64_t first, int64_t count) {
    task.first_image = first;
    std::deque<Phase> phases;
    phases.emplace_back(count * task.class_blocks, pack);
    phases.emplace_back(count * task.patch_blocks, backward);
    phases.emplace_back(count * task.class_blocks * parts, sum);
    phases.emplace_back(count * task.class_blocks, finish);
    run(executor, phases);
  });
  add_up(sums.get(), blocks, classes, grad_weight, grad_bias);
}

template void mask_head_forward<float>(const MaskHeadProblem<float>&, const float*, double, float*,
                                       const MaskHeadStatistics<float>&, const Executor&);
template void mask_head_forward<double>(const MaskHeadProblem<double>&, const double*, double, double*,
                                        const MaskHeadStatistics<double>&, const Executor&);
template void mask_head_backward<float>(const MaskHeadProblem<float>&, const float*,
                                        const MaskHeadStatistics<const float>&, const TokensView<float>&,
                                        const TokensView<float>&, float*, float*, const Executor&);
template void mask_head_backward<double>(const MaskHeadProblem<double>&, const double*,
                                         const MaskHeadStatistics<const double>&, const TokensView<double>&,
                                         const TokensView<double>&, double*, double*, const Executor&);

}  // namespace depict::cpu
