// Private operators of the CPU kernels: the checks that memory safety needs, and nothing else. Everything a
// user should be told about is checked in Python, where ValueError and TypeError exist. Only torch's stable
// interface is used, so that one binary serves every torch from the target version on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <type_traits>

#include "cpu/attention.h"
#include "cpu/mask_head.h"
#include "cpu/upsample.h"

namespace {

using depict::cpu::IntType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const depict::cpu::Executor torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int workers, void (*body)(void*), void* context) {
            torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context);
            });
          }};
}

IntType int_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Byte: return IntType::u8;
    case ScalarType::Char: return IntType::i8;
    case ScalarType::UInt16: return IntType::u16;
    case ScalarType::Short: return IntType::i16;
    case ScalarType::UInt32: return IntType::u32;
    case ScalarType::Int: return IntType::i32;
    case ScalarType::UInt64: return IntType::u64;
    case ScalarType::Long: return IntType::i64;
    default: STD_TORCH_CHECK(false, name, " must have an integer dtype");
  }
}

template <class T>
constexpr ScalarType scalar_type_of() {
  return sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;
}

template <class T>
depict::cpu::LogitsView<T> logits_view(const Tensor& logits) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 4, "logits must be a (B, C, h, w) CPU tensor");
  STD_TORCH_CHECK(logits.size(1) > 0 && logits.size(2) > 0 && logits.size(3) > 0, "logits must not be empty");
  return {static_cast<const T*>(logits.const_data_ptr()),
          logits.size(0),
          logits.size(1),
          logits.size(2),
          logits.size(3),
          {logits.stride(0), logits.stride(1), logits.stride(2), logits.stride(3)}};
}

depict::cpu::LabelView label_view(const Tensor& target, int64_t batch) {
  STD_TORCH_CHECK(target.is_cpu() && target.dim() == 3 && target.size(0) == batch,
                  "target must be a (B, H, W) CPU tensor");
  return {target.const_data_ptr(),
          int_type(target, "target"),
          {target.stride(0), target.stride(1), target.stride(2)}};
}

// A contiguous CPU tensor of dtype T with `count` elements.
template <class T>
T* contiguous(const std::optional<Tensor>& tensor, ScalarType type, int64_t count, const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->is_cpu() && tensor->is_contiguous() && tensor->scalar_type() == type &&
                      tensor->numel() == count,
                  name, " must be a contiguous CPU tensor of ", count, " elements of the right dtype");
  if constexpr (std::is_const_v<T>)
    return static_cast<T*>(tensor->const_data_ptr());
  else
    return static_cast<T*>(tensor->mutable_data_ptr());
}

template <class T>
int64_t run_cross_entropy(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                          const std::optional<Tensor>& pixel_gradient, const std::optional<Tensor>& loss,
                          const std::optional<Tensor>& pixel_loss, const std::optional<Tensor>& gradient,
                          int64_t ignore_index, double label_smoothing, bool mean) {
  const ScalarType type = scalar_type_of<T>();
  depict::cpu::CrossEntropyProblem<T> problem{};
  problem.logits = logits_view<T>(logits);
  problem.target = label_view(target, logits.size(0));
  problem.height = target.size(1);
  problem.width = target.size(2);
  problem.weight = contiguous<double>(weight, ScalarType::Double, logits.size(1), "weight");
  problem.label_smoothing = label_smoothing;
  problem.ignore_index = ignore_index;
  problem.mean = mean;
  problem.pixel_gradient = contiguous<T>(pixel_gradient, type, target.numel(), "pixel_gradient");
  T* total = contiguous<T>(loss, type, 1, "loss");
  problem.want_loss = total != nullptr;
  problem.pixel_loss = contiguous<T>(pixel_loss, type, target.numel(), "pixel_loss");
  problem.gradient = contiguous<T>(gradient, type, logits.numel(), "gradient");
  STD_TORCH_CHECK(logits.size(0) == 0 || target.numel() > 0, "target must not be empty");
  if (target.numel() == 0) {  // the tables of weights need a pixel
    if (total) *total = 0;
    return -1;
  }
  const depict::cpu::CrossEntropyResult result = depict::cpu::cross_entropy(problem, torch_threads());
  if (total) *total = static_cast<T>(result.loss);
  return result.bad;
}

int64_t cross_entropy(Tensor logits, Tensor target, std::optional<Tensor> weight,
                      std::optional<Tensor> pixel_gradient, std::optional<Tensor> loss,
                      std::optional<Tensor> pixel_loss, std::optional<Tensor> gradient, int64_t ignore_index,
                      double label_smoothing, bool mean) {
  if (logits.scalar_type() == ScalarType::Double)
    return run_cross_entropy<double>(logits, target, weight, pixel_gradient, loss, pixel_loss, gradient,
                                     ignore_index, label_smoothing, mean);
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float, "logits must be float32 or float64");
  return run_cross_entropy<float>(logits, target, weight, pixel_gradient, loss, pixel_loss, gradient,
                                  ignore_index, label_smoothing, mean);
}

