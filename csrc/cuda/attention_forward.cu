// Attention with one tensor as key and value, forward: online softmax in base 2 over tiles of keys, each of
// which is loaded once and serves both products. Also the row sums that backward subtracts.
#include <algorithm>

#include "attention_launch.h"
#include "attention_tiles.h"

namespace depict::cuda {
namespace {

constexpr int kThreads = 128;

template <class T, int D>
struct Forward {
  static constexpr int MT = sizeof(T) == 2 ? 2 : 1;  // 16 MT rows per warp
  static constexpr int NT = sizeof(T) == 4 ? 4 : D <= 64 ? 8 : D <= 104 ? 6 : 4;
  static constexpr int kQueries = kThreads / 32 * 16 * MT, kKeys = 8 * NT;
  static constexpr int kShared = (kQueries + 2 * kKeys) * kStride<T, D> * static_cast<int>(sizeof(T));
};

template <class T, int D>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 1 : 0) forward_kernel(ForwardArguments a) {
  using F = Forward<T, D>;
  constexpr int MT = F::MT, NT = F::NT, L = kStride<T, D>;
  const int64_t block = block_index() % a.blocks, head = block_index() / a.blocks % a.heads,
                batch = block_index() / a.blocks / a.heads;
  const int64_t first = block * F::kQueries;
  const int keys = static_cast<int>(a.keys), lane = thread_index() % 32, warp = thread_index() / 32;
  T* q = reinterpret_cast<T*>(shared_memory());
  T* tiles = q + F::kQueries * L;  // two of w
  TileLoader<T, D, kThreads> load_q(a.q, batch, head, a.queries - first, a.dim, a.q_vector);
  load_q.data += first * a.q.row_stride;
  const TileLoader<T, D, kThreads> load_w(a.w, batch, head, a.keys, a.dim, a.w_vector);
  load_q.template clear_padding<F::kQueries + 2 * F::kKeys>(q);
  load_q.template load<F::kQueries>(q, 0);
  load_w.template load<F::kKeys>(tiles, 0);
  commit_copies();

  float sum[MT][D / 8][4], top[MT][2], total[MT][2];
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int c = 0; c < D / 8; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[m][c][i] = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) top[m][half] = -INFINITY, total[m][half] = 0;
  }

  const T* my_q = q + warp * 16 * MT * L;
#pragma unroll 1
  for (int start = 0; start < keys; start += F::kKeys) {
    const int now = start / F::kKeys % 2;
    wait_for_copies<0>();
    barrier();  // this tile is here, and nobody reads the other one any more
    if (start + F::kKeys < keys) {
      load_w.template load<F::kKeys>(tiles + (1 - now) * F::kKeys * L, start + F::kKeys);
      commit_copies();
    }
    const T* w = tiles + now * F::kKeys * L;
    float s[MT][NT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = 0;
    multiply_rows<T, D, MT, NT, false, false>(my_q, nullptr, w, nullptr, a.precise, s, s, s);
    if (a.negative) {
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[m][n][i] = -s[m][n][i];
    }
    if (start + F::kKeys > keys) {
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (start + n * 8 + lane % 4 * 2 + i % 2 >= keys)
#pragma unroll
            for (int m = 0; m < MT; ++m) s[m][n][i] = -INFINITY;
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = top[m][half];
#pragma unroll
        for (int n = 0; n < NT; ++n)
          highest = fmaxf(highest, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        highest = fmaxf(highest, shuffle_xor(highest, 1));  // the four lanes of a row
        highest = fmaxf(highest, shuffle_xor(highest, 2));
        const float rescale = fast_exp2((top[m][half] - highest) * a.scale);
        top[m][half] = highest;
        total[m][half] *= rescale;
#pragma unroll
        for (int c = 0; c < D / 8; ++c) sum[m][c][2 * half] *= rescale, sum[m][c][2 * half + 1] *= rescale;
      }
      const bool relative = subtract_large_top(s[m], top[m], a.scale);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float shift = relative ? 0.0f : -top[m][half] * a.scale;
        float row = 0;  // this lane's columns only
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[m][n][i] = fast_exp2(fmaf(s[m][n][i], a.scale, shift));
            row += s[m][n][i];
          }
        total[m][half] += row;
      }
    }
    add_weighted_rows<T, D, MT, NT>(sum, s, w, a.precise);
  }

  const int rows = static_cast<int>(a.queries - first < F::kQueries ? a.queries - first : F::kQueries);
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float all = total[m][half];
      all += shuffle_xor(all, 1);
      all += shuffle_xor(all, 2);
      const float inverse = 1.0f / all;
