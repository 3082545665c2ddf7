// The direct path: cells whose classes span more than a geometric series in float can hold, cells of one or
// two pixels a row, and all of float64.
#pragma once

namespace depict::cpu::DEPICT_ISA {

// Every pixel's own maximum and one exponential per pixel and class. Interpolates in double: sharp logits
// lose more to rounding there than in all that follows. Sums in double: beside the largest term, which is 1,
// float would drop what small losses consist of.
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
  const auto interpolate = [&](int64_t c, IVec<double> padded) {
    const auto sample = [&](int q) { return load_wide(cell.corner[q] + c) - cell.peak[q]; };
    const Vec<double> a = sample(0) * row.upper + sample(2) * row.lower;
    const Vec<double> b = sample(1) * row.upper + sample(3) * row.lower;
    DEPICT_UNROLL
    for (int k = 0; k < N; ++k) {
      const Vec<double> logit = padded ? splat<double>(-__builtin_inf()) : a * left[k] + b * right[k];
      store<double>(ws.logit + k * lanes + c, logit);
      best[k] = Max::of(best[k], logit);
    }
  };
  int64_t c = 0;
  for (; c + Simd<double>::lanes <= task.packed.classes; c += Simd<double>::lanes)
    interpolate(c, IVec<double>{});
  for (; c < lanes; c += Simd<double>::lanes) {
    IVec<double> padded{};
    for (int i = 0; i < Simd<double>::lanes; ++i) padded[i] = c + i < task.packed.classes ? 0 : -1;
    interpolate(c, padded);
  }
  reduce_lanes<double, Max, N>(best, peak);
  if (cell.near_padding)
    for (int k = 0; k < N; ++k)
      for (int64_t c = task.packed.classes; c < lanes; ++c) ws.logit[k * lanes + c] = -__builtin_inf();

  for (int k = 0; k < N; ++k)
    for (int64_t c = 0; c < lanes; c += Simd<double>::lanes)
      store_narrow(ws.exponential + k * lanes + c,
                   at_least(load<double>(ws.logit + k * lanes + c) - peak[k], splat<double>(exp_floor<T>())));
  Vec<double> total[N];
  DEPICT_UNROLL
  for (int k = 0; k < N; ++k) total[k] = Vec<double>{};
  for (int64_t c = 0; c < lanes; c += Simd<T>::lanes) {
    DEPICT_UNROLL
    for (int k = 0; k < N; ++k) {
      T* at = ws.exponential + k * lanes + c;
      const Vec<T> e = vexp(load<T>(at));
      store<T>(at, e);
      DEPICT_UNROLL
      for (int i = 0; i < Simd<T>::lanes; i += Simd<double>::lanes) total[k] += load_wide(at + i);
    }
  }
  reduce_lanes<double, Add, N>(total, row.z);
  const auto label_logit = [&](int k) { return ws.logit[k * lanes + row.label[k]]; };

  for (int k = 0; k < N; ++k) {
    const T u = row.scale[k] != 0 ? static_cast<T>(row.scale[k]) / static_cast<T>(row.z[k]) : T(0);
    row.u_left[k] = u * static_cast<T>(left[k]);
    row.u_right[k] = u * static_cast<T>(right[k]);
  }
  if (task.want_loss) {
    for (int k = 0; k < cell.n; ++k)
      if (row.label[k] >= 0) {
        double rest = row.scale[k] * peak[k];
        if (cell.careful)  // peak - label first: between samples masked in different classes both are huge
          rest = row.hit[k] * (peak[k] - label_logit(k)) + (row.scale[k] - row.hit[k]) * peak[k];
        ws.log_sum[k] += row.scale[k] * pixel_log<T>(row.z[k]) + rest;
      }
  }
  if (task.pixel_loss)
    write_pixel_losses(task, cell, row, pixel, [&](int k) { return peak[k]; }, label_logit);
  if (task.gradient) {
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

}  // namespace depict::cpu::DEPICT_ISA