template <class T>
int64_t run_label_map(const Tensor& logits, const std::optional<Tensor>& labels, int64_t height,
                      int64_t width, const std::optional<Tensor>& target, int64_t ignore_index,
                      const std::optional<Tensor>& confusion) {
  depict::cpu::LabelProblem<T> problem{};
  problem.logits = logits_view<T>(logits);
  STD_TORCH_CHECK(logits.size(3) == 1 || logits.stride(3) == 1, "logits must be contiguous along a row");
  problem.height = height;
  problem.width = width;
  problem.ignore_index = ignore_index;
  STD_TORCH_CHECK(height > 0 && width > 0, "the label map must not be empty");
  const int64_t classes = logits.size(1);
  if (labels) {
    problem.label_type = int_type(*labels, "labels");
    const IntType type = problem.label_type;
    STD_TORCH_CHECK(type == IntType::u8 || type == IntType::i32 || type == IntType::i64,
                    "labels must be uint8, int32 or int64");
    STD_TORCH_CHECK(type != IntType::u8 || classes <= 256, "uint8 labels hold at most 256 classes");
    problem.labels =
        contiguous<void>(labels, labels->scalar_type(), logits.size(0) * height * width, "labels");
  }
  depict::cpu::LabelView view{};
  STD_TORCH_CHECK(target.has_value() == confusion.has_value(), "target and confusion go together");
  if (target) {
    STD_TORCH_CHECK(target->size(1) == height && target->size(2) == width,
                    "target must be (B, height, width)");
    view = label_view(*target, logits.size(0));
    problem.target = &view;
    problem.confusion = contiguous<int64_t>(confusion, ScalarType::Long, classes * classes, "confusion");
  }
  return depict::cpu::label_map(problem, torch_threads());
}

int64_t label_map(Tensor logits, std::optional<Tensor> labels, int64_t height, int64_t width,
                  std::optional<Tensor> target, int64_t ignore_index, std::optional<Tensor> confusion) {
  if (logits.scalar_type() == ScalarType::Double)
    return run_label_map<double>(logits, labels, height, width, target, ignore_index, confusion);
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float, "logits must be float32 or float64");
  return run_label_map<float>(logits, labels, height, width, target, ignore_index, confusion);
}

// A (batch, tokens, heads, dim) tensor whose last dimension is contiguous, of w's batch, heads, dim and
// dtype.
template <class T>
depict::cpu::TokensView<T> tokens_view(const Tensor& tensor, const Tensor& w, int64_t tokens,
                                       const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 4 && tensor.scalar_type() == w.scalar_type() &&
                      tensor.size(0) == w.size(0) && tensor.size(1) == tokens &&
                      tensor.size(2) == w.size(2) && tensor.size(3) == w.size(3) &&
                      (tensor.stride(3) == 1 || tensor.size(3) == 1 || tensor.numel() == 0),
                  name, " must be a CPU tensor of (batch, tokens, heads, head_dim) with contiguous rows");
  T* data;
  if constexpr (std::is_const_v<T>)
    data = static_cast<T*>(tensor.const_data_ptr());
  else
    data = static_cast<T*>(tensor.mutable_data_ptr());
  return {data,           tensor.size(0), tensor.size(1),
          tensor.size(2), tensor.size(3), {tensor.stride(0), tensor.stride(1), tensor.stride(2)}};
}

template <class T>
depict::cpu::AttentionProblem<T> attention_problem(const std::optional<Tensor>& q, const Tensor& w,
                                                   double scale) {
  STD_TORCH_CHECK(w.dim() == 4 && w.size(3) > 0 && w.size(3) < (1 << 24),
                  "w must be (batch, tokens, heads, head_dim), head_dim below 2^24");
  const auto keys = tokens_view<const T>(w, w, w.size(1), "w");
  STD_TORCH_CHECK(!q || (q->dim() == 4 && keys.tokens > 0),
                  "q must be (batch, queries, heads, head_dim), w not empty");
  return {q ? tokens_view<const T>(*q, w, q->size(1), "q") : keys, keys, !q, static_cast<T>(scale)};
}

template <class T>
void run_attention_forward(const std::optional<Tensor>& q, const Tensor& w, const Tensor& out,
                           const Tensor& lse, double scale) {
  const auto problem = attention_problem<T>(q, w, scale);
  depict::cpu::attention_forward(
      problem, tokens_view<T>(out, w, problem.q.tokens, "out"),
      contiguous<T>(lse, scalar_type_of<T>(), problem.w.batch * problem.w.heads * problem.q.tokens, "lse"),
      torch_threads());
}

