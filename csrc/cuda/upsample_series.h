// Sums over classes and gradients of exponentials in a tile: by geometric series, and directly where those do
// not hold. See upsample_loss.cu for the plan.
#pragma once

#include "upsample_cells.h"

namespace depict::cuda {

constexpr float kLog2E = 1.4426950408889634f;
// Exponents below kFloor are raised to it. That is harmless for a class that stays below kNegligible in the
// whole cell while the sum is at least kSmallSum (a relative error of e^-42 / 2e-9 = 3e-10), and only then.
// It leaves room for kLargeScale: Horner's polynomials reach 16 e^64 times scale before e takes it back.
constexpr float kFloor = -64.0f, kNegligible = -42.0f, kSmallSum = 2e-9f, kLargeScale = 1e9f;
// Stands for -inf where exponentials are taken directly: 0 times it is 0.
constexpr float kLowest = -3.4028234663852886e38f;
constexpr int kChunk = 192;  // classes in shared memory at a time

template <int N>
struct Work {  // what a warp works with
  LossArguments a;
  const Tile& tile;                      // in shared memory: registers are scarcer
  int lane, rows_log2, pixels, batches;  // lanes along y are 2^rows_log2; pixels = N times that
  float* u;                              // [pixels] sum of exponentials, later u
  float* peak;                           // [pixels] what the exponentials are relative to; of direct tiles
  int32_t* label;                        // [pixels] -1 where none counts
  Float4* form;                          // [chunk] a class's samples, later its gradient

