// Cross-entropy of bilinearly upsampled logits without the upsampled logits; the gradient in the same sweep.
//
// Inside a cell (between four low-resolution samples) every class logit is linear along a pixel row, so its
// exponential is a geometric series e r^k: two exponentials per class and row instead of one per pixel, and
// those are geometric from row to row. Shifting by the bilinearly interpolated maximum over classes keeps all
// exponents <= 0. The gradient of a cell's left and right samples, sums over k of u_k r^k, is Horner's
// scheme. Lanes are classes. Only cells whose classes span more than float can hold take the direct
// ("careful") path.
#pragma once

namespace depict::cpu::DEPICT_ISA {

// Labels and coefficients of a row of at most `Width` pixels.
template <int Width, class T>
void read_row(const CrossEntropyTask<T>& task, Cell<T>& cell, int64_t b, int64_t y, PixelRow<T>& row,
              CrossEntropyPartial& partial) {
  const Axis& ay = task.packed.y;
  const int n = cell.n;
  row.lower = task.pixel.row[y];
  row.upper = 1.0 - row.lower;
  row.w_lower = static_cast<T>(row.lower);
  row.w_upper = static_cast<T>(row.upper);
  const int64_t first =
      b * task.target.stride[0] + y * task.target.stride[1] + cell.x * task.target.stride[2];
  const int64_t bad = task.load_labels(
      static_cast<const char*>(task.target.data) + first * kIntSize[static_cast<int>(task.target.type)],
      task.target.stride[2], n, task.packed.classes, task.ignore_index, row.label);
  const int64_t pixel = (b * ay.out + y) * task.packed.x.out + cell.x;
  if (bad >= 0 && (partial.bad < 0 || pixel + bad < partial.bad)) partial.bad = pixel + bad;
  for (int k = n; k < Width; ++k) row.label[k] = -1;

  if (!task.weight && !task.pixel_gradient && task.hit == 1.0) {
    int valid = 0;
    for (int k = 0; k < Width; ++k) {
      const bool counts = row.label[k] >= 0;
      row.scale[k] = row.hit[k] = counts ? 1.0 : 0.0;
      valid += counts;
    }
    partial.weight += valid;
    row.live = valid > 0;
    return;
  }
  row.live = false;
  for (int k = 0; k < Width; ++k) {
    row.scale[k] = row.hit[k] = 0;
    if (row.label[k] < 0) continue;
    const double weight = task.weight ? task.weight[row.label[k]] : 1.0;
    const double upstream = task.pixel_gradient ? static_cast<double>(task.pixel_gradient[pixel + k]) : 1.0;
    partial.weight += weight;
    row.hit[k] = task.hit * weight * upstream;
    row.scale[k] = row.hit[k] + task.smoothing * task.total_weight * upstream;
    row.live = true;
    if (task.smoothing != 0) {
      const double right = task.pixel.pair[2 * (cell.x + k) + 1], left = task.pixel.pair[2 * (cell.x + k)];
      cell.smooth_sum +=
          upstream * Corners{row.upper * left, row.upper * right, row.lower * left, row.lower * right};
    }
  }
}

// Adds the row's bilinear weights to its labels, a run of equal labels at a time. `across` are the weights of
// the left and the right sample, twice.
template <class T>
DEPICT_INLINE void scatter_row(const PixelRow<T>& row, int n, const Corners* across, const Workspace<T>& ws,
                               int64_t& touched) {
  // Local, since the compiler has to assume that a store of bytes changes anything else.
  Corners* const hits = ws.hits;
  int32_t* const list = ws.touched;
  uint8_t* const met = ws.met;
  const Corners down{row.upper, row.upper, row.lower, row.lower};
  int64_t count = touched;
  for (int k = 0; k < n;) {
    const int32_t label = row.label[k];
    Corners run = row.hit[k] * across[k];
    for (++k; k < n && row.label[k] == label; ++k) run += row.hit[k] * across[k];
    if (label < 0) continue;
    hits[label] += run * down;
    list[count] = label;
    count += 1 - met[label];
    met[label] = 1;
  }
  touched = count;
}

template <class T>
void tile(const CrossEntropyTask<T>& task, Cell<T>& cell, PixelRow<T>* row, int rows, bool along_y,
          int64_t pixel, Workspace<T>& ws) {
  if constexpr (sizeof(T) == 4)
    if (!cell.careful)
      return with_pixels(
          cell.n, [&](auto pixels) { fast_tile<pixels.count>(task, cell, row, rows, along_y, pixel, ws); });
  for (int i = 0; i < rows; ++i)
    if (row[i].live) careful_row<T>(task, cell, row[i], pixel + i * task.packed.x.out, ws);
}

// Moves what a block of rows summed into the cell row's gradient and the loss.
template <class T>
void finish_block(const CrossEntropyTask<T>& task, Cell<T>& cell, int64_t touched, Workspace<T>& ws,
                  double& loss) {
  constexpr int L = Simd<T>::lanes;
  const int64_t lanes = task.packed.lanes;
  Corners label_logits{};
  const bool want_logits = task.want_loss && !cell.careful;  // careful rows have counted them
  for (int64_t i = 0; i < touched; ++i) {
    const int32_t label = ws.touched[i];
    const Corners hits = ws.hits[label];
    if (want_logits) {
      const Corners logits{cell.logit(0, label), cell.logit(1, label), cell.logit(2, label),
                           cell.logit(3, label)};
      label_logits += hits == 0.0 ? Corners{} : hits * logits;  // 0 times an infinite logit is none
    }
    if (task.gradient)
      for (int q = 0; q < 4; ++q) ws.sum[q][label] -= static_cast<T>(hits[q]);
    ws.hits[label] = Corners{};
    ws.met[label] = 0;
  }
  loss -= (label_logits[0] + label_logits[1]) + (label_logits[2] + label_logits[3]);
  if (task.want_loss)
    for (int q = 0; q < 4; ++q)
      if (cell.smooth_sum[q] != 0) loss -= task.smoothing * cell.smooth_sum[q] * cell.smooth[q];
  if (!task.gradient) return;
  for (int q = 0; q < 4; ++q) {
    if (task.smoothing != 0)
      for (int64_t c = 0; c < task.packed.classes; ++c)
        ws.sum[q][c] -=
            static_cast<T>(task.smoothing * (task.weight ? task.weight[c] : 1.0) * cell.smooth_sum[q]);
    if (ws.sum[q] != ws.block[q]) continue;
    const bool right = q % 2 && !task.packed.x.border(cell.cell_x);
    T* total = (right ? ws.right : ws.left) + q / 2 * lanes;
    for (int64_t c = 0; c < lanes; c += L) {
      store<T>(total + c, load<T>(total + c) + load<T>(ws.sum[q] + c));
      store<T>(ws.sum[q] + c, Vec<T>{});
    }
  }
}

// Where a cell row leaves the gradient of its upper and lower samples.
template <class T>
struct Destination {
  T* upper;
  T* lower;          // null at the border, where there are none
  bool add = false;  // to what is there, for the upper ones
};

// The sample left of the cell is complete: moves its gradient out. The right one is the next cell's left one.
template <class T>
void finish_sample(int64_t lanes, const Destination<T>& to, int64_t at, Workspace<T>& ws) {
  constexpr int L = Simd<T>::lanes;
  T* done = ws.left;
  for (int64_t c = 0; c < lanes; c += L) {
    const Vec<T> upper = load<T>(done + c);
    store<T>(to.upper + at + c, to.add ? load<T>(to.upper + at + c) + upper : upper);
    if (to.lower) store<T>(to.lower + at + c, load<T>(done + lanes + c));
    store<T>(done + c, Vec<T>{});
    store<T>(done + lanes + c, Vec<T>{});
  }
  ws.left = ws.right;
  ws.right = done;
}

template <class T>
void sweep_chunk(const CrossEntropyTask<T>& task, Cell<T>& cell, int64_t b, int64_t y0, int64_t y1,
                 Workspace<T>& ws, double& loss, CrossEntropyPartial& partial) {
  const Packed& p = task.packed;
  bool along_y = y1 - y0 > 2;
  if constexpr (sizeof(T) == 4)
    if (!cell.careful && along_y) {
      const double step_y = p.y.step(cell.cell_y);
      with_pixels(cell.n,
                  [&](auto pixels) { along_y = row_ratios<pixels.count>(p.lanes, cell, step_y, ws); });
    }
  PixelRow<T> row[kTileRows];
  Corners across[kMaxPixels];
  for (int k = 0; k < cell.n; ++k) {
    const double* pair = task.pixel.pair + 2 * (cell.x + k);
    across[k] = Corners{pair[0], pair[1], pair[0], pair[1]};
  }
  for (int64_t block = y0; block < y1; block += kBlockRows) {
    const int64_t block_end = block + kBlockRows < y1 ? block + kBlockRows : y1;
    cell.smooth_sum = Corners{};
    int64_t touched = 0;
    for (int64_t y = block; y < block_end; y += kTileRows) {
      const int count = static_cast<int>(y + kTileRows < block_end ? kTileRows : block_end - y);
      for (int k = 0; k < count; ++k) {
        if (cell.n <= 4)
          read_row<4>(task, cell, b, y + k, row[k], partial);
        else
          read_row<DEPICT_PIXELS>(task, cell, b, y + k, row[k], partial);
      }
      const int64_t pixel = (b * p.y.out + y) * p.x.out + cell.x;
      tile<T>(task, cell, row, count, along_y, pixel, ws);
      for (int k = 0; k < count; ++k) {
        if (row[k].live)
          scatter_row(row[k], cell.n, across, ws, touched);
        else if (task.pixel_loss)
          for (int x = 0; x < cell.n; ++x) task.pixel_loss[pixel + k * p.x.out + x] = 0;
      }
    }
    finish_block(task, cell, touched, ws, loss);
  }
}

template <class T>
void cell_row(const CrossEntropyTask<T>& task, int64_t b, int64_t i, const Destination<T>& to,
              Workspace<T>& ws, CrossEntropyPartial& partial) {
  const Packed& p = task.packed;
  const int64_t w = p.x.in, lanes = p.lanes;
  const int64_t y0 = p.y.begin(i), y1 = p.y.begin(i + 1);
  double loss = 0;
  for (double& value : ws.log_sum) value = 0;
  const PackedRow<T>& upper = ws.packed[p.y.lower(i) % 2];
  const PackedRow<T>& lower = ws.packed[p.y.upper(i) % 2];
  for (int64_t j = -1, x1 = 0; j < w; ++j) {
    const int64_t x0 = x1;
    x1 = p.x.begin(j + 1);
    const int64_t pixels = x1 - x0;
    if (pixels > 0) {
      const int64_t chunks = (pixels + DEPICT_PIXELS - 1) / DEPICT_PIXELS;
      Cell<T> cell;
      for (int q = 0; q < 4; ++q) {
        const PackedRow<T>& row = q < 2 ? upper : lower;
        const int64_t x = q % 2 ? p.x.upper(j) : p.x.lower(j);
        cell.corner[q] = row.logits + x * lanes;
        cell.peak[q] = static_cast<double>(row.peak[x]);
        cell.near_padding |= row.peak[x] < -kHuge<T>;
        cell.smooth[q] = row.smooth ? row.smooth[x] : 0;
      }
      cell.cell_x = j;
      cell.cell_y = i;
      cell.step_x = p.x.step(j);
      cell.careful = true;
      // Two pixels in a row are cheaper directly.
      if constexpr (sizeof(T) == 4)
        if (pixels > 2 * chunks && !cell.near_padding) shift_cell(lanes, cell, ws);
      // Few rows are added up with the neighbouring cell's at once; the two samples of a border are one.
      const bool direct = chunks == 1 && y1 - y0 <= kBlockRows / 2 && !p.x.border(j);
      for (int q = 0; q < 4; ++q)
        ws.sum[q] = direct ? (q % 2 ? ws.right : ws.left) + q / 2 * lanes : ws.block[q];
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        cell.x = chunk == 0 ? x0 : cell.x + cell.n;
        cell.n = static_cast<int>((chunk + 1 == chunks ? x1 : x0 + pixels * (chunk + 1) / chunks) - cell.x);
        cell.t_x = p.x.weight(j, cell.x);
        sweep_chunk(task, cell, b, y0, y1, ws, loss, partial);
      }
    }
    if (task.gradient && j >= 0) finish_sample(lanes, to, j * lanes, ws);
  }
  for (const double value : ws.log_sum) loss += value;
  partial.loss += loss;
}

