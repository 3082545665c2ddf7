// The mask head of blocks of kTokens patches, in panels (product.h): the lanes of every vector are patches,
// so that LayerNorm over the classes needs no step across lanes and a row of logits is written as it is.
#pragma once

namespace depict::cpu::DEPICT_ISA {

constexpr int kDepth = 128;  // numbers of an embedding summed before they are added to the others: loses less

template <class Wide, class T>
DEPICT_INLINE Vec<Wide> widened(const T* p) {
  if constexpr (sizeof(Wide) == sizeof(T))
    return load<T>(p);
  else
    return load_wide(p);
}

// The dot product of every token of one panel with the same of another, in vectors of Wide.
template <class Wide, class T>
void dot_products(const T* a, const T* b, int64_t dim, Wide* to) {
  constexpr int L = Simd<Wide>::lanes, kTogether = 4;  // sums that do not wait for each other
  for (int t = 0; t < kTokens; t += kTogether * L) {
    Vec<Wide> sum[kTogether] = {};
    for (int64_t first = 0; first < dim; first += kDepth) {
      const int64_t end = dim < first + kDepth ? dim : first + kDepth;
      Vec<Wide> part[kTogether] = {};
      for (int64_t d = first; d < end; ++d) {
        DEPICT_UNROLL
        for (int v = 0; v < kTogether; ++v) {
          const int64_t at = d * kTokens + t + v * L;
          part[v] += widened<Wide>(a + at) * widened<Wide>(b + at);
        }
      }
      for (int v = 0; v < kTogether; ++v) sum[v] += part[v];
    }
    for (int v = 0; v < kTogether; ++v) store<Wide>(to + t + v * L, sum[v]);
  }
}

// 1 / |x| of every token of a panel, 0 for a vector of zeros. In double where its squares could overflow or
// vanish.
template <class T>
void inverse_norms(const T* panel, int tokens, int64_t dim, T* inverse) {
  alignas(64) double squares[kTokens];
  alignas(64) T narrow[kTokens];
  const auto usual = [&](int t) { return narrow[t] > T(1e-25) && narrow[t] < T(1e35); };
  dot_products<T>(panel, panel, dim, narrow);
  bool all = true;
  for (int t = 0; t < tokens; ++t) all &= usual(t);
  if (!all) dot_products<double>(panel, panel, dim, squares);
  for (int t = 0; t < kTokens; ++t)
    if (all || usual(t)) squares[t] = static_cast<double>(narrow[t]);
  for (int t = 0; t < kTokens; ++t) {
    const double inverted = 1 / __builtin_sqrt(squares[t]);
    inverse[t] = static_cast<T>(squares[t] > 0 ? inverted : 0);
  }
}

// A block of unit vectors. `given` are the inverse norms of forward, else null, and then `made` is written.
template <class T>
void pack_unit(const TokensView<const T>& view, int64_t image, int64_t block, T* panel, const T* given,
               T* made, T* inverse) {
  const int tokens = tokens_in(view.tokens, block);
  const int64_t at = image * view.tokens + block * kTokens;
  pack_tokens<T>(view, image, block, panel);
  if (given)
    for (int t = 0; t < kTokens; ++t) inverse[t] = t < tokens ? given[at + t] : T(0);
  else
    inverse_norms<T>(panel, tokens, view.dim, inverse);
  if (made)
    for (int t = 0; t < tokens; ++t) made[at + t] = inverse[t];
  for (int64_t d = 0; d < view.dim; ++d)
    for (int v = 0; v < kTokens; v += Simd<T>::lanes) {
      T* x = panel + d * kTokens + v;
      store<T>(x, load<T>(x) * load<T>(inverse + v));
    }
}

// The gradient of vectors from `sum`, that of the unit vectors: the part orthogonal to them, over the norms.
// That of patches has next to nothing along them in theory, since LayerNorm ignores the length of what it
// gets but for eps; what rounding leaves there has to go.
template <class T>
void unpack_orthogonal(const T* sum, const T* unit, const T* inverse, const TokensView<T>& to, int64_t image,
                       int64_t block) {
  alignas(64) T along[kTokens];
  dot_products<T>(sum, unit, to.dim, along);
  unpack_tokens<T>(to, image, block, [&](int d, int t) {
    const int at = d * kTokens + t;
    return (load<T>(sum + at) - load<T>(unit + at) * load<T>(along + t)) * load<T>(inverse + t);
  });
}

template <class T>
void mask_head_pack_classes(const MaskHeadTask<T>& task, int64_t image, int64_t block) {
  alignas(64) T inverse[kTokens];
  pack_unit<T>(task.classes, task.first_image + image, block,
               task.class_panel + (image * task.class_blocks + block) * kTokens * task.classes.dim,
               task.given.inv_classes, task.made.inv_classes, inverse);
}

// Of one block of patches, in this order in a task's scratch: the patches' panel, or sums for it; the cosines
// (class blocks, kTokens classes, kTokens patches); the same of their gradient.
template <class T>
int64_t mask_head_scratch(const MaskHeadTask<T>& task) {
  return kTokens * task.patches.dim + task.class_blocks * kTile * (task.grad ? 2 : 1);
}

// Rows are classes, one after the other.
template <class T>
void cosines(const MaskHeadTask<T>& task, int64_t image, const T* unit, int lanes, T* to) {
  const int64_t dim = task.patches.dim;
  for (int64_t j = 0; j < task.class_blocks; ++j) {
    const T* classes = task.class_panel + (image * task.class_blocks + j) * kTokens * dim;
    const int rows = tokens_in(task.classes.tokens, j);
    int64_t d = 0;
    do {
      const int count = static_cast<int>(dim - d < kDepth ? dim - d : kDepth);
      const T *a = classes + d * kTokens, *b = unit + d * kTokens;
      if (d == 0)
        product<T, 1, kTokens, false>(a, b, to + j * kTile, rows, lanes, count, T(1));
      else
        product<T, 1, kTokens, true>(a, b, to + j * kTile, rows, lanes, count, T(1));
      d += count;
    } while (d < dim);
  }
}

template <class T>
void mask_head_forward(const MaskHeadTask<T>& task, int64_t image, int64_t block, T* scratch) {
  constexpr int L = Simd<T>::lanes;
  const int64_t dim = task.patches.dim, classes = task.classes.tokens, patches = task.patches.tokens;
  const int count = tokens_in(patches, block), lanes = lanes_in<T>(patches, block);
  const int64_t of_all = task.first_image + image, at = of_all * patches + block * kTokens;
  T *unit = scratch, *m = unit + kTokens * dim;
  alignas(64) T inverse[kTokens];
  pack_unit<T>(task.patches, of_all, block, unit, nullptr, task.made.inv_patches, inverse);
  cosines(task, image, unit, lanes, m);

  for (int v = 0; v < count; v += L) {
    Vec<T> sum = {}, rest = {}, squares = {};
    for (int64_t c = 0; c < classes; ++c) sum += load<T>(m + c * kTokens + v);
    Vec<T> mean = sum / static_cast<T>(classes);
    for (int64_t c = 0; c < classes; ++c) {
      const Vec<T> x = load<T>(m + c * kTokens + v) - mean;
      rest += x;
      squares += x * x;
    }
    // What the first mean lost in rounding, which every class would share.
    rest /= static_cast<T>(classes);
    mean += rest;
    alignas(64) T variance[L], rstd[L], means[L];
    store<T>(variance, squares / static_cast<T>(classes) - rest * rest);
    store<T>(means, mean);
    for (int k = 0; k < L; ++k)
      rstd[k] = static_cast<T>(1 / __builtin_sqrt(static_cast<double>(variance[k]) + task.eps));
    const int exist = count - v < L ? count - v : L;
    for (int k = 0; k < exist; ++k) {
      task.made.mean[at + v + k] = means[k];
      task.made.rstd[at + v + k] = rstd[k];
    }
    const Vec<T> factor = load<T>(rstd);
    T* to = task.logits + of_all * classes * patches + block * kTokens + v;
    for (int64_t c = 0; c < classes; ++c, to += patches) {
      const Vec<T> y =
          (load<T>(m + c * kTokens + v) - mean) * factor * task.weight[c] + splat<T>(task.bias[c]);
      if (exist == L) {
        store_anywhere<T>(to, y);
      } else {
        alignas(64) T last[L];
        store<T>(last, y);
        for (int k = 0; k < exist; ++k) to[k] = last[k];
      }
    }
  }
}

// With z the normalised cosines, g the gradient of the logits and h = weight g, that of the cosines is
// rstd (h - mean h - z mean(z h)), means over the classes. Patches that do not exist have g = rstd = 0.
template <class T>
void mask_head_backward(const MaskHeadTask<T>& task, int64_t image, int64_t block,
                        const TokensView<T>& grad_patches, T* scratch) {
  constexpr int L = Simd<T>::lanes, kVectors = kTokens / L;
  const int64_t dim = task.patches.dim, classes = task.classes.tokens, patches = task.patches.tokens;
  const int count = tokens_in(patches, block), lanes = lanes_in<T>(patches, block);
  const int64_t of_all = task.first_image + image, at = of_all * patches + block * kTokens;
  T *sum = scratch, *m = sum + kTokens * dim, *g = m + task.class_blocks * kTile;
  T* unit = task.patch_panel + (image * task.patch_blocks + block) * kTokens * dim;
  alignas(64) T inverse[kTokens], mean[kTokens], rstd[kTokens];
  pack_unit<T>(task.patches, of_all, block, unit, task.given.inv_patches, nullptr, inverse);
  cosines(task, image, unit, lanes, m);
  for (int t = 0; t < kTokens; ++t) {
    mean[t] = t < count ? task.given.mean[at + t] : T(0);
    rstd[t] = t < count ? task.given.rstd[at + t] : T(0);
  }

  Vec<T> of_h[kVectors] = {}, of_zh[kVectors] = {};  // sums over the classes
  double* sums = task.sums + (of_all * task.patch_blocks + block) * 2 * classes;
  const T* from = task.grad + of_all * classes * patches + block * kTokens;
  for (int64_t c0 = 0; c0 < classes; c0 += L) {
    const int rows = classes - c0 < L ? static_cast<int>(classes - c0) : L;
    Vec<T> weight[L] = {}, bias[L] = {};
    for (int r = 0; r < rows; ++r, from += patches) {
      T *cosine = m + (c0 + r) * kTokens, *row = g + (c0 + r) * kTokens;
      const T *x = from, factor = task.weight[c0 + r];
      if (count < kTokens) {
        __builtin_memset(row, 0, sizeof(T) * kTokens);
        __builtin_memcpy(row, from, sizeof(T) * static_cast<size_t>(count));
        for (int t = lanes; t < kTokens; ++t) cosine[t] = 0;
        x = row;
      }
      Vec<T> of_weight = {}, of_bias = {};
      DEPICT_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        const Vec<T> grad = load_anywhere<T>(x + i * L), h = grad * factor;
        const Vec<T> z = (load<T>(cosine + i * L) - load<T>(mean + i * L)) * load<T>(rstd + i * L);
        store<T>(cosine + i * L, z);
        store<T>(row + i * L, h);
        of_weight += grad * z;
        of_bias += grad;
        of_h[i] += h;
        of_zh[i] += h * z;
      }
      weight[r] = of_weight;
      bias[r] = of_bias;
    }
    alignas(64) T total[2][L];
    reduce_lanes<T, Add, L>(weight, total[0]);
    reduce_lanes<T, Add, L>(bias, total[1]);
    for (int r = 0; r < rows; ++r) {
      sums[c0 + r] = static_cast<double>(total[0][r]);
      sums[classes + c0 + r] = static_cast<double>(total[1][r]);
    }
  }
  for (int i = 0; i < kVectors; ++i) {
    of_h[i] /= static_cast<T>(classes);
    of_zh[i] /= static_cast<T>(classes);
  }
  for (int64_t c = 0; c < classes; ++c) {
    DEPICT_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      T* h = g + c * kTokens + i * L;
      const Vec<T> z = load<T>(m + c * kTokens + i * L);
      store<T>(h, load<T>(rstd + i * L) * (load<T>(h) - of_h[i] - z * of_zh[i]));
    }
  }

  __builtin_memset(sum, 0, sizeof(T) * kTokens * static_cast<size_t>(dim));
  for (int64_t j = 0; j < task.class_blocks; ++j) {
    const int rows = tokens_in(classes, j), padded = lanes_in<T>(classes, j);
    T* tile = g + j * kTile;
    add_weighted(task.class_panel + (image * task.class_blocks + j) * kTokens * dim, rows, tile, lanes,
                 static_cast<int>(dim), sum);
    __builtin_memset(tile + rows * kTokens, 0, sizeof(T) * static_cast<size_t>((padded - rows) * kTokens));
    transpose_tile(tile, padded, lanes,
                   task.turned + ((image * task.patch_blocks + block) * task.class_blocks + j) * kTile);
  }
  unpack_orthogonal<T>(sum, unit, inverse, grad_patches, of_all, block);
}

