// Cross-entropy of bilinearly upsampled logits without the upsampled logits; the gradient in the same sweep.
//
// Inside a cell (between four low-resolution samples) every class logit is linear along a pixel row, so its
// exponential is a geometric series e r^k: two exponentials per class and row instead of one per pixel, and those
// are geometric from row to row. Shifting by the bilinearly interpolated maximum over classes keeps all
// exponents <= 0. The gradient of a cell's left and right samples, sums over k of u_k r^k, is Horner's scheme.
// Lanes are classes. Only cells whose classes span more than float can hold take the direct ("careful") path.
#pragma once

namespace depict::cpu::DEPICT_ISA {

typedef double Corners __attribute__((vector_size(32)));  // upper left, upper right, lower left, lower right

// Exponents below kFloor are raised to it: e^-66 times weights and 1 / sum stays clear of subnormal floats, which
// are slow. That is harmless for a class that stays below kNegligible in the whole cell while the sum is at least
// kSmallSum (a relative error of e^-42 / 2e-9 = 3e-10), and only then.
constexpr float kFloor = -66.0f, kNegligible = -42.0f, kSmallSum = 2e-9f;
constexpr int64_t kBlockRows = 64;  // rows accumulated in T before they are added to the cell row's sums

// Relative to the pixel's maximum; e to this is nothing beside 1, and its products are not subnormal.
template <class T>
constexpr T exp_floor() {
  return sizeof(T) == 4 ? T(-60) : T(-300);
}

template <class T>
struct Workspace {
  T *e, *r, *q;          // [kTileRows][lanes] exponential of the middle pixel, ratio to the next and the last one
  T *row_e, *row_r, *row_q;  // [lanes] ratio of e, relative changes of r and q, from row to row
  T *s, *dx, *dy, *dxy;  // [lanes] shifted logit of the upper left sample, differences along x and y, mixed
  double* logit;         // [kMaxPixels][lanes] logits of a careful row
  T* exponential;        // [kMaxPixels][lanes] their exponentials
  T* sum[4];             // [lanes] gradient of the cell's samples
  Corners* hits;         // [classes] bilinear weights of the pixels with this label
  int32_t* touched;      // [classes + 1] labels met in this cell
  uint8_t* met;          // [classes]
  // Sums over the rows of a cell row, one per pixel position in a chunk (so that the compiler vectorises).
  double log_sum[kMaxPixels];
  double upper[kMaxPixels], lower[kMaxPixels];  // of this block: coefficients times weight along y
};

template <class T>
int64_t cross_entropy_scratch(const CrossEntropyTask<T>& task) {
  const int64_t lanes = task.packed.lanes, classes = task.packed.classes;
  return lanes * (3 * kTileRows + 3 + 4 + kMaxPixels + 4) * static_cast<int64_t>(sizeof(T)) +
         lanes * kMaxPixels * static_cast<int64_t>(sizeof(double)) +
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
  for (T*& sum : ws.sum) sum = take(1);
  ws.logit = reinterpret_cast<double*>(p);
  ws.hits = reinterpret_cast<Corners*>(ws.logit + kMaxPixels * lanes);
  ws.touched = reinterpret_cast<int32_t*>(ws.hits + classes);
  ws.met = reinterpret_cast<uint8_t*>(ws.touched + classes + 1);
  for (int k = 0; k < kMaxPixels; ++k) ws.log_sum[k] = ws.upper[k] = ws.lower[k] = 0;
  return ws;
}

// A chunk of up to kMaxPixels pixels of one cell and the rows it spans.
template <class T>
struct Cell {
  const T* corner[4];
  double peak[4];
  double smooth[4];
  int64_t x, cell_x, cell_y;
  int n;
  double t_x, step_x;
  bool careful;        // some class spans more than the geometric series can hold
  Corners smooth_sum;  // bilinear sum over the block's pixels of the upstream gradient, for label smoothing
};

template <class T>
struct PixelRow {
  alignas(64) double scale[kMaxPixels];  // coefficient of the log-sum-exp; 0 for ignored pixels and beyond n
  alignas(64) double hit[kMaxPixels];    // coefficient of the label's logit
  alignas(64) T u_left[kMaxPixels], u_right[kMaxPixels];  // coefficient / sum of exponentials * weight along x
  alignas(64) T z[2 * kMaxPixels];
  alignas(64) int32_t label[kMaxPixels];
  T w_upper, w_lower;  // weights along y
  double upper, lower;
  bool live;  // some pixel counts
};

template <class T>
void read_row(const CrossEntropyTask<T>& task, Cell<T>& cell, int64_t b, int64_t y, PixelRow<T>& row,
              CrossEntropyPartial& partial) {
  const Axis& ay = task.packed.y;
  const int n = cell.n;
  row.lower = ay.weight(cell.cell_y, y);
  row.upper = 1.0 - row.lower;
  row.w_lower = static_cast<T>(row.lower);
  row.w_upper = static_cast<T>(row.upper);
  static constexpr int kSize[] = {1, 1, 2, 2, 4, 4, 8, 8};
  const int64_t first =
      b * task.target.stride[0] + y * task.target.stride[1] + cell.x * task.target.stride[2];
  const int64_t bad =
      task.load_labels(static_cast<const char*>(task.target.data) + first * kSize[static_cast<int>(task.target.type)],
                       task.target.stride[2], n, task.packed.classes, task.ignore_index, row.label);
  const int64_t pixel = (b * ay.out + y) * task.packed.x.out + cell.x;
  if (bad >= 0 && (partial.bad < 0 || pixel + bad < partial.bad)) partial.bad = pixel + bad;
  for (int k = n; k < kMaxPixels; ++k) row.label[k] = -1;

  if (!task.weight && !task.pixel_gradient && task.hit == 1.0) {
    int valid = 0;
    for (int k = 0; k < kMaxPixels; ++k) {
      const bool counts = row.label[k] >= 0;
      row.scale[k] = row.hit[k] = counts ? 1.0 : 0.0;
      valid += counts;
    }
    partial.weight += valid;
    row.live = valid > 0;
    return;
  }
  row.live = false;
  for (int k = 0; k < kMaxPixels; ++k) {
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
      cell.smooth_sum += upstream * Corners{row.upper * left, row.upper * right, row.lower * left, row.lower * right};
    }
  }
}

