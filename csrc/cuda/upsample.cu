// What comes before and after the tiles of upsample_loss.cu and upsample_labels.cu.
#include "upsample_cells.h"

namespace depict::cuda {
namespace {

constexpr int kPackWarps = 16, kPackSamples = 32;  // a block packs 32 samples

template <class T>
__device__ __forceinline__ float read_logit(const PackArguments& a, int64_t at) {
  return to_float(static_cast<const T*>(a.logits.data)[at]);
}

__device__ void fill_table(const PackArguments& a, int64_t entry) {
  const Grid& g = a.grid;
  if (entry >= g.y.tiles + g.x.tiles) return;
  const bool along_y = entry < g.y.tiles;
  const Cut& cut = along_y ? g.y : g.x;
  const int64_t index = along_y ? entry : entry - g.y.tiles;
  const int64_t cell = index / cut.parts - 1, part = index % cut.parts;
  const int64_t begin = cut.axis.begin(cell), pixels = cut.axis.begin(cell + 1) - begin;
  const int64_t from = pixels * part / cut.parts, to = pixels * (part + 1) / cut.parts;
  AxisTile tile{};
  tile.begin = static_cast<int32_t>(begin + from);
  tile.count = static_cast<int32_t>(to - from);
  tile.lower = static_cast<int32_t>(cut.axis.lower(cell));
  tile.upper = static_cast<int32_t>(cut.axis.upper(cell));
  tile.first = static_cast<float>(cut.axis.weight(cell, begin + from));
  // A single pixel has no next one: the step may be longer than the cell, and exponentials of it infinite.
  tile.step = tile.count > 1 ? static_cast<float>(cut.axis.step(cell)) : 0.0f;
  a.table[entry] = tile;
}

// Blocks of 32 samples and all classes; the last blocks fill the table of tiles. Reads with lanes = samples,
// writes with lanes = classes.
template <class T>
__global__ void pack_kernel(const PackArguments a, int64_t pack_blocks) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  if (block_index() >= pack_blocks) {
    fill_table(a, (block_index() - pack_blocks) * thread_count() + thread_index());
    return;
  }
  float* const block = reinterpret_cast<float*>(shared_memory());  // [32 classes][33]
  float* const partial = block + 32 * 33;                          // [kPackWarps][32 samples]
  float* const peak = partial + kPackWarps * 32;                   // [32 samples]

  // why_not() keeps the samples of an image, like the blocks, below 2^31.
  const uint32_t samples = static_cast<uint32_t>(a.grid.samples()),
                 w = static_cast<uint32_t>(a.grid.x.axis.in);
  const uint32_t per_batch = (samples + 31) / 32, index = static_cast<uint32_t>(block_index());
  const int64_t batch = index / per_batch, classes = a.grid.classes;
  const uint32_t n0 = index % per_batch * 32, n = n0 + lane;
  const bool exists = n < samples;
  const int64_t* stride = a.logits.stride;
  const int64_t at = batch * stride[0] + int64_t{n / w} * stride[2] + int64_t{n % w} * stride[3];

  const auto over_warps = [&](float value, const auto& join) {  // of every sample; the result is in peak
    partial[warp * 32 + lane] = value;
    barrier();
    if (warp == 0) {
      for (int i = 1; i < kPackWarps; ++i) value = join(value, partial[i * 32 + lane]);
      peak[lane] = value;
    }
    barrier();
  };
  if (a.magnitude == nullptr) {
    float best = -INFINITY;
    if (exists) {
#pragma unroll 5
      for (int64_t c = warp; c < classes; c += kPackWarps)
        best = fmaxf(best, read_logit<T>(a, at + c * stride[1]));
    }
    over_warps(best, [](float x, float y) { return fmaxf(x, y); });
  } else if (warp == 0) {
    peak[lane] = 0;
  }
  if (a.magnitude != nullptr) barrier();

