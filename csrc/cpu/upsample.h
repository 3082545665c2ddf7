// Interface of the CPU upsample operators: plain C++, no torch. The bindings fill these descriptions.
#pragma once

#include <cstdint>

#include "../bilinear.h"

namespace depict::cpu {

enum class IntType { u8, i8, u16, i16, u32, i32, u64, i64 };

// Runs body(context) once on each of up to `workers` threads; a body that finds no work left returns.
struct Executor {
  int workers;
  void (*run)(int workers, void (*body)(void*), void* context);
};

template <class T>
struct LogitsView {  // (batch, classes, height, width), strides in elements
  const T* data;
  int64_t batch, classes, height, width;
  int64_t stride[4];
};

struct LabelView {  // (batch, height, width)
  const void* data;
  IntType type;
  int64_t stride[3];
};

template <class T>
struct CrossEntropyProblem {
  LogitsView<T> logits;
  LabelView target;
  int64_t height, width;  // of the target
  const double* weight;   // (classes) or null
  double label_smoothing;
  int64_t ignore_index;
  bool mean;  // divide loss and gradient by the valid weight
  const T*
      pixel_gradient;  // (batch, height, width) contiguous upstream gradient of reduction "none", or null
  bool want_loss;      // fill CrossEntropyResult::loss
  T* pixel_loss;       // (batch, height, width) contiguous, or null
  T* gradient;         // (batch, classes, h, w) contiguous, or null
};

struct CrossEntropyResult {
  double loss;  // summed or averaged
  int64_t bad;  // linear index of the first label outside [0, classes) other than ignore_index, or -1
};

template <class T>
CrossEntropyResult cross_entropy(const CrossEntropyProblem<T>& problem, const Executor& executor);

template <class T>
struct LabelProblem {
  LogitsView<T> logits;  // samples of a row side by side: stride[3] is 1 unless width is
  int64_t height, width;
  void* labels;  // (batch, height, width) contiguous u8, i32 or i64, or null
  IntType label_type;
  const LabelView* target;  // with `confusion`
  int64_t ignore_index;
  int64_t* confusion;  // (classes, classes) contiguous, rows = target, added to; or null
};

// Returns the linear index of the first bad label of `target`, or -1.
template <class T>
int64_t label_map(const LabelProblem<T>& problem, const Executor& executor);

// Instruction sets compiled in and supported by this processor, best first, separated by spaces.
const char* instruction_sets();
// Uses the named one from now on (tests run them all); returns false if it is not in the list.
bool use_instruction_set(const char* name);
const char* instruction_set_in_use();

}  // namespace depict::cpu
