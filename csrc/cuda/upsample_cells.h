// What the tile kernels of upsample_loss.cu and upsample_labels.cu share. A warp does a tile of its own, so
// that nothing waits for a block.
#pragma once

#include "device.h"
#include "upsample.h"

namespace depict::cuda {

constexpr int kTileWarps = 4;                          // tiles of a block
constexpr int kMaxBatches = kLongest * kLongest / 32;  // pixels of a tile per lane
constexpr int64_t kNoBad = INT64_MAX;

struct alignas(16) Float4 {
  float x, y, z, w;
};

inline int power_of_two(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

struct Corners {  // upper left, upper right, lower left, lower right
  int64_t ul, ur, ll, lr;
};

struct Tile {
  int64_t index, batch;
  AxisTile y, x;
  Corners sample;  // in (batch, h * w)
  Corners packed;  // in (batch, h * w, classes)
};

__device__ __forceinline__ Tile tile_of(const Grid& grid, int64_t index, const AxisTile* table) {
  // Far cheaper than 64-bit divisions; why_not() says where they would be needed.
  const uint32_t down = grid.y.tiles, across = grid.x.tiles;
  const uint32_t row = static_cast<uint32_t>(index) / across, column = static_cast<uint32_t>(index) % across;
  Tile tile{index, row / down, table[row % down], table[down + column], {}, {}};
  const int64_t upper = (tile.batch * grid.y.axis.in + tile.y.lower) * grid.x.axis.in;
  const int64_t lower = (tile.batch * grid.y.axis.in + tile.y.upper) * grid.x.axis.in;
  const Corners at{upper + tile.x.lower, upper + tile.x.upper, lower + tile.x.lower, lower + tile.x.upper};
  tile.sample = at;
  tile.packed = {at.ul * grid.classes, at.ur * grid.classes, at.ll * grid.classes, at.lr * grid.classes};
  return tile;
}

__device__ __forceinline__ int64_t read_integer(const void* data, IntType type, int64_t at) {
  switch (type) {
    case IntType::u8: return static_cast<const uint8_t*>(data)[at];
    case IntType::i8: return static_cast<const int8_t*>(data)[at];
    case IntType::i16: return static_cast<const int16_t*>(data)[at];
    case IntType::i32: return static_cast<const int32_t*>(data)[at];
    default: return static_cast<const int64_t*>(data)[at];
  }
}

// The label of a pixel, -1 where none counts; lowers `bad` to the pixel's index where the label is bad.
__device__ __forceinline__ int32_t read_label(const Grid& grid, const Target& target, const Tile& tile,
                                              int row, int column, int64_t& bad) {
  const int64_t y = tile.y.begin + row, x = tile.x.begin + column;
  const int64_t value = read_integer(
      target.data, target.type, tile.batch * target.stride[0] + y * target.stride[1] + x * target.stride[2]);
  if (value == target.ignore_index) return -1;
  if (value >= 0 && value < grid.classes) return static_cast<int32_t>(value);
  const int64_t at = (tile.batch * grid.y.axis.out + y) * grid.x.axis.out + x;
  bad = at < bad ? at : bad;
  return -1;
}

__device__ __forceinline__ int64_t warp_min(int64_t value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const int64_t other = shuffle_xor(value, mask);
    value = other < value ? other : value;
  }
  return value;
}

}  // namespace depict::cuda
