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

__device__ __forceinline__ int at_most(int64_t value, int limit) {
  return value < limit ? static_cast<int>(value) : limit;
}

// A tile of Width rows along the reduction; transposed: the reduction goes down and Width lies in a row. An
// object is a thread's share of loading the tiles of one operand, one after the other: addresses advance from
// step to step, as to compute them anew took a third of all instructions.
template <class T, int Width, bool Transposed>
struct Tile {
  static constexpr int kRowCount = Transposed ? kDepth<T> : Width;
  static constexpr int kColumns = Transposed ? Width : kDepth<T>;
  static constexpr int kBytesPerRow = kPitch<T, kColumns, Transposed>;
  static constexpr int kBytes = kRowCount * kBytesPerRow;

  __device__ __forceinline__ explicit Tile(const Source<T>& from) : from(from) {
    const int thread = thread_index();
    // Eight threads fill 128 bytes at a time: of one row, or of rows r and r + 4, which lie in different
    // banks.
    row = Transposed ? thread / kAcross : thread / 32 * 8 + thread % 32 / 8 + thread / 4 % 2 * 4;
    column = thread % kAcross * kElements;
    rows = at_most(from.rows, kRowCount), columns = at_most(from.columns, kColumns);
    at = from.data + row * from.stride + column;
  }

  // Copies the next tile, in front of which `first` elements of the reduction lie.
  __device__ __forceinline__ void load(unsigned char* tile, int64_t first) {
    unsigned char* to = tile + row * kBytesPerRow + column * int(sizeof(T));
    if constexpr (Transposed)
      rows = at_most(from.rows - first, kRowCount);
    else
      columns = at_most(from.columns - first, kColumns);
    if (from.unit == 16) {
#pragma unroll
      for (int j = 0; j < kRounds; ++j) {
        if (!mine(j)) break;
        const int valid = valid_in(j);
        copy_async(to + j * kRoundBytes, valid > 0 ? source(j) : from.data, valid * int(sizeof(T)), 16);
      }
    } else {
#pragma unroll 1
      for (int j = 0; j < kRounds && mine(j); ++j)
        load_pieces(reinterpret_cast<T*>(to + j * kRoundBytes), source(j), valid_in(j));
    }
    at += Transposed ? kDepth<T> * from.stride : int64_t(kDepth<T>);
  }

 private:
  static constexpr int kElements = 16 / sizeof(T);
  // Threads beside each other along a row. Rounds go along the rows of a transposed tile, else down them.
  static constexpr int kAcross = Transposed ? kThreads / kRowCount : kColumns / kElements;
  static constexpr int kDown = kThreads / kAcross, kStride = kAcross * kElements;
  static constexpr int kRounds =
      Transposed ? (kColumns + kStride - 1) / kStride : (kRowCount + kDown - 1) / kDown;
  static constexpr int kRoundBytes = Transposed ? kAcross * 16 : kDown * kBytesPerRow;

  const Source<T>& from;
  const T* at;                     // this thread's first vector of the next tile
  int row, column, rows, columns;  // where in the tile it lies; what there is of the tile

  __device__ __forceinline__ bool mine(int j) const {
    return Transposed ? column + j * kStride < kColumns : row + j * kDown < kRowCount;
  }
  __device__ __forceinline__ const T* source(int j) const {
    return at + (Transposed ? int64_t(j * kStride) : j * kDown * from.stride);
  }
  __device__ __forceinline__ int valid_in(int j) const {
    const int left = columns - column - (Transposed ? j * kStride : 0);
    const bool there = (Transposed ? row : row + j * kDown) < rows;
    return !there || left <= 0 ? 0 : left < kElements ? left : kElements;
  }

  // What cannot be copied 16 bytes at a time.
  __device__ void load_pieces(T* to, const T* source, int valid) const {
    if (from.unit >= 4) {
      const int elements = from.unit / int(sizeof(T));
      for (int e = 0; e < kElements; e += elements) {
        const int there = valid <= e ? 0 : valid - e < elements ? valid - e : elements;
        copy_async(to + e, there > 0 ? source + e : from.data, there * int(sizeof(T)), from.unit);
      }
    } else {
      for (int e = 0; e < kElements; ++e) to[e] = e < valid ? source[e] : from_float<T>(0.0f);
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
  TileA a_tile(a);
  TileB b_tile(b);
  const auto stage_of = [&](int64_t step) { return shared + static_cast<uint32_t>(step) % kStages * kStage; };
  const auto load = [&](int64_t step) {
    if (step < steps) {
      unsigned char* stage = stage_of(step);
      a_tile.load(stage, step * kDepth<T>);
      b_tile.load(stage + TileA::kBytes, step * kDepth<T>);
    }
    commit_copies();
  };
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int64_t step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    barrier();  // everybody's copies are there, and the stage that is loaded next has been read
    load(step + kStages - 1);
    const unsigned char* stage = stage_of(step);
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

// Writes N values to global memory, of which `count` exist; one store where `vector` says that the address
// allows it.
template <class T, int N>
__device__ __forceinline__ void store_vector(T* to, const float* values, int64_t count, bool vector) {
  if constexpr (N * sizeof(T) >= 4) {
    if (vector && count >= N) {
      constexpr int kPerWord = 4 / sizeof(T);
      uint32_t words[N / kPerWord];
#pragma unroll
      for (int i = 0; i < N / kPerWord; ++i) {
        if constexpr (kPerWord == 1)
          words[i] = bits_of(values[i]);
        else
          words[i] = pack<T>(values[2 * i], values[2 * i + 1]);
      }
      store_words(to, words);
      return;
    }
  }
  for (int i = 0; i < N && i < count; ++i) to[i] = from_float<T>(values[i]);
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
    const Vector<T, 2> pair = {{from_float<T>(acc[m][n][i]), from_float<T>(acc[m][n][i + 1])}};
    *reinterpret_cast<Vector<T, 2>*>(staged + place.row(m, i) * kRowPitch<NT> + place.column(n, i)) = pair;
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
