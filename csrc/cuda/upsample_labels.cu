// Label map and confusion matrix of upsampled logits (csrc/cpu/label_map.h does the same).
//
// In a cell, class c can be the maximum somewhere only if the largest of its four samples reaches the
// largest, over classes, of the smallest of their four. Trained masks leave one to three candidates of 150:
// lanes are classes to find them, then pixels to evaluate them, in class order, so that ties go to the lowest
// class as in torch.argmax.
#include "upsample_cells.h"

namespace depict::cuda {
namespace {

// Times the largest |logit|: covers the rounding of the evaluation, three steps on values up to it.
constexpr float kMargin = 8 * 1.1920929e-7f;
constexpr int kTogether =
    8;  // (target, label) pairs of a tile that are counted together before single pixels are
constexpr uint32_t kNoPair = 0xffffffffu;

struct Candidates {  // of 32 classes
  Float4 samples[32];
  int32_t label[32];
};

struct Pixels {  // the lane's pixels: p = lane, lane + 32, ... in rows of 2^columns_log2, so one column for
                 // all
  float tx, ty, step;  // ty of the first one, and how it grows from one to the next
  float best[kMaxBatches];
  int32_t label[kMaxBatches];
};

// Special: with an infinite or NaN sample. NaN is the maximum, the first one wins.
template <bool Special>
__device__ __forceinline__ void evaluate(const Candidates& from, int count, int batches, Pixels& pixels) {
  const float tx = pixels.tx;
  for (int j = 0; j < count; ++j) {
    const Float4 s = from.samples[j];
    const int32_t label = from.label[j];
    const float upper = (1 - tx) * s.x + tx * s.y, lower = (1 - tx) * s.z + tx * s.w;
#pragma unroll
    for (int i = 0; i < kMaxBatches; ++i) {
      if (i >= batches) break;
      const float ty = pixels.ty + i * pixels.step, z = (1 - ty) * upper + ty * lower, best = pixels.best[i];
      const bool higher = z > best || (Special && z != z && best == best);
      pixels.best[i] = higher ? z : best;
      pixels.label[i] = higher ? label : pixels.label[i];
    }
  }
}

// Adds the tile's pairs to the counts. Large regions of one class make all pixels meet in one address: equal
// pairs of the tile are counted first. Integers: the order does not matter.
__device__ __forceinline__ void count_pairs(const LabelArguments& a, const int32_t* truth,
                                            const int32_t* label, int batches, int lane) {
  const auto add = [&](int64_t row, int64_t column, int64_t count) {
    atomic_add(a.counts + row * a.counts_stride[0] + column * a.counts_stride[1], count);
  };
  const int64_t classes = a.grid.classes;
  if (classes > 65535) {  // a pair takes more than 32 bits
#pragma unroll
    for (int i = 0; i < kMaxBatches; ++i)
      if (i < batches && truth[i] >= 0) add(truth[i], label[i], 1);
    return;
  }
  const uint32_t size = static_cast<uint32_t>(classes);
  uint32_t pair[kMaxBatches];
#pragma unroll
  for (int i = 0; i < kMaxBatches; ++i)
    pair[i] = i < batches && truth[i] >= 0 ? truth[i] * size + label[i] : kNoPair;
  for (int round = 0; round < kTogether; ++round) {
    uint32_t mine = kNoPair;
#pragma unroll
    for (int i = 0; i < kMaxBatches; ++i) mine = mine == kNoPair ? pair[i] : mine;
    const uint32_t who = ballot(mine != kNoPair);
    if (who == 0) return;
    const uint32_t current = shuffle(mine, first_bit(who));
    int count = 0;
#pragma unroll
    for (int i = 0; i < kMaxBatches; ++i) {
      if (i >= batches) break;
      count += count_bits(ballot(pair[i] == current));
      if (pair[i] == current) pair[i] = kNoPair;
    }
    if (lane == 0) add(current / size, current % size, count);
  }
#pragma unroll
  for (int i = 0; i < kMaxBatches; ++i) {
    if (i >= batches) break;
    const uint32_t equal = match_any(pair[i]);
    if (pair[i] != kNoPair && first_bit(equal) == lane)
      add(pair[i] / size, pair[i] % size, count_bits(equal));
  }
}

__device__ __forceinline__ void write_label(const LabelArguments& a, int64_t at, int32_t label) {
  if (a.label_type == IntType::u8)
    static_cast<uint8_t*>(a.labels)[at] = static_cast<uint8_t>(label);
  else if (a.label_type == IntType::i32)
    static_cast<int32_t*>(a.labels)[at] = label;
  else
    static_cast<int64_t*>(a.labels)[at] = label;
}

__global__ void __launch_bounds__(32 * kTileWarps, 5)
    label_kernel(const LabelArguments a, int columns_log2, int batches) {
  const int lane = thread_index() % 32;
  const int64_t index = block_index() * kTileWarps + thread_index() / 32;
  if (index >= a.grid.tiles()) return;
  const Tile tile = tile_of(a.grid, index, a.table);
  if (tile.y.count * tile.x.count == 0) {
    if (a.bad != nullptr && lane == 0) a.bad[index] = kNoBad;
    return;
  }
  const int classes = static_cast<int>(a.grid.classes);
  const Corners& in_map = tile.sample;
  const Corners& at = tile.packed;
  const float magnitude =
      (a.magnitude[in_map.ul] + a.magnitude[in_map.ur]) + (a.magnitude[in_map.ll] + a.magnitude[in_map.lr]);
  const bool special = !(magnitude < INFINITY);
  float floor = -INFINITY;
  for (int c = lane; c < classes; c += 32)
    floor = fmaxf(floor, fminf(fminf(a.packed[at.ul + c], a.packed[at.ur + c]),
                               fminf(a.packed[at.ll + c], a.packed[at.lr + c])));
  const float threshold = special ? -INFINITY : warp_max(floor) - kMargin * magnitude;

  Pixels pixels;
  const int column = lane & ((1 << columns_log2) - 1), row = lane >> columns_log2;
  const int rows_of_batch = 32 >> columns_log2;
  pixels.tx = tile.x.first + column * tile.x.step;
  pixels.ty = tile.y.first + row * tile.y.step;
  pixels.step = rows_of_batch * tile.y.step;
#pragma unroll
  for (int i = 0; i < kMaxBatches; ++i) {
    pixels.best[i] = -INFINITY;
    pixels.label[i] = 0;
  }
  Candidates& found = reinterpret_cast<Candidates*>(shared_memory())[thread_index() / 32];
  for (int c0 = 0; c0 < classes; c0 += 32) {
    const int c = c0 + lane;
    Float4 s{-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    if (c < classes) s = {a.packed[at.ul + c], a.packed[at.ur + c], a.packed[at.ll + c], a.packed[at.lr + c]};
    const bool candidate = c < classes && (special || fmaxf(fmaxf(s.x, s.y), fmaxf(s.z, s.w)) >= threshold);
    const uint32_t who = ballot(candidate);
    if (who == 0) continue;
    if (candidate) {
      const int place = count_bits(who & ((1u << lane) - 1));
      found.samples[place] = s;
      found.label[place] = c;
    }
    warp_barrier();
    if (special)
      evaluate<true>(found, count_bits(who), batches, pixels);
    else
      evaluate<false>(found, count_bits(who), batches, pixels);
    warp_barrier();
  }

  int32_t truth[kMaxBatches];
  int64_t bad = kNoBad;
#pragma unroll
  for (int i = 0; i < kMaxBatches; ++i) {
    truth[i] = -1;
    const int y = row + i * rows_of_batch;
    if (i >= batches || y >= tile.y.count || column >= tile.x.count) continue;
    if (a.labels != nullptr)
      write_label(
          a, (tile.batch * a.grid.y.axis.out + tile.y.begin + y) * a.grid.x.axis.out + tile.x.begin + column,
          pixels.label[i]);
    if (a.counts != nullptr) truth[i] = read_label(a.grid, a.target, tile, y, column, bad);
  }
  if (a.counts == nullptr) return;
  if (ballot(bad != kNoBad) != 0) bad = warp_min(bad);
  if (lane == 0) a.bad[index] = bad;
  count_pairs(a, truth, pixels.label, batches, lane);
}

}  // namespace

const char* upsample_labels(const LabelArguments& a, void* stream) {
  const int columns = power_of_two(a.grid.x.extent), pixels = columns * power_of_two(a.grid.y.extent);
  int columns_log2 = 0;
  while (1 << columns_log2 < columns) ++columns_log2;
  return launch(label_kernel, (a.grid.tiles() + kTileWarps - 1) / kTileWarps, 32 * kTileWarps,
                kTileWarps * sizeof(Candidates), stream, a, columns_log2, (pixels + 31) / 32);
}

}  // namespace depict::cuda