template <class T>
void run_attention_backward(const Tensor& grad, const std::optional<Tensor>& q, const Tensor& w,
                            const Tensor& out, const Tensor& lse, const std::optional<Tensor>& grad_q,
                            const Tensor& grad_w, double scale) {
  const auto problem = attention_problem<T>(q, w, scale);
  const int64_t queries = problem.q.tokens;
  STD_TORCH_CHECK(q.has_value() == grad_q.has_value(), "q and grad_q go together");
  depict::cpu::attention_backward(
      problem, tokens_view<const T>(grad, w, queries, "grad"), tokens_view<const T>(out, w, queries, "out"),
      contiguous<const T>(lse, scalar_type_of<T>(), problem.w.batch * problem.w.heads * queries, "lse"),
      grad_q ? tokens_view<T>(*grad_q, w, queries, "grad_q") : depict::cpu::TokensView<T>{},
      tokens_view<T>(grad_w, w, problem.w.tokens, "grad_w"), torch_threads());
}

void attention_forward(std::optional<Tensor> q, Tensor w, Tensor out, Tensor lse, double scale) {
  if (w.scalar_type() == ScalarType::Double) return run_attention_forward<double>(q, w, out, lse, scale);
  STD_TORCH_CHECK(w.scalar_type() == ScalarType::Float, "w must be float32 or float64");
  run_attention_forward<float>(q, w, out, lse, scale);
}

void attention_backward(Tensor grad, std::optional<Tensor> q, Tensor w, Tensor out, Tensor lse,
                        std::optional<Tensor> grad_q, Tensor grad_w, double scale) {
  if (w.scalar_type() == ScalarType::Double)
    return run_attention_backward<double>(grad, q, w, out, lse, grad_q, grad_w, scale);
  STD_TORCH_CHECK(w.scalar_type() == ScalarType::Float, "w must be float32 or float64");
  run_attention_backward<float>(grad, q, w, out, lse, grad_q, grad_w, scale);
}

// patches (batch, N, 1, dim), classes (batch, C, 1, dim); nothing but dim may be 0.
template <class T>
depict::cpu::MaskHeadProblem<T> mask_head_problem(const Tensor& patches, const Tensor& classes,
                                                  const Tensor& weight) {
  STD_TORCH_CHECK(patches.dim() == 4 && classes.dim() == 4 && patches.size(2) == 1,
                  "patches and classes must be (batch, tokens, 1, dim)");
  STD_TORCH_CHECK(patches.size(0) > 0 && patches.size(1) > 0 && classes.size(1) > 0,
                  "patches and classes must not be empty");
  STD_TORCH_CHECK(patches.size(3) < (1 << 24), "dim must be below 2^24");
  return {tokens_view<const T>(patches, patches, patches.size(1), "patches"),
          tokens_view<const T>(classes, patches, classes.size(1), "classes"),
          contiguous<const T>(weight, scalar_type_of<T>(), classes.size(1), "weight")};
}

template <class T>
depict::cpu::MaskHeadStatistics<T> mask_head_statistics(const Tensor& patches, const Tensor& classes,
                                                        const Tensor& inv_patches, const Tensor& inv_classes,
                                                        const Tensor& mean, const Tensor& rstd) {
  const ScalarType type = scalar_type_of<T>();
  const int64_t batch = patches.size(0), rows = batch * patches.size(1);
  return {contiguous<T>(inv_patches, type, rows, "inv_patches"),
          contiguous<T>(inv_classes, type, batch * classes.size(1), "inv_classes"),
          contiguous<T>(mean, type, rows, "mean"), contiguous<T>(rstd, type, rows, "rstd")};
}

template <class T>
void run_mask_head_forward(const Tensor& patches, const Tensor& classes, const Tensor& weight,
                           const Tensor& bias, double eps, const Tensor& logits, const Tensor& inv_patches,
                           const Tensor& inv_classes, const Tensor& mean, const Tensor& rstd) {
  const auto problem = mask_head_problem<T>(patches, classes, weight);
  const ScalarType type = scalar_type_of<T>();
  const int64_t count = problem.classes.tokens;
  depict::cpu::mask_head_forward(
      problem, contiguous<const T>(bias, type, count, "bias"), eps,
      contiguous<T>(logits, type, problem.patches.batch * count * problem.patches.tokens, "logits"),
      mask_head_statistics<T>(patches, classes, inv_patches, inv_classes, mean, rstd), torch_threads());
}

