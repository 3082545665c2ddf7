// What the kernels of the mask head share: how patches and classes are dealt to blocks, sums over rows,
// types.
#pragma once

#include "mask_head.h"
#include "product.h"

namespace depict::cuda {

static_assert(kRows == kMaskHeadRows);
constexpr int kWarps = kThreads / 32, kSmallTile = 1, kLargeTile = 5;  // tiles are of 32 classes

__device__ __host__ __forceinline__ int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int larger(int a, int b) { return a > b ? a : b; }

__device__ __forceinline__ int64_t padded(int64_t classes) {
  return divide_up(classes, kMaskHeadAlign) * kMaskHeadAlign;
}

// Takes a block's number apart. In 32 bits, which hold every block of a launch: divisions of 64 bits cost
// time and registers.
struct BlockNumber {
  uint32_t rest;

  __device__ __forceinline__ explicit BlockNumber(int64_t block) : rest(static_cast<uint32_t>(block)) {}
  // Its place among `count` blocks that lie next to each other.
  __device__ __forceinline__ int64_t next(int64_t count) {
    const uint32_t n = static_cast<uint32_t>(count), place = rest % n;
    rest /= n;
    return place;
  }
};

template <int NT>
constexpr int kClasses = 32 * NT;
template <class T>
constexpr int kBlocks = sizeof(T) == 2 ? 2 : 1;  // per multiprocessor, as far as registers go

template <class T>
__device__ __forceinline__ Source<T> rows_of(const Tokens& tokens, int64_t batch, int64_t first, int64_t rows,
                                             int64_t columns, int unit) {
  const T* data =
      static_cast<const T*>(tokens.data) + batch * tokens.batch_stride + first * tokens.row_stride;
  return {data, tokens.row_stride, rows - first, columns, unit};
}

__device__ __forceinline__ float load_as(Type type, const void* data, int64_t i) {
  return with_type(type, [&](auto element) {
    return to_float(static_cast<const typename decltype(element)::type*>(data)[i]);
  });
}

template <int N>
__device__ __forceinline__ void store_as(Type type, void* data, int64_t i, const float* values, int64_t count,
                                         bool vector) {
  with_type(type, [&](auto element) {
    using P = typename decltype(element)::type;
    store_vector<P, N>(static_cast<P*>(data) + i, values, count, vector);
  });
}

// 1 / norm, and 0 for a zero vector: zero vectors give zeros, not NaN.
__device__ __forceinline__ float inverse_norm(float squares) {
  return squares > 0 ? 1 / sqrtf(squares) : 0.0f;
}

// The same bits in forward and backward: where the cosines of a patch hardly differ, LayerNorm magnifies what
// does.
__device__ __forceinline__ float cosine_of(float product, float inv_x, float inv_q) {
  return rounded_product(rounded_product(product, inv_x), inv_q);
}

// A thread's four values, each a share of the sum over a row, to the sums of rows row0 + 8 j.
struct RowSums {
  float* shared;  // (4, kRows), not in use by anybody

  __device__ __forceinline__ void operator()(float (&value)[4]) const {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int row0 = warp / 4 * 32 + lane / 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      value[j] += shuffle_xor(value[j], 1);
      value[j] += shuffle_xor(value[j], 2);
      if (lane % 4 == 0) shared[warp % 4 * kRows + row0 + 8 * j] = value[j];
    }
    barrier();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      value[j] = 0;
      for (int w = 0; w < 4; ++w) value[j] += shared[w * kRows + row0 + 8 * j];
    }
  }
};

// Shared memory of a block behind the ring of tiles.
template <int NT>
struct Small {
  float row_sums[3][4][kRows];
  float class_sums[3][2][kClasses<NT>];
  float inv_x[kRows], mean[kRows], rstd[kRows];
  float inv_q[kClasses<NT>], weight[kClasses<NT>], bias[kClasses<NT>];
  float peaks[kWarps];
};

template <class T, int NT>
constexpr int kRing = kStages * kStageBytes<T, NT, false, false>;

// --- host ---

// The largest copy, up to 16 bytes, that starts at every multiple of 16 bytes of every row.
inline int unit_of(const Tokens& tokens, int64_t batch, int64_t rows, int element) {
  uint64_t all = reinterpret_cast<uintptr_t>(tokens.data) | 16;
  if (batch > 1) all |= static_cast<uint64_t>(tokens.batch_stride * element);
  if (rows > 1) all |= static_cast<uint64_t>(tokens.row_stride * element);
  return static_cast<int>(all & -all);
}

template <int N>
struct Count {
  static constexpr int value = N;
};
// Calls run(element type, tiles of 32 classes per block), both as types.
template <class Run>
const char* with_rows(const MaskHeadShape& s, const Run& run) {
  return with_type(s.type, [&](auto type) {
    return s.classes <= kClasses<kSmallTile> ? run(type, Count<kSmallTile>{})
                                             : run(type, Count<kLargeTile>{});
  });
}

inline int element_size(Type type) { return type == Type::f32 ? 4 : 2; }

}  // namespace depict::cuda