// Adds the row's bilinear weights to its labels, a run of equal labels at a time.
template <class T>
void scatter_row(const PixelRow<T>& row, int n, const double* pair, Workspace<T>& ws, int64_t& touched) {
  int k = 0;
  while (k < n) {
    const int32_t label = row.label[k];
    double left = 0, right = 0;
    do {
      left += row.hit[k] * pair[2 * k];
      right += row.hit[k] * pair[2 * k + 1];
      ++k;
    } while (k < n && row.label[k] == label);
    if (label < 0) continue;
    ws.hits[label] += Corners{row.upper * left, row.upper * right, row.lower * left, row.lower * right};
    ws.touched[touched] = label;
    touched += 1 - ws.met[label];
    ws.met[label] = 1;
  }
}

// Losses of single pixels, for reduction "none": `base` is what the sum of exponentials was taken relative to.
template <class T, class Base, class LabelLogit>
void write_pixel_losses(const CrossEntropyTask<T>& task, const Cell<T>& cell, const PixelRow<T>& row, int64_t pixel,
                        const Base& base, const LabelLogit& label_logit) {
  for (int k = 0; k < cell.n; ++k) {
    double loss = 0;
    if (row.label[k] >= 0) {
      loss = row.scale[k] * (pixel_log(row.z[k]) + base(k)) - row.hit[k] * label_logit(k);
      if (task.smoothing != 0) {
        const double *pair = task.pixel.pair + 2 * (cell.x + k), *s = cell.smooth;
        loss -= task.smoothing * (row.upper * (pair[0] * s[0] + pair[1] * s[1]) +
                                  row.lower * (pair[0] * s[2] + pair[1] * s[3]));
      }
    }
    task.pixel_loss[pixel + k] = static_cast<T>(loss);
  }
}