  const float share = 1.0f / static_cast<float>(classes);  // a sum of masked classes would overflow
  float total = 0;
  for (int64_t c0 = 0; c0 < classes; c0 += 32) {
    const float shift = peak[lane];
#pragma unroll
    for (int i = 0; i < 32 / kPackWarps; ++i) {
      const int64_t c = c0 + warp + i * kPackWarps;
      if (!exists || c >= classes) continue;
      const float z = read_logit<T>(a, at + c * stride[1]) - shift;
      block[(warp + i * kPackWarps) * 33 + lane] = z;
      const float size = fabsf(z);
      if (a.magnitude != nullptr)
        total = size > total || size != size ? size : total;
      else if (a.smooth != nullptr)
        total += (a.weight != nullptr ? a.weight[c] * share : share) * z;
    }
    barrier();
    for (int i = warp; i < 32; i += kPackWarps)
      if (n0 + i < samples && c0 + lane < classes)
        a.packed[(batch * samples + n0 + i) * classes + c0 + lane] = block[lane * 33 + i];
    barrier();
  }
  float* const out = a.magnitude != nullptr ? a.magnitude : a.smooth;
  if (out == nullptr) return;
  if (a.magnitude != nullptr)  // the maximum of two floats skips NaN, and the label map must know
    over_warps(total, [](float x, float y) { return y > x || y != y ? y : x; });
  else
    over_warps(total, [](float x, float y) { return x + y; });
  if (warp == 0 && exists) out[batch * samples + n] = peak[lane];
}

constexpr int kFinishThreads = 1024;

// One block: sums in a fixed order.
__global__ void finish_kernel(const FinishArguments a) {
  double* const losses = reinterpret_cast<double*>(shared_memory());
  double* const weights = losses + kFinishThreads;
  int64_t* const firsts = reinterpret_cast<int64_t*>(weights + kFinishThreads);
  const int thread = thread_index();
  const int64_t tiles = a.grid.tiles();
  double loss = 0, weight = 0;
  int64_t first = kNoBad;
#pragma unroll 4
  for (int64_t i = thread; i < tiles; i += kFinishThreads) {
    const int64_t bad = a.bad[i];
    first = bad < first ? bad : first;
    if (a.partial != nullptr) {
      loss += a.partial[2 * i];
      weight += a.partial[2 * i + 1];
    }
  }
  losses[thread] = loss, weights[thread] = weight, firsts[thread] = first;
  for (int half = kFinishThreads / 2; half > 0; half /= 2) {
    barrier();
    if (thread >= half) continue;
    losses[thread] += losses[thread + half];
    weights[thread] += weights[thread + half];
    if (firsts[thread + half] < firsts[thread]) firsts[thread] = firsts[thread + half];
  }
  if (thread != 0) return;
  if (a.partial != nullptr) {
    const double divisor = a.mean ? weights[0] : 1.0;
    *a.scale = divisor == 0 ? 0.0f : static_cast<float>(1.0 / divisor);
    *a.loss = divisor == 0 ? 0.0f : static_cast<float>(losses[0] / divisor);
  }
  const bool any = firsts[0] != kNoBad;
  const int64_t at = any ? firsts[0] : 0, width = a.grid.x.axis.out, height = a.grid.y.axis.out;
  const int64_t x = at % width, y = at / width % height, b = at / width / height;
  a.report[0] = any;
  a.report[1] = any ? read_integer(a.target.data, a.target.type,
                                   b * a.target.stride[0] + y * a.target.stride[1] + x * a.target.stride[2])
                    : 0;
  a.report[2] = b, a.report[3] = y, a.report[4] = x;
}

constexpr int kGatherWarps = 8;

// Blocks of 32 samples x 32 classes: what the tiles of the (at most) four cells around each sample wrote for
// it, in a fixed order. Reads with lanes = classes, writes with lanes = samples.
__global__ void gather_kernel(const GatherArguments a) {
  float* const block = reinterpret_cast<float*>(shared_memory());      // [32 samples][33]
  int64_t* const slots = reinterpret_cast<int64_t*>(block + 32 * 33);  // [32 samples][4 cells]
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  // why_not() keeps the cells of the batch below 2^31, and with them the samples.
  const uint32_t h = static_cast<uint32_t>(a.grid.y.axis.in), w = static_cast<uint32_t>(a.grid.x.axis.in);
  const uint32_t held = static_cast<uint32_t>(a.held), end = static_cast<uint32_t>(a.first + a.rows) * w;
  const int64_t classes = a.grid.classes;
  const uint32_t class_blocks = static_cast<uint32_t>((classes + 31) / 32);
  const uint32_t index = static_cast<uint32_t>(block_index());
  const int64_t c0 = index % class_blocks * 32, c = c0 + lane;
  const uint32_t n0 = static_cast<uint32_t>(a.first) * w + index / class_blocks * 32;  // over the batch
  const int32_t parts_y = a.grid.y.parts, parts_x = a.grid.x.parts, across = a.grid.x.tiles;
  // Where the first tile of each cell put the sample, once for all classes: divisions cost more than the
  // sums.
  if (thread_index() < 128) {
    const uint32_t n = n0 + thread_index() / 4, row = n / w, x = n - row * w, image = row / h,
                   y = row - image * h;
    const int second_y = thread_index() / 2 % 2, second_x = thread_index() % 2;
    // Sample (y, x) is the first of cell (y, x) and the second of cell (y - 1, x - 1), whose tiles begin at
    // row and column y + 1, x + 1 and y, x, times the parts. The border cell -1 put everything into its first
    // sample.
    const uint32_t lower = (image * (h + 1) + y + 1) % held, upper = (lower == 0 ? held : lower) - 1;
    const int64_t tile_row = int64_t{second_y ? upper : lower} * parts_y;
    const int64_t tile = tile_row * across + (int64_t{x} + 1 - second_x) * parts_x;
    slots[thread_index()] = (tile * 4 + (y > 0 ? 2 * second_y : 0) + (x > 0 ? second_x : 0)) * classes;
  }
  barrier();
#pragma unroll
  for (int i = warp; i < 32; i += kGatherWarps) {
    if (n0 + i >= end || c >= classes) continue;
    float total = 0;
    for (int part_y = 0; part_y < parts_y; ++part_y)
      for (int part_x = 0; part_x < parts_x; ++part_x) {
        const float* const part = a.samples + (int64_t{part_y} * across + part_x) * 4 * classes + c;
        float of_cell[4];  // loads first: they wait for each other otherwise
#pragma unroll
        for (int cell = 0; cell < 4; ++cell) of_cell[cell] = part[slots[4 * i + cell]];
        total += (of_cell[0] + of_cell[1]) + (of_cell[2] + of_cell[3]);
      }
    block[i * 33 + lane] = total;
  }
  barrier();
  const float scale = a.scale != nullptr ? *a.scale : 1.0f;
  const uint32_t n = n0 + lane, samples = h * w, batch = n / samples;
  for (int i = warp; i < 32; i += kGatherWarps)
    if (c0 + i < classes && n < end)
      a.grad[(batch * classes + c0 + i) * samples + n % samples] = scale * block[lane * 33 + i];
}

}  // namespace

