// Attention for 16-bit types on Hopper's warpgroup products (device_sm90.h): forward, and the gradient of
// self-attention. Mathematics, masks and layout of the outputs are those of attention_forward.cu and
// attention_backward.cu.
//
// Two warpgroups of 64 rows share the tiles of the other side, which are double-buffered. Tiles are core
// matrices, so that one copy of a tile serves the scores (rows along n) and the sums (rows along k). TMA
// cannot fill them: the rows of one head, 200 bytes where the head dimension is 100, are not multiples of 16
// bytes apart.
#include "attention_launch.h"
#include "attention_tiles.h"
#include "device_sm90.h"

namespace depict::cuda {
namespace {

constexpr int kThreads = 256, kRows = kThreads / 2;

// Columns are rounded up to the 16 of a product's reduction; the sums have only D.
template <class T, int D>
struct CoreMatrices {
  static constexpr int kColumns = (D + 15) / 16 * 16;
  [[maybe_unused]] static constexpr int kPeriod = 8;
  // From one core matrix to the next along a row: 16 bytes more than its 128, so that threads which copy the
  // pieces of one row to consecutive core matrices write to different banks.
  static constexpr int kNext = 144;
  static constexpr int kNextRows = kColumns / 8 * kNext;  // to the next 8 rows
  static constexpr int bytes(int rows) { return rows / 8 * kNextRows; }
  static constexpr int elements(int rows) { return bytes(rows) / 2; }