#pragma unroll
      for (int c = 0; c < D / 8; ++c) sum[m][c][2 * half] *= inverse, sum[m][c][2 * half + 1] *= inverse;
      const int row = (warp * MT + m) * 16 + half * 8 + lane / 4;
      if (lane % 4 == 0 && row < rows)
        a.lse[(batch * a.heads + head) * a.queries + first + row] =
            (top[m][half] * a.scale + log2f(all)) * kLn2;
    }
  T* out = static_cast<T*>(a.out) + ((batch * a.queries + first + warp * 16 * MT) * a.heads + head) * a.dim;
  store_rows<T, D, MT>(sum, out, a.heads * a.dim, rows - warp * 16 * MT, a.dim);
}

struct DeltaArguments {
  Rows grad;
  const void* out;
  float* delta;
  int64_t queries, heads, total;
  int dim;
  float scale;
};

constexpr int kDeltaLanes = 8;  // per row

// Batch, query and head of a row in the order of the output, in 32 bits where they do: 64-bit divisions take
// longer than all the rest.
template <class I>
__device__ __forceinline__ void locate_row(const DeltaArguments& a, int64_t row, int64_t& batch,
                                           int64_t& query, int64_t& head) {
  const I r = static_cast<I>(row), heads = static_cast<I>(a.heads), queries = static_cast<I>(a.queries);
  const I token = r / heads, in_batch = token / queries;
  head = r - token * heads, query = token - in_batch * queries, batch = in_batch;
}

template <class T, int Bytes>
__global__ void __launch_bounds__(256) delta_kernel(DeltaArguments a) {
  constexpr int V = Bytes / sizeof(T);
  struct alignas(Bytes) Vector {
    T values[V];
  };
  const int64_t row = (block_index() * thread_count() + thread_index()) / kDeltaLanes;
  const int lane = thread_index() % kDeltaLanes;
  int64_t batch = 0, query = 0, head = 0;
  float sum = 0;
  if (row < a.total) {
    if (a.total <= 0xffffffffLL)
      locate_row<uint32_t>(a, row, batch, query, head);
    else
      locate_row<uint64_t>(a, row, batch, query, head);
    const T* grad = static_cast<const T*>(a.grad.data) + batch * a.grad.batch_stride +
                    query * a.grad.row_stride + head * a.grad.head_stride;
    const T* out = static_cast<const T*>(a.out) + row * a.dim;
#pragma unroll 4
    for (int c = lane * V; c < a.dim; c += kDeltaLanes * V) {
      const Vector x = *reinterpret_cast<const Vector*>(grad + c),
                   y = *reinterpret_cast<const Vector*>(out + c);
#pragma unroll
      for (int i = 0; i < V; ++i) sum += to_float(x.values[i]) * to_float(y.values[i]);
    }
  }
#pragma unroll
  for (int mask = kDeltaLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane == 0 && row < a.total) a.delta[(batch * a.heads + head) * a.queries + query] = a.scale * sum;
}

}  // namespace

const char* attention_forward(const AttentionShape& s, Variant variant, const Rows& q, const Rows& w,
                              void* out, float* lse, void* stream) {
  if (s.batch * s.queries * s.heads == 0) return nullptr;
  if (variant == Variant::wgmma) return attention_forward_wgmma(s, q, w, out, lse, stream);
  return with_type(s.type, [&](auto element) {
    using T = typename decltype(element)::type;
    return with_dim(s.dim, [&](auto dim) {
      constexpr int D = decltype(dim)::value;
      using F = Forward<T, D>;
      const ForwardArguments a = forward_arguments(s, q, w, out, lse, F::kQueries, sizeof(T));
      return launch(forward_kernel<T, D>, a.blocks * s.heads * s.batch, kThreads, F::kShared, stream, a);
    });
  });
}

const char* attention_delta(const AttentionShape& s, const Rows& grad, const void* out, float* delta,
                            void* stream) {
  const int64_t rows = s.batch * s.heads * s.queries;
  if (rows == 0) return nullptr;
  const DeltaArguments a{grad, out, delta, s.queries, s.heads, rows, s.dim, s.scale};
  return with_type(s.type, [&](auto element) {
    using T = typename decltype(element)::type;
    const auto run = [&](auto kernel) {
      constexpr int threads = 256, per_block = threads / kDeltaLanes;
      return launch(kernel, (rows + per_block - 1) / per_block, threads, 0, stream, a);
    };
    const int64_t tokens = s.heads * s.dim;
    const int bytes = std::min(vector_bytes(grad, s, sizeof(T)),
                               vector_bytes({out, s.queries * tokens, tokens, s.dim}, s, sizeof(T)));
    if (bytes == 16) return run(delta_kernel<T, 16>);
    if (bytes == 8) return run(delta_kernel<T, 8>);
    if constexpr (sizeof(T) == 2)
      return bytes == 4 ? run(delta_kernel<T, 4>) : run(delta_kernel<T, 2>);
    else
      return run(delta_kernel<T, 4>);
  });
}

}  // namespace depict::cuda