// Interpolates in double: sharp logits lose more to rounding there than in all that follows.
template <class T>
DEPICT_INLINE Vec<double> load_wide(const T* p) {
  typedef T Narrow __attribute__((vector_size(Simd<double>::lanes * sizeof(T)), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), Vec<double>);
}

template <class T>
DEPICT_INLINE void store_narrow(T* p, Vec<double> v) {
  typedef T Narrow __attribute__((vector_size(Simd<double>::lanes * sizeof(T)), may_alias));
  *reinterpret_cast<Narrow*>(p) = __builtin_convertvector(v, Narrow);
}

// Every pixel's own maximum and one exponential per pixel and class.
template <class T, int N>
void careful_row(const CrossEntropyTask<T>& task, const Cell<T>& cell, PixelRow<T>& row, int64_t pixel,
                 Workspace<T>& ws) {
  const int64_t lanes = task.packed.lanes;
  alignas(64) double left[N], right[N], peak[padded_pixels<double>(N)];
  for (int k = 0; k < N; ++k) {  // beyond n: the last pixel again, so that nothing new overflows
    const int64_t x = cell.x + (k < cell.n ? k : cell.n - 1);
    left[k] = task.pixel.pair[2 * x];
    right[k] = task.pixel.pair[2 * x + 1];
  }
  Vec<double> best[N];
  DEPICT_UNROLL
  for (int k = 0; k < N; ++k) best[k] = splat<double>(-__builtin_inf());
  for (int64_t c = 0; c < lanes; c += Simd<double>::lanes) {
    const Vec<double> a = load_wide(cell.corner[0] + c) * row.upper + load_wide(cell.corner[2] + c) * row.lower;
    const Vec<double> b = load_wide(cell.corner[1] + c) * row.upper + load_wide(cell.corner[3] + c) * row.lower;
    DEPICT_UNROLL
    for (int k = 0; k < N; ++k) {
      const Vec<double> logit = a * left[k] + b * right[k];
      store<double>(ws.logit + k * lanes + c, logit);
      best[k] = Max::of(best[k], logit);
    }
  }
  reduce_lanes<double, Max, N>(best, peak);

  for (int k = 0; k < N; ++k)
    for (int64_t c = 0; c < lanes; c += Simd<double>::lanes)
      store_narrow(ws.exponential + k * lanes + c,
                   at_least(load<double>(ws.logit + k * lanes + c) - peak[k], splat<double>(exp_floor<T>())));
  Vec<T> total[N];
  DEPICT_UNROLL
  for (int k = 0; k < N; ++k) total[k] = Vec<T>{};
  for (int64_t c = 0; c < lanes; c += Simd<T>::lanes) {
    DEPICT_UNROLL
    for (int k = 0; k < N; ++k) {
      T* at = ws.exponential + k * lanes + c;
      const Vec<T> e = vexp(load<T>(at));
      store<T>(at, e);
      total[k] += e;
    }
  }
  reduce_lanes<T, Add, N>(total, row.z);
  const auto label_logit = [&](int k) { return ws.logit[k * lanes + row.label[k]]; };

  for (int k = 0; k < N; ++k) {
    const T u = row.scale[k] != 0 ? static_cast<T>(row.scale[k]) / row.z[k] : T(0);
    row.u_left[k] = u * static_cast<T>(left[k]);
    row.u_right[k] = u * static_cast<T>(right[k]);
  }
  if (task.want_loss) {
    for (int k = 0; k < cell.n; ++k)
      if (row.label[k] >= 0) {
        ws.log_sum[k] += row.scale[k] * (pixel_log(row.z[k]) + peak[k]);
        if (cell.careful) ws.log_sum[k] -= row.hit[k] * label_logit(k);
      }
  }
  if (task.pixel_loss)
    write_pixel_losses(task, cell, row, pixel, [&](int k) { return peak[k]; }, label_logit);
  if (task.rows) {
    for (int64_t c = 0; c < lanes; c += Simd<T>::lanes) {
      Vec<T> a{}, b{};
      DEPICT_UNROLL
      for (int k = 0; k < N; ++k) {
        const Vec<T> e = load<T>(ws.exponential + k * lanes + c);
        a += e * row.u_left[k];
        b += e * row.u_right[k];
      }
      store<T>(ws.sum[0] + c, load<T>(ws.sum[0] + c) + a * row.w_upper);
      store<T>(ws.sum[1] + c, load<T>(ws.sum[1] + c) + b * row.w_upper);
      store<T>(ws.sum[2] + c, load<T>(ws.sum[2] + c) + a * row.w_lower);
      store<T>(ws.sum[3] + c, load<T>(ws.sum[3] + c) + b * row.w_lower);
    }
  }
}

