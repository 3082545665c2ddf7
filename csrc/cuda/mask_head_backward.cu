// The mask head's backward in three kernels, in float16 four, without atomics.
//
// float16 has no range for t, which is as small as the upstream gradient and as large as one over the norms:
// mask_peak bounds it, and every image's t goes with a power of two that brings the bound near float16's end.
// What that leaves below the normal range is too small for the image's gradients to show.
//
// mask_backward recomputes the cosines, block by block as the forward, and leaves t, the gradient of the
// products x q^T, with the blocks' sums for the classes' side. mask_products multiplies t with q and, split
// along the patches, with x. mask_finish adds up what was split.
#include "mask_head_tiles.h"

namespace depict::cuda {
namespace {

struct RowArguments {
  MaskHeadShape shape;
  Tokens x, q;
  int x_unit, q_unit;
  const void *grad, *weight;
  MaskHeadStatistics<const float> in;
  MaskHeadScratch scratch;
};

__device__ __forceinline__ float finite(float value) {  // of values that are not negative
  return value < INFINITY ? value : 0.0f;
}

// The maximum over a block, in all of its threads. shared: kWarps values, not in use by anybody.
__device__ __forceinline__ float block_max(float value, float* shared) {
  value = warp_max(value);
  if (thread_index() % 32 == 0) shared[thread_index() / 32] = value;
  barrier();
  for (int w = 0; w < kWarps; ++w) value = fmaxf(value, shared[w]);
  return value;
}

struct PeakArguments {
  MaskHeadShape shape;
  const void *grad, *weight;
  MaskHeadStatistics<const float> in;
  float* peaks;
};

// Bounds |t| over a block's patches; infinite and NaN values, whose gradients are lost anyway, do not count.
//
// t = rstd / (|x| |q|) (g - mean(g) - z mean(g z)) with g = grad weight. In brackets stands g without its
// part along the ones and, but for eps, along z: no longer than g, whose norm is at most sqrt(C) times its
// largest element.
__global__ void __launch_bounds__(kThreads) mask_peak(PeakArguments a) {
  const MaskHeadShape& s = a.shape;
  float* shared = reinterpret_cast<float*>(shared_memory());
  BlockNumber number(block_index());
  const int64_t patch = number.next(divide_up(s.patches, kRows)) * kRows + thread_index() % kRows;
  const int64_t batch = number.rest;
  float inv_q = 0, gradient = 0, peak = 0;
  for (int64_t c = thread_index(); c < s.classes; c += kThreads)
    inv_q = fmaxf(inv_q, finite(a.in.inv_q[batch * s.classes + c]));
  if (patch < s.patches) {
    with_type(s.parameter_type, [&](auto type) {
      using P = typename decltype(type)::type;
      const P* grad = static_cast<const P*>(a.grad) + batch * s.classes * s.patches + patch;
      const P* weight = static_cast<const P*>(a.weight);
#pragma unroll 8
      for (int64_t c = thread_index() / kRows; c < s.classes; c += kThreads / kRows)
        gradient = fmaxf(gradient, finite(fabsf(to_float(grad[c * s.patches]) * to_float(weight[c]))));
    });
    const int64_t at = batch * s.patches + patch;
    peak = finite(gradient * a.in.rstd[at] * a.in.inv_x[at]);
  }
  inv_q = block_max(inv_q, shared), peak = block_max(peak, shared + kWarps);
  if (thread_index() == 0)
    a.peaks[block_index()] = fminf(peak * inv_q * sqrtf(static_cast<float>(s.classes)), 1e38f);
}

// Of the power of two that brings an image's largest peak to between 2^14 and 2^15. Within 100, so that no
// product with it overflows.
__device__ __forceinline__ int scale_exponent(const float* peaks, int64_t count, float* shared) {
  float peak = 0;
  for (int64_t i = thread_index(); i < count; i += kThreads) peak = fmaxf(peak, peaks[i]);
  const int exponent = 14 + 127 - static_cast<int>(bits_of(block_max(peak, shared)) >> 23);
  return exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
}

template <class T>
constexpr bool kScaled = std::is_same_v<T, Float16>;

// (classes, patches) from global memory as float32 in columns of kColumnPitch; zeros where there is nothing.
template <int NT, class P>
__device__ __forceinline__ void load_columns(float* staged, const P* from, int64_t patches, int rows_left,
                                             int classes_left) {
  constexpr int kQuads = kRows / 4;
  // The caller's gradient may be a view that starts anywhere in its storage.
  const bool vector = patches % 4 == 0 && reinterpret_cast<uintptr_t>(from) % sizeof(Vector<P, 4>) == 0;
#pragma unroll 5
  for (int i = thread_index(); i < kClasses<NT> * kQuads; i += kThreads) {
    const int c = i / kQuads, row = i % kQuads * 4;
    const P* at = from + c * patches + row;
    Vector<float, 4> values = {{0, 0, 0, 0}};
    if (c < classes_left) {
      if (vector && row + 4 <= rows_left) {
        const auto in = *reinterpret_cast<const Vector<P, 4>*>(at);
        for (int e = 0; e < 4; ++e) values.at[e] = to_float(in.at[e]);
      } else {
        for (int e = 0; e < 4; ++e) values.at[e] = row + e < rows_left ? to_float(at[e]) : 0.0f;
      }
    }
    *reinterpret_cast<Vector<float, 4>*>(staged + c * kColumnPitch + row) = values;
  }
}

// With t the gradient of x q^T: grad_patches = t q - x along.
template <class T, int NT>
constexpr int kBackwardSpace =  // the ring, and in its place afterwards the upstream gradient and t
    larger(kRing<T, NT>, kClasses<NT> * kColumnPitch * 4 + kRows * kRowPitch<NT> * int(sizeof(T)));

template <class T, int NT>
__global__ void __launch_bounds__(kThreads, NT == kSmallTile ? kBlocks<T> : 1) mask_backward(RowArguments a) {
  const MaskHeadShape& s = a.shape;
  unsigned char* ring = shared_memory();
  float* grad = reinterpret_cast<float*>(ring);
  T* staged = reinterpret_cast<T*>(grad + kClasses<NT> * kColumnPitch);
  Small<NT>& small = *reinterpret_cast<Small<NT>*>(ring + kBackwardSpace<T, NT>);
  BlockNumber number(block_index());
  const int64_t first = number.next(divide_up(s.patches, kRows)) * kRows, batch = number.rest;
  const int rows_left = at_most(s.patches - first, kRows);
  const int64_t tiles = divide_up(s.classes, kClasses<NT>);
  const int64_t pitch = padded(s.classes);
  const Source<T> x = rows_of<T>(a.x, batch, first, s.patches, s.dim, a.x_unit);
  const Place<NT> place;
  const int lane = thread_index() % 32, warp = thread_index() / 32;

  // In shared memory, as registers are scarce.
  for (int row = thread_index(); row < kRows; row += kThreads) {
    const int64_t at = batch * s.patches + first + row;
    small.inv_x[row] = row < rows_left ? a.in.inv_x[at] : 0.0f;
    small.mean[row] = row < rows_left ? a.in.mean[at] : 0.0f;
    small.rstd[row] = row < rows_left ? a.in.rstd[at] : 0.0f;
  }
  float scale = 1;
  if constexpr (kScaled<T>) {
    const int64_t count = divide_up(s.patches, kRows);
    const int exponent = scale_exponent(a.scratch.peaks + batch * count, count, small.peaks);
    scale = ldexpf(1.0f, exponent);
    if (first == 0 && thread_index() == 0) a.scratch.scale[batch] = ldexpf(1.0f, -exponent);
  }

  float products[2][NT][4];
  float mean_g[4] = {0, 0, 0, 0}, mean_gz[4] = {0, 0, 0, 0}, along[4] = {0, 0, 0, 0};
  for (int64_t step = 0; step < 2 * tiles; ++step) {  // LayerNorm's means over all tiles, then the gradient
    const bool second = step >= tiles;
    const int64_t first_class = (second ? step - tiles : step) * kClasses<NT>;
    const int classes_left = at_most(s.classes - first_class, kClasses<NT>);

    if (!second || tiles > 1) {
      for (int c = thread_index(); c < kClasses<NT>; c += kThreads) {
        small.weight[c] = c < classes_left ? load_as(s.parameter_type, a.weight, first_class + c) : 0.0f;
        small.inv_q[c] = c < classes_left ? a.in.inv_q[batch * s.classes + first_class + c] : 0.0f;
      }
      const Source<T> q = rows_of<T>(a.q, batch, first_class, s.classes, s.dim, a.q_unit);
      product<T, NT, false, false>(products, x, q, s.dim, s.precise, ring,
                                   static_cast<Squares<NT>*>(nullptr));
      const int64_t at = (batch * s.classes + first_class) * s.patches + first;
      with_type(s.parameter_type, [&](auto type) {
        using P = typename decltype(type)::type;
        load_columns<NT>(grad, static_cast<const P*>(a.grad) + at, s.patches, rows_left, classes_left);
      });
      barrier();
    }
    const auto normalised = [&](int i, int n, int k) {
      const int row = place.row(i, k);
      const float m = cosine_of(products[i][n][k], small.inv_x[row], small.inv_q[place.column(n, k)]);
      return (m - small.mean[row]) * small.rstd[row];
    };
    const auto grad_of = [&](int i, int n, int k) {
      return grad[place.column(n, k) * kColumnPitch + place.row(i, k)];
    };
    if (!second) {
      for_each<NT>([&](int i, int n, int k) {
        const int j = 2 * i + k / 2, c = place.column(n, k);
        const float g = grad_of(i, n, k) * small.weight[c];
        mean_g[j] += g, mean_gz[j] += c < classes_left ? g * normalised(i, n, k) : 0.0f;
      });
      if (step + 1 == tiles) {
        RowSums{small.row_sums[0][0]}(mean_g);
        RowSums{small.row_sums[1][0]}(mean_gz);
#pragma unroll
        for (int j = 0; j < 4; ++j) mean_g[j] /= s.classes, mean_gz[j] /= s.classes;
      } else {
        barrier();  // weight and inv_q have been read
      }
      continue;
    }

#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int c = place.column(n, odd);
        const bool class_exists = c < classes_left;
        float sums[3] = {0, 0, 0};  // over the rows: grad z, grad, grad_m m
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int i = j / 2, k = j % 2 * 2 + odd;
          const bool exists = class_exists && place.row(i, k) < rows_left;
          const int row = place.row(i, k);
          const float z = normalised(i, n, k);
          const float g = grad_of(i, n, k) * small.weight[c];
          const float grad_m = exists ? small.rstd[row] * (g - mean_g[j] - z * mean_gz[j]) : 0.0f;
          // grad_m m of t as it was rounded: the gradients are then orthogonal to the vectors as they should.
          const float t = to_float(from_float<T>(grad_m * small.inv_x[row] * (small.inv_q[c] * scale)));
          const float part = exists ? t * products[i][n][k] : 0.0f;
          along[j] += part;
          sums[0] += exists ? grad_of(i, n, k) * z : 0.0f, sums[1] += grad_of(i, n, k), sums[2] += part;
          products[i][n][k] = t;
        }
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          for (int mask = 4; mask < 32; mask *= 2) sums[k] += shuffle_xor(sums[k], mask);
          if (lane / 4 == 0) small.class_sums[k][place.warp_row][c] = sums[k];
        }
      }
    stage_rows<NT>(products, staged);
    barrier();
    const int64_t programs = block_count();
    for (int i = thread_index(); i < 3 * kClasses<NT>; i += kThreads) {
      const int k = i / kClasses<NT>, c = i % kClasses<NT>;
      if (c < classes_left)
        a.scratch.sums[(k * s.classes + first_class + c) * programs + block_index()] =
            small.class_sums[k][0][c] + small.class_sums[k][1][c];
    }
    constexpr int kElements = 16 / sizeof(T), kVectors = kClasses<NT> / kElements;
    T* t = static_cast<T*>(a.scratch.products_grad) + (batch * s.patches + first) * pitch + first_class;
    for (int i = thread_index(); i < kRows * kVectors; i += kThreads) {
      const int row = i / kVectors, c = i % kVectors * kElements;
      if (row < rows_left && c < classes_left)
        *reinterpret_cast<Vector<T, kElements>*>(t + row * pitch + c) =
            *reinterpret_cast<const Vector<T, kElements>*>(staged + row * kRowPitch<NT> + c);
    }
    barrier();
  }
  RowSums{small.row_sums[2][0]}(along);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int row = place.row0 + 8 * j;
    if (warp % 4 == 0 && lane % 4 == 0 && row < rows_left)
      a.scratch.along[batch * s.patches + first + row] = along[j] * small.inv_x[row] * small.inv_x[row];
  }
}