  static __device__ __forceinline__ int at(int row, int column) {
    return row / 8 * (kNextRows / 2) + column / 8 * (kNext / 2) + row % 8 * 8 + column % 8;
  }
};

#ifdef DEPICT_SM90

// s = x y^T, of this warpgroup's 64 rows of x with N rows of y.
template <class T, int D, int N>
__device__ __forceinline__ void multiply_rows(float (&s)[N / 8][4], const T* x, const T* y) {
  using L = CoreMatrices<T, D>;
  const uint64_t a = describe_tile(x, L::kNext, L::kNextRows), b = describe_tile(y, L::kNext, L::kNextRows);
  constexpr int kStep = 2 * L::kNext;
  multiply_shared<T, N, false, false>(s, a, b);
#pragma unroll
  for (int k = 1; k < L::kColumns / 16; ++k)
    multiply_shared<T, N, false, true>(s, step_tile(a, k * kStep), step_tile(b, k * kStep));
}

// sum += p y, p packed.
template <class T, int D, int N>
__device__ __forceinline__ void add_weighted_rows(float (&sum)[D / 8][4], const uint32_t (&p)[N / 16][4],
                                                  const T* y) {
  using L = CoreMatrices<T, D>;
  const uint64_t b = describe_tile(y, L::kNextRows, L::kNext);
#pragma unroll
  for (int j = 0; j < N / 16; ++j)
    multiply_registers<T, D, true, true>(sum, p[j], step_tile(b, j * 2 * L::kNextRows));
}

template <class T, int N>
__device__ __forceinline__ void pack_weights(uint32_t (&packed)[N / 16][4], const float (&p)[N / 8][4]) {
#pragma unroll
  for (int j = 0; j < N / 16; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      packed[j][i] = pack<T>(p[2 * j + i / 2][i % 2 * 2], p[2 * j + i / 2][i % 2 * 2 + 1]);
}

#endif

template <class T, int D>
struct Forward {
  static constexpr int kKeys = 64;
  static constexpr int kShared = CoreMatrices<T, D>::bytes(kRows + 2 * kKeys);
};

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2) forward_wgmma_kernel(ForwardArguments a) {
#ifdef DEPICT_SM90
  using L = CoreMatrices<T, D>;
  constexpr int N = Forward<T, D>::kKeys;
  // A row's exponentials are relative to a score that may lie this much (as power of two) below its highest
  // one: the sums are only rescaled when it would be more, which after the first tiles is rare.
  constexpr float kSlack = 8.0f;
  const int64_t block = block_index() % a.blocks, head = block_index() / a.blocks % a.heads,
                batch = block_index() / a.blocks / a.heads;
  const int64_t first = block * kRows;
  const int keys = static_cast<int>(a.keys), lane = thread_index() % 32, warp = thread_index() / 32;
  const int rows = static_cast<int>(a.queries - first < kRows ? a.queries - first : kRows);
  const int group = shuffle(warp / 4, 0);  // which the compiler now knows to be the same in all lanes
  const bool busy = group * 64 < rows;     // this warpgroup has rows
  T* q = reinterpret_cast<T*>(shared_memory());
  T* tiles = q + L::elements(kRows);  // two of w
  TileLoader<T, D, kThreads, L> load_q(a.q, batch, head, a.queries - first, a.dim, a.q_vector);
  load_q.data += first * a.q.row_stride;
  const TileLoader<T, D, kThreads, L> load_w(a.w, batch, head, a.keys, a.dim, a.w_vector);
  load_q.template clear_padding<kRows + 2 * N>(q);
  load_q.template load<kRows>(q, 0);
  load_w.template load<N>(tiles, 0);
  commit_copies();

  float sum[1][D / 8][4], top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
#pragma unroll
  for (int c = 0; c < D / 8; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[0][c][i] = 0;

  const T* my_q = q + group * L::elements(64);
#pragma unroll 1
  for (int start = 0; start < keys; start += N) {
    const int now = start / N % 2;
    wait_for_copies<0>();
    fence_tensor_core_reads();
    barrier();  // this tile is here, and nobody reads the other one any more
    if (start + N < keys) {
      load_w.template load<N>(tiles + (1 - now) * L::elements(N), start + N);
      commit_copies();
    }
    if (!busy) continue;
    const T* w = tiles + now * L::elements(N);
    float s[N / 8][4];
    fence_products();
    multiply_rows<T, D, N>(s, my_q, w);
    commit_products();
    wait_for_products<0>(s);

    if (a.negative) {
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = -s[n][i];
    }
    if (start + N > keys) {
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (start + n * 8 + lane % 4 * 2 + i % 2 >= keys) s[n][i] = -INFINITY;
    }
    float highest[2];
    bool rises = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[half] = top[half];
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
        highest[half] = fmaxf(highest[half], fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      highest[half] = fmaxf(highest[half], shuffle_xor(highest[half], 1));  // the four lanes of a row
      highest[half] = fmaxf(highest[half], shuffle_xor(highest[half], 2));
      if ((highest[half] - top[half]) * a.scale > kSlack)
        rises = true;
      else
        highest[half] = top[half];
    }
    if (ballot(rises)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float rescale =
            highest[half] == top[half] ? 1.0f : fast_exp2((top[half] - highest[half]) * a.scale);
        top[half] = highest[half];
        total[half] *= rescale;
#pragma unroll
        for (int c = 0; c < D / 8; ++c) sum[0][c][2 * half] *= rescale, sum[0][c][2 * half + 1] *= rescale;
      }
    }
    const bool relative = subtract_large_top(s, top, a.scale);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float shift = relative ? 0.0f : -top[half] * a.scale;
      float row = 0;  // this lane's columns only
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[n][i] = fast_exp2(fmaf(s[n][i], a.scale, shift));
          row += s[n][i];
        }
      total[half] += row;
    }
    uint32_t p[N / 16][4];
    pack_weights<T, N>(p, s);
    fence_products(sum[0], p);
    add_weighted_rows<T, D, N>(sum[0], p, w);
    commit_products();
    wait_for_products<0>(sum[0]);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float all = total[half];
    all += shuffle_xor(all, 1);
    all += shuffle_xor(all, 2);
    const float inverse = 1.0f / all;
#pragma unroll
    for (int c = 0; c < D / 8; ++c) sum[0][c][2 * half] *= inverse, sum[0][c][2 * half + 1] *= inverse;
    const int row = warp * 16 + half * 8 + lane / 4;
    if (lane % 4 == 0 && row < rows)
      a.lse[(batch * a.heads + head) * a.queries + first + row] = (top[half] * a.scale + log2f(all)) * kLn2;
  }
  T* out = static_cast<T*>(a.out) + ((batch * a.queries + first + warp * 16) * a.heads + head) * a.dim;
  store_rows<T, D, 1>(sum, out, a.heads * a.dim, rows - warp * 16, a.dim);
#elif defined(__CUDA_ARCH__)
  __trap();  // why_not_wgmma() keeps this from being launched
#endif
}