template <class T>
void run_mask_head_backward(const Tensor& grad, const Tensor& patches, const Tensor& classes,
                            const Tensor& weight, const Tensor& inv_patches, const Tensor& inv_classes,
                            const Tensor& mean, const Tensor& rstd, const Tensor& grad_patches,
                            const Tensor& grad_classes, const Tensor& grad_weight, const Tensor& grad_bias) {
  const auto problem = mask_head_problem<T>(patches, classes, weight);
  const ScalarType type = scalar_type_of<T>();
  const int64_t count = problem.classes.tokens;
  depict::cpu::mask_head_backward(
      problem,
      contiguous<const T>(grad, type, problem.patches.batch * count * problem.patches.tokens, "grad"),
      mask_head_statistics<const T>(patches, classes, inv_patches, inv_classes, mean, rstd),
      tokens_view<T>(grad_patches, patches, patches.size(1), "grad_patches"),
      tokens_view<T>(grad_classes, patches, count, "grad_classes"),
      contiguous<T>(grad_weight, type, count, "grad_weight"),
      contiguous<T>(grad_bias, type, count, "grad_bias"), torch_threads());
}

void mask_head_forward(Tensor patches, Tensor classes, Tensor weight, Tensor bias, double eps, Tensor logits,
                       Tensor inv_patches, Tensor inv_classes, Tensor mean, Tensor rstd) {
  if (patches.scalar_type() == ScalarType::Double)
    return run_mask_head_forward<double>(patches, classes, weight, bias, eps, logits, inv_patches,
                                         inv_classes, mean, rstd);
  STD_TORCH_CHECK(patches.scalar_type() == ScalarType::Float, "patches must be float32 or float64");
  run_mask_head_forward<float>(patches, classes, weight, bias, eps, logits, inv_patches, inv_classes, mean,
                               rstd);
}

void mask_head_backward(Tensor grad, Tensor patches, Tensor classes, Tensor weight, Tensor inv_patches,
                        Tensor inv_classes, Tensor mean, Tensor rstd, Tensor grad_patches,
                        Tensor grad_classes, Tensor grad_weight, Tensor grad_bias) {
  if (patches.scalar_type() == ScalarType::Double)
    return run_mask_head_backward<double>(grad, patches, classes, weight, inv_patches, inv_classes, mean,
                                          rstd, grad_patches, grad_classes, grad_weight, grad_bias);
  STD_TORCH_CHECK(patches.scalar_type() == ScalarType::Float, "patches must be float32 or float64");
  run_mask_head_backward<float>(grad, patches, classes, weight, inv_patches, inv_classes, mean, rstd,
                                grad_patches, grad_classes, grad_weight, grad_bias);
}

std::string instruction_sets() { return depict::cpu::instruction_sets(); }

std::string use_instruction_set(std::string name) {
  STD_TORCH_CHECK(name.empty() || depict::cpu::use_instruction_set(name.c_str()), "no instruction set '",
                  name, "' here; there are: ", depict::cpu::instruction_sets());
  return depict::cpu::instruction_set_in_use();
}

}  // namespace

STABLE_TORCH_LIBRARY(depict_kernels_cpu, m) {
  m.def("attention_forward(Tensor? q, Tensor w, Tensor(a!) out, Tensor(b!) lse, float scale) -> ()");
  m.def(
      "attention_backward(Tensor grad, Tensor? q, Tensor w, Tensor out, Tensor lse, Tensor(a!)? grad_q, "
      "Tensor(b!) grad_w, float scale) -> ()");
  m.def(
      "mask_head_forward(Tensor patches, Tensor classes, Tensor weight, Tensor bias, float eps, Tensor(a!) "
      "logits, Tensor(b!) inv_patches, Tensor(c!) inv_classes, Tensor(d!) mean, Tensor(e!) rstd) -> ()");
  m.def(
      "mask_head_backward(Tensor grad, Tensor patches, Tensor classes, Tensor weight, Tensor inv_patches, "
      "Tensor inv_classes, Tensor mean, Tensor rstd, Tensor(a!) grad_patches, Tensor(b!) grad_classes, "
      "Tensor(c!) grad_weight, Tensor(d!) grad_bias) -> ()");
  // Both return the linear index in (B, H, W) of the first bad label, or -1.
  m.def(
      "cross_entropy(Tensor logits, Tensor target, Tensor? weight, Tensor? pixel_gradient, Tensor(a!)? loss, "
      "Tensor(b!)? pixel_loss, Tensor(c!)? gradient, int ignore_index, float label_smoothing, bool mean) -> "
      "int");
  m.def(
      "label_map(Tensor logits, Tensor(a!)? labels, int height, int width, Tensor? target, int ignore_index, "
      "Tensor(b!)? confusion) -> int");
  m.def("instruction_sets() -> str");
  m.def("use_instruction_set(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(depict_kernels_cpu, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("mask_head_forward", TORCH_BOX(&mask_head_forward));
  m.impl("mask_head_backward", TORCH_BOX(&mask_head_backward));
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("label_map", TORCH_BOX(&label_map));
}

STABLE_TORCH_LIBRARY_IMPL(depict_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&instruction_sets));
  m.impl("use_instruction_set", TORCH_BOX(&use_instruction_set));
}
