// A product in one block of 256 threads: 64 rows by 32 NT columns on tensor cores, fed by a ring of
// asynchronous copies. Either operand may lie transposed in memory.
#pragma once

#include <type_traits>

#include "device.h"

namespace depict::cuda {

constexpr int kThreads = 256, kRows = 64, kStages = 4;

// Elements of the reduction per step: 64 bytes of every row.
template <class T>
constexpr int kDepth = 64 / sizeof(T);

// rows x columns elements in global memory, of which tiles are taken; past its end there are zeros.
template <class T>
struct Source {
  const T* data;
  int64_t stride, rows, columns;
  int unit;  // bytes (16, 8 or 4) that divide the address of every row, or fewer
};

// Bytes from row to row of a tile: the eight rows that a fragment reads lie in different banks.
template <class T, int Columns, bool Transposed>
constexpr int kPitch = Columns * int(sizeof(T)) + (Transposed && sizeof(T) == 4 ? 32 : 16);

// A tile of Width rows along the reduction; transposed: the reduction goes down and Width lies in a row.
template <class T, int Width, bool Transposed>
struct Tile {
  static constexpr int kRowCount = Transposed ? kDepth<T> : Width;
  static constexpr int kColumns = Transposed ? Width : kDepth<T>;
  static constexpr int kBytesPerRow = kPitch<T, kColumns, Transposed>;
  static constexpr int kBytes = kRowCount * kBytesPerRow;

  __device__ static void load(unsigned char* tile, const Source<T>& from, int64_t step) {
    constexpr int kElements = 16 / sizeof(T), kVectors = kColumns / kElements;
    const int64_t first = step * kDepth<T>;
    const int64_t first_row = Transposed ? first : 0, first_column = Transposed ? 0 : first;
    constexpr int kCount = kRowCount * kVectors;
#pragma unroll
    for (int j = 0; j < (kCount + kThreads - 1) / kThreads; ++j) {
      const int i = j * kThreads + thread_index();
      if (i >= kCount) break;
      const int64_t row = first_row + i / kVectors, column = first_column + i % kVectors * kElements;
      const int64_t left = row < from.rows ? from.columns - column : 0;
      const int valid = left <= 0 ? 0 : left >= kElements ? kElements : static_cast<int>(left);
      const T* source = valid > 0 ? from.data + row * from.stride + column : from.data;
      T* target = reinterpret_cast<T*>(tile + i / kVectors * kBytesPerRow) + i % kVectors * kElements;
      if (from.unit == 16)
        copy_async(target, source, valid * int(sizeof(T)), 16);
      else
        load_pieces(target, source, valid, from.unit);
    }
  }

  // What cannot be copied 16 bytes at a time.
  __device__ static void load_pieces(T* target, const T* source, int valid, int unit) {
    constexpr int kElements = 16 / sizeof(T);
    if (unit >= 4) {
      const int elements = unit / int(sizeof(T));
      for (int e = 0; e < kElements; e += elements) {
        const int there = valid <= e ? 0 : valid - e < elements ? valid - e : elements;
        copy_async(target + e, source + (there > 0 ? e : 0), there * int(sizeof(T)), unit);
      }
    } else {
      for (int e = 0; e < kElements; ++e) target[e] = e < valid ? source[e] : from_float<T>(0.0f);
    }
  }
};

// Where a thread's accumulators acc[m][n][i] belong: warps are 2 x 4, each of 32 rows and 8 NT columns.
template <int NT>
struct Place {
  int warp_row, warp_column, row0, column0;

  __device__ __forceinline__ Place() {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    warp_row = warp / 4, warp_column = warp % 4;
    row0 = 32 * warp_row + lane / 4;
    column0 = 8 * NT * warp_column + 2 * (lane % 4);
  }
  __device__ __forceinline__ int row(int m, int i) const { return row0 + 16 * m + 8 * (i / 2); }
  __device__ __forceinline__ int column(int n, int i) const { return column0 + 8 * n + i % 2; }
};

template <int NT, class F>
__device__ __forceinline__ void for_each(const F& f) {
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) f(m, n, i);
}