template <class T>
void careful_row(const CrossEntropyTask<T>& task, const Cell<T>& cell, PixelRow<T>& row, int64_t pixel,
                 Workspace<T>& ws) {
  if (cell.n <= 2) return careful_row<T, 2>(task, cell, row, pixel, ws);
  if (cell.n <= 4) return careful_row<T, 4>(task, cell, row, pixel, ws);
  if (cell.n <= 8) return careful_row<T, 8>(task, cell, row, pixel, ws);
  if constexpr (DEPICT_PIXELS > 8) return careful_row<T, DEPICT_PIXELS>(task, cell, row, pixel, ws);
}

// Shifted logits of the cell as a bilinear form; decides whether the geometric series holds them.
void shift_cell(int64_t lanes, Cell<float>& cell, Workspace<float>& ws) {
  constexpr int L = Simd<float>::lanes;
  IVec<float> wide{};
  for (int64_t c = 0; c < lanes; c += L) {
    Vec<float> s[4];
    DEPICT_UNROLL
    for (int q = 0; q < 4; ++q) s[q] = load<float>(cell.corner[q] + c) - static_cast<float>(cell.peak[q]);
    const Vec<float> low = at_most(at_most(s[0], s[1]), at_most(s[2], s[3]));
    const Vec<float> high = Max::of(Max::of(s[0], s[1]), Max::of(s[2], s[3]));
    // Comparisons with NaN are false: a NaN in any sample makes the cell careful.
    const IVec<float> number = (s[0] == s[0]) & (s[1] == s[1]) & (s[2] == s[2]) & (s[3] == s[3]);
    wide |= ~(number & ((low >= kFloor) | (high <= kNegligible)));
    DEPICT_UNROLL
    for (int q = 0; q < 4; ++q) s[q] = at_least(s[q], splat<float>(kFloor));
    store<float>(ws.s + c, s[0]);
    store<float>(ws.dx + c, s[1] - s[0]);
    store<float>(ws.dy + c, s[2] - s[0]);
    store<float>(ws.dxy + c, (s[3] - s[2]) - (s[1] - s[0]));
  }
  int32_t any = 0;
  for (int i = 0; i < L; ++i) any |= wide[i];
  cell.careful = any != 0;
}

// The next row's ratio from the last row's and its relative change.
DEPICT_INLINE Vec<float> advance(float* to, int64_t lanes, const float* change) {
  const Vec<float> before = load<float>(to - lanes);
  const Vec<float> now = before * load<float>(change) + before;
  store<float>(to, now);
  return now;
}

