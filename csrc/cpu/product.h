// Products of small matrices in panels: blocks of kTokens tokens, (dim, kTokens) each, tokens innermost.
#pragma once

namespace depict::cpu::DEPICT_ISA {

constexpr int kTile = kTokens * kTokens;

// Accumulators of the innermost loop, rows by vectors: enough to hide the latency of a multiply-add and no
// more than the registers hold beside a row of b and a number of a; the wider, the less is loaded for each of
// them.
constexpr int kRows = 6;
constexpr int kColumns = DEPICT_PIXELS == 16 ? 4 : 2;
constexpr int kFewColumns = 2;  // of the last lanes

// Rows of c and Columns vectors of them: sum over k of a(row, k) b(k, lane), in the order of k, times
// `factor` or added to what is there. Sums over k start from zero either way, so that long sums over blocks
// lose less.
template <class T, int Rows, int Columns, int RowStride, int Step, bool Accumulate>
DEPICT_INLINE void product_tile(const T* a, const T* b, T* c, int count, T factor) {
  constexpr int L = Simd<T>::lanes;
  Vec<T> sum[Rows][Columns] = {};
  for (int k = 0; k < count; ++k) {
    Vec<T> row[Columns];
    DEPICT_UNROLL
    for (int v = 0; v < Columns; ++v) row[v] = load<T>(b + k * kTokens + v * L);
    DEPICT_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> x = splat<T>(a[r * RowStride + k * Step]);
      DEPICT_UNROLL
      for (int v = 0; v < Columns; ++v) sum[r][v] = multiply_add(x, row[v], sum[r][v]);
    }
  }
  DEPICT_UNROLL
  for (int r = 0; r < Rows; ++r) {
    DEPICT_UNROLL
    for (int v = 0; v < Columns; ++v) {
      T* at = c + r * kTokens + v * L;
      store<T>(at, Accumulate ? load<T>(at) + sum[r][v] : sum[r][v] * factor);
    }
  }
}

template <class T, int Rows, int Columns, int RowStride, int Step, bool Accumulate>
DEPICT_INLINE void remaining_rows(const T* a, const T* b, T* c, int rows, int count, T factor) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      product_tile<T, Rows, Columns, RowStride, Step, Accumulate>(a, b, c, count, factor);
    else
      remaining_rows<T, Rows - 1, Columns, RowStride, Step, Accumulate>(a, b, c, rows, count, factor);
  }
}

template <class T, int Columns, int RowStride, int Step, bool Accumulate>
void product_columns(const T* a, const T* b, T* c, int rows, int count, T factor) {
  int r = 0;
  for (; r + kRows <= rows; r += kRows)
    product_tile<T, kRows, Columns, RowStride, Step, Accumulate>(a + r * RowStride, b, c + r * kTokens, count,
                                                                 factor);
  remaining_rows<T, kRows - 1, Columns, RowStride, Step, Accumulate>(a + r * RowStride, b, c + r * kTokens,
                                                                     rows - r, count, factor);
}

template <class T, int RowStride, int Step, bool Accumulate>
void product(const T* a, const T* b, T* c, int rows, int lanes, int count, T factor) {
  constexpr int L = Simd<T>::lanes;
  int lane = 0;
  for (; lane + kColumns * L <= lanes; lane += kColumns * L)
    product_columns<T, kColumns, RowStride, Step, Accumulate>(a, b + lane, c + lane, rows, count, factor);
  for (; lane < lanes; lane += kFewColumns * L)
    product_columns<T, kFewColumns, RowStride, Step, Accumulate>(a, b + lane, c + lane, rows, count, factor);
}

// c (rows, lanes) = factor a^T b over the dim numbers of each token: a and b are blocks of panels. The
// product with the factor is rounded before anything is subtracted from it, here and wherever it is computed
// again.
template <class T>
DEPICT_INLINE void dot_tokens(const T* a, int rows, const T* b, int lanes, int dim, T factor, T* c) {
  product<T, 1, kTokens, false>(a, b, c, rows, lanes, dim, factor);
}

// c (dim, lanes) += a b over the first `tokens` tokens of block a; b is (tokens, lanes).
template <class T>
DEPICT_INLINE void add_weighted(const T* a, int tokens, const T* b, int lanes, int dim, T* c) {
  product<T, kTokens, 1, true>(a, b, c, dim, lanes, tokens, T(1));
}

