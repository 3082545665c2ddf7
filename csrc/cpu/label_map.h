// Argmax over classes of bilinearly upsampled logits, without the upsampled logits.
//
// In a cell, class c can be the maximum somewhere only if the largest of its four samples reaches the
// largest, over classes, of the smallest of their four: trained masks leave one to three candidates of 150.
// Those are evaluated for all pixels of the cell (lanes are pixels), in class order, so that ties go to the
// lowest class as in torch.argmax.
#pragma once

namespace depict::cpu::DEPICT_ISA {

constexpr int kTilePixels = 256;

template <class T>
struct LabelWorkspace {
  T* high;             // [lanes] largest sample of the cell by class
  int32_t* candidate;  // [classes + 16]
  T *tx, *ty, *txy;    // [kTilePixels] weights of the tile's pixels
  int32_t* label;      // [kTilePixels]
  int32_t* target;     // [kTilePixels]
};

template <class T>
int64_t label_scratch(const LabelTask<T>& task) {
  return task.packed.lanes * static_cast<int64_t>(sizeof(T)) +
         3 * kTilePixels * static_cast<int64_t>(sizeof(T)) +
         (2 * kTilePixels + task.packed.classes + 16) * static_cast<int64_t>(sizeof(int32_t)) + 256;
}

template <class T>
LabelWorkspace<T> carve(const LabelTask<T>& task, void* scratch) {
  LabelWorkspace<T> ws;
  ws.high = static_cast<T*>(scratch);
  ws.tx = ws.high + task.packed.lanes;
  ws.ty = ws.tx + kTilePixels;
  ws.txy = ws.ty + kTilePixels;
  ws.label = reinterpret_cast<int32_t*>(ws.txy + kTilePixels);
  ws.target = ws.label + kTilePixels;
  ws.candidate = ws.target + kTilePixels;
  return ws;
}

// Ascending list of the classes that can be the maximum somewhere in the cell. `margin` covers the rounding
// of the evaluation.
template <class T>
int find_candidates(int64_t lanes, const T* const* corner, T margin, LabelWorkspace<T>& ws) {
  constexpr int L = Simd<T>::lanes;
  typedef int8_t Bytes __attribute__((vector_size(L)));
  Vec<T> floor[1] = {splat<T>(-__builtin_inf())};
  for (int64_t c = 0; c < lanes; c += L) {
    const Vec<T> s0 = load<T>(corner[0] + c), s1 = load<T>(corner[1] + c);
    const Vec<T> s2 = load<T>(corner[2] + c), s3 = load<T>(corner[3] + c);
    store<T>(ws.high + c, Max::of(Max::of(s0, s1), Max::of(s2, s3)));
    floor[0] = Max::of(floor[0], at_most(at_most(s0, s1), at_most(s2, s3)));
  }
  alignas(64) T lowest[L];
  reduce_lanes<T, Max, 1>(floor, lowest);
  const T threshold = lowest[0] - margin;
  int count = 0;
  for (int64_t c = 0; c < lanes; c += L) {
    const Bytes pass = __builtin_convertvector(load<T>(ws.high + c) >= threshold, Bytes);
    for (int half = 0; half < L; half += 8) {
      uint64_t bits = 0;
      __builtin_memcpy(&bits, reinterpret_cast<const char*>(&pass) + half, L < 8 ? L : 8);
      bits &= 0x0101010101010101u;
      while (bits) {
        ws.candidate[count++] = static_cast<int32_t>(c + half + __builtin_ctzll(bits) / 8);
        bits &= bits - 1;
      }
    }
  }
  return count;
}

template <class T>
void evaluate(const T* const* corner, int count, int pixels, LabelWorkspace<T>& ws) {
  constexpr int L = Simd<T>::lanes;
  constexpr int kTogether = 4;  // vectors of pixels in flight
  typedef int32_t Labels __attribute__((vector_size(L * 4), may_alias));
  for (int p = 0; p < pixels; p += kTogether * L) {
    Vec<T> best[kTogether];
    IVec<T> label[kTogether];
    DEPICT_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      best[i] = splat<T>(-__builtin_inf());
      label[i] = IVec<T>{} + ws.candidate[0];
    }
    for (int n = 0; n < count; ++n) {
      const int32_t c = ws.candidate[n];
      const T s = corner[0][c], dx = corner[1][c] - s, dy = corner[2][c] - s;
      const T dxy = (corner[3][c] - corner[2][c]) - dx;
      DEPICT_UNROLL
      for (int i = 0; i < kTogether; ++i) {
        const Vec<T> logit = load<T>(ws.tx + p + i * L) * dx + load<T>(ws.ty + p + i * L) * dy +
                             load<T>(ws.txy + p + i * L) * dxy + s;
        const auto higher = logit > best[i];
        best[i] = higher ? logit : best[i];
        label[i] = higher ? IVec<T>{} + c : label[i];
      }
    }
    DEPICT_UNROLL
    for (int i = 0; i < kTogether; ++i)
      *reinterpret_cast<Labels*>(ws.label + p + i * L) = __builtin_convertvector(label[i], Labels);
  }
}

