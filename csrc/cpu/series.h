// The fast path: along a pixel row of a cell the exponential of a class is a geometric series, and its terms
// are geometric from row to row.
#pragma once

namespace depict::cpu::DEPICT_ISA {

// Shifted logits of the cell as a bilinear form; decides whether the geometric series holds them.
void shift_cell(int64_t lanes, Cell<float>& cell, Workspace<float>& ws) {
  constexpr int L = Simd<float>::lanes;
  IVec<float> wide{}, steep{}, sole = IVec<float>{} - 1;
  for (int64_t c = 0; c < lanes; c += L) {
    Vec<float> s[4];
    DEPICT_UNROLL
    for (int q = 0; q < 4; ++q) s[q] = load<float>(cell.corner[q] + c) - static_cast<float>(cell.peak[q]);
    const Vec<float> low = at_most(at_most(s[0], s[1]), at_most(s[2], s[3]));
    const Vec<float> high = Max::of(Max::of(s[0], s[1]), Max::of(s[2], s[3]));
    // Comparisons with NaN are false: a NaN in any sample makes the cell careful.
    const IVec<float> number = (s[0] == s[0]) & (s[1] == s[1]) & (s[2] == s[2]) & (s[3] == s[3]);
    wide |= ~(number & ((low >= kFloor) | (high <= kNegligible)));
    steep |= (high - low > kSteep) & (high > kNegligible);
    sole = low == 0.0f ? IVec<float>{} + static_cast<int32_t>(c) : sole;
    DEPICT_UNROLL
    for (int q = 0; q < 4; ++q) s[q] = at_least(s[q], splat<float>(kFloor));
    store<float>(ws.s + c, s[0]);
    store<float>(ws.dx + c, s[1] - s[0]);
    store<float>(ws.dy + c, s[2] - s[0]);
    store<float>(ws.dxy + c, (s[3] - s[2]) - (s[1] - s[0]));
  }
  int32_t any = 0;
  cell.sole = -1;
  cell.steep = false;
  store<float>(ws.start, Vec<float>{});
  for (int i = 0; i < L; ++i) {
    any |= wide[i];
    cell.steep |= steep[i] != 0;
    if (sole[i] >= 0) cell.sole = sole[i] + i;
  }
  if (cell.sole >= 0) ws.start[cell.sole % L] = -1.0f;
  // Where a sample's every class is huge the padded lanes are no longer far below.
  for (int q = 0; q < 4; ++q) any |= !(cell.peak[q] > -kHuge<float>);
  cell.careful = any != 0;
}

// An exponent that was computed in double, as a float and what that leaves.
struct Exponent {
  alignas(64) float high[Simd<float>::lanes];
  alignas(64) float low[Simd<float>::lanes];