// to (lanes, rows) = from^T, rows of both kTokens apart; rows and lanes are multiples of a vector's.
template <class T>
void transpose_tile(const T* from, int rows, int lanes, T* to) {
  constexpr int L = Simd<T>::lanes;
  for (int i = 0; i < rows; i += L)
    for (int j = 0; j < lanes; j += L) {
      Vec<T> v[L];
      DEPICT_UNROLL
      for (int k = 0; k < L; ++k) v[k] = load<T>(from + (i + k) * kTokens + j);
      transpose<T>(v);
      DEPICT_UNROLL
      for (int k = 0; k < L; ++k) store<T>(to + (j + k) * kTokens + i, v[k]);
    }
}

// The first number of a block; `head` counts (batch, heads).
template <class View>
DEPICT_INLINE auto* first_of(const View& view, int64_t head, int64_t block) {
  return view.data + head / view.heads * view.stride[0] + head % view.heads * view.stride[2] +
         block * kTokens * view.stride[1];
}

DEPICT_INLINE int tokens_in(int64_t tokens, int64_t block) {
  const int64_t left = tokens - block * kTokens;
  return left < kTokens ? static_cast<int>(left) : kTokens;
}

// The lanes of a block that hold tokens, rounded up to what is computed together.
template <class T>
DEPICT_INLINE int lanes_in(int64_t tokens, int64_t block) {
  constexpr int together = kFewColumns * Simd<T>::lanes;
  return (tokens_in(tokens, block) + together - 1) / together * together;
}

// Calls each(d, t, v) for the numbers of a block of a view, in the order of d for every t: v are those at d
// of as many tokens as a vector has lanes, from t on; 0 for tokens that do not exist.
template <class T, class Each>
DEPICT_INLINE void visit_tokens(const TokensView<const T>& view, int64_t head, int64_t block,
                                const Each& each) {
  constexpr int L = Simd<T>::lanes;
  const int tokens = tokens_in(view.tokens, block), dim = static_cast<int>(view.dim);
  const int64_t stride = view.stride[1];
  const T* from = first_of(view, head, block);
  for (int t = 0; t < kTokens; t += L) {
    const int rows = tokens - t < L ? tokens - t : L;
    int d = 0;
    for (; rows == L && d + L <= dim; d += L) {
      Vec<T> v[L];
      DEPICT_UNROLL
      for (int k = 0; k < L; ++k) v[k] = load_anywhere<T>(from + (t + k) * stride + d);
      transpose<T>(v);
      DEPICT_UNROLL
      for (int k = 0; k < L; ++k) each(d + k, t, v[k]);
    }
    for (; d < dim; ++d) {
      alignas(64) T v[L];
      for (int k = 0; k < L; ++k) v[k] = k < rows ? from[(t + k) * stride + d] : T(0);
      each(d, t, load<T>(v));
    }
  }
}

template <class T>
void pack_tokens(const TokensView<const T>& view, int64_t head, int64_t block, T* panel) {
  visit_tokens<T>(view, head, block, [&](int d, int t, Vec<T> v) { store<T>(panel + d * kTokens + t, v); });
}

// The inverse: writes value(d, t), numbers at d of the tokens from t on, of a block's tokens to a view.
template <class T, class Value>
DEPICT_INLINE void unpack_tokens(const TokensView<T>& view, int64_t head, int64_t block, const Value& value) {
  constexpr int L = Simd<T>::lanes;
  const int tokens = tokens_in(view.tokens, block), dim = static_cast<int>(view.dim);
  T* first = first_of(view, head, block);
  for (int t = 0; t < tokens; t += L) {
    const int rows = tokens - t < L ? tokens - t : L;
    for (int d = 0; d < dim; d += L) {
      Vec<T> v[L];
      const int columns = dim - d < L ? dim - d : L;
      for (int k = 0; k < L; ++k) v[k] = k < columns ? value(d + k, t) : splat<T>(T(0));
      transpose<T>(v);
      for (int k = 0; k < rows; ++k) {
        T* to = first + (t + k) * view.stride[1] + d;
        if (columns == L) {
          store_anywhere<T>(to, v[k]);
        } else {
          alignas(64) T last[L];
          store<T>(last, v[k]);
          for (int c = 0; c < columns; ++c) to[c] = last[c];
        }
      }
    }
  }
}

}  // namespace depict::cpu::DEPICT_ISA
