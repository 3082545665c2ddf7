// What the attention kernels are launched with: their arguments, and the choice of template arguments.
#pragma once

#include <cmath>

#include "attention.h"
#include "device.h"

namespace depict::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The largest copy, up to 16 bytes, that every row of the tensor allows.
inline int vector_bytes(const Rows& tensor, const AttentionShape& s, int element) {
  for (int bytes = 16; bytes > 2; bytes /= 2) {
    const auto divides = [&](int64_t stride, int64_t size) {
      return size <= 1 || stride * element % bytes == 0;
    };
    // Copies of no bytes name the rows past the last one, so a single row's stride counts.
    if (s.dim * element % bytes == 0 && reinterpret_cast<uintptr_t>(tensor.data) % bytes == 0 &&
        divides(tensor.batch_stride, s.batch) && tensor.row_stride * element % bytes == 0 &&
        divides(tensor.head_stride, s.heads))
      return bytes;
  }
  return 2;
}

// Calls run(dim), the padded head dimension in a Dim.
template <int D>
struct Dim {
  static constexpr int value = D;
};
template <class Run>
const char* with_dim(int dim, const Run& run) {
  if (dim <= 56) return run(Dim<56>{});
  if (dim <= 104) return run(Dim<104>{});
  return run(Dim<128>{});
}
struct ForwardArguments {
  Rows q, w;
  void* out;
  float* lse;
  int64_t queries, keys, heads, blocks;  // blocks of queries
  int dim, q_vector, w_vector;
  float scale;  // its magnitude, times log2(e)
  bool negative, precise;
};

inline ForwardArguments forward_arguments(const AttentionShape& s, const Rows& q, const Rows& w, void* out,
                                          float* lse, int rows_per_block, int element) {
  // Where the scale is 0 masked scores are still infinite and must stay so.
  const float scale = s.scale == 0 ? 1e-37f : std::fabs(s.scale) * kLog2E;
  return {q,
          w,
          out,
          lse,
          s.queries,
          s.keys,
          s.heads,
          (s.queries + rows_per_block - 1) / rows_per_block,
          s.dim,
          vector_bytes(q, s, element),
          vector_bytes(w, s, element),
          scale,
          s.scale < 0,
          s.precise};
}

struct BackwardArguments {
  Rows x, y, grad;
  const float *lse, *delta;  // (batch, heads, rows of grad)
  void* out;
  int64_t x_rows, y_rows, heads, blocks;
  int dim, x_vector, y_vector, grad_vector;
  float scale;
  bool precise;
};

inline BackwardArguments backward_arguments(const AttentionShape& s, const Rows& x, const Rows& y,
                                            const Rows& grad, const float* lse, const float* delta, void* out,
                                            int64_t x_rows, int64_t y_rows, int rows_per_block, int element) {
  return {x,
          y,
          grad,
          lse,
          delta,
          out,
          x_rows,
          y_rows,
          s.heads,
          (x_rows + rows_per_block - 1) / rows_per_block,
          s.dim,
          vector_bytes(x, s, element),
          vector_bytes(y, s, element),
          vector_bytes(grad, s, element),
          s.scale,
          s.precise};
}

// The wgmma variants (attention_sm90.cu). Null where this build and this GPU can run them, or why not.
const char* why_not_wgmma(const AttentionShape& s);
const char* attention_forward_wgmma(const AttentionShape&, const Rows& q, const Rows& w, void* out,
                                    float* lse, void* stream);
const char* self_attention_backward_wgmma(const AttentionShape&, const Rows& x, const Rows& grad,
                                          const float* lse, const float* delta, void* out, void* stream);

}  // namespace depict::cuda