// Cells with a huge, infinite or NaN sample: torch's formula and order, in which NaN is the maximum.
template <class T>
void evaluate_special(int64_t classes, const T* const* corner, int pixels, LabelWorkspace<T>& ws) {
  for (int p = 0; p < pixels; ++p) {
    const T tx = ws.tx[p], ty = ws.ty[p];
    T best = 0;
    int32_t label = -1;
    for (int64_t c = 0; c < classes && !(label >= 0 && best != best); ++c) {
      const T logit = (1 - ty) * ((1 - tx) * corner[0][c] + tx * corner[1][c]) +
                      ty * ((1 - tx) * corner[2][c] + tx * corner[3][c]);
      if (label < 0 || logit > best || logit != logit) {
        best = logit;
        label = static_cast<int32_t>(c);
      }
    }
    ws.label[p] = label;
  }
}

template <class I>
void write_labels(const int32_t* label, int n, void* out, int64_t at) {
  I* to = static_cast<I*>(out) + at;
  for (int k = 0; k < n; ++k) to[k] = static_cast<I>(label[k]);
}

template <class T>
void label_cell_row(const LabelTask<T>& task, int64_t index, void* scratch, int64_t* confusion,
                    int64_t& bad) {
  const Packed<T>& p = task.packed;
  const int64_t w = p.x.in, lanes = p.lanes;
  const int64_t b = index / (p.y.in + 1), i = index % (p.y.in + 1) - 1;
  const int64_t y0 = p.y.begin(i), y1 = p.y.begin(i + 1);
  if (y0 == y1) return;
  LabelWorkspace<T> ws = carve(task, scratch);
  const int64_t upper = (b * p.y.in + p.y.lower(i)) * w, lower = (b * p.y.in + p.y.upper(i)) * w;
  // Three fused steps on values up to 4 max |logit|; 16 covers them several times.
  const T epsilon = 16 * (sizeof(T) == 4 ? T(5.9604645e-8) : T(1.1102230246251565e-16));
  for (int64_t j = -1; j < w; ++j) {
    const int64_t x0 = p.x.begin(j), x1 = p.x.begin(j + 1);
    if (x0 == x1) continue;
    const int64_t at[4] = {upper + p.x.lower(j), upper + p.x.upper(j), lower + p.x.lower(j),
                           lower + p.x.upper(j)};
    const T* corner[4];
    T magnitude = 0;
    bool tame = true;
    for (int q = 0; q < 4; ++q) {
      corner[q] = p.logits + at[q] * lanes;
      tame &= p.peak[at[q]] <= kHuge<T>;  // not so for NaN
      magnitude = p.peak[at[q]] > magnitude ? p.peak[at[q]] : magnitude;
    }
    const int count = tame ? find_candidates(lanes, corner, epsilon * magnitude, ws) : 0;
    const int64_t wide = x1 - x0 < kMaxPixels ? x1 - x0 : kMaxPixels, tall = kTilePixels / wide;
    for (int64_t x = x0; x < x1; x += wide) {
      const int64_t n = x + wide < x1 ? wide : x1 - x;
      for (int64_t y = y0; y < y1; y += tall) {
        const int64_t rows = y + tall < y1 ? tall : y1 - y;
        const int pixels = static_cast<int>(n * rows);
        if (count == 1) {
          for (int k = 0; k < pixels; ++k) ws.label[k] = ws.candidate[0];
        } else {
          for (int64_t r = 0; r < rows; ++r) {
            const T ty = static_cast<T>(p.y.weight(i, y + r));
            for (int64_t k = 0; k < n; ++k) {
              const T tx = task.pixel.upper[x + k];
              ws.tx[r * n + k] = tx;
              ws.ty[r * n + k] = ty;
              ws.txy[r * n + k] = tx * ty;
            }
          }
          if (tame)
            evaluate(corner, count, pixels, ws);
          else
            evaluate_special(p.classes, corner, pixels, ws);
        }
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t pixel = (b * p.y.out + y + r) * p.x.out + x;
          const int32_t* label = ws.label + r * n;
          if (task.labels) {
            if (task.label_type == IntType::i64) write_labels<int64_t>(label, n, task.labels, pixel);
            if (task.label_type == IntType::i32) write_labels<int32_t>(label, n, task.labels, pixel);
            if (task.label_type == IntType::u8) write_labels<uint8_t>(label, n, task.labels, pixel);
          }
          if (confusion) {
            static constexpr int kSize[] = {1, 1, 2, 2, 4, 4, 8, 8};
            const LabelView& view = *task.target;
            const int64_t first = b * view.stride[0] + (y + r) * view.stride[1] + x * view.stride[2];
            const int64_t wrong = task.load_labels(
                static_cast<const char*>(view.data) + first * kSize[static_cast<int>(view.type)],
                view.stride[2], n, p.classes, task.ignore_index, ws.target);
            if (wrong >= 0 && (bad < 0 || pixel + wrong < bad)) bad = pixel + wrong;
            for (int64_t k = 0; k < n; ++k)
              if (ws.target[k] >= 0) ++confusion[ws.target[k] * p.classes + label[k]];
          }
        }
      }
    }
  }
}

}  // namespace depict::cpu::DEPICT_ISA
