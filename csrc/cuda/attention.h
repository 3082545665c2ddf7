// Interface of the CUDA attention kernels: plain C++, no torch.
#pragma once

#include <cstdint>

#include "types.h"

namespace depict::cuda {

constexpr int kMaxHeadDim = 128, kMaxRows = 1 << 30;

struct Rows {  // (batch, rows, heads, dim) with unit stride along dim; strides in elements
  const void* data;
  int64_t batch_stride, row_stride, head_stride;
};

struct AttentionShape {
  int64_t batch, heads, queries, keys;
  int dim;
  Type type;
  float scale;   // on the scores
  bool precise;  // float32: split products into three TF32 ones instead of rounding to TF32
};

// How products are computed: by warps, on any GPU that is supported; or by warpgroups of four warps, in
// 16-bit types on compute capability 9.0, which is refused elsewhere.
enum class Variant { mma, wgmma };

// All return null, or what went wrong. Outputs are contiguous (batch, rows, heads, dim).

// out (batch, queries, heads, dim); lse (batch, heads, queries): natural log-sum-exp of the scaled scores.
const char* attention_forward(const AttentionShape&, Variant, const Rows& q, const Rows& w, void* out,
                              float* lse, void* stream);

// delta (batch, heads, queries) = scale * sum over dim of grad * out; out is contiguous.
const char* attention_delta(const AttentionShape&, const Rows& grad, const void* out, float* delta,
                            void* stream);

// The gradient of x, whose rows are queries, keys and values at once, only queries, or only keys and values;
// y are the rows on the other side (x itself in self-attention). grad, lse and delta belong to the queries'
// rows. Variant::wgmma is for Role::self.
enum class Role { self, query, key };
const char* attention_backward(const AttentionShape&, Variant, Role, const Rows& x, const Rows& y,
                               const Rows& grad, const float* lse, const float* delta, void* out,
                               void* stream);

}  // namespace depict::cuda
