// Interface of the CUDA upsample kernels: plain C++, no torch. What each does, in the order of a training
// step:
//
//   pack            logits with classes innermost, less each sample's maximum; where the tiles of an axis lie
//   cross_entropy   loss of every tile, and the gradient that it gives to the four samples around it
//   finish          sum of the losses, divisor of "mean", the first bad label
//   gather          gradient of every sample from the tiles around it
//
// cross_entropy and gather may go by bands of cell rows, h + 1 per image and counted over the batch, so that
// the gradients that tiles leave take no more memory than is given: those of cell row r lie at row r % held,
// and a sample can be gathered once the rows above and below it are there.
//   label_map       argmax over classes, or its confusion matrix with a target
#pragma once

#include <cstdint>

#include "../bilinear.h"
#include "types.h"

namespace depict::cuda {

enum class IntType { u8, i8, i16, i32, i64 };

// Pixels along an axis that are treated together: e r^k stays accurate that far.
constexpr int kLongest = 16;

// One of the parts that a cell (see bilinear.h) is cut into along an axis.
struct alignas(16) AxisTile {
  int32_t begin, count;  // its pixels
  int32_t lower, upper;  // the samples it lies between
  float first, step;  // weight of the upper sample at the first pixel, and how it grows from one to the next
  int32_t unused[2];
};

// How an axis is cut into tiles: from the border cell -1 to the border cell in - 1.
struct Cut {
  Axis axis;
  int32_t parts;   // tiles of a cell
  int32_t extent;  // most pixels of a tile
  int32_t tiles;

  Cut() = default;
  explicit Cut(const Axis& a) : axis(a) {
    const int64_t longest_cell = (a.out + a.in - 1) / a.in;
    const int64_t cell_parts = (longest_cell + kLongest - 1) / kLongest;
    parts = static_cast<int32_t>(cell_parts);
    extent = static_cast<int32_t>((longest_cell + cell_parts - 1) / cell_parts);
    tiles = static_cast<int32_t>((a.in + 1) * cell_parts);
  }
};

// (batch, classes, h, w) logits upsampled to (height, width). Tiles are counted by batch, then along y, then
// along x.
struct Grid {
  int64_t batch, classes;
  Cut y, x;

  DEPICT_HOST_DEVICE int64_t tiles() const { return batch * y.tiles * x.tiles; }
  DEPICT_HOST_DEVICE int64_t samples() const { return y.axis.in * x.axis.in; }
};

// Null, or why the kernels cannot do it: what they index with 32 bits.
const char* why_not(const Grid&);

struct Logits {
  const void* data;
  Type type;
  int64_t stride[4];
};

struct PackArguments {
  Grid grid;
  Logits logits;
  const float* weight;  // (classes) or null
  float* packed;        // (batch, h * w, classes)
  float* smooth;        // (batch, h * w): mean over classes of weight times shifted logit, or null
  float* magnitude;     // (batch, h * w): largest |logit|, NaN if any is; null: subtract the largest logit
  AxisTile* table;      // (tiles along y, then along x)
};
const char* upsample_pack(const PackArguments&, void* stream);

struct Target {
  const void* data;
  IntType type;
  int64_t stride[3];
  int64_t ignore_index;
};

struct LossArguments {
  Grid grid;
  const AxisTile* table;
  const float* packed;
  const float* smooth;      // null without label smoothing
  const float* weight;      // (classes) or null
  const float* weight_sum;  // (1), null without weights or without label smoothing
  Target target;
  const float* upstream;  // (batch, height, width): gradient of the unreduced loss, or null for 1
  int64_t upstream_stride[3];
  float label_smoothing;
  float* pixel_loss;  // (batch, height, width), or null
  double* partial;    // (tiles, 2): summed loss and weight, or null
  int64_t* bad;       // (tiles): index in (batch, height, width) of the first bad label, or null
  float* samples;     // (held, 4, classes): gradient of the samples of a tile, at tile % held; or null
  int64_t first, count, held;  // the tiles to do; how many find room in samples
};
const char* upsample_cross_entropy(const LossArguments&, void* stream);

struct FinishArguments {
  Grid grid;
  Target target;
  const int64_t* bad;
  const double* partial;  // or null, like loss and scale
  float* loss;            // (1)
  float* scale;           // (1): what the gradient is multiplied by
  int64_t* report;        // (5): 1 if a label is bad, the first such label, its batch, row and column
  bool mean;
};
const char* upsample_finish(const FinishArguments&, void* stream);

struct GatherArguments {
  Grid grid;
  const float* samples;       // of `held` rows of cells
  const float* scale;         // (1) or null
  float* grad;                // (batch, classes, h, w)
  int64_t first, rows, held;  // the rows of samples to do, h per image
};
const char* upsample_gather(const GatherArguments&, void* stream);

struct LabelArguments {
  Grid grid;
  const AxisTile* table;
  const float* packed;
  const float* magnitude;
  void* labels;  // (batch, height, width) u8, i32 or i64, or null
  IntType label_type;
  Target target;    // null data without counts
  int64_t* bad;     // (tiles), or null
  int64_t* counts;  // (classes, classes), rows = target, to add to; or null
  int64_t counts_stride[2];
};
const char* upsample_labels(const LabelArguments&, void* stream);

}  // namespace depict::cuda
