// Low-resolution logits into class-innermost rows with padded lanes, their gradient back, labels to int32.
#pragma once

namespace depict::cpu::DEPICT_ISA {

template <class T>
void pack_row(const Packed<T>& packed, const LogitsView<T>& view, const double* weight, bool magnitude,
              int64_t task) {
  const int64_t h = packed.y.in, w = packed.x.in, lanes = packed.lanes;
  const T* from = view.data + task / h * view.stride[0] + task % h * view.stride[2];
  T* to = packed.logits + task * w * lanes;
  constexpr int64_t kBlock = 32;  // this many packed pixels stay in the first-level cache
  for (int64_t x0 = 0; x0 < w; x0 += kBlock) {
    const int64_t x1 = x0 + kBlock < w ? x0 + kBlock : w;
    for (int64_t c = 0; c < packed.classes; ++c)
      for (int64_t x = x0; x < x1; ++x) to[x * lanes + c] = from[c * view.stride[1] + x * view.stride[3]];
  }
  for (int64_t x = 0; x < w; ++x) {
    T* pixel = to + x * lanes;
    // The maximum skips NaN, the magnitude keeps it: the cross-entropy meets the NaN again, argmax must know.
    T peak = magnitude ? T(0) : -__builtin_inf();
    for (int64_t c = 0; c < packed.classes; ++c) {
      const T value = magnitude ? (pixel[c] < 0 ? -pixel[c] : pixel[c]) : pixel[c];
      if (value > peak || (magnitude && value != value)) peak = value;
    }
    packed.peak[task * w + x] = peak;
    if (packed.smooth) {
      double sum = 0;
      for (int64_t c = 0; c < packed.classes; ++c)
        sum += (weight ? weight[c] : 1.0) * static_cast<double>(pixel[c]);
      packed.smooth[task * w + x] = sum;
    }
    for (int64_t c = packed.classes; c < lanes; ++c) pixel[c] = T(kPadLogit);
  }
}

// The order of the (at most four) summands is fixed, whichever thread computed them.
template <class T>
void gather_row(const CrossEntropyTask<T>& task, int64_t index, T scale, T* gradient) {
  const Packed<T>& p = task.packed;
  const int64_t h = p.y.in, w = p.x.in, lanes = p.lanes, row = w * lanes;
  const int64_t b = index / h, y = index % h;
  const T* cells = task.rows + b * (h + 1) * 2 * row;  // cell row i is stored at i + 1
  const T* own = cells + (y + 1) * 2 * row;
  const T* above = cells + y * 2 * row + (y > 0 ? row : 0);  // of the border cell row: its upper samples
  for (int64_t c = 0; c < p.classes; ++c) {
    T* out = gradient + ((b * p.classes + c) * h + y) * w;
    for (int64_t x = 0; x < w; ++x) out[x] = (own[x * lanes + c] + above[x * lanes + c]) * scale;
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
