// The gradient of attention's rows, gathered: the block that owns rows x loops over the rows y on the other
// side and writes its gradient once. No atomics, and the result is bitwise repeatable. In self-attention a
// tile of scores x y^T serves x both as query (with x's log-sum-exp) and, read transposed, as key and value
// (with y's): five products per tile, as many as the scattered form needs.
#include "attention_launch.h"
#include "attention_tiles.h"

namespace depict::cuda {
namespace {

constexpr int kThreads = 128;

template <class T, int D, bool Query, bool Key>
struct Backward {
  // 16 MT rows of x per warp, 8 NT rows of y at a time: as many as registers hold without spilling.
  static constexpr int MT = sizeof(T) == 2 && D <= 64 && !(Query && Key) ? 2 : 1;
  static constexpr int NT = sizeof(T) == 4 || MT == 2 ? 4 : D <= 64 || (D <= 104 && !(Query && Key)) ? 8 : 6;
  static constexpr int kRows = kThreads / 32 * 16 * MT, kColumns = 8 * NT;
  static constexpr int kOwnTiles = Query ? 2 : 1, kOtherTiles = Key ? 2 : 1;
  static constexpr int kShared =
      (kRows * kOwnTiles + 2 * kColumns * kOtherTiles) * kStride<T, D> * static_cast<int>(sizeof(T)) +
      (Key ? 4 * kColumns * static_cast<int>(sizeof(float)) : 0);
};

template <class T, int D, bool Query, bool Key>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 1 : 0) backward_kernel(BackwardArguments a) {
  using B = Backward<T, D, Query, Key>;
  constexpr int MT = B::MT, NT = B::NT, L = kStride<T, D>;
  const int64_t block = block_index() % a.blocks, head = block_index() / a.blocks % a.heads,
                batch = block_index() / a.blocks / a.heads;
  const int64_t first = block * B::kRows;
  const int y_rows = static_cast<int>(a.y_rows), lane = thread_index() % 32, warp = thread_index() / 32;
  const int64_t statistics = (batch * a.heads + head) * (Query ? a.x_rows : a.y_rows);

  T* x = reinterpret_cast<T*>(shared_memory());
  T* grad_x = x + B::kRows * L;
  T* others = x + B::kRows * B::kOwnTiles * L;
  constexpr int kOther = B::kColumns * L;
  float* numbers = reinterpret_cast<float*>(others + 2 * B::kOtherTiles * kOther);
  TileLoader<T, D, kThreads> load_x(a.x, batch, head, a.x_rows - first, a.dim, a.x_vector);
  load_x.data += first * a.x.row_stride;
  const TileLoader<T, D, kThreads> load_y(a.y, batch, head, a.y_rows, a.dim, a.y_vector);
  TileLoader<T, D, kThreads> load_grad(a.grad, batch, head, Query ? a.x_rows - first : a.y_rows, a.dim,
                                       a.grad_vector);
  const TileLoader<T, D, kThreads> load_grad_y(a.grad, batch, head, a.y_rows, a.dim, a.grad_vector);
  load_x.template clear_padding<B::kRows * B::kOwnTiles + 2 * B::kColumns * B::kOtherTiles>(x);
  load_x.template load<B::kRows>(x, 0);
  if constexpr (Query) {
    load_grad.data += first * a.grad.row_stride;
    load_grad.template load<B::kRows>(grad_x, 0);
  }
  const auto load_others = [&](int buffer, int start) {
    T* y = others + buffer * B::kOtherTiles * kOther;
    load_y.template load<B::kColumns>(y, start);
    if constexpr (Key) {
      load_grad_y.template load<B::kColumns>(y + kOther, start);
      float* to = numbers + buffer * 2 * B::kColumns;
      for (int i = thread_index(); i < B::kColumns; i += kThreads) {
        const bool exists = start + i < y_rows;
        // An infinite log-sum-exp makes the weight of a missing row 0.
        to[i] = exists ? a.lse[statistics + start + i] * kLog2E : INFINITY;
        to[B::kColumns + i] = exists ? a.delta[statistics + start + i] : 0.0f;
      }
    }
    commit_copies();
  };
  load_others(0, 0);

  float lse_x[MT][2], delta_x[MT][2];
  if constexpr (Query) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first + (warp * MT + m) * 16 + half * 8 + lane / 4;
        const bool exists = row < a.x_rows;
        lse_x[m][half] = exists ? a.lse[statistics + row] * kLog2E : 0.0f;
        delta_x[m][half] = exists ? a.delta[statistics + row] : 0.0f;
      }
  }
  float sum[MT][D / 8][4];
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int c = 0; c < D / 8; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[m][c][i] = 0;

  const T *my_x = x + warp * 16 * MT * L, *my_grad = grad_x + warp * 16 * MT * L;
  const float scale_log2 = a.scale * kLog2E;