// Sums of exponentials of one row, outwards from its middle pixel, which halves the error of r^k; Advance first
// steps the series on from the previous row.
template <int N, bool Advance>
void sum_row(int64_t lanes, int64_t i, Workspace<float>& ws, float* z) {
  constexpr int L = Simd<float>::lanes;
  float *e = ws.e + i * lanes, *r = ws.r + i * lanes, *q = ws.q + i * lanes;
  Vec<float> total[N];
  DEPICT_UNROLL
  for (int k = 0; k < N; ++k) total[k] = Vec<float>{};
  for (int64_t c = 0; c < lanes; c += L) {
    const Vec<float> middle = Advance ? load<float>(e - lanes + c) * load<float>(ws.row_e + c) : load<float>(e + c);
    if constexpr (Advance) store<float>(e + c, middle);
    const Vec<float> up = Advance ? advance(r + c, lanes, ws.row_r + c) : load<float>(r + c);
    const Vec<float> down = Advance ? advance(q + c, lanes, ws.row_q + c) : load<float>(q + c);
    Vec<float> term = middle;
    DEPICT_UNROLL
    for (int k = N / 2; k < N; ++k) {
      total[k] += term;
      if (k + 1 < N) term *= up;
    }
    term = middle;
    DEPICT_UNROLL
    for (int k = N / 2 - 1; k >= 0; --k) {
      term *= down;
      total[k] += term;
    }
  }
  reduce_lanes<float, Add, N>(total, z);
}

// Sums the gradient of `rows` rows into the cell's four samples.
template <int N>
void gradient_tile(int64_t lanes, const PixelRow<float>* row, const bool* use, int rows, Workspace<float>& ws) {
  constexpr int L = Simd<float>::lanes;
  for (int64_t c = 0; c < lanes; c += L) {
    Vec<float> s0 = load<float>(ws.sum[0] + c), s1 = load<float>(ws.sum[1] + c);
    Vec<float> s2 = load<float>(ws.sum[2] + c), s3 = load<float>(ws.sum[3] + c);
    for (int i = 0; i < rows; ++i) {
      if (!use[i]) continue;
      const Vec<float> e = load<float>(ws.e + i * lanes + c);
      const Vec<float> up = load<float>(ws.r + i * lanes + c), down = load<float>(ws.q + i * lanes + c);
      Vec<float> a = splat(row[i].u_left[N - 1]), b = splat(row[i].u_right[N - 1]);
      DEPICT_UNROLL
      for (int k = N - 2; k >= N / 2; --k) {
        a = a * up + row[i].u_left[k];
        b = b * up + row[i].u_right[k];
      }
      Vec<float> a_down = splat(row[i].u_left[0]), b_down = splat(row[i].u_right[0]);
      DEPICT_UNROLL
      for (int k = 1; k < N / 2; ++k) {
        a_down = a_down * down + row[i].u_left[k];
        b_down = b_down * down + row[i].u_right[k];
      }
      a = (a_down * down + a) * e;
      b = (b_down * down + b) * e;
      s0 += a * row[i].w_upper;
      s1 += b * row[i].w_upper;
      s2 += a * row[i].w_lower;
      s3 += b * row[i].w_lower;
    }
    store<float>(ws.sum[0] + c, s0);
    store<float>(ws.sum[1] + c, s1);
    store<float>(ws.sum[2] + c, s2);
    store<float>(ws.sum[3] + c, s3);
  }
}

template <int N>
struct Pixels {
  static constexpr int count = N;
};

// How a row follows from the one before. The error of r is raised to the power k, so r and q move by exp - 1, which
// is small and so is its error; returns whether it is small enough for that in every class.
template <int N>
bool row_ratios(int64_t lanes, const Cell<float>& cell, float step_y, Workspace<float>& ws) {
  constexpr int L = Simd<float>::lanes;
  const float t = static_cast<float>(cell.t_x + N / 2 * cell.step_x);
  const float step = static_cast<float>(cell.step_x) * step_y;
  IVec<float> large{};
  for (int64_t c = 0; c < lanes; c += L) {
    const Vec<float> mixed = load<float>(ws.dxy + c), change = mixed * step;
    large |= (change > 1.0f) | (change < -1.0f);
    store<float>(ws.row_e + c, vexp((load<float>(ws.dy + c) + mixed * t) * step_y));
    store<float>(ws.row_r + c, vexpm1(change));
    store<float>(ws.row_q + c, vexpm1(-change));
  }
  int32_t any = 0;
  for (int i = 0; i < L; ++i) any |= large[i];
  return any == 0;
}

