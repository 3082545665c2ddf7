// The mask head: cosines of patches and classes, LayerNorm over the classes, (batch, classes, patches) masks.
//
// A block owns 64 patches and up to 160 classes. Products and row norms come from one pass over the width;
// the rest follows in registers. More classes go tile by tile, twice: statistics first, then the masks.
#include "mask_head_tiles.h"

namespace depict::cuda {
namespace {

struct ForwardArguments {
  MaskHeadShape shape;
  Tokens x, q;
  int x_unit, q_unit;
  const void *weight, *bias;
  float eps;
  void* logits;
  MaskHeadStatistics<float> out;
};

template <class T, int NT>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) mask_forward(ForwardArguments a) {
  const MaskHeadShape& s = a.shape;
  unsigned char* ring = shared_memory();
  float* staged = reinterpret_cast<float*>(ring);
  Small<NT>& small = *reinterpret_cast<Small<NT>*>(ring + kRing<T, NT>);
  BlockNumber number(block_index());
  const int64_t first = number.next(divide_up(s.patches, kRows)) * kRows, batch = number.rest;
  const int rows_left = at_most(s.patches - first, kRows);
  const int64_t tiles = divide_up(s.classes, kClasses<NT>);
  const Source<T> x = rows_of<T>(a.x, batch, first, s.patches, s.dim, a.x_unit);
  const Place<NT> place;
  const int lane = thread_index() % 32, warp = thread_index() / 32;

  float m[2][NT][4];
  float mean[4] = {0, 0, 0, 0}, deviation[4] = {0, 0, 0, 0}, rstd[4];
  for (int64_t step = 0; step < 2 * tiles; ++step) {  // statistics of all tiles, then the masks
    const bool second = step >= tiles;
    const int64_t first_class = (second ? step - tiles : step) * kClasses<NT>;
    const int classes_left = at_most(s.classes - first_class, kClasses<NT>);

    if (!second || tiles > 1) {
      const Source<T> q = rows_of<T>(a.q, batch, first_class, s.classes, s.dim, a.q_unit);
      Squares<NT> squares;
      product<T, NT, false, false>(m, x, q, s.dim, s.precise, ring, &squares);
      for (int c = thread_index(); c < kClasses<NT>; c += kThreads) {
        small.weight[c] = c < classes_left ? load_as(s.parameter_type, a.weight, first_class + c) : 0.0f;
        small.bias[c] = c < classes_left ? load_as(s.parameter_type, a.bias, first_class + c) : 0.0f;
      }
      RowSums{small.row_sums[0][0]}(squares.a);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        squares.b[n] += shuffle_xor(squares.b[n], 1);
        squares.b[n] += shuffle_xor(squares.b[n], 2);
        if (lane % 4 == 0) small.class_sums[0][warp / 4][warp % 4 * 8 * NT + 8 * n + lane / 4] = squares.b[n];
      }
      barrier();
      for (int c = thread_index(); c < kClasses<NT>; c += kThreads) {
        small.inv_q[c] = inverse_norm(small.class_sums[0][0][c] + small.class_sums[0][1][c]);
        if (first == 0 && !second && c < classes_left)
          a.out.inv_q[batch * s.classes + first_class + c] = small.inv_q[c];
      }
      barrier();
      float inv_x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        inv_x[j] = inverse_norm(squares.a[j]);
        const int row = place.row0 + 8 * j;
        if (step == 0 && warp % 4 == 0 && lane % 4 == 0 && row < rows_left)
          a.out.inv_x[batch * s.patches + first + row] = inv_x[j];
      }
      for_each<NT>([&](int i, int n, int k) {
        m[i][n][k] = cosine_of(m[i][n][k], inv_x[2 * i + k / 2], small.inv_q[place.column(n, k)]);
      });
    }

    if (!second) {
      const float count = static_cast<float>(classes_left);
      float tile_mean[4] = {0, 0, 0, 0}, squares[4] = {0, 0, 0, 0};
      for_each<NT>([&](int i, int n, int k) { tile_mean[2 * i + k / 2] += m[i][n][k]; });  // 0 past the last
      RowSums{small.row_sums[1][0]}(tile_mean);
#pragma unroll
      for (int j = 0; j < 4; ++j) tile_mean[j] /= count;
      for_each<NT>([&](int i, int n, int k) {
        const float centred = m[i][n][k] - tile_mean[2 * i + k / 2];
        squares[2 * i + k / 2] += place.column(n, k) < classes_left ? centred * centred : 0.0f;
      });
      RowSums{small.row_sums[2][0]}(squares);
      // Chan's update of mean and squared deviations: exact for any split of the classes.
      const float before = static_cast<float>(first_class), merged = before + count;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float difference = tile_mean[j] - mean[j];
        deviation[j] += squares[j] + difference * difference * (before * (count / merged));
        mean[j] += difference * (count / merged);
        rstd[j] = 1 / sqrtf(deviation[j] / merged + a.eps);
      }
      continue;
    }

    for_each<NT>([&](int i, int n, int k) {
      const int j = 2 * i + k / 2, c = place.column(n, k);
      m[i][n][k] = (m[i][n][k] - mean[j]) * rstd[j] * small.weight[c] + small.bias[c];
    });
    stage_columns<NT>(m, staged);
    barrier();
    constexpr int kQuads = kRows / 4;
    const int quads = (classes_left < kClasses<NT> ? classes_left : kClasses<NT>)*kQuads;
    for (int i = thread_index(); i < quads; i += kThreads) {
      const int c = i / kQuads, row = i % kQuads * 4;
      const int64_t at = (batch * s.classes + first_class + c) * s.patches + first + row;
      store_as<4>(s.parameter_type, a.logits, at, staged + c * kColumnPitch + row, rows_left - row,
                  s.patches % 4 == 0);
    }
    barrier();
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int row = place.row0 + 8 * j;
    if (warp % 4 == 0 && lane % 4 == 0 && row < rows_left) {
      a.out.mean[batch * s.patches + first + row] = mean[j];
      a.out.rstd[batch * s.patches + first + row] = rstd[j];
    }
  }
}

}  // namespace

const char* mask_head_forward(const MaskHeadShape& s, const Tokens& patches, const Tokens& classes,
                              const void* weight, const void* bias, float eps, void* logits,
                              const MaskHeadStatistics<float>& out, void* stream) {
  const int element = element_size(s.type);
  const ForwardArguments a{s,
                           patches,
                           classes,
                           unit_of(patches, s.batch, s.patches, element),
                           unit_of(classes, s.batch, s.classes, element),
                           weight,
                           bias,
                           eps,
                           logits,
                           out};
  return with_rows(s, [&](auto type, auto tile) {
    using T = typename decltype(type)::type;
    constexpr int NT = decltype(tile)::value;
    return launch(mask_forward<T, NT>, s.batch * divide_up(s.patches, kRows), kThreads,
                  kRing<T, NT> + sizeof(Small<NT>), stream, a);
  });
}

}  // namespace depict::cuda
