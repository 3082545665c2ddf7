// Argmax over classes of bilinearly upsampled logits, without the upsampled logits.
//
// In a cell, class c can be the maximum somewhere only if the largest of its four samples reaches the
// largest, over classes, of the smallest of their four: trained masks leave one to three candidates of 150.
// That test has a vector of neighbouring cells as its lanes and reads the logits where they are. Where more
// are left the same test is done for every tile of the cell. The rest is evaluated for all pixels (lanes are
// pixels), in class order, so that ties go to the lowest class as in torch.argmax. Labels gather in a strip
// of rows, which then goes to the label map or the confusion matrix in long pieces.
#pragma once

namespace depict::cpu::DEPICT_ISA {

constexpr int kTileWidth = 8;
constexpr int kTogether = 4;       // vectors of pixels in flight, a tile
constexpr int kFewCandidates = 6;  // that are not worth another test
constexpr int kMaxTile = kTogether * DEPICT_LANES;
constexpr int kStripRows = 16;
constexpr int kSlack = 16;  // rows of weights and labels are written in whole vectors

template <class T>
struct TileRows {
  typedef T V __attribute__((vector_size(kTileWidth * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <class T>
using TileRow = typename TileRows<T>::V;

template <class T>
struct LabelWorkspace {
  T* high;             // [classes][L] largest sample by class, of L cells
  T* narrow;           // [classes][2][2 L] upper and lower samples, of rows that a vector would reach beyond
  T* tile_high;        // [lanes] largest sample of a tile by candidate
  T* form[4];          // [lanes] bilinear form of a candidate: upper left sample, along x, along y, mixed
  T *tx, *ty, *txy;    // [kMaxTile + kSlack] weights of the tile's pixels
  int32_t* candidate;  // [L][classes] classes that can win in a cell, ascending
  int32_t* left;       // [lanes] positions in `candidate` of those that can win in the tile
  int32_t* label;      // [kMaxTile]
  int32_t* strip;      // [kStripRows][pitch] labels of L cells
  int32_t* target;     // [pitch]
  int64_t pitch;
};

template <class T>
int64_t strip_pitch(const LabelTask<T>& task) {  // L cells and half a cell on either side
  const int64_t most = (Simd<T>::lanes + 1) * (task.x.out / task.x.in + 1) + 1;
  return (most < task.x.out ? most : task.x.out) + kSlack;
}

template <class T>
int64_t padded_classes(const LabelTask<T>& task) {
  return (task.logits.classes + kLanePadding - 1) / kLanePadding * kLanePadding;
}

template <class T>
int64_t label_scratch(const LabelTask<T>& task) {
  constexpr int L = Simd<T>::lanes;
  const int64_t lanes = padded_classes(task);
  const int64_t narrow = task.x.in <= L ? 4 * L : 0;
  return (lanes * (L + narrow + 5) + 3 * (kMaxTile + kSlack)) * static_cast<int64_t>(sizeof(T)) +
         (lanes * (L + 1) + kMaxTile + (kStripRows + 1) * strip_pitch(task)) *
             static_cast<int64_t>(sizeof(int32_t)) +
         64;
}

template <class T>
LabelWorkspace<T> carve(const LabelTask<T>& task, void* scratch) {
  constexpr int L = Simd<T>::lanes;
  const int64_t lanes = padded_classes(task);
  LabelWorkspace<T> ws;
  T* p = static_cast<T*>(scratch);
  const auto take = [&p](int64_t count) {
    T* here = p;
    p += count;
    return here;
  };
  ws.high = take(lanes * L), ws.tile_high = take(lanes);
  for (T*& form : ws.form) form = take(lanes);
  ws.tx = take(kMaxTile + kSlack), ws.ty = take(kMaxTile + kSlack), ws.txy = take(kMaxTile + kSlack);
  ws.narrow = take(task.x.in <= L ? lanes * 4 * L : 0);
  ws.label = reinterpret_cast<int32_t*>(p);
  ws.left = ws.label + kMaxTile;
  ws.candidate = ws.left + lanes;
  ws.strip = ws.candidate + lanes * L;
  ws.pitch = strip_pitch(task);
  ws.target = ws.strip + kStripRows * ws.pitch;
  return ws;
}

// Calls f with the number of every lane whose condition holds, ascending.
template <class T, class Condition, class F>
DEPICT_INLINE void each_lane(Condition condition, const F& f) {
  constexpr int L = Simd<T>::lanes;
  typedef int8_t Bytes __attribute__((vector_size(L)));
  const Bytes pass = __builtin_convertvector(condition, Bytes);
  for (int half = 0; half < L; half += 8) {
    uint64_t bits = 0;
    __builtin_memcpy(&bits, reinterpret_cast<const char*>(&pass) + half, L < 8 ? L : 8);
    bits &= 0x0101010101010101u;
    for (; bits; bits &= bits - 1) f(half + __builtin_ctzll(bits) / 8);
  }
}

// Up to a vector of neighbouring cells between two low-resolution rows.
template <class T>
struct CellBlock {
  const T *upper, *lower;              // samples of the first class, from the left one of lane 0
  int64_t stride;                      // from class to class
  alignas(64) T peak[Simd<T>::lanes];  // largest |sample| of a cell; NaN if one is
  int32_t count[Simd<T>::lanes];       // candidates; 0 where a sample is huge, infinite or NaN
};

// Three fused steps on values up to 4 max |logit|; 16 covers them several times.
template <class T>
constexpr T kRounding = 16 * (sizeof(T) == 4 ? T(5.9604645e-8) : T(1.1102230246251565e-16));

// Classes that can be the maximum somewhere in a cell, for the lanes from `first` on. The margin covers the
// rounding of the evaluation.
template <class T>
void find_candidates(int64_t classes, int first, CellBlock<T>& cells, LabelWorkspace<T>& ws) {
  constexpr int L = Simd<T>::lanes;
  constexpr int64_t kAhead = 8;
  Vec<T> floor = splat<T>(-__builtin_inf()), highest = floor, lowest = -floor, poison{};
  for (int64_t c = 0; c < classes; ++c) {
    const T *upper = cells.upper + c * cells.stride, *lower = cells.lower + c * cells.stride;
    // Every class lies on a page of its own, where no hardware prefetch reaches.
    if (c + kAhead < classes) {
      __builtin_prefetch(upper + kAhead * cells.stride);
      __builtin_prefetch(lower + kAhead * cells.stride);
    }
    const Vec<T> s0 = load_anywhere<T>(upper), s1 = load_anywhere<T>(upper + 1);
    const Vec<T> s2 = load_anywhere<T>(lower), s3 = load_anywhere<T>(lower + 1);
    const Vec<T> high = Max::of(Max::of(s0, s1), Max::of(s2, s3));
    const Vec<T> low = at_most(at_most(s0, s1), at_most(s2, s3));
    store<T>(ws.high + c * L, high);
    floor = Max::of(floor, low);
    highest = Max::of(highest, high);
    lowest = at_most(lowest, low);
    poison += ((s0 + s1) + (s2 + s3)) * T(0);  // what overflows here is huge
  }
  const Vec<T> peak = Max::of(highest, -lowest) + poison;
  store<T>(cells.peak, peak);
  IVec<T> lane{};
  for (int i = 0; i < L; ++i) lane[i] = i, cells.count[i] = 0;
  const Vec<T> never = splat<T>(__builtin_nan(""));
  const Vec<T> threshold = ((peak <= kHuge<T>)&(lane >= first)) ? floor - peak * kRounding<T> : never;
  for (int64_t c = 0; c < classes; ++c)
    each_lane<T>(load<T>(ws.high + c * L) >= threshold,
                 [&](int i) { ws.candidate[i * classes + cells.count[i]++] = static_cast<int32_t>(c); });
}

// The bilinear forms of a cell's candidates, padded with classes that never win.
template <class T>
void form_candidates(const int32_t* candidate, int count, const T* const* corner, int64_t stride,
                     LabelWorkspace<T>& ws) {
  for (int n = 0; n < count; ++n) {
    const int64_t at = candidate[n] * stride;
    const T s0 = corner[0][at], s1 = corner[1][at], s2 = corner[2][at], s3 = corner[3][at];
    ws.form[0][n] = s0;
    ws.form[1][n] = s1 - s0;
    ws.form[2][n] = s2 - s0;
    ws.form[3][n] = (s3 - s2) - (s1 - s0);
  }
  for (int n = count; n % Simd<T>::lanes; ++n) {
    ws.form[0][n] = -__builtin_inf();
    ws.form[1][n] = ws.form[2][n] = ws.form[3][n] = 0;
  }
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
    store<T>(ws.tile_high + n, Max::of(Max::of(s0, s1), Max::of(s2, s3)));
    floor[0] = Max::of(floor[0], at_most(at_most(s0, s1), at_most(s2, s3)));
  }
  alignas(64) T lowest[L];
  reduce_lanes<T, Max, 1>(floor, lowest);
  int left = 0;
  for (int n = 0; n < count; n += L)
    each_lane<T>(load<T>(ws.tile_high + n) >= lowest[0] - margin, [&](int i) { ws.left[left++] = n + i; });
  return left;
}

// Labels of a tile of up to Vectors * lanes pixels.
template <class T, int Vectors>
void evaluate(const int32_t* candidate, int count, LabelWorkspace<T>& ws) {
  constexpr int L = Simd<T>::lanes;
  typedef int32_t Labels __attribute__((vector_size(L * 4), may_alias));
  Vec<T> best[Vectors], tx[Vectors], ty[Vectors], txy[Vectors];
  IVec<T> label[Vectors];
  DEPICT_UNROLL
  for (int i = 0; i < Vectors; ++i) {
    best[i] = splat<T>(-__builtin_inf());
    label[i] = IVec<T>{} + candidate[ws.left[0]];
    tx[i] = load<T>(ws.tx + i * L), ty[i] = load<T>(ws.ty + i * L), txy[i] = load<T>(ws.txy + i * L);
  }
  for (int n = 0; n < count; ++n) {
    const int32_t at = ws.left[n], c = candidate[at];
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
void evaluate_special(int64_t classes, const T* const* corner, int64_t stride, int pixels,
                      LabelWorkspace<T>& ws) {
  for (int p = 0; p < pixels; ++p) {
    const T tx = ws.tx[p], ty = ws.ty[p];
    T best = 0;
    int32_t label = -1;
    for (int64_t c = 0; c < classes && !(label >= 0 && best != best); ++c) {
      const int64_t at = c * stride;
      const T logit = (1 - ty) * ((1 - tx) * corner[0][at] + tx * corner[1][at]) +
                      ty * ((1 - tx) * corner[2][at] + tx * corner[3][at]);
      if (label < 0 || logit > best || logit != logit) {
        best = logit;
        label = static_cast<int32_t>(c);
      }
    }
    ws.label[p] = label;
  }
}

// Labels of `rows` rows from y on of a cell's pixels [x0, x1), into the strip. What is written beyond x1
// belongs to the next cell, which is done later, or to the slack.
template <class T>
void label_cell(const LabelTask<T>& task, const CellBlock<T>& cells, int lane, const T* const* corner,
                int64_t x0, int64_t x1, int64_t y, int64_t rows, int32_t* strip, LabelWorkspace<T>& ws) {
  typedef TileRow<int32_t> Labels;
  const int count = cells.count[lane];
  const int32_t* candidate = ws.candidate + lane * task.logits.classes;
  if (count == 1) {
    const Labels label = Labels{} + candidate[0];
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t x = 0; x < x1 - x0; x += kTileWidth)
        *reinterpret_cast<Labels*>(strip + r * ws.pitch + x) = label;
    return;
  }
  const T margin = kRounding<T> * cells.peak[lane];
  form_candidates(candidate, count, corner, cells.stride, ws);
  const int64_t columns = (x1 - x0 + kTileWidth - 1) / kTileWidth;
  for (int64_t column = 0; column < columns; ++column) {
    const int64_t x = x0 + (x1 - x0) * column / columns;
    const int64_t n = x0 + (x1 - x0) * (column + 1) / columns - x;
    const int64_t tall = kTogether * Simd<T>::lanes / n;
    for (int64_t top = 0; top < rows; top += tall) {
      const int64_t tile_rows = top + tall < rows ? tall : rows - top;
      const int pixels = static_cast<int>(n * tile_rows);
      const double* weight = task.pixel.row + y + top;
      const int left =
          find_in_tile<T>(count, task.pixel.upper[x], task.pixel.upper[x + n - 1], static_cast<T>(weight[0]),
                          static_cast<T>(weight[tile_rows - 1]), margin, ws);
      if (left == 1) {
        for (int k = 0; k < kMaxTile; ++k) ws.label[k] = candidate[ws.left[0]];
      } else {
        const TileRow<T> tx = *reinterpret_cast<const TileRow<T>*>(task.pixel.upper + x);
        for (int64_t r = 0; r < tile_rows; ++r) {
          const T ty = static_cast<T>(weight[r]);
          // What lies beyond n is written over by the next row.
          *reinterpret_cast<TileRow<T>*>(ws.tx + r * n) = tx;
          *reinterpret_cast<TileRow<T>*>(ws.ty + r * n) = TileRow<T>{} + ty;
          *reinterpret_cast<TileRow<T>*>(ws.txy + r * n) = tx * ty;
        }
        if (count == 0)
          evaluate_special(task.logits.classes, corner, cells.stride, pixels, ws);
        else if (pixels <= Simd<T>::lanes)
          evaluate<T, 1>(candidate, left, ws);
        else if (pixels <= 2 * Simd<T>::lanes)
          evaluate<T, 2>(candidate, left, ws);
        else
          evaluate<T, kTogether>(candidate, left, ws);
      }
      int32_t* to = strip + top * ws.pitch + x - x0;
      for (int64_t r = 0; r < tile_rows; ++r)
        *reinterpret_cast<Labels*>(to + r * ws.pitch) = *reinterpret_cast<const Labels*>(ws.label + r * n);
    }
  }
}

template <class I>
void write_labels(const int32_t* label, int64_t n, void* out, int64_t at) {
  I* to = static_cast<I*>(out) + at;
  for (int64_t k = 0; k < n; ++k) to[k] = static_cast<I>(label[k]);
}

// The n labels from `pixel` (linear index) on, which lie in row y from x on.
template <class T>
void use_labels(const LabelTask<T>& task, const int32_t* label, int64_t n, int64_t b, int64_t y, int64_t x,
                int64_t* confusion, int64_t& bad, LabelWorkspace<T>& ws) {
  const int64_t pixel = (b * task.y.out + y) * task.x.out + x, classes = task.logits.classes;
  if (task.labels) {
    if (task.label_type == IntType::i64) write_labels<int64_t>(label, n, task.labels, pixel);
    if (task.label_type == IntType::i32) write_labels<int32_t>(label, n, task.labels, pixel);
    if (task.label_type == IntType::u8) write_labels<uint8_t>(label, n, task.labels, pixel);
  }
  if (!confusion) return;
  const LabelView& view = *task.target;
  const int64_t first = b * view.stride[0] + y * view.stride[1] + x * view.stride[2];
  const int64_t wrong =
      task.load_labels(static_cast<const char*>(view.data) + first * kIntSize[static_cast<int>(view.type)],
                       view.stride[2], n, classes, task.ignore_index, ws.target);
  if (wrong >= 0 && (bad < 0 || pixel + wrong < bad)) bad = pixel + wrong;
  if (!task.shared) {
    for (int64_t k = 0; k < n; ++k)
      if (ws.target[k] >= 0) ++confusion[ws.target[k] * classes + label[k]];
    return;
  }
  for (int64_t k = 0; k < n;) {
    const int64_t begin = k;
    for (++k; k < n && ws.target[k] == ws.target[begin] && label[k] == label[begin];) ++k;
    if (ws.target[begin] >= 0)
      __atomic_fetch_add(confusion + ws.target[begin] * classes + label[begin], k - begin, __ATOMIC_RELAXED);
  }
}

template <class T>
void label_cell_row(const LabelTask<T>& task, int64_t index, void* scratch, int64_t* confusion,
                    int64_t& bad) {
  constexpr int L = Simd<T>::lanes;
  const int64_t w = task.x.in, classes = task.logits.classes, *stride = task.logits.stride;
  const int64_t b = index / (task.y.in + 1), i = index % (task.y.in + 1) - 1;
  const int64_t y0 = task.y.begin(i), y1 = task.y.begin(i + 1);
  if (y0 == y1) return;
  LabelWorkspace<T> ws = carve(task, scratch);
  CellBlock<T> cells;
  const T* row[2] = {task.logits.data + b * stride[0] + task.y.lower(i) * stride[2],
                     task.logits.data + b * stride[0] + task.y.upper(i) * stride[2]};
  int64_t class_stride = stride[1];
  const int64_t inner = w > 1 ? w - 1 : 1;  // cells; what wins in a border cell wins on its neighbour's edge
  if (w <= L) {                             // a vector would reach beyond the row
    for (int64_t c = 0; c < classes; ++c)
      for (int q = 0; q < 2; ++q)
        for (int64_t x = 0; x <= L; ++x)
          ws.narrow[(2 * c + q) * 2 * L + x] = row[q][c * stride[1] + (x < w ? x : w - 1)];
    row[0] = ws.narrow, row[1] = ws.narrow + 2 * L;
    class_stride = 4 * L;
  }
  cells.stride = class_stride;
  for (int64_t block = 0; block < inner; block += L) {
    // The last vector ends with the row: its first lanes are done already.
    const int64_t start = block + L <= inner || inner < L ? block : inner - L;
    const int64_t end = start + L < inner ? start + L : inner;
    cells.upper = row[0] + start, cells.lower = row[1] + start;
    find_candidates(classes, static_cast<int>(block - start), cells, ws);
    const int64_t first = block == 0 ? -1 : block, last = end == inner ? w - 1 : end - 1;
    const int64_t left = task.x.begin(first), right = task.x.begin(last + 1);
    for (int64_t y = y0; y < y1; y += kStripRows) {
      const int64_t rows = y + kStripRows < y1 ? kStripRows : y1 - y;
      for (int64_t j = first; j <= last; ++j) {
        const int64_t x0 = task.x.begin(j), x1 = task.x.begin(j + 1);
        if (x0 == x1) continue;
        const int64_t lane = (j < 0 ? 0 : j < inner ? j : inner - 1) - start;
        const int64_t l = task.x.lower(j), r = task.x.upper(j);
        const T* corner[4] = {row[0] + l, row[0] + r, row[1] + l, row[1] + r};
        label_cell(task, cells, static_cast<int>(lane), corner, x0, x1, y, rows, ws.strip + x0 - left, ws);
      }
      for (int64_t r = 0; r < rows; ++r)
        use_labels(task, ws.strip + r * ws.pitch, right - left, b, y + r, left, confusion, bad, ws);
    }
  }
}

}  // namespace depict::cpu::DEPICT_ISA
