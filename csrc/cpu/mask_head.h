// Interface of the CPU mask head: plain C++, no torch.
#pragma once

#include <cstdint>

#include "attention.h"

namespace depict::cpu {

// Cosines of patches and class embeddings, LayerNorm over the classes.
template <class T>
struct MaskHeadProblem {
  TokensView<const T> patches, classes;  // (batch, N, 1, dim) and (batch, C, 1, dim)
  const T* weight;                       // (C)
};

template <class T>
struct MaskHeadStatistics {  // contiguous
  T* inv_patches;            // 1 / |patch| (batch, N), 0 for a vector of zeros
  T* inv_classes;            // (batch, C)
  T *mean, *rstd;            // LayerNorm's, (batch, N)
};

// Writes logits (batch, C, N), contiguous, and the statistics. `bias` is (C).
template <class T>
void mask_head_forward(const MaskHeadProblem<T>& problem, const T* bias, double eps, T* logits,
                       const MaskHeadStatistics<T>& statistics, const Executor& executor);

// Of `grad` (batch, C, N), contiguous, the gradient of the logits: the gradients of patches, classes, weight
// (C) and bias (C).
template <class T>
void mask_head_backward(const MaskHeadProblem<T>& problem, const T* grad,
                        const MaskHeadStatistics<const T>& statistics, const TokensView<T>& grad_patches,
                        const TokensView<T>& grad_classes, T* grad_weight, T* grad_bias,
                        const Executor& executor);

}  // namespace depict::cpu