template <class T, int D>
struct Backward {
  static constexpr int kColumns = 64;
  static constexpr int kShared =
      CoreMatrices<T, D>::bytes(2 * kRows + 4 * kColumns) + 4 * kColumns * static_cast<int>(sizeof(float));
};

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1) self_backward_wgmma_kernel(BackwardArguments a) {
#ifdef DEPICT_SM90
  using L = CoreMatrices<T, D>;
  constexpr int N = Backward<T, D>::kColumns;
  const int64_t block = block_index() % a.blocks, head = block_index() / a.blocks % a.heads,
                batch = block_index() / a.blocks / a.heads;
  const int64_t first = block * kRows, statistics = (batch * a.heads + head) * a.x_rows;
  const int all_rows = static_cast<int>(a.x_rows), lane = thread_index() % 32, warp = thread_index() / 32;
  const int rows = static_cast<int>(a.x_rows - first < kRows ? a.x_rows - first : kRows);
  const int group = warp / 4;
  const bool busy = group * 64 < rows;  // this warpgroup has rows

  T* x = reinterpret_cast<T*>(shared_memory());
  T* grad_x = x + L::elements(kRows);
  T* others = grad_x + L::elements(kRows);  // two of y and grad_y
  float* numbers = reinterpret_cast<float*>(others + L::elements(4 * N));
  TileLoader<T, D, kThreads, L> load_x(a.x, batch, head, rows, a.dim, a.x_vector);
  load_x.data += first * a.x.row_stride;
  TileLoader<T, D, kThreads, L> load_grad_x(a.grad, batch, head, rows, a.dim, a.grad_vector);
  load_grad_x.data += first * a.grad.row_stride;
  const TileLoader<T, D, kThreads, L> load_y(a.x, batch, head, a.x_rows, a.dim, a.x_vector);
  const TileLoader<T, D, kThreads, L> load_grad_y(a.grad, batch, head, a.x_rows, a.dim, a.grad_vector);
  load_x.template clear_padding<2 * kRows + 4 * N>(x);
  load_x.template load<kRows>(x, 0);
  load_grad_x.template load<kRows>(grad_x, 0);
  const auto load_others = [&](int buffer, int start) {
    load_y.template load<N>(others + buffer * L::elements(2 * N), start);
    load_grad_y.template load<N>(others + buffer * L::elements(2 * N) + L::elements(N), start);
    float* to = numbers + buffer * 2 * N;
    for (int i = thread_index(); i < N; i += kThreads) {
      const bool exists = start + i < all_rows;
      // An infinite log-sum-exp makes the weight of a missing row 0.
      to[i] = exists ? a.lse[statistics + start + i] * kLog2E : INFINITY;
      to[N + i] = exists ? a.delta[statistics + start + i] : 0.0f;
    }
    commit_copies();
  };
  load_others(0, 0);

  float lse_x[2], delta_x[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + half * 8 + lane / 4;
    lse_x[half] = row < rows ? a.lse[statistics + first + row] * kLog2E : 0.0f;
    delta_x[half] = row < rows ? a.delta[statistics + first + row] : 0.0f;
  }
  float sum[1][D / 8][4];
#pragma unroll
  for (int c = 0; c < D / 8; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[0][c][i] = 0;

  const T *my_x = x + group * L::elements(64), *my_grad = grad_x + group * L::elements(64);
  const float scale_log2 = a.scale * kLog2E;
#pragma unroll 1
  for (int start = 0; start < all_rows; start += N) {
    const int now = start / N % 2;
    wait_for_copies<0>();
    fence_tensor_core_reads();
    barrier();  // these tiles are here, and nobody reads the other ones any more
    if (start + N < all_rows) load_others(1 - now, start + N);
    if (!busy) continue;
    const T *y = others + now * L::elements(2 * N), *grad_y = y + L::elements(N);
    const float *lse_y = numbers + now * 2 * N, *delta_y = lse_y + N;

    float s[N / 8][4], by_grad_x[N / 8][4], by_grad_y[N / 8][4], weights[N / 8][4];
    fence_products();
    multiply_rows<T, D, N>(s, my_x, y);
    commit_products();
    multiply_rows<T, D, N>(by_grad_x, my_grad, y);
    multiply_rows<T, D, N>(by_grad_y, my_x, grad_y);
    commit_products();

    // The exponentials overlap with these two products: s becomes the weights of x's queries, `weights` those
    // of y's queries.
    wait_for_products<1>(s);
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float lse = lse_y[n * 8 + lane % 4 * 2 + i % 2];
        weights[n][i] = fast_exp2(fmaf(s[n][i], scale_log2, -lse));
        s[n][i] = fast_exp2(fmaf(s[n][i], scale_log2, -lse_x[i / 2]));
      }
    if (start + N > all_rows) {
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (start + n * 8 + lane % 4 * 2 + i % 2 >= all_rows) s[n][i] = 0;
    }
    uint32_t packed[N / 16][4], packed_grad[N / 16][4];
    pack_weights<T, N>(packed, weights);
    fence_products(sum[0], packed);
    add_weighted_rows<T, D, N>(sum[0], packed, grad_y);
    commit_products();

    // And the gradient of the scores with this one.
    wait_for_products<1>(by_grad_x, by_grad_y);
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        s[n][i] = s[n][i] * fmaf(by_grad_x[n][i], a.scale, -delta_x[i / 2]) +
                  weights[n][i] * fmaf(by_grad_y[n][i], a.scale, -delta_y[n * 8 + lane % 4 * 2 + i % 2]);
    pack_weights<T, N>(packed_grad, s);
    fence_products(packed_grad);
    add_weighted_rows<T, D, N>(sum[0], packed_grad, y);
    commit_products();
    wait_for_products<0>(sum[0]);
  }

  T* out = static_cast<T*>(a.out) + ((batch * a.x_rows + first + warp * 16) * a.heads + head) * a.dim;
  store_rows<T, D, 1>(sum, out, a.heads * a.dim, rows - warp * 16, a.dim);
#elif defined(__CUDA_ARCH__)
  __trap();  // why_not_wgmma() keeps this from being launched
#endif
}

