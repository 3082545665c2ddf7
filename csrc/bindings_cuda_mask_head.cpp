// Private operators of the CUDA mask head kernels (see bindings_cuda.h).
#include "bindings_cuda.h"
#include "cuda/mask_head.h"

namespace depict::cuda {
namespace {

Tokens tokens(const Tensor& tensor, const char* name, ScalarType type, std::initializer_list<int64_t> shape) {
  check(tensor, name, type, shape);
  STD_TORCH_CHECK(tensor.stride(2) == 1 || tensor.size(2) <= 1, name,
                  " must have unit stride in its last dimension");
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

MaskHeadShape shape_of(const Tensor& patches, const Tensor& classes, const Tensor& weight, bool precise) {
  STD_TORCH_CHECK(patches.dim() == 3 && classes.dim() == 3 && weight.dim() == 1,
                  "patches and classes must have three dimensions and weight one");
  return {patches.size(0),
          patches.size(1),
          classes.size(1),
          patches.size(2),
          type_of(patches, "patches"),
          type_of(weight, "weight"),
          precise};
}

template <class Float>
Float* floats(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  check_contiguous(tensor, name, ScalarType::Float, shape);
  return static_cast<Float*>(const_cast<void*>(tensor.const_data_ptr()));
}

template <class Float>
MaskHeadStatistics<Float> statistics(const MaskHeadShape& s, const Tensor& inv_x, const Tensor& inv_q,
                                     const Tensor& mean, const Tensor& rstd) {
  return {floats<Float>(inv_x, "inv_x", {s.batch, s.patches}),
          floats<Float>(inv_q, "inv_q", {s.batch, s.classes}),
          floats<Float>(mean, "mean", {s.batch, s.patches}),
          floats<Float>(rstd, "rstd", {s.batch, s.patches})};
}

void forward(Tensor patches, Tensor classes, Tensor weight, Tensor bias, double eps, Tensor logits,
             Tensor inv_x, Tensor inv_q, Tensor mean, Tensor rstd, bool precise, int64_t stream) {
  const MaskHeadShape s = shape_of(patches, classes, weight, precise);
  const ScalarType type = patches.scalar_type(), parameter = weight.scalar_type();
  const Tokens x = tokens(patches, "patches", type, {s.batch, s.patches, s.dim});
  const Tokens q = tokens(classes, "classes", type, {s.batch, s.classes, s.dim});
  check_contiguous(weight, "weight", parameter, {s.classes});
  check_contiguous(bias, "bias", parameter, {s.classes});
  check_contiguous(logits, "logits", parameter, {s.batch, s.classes, s.patches});
  const auto out = statistics<float>(s, inv_x, inv_q, mean, rstd);
  const Device device(patches);
  check_launch(mask_head_forward(s, x, q, weight.const_data_ptr(), bias.const_data_ptr(),
                                 static_cast<float>(eps), logits.mutable_data_ptr(), out,
                                 reinterpret_cast<void*>(stream)));
}

void backward(Tensor grad, Tensor patches, Tensor classes, Tensor weight, Tensor inv_x, Tensor inv_q,
              Tensor mean, Tensor rstd, Tensor products_grad, Tensor along, Tensor sums, Tensor classes_grad,
              Tensor peaks, Tensor scale, Tensor grad_patches, Tensor grad_classes, Tensor grad_weight,
              Tensor grad_bias, bool precise, int64_t stream) {
  const MaskHeadShape s = shape_of(patches, classes, weight, precise);
  const ScalarType type = patches.scalar_type(), parameter = weight.scalar_type();
  const Tokens x = tokens(patches, "patches", type, {s.batch, s.patches, s.dim});
  const Tokens q = tokens(classes, "classes", type, {s.batch, s.classes, s.dim});
  check_contiguous(weight, "weight", parameter, {s.classes});
  check_contiguous(grad, "grad", parameter, {s.batch, s.classes, s.patches});
  check_contiguous(products_grad, "products_grad", type,
                   {s.batch, s.patches, (s.classes + kMaskHeadAlign - 1) / kMaskHeadAlign * kMaskHeadAlign});
  check_contiguous(grad_patches, "grad_patches", type, {s.batch, s.patches, s.dim});
  check_contiguous(grad_classes, "grad_classes", type, {s.batch, s.classes, s.dim});
  check_contiguous(grad_weight, "grad_weight", parameter, {s.classes});
  check_contiguous(grad_bias, "grad_bias", parameter, {s.classes});
  const int64_t blocks = (s.patches + kMaskHeadRows - 1) / kMaskHeadRows;
  const MaskHeadScratch scratch{products_grad.mutable_data_ptr(),
                                floats<float>(along, "along", {s.batch, s.patches}),
                                floats<float>(sums, "sums", {3, s.classes, s.batch * blocks}),
                                floats<float>(classes_grad, "classes_grad", {-1, s.batch, s.classes, s.dim}),
                                floats<float>(peaks, "peaks", {s.batch, blocks}),
                                floats<float>(scale, "scale", {s.batch}),
                                classes_grad.size(0)};
  STD_TORCH_CHECK(scratch.splits >= 1, "classes_grad must have at least one part");
  const auto in = statistics<const float>(s, inv_x, inv_q, mean, rstd);
  const Device device(patches);
  check_launch(mask_head_backward(s, grad.const_data_ptr(), x, q, weight.const_data_ptr(), in, scratch,
                                  grad_patches.mutable_data_ptr(), grad_classes.mutable_data_ptr(),
                                  grad_weight.mutable_data_ptr(), grad_bias.mutable_data_ptr(),
                                  reinterpret_cast<void*>(stream)));
}

}  // namespace
}  // namespace depict::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(DEPICT_CUDA_LIBRARY, m) {
  m.def(
      "mask_head_forward(Tensor patches, Tensor classes, Tensor weight, Tensor bias, float eps, Tensor(a!) "
      "logits, "
      "Tensor(b!) inv_x, Tensor(c!) inv_q, Tensor(d!) mean, Tensor(e!) rstd, bool precise, int stream) -> "
      "()");
  m.def(
      "mask_head_backward(Tensor grad, Tensor patches, Tensor classes, Tensor weight, Tensor inv_x, Tensor "
      "inv_q, "
      "Tensor mean, Tensor rstd, Tensor(a!) products_grad, Tensor(b!) along, Tensor(c!) sums, "
      "Tensor(d!) classes_grad, Tensor(e!) peaks, Tensor(f!) scale, Tensor(g!) grad_patches, "
      "Tensor(h!) grad_classes, Tensor(i!) grad_weight, Tensor(j!) grad_bias, bool precise, int stream) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(DEPICT_CUDA_LIBRARY, DEPICT_CUDA_KEY, m) {
  m.impl("mask_head_forward", TORCH_BOX(&depict::cuda::forward));
  m.impl("mask_head_backward", TORCH_BOX(&depict::cuda::backward));
}