const char* why_not(const Grid& grid) {
  const int64_t longest = int64_t{1} << 30;
  for (const Cut* cut : {&grid.y, &grid.x})
    if (cut->axis.in > longest || cut->axis.out > longest) return "an axis is longer than 2^30";
  if (grid.classes > longest) return "there are more than 2^30 classes";
  if (static_cast<double>(grid.batch) * grid.y.tiles * grid.x.tiles > 2147483647.0)
    return "there are more than 2^31 - 1 cells; split the batch";
  return nullptr;
}

const char* upsample_pack(const PackArguments& a, void* stream) {
  const int64_t blocks = a.grid.batch * ((a.grid.samples() + kPackSamples - 1) / kPackSamples);
  if (blocks == 0) return nullptr;
  constexpr int threads = 32 * kPackWarps;
  const int64_t table_blocks = (a.grid.y.tiles + a.grid.x.tiles + threads - 1) / threads;
  const size_t shared = (32 * 33 + kPackWarps * 32 + 32) * sizeof(float);
  const auto run = [&](auto kernel) {
    return launch(kernel, blocks + table_blocks, threads, shared, stream, a, blocks);
  };
  if (a.logits.type == Type::f32) return run(pack_kernel<float>);
  if (a.logits.type == Type::f16) return run(pack_kernel<Float16>);
  return run(pack_kernel<Bfloat16>);
}

const char* upsample_finish(const FinishArguments& a, void* stream) {
  return launch(finish_kernel, 1, kFinishThreads, kFinishThreads * 24, stream, a);
}

const char* upsample_gather(const GatherArguments& a, void* stream) {
  const int64_t blocks = (a.rows * a.grid.x.axis.in + 31) / 32 * ((a.grid.classes + 31) / 32);
  constexpr size_t shared = 32 * 33 * sizeof(float) + 32 * 4 * sizeof(int64_t);
  return launch(gather_kernel, blocks, 32 * kGatherWarps, shared, stream, a);
}

}  // namespace depict::cuda
