// Cross-entropy of upsampled logits and its gradient, tile by tile (csrc/cpu/cross_entropy.h does the same).
//
// Inside a cell a class logit is linear along a pixel row, so its exponential is a geometric series e r^k: a
// few exponentials per class and row instead of one per pixel. Logits come less each sample's maximum; the
// interpolated maximum bounds every interpolated logit, so no exponential overflows. With u = scale / Z,
//
//   pass 1   lanes = rows (and shares of the classes): Z[k] = sum over classes of e r^k, without a reduction
//   over
//            lanes for every row
//   pixels   lanes = pixels: labels, loss, u
//   pass 2   lanes = classes: the gradient's sums over k of u[k] r^k and k u[k] r^k by Horner's rule
//   labels   lanes = pixels: the one-hot part of the gradient, a label of the tile after the other
//
// A tile in which a class falls further than the series can hold, or whose sums get small, is done directly,
// with each pixel's own maximum. Every tile writes the gradient of its four samples to a place of its own,
// and gather_kernel adds them in a fixed order: no float atomics, bitwise repeatable.
#include "upsample_cells.h"

namespace depict::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
// Exponents below kFloor are raised to it. That is harmless for a class that stays below kNegligible in the
// whole cell while the sum is at least kSmallSum (a relative error of e^-42 / 2e-9 = 3e-10), and only then.
// It leaves room for kLargeScale: Horner's polynomials reach 16 e^64 times scale before e takes it back.
constexpr float kFloor = -64.0f, kNegligible = -42.0f, kSmallSum = 2e-9f, kLargeScale = 1e9f;
constexpr float kLowest = -1e30f;  // stands for anything lower where exponentials are taken directly
constexpr int kChunk = 192;        // classes in shared memory at a time

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
  __device__ __forceinline__ float weight_y(int row) const { return tile.y.first + row * tile.y.step; }
  __device__ __forceinline__ float weight_x(int column) const { return tile.x.first + column * tile.x.step; }
};

struct Pixel {
  float weight;              // of the class
  float hit, scale, smooth;  // coefficients of the label's logit, of log Z, of the smoothing part
};

// Of the lane's pixel in a batch.
template <int N>
__device__ __forceinline__ Pixel pixel_of(const Work<N>& w, int batch, int32_t label) {
  const LossArguments& a = w.a;
  Pixel pixel;
  pixel.weight = a.weight != nullptr ? a.weight[label] : 1.0f;
  pixel.hit = (1.0f - a.label_smoothing) * pixel.weight;
  float upstream = 1.0f;
  if (a.upstream != nullptr) {
    const int64_t y = w.tile.y.begin + w.row(batch), x = w.tile.x.begin + w.column();
    upstream =
        a.upstream[w.tile.batch * a.upstream_stride[0] + y * a.upstream_stride[1] + x * a.upstream_stride[2]];
    pixel.hit *= upstream;
  }
  pixel.smooth = a.label_smoothing / static_cast<float>(a.grid.classes) * upstream;
  pixel.scale = pixel.hit;
  if (a.label_smoothing > 0)
    pixel.scale += a.weight_sum != nullptr ? *a.weight_sum * pixel.smooth : a.label_smoothing * upstream;
  return pixel;
}

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

