// What the cross-entropy kernels share: a cell, a row of its pixels, the memory they work in.
#pragma once

namespace depict::cpu::DEPICT_ISA {

typedef double Corners __attribute__((vector_size(32)));  // upper left, upper right, lower left, lower right

// Exponents below kFloor are raised to it: e^-66 times weights and 1 / sum stays clear of subnormal floats,
// which are slow. That is harmless for a class that stays below kNegligible in the whole cell while the sum
// is at least kSmallSum (a relative error of e^-42 / 2e-9 = 3e-10), and only then.
constexpr float kFloor = -66.0f, kNegligible = -42.0f, kSmallSum = 2e-9f;
// A class that spans more than kSteep makes its cell steep. Noise of standard deviation 1 does not.
constexpr float kSteep = 8.0f;
constexpr int64_t kBlockRows = 64;  // rows accumulated in T before they are added to the cell row's sums

// Relative to the pixel's maximum; e to this is nothing beside 1, and its products are not subnormal.
template <class T>
constexpr T exp_floor() {
  return sizeof(T) == 4 ? T(-60) : T(-300);
}

template <class T>
struct Workspace {
  T *e, *r, *q;  // [kTileRows][lanes] exponential of the middle pixel, ratio to the next and the last one
  T *row_e, *row_r, *row_q;  // [lanes] ratio of e, relative changes of r and q, from row to row
  T *s, *dx, *dy, *dxy;    // [lanes] shifted logit of the upper left sample, differences along x and y, mixed
  double* logit;           // [kMaxPixels][lanes] logits of a careful row
  T* exponential;          // [kMaxPixels][lanes] their exponentials
  T* block[4];             // [lanes] gradient of the cell's samples, over a block of rows
  T* sum[4];               // where the gradient is summed: `block`, or `left` and `right` directly
  T* start;                // [L] sums of exponentials start here: 0, or -1 where Cell::sole is
  T *left, *right;         // [2][lanes] gradient of the samples left and right of the cell, upper and lower
  Corners* hits;           // [classes] bilinear weights of the pixels with this label
  int32_t* touched;        // [classes + 1] labels met in this cell
  uint8_t* met;            // [classes]
  PackedRow<T> packed[2];  // of even and odd low-resolution rows
  T* gradient[2];          // [w][lanes] likewise: their gradient
  // Sums over the rows of a cell row, one per pixel position in a chunk (so that the compiler vectorises).
  double log_sum[kMaxPixels];
};

inline int64_t padded_width(int64_t w) { return (w + kLanePadding - 1) / kLanePadding * kLanePadding; }

template <class T>
int64_t cross_entropy_scratch(const CrossEntropyTask<T>& task) {
  const int64_t lanes = task.packed.lanes, classes = task.packed.classes;
  const int64_t w = task.packed.x.in;
  return lanes * (3 * kTileRows + 3 + 4 + kMaxPixels + 4 + 4 + 1) * static_cast<int64_t>(sizeof(T)) +
         2 * (w * (task.gradient ? 2 * lanes : lanes) + padded_width(w)) * static_cast<int64_t>(sizeof(T)) +
         (lanes * kMaxPixels + (task.smoothing != 0 ? 2 * w : 0)) * static_cast<int64_t>(sizeof(double)) +
         classes * static_cast<int64_t>(sizeof(Corners) + sizeof(int32_t) + 1) + 256;
}

template <class T>
Workspace<T> carve(const CrossEntropyTask<T>& task, void* scratch) {
  const int64_t lanes = task.packed.lanes, classes = task.packed.classes;
  Workspace<T> ws;
  T* p = static_cast<T*>(scratch);
  const auto take = [&](int64_t rows) {
    T* here = p;
    p += rows * lanes;
    return here;
  };
  ws.e = take(kTileRows), ws.r = take(kTileRows), ws.q = take(kTileRows);
  ws.row_e = take(1), ws.row_r = take(1), ws.row_q = take(1);
  ws.s = take(1), ws.dx = take(1), ws.dy = take(1), ws.dxy = take(1);
  ws.exponential = take(kMaxPixels);
  for (T*& block : ws.block) block = take(1);
  ws.left = take(2), ws.right = take(2), ws.start = take(1);
  const int64_t w = task.packed.x.in;
  for (PackedRow<T>& row : ws.packed) row.logits = take(w);
  for (T*& row : ws.gradient) row = task.gradient ? take(w) : nullptr;
  ws.logit = reinterpret_cast<double*>(p);
  ws.hits = reinterpret_cast<Corners*>(ws.logit + kMaxPixels * lanes);
  double* smooth = reinterpret_cast<double*>(ws.hits + classes);
  for (PackedRow<T>& row : ws.packed) {
    row.smooth = task.smoothing != 0 ? smooth : nullptr;
    smooth += task.smoothing != 0 ? w : 0;
  }
  T* peak = reinterpret_cast<T*>(smooth);
  for (PackedRow<T>& row : ws.packed) row.peak = peak, peak += padded_width(w);
  ws.touched = reinterpret_cast<int32_t*>(peak);
  ws.met = reinterpret_cast<uint8_t*>(ws.touched + classes + 1);
  for (double& value : ws.log_sum) value = 0;
  return ws;
}

// A chunk of up to kMaxPixels pixels of one cell and the rows it spans.
template <class T>
struct Cell {
  const T* corner[4];
  double peak[4];  // logits count from there: of samples masked in every class only differences matter
  double smooth[4];
  int64_t x, cell_x, cell_y;
  int n;
  double t_x, step_x;
  bool careful;               // some class spans more than the geometric series can hold
  bool steep;                 // exponents so large that their rounding in float would show in the loss
  bool near_padding = false;  // the largest sample of some corner may be as low as the padded lanes
  int64_t sole;               // class whose exponential is 1 in the whole cell, or -1
  Corners smooth_sum;  // bilinear sum over the block's pixels of the upstream gradient, for label smoothing

