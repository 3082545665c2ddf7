// Low-resolution logits into class-innermost rows with padded lanes, their gradient back, labels to int32.
#pragma once

namespace depict::cpu::DEPICT_ISA {

template <class T>
void pack_row(const Packed<T>& packed, const LogitsView<T>& view, const double* weight, int64_t task) {
  constexpr int L = Simd<T>::lanes;
  const int64_t h = packed.y.in, w = packed.x.in, lanes = packed.lanes;
  const T* from = view.data + task / h * view.stride[0] + task % h * view.stride[2];
  T* to = packed.logits + task * w * lanes;
  constexpr int64_t kBlock = 128;  // the cache lines being written stay in the first-level cache
  constexpr int64_t kAhead = 8, kLine = 64 / sizeof(T);
  for (int64_t x0 = 0; x0 < w; x0 += kBlock) {
    const int64_t x1 = x0 + kBlock < w ? x0 + kBlock : w;
    for (int64_t c = 0; c < packed.classes; ++c) {
      // Every class lies on a page of its own, where no hardware prefetch reaches.
      if (c + kAhead < packed.classes)
        for (int64_t x = x0; x < x1; x += kLine)
          __builtin_prefetch(from + (c + kAhead) * view.stride[1] + x * view.stride[3]);
      for (int64_t x = x0; x < x1; ++x) to[x * lanes + c] = from[c * view.stride[1] + x * view.stride[3]];
    }
    for (int64_t x = x0; x < x1; ++x) {
      T* pixel = to + x * lanes;
      for (int64_t c = packed.classes; c < lanes; ++c) pixel[c] = kPadLogit<T>;
      Vec<T> best[1] = {splat<T>(-__builtin_inf())};  // skips NaN, which the sweep meets again
      for (int64_t c = 0; c < lanes; c += L) best[0] = Max::of(best[0], load<T>(pixel + c));
      alignas(64) T peak[L];
      reduce_lanes<T, Max, 1>(best, peak);
      packed.peak[task * w + x] = peak[0];
      if (packed.smooth) {
        double sum = 0;
        for (int64_t c = 0; c < packed.classes; ++c)
          sum += (weight ? weight[c] : 1.0) * static_cast<double>(pixel[c]);
        packed.smooth[task * w + x] = sum;
      }
    }
  }
}

// Adds what the two cell rows beside a low-resolution row found. The order is fixed, whichever thread
// computed it.
template <class T>
void gather_row(const CrossEntropyTask<T>& task, int64_t index, T scale, T* gradient) {
  constexpr int L = Simd<T>::lanes;
  constexpr int64_t kBlock = 128;
  const Packed<T>& p = task.packed;
  const int64_t h = p.y.in, w = p.x.in, lanes = p.lanes, row = w * lanes;
  const int64_t b = index / h, y = index % h;
  const T* cells = task.rows + b * (h + 1) * 2 * row;  // cell row i is stored at i + 1
  const T* own = cells + (y + 1) * 2 * row;
  const T* above = cells + y * 2 * row + (y > 0 ? row : 0);  // of the border cell row: its upper samples
  T* out = gradient + (b * p.classes * h + y) * w;
  alignas(64) T block[kBlock][L];
  for (int64_t x0 = 0; x0 < w; x0 += kBlock) {
    const int64_t n = x0 + kBlock < w ? kBlock : w - x0;
    for (int64_t c0 = 0; c0 < p.classes; c0 += L) {
      for (int64_t x = 0; x < n; ++x) {
        const int64_t at = (x0 + x) * lanes + c0;
        store<T>(block[x], (load<T>(own + at) + load<T>(above + at)) * scale);
      }
      const int64_t classes = c0 + L < p.classes ? L : p.classes - c0;
      for (int64_t c = 0; c < classes; ++c)
        for (int64_t x = 0; x < n; ++x) out[(c0 + c) * h * w + x0 + x] = block[x][c];
    }
  }
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
