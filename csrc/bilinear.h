// Source index and weights of bilinear upsampling with align_corners=False, shared by host and device code.
//
// Output pixel x of an axis reads source coordinate s(x) = (x + 0.5) * in / out - 0.5. Pixels with the same
// floor(s) form a "cell": cell j lies between source samples j and j + 1, and t = s - j moves linearly in it.
// Cells -1 and in - 1 are the borders, where torch clamps the coordinate or the neighbour: there t = 0 is
// right and both samples are the nearest one. All quantities are ratios of integers, so cells are found
// exactly.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DEPICT_HOST_DEVICE __host__ __device__
#else
#define DEPICT_HOST_DEVICE
#endif

namespace depict {

struct Axis {
  int64_t in;   // samples of the low-resolution axis
  int64_t out;  // pixels of the upsampled axis

  DEPICT_HOST_DEVICE bool border(int64_t cell) const { return cell < 0 || cell >= in - 1; }

  // The two samples a cell lies between.
  DEPICT_HOST_DEVICE int64_t lower(int64_t cell) const { return cell < 0 ? 0 : cell; }
  DEPICT_HOST_DEVICE int64_t upper(int64_t cell) const { return border(cell) ? lower(cell) : cell + 1; }

  // First pixel with floor(s) >= cell; [begin(cell), begin(cell + 1)) are the pixels of the cell.
  DEPICT_HOST_DEVICE int64_t begin(int64_t cell) const {
    if (cell < 0) return 0;
    if (cell >= in) return out;
    const int64_t numerator = (2 * cell + 1) * out - in;  // s(x) >= cell  <=>  x >= numerator / (2 in)
    if (numerator <= 0) return 0;
    const int64_t x = (numerator + 2 * in - 1) / (2 * in);
    return x < out ? x : out;
  }

  DEPICT_HOST_DEVICE int64_t cell_of(int64_t x) const {
    const int64_t numerator = (2 * x + 1) * in - out;
    if (numerator < 0) return -1;
    const int64_t cell = numerator / (2 * out);
    return cell < in ? cell : in - 1;
  }

  // Weight of the upper sample.
  DEPICT_HOST_DEVICE double weight(int64_t cell, int64_t x) const {
    if (border(cell)) return 0.0;
    return static_cast<double>((2 * x + 1) * in - (2 * cell + 1) * out) / (2.0 * static_cast<double>(out));
  }

  // Change of that weight from one pixel to the next.
  DEPICT_HOST_DEVICE double step(int64_t cell) const {
    return border(cell) ? 0.0 : static_cast<double>(in) / static_cast<double>(out);
  }
};

}  // namespace depict
