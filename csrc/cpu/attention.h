// Interface of the CPU attention operators: plain C++, no torch.
#pragma once

#include <cstdint>

#include "upsample.h"

namespace depict::cpu {

template <class T>
struct TokensView {  // (batch, tokens, heads, dim): strides of the first three in elements, the last is 1
  T* data;
  int64_t batch, tokens, heads, dim;
  int64_t stride[3];
};

// softmax(scale q w^T) w for every image and head. `symmetric` says that q is w.
template <class T>
struct AttentionProblem {
  TokensView<const T> q, w;
  bool symmetric;
  T scale;
};

// Writes the output (batch, queries, heads, dim) and the scores' log-sum-exp (batch, heads, queries),
// contiguous.
template <class T>
void attention_forward(const AttentionProblem<T>& problem, const TokensView<T>& out, T* lse,
                       const Executor& executor);

// Of `grad`, the gradient of `out`: the gradient of w, and of q unless the problem is symmetric.
template <class T>
void attention_backward(const AttentionProblem<T>& problem, const TokensView<const T>& grad,
                        const TokensView<const T>& out, const T* lse, const TokensView<T>& grad_q,
                        const TokensView<T>& grad_w, const Executor& executor);

}  // namespace depict::cpu
