// Interface of the CUDA mask head kernels: plain C++, no torch. The formulas are in
// ops/reference/mask_head.py.
#pragma once

#include <cstdint>

#include "types.h"

namespace depict::cuda {

struct Tokens {  // (batch, rows, dim) with unit stride along dim; strides in elements
  const void* data;
  int64_t batch_stride, row_stride;
};

struct MaskHeadShape {
  int64_t batch, patches, classes, dim;
  Type type, parameter_type;  // of patches and classes, and of weight, bias, logits
  bool precise;               // float32: split products into three TF32 ones instead of rounding to TF32
};

// 1/|patch| (batch, patches), 1/|class| (batch, classes), LayerNorm's mean and 1/std (batch, patches).
template <class Float>
struct MaskHeadStatistics {
  Float *inv_x, *inv_q, *mean, *rstd;
};

constexpr int kMaskHeadRows = 64;  // patches of one block
constexpr int kMaskHeadAlign = 8;  // classes: rows of products_grad are padded to a multiple of it

// Scratch memory of the backward.
struct MaskHeadScratch {
  void* products_grad;  // (batch, patches, classes padded) in `type`: the gradient of the products x q^T
  float* along;         // (batch, patches): what times x is to be subtracted from products_grad q
  float* sums;          // (3, classes, batch * blocks of patches): over a block's patches
  float* classes_grad;  // (splits, batch, classes, dim): the classes' gradient from a part of the patches
  float* peaks;         // (batch, blocks of patches): bounds of products_grad; used in float16
  float* scale;         // (batch,): what products_grad, and all that is formed of it, lacks (float16; else 1)
  int64_t splits;
};

// All return null, or what went wrong. logits (batch, classes, patches) and everything else but the tokens is
// contiguous.
const char* mask_head_forward(const MaskHeadShape&, const Tokens& patches, const Tokens& classes,
                              const void* weight, const void* bias, float eps, void* logits,
                              const MaskHeadStatistics<float>&, void* stream);

// grad (batch, classes, patches) and weight are in parameter_type, as are grad_weight and grad_bias.
const char* mask_head_backward(const MaskHeadShape&, const void* grad, const Tokens& patches,
                               const Tokens& classes, const void* weight,
                               const MaskHeadStatistics<const float>&, const MaskHeadScratch&,
                               void* grad_patches, void* grad_classes, void* grad_weight, void* grad_bias,
                               void* stream);

}  // namespace depict::cuda