#pragma unroll 1
  for (int start = 0; start < y_rows; start += B::kColumns) {
    const int now = start / B::kColumns % 2;
    wait_for_copies<0>();
    barrier();  // these tiles are here, and nobody reads the other ones any more
    if (start + B::kColumns < y_rows) load_others(1 - now, start + B::kColumns);
    const T* y = others + now * B::kOtherTiles * kOther;
    const float* lse_y = numbers + now * 2 * B::kColumns;
    const float* delta_y = lse_y + B::kColumns;

    float s[MT][NT][4], by_grad_x[Query ? MT : 1][NT][4], by_grad_y[Key ? MT : 1][NT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[m][n][i] = 0;
          if constexpr (Query) by_grad_x[m][n][i] = 0;
          if constexpr (Key) by_grad_y[m][n][i] = 0;
        }
    if constexpr (Query && Key)
      multiply_rows<T, D, MT, NT, true, true>(my_x, my_grad, y, y + kOther, a.precise, s, by_grad_x,
                                              by_grad_y);
    else if constexpr (Query)
      multiply_rows<T, D, MT, NT, true, false>(my_x, my_grad, y, nullptr, a.precise, s, by_grad_x, s);
    else
      multiply_rows<T, D, MT, NT, false, true>(my_x, nullptr, y, y + kOther, a.precise, s, s, by_grad_y);

    // s becomes the gradient of the scores, by_grad_y the weights of y's queries.
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = n * 8 + lane % 4 * 2 + i % 2;
          float grad = 0;
          if constexpr (Query) {
            const float p = fast_exp2(fmaf(s[m][n][i], scale_log2, -lse_x[m][i / 2]));
            grad = p * fmaf(by_grad_x[m][n][i], a.scale, -delta_x[m][i / 2]);
            if (start + column >= y_rows) grad = 0;
          }
          if constexpr (Key) {
            const float p = fast_exp2(fmaf(s[m][n][i], scale_log2, -lse_y[column]));
            grad += p * fmaf(by_grad_y[m][n][i], a.scale, -delta_y[column]);
            by_grad_y[m][n][i] = p;
          }
          s[m][n][i] = grad;
        }
    if constexpr (Key) add_weighted_rows<T, D, MT, NT>(sum, by_grad_y, y + kOther, a.precise);
    add_weighted_rows<T, D, MT, NT>(sum, s, y, a.precise);
  }

  const int64_t left = a.x_rows - first;
  const int rows = static_cast<int>(left < B::kRows ? left : B::kRows);
  T* out = static_cast<T*>(a.out) + ((batch * a.x_rows + first + warp * 16 * MT) * a.heads + head) * a.dim;
  store_rows<T, D, MT>(sum, out, a.heads * a.dim, rows - warp * 16 * MT, a.dim);
}

template <bool Query, bool Key>
const char* run(const AttentionShape& s, const Rows& x, const Rows& y, const Rows& grad, const float* lse,
                const float* delta, void* out, void* stream) {
  const int64_t x_rows = Query ? s.queries : s.keys, y_rows = Query ? s.keys : s.queries;
  return with_type(s.type, [&](auto element) {
    using T = typename decltype(element)::type;
    return with_dim(s.dim, [&](auto dim) {
      constexpr int D = decltype(dim)::value;
      using B = Backward<T, D, Query, Key>;
      const BackwardArguments a =
          backward_arguments(s, x, y, grad, lse, delta, out, x_rows, y_rows, B::kRows, sizeof(T));
      return launch(backward_kernel<T, D, Query, Key>, a.blocks * s.heads * s.batch, kThreads, B::kShared,
                    stream, a);
    });
  });
}

}  // namespace

const char* attention_backward(const AttentionShape& s, Variant variant, Role role, const Rows& x,
                               const Rows& y, const Rows& grad, const float* lse, const float* delta,
                               void* out, void* stream) {
  if (s.batch * s.heads * (role == Role::key ? s.keys : s.queries) == 0) return nullptr;
  if (variant == Variant::wgmma)
    return role == Role::self ? self_attention_backward_wgmma(s, x, grad, lse, delta, out, stream)
                              : "the wgmma variant of attention's backward is for self-attention only";
  if (role == Role::self) return run<true, true>(s, x, y, grad, lse, delta, out, stream);
  if (role == Role::query) return run<true, false>(s, x, y, grad, lse, delta, out, stream);
  return run<false, true>(s, x, y, grad, lse, delta, out, stream);
}

}  // namespace depict::cuda