// Two cell rows add to the gradient of a low-resolution row, y - 1 and y. What lies within the band stays in
// the cache and is written out as soon as it is complete.
template <class T>
void cross_entropy_band(const CrossEntropyTask<T>& task, int64_t index, void* scratch,
                        CrossEntropyPartial* partial) {
  const Packed& p = task.packed;
  const int64_t h = p.y.in, w = p.x.in, row = w * p.lanes;
  const int64_t b = index / task.bands, number = index % task.bands;
  const int64_t begin = number * task.band - 1, end = begin + task.band < h ? begin + task.band : h;
  // What this band adds at its borders with the ones above and below.
  const int64_t border = b * (task.bands - 1) + number;
  T* first = number > 0 ? task.edges + (2 * border - 1) * row : nullptr;
  T* last = number < task.bands - 1 ? task.edges + 2 * border * row : nullptr;
  Workspace<T> ws = carve(task, scratch);
  int64_t at_hand[2] = {-1, -1};           // packed rows
  for (int64_t i = begin; i < end; ++i) {  // -1 is the border above the first row
    const bool any = p.y.begin(i) < p.y.begin(i + 1);
    if (any)
      for (int64_t y = p.y.lower(i); y <= p.y.upper(i); ++y)
        if (at_hand[y % 2] != y) {
          pack_row(p, task.logits, task.weight, b, y, ws.packed[y % 2]);
          at_hand[y % 2] = y;
        }
    Destination<T> to{};
    if (task.gradient) {
      T* below = i + 1 >= h ? nullptr : i + 1 < end ? ws.gradient[(i + 1) % 2] : last;
      if (i < 0) {
        to.upper = below;  // both samples are those of row 0
      } else {
        to.upper = i > begin ? ws.gradient[i % 2] : first;
        to.lower = below;
        to.add = i > begin;
      }
      if (!any) {
        const size_t bytes = static_cast<size_t>(row) * sizeof(T);
        if (!to.add) __builtin_memset(to.upper, 0, bytes);
        if (to.lower) __builtin_memset(to.lower, 0, bytes);
      }
    }
    if (any) cell_row(task, b, i, to, ws, partial[b * (h + 1) + i + 1]);
    if (to.add) {
      const T* done = to.upper;
      unpack_row<T>(
          p, [&](int64_t at) { return load<T>(done + at); }, task.gradient + (b * p.classes * h + i) * w);
    }
  }
}

}  // namespace depict::cpu::DEPICT_ISA