struct ProductArguments {
  MaskHeadShape shape;
  Tokens x, q;
  int x_unit, q_unit;
  MaskHeadScratch scratch;
  void* grad_patches;
  int64_t per_split, class_blocks;
};

constexpr int kWidthTile = 6;  // of the patches' gradient: 192 columns divide 192, 384 and 768
template <class T, int NT>
constexpr int kProductRing =
    kStages * larger(kStageBytes<T, kWidthTile, false, true>, kStageBytes<T, NT, true, true>);

// grad_patches = scale (t q - x along); partial sums of t^T x over a split of the patches.
template <class T, int NT>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) mask_products(ProductArguments a) {
  const MaskHeadShape& s = a.shape;
  unsigned char* ring = shared_memory();
  float* staged = reinterpret_cast<float*>(ring);
  const int64_t pitch = padded(s.classes);
  const T* t = static_cast<const T*>(a.scratch.products_grad);

  if (block_index() < a.class_blocks) {
    BlockNumber number(block_index());
    const int64_t column = number.next(divide_up(s.dim, kRows)) * kRows;
    const int64_t first_class = number.next(divide_up(s.classes, kClasses<NT>)) * kClasses<NT>;
    const int64_t batch = number.next(s.batch), split = number.rest;
    const int64_t first = split * a.per_split;
    const int64_t last = first + a.per_split < s.patches ? first + a.per_split : s.patches;
    Source<T> x = rows_of<T>(a.x, batch, first, last, s.dim - column, a.x_unit);
    x.data += column;
    const Source<T> right{t + (batch * s.patches + first) * pitch + first_class, pitch, last - first,
                          s.classes - first_class, 16};
    float acc[2][NT][4];
    product<T, NT, true, true>(acc, x, right, last - first, s.precise, ring,
                               static_cast<Squares<NT>*>(nullptr));
    stage_columns<NT>(acc, staged);
    barrier();
    constexpr int kQuads = kRows / 4;
    const int classes_left = at_most(s.classes - first_class, kClasses<NT>);
    const int quads = (classes_left < kClasses<NT> ? classes_left : kClasses<NT>)*kQuads;
    for (int i = thread_index(); i < quads; i += kThreads) {
      const int c = i / kQuads, d = i % kQuads * 4;
      float* out = a.scratch.classes_grad +
                   ((split * s.batch + batch) * s.classes + first_class + c) * s.dim + column + d;
      store_vector<float, 4>(out, staged + c * kColumnPitch + d, s.dim - column - d, s.dim % 4 == 0);
    }
    return;
  }

  constexpr int kWidth = 32 * kWidthTile;
  BlockNumber number(block_index() - a.class_blocks);
  const int64_t column = number.next(divide_up(s.dim, kWidth)) * kWidth;
  const int64_t first = number.next(divide_up(s.patches, kRows)) * kRows, batch = number.rest;
  const int rows_left = at_most(s.patches - first, kRows);
  const Source<T> left{t + (batch * s.patches + first) * pitch, pitch, rows_left, s.classes, 16};
  Source<T> q = rows_of<T>(a.q, batch, 0, s.classes, s.dim - column, a.q_unit);
  q.data += column;
  float acc[2][kWidthTile][4];
  product<T, kWidthTile, false, true>(acc, left, q, s.classes, s.precise, ring,
                                      static_cast<Squares<kWidthTile>*>(nullptr));
  stage_rows<kWidthTile>(acc, staged);
  barrier();
  float scale = 1;
  if constexpr (kScaled<T>) scale = a.scratch.scale[batch];
  constexpr int kElements = 16 / sizeof(T), kVectors = kWidth / kElements;
  const Source<T> x = rows_of<T>(a.x, batch, first, s.patches, s.dim, a.x_unit);
  const bool vector = a.x_unit == 16 && s.dim % kElements == 0;
  T* out = static_cast<T*>(a.grad_patches) + (batch * s.patches + first) * s.dim;
  for (int i = thread_index(); i < kRows * kVectors; i += kThreads) {
    const int row = i / kVectors, d = i % kVectors * kElements;
    const int64_t columns_left = s.dim - column - d;
    if (row >= rows_left || columns_left <= 0) continue;
    const float along = a.scratch.along[batch * s.patches + first + row];
    const T* own = x.data + row * x.stride + column + d;
    Vector<T, kElements> mine;
    if (vector)
      mine = *reinterpret_cast<const Vector<T, kElements>*>(own);
    else
      for (int e = 0; e < kElements; ++e) mine.at[e] = e < columns_left ? own[e] : from_float<T>(0.0f);
    float values[kElements];
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      values[e] = (staged[row * kRowPitch<kWidthTile> + d + e] - to_float(mine.at[e]) * along) * scale;
    store_vector<T, kElements>(out + row * s.dim + column + d, values, columns_left, vector);
  }
}