template <class Run>
const char* with_16_bits(Type type, const Run& run) {
  return type == Type::f16 ? run(Element<Float16>{}) : run(Element<Bfloat16>{});
}

}  // namespace

const char* why_not_wgmma(const AttentionShape& s) {
  if (s.type == Type::f32) return "the wgmma variant of attention takes float16 and bfloat16, not float32";
#if defined(DEPICT_EMULATE)
  return nullptr;
#elif !defined(DEPICT_BUILT_FOR_SM90A)
  return "the wgmma variant of attention was not built: 9.0a must be in TORCH_CUDA_ARCH_LIST";
#else
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (major != 9 || minor != 0)
    return "the wgmma variant of attention runs on GPUs of compute capability 9.0 alone (H100, H200)";
  return nullptr;
#endif
}

const char* attention_forward_wgmma(const AttentionShape& s, const Rows& q, const Rows& w, void* out,
                                    float* lse, void* stream) {
  if (const char* reason = why_not_wgmma(s)) return reason;
  return with_16_bits(s.type, [&](auto element) {
    using T = typename decltype(element)::type;
    return with_dim(s.dim, [&](auto dim) {
      constexpr int D = decltype(dim)::value;
      const ForwardArguments a = forward_arguments(s, q, w, out, lse, kRows, sizeof(T));
      return launch(forward_wgmma_kernel<T, D>, a.blocks * s.heads * s.batch, kThreads,
                    Forward<T, D>::kShared, stream, a);
    });
  });
}

const char* self_attention_backward_wgmma(const AttentionShape& s, const Rows& x, const Rows& grad,
                                          const float* lse, const float* delta, void* out, void* stream) {
  if (const char* reason = why_not_wgmma(s)) return reason;
  return with_16_bits(s.type, [&](auto element) {
    using T = typename decltype(element)::type;
    return with_dim(s.dim, [&](auto dim) {
      constexpr int D = decltype(dim)::value;
      const BackwardArguments a =
          backward_arguments(s, x, x, grad, lse, delta, out, s.queries, s.queries, kRows, sizeof(T));
      return launch(self_backward_wgmma_kernel<T, D>, a.blocks * s.heads * s.batch, kThreads,
                    Backward<T, D>::kShared, stream, a);
    });
  });
}

}  // namespace depict::cuda