// The same as plain samples, for exponentials taken directly.
template <int N>
__device__ __forceinline__ void stage_direct(const Work<N>& w, int c0, int count) {
  const Corners at = w.tile.packed;
  const float* const packed = w.a.packed + c0;
  const auto read = [packed](int64_t i) { return packed[i] < kLowest ? kLowest : packed[i]; };
  warp_barrier();  // all have done with what was there
  for (int c = w.lane; c < count; c += 32)
    w.form[c] = {read(at.ul + c), read(at.ur + c), read(at.ll + c), read(at.lr + c)};
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
template <int N>
__device__ __forceinline__ Weights weights_of(const Work<N>& w, int row, int column) {
  const float ty = w.weight_y(row), tx = w.weight_x(column);
  return {(1 - ty) * (1 - tx), (1 - ty) * tx, ty * (1 - tx), ty * tx};
}

// Rounds the same way wherever it is called: a logit must not exceed the maximum that it was part of.
__device__ __forceinline__ float bilinear(const Weights& t, const Float4& f) {
  return fmaf(t.lr, f.w, fmaf(t.ll, f.z, fmaf(t.ur, f.y, t.ul * f.x)));
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
        const Weights t = weights_of(w, w.row(i), w.column());
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

// 0 times an infinite sample is none.
__device__ __forceinline__ float bilinear_without_zeros(const Weights& t, const float* at, const Corners& c) {
  return ((t.ul == 0 ? 0.0f : t.ul * at[c.ul]) + (t.ur == 0 ? 0.0f : t.ur * at[c.ur])) +
         ((t.ll == 0 ? 0.0f : t.ll * at[c.ll]) + (t.lr == 0 ? 0.0f : t.lr * at[c.lr]));
}

struct Sums {  // of a lane's pixels
  float loss, weight;
};

// From the sums of exponentials to u and the losses. Whether the tile must be done directly.
template <int N>
__device__ __forceinline__ bool finish_pixels(const Work<N>& w, bool direct, Sums& sums) {
  const LossArguments& a = w.a;
  bool out_of_range = false;
  sums = {0, 0};
  for (int i = 0; i < w.batches; ++i) {
    const int p = w.lane + 32 * i;
    if (p >= w.pixels) break;
    const int32_t label = w.label[p];
    float loss = 0, u = 0;
    if (label >= 0) {
      const Pixel pixel = pixel_of(w, i, label);
      sums.weight += pixel.weight;
      if (pixel.scale != 0) {
        const float sum = w.u[p];
        out_of_range |= sum < kSmallSum || !(fabsf(pixel.scale) <= kLargeScale);
        u = pixel.scale * fast_reciprocal(sum);
        if (a.partial != nullptr || a.pixel_loss != nullptr) {
          const Weights t = weights_of(w, w.row(i), w.column());
          loss = pixel.scale * (logf(sum) + (direct ? w.peak[p] : 0.0f));
          if (pixel.hit != 0) loss -= pixel.hit * bilinear_without_zeros(t, a.packed + label, w.tile.packed);
          if (a.label_smoothing > 0)
            loss -= pixel.smooth * bilinear_without_zeros(t, a.smooth, w.tile.sample);
        }
      }
    }
    w.u[p] = u;
    sums.loss += loss;
    if (a.pixel_loss != nullptr && w.inside(i)) {
      const int64_t y = w.tile.y.begin + w.row(i), x = w.tile.x.begin + w.column();
      a.pixel_loss[(w.tile.batch * a.grid.y.axis.out + y) * a.grid.x.axis.out + x] = loss;
    }
  }
  warp_barrier();
  return ballot(out_of_range) != 0;
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
    const float ty = w.tile.y.first + place * w.tile.y.step;
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
  for (int row = 0; row < w.tile.y.count; ++row)
    for (int column = 0; column < w.tile.x.count; ++column) {
      const int p = row * N + column;
      const float u = w.u[p];
      if (u == 0) continue;
      const float z = fminf(bilinear(weights_of(w, row, column), f) - w.peak[p], 0.0f);
      const float g = fast_exp2(z * kLog2E) * u, tx = w.weight_x(column), ty = w.weight_y(row);
      sum.x += g, sum.y += g * tx, sum.z += g * ty, sum.w += g * tx * ty;
    }
  return sum;
}

// The sum over the warp of component lane / 8.
__device__ __forceinline__ float warp_sum_of_component(const Float4& v, int lane) {
  const bool second = lane & 16, odd = lane & 8;
  const float a = (second ? v.z : v.x) + shuffle_xor(second ? v.x : v.z, 16);
  const float b = (second ? v.w : v.y) + shuffle_xor(second ? v.y : v.w, 16);
  float c = (odd ? b : a) + shuffle_xor(odd ? a : b, 8);
#pragma unroll
  for (int mask = 4; mask > 0; mask /= 2) c += shuffle_xor(c, mask);
  return c;
}

template <int N>
__device__ __forceinline__ Float4 spread(const Work<N>& w, int batch, float value) {
  const float tx = w.weight_x(w.column()), ty = w.weight_y(w.row(batch));
  return {value, value * tx, value * ty, value * tx * ty};
}

__device__ __forceinline__ void add(Float4& sum, const Float4& v) {
  sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}

// Subtracts the one-hot part from the gradients of the chunk's classes. Trained models see one to three
// labels in a tile: each is summed over the tile first. What is left of many labels goes pixel by pixel,
// labels in parallel.
template <int N>
__device__ __forceinline__ void subtract_labels(const Work<N>& w, int c0, int count) {
  constexpr int kTogether = 4;
  uint32_t left = 0;  // bit i: pixel lane + 32 i
  for (int i = 0; i < w.batches; ++i) {
    const int p = w.lane + 32 * i;
    const int label = p < w.pixels ? w.label[p] - c0 : -1;
    if (label >= 0 && label < count) left |= 1u << i;
  }
  for (int round = 0; round < kTogether; ++round) {
    const uint32_t who = ballot(left != 0);
    if (who == 0) return;
    const int32_t mine = left != 0 ? w.label[w.lane + 32 * first_bit(left)] : -1;
    const int32_t label = shuffle(mine, first_bit(who));
    Float4 sum{0, 0, 0, 0};
    for (int i = 0; i < w.batches; ++i) {
      const int p = w.lane + 32 * i;
      if ((left >> i & 1) == 0 || w.label[p] != label) continue;
      add(sum, spread(w, i, pixel_of(w, i, label).hit));
      left &= ~(1u << i);
    }
    const float component = warp_sum_of_component(sum, w.lane);
    if (w.lane % 8 == 0) reinterpret_cast<float*>(w.form + (label - c0))[w.lane / 8] -= component;
    warp_barrier();
  }
  for (int i = 0; i < w.batches; ++i) {
    const int p = w.lane + 32 * i;
    bool pending = left >> i & 1;
    while (ballot(pending) != 0) {
      const int32_t label = pending ? w.label[p] : -1 - w.lane;
      if (first_bit(match_any(static_cast<uint32_t>(label))) == w.lane && pending) {
        w.form[label - c0] = w.form[label - c0] - spread(w, i, pixel_of(w, i, label).hit);
        pending = false;
      }
      warp_barrier();
    }
  }
}

// Sums over the valid pixels of the smoothing coefficient, as gradients are kept.
template <int N>
__device__ __forceinline__ Float4 sum_smoothing(const Work<N>& w) {
  Float4 sum{0, 0, 0, 0};
  for (int i = 0; i < w.batches; ++i) {
    const int p = w.lane + 32 * i;
    if (p < w.pixels && w.label[p] >= 0) add(sum, spread(w, i, pixel_of(w, i, w.label[p]).smooth));
  }
  const float component = warp_sum_of_component(sum, w.lane);
  return {shuffle(component, 0), shuffle(component, 8), shuffle(component, 16), shuffle(component, 24)};
}

template <int N>
__device__ __forceinline__ void write_gradient(const Work<N>& w, bool direct) {
  const LossArguments& a = w.a;
  const int classes = static_cast<int>(a.grid.classes);
  Float4 smooth{0, 0, 0, 0};
  if (a.label_smoothing > 0) smooth = sum_smoothing(w);
  float* const out = a.samples + w.tile.index * 4 * classes;
  for (int c0 = 0; c0 < classes; c0 += kChunk) {
    const int count = classes - c0 < kChunk ? classes - c0 : kChunk;
    if (classes > kChunk) {
      warp_barrier();
      if (direct)
        stage_direct(w, c0, count);
      else
        stage_series(w, c0, count);
    }
    for (int c = w.lane; c < count; c += 32) {
      Float4 sum = direct ? gradient_directly(w, c) : gradient_by_series(w, c);
      if (a.label_smoothing > 0) {
        const float share = a.weight != nullptr ? a.weight[c0 + c] : 1.0f;
        sum = sum - Float4{share * smooth.x, share * smooth.y, share * smooth.z, share * smooth.w};
      }
      w.form[c] = sum;  // no other lane reads this class any more
    }
    warp_barrier();
    subtract_labels(w, c0, count);
    warp_barrier();
    for (int c = w.lane; c < count; c += 32) {
      const Float4 g = w.form[c];
      out[c0 + c] = (g.x - g.y) - (g.z - g.w);
      out[int64_t{1} * classes + c0 + c] = g.y - g.w;
      out[int64_t{2} * classes + c0 + c] = g.z - g.w;
      out[int64_t{3} * classes + c0 + c] = g.w;
    }
  }
}

template <int N>
size_t work_bytes(const Grid& grid) {
  const size_t pixels = N * power_of_two(grid.y.extent);
  return sizeof(Tile) + pixels * 12 + (grid.classes < kChunk ? grid.classes : kChunk) * sizeof(Float4);
}

template <int N>
__global__ void __launch_bounds__(32 * kTileWarps, N == 4 ? 7 : 8)
    loss_kernel(const LossArguments a, int rows_log2, int warp_bytes) {
  const int64_t index = block_index() * kTileWarps + thread_index() / 32;
  if (index >= a.grid.tiles()) return;
  unsigned char* memory = shared_memory() + thread_index() / 32 * warp_bytes;
  Tile& tile = *reinterpret_cast<Tile*>(memory);
  if (thread_index() % 32 == 0) tile = tile_of(a.grid, index, a.table);
  warp_barrier();
  memory += sizeof(Tile);
  Work<N> w{a, tile};
  w.lane = thread_index() % 32;
  w.rows_log2 = rows_log2;
  w.pixels = N << rows_log2;
  w.batches = (w.pixels + 31) / 32;
  w.u = reinterpret_cast<float*>(memory);
  w.peak = w.u + w.pixels;
  w.label = reinterpret_cast<int32_t*>(w.peak + w.pixels);
  w.form = reinterpret_cast<Float4*>(w.label + w.pixels);

  int64_t bad = kNoBad;
  bool any = false;
  for (int i = 0; i < w.batches; ++i) {
    const int32_t label = w.inside(i) ? read_label(a.grid, a.target, tile, w.row(i), w.column(), bad) : -1;
    if (w.lane + 32 * i < w.pixels) w.label[w.lane + 32 * i] = label;
    any |= label >= 0;
  }
  if (a.bad != nullptr) {
    if (ballot(bad != kNoBad) != 0) bad = warp_min(bad);
    if (w.lane == 0) a.bad[index] = bad;
  }
  Sums sums{0, 0};
  if (ballot(any) == 0) {  // outside the image, or all ignored
    if (a.pixel_loss != nullptr) finish_pixels(w, false, sums);
    if (a.samples != nullptr)
      for (int64_t c = w.lane; c < 4 * a.grid.classes; c += 32) a.samples[index * 4 * a.grid.classes + c] = 0;
  } else {
    bool direct = sum_series(w);
    if (!direct) direct = finish_pixels(w, false, sums);
    if (direct) {
      sum_directly(w);
      finish_pixels(w, true, sums);
    }
    if (a.samples != nullptr) write_gradient(w, direct);
  }
  if (a.partial != nullptr) {
    const double loss = warp_sum(static_cast<double>(sums.loss));
    const double weight = warp_sum(static_cast<double>(sums.weight));
    if (w.lane == 0) a.partial[2 * index] = loss, a.partial[2 * index + 1] = weight;
  }
}

}  // namespace

const char* upsample_cross_entropy(const LossArguments& a, void* stream) {
  int rows_log2 = 0;
  while (1 << rows_log2 < a.grid.y.extent) ++rows_log2;
  const auto run = [&](auto kernel, size_t bytes) {
    return launch(kernel, (a.grid.tiles() + kTileWarps - 1) / kTileWarps, 32 * kTileWarps, kTileWarps * bytes,
                  stream, a, rows_log2, static_cast<int>(bytes));
  };
  if (a.grid.x.extent <= 4) return run(loss_kernel<4>, work_bytes<4>(a.grid));
  if (a.grid.x.extent <= 8) return run(loss_kernel<8>, work_bytes<8>(a.grid));
  return run(loss_kernel<16>, work_bytes<16>(a.grid));
}

}  // namespace depict::cuda