struct FinishArguments {
  MaskHeadShape shape;
  Tokens q;
  const float* inv_q;
  MaskHeadScratch scratch;
  void *grad_classes, *grad_weight, *grad_bias;
};

__device__ __forceinline__ float sum_of(const float* values, int64_t count) {
  float sum = 0;
  for (int64_t i = thread_index() % 32; i < count; i += 32) sum += values[i];
  return warp_sum(sum);
}

// One warp per class of an image; the first image's add up the parameters' gradients.
template <class T>
__global__ void __launch_bounds__(kThreads) mask_finish(FinishArguments a) {
  const MaskHeadShape& s = a.shape;
  const int64_t row = block_index() * kWarps + thread_index() / 32;
  if (row >= s.batch * s.classes) return;
  const int lane = thread_index() % 32;
  const int64_t batch = row / s.classes, c = row % s.classes;
  const int64_t blocks = divide_up(s.patches, kRows), programs = s.batch * blocks;
  const float* sums = a.scratch.sums + c * programs;
  const float inv_q = a.inv_q[row];
  const float along = sum_of(sums + 2 * s.classes * programs + batch * blocks, blocks) * inv_q * inv_q;
  float scale = 1;
  if constexpr (kScaled<T>) scale = a.scratch.scale[batch];
  const T* q = static_cast<const T*>(a.q.data) + batch * a.q.batch_stride + c * a.q.row_stride;
  const float* parts = a.scratch.classes_grad + row * s.dim;
  T* out = static_cast<T*>(a.grad_classes) + row * s.dim;
#pragma unroll 4
  for (int64_t d = lane; d < s.dim; d += 32) {
    float sum = 0;
    for (int64_t split = 0; split < a.scratch.splits; ++split)
      sum += parts[split * s.batch * s.classes * s.dim + d];
    out[d] = from_float<T>((sum - to_float(q[d]) * along) * scale);
  }
  if (batch == 0) {
    const float weight = sum_of(sums, programs), bias = sum_of(sums + s.classes * programs, programs);
    if (lane == 0) {
      store_as<1>(s.parameter_type, a.grad_weight, c, &weight, 1, false);
      store_as<1>(s.parameter_type, a.grad_bias, c, &bias, 1, false);
    }
  }
}

}  // namespace

