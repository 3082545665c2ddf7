// Private operators of the CUDA attention kernels (see bindings_cuda.h).
#include "bindings_cuda.h"
#include "cuda/attention.h"

namespace depict::cuda {
namespace {

Rows rows(const Tensor& tensor, const char* name, ScalarType type, std::initializer_list<int64_t> shape) {
  check(tensor, name, type, shape);
  STD_TORCH_CHECK(tensor.stride(3) == 1 || tensor.size(3) == 1, name,
                  " must have unit stride in its last dimension");
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

AttentionShape shape_of(const Tensor& q, const Tensor& w, double scale, bool precise) {
  STD_TORCH_CHECK(q.dim() == 4 && w.dim() == 4, "q and w must be (B, N, H, d)");
  STD_TORCH_CHECK(q.size(3) >= 1 && q.size(3) <= kMaxHeadDim, "head_dim must be at most ", kMaxHeadDim);
  STD_TORCH_CHECK(q.size(1) <= kMaxRows && w.size(1) <= kMaxRows, "q and w must have at most ", kMaxRows,
                  " rows: the kernels count them with 32 bits");
  STD_TORCH_CHECK(w.size(1) >= 1 || q.numel() == 0, "w must hold at least one key");
  return {q.size(0),
          q.size(2),
          q.size(1),
          w.size(1),
          static_cast<int>(q.size(3)),
          type_of(q, "q"),
          static_cast<float>(scale),
          precise};
}

Variant variant_of(int64_t variant) {
  STD_TORCH_CHECK(variant == 0 || variant == 1, "variant must be 0 (mma) or 1 (wgmma)");
  return static_cast<Variant>(variant);
}

void forward(Tensor q, Tensor w, Tensor out, Tensor lse, double scale, bool precise, int64_t variant,
             int64_t stream) {
  const AttentionShape s = shape_of(q, w, scale, precise);
  const ScalarType type = q.scalar_type();
  check_contiguous(out, "out", type, {s.batch, s.queries, s.heads, s.dim});
  check_contiguous(lse, "lse", ScalarType::Float, {s.batch, s.heads, s.queries});
  const Device device(q);
  check_launch(
      attention_forward(s, variant_of(variant), rows(q, "q", type, {s.batch, s.queries, s.heads, s.dim}),
                        rows(w, "w", type, {s.batch, s.keys, s.heads, s.dim}), out.mutable_data_ptr(),
                        static_cast<float*>(lse.mutable_data_ptr()), reinterpret_cast<void*>(stream)));
}

void delta(Tensor grad, Tensor out, Tensor delta, double scale, int64_t stream) {
  const AttentionShape s = shape_of(grad, grad, scale, false);
  const ScalarType type = grad.scalar_type();
  check_contiguous(out, "out", type, {s.batch, s.queries, s.heads, s.dim});
  check_contiguous(delta, "delta", ScalarType::Float, {s.batch, s.heads, s.queries});
  const Device device(grad);
  check_launch(attention_delta(s, rows(grad, "grad", type, {s.batch, s.queries, s.heads, s.dim}),
                               out.const_data_ptr(), static_cast<float*>(delta.mutable_data_ptr()),
                               reinterpret_cast<void*>(stream)));
}

void backward(Tensor x, Tensor y, Tensor grad, Tensor lse, Tensor delta, Tensor out, double scale,
              int64_t role, bool precise, int64_t variant, int64_t stream) {
  STD_TORCH_CHECK(role >= 0 && role <= 2, "role must be 0 (self), 1 (query) or 2 (key)");
  const Role which = static_cast<Role>(role);
  // Seen from the queries.
  const AttentionShape s =
      which == Role::key ? shape_of(y, x, scale, precise) : shape_of(x, y, scale, precise);
  const ScalarType type = x.scalar_type();
  const int64_t n = x.size(1), other = y.size(1);
  STD_TORCH_CHECK(which != Role::self || n == other, "self-attention needs x and y of one length");
  check_contiguous(out, "out", type, {s.batch, n, s.heads, s.dim});
  check_contiguous(lse, "lse", ScalarType::Float, {s.batch, s.heads, s.queries});
  check_contiguous(delta, "delta", ScalarType::Float, {s.batch, s.heads, s.queries});
  const Device device(x);
  check_launch(attention_backward(
      s, variant_of(variant), which, rows(x, "x", type, {s.batch, n, s.heads, s.dim}),
      rows(y, "y", type, {s.batch, other, s.heads, s.dim}),
      rows(grad, "grad", type, {s.batch, s.queries, s.heads, s.dim}),
      static_cast<const float*>(lse.const_data_ptr()), static_cast<const float*>(delta.const_data_ptr()),
      out.mutable_data_ptr(), reinterpret_cast<void*>(stream)));
}

}  // namespace
}  // namespace depict::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(DEPICT_CUDA_LIBRARY, m) {
  m.def(
      "attention_forward(Tensor q, Tensor w, Tensor(a!) out, Tensor(b!) lse, float scale, bool precise, int "
      "variant, int stream) -> ()");
  m.def("attention_delta(Tensor grad, Tensor out, Tensor(a!) delta, float scale, int stream) -> ()");
  m.def(
      "attention_backward(Tensor x, Tensor y, Tensor grad, Tensor lse, Tensor delta, Tensor(a!) out, float "
      "scale, int role, bool precise, int variant, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(DEPICT_CUDA_LIBRARY, DEPICT_CUDA_KEY, m) {
  m.impl("attention_forward", TORCH_BOX(&depict::cuda::forward));
  m.impl("attention_delta", TORCH_BOX(&depict::cuda::delta));
  m.impl("attention_backward", TORCH_BOX(&depict::cuda::backward));
}
