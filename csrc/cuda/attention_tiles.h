// Tiles of rows in shared memory and the two products that attention needs of them, for tensor cores.
//
// Scores multiply rows with rows, x y^T; sums multiply weights that are in the accumulators' registers with a
// tile, p y. One tile of y serves both: query, key and value are one tensor. D is the head dimension rounded
// up to 8, no further: m16n8k8 takes the last 8 columns of a reduction, so 100 costs 104 and 50 costs 56.
#pragma once

#include "attention.h"
#include "device.h"

namespace depict::cuda {

// Elements from row to row: an odd number of 16-byte units, or of 4 words for float32, keeps the eight rows
// of a fragment in different banks.
template <class T, int D>
constexpr int kStride = sizeof(T) == 2 ? 8 * (D / 8 | 1) : D + 4;

template <class T, int D>
struct PaddedRows {
  static constexpr int kColumns = D, kPeriod = 1;  // at() is linear in multiples of kPeriod rows
  static __device__ __forceinline__ int at(int row, int column) { return row * kStride<T, D> + column; }
};

// Rows [first, first + Count) of (batch, head) into a tile; rows that do not exist become zeros. `vector` is
// the number of bytes (16, 8, 4) that divides every address, or 2. Layout says where an element goes and how
// many columns there are; 16 aligned bytes of a row stay together.
template <class T, int D, int Threads, class Layout = PaddedRows<T, D>>
struct TileLoader {
  const T* data;
  int64_t row_stride;
  int rows, dim, vector;

  __device__ __forceinline__ TileLoader(const Rows& tensor, int64_t batch, int64_t head, int64_t rows,
                                        int dim, int vector)
      : data(static_cast<const T*>(tensor.data) + batch * tensor.batch_stride + head * tensor.head_stride),
        row_stride(tensor.row_stride),
        rows(static_cast<int>(rows)),
        dim(dim),
        vector(vector) {}

  template <int Count>
  __device__ __forceinline__ void load(T* tile, int first) const {
    if (vector == 16)
      copy<Count, 16>(tile, first);
    else if (vector == 8)
      copy<Count, 8>(tile, first);
    else if (vector == 4)
      copy<Count, 4>(tile, first);
    else
      for (int row = thread_index() / 32; row < Count; row += Threads / 32)
        for (int c = thread_index() % 32; c < dim; c += 32)
          tile[Layout::at(row, c)] =
              first + row < rows ? data[(first + row) * row_stride + c] : from_float<T>(0.0f);
  }

  // Columns past the head dimension, which load() never writes.
  template <int Count>
  __device__ __forceinline__ void clear_padding(T* tile) const {
    const int extra = Layout::kColumns - dim;
    for (int i = thread_index(); i < Count * extra; i += Threads)
      tile[Layout::at(i / extra, dim + i % extra)] = from_float<T>(0.0f);
  }