const char* mask_head_backward(const MaskHeadShape& s, const void* grad, const Tokens& patches,
                               const Tokens& classes, const void* weight,
                               const MaskHeadStatistics<const float>& in, const MaskHeadScratch& scratch,
                               void* grad_patches, void* grad_classes, void* grad_weight, void* grad_bias,
                               void* stream) {
  const int element = element_size(s.type);
  const int x_unit = unit_of(patches, s.batch, s.patches, element);
  const int q_unit = unit_of(classes, s.batch, s.classes, element);
  const int64_t blocks = s.batch * divide_up(s.patches, kRows);
  const int64_t per_split = divide_up(divide_up(s.patches, scratch.splits), kRows) * kRows;
  const RowArguments rows{s, patches, classes, x_unit, q_unit, grad, weight, in, scratch};
  const FinishArguments finish{s, classes, in.inv_q, scratch, grad_classes, grad_weight, grad_bias};
  return with_rows(s, [&](auto type, auto tile) -> const char* {
    using T = typename decltype(type)::type;
    constexpr int NT = decltype(tile)::value;
    const char* error = nullptr;
    if (kScaled<T>)
      error = launch(mask_peak, blocks, kThreads, 2 * kWarps * sizeof(float), stream,
                     PeakArguments{s, grad, weight, in, scratch.peaks});
    if (error) return error;
    error = launch(mask_backward<T, NT>, blocks, kThreads, kBackwardSpace<T, NT> + sizeof(Small<NT>), stream,
                   rows);
    if (error) return error;
    const int64_t class_tiles = divide_up(s.classes, kClasses<NT>);
    const int64_t class_blocks = scratch.splits * s.batch * class_tiles * (divide_up(s.dim, kRows));
    constexpr int kWidth = 32 * kWidthTile;
    const int64_t patch_blocks = blocks * (divide_up(s.dim, kWidth));
    const ProductArguments products{s,       patches,      classes,   x_unit,      q_unit,
                                    scratch, grad_patches, per_split, class_blocks};
    error = launch(mask_products<T, NT>, class_blocks + patch_blocks, kThreads, kProductRing<T, NT>, stream,
                   products);
    if (error) return error;
    return launch(mask_finish<T>, divide_up(s.batch * s.classes, kWarps), kThreads, 0, stream, finish);
  });
}

}  // namespace depict::cuda