// Up to kTileRows rows with geometric series; `along_y` says that row ratios are at hand.
template <int N>
void fast_tile(const CrossEntropyTask<float>& task, Cell<float>& cell, PixelRow<float>* row, int rows, bool along_y,
               int64_t pixel, Workspace<float>& ws) {
  constexpr int L = Simd<float>::lanes;
  const int64_t lanes = task.packed.lanes;
  const float t = static_cast<float>(cell.t_x + N / 2 * cell.step_x), step = static_cast<float>(cell.step_x);
  bool use[kTileRows];
  int last = -1;
  for (int i = 0; i < rows; ++i) {
    use[i] = row[i].live;
    if (use[i]) last = i;
  }
  alignas(64) float left[N], right[N];
  for (int k = 0; k < N; ++k) {
    left[k] = task.pixel.lower[cell.x + k];
    right[k] = task.pixel.upper[cell.x + k];
  }
  for (int i = 0; i <= last; ++i) {
    if (i == 0 || !along_y) {
      const float y = row[i].w_lower;
      for (int64_t c = 0; c < lanes; c += L) {
        const Vec<float> slope = load<float>(ws.dx + c) + load<float>(ws.dxy + c) * y;
        store<float>(ws.e + i * lanes + c, vexp(load<float>(ws.s + c) + load<float>(ws.dy + c) * y + slope * t));
        store<float>(ws.r + i * lanes + c, vexp(slope * step));
        store<float>(ws.q + i * lanes + c, vexp(slope * -step));
      }
      sum_row<N, false>(lanes, i, ws, row[i].z);
    } else {
      sum_row<N, true>(lanes, i, ws, row[i].z);
    }
    if (!use[i]) continue;
    for (int k = cell.n; k < N; ++k) row[i].z[k] = 1.0f;
    int small = 0;
    for (int k = 0; k < N; ++k) small |= row[i].z[k] < kSmallSum;
    if (small) {
      careful_row<float>(task, cell, row[i], pixel + i * task.packed.x.out, ws);
      use[i] = false;
      continue;
    }
    for (int k = 0; k < N; ++k) {
      const float u = static_cast<float>(row[i].scale[k]) / row[i].z[k];
      row[i].u_left[k] = u * left[k];
      row[i].u_right[k] = u * right[k];
    }
    if (task.want_loss) {
      for (int k = 0; k < N; ++k) {
        const double scale = row[i].scale[k];
        ws.log_sum[k] += scale * pixel_log(row[i].z[k]);
        ws.upper[k] += scale * row[i].upper;
        ws.lower[k] += scale * row[i].lower;
      }
    }
    if (task.pixel_loss) {
      const PixelRow<float>& p = row[i];
      const auto bilinear = [&](int k, double q0, double q1, double q2, double q3) {
        const double* pair = task.pixel.pair + 2 * (cell.x + k);
        return p.upper * (pair[0] * q0 + pair[1] * q1) + p.lower * (pair[0] * q2 + pair[1] * q3);
      };
      write_pixel_losses(
          task, cell, p, pixel + i * task.packed.x.out,
          [&](int k) { return bilinear(k, cell.peak[0], cell.peak[1], cell.peak[2], cell.peak[3]); },
          [&](int k) {
            const int32_t c = p.label[k];
            return bilinear(k, cell.corner[0][c], cell.corner[1][c], cell.corner[2][c], cell.corner[3][c]);
          });
    }
  }
  if (task.rows) gradient_tile<N>(lanes, row, use, last + 1, ws);
}