 private:
  // Everything but the rows' number and distance is known at compile time: this runs for every tile.
  template <int Count, int Bytes>
  __device__ __forceinline__ void copy(T* tile, int first) const {
    constexpr int kElements = Bytes / sizeof(T), kVectors = D / kElements;
    constexpr int kLanes = kVectors > 16 ? 32 : kVectors > 8 ? 16 : 8;  // that share a row
    constexpr int kStep = Threads / kLanes;
    static_assert(Count % kStep == 0 && kStep % Layout::kPeriod == 0);
    [[maybe_unused]] constexpr int kUnroll = sizeof(T) == 2 ? 32 : 1;  // float32 has no registers to spare
    const int row = first + thread_index() / kLanes, lane = thread_index() % kLanes;
#pragma unroll
    for (int v = 0; v < kVectors; v += kLanes) {
      if ((v + lane) * kElements >= dim) break;
      T* to = tile + Layout::at(thread_index() / kLanes, (v + lane) * kElements);
      const T* from = data + row * row_stride + (v + lane) * kElements;  // not read past the last row
#pragma unroll kUnroll
      for (int i = 0; i < Count; i += kStep, from += kStep * row_stride)
        copy_async(to + Layout::at(i, 0), from, row + i < rows ? Bytes : 0, Bytes);
    }
  }
};

// s += x y^T; with Query also by_grad_x += grad_x y^T, with Key by_grad_y += x grad_y^T. This warp's rows of
// x and grad_x are 16 MT rows, y and grad_y have 8 NT rows. Fragments are read once for all products they
// serve.
template <class T, int D, int MT, int NT, bool Query, bool Key>
__device__ __forceinline__ void multiply_rows(const T* x, const T* grad_x, const T* y, const T* grad_y,
                                              bool precise, float (&s)[MT][NT][4],
                                              float (&by_grad_x)[MT][NT][4], float (&by_grad_y)[MT][NT][4]) {
  static_assert(D % 8 == 0 && NT % 2 == 0);
  constexpr int L = kStride<T, D>;
  const int lane = thread_index() % 32;
  if constexpr (sizeof(T) == 2) {
    const int a_at = lane % 16 * L + lane / 16 * 8, b_at = (lane % 8 + lane / 16 * 8) * L + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k + 16 <= D; k += 16) {
      uint32_t a[MT][4], a_grad[MT][4];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        load_matrices<4, false>(a[m], x + a_at + m * 16 * L + k);
        if constexpr (Query) load_matrices<4, false>(a_grad[m], grad_x + a_at + m * 16 * L + k);
      }
#pragma unroll
      for (int n = 0; n < NT; n += 2) {
        uint32_t b[4];
        load_matrices<4, false>(b, y + b_at + n * 8 * L + k);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          mma_k16<T>(s[m][n], a[m], b);
          mma_k16<T>(s[m][n + 1], a[m], b + 2);
          if constexpr (Query) {
            mma_k16<T>(by_grad_x[m][n], a_grad[m], b);
            mma_k16<T>(by_grad_x[m][n + 1], a_grad[m], b + 2);
          }
        }
        if constexpr (Key) {
          load_matrices<4, false>(b, grad_y + b_at + n * 8 * L + k);
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            mma_k16<T>(by_grad_y[m][n], a[m], b);
            mma_k16<T>(by_grad_y[m][n + 1], a[m], b + 2);
          }
        }
      }
    }
    if constexpr (D % 16 != 0) {
      constexpr int k = D - 8;
      const int a_last = lane % 16 * L + k, b_last = lane % 16 * L + k;
      uint32_t a[MT][2], a_grad[MT][2];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        load_matrices<2, false>(a[m], x + a_last + m * 16 * L);
        if constexpr (Query) load_matrices<2, false>(a_grad[m], grad_x + a_last + m * 16 * L);
      }
#pragma unroll
      for (int n = 0; n < NT; n += 2) {
        uint32_t b[2];
        load_matrices<2, false>(b, y + b_last + n * 8 * L);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          mma_k8<T>(s[m][n], a[m], b);
          mma_k8<T>(s[m][n + 1], a[m], b + 1);
          if constexpr (Query) {
            mma_k8<T>(by_grad_x[m][n], a_grad[m], b);
            mma_k8<T>(by_grad_x[m][n + 1], a_grad[m], b + 1);
          }
        }
        if constexpr (Key) {
          load_matrices<2, false>(b, grad_y + b_last + n * 8 * L);
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            mma_k8<T>(by_grad_y[m][n], a[m], b);
            mma_k8<T>(by_grad_y[m][n + 1], a[m], b + 1);
          }
        }
      }
    }
  } else {
    const int at = lane / 4 * L + lane % 4;
    const auto read_a = [&](Split<4>& a, const T* tile) {
      a.set(0, tile[at]), a.set(1, tile[at + 8 * L]), a.set(2, tile[at + 4]), a.set(3, tile[at + 8 * L + 4]);
    };
    const auto read_b = [&](Split<2>& b, const T* tile) { b.set(0, tile[at]), b.set(1, tile[at + 4]); };
#pragma unroll 1
    for (int k = 0; k < D; k += 8) {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        Split<4> a(precise), a_grad(precise);
        read_a(a, x + m * 16 * L + k);
        if constexpr (Query) read_a(a_grad, grad_x + m * 16 * L + k);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          Split<2> b(precise);
          read_b(b, y + n * 8 * L + k);
          mma_split(s[m][n], a, b);
          if constexpr (Query) mma_split(by_grad_x[m][n], a_grad, b);
          if constexpr (Key) {
            read_b(b, grad_y + n * 8 * L + k);
            mma_split(by_grad_y[m][n], a, b);
          }
        }
      }
    }
  }
}