template <class T>
void mask_head_sum_classes(const MaskHeadTask<T>& task, int64_t image, int64_t block, int64_t part) {
  const int64_t dim = task.patches.dim, first = part * kMaskHeadWidth;
  const int rows = static_cast<int>(dim - first < kMaskHeadWidth ? dim - first : kMaskHeadWidth);
  const int lanes = lanes_in<T>(task.classes.tokens, block);
  T* to = task.sum_classes + ((image * task.class_blocks + block) * dim + first) * kTokens;
  __builtin_memset(to, 0, sizeof(T) * static_cast<size_t>(rows * kTokens));
  for (int64_t i = 0; i < task.patch_blocks; ++i) {
    const int64_t at = image * task.patch_blocks + i;
    add_weighted(task.patch_panel + (at * dim + first) * kTokens, tokens_in(task.patches.tokens, i),
                 task.turned + (at * task.class_blocks + block) * kTile, lanes, rows, to);
  }
}

template <class T>
void mask_head_finish_classes(const MaskHeadTask<T>& task, int64_t image, int64_t block,
                              const TokensView<T>& grad_classes) {
  const int64_t dim = task.classes.dim, at = (image * task.class_blocks + block) * kTokens * dim;
  const int64_t of_all = task.first_image + image;
  const int count = tokens_in(task.classes.tokens, block);
  const T* given = task.given.inv_classes + of_all * task.classes.tokens + block * kTokens;
  alignas(64) T inverse[kTokens];
  for (int t = 0; t < kTokens; ++t) inverse[t] = t < count ? given[t] : T(0);
  unpack_orthogonal<T>(task.sum_classes + at, task.class_panel + at, inverse, grad_classes, of_all, block);
}

}  // namespace depict::cpu::DEPICT_ISA