  DEPICT_INLINE void set(int at, Vec<double> x) {
    store_narrow(high + at, x);
    store_narrow(low + at, x - load_wide(high + at));
  }
  DEPICT_INLINE Vec<float> exp(float sign = 1.0f) const {
    const Vec<float> e = vexp(load<float>(high) * sign);
    return e * (load<float>(low) * sign) + e;
  }
};

// The next row's ratio from the last row's and its relative change.
DEPICT_INLINE Vec<float> advance(float* to, int64_t lanes, const float* change) {
  const Vec<float> before = load<float>(to - lanes);
  const Vec<float> now = before * load<float>(change) + before;
  store<float>(to, now);
  return now;
}

// Sums of exponentials of one row, outwards from its middle pixel, which halves the error of r^k; Advance
// first steps the series on from the previous row. A class whose term is 1 throughout is cancelled at once,
// by ws.start, and added in double at the end: next to it the others would be rounded away.
template <int N, bool Advance>
void sum_row(int64_t lanes, int64_t i, int64_t sole, Workspace<float>& ws, double* z) {
  constexpr int L = Simd<float>::lanes;
  float *e = ws.e + i * lanes, *r = ws.r + i * lanes, *q = ws.q + i * lanes;
  Vec<float> total[N];
  DEPICT_UNROLL
  for (int k = 0; k < N; ++k) total[k] = load<float>(ws.start);
  const int64_t first = sole < 0 ? 0 : sole / L * L;
  int64_t c = first;
  do {
    const Vec<float> middle =
        Advance ? load<float>(e - lanes + c) * load<float>(ws.row_e + c) : load<float>(e + c);
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
    c = c + L < lanes ? c + L : 0;
  } while (c != first);
  sum_lanes_wide<N>(total, z);
  if (sole >= 0)
    for (int k = 0; k < N; ++k) z[k] += 1.0;
}

// Sums the gradient of `rows` rows into the cell's four samples.
template <int N>
void gradient_tile(int64_t lanes, const PixelRow<float>* row, const bool* use, int rows,
                   Workspace<float>& ws) {
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

// Logarithms of the sums of exponentials of `rows` rows, all at once, since a row of few pixels does not fill
// a vector.
template <int N>
void loss_tile(const PixelRow<float>* row, const bool* use, int rows, Workspace<float>& ws) {
  alignas(64) double z[kTileRows * N];
  for (int i = 0; i < kTileRows; ++i)
    for (int k = 0; k < N; ++k) z[i * N + k] = i < rows && use[i] ? row[i].z[k] : 1.0;
  for (int k = 0; k < kTileRows * N; ++k) z[k] = pixel_log<float>(z[k]);
  for (int i = 0; i < rows; ++i) {
    if (!use[i]) continue;
    for (int k = 0; k < N; ++k) ws.log_sum[k] += row[i].scale[k] * z[i * N + k];
  }
}

template <int N>
struct Pixels {
  static constexpr int count = N;
};

// How a row follows from the one before. The error of r is raised to the power k, so r and q move by exp - 1,
// which is small and so is its error; returns whether it is small enough for that in every class.
template <int N>
bool row_ratios(int64_t lanes, const Cell<float>& cell, double step_y, Workspace<float>& ws) {
  constexpr int L = Simd<float>::lanes;
  const double wide_t = cell.t_x + N / 2 * cell.step_x;
  const float t = static_cast<float>(wide_t);
  const float step = static_cast<float>(cell.step_x * step_y), narrow_step_y = static_cast<float>(step_y);
  IVec<float> large{};
  for (int64_t c = 0; c < lanes; c += L) {
    const Vec<float> mixed = load<float>(ws.dxy + c), change = mixed * step;
    large |= (change > 1.0f) | (change < -1.0f);
    if (cell.steep) {
      Exponent x;
      for (int i = 0; i < L; i += Simd<double>::lanes)
        x.set(i, (load_wide(ws.dy + c + i) + load_wide(ws.dxy + c + i) * wide_t) * step_y);
      store<float>(ws.row_e + c, x.exp());
    } else {
      store<float>(ws.row_e + c, vexp((load<float>(ws.dy + c) + mixed * t) * narrow_step_y));
    }
    store<float>(ws.row_r + c, vexpm1(change));
    store<float>(ws.row_q + c, vexpm1(-change));
  }
  int32_t any = 0;
  for (int i = 0; i < L; ++i) any |= large[i];
  return any == 0;
}

// Up to kTileRows rows with geometric series; `along_y` says that row ratios are at hand.
template <int N>
void fast_tile(const CrossEntropyTask<float>& task, Cell<float>& cell, PixelRow<float>* row, int rows,
               bool along_y, int64_t pixel, Workspace<float>& ws) {
  constexpr int L = Simd<float>::lanes;
  const int64_t lanes = task.packed.lanes;
  const double wide_t = cell.t_x + N / 2 * cell.step_x;
  const float t = static_cast<float>(wide_t), step = static_cast<float>(cell.step_x);
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
    if (cell.steep && (i == 0 || !along_y)) {
      for (int64_t c = 0; c < lanes; c += L) {
        Exponent e, r;
        for (int k = 0; k < L; k += Simd<double>::lanes) {
          const int64_t at = c + k;
          const Vec<double> slope = load_wide(ws.dx + at) + load_wide(ws.dxy + at) * row[i].lower;
          e.set(k, load_wide(ws.s + at) + load_wide(ws.dy + at) * row[i].lower + slope * wide_t);
          r.set(k, slope * cell.step_x);
        }
        store<float>(ws.e + i * lanes + c, e.exp());
        store<float>(ws.r + i * lanes + c, r.exp());
        store<float>(ws.q + i * lanes + c, r.exp(-1.0f));
      }
      sum_row<N, false>(lanes, i, cell.sole, ws, row[i].z);
    } else if (i == 0 || !along_y) {
      const float y = row[i].w_lower;
      for (int64_t c = 0; c < lanes; c += L) {
        const Vec<float> slope = load<float>(ws.dx + c) + load<float>(ws.dxy + c) * y;
        store<float>(ws.e + i * lanes + c,
                     vexp(load<float>(ws.s + c) + load<float>(ws.dy + c) * y + slope * t));
        store<float>(ws.r + i * lanes + c, vexp(slope * step));
        store<float>(ws.q + i * lanes + c, vexp(slope * -step));
      }
      sum_row<N, false>(lanes, i, cell.sole, ws, row[i].z);
    } else {
      sum_row<N, true>(lanes, i, cell.sole, ws, row[i].z);
    }
    if (!use[i]) continue;
    for (int k = cell.n; k < N; ++k) row[i].z[k] = 1.0;
    int small = 0;
    for (int k = 0; k < N; ++k) small |= row[i].z[k] < kSmallSum;
    if (small) {
      careful_row<float>(task, cell, row[i], pixel + i * task.packed.x.out, ws);
      use[i] = false;
      continue;
    }
    for (int k = 0; k < N; ++k) {
      const float u = static_cast<float>(row[i].scale[k]) / static_cast<float>(row[i].z[k]);
      row[i].u_left[k] = u * left[k];
      row[i].u_right[k] = u * right[k];
    }
    if (task.pixel_loss) {
      const PixelRow<float>& p = row[i];
      const auto label_logit = [&](int k) {
        const double* pair = task.pixel.pair + 2 * (cell.x + k);
        const int32_t c = p.label[k];
        return p.upper * (pair[0] * cell.logit(0, c) + pair[1] * cell.logit(1, c)) +
               p.lower * (pair[0] * cell.logit(2, c) + pair[1] * cell.logit(3, c));
      };
      write_pixel_losses(task, cell, p, pixel + i * task.packed.x.out, [](int) { return 0.0; }, label_logit);
    }
  }
  if (task.want_loss) loss_tile<N>(row, use, last + 1, ws);
  if (task.gradient) gradient_tile<N>(lanes, row, use, last + 1, ws);
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

}  // namespace depict::cpu::DEPICT_ISA