// Calls f with the number of pixels that the geometric series of a chunk of n is unrolled for.
template <class F>
DEPICT_INLINE void with_pixels(int n, const F& f) {
  if (n <= 4) return f(Pixels<4>());
  if (n <= 8) return f(Pixels<8>());
  if constexpr (DEPICT_PIXELS > 8) {
    if (n <= 12) return f(Pixels<12>());
    return f(Pixels<16>());
  }
}

template <class T>
void tile(const CrossEntropyTask<T>& task, Cell<T>& cell, PixelRow<T>* row, int rows, bool along_y, int64_t pixel,
          Workspace<T>& ws) {
  if constexpr (sizeof(T) == 4)
    if (!cell.careful)
      return with_pixels(cell.n, [&](auto pixels) { fast_tile<pixels.count>(task, cell, row, rows, along_y, pixel, ws); });
  for (int i = 0; i < rows; ++i)
    if (row[i].live) careful_row<T>(task, cell, row[i], pixel + i * task.packed.x.out, ws);
}

// Moves what a block of rows summed into the cell row's gradient and the loss.
template <class T>
void finish_block(const CrossEntropyTask<T>& task, Cell<T>& cell, int64_t touched, T* const* target,
                  Workspace<T>& ws, double& loss) {
  constexpr int L = Simd<T>::lanes;
  const int64_t lanes = task.packed.lanes;
  Corners label_logits{};
  const bool want_logits = task.want_loss && !cell.careful;  // careful rows have counted them
  for (int64_t i = 0; i < touched; ++i) {
    const int32_t label = ws.touched[i];
    const Corners hits = ws.hits[label];
    if (want_logits) {
      const Corners logits{static_cast<double>(cell.corner[0][label]), static_cast<double>(cell.corner[1][label]),
                           static_cast<double>(cell.corner[2][label]), static_cast<double>(cell.corner[3][label])};
      label_logits += hits == 0.0 ? Corners{} : hits * logits;  // 0 times an infinite logit is none
    }
    if (task.rows)
      for (int q = 0; q < 4; ++q) ws.sum[q][label] -= static_cast<T>(hits[q]);
    ws.hits[label] = Corners{};
    ws.met[label] = 0;
  }
  loss -= (label_logits[0] + label_logits[1]) + (label_logits[2] + label_logits[3]);
  if (task.want_loss) {
    double base[4] = {};  // the shift, which the logarithms left out, at the samples
    for (int k = 0; k < kMaxPixels; ++k) {
      const double* pair = task.pixel.pair + 2 * (cell.x + k);
      base[0] += ws.upper[k] * pair[0], base[1] += ws.upper[k] * pair[1];
      base[2] += ws.lower[k] * pair[0], base[3] += ws.lower[k] * pair[1];
      ws.upper[k] = ws.lower[k] = 0;
    }
    for (int q = 0; q < 4; ++q) {
      if (base[q] != 0) loss += base[q] * cell.peak[q];
      if (cell.smooth_sum[q] != 0) loss -= task.smoothing * cell.smooth_sum[q] * cell.smooth[q];
    }
  }
  if (!task.rows) return;
  for (int q = 0; q < 4; ++q) {
    if (task.smoothing != 0)
      for (int64_t c = 0; c < task.packed.classes; ++c)
        ws.sum[q][c] -= static_cast<T>(task.smoothing * (task.weight ? task.weight[c] : 1.0) * cell.smooth_sum[q]);
    for (int64_t c = 0; c < lanes; c += L) {
      store<T>(target[q] + c, load<T>(target[q] + c) + load<T>(ws.sum[q] + c));
      store<T>(ws.sum[q] + c, Vec<T>{});
    }
  }
}

