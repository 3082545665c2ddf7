// Cross-entropy of upsampled logits and its gradient, tile by tile (csrc/cpu/cross_entropy.h does the same).
//
// Inside a cell a class logit is linear along a pixel row, so its exponential is a geometric series e r^k: a
// few exponentials per class and row instead of one per pixel. Logits come less each sample's maximum; the
// interpolated maximum bounds every interpolated logit, so no exponential overflows. With u = scale / Z,
//
//   pass 1   lanes = rows (and shares of the classes): Z[k] = sum over classes of e r^k; no reduction over
//            lanes in the loop
//   pixels   lanes = pixels: labels, loss, u
//   pass 2   lanes = classes: the gradient's sums over k of u[k] r^k and k u[k] r^k by Horner's rule
//   labels   lanes = pixels: the one-hot part of the gradient, a label of the tile after the other
//
// A tile in which a class falls further than the series can hold, or whose sums get small, is done directly,
// with each pixel's own maximum. Every tile writes the gradient of its four samples to a place of its own,
// and gather_kernel adds them in a fixed order: no float atomics, bitwise repeatable.
#include "upsample_series.h"

namespace depict::cuda {
namespace {

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

// 0 times an infinite sample is none.
__device__ __forceinline__ float bilinear_without_zeros(const Weights& t, const float* at, const Corners& c) {
  return ((t.ul == 0 ? 0.0f : t.ul * at[c.ul]) + (t.ur == 0 ? 0.0f : t.ur * at[c.ur])) +
         ((t.ll == 0 ? 0.0f : t.ll * at[c.ll]) + (t.lr == 0 ? 0.0f : t.lr * at[c.lr]));
}

// How far the label's logit lies below what the pixel's exponentials are relative to.
template <int N>
__device__ __forceinline__ float label_below(const Work<N>& w, int p, int32_t label, const Weights& t,
                                             bool direct) {
  const float* const packed = w.a.packed + label;
  const float logit = bilinear_without_zeros(t, packed, w.tile.packed);
  if (!direct || logit == -INFINITY) return -logit;
  // Rounded like the maximum: beside masked samples both may be huge, and their difference is the loss.
  return w.peak[p] - bilinear(t, plain_samples(packed, w.tile.packed));
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
          const Weights t = weights_at(w.weight_y(w.row(i)), w.weight_x(w.column()));
          const float log_sum = logf(sum);
          // An infinite weight multiplies what is positive, not terms of both signs.
          if (pixel.hit != 0) loss = pixel.hit * (log_sum + label_below(w, p, label, t, direct));
          if (a.label_smoothing > 0) {
            const float classes = static_cast<float>(a.grid.classes);
            const float all = a.weight_sum != nullptr ? *a.weight_sum : classes;
            const float log_z = log_sum + (direct ? w.peak[p] : 0.0f);
            if (fabsf(all) == INFINITY)
              loss = all;
            else
              loss += pixel.smooth * (all * log_z) -
                      pixel.smooth * classes * bilinear_without_zeros(t, a.smooth, w.tile.sample);
          }
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
  }
  warp_barrier();
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

__device__ __forceinline__ float* samples_of(const LossArguments& a, int64_t tile) {
  const uint32_t place = static_cast<uint32_t>(tile) % static_cast<uint32_t>(a.held);
  return a.samples + int64_t{place} * 4 * a.grid.classes;
}

template <int N>
__device__ __forceinline__ void write_gradient(const Work<N>& w, bool direct) {
  const LossArguments& a = w.a;
  const int classes = static_cast<int>(a.grid.classes);
  Float4 smooth{0, 0, 0, 0};
  if (a.label_smoothing > 0) smooth = sum_smoothing(w);
  float* const out = samples_of(a, w.tile.index);
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
  int64_t index = block_index() * kTileWarps + thread_index() / 32;
  if (index >= a.count) return;
  index += a.first;
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
      for (int64_t c = w.lane; c < 4 * a.grid.classes; c += 32) samples_of(a, index)[c] = 0;
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
    return launch(kernel, (a.count + kTileWarps - 1) / kTileWarps, 32 * kTileWarps, kTileWarps * bytes,
                  stream, a, rows_log2, static_cast<int>(bytes));
  };
  if (a.grid.x.extent <= 4) return run(loss_kernel<4>, work_bytes<4>(a.grid));
  if (a.grid.x.extent <= 8) return run(loss_kernel<8>, work_bytes<8>(a.grid));
  return run(loss_kernel<16>, work_bytes<16>(a.grid));
}

}  // namespace depict::cuda