  // A lane's pixels are p = lane, lane + 32, ...: rows of N, so that all of them are in one column.
  static constexpr int kRowsOfBatch = 32 / N;
  __device__ __forceinline__ int column() const { return lane & (N - 1); }
  __device__ __forceinline__ int first_row() const { return static_cast<unsigned>(lane) / N; }
  __device__ __forceinline__ int row(int batch) const { return first_row() + batch * kRowsOfBatch; }
  __device__ __forceinline__ bool inside(int batch) const {
    return row(batch) < tile.y.count && column() < tile.x.count;
  }
  // Of the lower and the right samples. Explicitly fused: wherever it is computed, it is the same number.
  __device__ __forceinline__ float weight_y(float row) const { return fmaf(row, tile.y.step, tile.y.first); }
  __device__ __forceinline__ float weight_x(float column) const {
    return fmaf(column, tile.x.step, tile.x.first);
  }
};

// Classes from c0 on as forms s + x tx + y ty + w tx ty, base 2. Whether the series cannot hold one of them.
template <int N>
__device__ __forceinline__ bool stage_series(const Work<N>& w, int c0, int count) {
  const Corners at = w.tile.packed;
  const float* const packed = w.a.packed + c0;
  bool wide = false;
  for (int c = w.lane; c < count; c += 32) {
    float ul = packed[at.ul + c], ur = packed[at.ur + c], ll = packed[at.ll + c], lr = packed[at.lr + c];
    const float lowest = fminf(fminf(ul, ur), fminf(ll, lr)), highest = fmaxf(fmaxf(ul, ur), fmaxf(ll, lr));
    wide |= lowest < kFloor && highest > kNegligible;
    // NaN passes these comparisons and reaches the loss.
    ul = (ul < kFloor ? kFloor : ul) * kLog2E, ur = (ur < kFloor ? kFloor : ur) * kLog2E;
    ll = (ll < kFloor ? kFloor : ll) * kLog2E, lr = (lr < kFloor ? kFloor : lr) * kLog2E;
    w.form[c] = {ul, ur - ul, ll - ul, (lr - ll) - (ur - ul)};
  }
  warp_barrier();
  return ballot(wide) != 0;
}

// Of one class, for exponentials taken directly.
__device__ __forceinline__ Float4 plain_samples(const float* packed, const Corners& at) {
  const auto read = [packed](int64_t i) { return packed[i] < kLowest ? kLowest : packed[i]; };
  return {read(at.ul), read(at.ur), read(at.ll), read(at.lr)};
}

// The same as plain samples.
template <int N>
__device__ __forceinline__ void stage_direct(const Work<N>& w, int c0, int count) {
  const Corners at = w.tile.packed;
  warp_barrier();  // all have done with what was there
  for (int c = w.lane; c < count; c += 32) w.form[c] = plain_samples(w.a.packed + c0 + c, at);
  warp_barrier();
}

// The pixel that the powers of r count from: in the middle, which halves their error; always inside the tile.
template <int N>
constexpr int kAnchor = N > 4 ? N / 2 : 0;

// Adds the exponentials of a chunk of classes to the sums of the lane's row.
template <int N>
__device__ __forceinline__ void add_series(const Work<N>& w, int count, float* z) {
  constexpr int A = kAnchor<N>;
  const int shares = 32 >> w.rows_log2;
  const int row = w.lane & ((1 << w.rows_log2) - 1);
  const float ty = w.weight_y(row < w.tile.y.count ? row : w.tile.y.count - 1);
  const float tx = w.weight_x(A), step = w.tile.x.step;
#pragma unroll 2
  for (int c = w.lane >> w.rows_log2; c < count; c += shares) {
    const Float4 f = w.form[c];
    const float slope = f.y + f.w * ty;
    const float middle = fast_exp2((f.x + f.z * ty) + slope * tx);
    const float up = fast_exp2(slope * step), up2 = up * up;
    float term = middle;
#pragma unroll
    for (int k = A; k < N; k += 2) {  // r and r^2 in turn: fewer products and roundings than r alone
      z[k] += term;
      z[k + 1] += term * up;
      if (k + 2 < N) term *= up2;
    }
    if constexpr (A > 0) {
      const float down = fast_exp2(-(slope * step)), down2 = down * down;
      z[A - 1] += middle * down;
      term = middle;
#pragma unroll
      for (int k = A - 2; k >= 0; k -= 2) {
        term *= down2;
        z[k] += term;
        if (k > 0) z[k - 1] += term * down;
      }
    }
  }
}

// Sums over classes of all pixels, in w.u; whether the tile must be done directly.
template <int N>
__device__ __forceinline__ bool sum_series(const Work<N>& w) {
  const int classes = static_cast<int>(w.a.grid.classes);
  float z[N];
#pragma unroll
  for (int k = 0; k < N; ++k) z[k] = 0;
  for (int c0 = 0; c0 < classes; c0 += kChunk) {
    const int count = classes - c0 < kChunk ? classes - c0 : kChunk;
    if (c0 > 0) warp_barrier();
    if (stage_series(w, c0, count)) return true;
    add_series<N>(w, count, z);
  }
  for (int mask = 1 << w.rows_log2; mask < 32; mask *= 2)
#pragma unroll
    for (int k = 0; k < N; ++k) z[k] += shuffle_xor(z[k], mask);
  if (w.lane < 1 << w.rows_log2)
#pragma unroll
    for (int k = 0; k < N; k += 4)
      *reinterpret_cast<Float4*>(w.u + w.lane * N + k) = {z[k], z[k + 1], z[k + 2], z[k + 3]};
  warp_barrier();
  return false;
}

struct Weights {  // of the four samples
  float ul, ur, ll, lr;
};
__device__ __forceinline__ Weights weights_at(float ty, float tx) {
  return {(1 - ty) * (1 - tx), (1 - ty) * tx, ty * (1 - tx), ty * tx};
}

// Rounds the same way wherever it is called: a logit must not exceed the maximum that it was part of. Classes
// that are masked in the same samples tie; in a fused sum the small terms of the others would decide how the
// huge ones round, and make them differ by that.
__device__ __forceinline__ float bilinear(const Weights& t, const Float4& f) {
  return ((rounded_product(t.ul, f.x) + rounded_product(t.ur, f.y)) + rounded_product(t.ll, f.z)) +
         rounded_product(t.lr, f.w);
}

// Maxima and sums over classes of all pixels, in w.peak and w.u.
template <int N>
__device__ __forceinline__ void sum_directly(const Work<N>& w) {
  const int classes = static_cast<int>(w.a.grid.classes);
  for (int pass = 0; pass < 2; ++pass)
    for (int c0 = 0; c0 < classes; c0 += kChunk) {
      const int count = classes - c0 < kChunk ? classes - c0 : kChunk;
      if (pass == 0 || classes > kChunk) stage_direct(w, c0, count);
      for (int i = 0; i < w.batches; ++i) {
        if (!w.inside(i)) continue;
        const int p = w.lane + 32 * i;
        const Weights t = weights_at(w.weight_y(w.row(i)), w.weight_x(w.column()));
        if (pass == 0) {
          float peak = c0 == 0 ? -INFINITY : w.peak[p];
          for (int c = 0; c < count; ++c) peak = fmaxf(peak, bilinear(t, w.form[c]));
          w.peak[p] = peak;
        } else {
          const float peak = w.peak[p];
          float sum = c0 == 0 ? 0.0f : w.u[p];
          for (int c = 0; c < count; ++c) sum += fast_exp2((bilinear(t, w.form[c]) - peak) * kLog2E);
          w.u[p] = sum;
        }
      }
    }
}

// Gradients of a class are kept as sums over pixels of g, g tx, g ty and g tx ty.
__device__ __forceinline__ Float4 operator-(const Float4& a, const Float4& b) {
  return {a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w};
}

// Sums over pixels of u times the exponentials of class c of the chunk.
template <int N>
__device__ __forceinline__ Float4 gradient_by_series(const Work<N>& w, int c) {
  constexpr int A = kAnchor<N>;
  const Float4 f = w.form[c];
  const float tx = w.weight_x(A), step = w.tile.x.step;
  float all = 0, moments = 0, lower = 0, lower_moments = 0;
  float place = 0;  // = row: conversions would compete with the exponentials
  for (int row = 0; row < w.tile.y.count; ++row, place += 1.0f) {
    float u[N];
#pragma unroll
    for (int k = 0; k < N; k += 4) {
      const Float4 four = *reinterpret_cast<const Float4*>(w.u + row * N + k);
      u[k] = four.x, u[k + 1] = four.y, u[k + 2] = four.z, u[k + 3] = four.w;
    }
    const float ty = w.weight_y(place);
    const float slope = f.y + f.w * ty;
    const float middle = fast_exp2((f.x + f.z * ty) + slope * tx);
    const float up = fast_exp2(slope * step);
    // total = sum of u_k r^(k - A), moment = sum of (k - A) u_k r^(k - A) = r times its derivative
    float total = u[N - 1], change = u[N - 1];
    total = total * up + u[N - 2];
#pragma unroll
    for (int k = N - 3; k >= A; --k) {
      change = change * up + total;
      total = total * up + u[k];
    }
    float moment = change * up;
    if constexpr (A > 0) {
      const float down = fast_exp2(-(slope * step));
      float below = u[0] * down + u[1], below_change = u[0];
#pragma unroll
      for (int k = 2; k < A; ++k) {
        below_change = below_change * down + below;
        below = below * down + u[k];
      }
      total += below * down;
      moment -= (below_change * down + below) * down;
    }
    total *= middle;
    moment *= middle;
    all += total;
    moments += moment;
    lower += total * ty;
    lower_moments += moment * ty;
  }
  return {all, tx * all + step * moments, lower, tx * lower + step * lower_moments};
}

template <int N>
__device__ __forceinline__ Float4 gradient_directly(const Work<N>& w, int c) {
  const Float4 f = w.form[c];
  Float4 sum{0, 0, 0, 0};
  float y = 0;
  for (int row = 0; row < w.tile.y.count; ++row, y += 1.0f) {
    const float ty = w.weight_y(y);
    float all = 0, right = 0, x = 0;
    for (int p = row * N; p < row * N + w.tile.x.count; ++p, x += 1.0f) {
      const float tx = w.weight_x(x), z = bilinear(weights_at(ty, tx), f) - w.peak[p];
      const float u = w.u[p];
      if (u == 0) continue;
      const float g = fast_exp2(fminf(z, 0.0f) * kLog2E) * u;
      all += g;
      right += g * tx;
    }
    sum.x += all, sum.y += right, sum.z += all * ty, sum.w += right * ty;
  }
  return sum;
}

}  // namespace depict::cuda
