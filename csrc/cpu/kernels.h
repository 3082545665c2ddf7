// What the instruction-set specific translation units (avx512.cpp, avx2.cpp, baseline.cpp) hand to
// attention.cpp, mask_head.cpp and upsample.cpp: functions that do one task each. Shared by both sides, so
// nothing here depends on the instruction set.
#pragma once

#include "attention.h"
#include "mask_head.h"
#include "upsample.h"

namespace depict::cpu {

constexpr int kLanePadding = 16;  // class lanes are padded to this, a multiple of every vector width
// Padded lanes are finite, so that 0 times them is 0. Samples beyond kHuge, which masking with the lowest
// number brings, could tie with them and overflow in differences: those cells take a way of their own.
template <class T>
constexpr T kPadLogit = sizeof(T) == 4 ? T(-3.4028234663852886e38) : T(-1e308);
template <class T>
constexpr T kHuge = sizeof(T) == 4 ? T(5e37) : T(5e307);
constexpr int kMaxPixels = 16;                        // pixels of a cell treated together along x
constexpr int kTileRows = 4;                          // rows between two evaluations of true exponentials
constexpr int kIntSize[] = {1, 1, 2, 2, 4, 4, 8, 8};  // bytes of an IntType

struct Packed {                   // sizes of low-resolution logits whose classes are innermost
  int64_t batch, classes, lanes;  // lanes: classes padded
  Axis y, x;
};

template <class T>
struct PackedRow {  // one low-resolution row
  T* logits;        // (w, lanes)
  T* peak;          // (w, padded to kLanePadding): max over classes
  double* smooth;   // (w): sum over classes of weight * (logit - peak); null without label smoothing
};

// Weights of the upper sample along x, one per pixel, followed by kMaxPixels copies of the last.
template <class T>
struct PixelWeights {
  const T* lower;
  const T* upper;
  const double* pair;  // (lower, upper) interleaved
  const double* row;   // of the lower sample along y, one per row
};

typedef int64_t (*LoadLabels)(const void* row, int64_t stride, int64_t n, int64_t classes, int64_t ignore,
                              int32_t* labels);

template <class T>
struct CrossEntropyTask {
  LogitsView<T> logits;
  Packed packed;
  // Cell rows are dealt out in bands, since consecutive ones share what is packed and where they add.
  int64_t band, bands;  // cell rows of a band, bands of an image
  PixelWeights<T> pixel;
  LabelView target;
  LoadLabels load_labels;  // ignored labels become -1; returns the first bad position or -1
  int64_t ignore_index;
  const double* weight;
  double smoothing;     // label_smoothing / classes
  double total_weight;  // sum of weight over classes
  double hit;           // 1 - label_smoothing
  const T* pixel_gradient;
  bool want_loss;
  T* pixel_loss;
  T* gradient;  // (batch, classes, h, w), or null
  // (batch, bands - 1, 2, w, lanes): what the cell rows above and below the border of two bands add to the
  // gradient of the low-resolution row between them.
  T* edges;
};

struct CrossEntropyPartial {
  double loss, weight;
  int64_t bad;
};

template <class T>
struct LabelTask {
  LogitsView<T> logits;  // samples of a row lie side by side
  Axis y, x;
  PixelWeights<T> pixel;
  void* labels;
  IntType label_type;
  const LabelView* target;
  LoadLabels load_labels;
  int64_t ignore_index;
  bool shared;  // all threads count into one confusion matrix
};

constexpr int kTokens = 64;         // tokens of a block: a multiple of every register tile's lanes
constexpr int kAttentionTiles = 4;  // of kTokens x kTokens, a task's scratch
// Weights below exp of this, of a row's largest, are 0.
template <class T>
constexpr T kLeastExponent = sizeof(T) == 4 ? T(-60) : T(-300);
// The furthest that scale |w|^2 / 2 of one head's tokens may lie apart for exponentials that serve both
// tokens of a pair: what these drop is then below e^-36 of a row's largest weight.
constexpr double kSpread = 24;
constexpr double kLargestHalf = 1e5;  // and how large it may be, for differences of float to be exact to 0.02

// Heads (batch x heads) are done in groups, which bounds the memory: `head` counts within one. Panels are
// (heads of the group, blocks, dim, kTokens); one number per token is (heads of the group, blocks, kTokens).
template <class T>
struct AttentionTask {
  TokensView<const T> q, w, grad, out;
  T scale;
  int64_t first_head;
  int64_t q_blocks, w_blocks;
  T *q_panel, *w_panel, *grad_panel;  // q_panel is w_panel where tokens are their own keys; grad: backward
  T *sum_q, *sum_w;                   // zeroed by packing: the output or the gradients, for one w the same
  T *total,
      *shift;  // of forward: each query's sum of weights, and what their scores are less by, beside `top`
  // Of forward where pairs are formed, else null: scale |w|^2 / 2 and g of every token; of every head, the
  // largest of the former, or that its rows are done one by one (and 0).
  T *half, *g, *top;
  bool* by_row;
  const T* given_lse;  // of backward, (all heads, queries)
  T *lse, *delta;      // of backward: delta is the sum of grad times out
};

constexpr int kMaskHeadWidth = 64;  // numbers of an embedding whose sums over the patches are one task

// Images are done in groups: `image` counts within one. Panels are (images of the group, blocks, dim,
// kTokens) and hold unit vectors.
template <class T>
struct MaskHeadTask {
  TokensView<const T> patches, classes;
  const T *weight, *bias;
  double eps;
  int64_t first_image;
  int64_t patch_blocks, class_blocks;
  T *patch_panel, *class_panel;       // the former of backward
  T* logits;                          // (batch, classes, patches)
  MaskHeadStatistics<T> made;         // of forward
  MaskHeadStatistics<const T> given;  // of backward, and the rest:
  const T* grad;                      // (batch, classes, patches)
  T* turned;       // gradient of the cosines, (images, patch blocks, class blocks, kTokens patches, kTokens
                   // classes)
  T* sum_classes;  // gradient of the unit class embeddings, as class_panel
  double* sums;    // (batch, patch blocks, 2, classes): each block's gradient of weight and bias
};

template <class T>
struct Kernels {
  void (*mask_head_pack_classes)(const MaskHeadTask<T>&, int64_t image, int64_t block);
  // What one task of a block of patches needs: numbers, 64-byte aligned.
  int64_t (*mask_head_scratch)(const MaskHeadTask<T>&);
  void (*mask_head_forward)(const MaskHeadTask<T>&, int64_t image, int64_t block, T* scratch);
  void (*mask_head_backward)(const MaskHeadTask<T>&, int64_t image, int64_t block,
                             const TokensView<T>& grad_patches, T* scratch);
  // Part `part` of kMaskHeadWidth numbers of the class embeddings' gradient, summed over the patches.
  void (*mask_head_sum_classes)(const MaskHeadTask<T>&, int64_t image, int64_t block, int64_t part);
  void (*mask_head_finish_classes)(const MaskHeadTask<T>&, int64_t image, int64_t block,
                                   const TokensView<T>& grad_classes);
  void (*attention_pack_keys)(const AttentionTask<T>&, int64_t head, int64_t block);
  void (*attention_pack_queries)(const AttentionTask<T>&, int64_t head, int64_t block);
  void (*attention_prepare_pairs)(const AttentionTask<T>&, int64_t head);
  // Blocks i and j of tokens that are their own keys. What they add to belongs to these two blocks alone.
  void (*attention_forward_pair)(const AttentionTask<T>&, int64_t head, int64_t i, int64_t j, T* scratch);
  void (*attention_backward_pair)(const AttentionTask<T>&, int64_t head, int64_t i, int64_t j, T* scratch);
  void (*attention_forward_rows)(const AttentionTask<T>&, int64_t head, int64_t block, T* scratch);
  void (*attention_backward_rows)(const AttentionTask<T>&, int64_t head, int64_t query, int64_t key,
                                  T* scratch);
  void (*attention_finish)(const AttentionTask<T>&, int64_t head, int64_t block, const TokensView<T>& out,
                           T* lse);
  void (*attention_unpack)(const T* sum, const TokensView<T>& to, int64_t head, int64_t block);
  // Does band `task` of (batch, bands), all of the gradient but its scale and the bands' borders, with one
  // partial result for each of (batch, h + 1) cell rows. Scratch is 64-byte aligned, zero at first and kept
  // between tasks.
  int64_t (*cross_entropy_scratch)(const CrossEntropyTask<T>&);
  void (*cross_entropy)(const CrossEntropyTask<T>&, int64_t task, void* scratch, CrossEntropyPartial*);
  // Adds up the gradient at border `task` of (batch, bands - 1).
  void (*gather)(const CrossEntropyTask<T>&, int64_t task);
  void (*scale)(T* values, int64_t count, T factor);
  LoadLabels (*label_loader)(IntType);
  int64_t (*label_scratch)(const LabelTask<T>&);
  void (*labels)(const LabelTask<T>&, int64_t task, void* scratch, int64_t* confusion, int64_t& bad);
};

struct InstructionSet {
  const char* name;
  bool (*supported)();
  Kernels<float> f32;
  Kernels<double> f64;
};

#if defined(__x86_64__)
extern const InstructionSet kAvx512, kAvx2;
#endif
extern const InstructionSet kBaseline;

}  // namespace depict::cpu