// This thread's shares of the sums of squares of the operands' rows: a[j] of row row0 + 8 j of a, b[n] of row
// 8 NT warp_column + 8 n + lane / 4 of b. The rest is in the other lanes of the same four, and in the other
// warps of the same rows, which take turns along the reduction.
template <int NT>
struct Squares {
  float a[4], b[NT];
};

// Two 16-bit elements or one float32: what a register of a fragment holds.
template <class T>
using Register = std::conditional_t<sizeof(T) == 2, uint32_t, float>;

template <class T>
__device__ __forceinline__ float add_square(float sum, Register<T> value) {
  if constexpr (sizeof(T) == 2) {
    const float low = to_float(T{static_cast<uint16_t>(value & 0xffff)});
    const float high = to_float(T{static_cast<uint16_t>(value >> 16)});
    return sum + low * low + high * high;
  } else {
    return sum + value * value;
  }
}

// One mma step of this warp: 4 registers of each 16 rows of a, 2 of each 8 rows of b.
template <class T, int NT, bool TransposedA, bool TransposedB>
struct Fragments {
  Register<T> a[2][4], b[2 * NT];

  __device__ __forceinline__ Fragments(const unsigned char* a_tile, const unsigned char* b_tile, int k) {
    constexpr int kA = Tile<T, kRows, TransposedA>::kBytesPerRow;
    constexpr int kB = Tile<T, 32 * NT, TransposedB>::kBytesPerRow;
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    const int a_row = warp / 4 * 32, b_row = warp % 4 * 8 * NT;
    if constexpr (sizeof(T) == 2) {
      // Matrices 0 to 3 of 8 x 8: those of a are numbered down its rows first, those of b along the
      // reduction.
      const int in_matrix = lane % 8, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int row = a_row + 16 * m + low, depth = k + high;
        load_matrices<4, TransposedA>(a[m], TransposedA ? a_tile + (depth + in_matrix) * kA + 2 * row
                                                        : a_tile + (row + in_matrix) * kA + 2 * depth);
      }
#pragma unroll
      for (int n = 0; n < NT; n += 2) {
        const int row = b_row + 8 * n + (n + 1 < NT ? high : 0), depth = k + low;
        const unsigned char* at = TransposedB ? b_tile + (depth + in_matrix) * kB + 2 * row
                                              : b_tile + (row + in_matrix) * kB + 2 * depth;
        if (n + 1 < NT)
          load_matrices<4, TransposedB>(b + 2 * n, at);
        else
          load_matrices<2, TransposedB>(b + 2 * n, at);
      }
    } else {
      const int g = lane / 4, t = lane % 4;
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[m][i] = read<TransposedA>(a_tile, kA, a_row + 16 * m + g + i % 2 * 8, k + t + i / 2 * 4);
#pragma unroll
      for (int i = 0; i < 2 * NT; ++i)
        b[i] = read<TransposedB>(b_tile, kB, b_row + i / 2 * 8 + g, k + t + i % 2 * 4);
    }
  }

  __device__ __forceinline__ void multiply(float (&acc)[2][NT][4], bool precise) const {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int m = 0; m < 2; ++m) mma_k16<T>(acc[m][n], a[m], b + 2 * n);
    } else {
      Split<4> left[2] = {Split<4>(precise), Split<4>(precise)};
#pragma unroll
      for (int i = 0; i < 8; ++i) left[i / 4].set(i % 4, a[i / 4][i % 4]);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        Split<2> right(precise);
        right.set(0, b[2 * n]), right.set(1, b[2 * n + 1]);
#pragma unroll
        for (int m = 0; m < 2; ++m) mma_split(acc[m][n], left[m], right);
      }
    }
  }

  __device__ __forceinline__ void add_squares(Squares<NT>& squares, int turn) const {
    const int warp = thread_index() / 32;
    if (turn % 4 == warp % 4) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& sum = squares.a[i / 4 * 2 + i % 2];
        sum = add_square<T>(sum, a[i / 4][i % 4]);
      }
    }
    if (turn % 2 == warp / 4) {
#pragma unroll
      for (int i = 0; i < 2 * NT; ++i) squares.b[i / 2] = add_square<T>(squares.b[i / 2], b[i]);
    }
  }

 private:
  template <bool Transposed>
  __device__ static __forceinline__ float read(const unsigned char* tile, int pitch, int row, int depth) {
    return *reinterpret_cast<const float*>(Transposed ? tile + depth * pitch + 4 * row
                                                      : tile + row * pitch + 4 * depth);
  }
};