// A score's exponent is fma(score, scale, -top * scale), whose last term is rounded by up to 1 from 2^24 on,
// and by 128 from 2^31 on, where a row overflows or vanishes. Where terms are so large, in any of the warp's
// rows, this subtracts the rows' top scores and returns true: the last term is then 0.
template <int NT>
__device__ __forceinline__ bool subtract_large_top(float (&s)[NT][4], const float (&top)[2], float scale) {
  if (!ballot(fmaxf(fabsf(top[0]), fabsf(top[1])) * scale > 0x1p24f)) return false;
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] -= top[i / 2];
  return true;
}

// sum += p y: p is (16 MT) x (8 NT) in the registers that multiply_rows fills, y has 8 NT rows.
template <class T, int D, int MT, int NT>
__device__ __forceinline__ void add_weighted_rows(float (&sum)[MT][D / 8][4], const float (&p)[MT][NT][4],
                                                  const T* y, bool precise) {
  constexpr int L = kStride<T, D>, kColumns = D / 8;
  const int lane = thread_index() % 32;
  if constexpr (sizeof(T) == 2) {
    const int b_at = lane % 16 * L + lane / 16 * 8, b_last = lane % 16 * L + (kColumns - 1) * 8;
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
      uint32_t a[MT][4];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        a[m][0] = pack<T>(p[m][j][0], p[m][j][1]);
        a[m][1] = pack<T>(p[m][j][2], p[m][j][3]);
        a[m][2] = pack<T>(p[m][j + 1][0], p[m][j + 1][1]);
        a[m][3] = pack<T>(p[m][j + 1][2], p[m][j + 1][3]);
      }
#pragma unroll
      for (int c = 0; c + 1 < kColumns; c += 2) {
        uint32_t b[4];
        load_matrices<4, true>(b, y + b_at + j * 8 * L + c * 8);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          mma_k16<T>(sum[m][c], a[m], b);
          mma_k16<T>(sum[m][c + 1], a[m], b + 2);
        }
      }
      if constexpr (kColumns % 2 != 0) {
        uint32_t b[2];
        load_matrices<2, true>(b, y + b_last + j * 8 * L);
#pragma unroll
        for (int m = 0; m < MT; ++m) mma_k16<T>(sum[m][kColumns - 1], a[m], b);
      }
    }
  } else {
    const int at = 2 * (lane % 4) * L + lane / 4;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        // The reduction may run in any order: lane t takes keys 2 t and 2 t + 1, which its accumulators hold.
        Split<4> a(precise);
        a.set(0, p[m][j][0]), a.set(1, p[m][j][2]), a.set(2, p[m][j][1]), a.set(3, p[m][j][3]);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          Split<2> b(precise);
          b.set(0, y[at + j * 8 * L + c * 8]), b.set(1, y[at + j * 8 * L + L + c * 8]);
          mma_split(sum[m][c], a, b);
        }
      }
  }
}

// Writes this warp's 16 MT rows, of which `rows` exist, to contiguous memory whose rows are row_stride apart.
template <class T, int D, int MT>
__device__ __forceinline__ void store_rows(const float (&sum)[MT][D / 8][4], T* out, int64_t row_stride,
                                           int rows, int dim) {
  const int lane = thread_index() % 32;
  const bool pairs = dim % 2 == 0;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + half * 8 + lane / 4;
      if (row >= rows) continue;
      T* to = out + row * row_stride;
#pragma unroll
      for (int c = 0; c < D / 8; ++c) {
        const int column = c * 8 + lane % 4 * 2;
        const float first = sum[m][c][2 * half], second = sum[m][c][2 * half + 1];
        if (pairs && column + 1 < dim) {
          if constexpr (sizeof(T) == 2) {
            *reinterpret_cast<uint32_t*>(to + column) = pack<T>(first, second);
          } else {
            struct alignas(8) Pair {
              float first, second;
            };
            *reinterpret_cast<Pair*>(to + column) = {first, second};
          }
        } else {
          if (column < dim) to[column] = from_float<T>(first);
          if (column + 1 < dim) to[column + 1] = from_float<T>(second);
        }
      }
    }
}

}  // namespace depict::cuda
