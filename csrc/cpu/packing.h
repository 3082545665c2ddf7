// Low-resolution logits into class-innermost rows with padded lanes, their gradient back, labels to int32.
#pragma once

namespace depict::cpu::DEPICT_ISA {

// Packs low-resolution row y of image b.
template <class T>
void pack_row(const Packed& packed, const LogitsView<T>& view, const double* weight, int64_t b, int64_t y,
              const PackedRow<T>& to) {
  constexpr int L = Simd<T>::lanes;
  const int64_t w = packed.x.in, lanes = packed.lanes, classes = packed.classes;
  const int64_t stride = view.stride[1], stride_x = view.stride[3];
  const T* from = view.data + b * view.stride[0] + y * view.stride[2];
  for (int64_t c0 = 0; c0 < lanes; c0 += L) {
    for (int64_t x0 = 0; x0 < w; x0 += L) {
      const T* at = from + c0 * stride + x0 * stride_x;
      const int64_t columns = x0 + L < w ? L : w - x0;
      Vec<T> v[L];
      if (columns == L && stride_x == 1) {
        // Every class lies on a page of its own, where no hardware prefetch reaches.
        if (x0 + 2 * L <= w)
          for (int64_t k = 0; k < L && c0 + k < classes; ++k) __builtin_prefetch(at + L + k * stride);
        DEPICT_UNROLL
        for (int k = 0; k < L; ++k)
          v[k] = c0 + k < classes ? load_anywhere<T>(at + k * stride) : splat<T>(kPadLogit<T>);
      } else {
        alignas(64) T block[L][L] = {};
        for (int64_t k = 0; k < L; ++k)
          for (int64_t x = 0; x < columns; ++x)
            block[k][x] = c0 + k < classes ? at[k * stride + x * stride_x] : kPadLogit<T>;
        for (int k = 0; k < L; ++k) v[k] = load<T>(block[k]);
      }
      // Skips NaN, which the sweep meets again.
      Vec<T> best = c0 > 0 ? load_anywhere<T>(to.peak + x0) : splat<T>(-__builtin_inf());
      DEPICT_UNROLL
      for (int k = 0; k < L; ++k) best = Max::of(best, v[k]);
      store_anywhere<T>(to.peak + x0, best);
      transpose<T>(v);
      T* pixel = to.logits + x0 * lanes + c0;
      DEPICT_UNROLL
      for (int k = 0; k < L; ++k)
        if (k < columns) store<T>(pixel + k * lanes, v[k]);
    }
  }
  if (!to.smooth) return;
  for (int64_t x = 0; x < w; ++x) {
    double sum = 0;
    const double peak = static_cast<double>(to.peak[x]);
    for (int64_t c = 0; c < classes; ++c)
      sum += (weight ? weight[c] : 1.0) * (static_cast<double>(to.logits[x * lanes + c]) - peak);
    to.smooth[x] = sum;
  }
}

// Writes (read(0), ..., read(w * lanes - 1)), classes innermost, to a row of (classes, h, w). `read` returns
// the vector at a position.
template <class T, class Read>
DEPICT_INLINE void unpack_row(const Packed& packed, const Read& read, T* out) {
  constexpr int L = Simd<T>::lanes;
  const int64_t w = packed.x.in, lanes = packed.lanes, stride = packed.y.in * w;
  for (int64_t c0 = 0; c0 < packed.classes; c0 += L) {
    const int64_t classes = c0 + L < packed.classes ? L : packed.classes - c0;
    for (int64_t x0 = 0; x0 < w; x0 += L) {
      const int64_t columns = x0 + L < w ? L : w - x0;
      T* to = out + c0 * stride + x0;
      Vec<T> v[L];
      DEPICT_UNROLL
      for (int k = 0; k < L; ++k) v[k] = read((x0 + (k < columns ? k : 0)) * lanes + c0);
      transpose<T>(v);
      if (columns == L) {
        DEPICT_UNROLL
        for (int k = 0; k < L; ++k)
          if (k < classes) store_anywhere<T>(to + k * stride, v[k]);
      } else {
        for (int64_t k = 0; k < classes; ++k) {
          alignas(64) T row[L];
          store<T>(row, v[k]);
          for (int64_t x = 0; x < columns; ++x) to[k * stride + x] = row[x];
        }
      }
    }
  }
}

// Adds what two bands found at their border, in a fixed order whichever thread computed it.
template <class T>
void gather_border(const CrossEntropyTask<T>& task, int64_t index) {
  const Packed& p = task.packed;
  const int64_t b = index / (task.bands - 1), y = (index % (task.bands - 1) + 1) * task.band - 1;
  const T* above = task.edges + index * 2 * p.x.in * p.lanes;
  const T* own = above + p.x.in * p.lanes;
  unpack_row<T>(
      p, [&](int64_t at) { return load<T>(own + at) + load<T>(above + at); },
      task.gradient + (b * p.classes * p.y.in + y) * p.x.in);
}

template <class T>
void scale(T* values, int64_t count, T factor) {
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
}

template <class I>
int64_t load_labels(const void* row, int64_t stride, int64_t n, int64_t classes, int64_t ignore,
                    int32_t* labels) {
  const I* from = static_cast<const I*>(row);
  const auto is_ignored = [&](I raw) {  // an unsigned 2^64 - 100 is not -100
    return static_cast<int64_t>(raw) == ignore && (static_cast<int64_t>(raw) < 0) == (raw < I(0));
  };
  bool bad = false;
  for (int64_t x = 0; x < n; ++x) {
    const I raw = from[x * stride];
    const bool inside = static_cast<uint64_t>(static_cast<int64_t>(raw)) < static_cast<uint64_t>(classes);
    const bool ignored = is_ignored(raw);
    labels[x] = inside && !ignored ? static_cast<int32_t>(raw) : -1;
    bad |= !inside && !ignored;
  }
  if (!bad) return -1;
  for (int64_t x = 0;; ++x)
    if (labels[x] < 0 && !is_ignored(from[x * stride])) return x;
}

inline LoadLabels label_loader(IntType type) {
  switch (type) {
    case IntType::u8: return load_labels<uint8_t>;
    case IntType::i8: return load_labels<int8_t>;
    case IntType::u16: return load_labels<uint16_t>;
    case IntType::i16: return load_labels<int16_t>;
    case IntType::u32: return load_labels<uint32_t>;
    case IntType::i32: return load_labels<int32_t>;
    case IntType::u64: return load_labels<uint64_t>;
    case IntType::i64: return load_labels<int64_t>;
  }
  return nullptr;
}

}  // namespace depict::cpu::DEPICT_ISA