template <class T>
void cross_entropy_cell_row(const CrossEntropyTask<T>& task, int64_t index, void* scratch,
                            CrossEntropyPartial& partial) {
  const Packed<T>& p = task.packed;
  const int64_t w = p.x.in, lanes = p.lanes;
  const int64_t b = index / (p.y.in + 1), i = index % (p.y.in + 1) - 1;
  const int64_t y0 = p.y.begin(i), y1 = p.y.begin(i + 1);
  T* rows = task.rows ? task.rows + index * 2 * w * lanes : nullptr;
  if (rows) __builtin_memset(rows, 0, static_cast<size_t>(2 * w * lanes) * sizeof(T));
  if (y0 == y1) return;

  Workspace<T> ws = carve(task, scratch);
  double loss = 0;
  const int64_t upper = (b * p.y.in + p.y.lower(i)) * w, lower = (b * p.y.in + p.y.upper(i)) * w;
  const float step_y = static_cast<float>(p.y.step(i));
  PixelRow<T> row[kTileRows];
  for (int64_t j = -1; j < w; ++j) {
    const int64_t x0 = p.x.begin(j), pixels = p.x.begin(j + 1) - x0;
    if (pixels == 0) continue;
    const int64_t chunks = (pixels + DEPICT_PIXELS - 1) / DEPICT_PIXELS;
    const int64_t at[4] = {upper + p.x.lower(j), upper + p.x.upper(j), lower + p.x.lower(j), lower + p.x.upper(j)};
    T* target[4] = {};
    Cell<T> cell;
    for (int q = 0; q < 4; ++q) {
      cell.corner[q] = p.logits + at[q] * lanes;
      cell.peak[q] = static_cast<double>(p.peak[at[q]]);
      cell.smooth[q] = p.smooth ? p.smooth[at[q]] : 0;
      if (rows) target[q] = rows + ((q / 2) * w + (q % 2 ? p.x.upper(j) : p.x.lower(j))) * lanes;
    }
    cell.cell_x = j;
    cell.cell_y = i;
    cell.step_x = p.x.step(j);
    cell.careful = true;
    // Two pixels in a row are cheaper directly.
    if constexpr (sizeof(T) == 4)
      if (pixels > 2 * chunks) shift_cell(lanes, cell, ws);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      cell.x = x0 + pixels * chunk / chunks;
      cell.n = static_cast<int>(x0 + pixels * (chunk + 1) / chunks - cell.x);
      cell.t_x = p.x.weight(j, cell.x);
      bool along_y = y1 - y0 > 2;
      if constexpr (sizeof(T) == 4)
        if (!cell.careful && along_y)
          with_pixels(cell.n, [&](auto pixels) { along_y = row_ratios<pixels.count>(lanes, cell, step_y, ws); });
      for (int64_t block = y0; block < y1; block += kBlockRows) {
        const int64_t block_end = block + kBlockRows < y1 ? block + kBlockRows : y1;
        cell.smooth_sum = Corners{};
        int64_t touched = 0;
        for (int64_t y = block; y < block_end; y += kTileRows) {
          const int count = static_cast<int>(y + kTileRows < block_end ? kTileRows : block_end - y);
          for (int k = 0; k < count; ++k) read_row(task, cell, b, y + k, row[k], partial);
          const int64_t pixel = (b * p.y.out + y) * p.x.out + cell.x;
          tile<T>(task, cell, row, count, along_y, pixel, ws);
          for (int k = 0; k < count; ++k) {
            if (row[k].live)
              scatter_row(row[k], cell.n, task.pixel.pair + 2 * cell.x, ws, touched);
            else if (task.pixel_loss)
              for (int x = 0; x < cell.n; ++x) task.pixel_loss[pixel + k * p.x.out + x] = 0;
          }
        }
        finish_block(task, cell, touched, target, ws, loss);
      }
    }
  }
  for (const double value : ws.log_sum) loss += value;
  partial.loss += loss;
}

}  // namespace depict::cpu::DEPICT_ISA