  double logit(int q, int64_t c) const { return static_cast<double>(corner[q][c]) - peak[q]; }
};

template <class T>
struct PixelRow {
  alignas(64) double scale[kMaxPixels];  // coefficient of the log-sum-exp; 0 for ignored pixels and beyond n
  alignas(64) double hit[kMaxPixels];    // coefficient of the label's logit
  alignas(64) T u_left[kMaxPixels],
      u_right[kMaxPixels];               // coefficient / sum of exponentials * weight along x
  alignas(64) double z[2 * kMaxPixels];  // sum of exponentials
  alignas(64) int32_t label[kMaxPixels];
  T w_upper, w_lower;  // weights along y
  double upper, lower;
  bool live;  // some pixel counts
};

// Losses of single pixels, for reduction "none": `base` is what the sum of exponentials was taken relative
// to. It and the label's logit count from the interpolated Cell::peak.
template <class T, class Base, class LabelLogit>
void write_pixel_losses(const CrossEntropyTask<T>& task, const Cell<T>& cell, const PixelRow<T>& row,
                        int64_t pixel, const Base& base, const LabelLogit& label_logit) {
  for (int k = 0; k < cell.n; ++k) {
    double loss = 0;
    if (row.label[k] >= 0) {
      // base - label first: beside logits as large as masks have, the logarithm would round away. An infinite
      // weight multiplies their sum: its terms have both signs.
      const double log_z = pixel_log<T>(row.z[k]);
      loss = row.hit[k] * ((base(k) - label_logit(k)) + log_z);
      if (__builtin_isinf(task.total_weight)) {
        loss = task.total_weight;
      } else if (task.smoothing != 0) {
        loss += (row.scale[k] - row.hit[k]) * (log_z + base(k));
        const double *pair = task.pixel.pair + 2 * (cell.x + k), *s = cell.smooth;
        loss -= task.smoothing * (row.upper * (pair[0] * s[0] + pair[1] * s[1]) +
                                  row.lower * (pair[0] * s[2] + pair[1] * s[3]));
      }
    }
    task.pixel_loss[pixel + k] = static_cast<T>(loss);
  }
}

}  // namespace depict::cpu::DEPICT_ISA
