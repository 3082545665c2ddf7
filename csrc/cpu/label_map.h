// Argmax over classes of bilinearly upsampled logits, without the upsampled logits.
//
// In a cell, class c can be the maximum somewhere only if the largest of its four samples reaches the
// largest, over classes, of the smallest of their four: trained masks leave one to three candidates of 150.
// Where more are left the same test is done for every tile of the cell. The rest is evaluated for all pixels
// (lanes are pixels), in class order, so that ties go to the lowest class as in torch.argmax.
#pragma once

namespace depict::cpu::DEPICT_ISA {

constexpr int kTileWidth = 8;
constexpr int kTogether = 4;       // vectors of pixels in flight, a tile
constexpr int kFewCandidates = 6;  // that are not worth another test
constexpr int kMaxTile = kTogether * DEPICT_LANES;
constexpr int kSlack = kLanePadding;  // rows of weights are written kTileWidth wide; keeps vectors aligned

template <class T>
struct TileRows {
  typedef T V __attribute__((vector_size(kTileWidth * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <class T>
using TileRow = typename TileRows<T>::V;

template <class T>
struct LabelWorkspace {
  T* high;             // [lanes] largest sample of the cell by class, later of the tile by candidate
  T* form[4];          // [lanes] bilinear form of a candidate: upper left sample, along x, along y, mixed
  T *tx, *ty, *txy;    // [kMaxTile + kSlack] weights of the tile's pixels
  int32_t* candidate;  // [lanes] classes that can win in the cell, ascending
  int32_t* left;       // [lanes] positions in `candidate` of those that can win in the tile
  int32_t* label;      // [kMaxTile]
  int32_t* target;     // [kTileWidth]
};

template <class T>
int64_t label_scratch(const LabelTask<T>& task) {
  return (task.packed.lanes * 5 + 3 * (kMaxTile + kSlack)) * static_cast<int64_t>(sizeof(T)) +
         (task.packed.lanes * 2 + kMaxTile + kTileWidth) * static_cast<int64_t>(sizeof(int32_t)) + 64;
}

template <class T>
LabelWorkspace<T> carve(const LabelTask<T>& task, void* scratch) {
  LabelWorkspace<T> ws;
  T* p = static_cast<T*>(scratch);
  const auto take = [&p](int64_t count) {
    T* here = p;
    p += count;
    return here;
  };
  ws.high = take(task.packed.lanes);
  for (T*& form : ws.form) form = take(task.packed.lanes);
  ws.tx = take(kMaxTile + kSlack), ws.ty = take(kMaxTile + kSlack), ws.txy = take(kMaxTile + kSlack);
  ws.candidate = reinterpret_cast<int32_t*>(p);
  ws.left = ws.candidate + task.packed.lanes;
  ws.label = ws.left + task.packed.lanes;
  ws.target = ws.label + kMaxTile;
  return ws;
}

// Writes the positions of `high` that reach the threshold, ascending; returns how many.
template <class T>
int positions_at_least(const T* high, int64_t size, T threshold, int32_t* out) {
  constexpr int L = Simd<T>::lanes;
  typedef int8_t Bytes __attribute__((vector_size(L)));
  int count = 0;
  for (int64_t c = 0; c < size; c += L) {
    const Bytes pass = __builtin_convertvector(load<T>(high + c) >= threshold, Bytes);
    for (int half = 0; half < L; half += 8) {
      uint64_t bits = 0;
      __builtin_memcpy(&bits, reinterpret_cast<const char*>(&pass) + half, L < 8 ? L : 8);
      bits &= 0x0101010101010101u;
      while (bits) {
        out[count++] = static_cast<int32_t>(c + half + __builtin_ctzll(bits) / 8);
        bits &= bits - 1;
      }
    }
  }
  return count;
}

// Classes that can be the maximum somewhere in the cell. `margin` covers the rounding of the evaluation.
template <class T>
int find_candidates(int64_t lanes, const T* const* corner, T margin, LabelWorkspace<T>& ws) {
  constexpr int L = Simd<T>::lanes;
  Vec<T> floor[1] = {splat<T>(-__builtin_inf())};
  for (int64_t c = 0; c < lanes; c += L) {
    const Vec<T> s0 = load<T>(corner[0] + c), s1 = load<T>(corner[1] + c);
    const Vec<T> s2 = load<T>(corner[2] + c), s3 = load<T>(corner[3] + c);
    store<T>(ws.high + c, Max::of(Max::of(s0, s1), Max::of(s2, s3)));
    floor[0] = Max::of(floor[0], at_most(at_most(s0, s1), at_most(s2, s3)));
  }
  alignas(64) T lowest[L];
  reduce_lanes<T, Max, 1>(floor, lowest);
  const int count = positions_at_least<T>(ws.high, lanes, lowest[0] - margin, ws.candidate);
  for (int n = 0; n < count; ++n) {
    const int32_t c = ws.candidate[n];
    ws.form[0][n] = corner[0][c];
    ws.form[1][n] = corner[1][c] - corner[0][c];
    ws.form[2][n] = corner[2][c] - corner[0][c];
    ws.form[3][n] = (corner[3][c] - corner[2][c]) - (corner[1][c] - corner[0][c]);
  }
  for (int n = count; n % L; ++n) {
    ws.form[0][n] = -__builtin_inf();
    ws.form[1][n] = ws.form[2][n] = ws.form[3][n] = 0;
  }
  return count;
}

// The candidates that can be the maximum somewhere in [x0, x1] x [y0, y1] of the cell.
template <class T>
int find_in_tile(int count, T x0, T x1, T y0, T y1, T margin, LabelWorkspace<T>& ws) {
  constexpr int L = Simd<T>::lanes;
  if (count <= kFewCandidates) {
    for (int n = 0; n < count; ++n) ws.left[n] = n;
    return count;
  }
  Vec<T> floor[1] = {splat<T>(-__builtin_inf())};
  for (int n = 0; n < count; n += L) {
    const Vec<T> s = load<T>(ws.form[0] + n), dx = load<T>(ws.form[1] + n);
    const Vec<T> dy = load<T>(ws.form[2] + n), dxy = load<T>(ws.form[3] + n);
    const Vec<T> upper = s + dy * y0, upper_dx = dx + dxy * y0;
    const Vec<T> lower = s + dy * y1, lower_dx = dx + dxy * y1;
    const Vec<T> s0 = upper + upper_dx * x0, s1 = upper + upper_dx * x1;
    const Vec<T> s2 = lower + lower_dx * x0, s3 = lower + lower_dx * x1;
    store<T>(ws.high + n, Max::of(Max::of(s0, s1), Max::of(s2, s3)));
    floor[0] = Max::of(floor[0], at_most(at_most(s0, s1), at_most(s2, s3)));
  }
  alignas(64) T lowest[L];
  reduce_lanes<T, Max, 1>(floor, lowest);
  return positions_at_least<T>(ws.high, (count + L - 1) / L * L, lowest[0] - margin, ws.left);
}

// Labels of a tile of up to Vectors * lanes pixels.
template <class T, int Vectors>
void evaluate(int count, LabelWorkspace<T>& ws) {
  constexpr int L = Simd<T>::lanes;
  typedef int32_t Labels __attribute__((vector_size(L * 4), may_alias));
  Vec<T> best[Vectors], tx[Vectors], ty[Vectors], txy[Vectors];
  IVec<T> label[Vectors];
  DEPICT_UNROLL
  for (int i = 0; i < Vectors; ++i) {
    best[i] = splat<T>(-__builtin_inf());
    label[i] = IVec<T>{} + ws.candidate[ws.left[0]];
    tx[i] = load<T>(ws.tx + i * L), ty[i] = load<T>(ws.ty + i * L), txy[i] = load<T>(ws.txy + i * L);
  }
  for (int n = 0; n < count; ++n) {
    const int32_t at = ws.left[n], c = ws.candidate[at];
    const T s = ws.form[0][at], dx = ws.form[1][at], dy = ws.form[2][at], dxy = ws.form[3][at];
    DEPICT_UNROLL
    for (int i = 0; i < Vectors; ++i) {
      const Vec<T> logit = tx[i] * dx + ty[i] * dy + txy[i] * dxy + s;
      const auto higher = logit > best[i];
      best[i] = higher ? logit : best[i];
      label[i] = higher ? IVec<T>{} + c : label[i];
    }
  }
  DEPICT_UNROLL
  for (int i = 0; i < Vectors; ++i)
    *reinterpret_cast<Labels*>(ws.label + i * L) = __builtin_convertvector(label[i], Labels);
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
void write_labels(const int32_t* label, int64_t n, void* out, int64_t at) {
  I* to = static_cast<I*>(out) + at;
  if (n == kTileWidth)  // a constant count is a store or two
    for (int k = 0; k < kTileWidth; ++k) to[k] = static_cast<I>(label[k]);
  else
    for (int64_t k = 0; k < n; ++k) to[k] = static_cast<I>(label[k]);
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
    const T margin = epsilon * magnitude;
    const int count = tame ? find_candidates(lanes, corner, margin, ws) : 0;
    const int64_t columns = (x1 - x0 + kTileWidth - 1) / kTileWidth;
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t x = x0 + (x1 - x0) * column / columns;
      const int64_t n = x0 + (x1 - x0) * (column + 1) / columns - x;
      const int64_t tall = kTogether * Simd<T>::lanes / n;
      for (int64_t y = y0; y < y1; y += tall) {
        const int64_t rows = y + tall < y1 ? tall : y1 - y;
        const int pixels = static_cast<int>(n * rows);
        const T ty0 = static_cast<T>(task.pixel.row[y]), ty1 = static_cast<T>(task.pixel.row[y + rows - 1]);
        const int left =
            find_in_tile<T>(count, task.pixel.upper[x], task.pixel.upper[x + n - 1], ty0, ty1, margin, ws);
        if (left == 1) {
          for (int k = 0; k < kMaxTile; ++k) ws.label[k] = ws.candidate[ws.left[0]];
        } else {
          const TileRow<T> tx = *reinterpret_cast<const TileRow<T>*>(task.pixel.upper + x);
          for (int64_t r = 0; r < rows; ++r) {
            const T ty = static_cast<T>(task.pixel.row[y + r]);
            // What lies beyond n is written over by the next row.
            *reinterpret_cast<TileRow<T>*>(ws.tx + r * n) = tx;
            *reinterpret_cast<TileRow<T>*>(ws.ty + r * n) = TileRow<T>{} + ty;
            *reinterpret_cast<TileRow<T>*>(ws.txy + r * n) = tx * ty;
          }
          if (!tame)
            evaluate_special(p.classes, corner, pixels, ws);
          else if (pixels <= Simd<T>::lanes)
            evaluate<T, 1>(left, ws);
          else if (pixels <= 2 * Simd<T>::lanes)
            evaluate<T, 2>(left, ws);
          else
            evaluate<T, kTogether>(left, ws);
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