template <class T, int NT, bool TransposedA, bool TransposedB>
constexpr int kStageBytes = Tile<T, kRows, TransposedA>::kBytes + Tile<T, 32 * NT, TransposedB>::kBytes;

// acc = a b^T over `depth`; squares may be null. Uses kStages * kStageBytes of `shared`, which is free again
// for all threads on return.
template <class T, int NT, bool TransposedA, bool TransposedB>
__device__ __forceinline__ void product(float (&acc)[2][NT][4], const Source<T>& a, const Source<T>& b,
                                        int64_t depth, bool precise, unsigned char* shared,
                                        Squares<NT>* squares) {
  using TileA = Tile<T, kRows, TransposedA>;
  using TileB = Tile<T, 32 * NT, TransposedB>;
  constexpr int kMma = sizeof(T) == 2 ? 16 : 8;
  constexpr int kStage = kStageBytes<T, NT, TransposedA, TransposedB>;
  for_each<NT>([&](int m, int n, int i) { acc[m][n][i] = 0; });
  if (squares) {
    for (float& sum : squares->a) sum = 0;
    for (float& sum : squares->b) sum = 0;
  }
  const int64_t steps = (depth + kDepth<T> - 1) / kDepth<T>;
  const auto load = [&](int64_t step) {
    if (step < steps) {
      unsigned char* stage = shared + step % kStages * kStage;
      TileA::load(stage, a, step);
      TileB::load(stage + TileA::kBytes, b, step);
    }
    commit_copies();
  };
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int64_t step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    barrier();  // everybody's copies are there, and the stage that is loaded next has been read
    load(step + kStages - 1);
    const unsigned char* stage = shared + step % kStages * kStage;
#pragma unroll
    for (int k = 0; k < kDepth<T>; k += kMma) {
      const Fragments<T, NT, TransposedA, TransposedB> fragments(stage, stage + TileA::kBytes, k);
      fragments.multiply(acc, precise);
      if (squares) fragments.add_squares(*squares, static_cast<int>(step % 2) * 2 + k / kMma);
    }
  }
  wait_for_copies<0>();
  barrier();
}

// --- accumulators to shared memory, from where they leave in whole rows or columns ---

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

// Writes N values, of which `count` exist; one store where `vector` says that the address allows it.
template <class T, int N>
__device__ __forceinline__ void store_vector(T* to, const float* values, int64_t count, bool vector) {
  if (vector && count >= N) {
    Vector<T, N> out;
#pragma unroll
    for (int i = 0; i < N; ++i) out.at[i] = from_float<T>(values[i]);
    *reinterpret_cast<Vector<T, N>*>(to) = out;
  } else {
    for (int i = 0; i < N && i < count; ++i) to[i] = from_float<T>(values[i]);
  }
}

// Elements from row to row: a fragment's pairs of eight rows lie in different banks.
template <int NT>
constexpr int kRowPitch = 32 * NT + 8;
constexpr int kColumnPitch = kRows + 4;

template <int NT, class T>
__device__ __forceinline__ void stage_rows(const float (&acc)[2][NT][4], T* staged) {
  const Place<NT> place;
  for_each<NT>([&](int m, int n, int i) {
    if (i % 2) return;
    T* to = staged + place.row(m, i) * kRowPitch<NT> + place.column(n, i);
    store_vector<T, 2>(to, &acc[m][n][i], 2, true);
  });
}

template <int NT>
__device__ __forceinline__ void stage_columns(const float (&acc)[2][NT][4], float* staged) {
  const Place<NT> place;
  for_each<NT>([&](int m, int n, int i) {
    staged[place.column(n, i) * kColumnPitch + place.row(m, i)] = acc[m][n][i];
  });
}

}  // namespace depict::cuda
