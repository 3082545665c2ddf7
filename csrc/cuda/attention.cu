#include "attention.h"
#include "device.h"

namespace depict::cuda {
namespace {

struct DeltaArguments {
  Rows grad;
  const void* out;
  float* delta;
  int64_t queries, heads, total;
  int dim;
  float scale;
};

// One warp per row.
template <class T>
__global__ void delta_kernel(DeltaArguments a) {
  const int64_t row = block_index() * (thread_count() / 32) + thread_index() / 32;
  if (row >= a.total) return;
  const int lane = thread_index() % 32;
  const int64_t query = row % a.queries, head = row / a.queries % a.heads, batch = row / a.queries / a.heads;
  const T* grad = static_cast<const T*>(a.grad.data) + batch * a.grad.batch_stride +
                  query * a.grad.row_stride + head * a.grad.head_stride;
  const T* out = static_cast<const T*>(a.out) + ((batch * a.queries + query) * a.heads + head) * a.dim;
  float sum = 0;
  for (int c = lane; c < a.dim; c += 32) sum += to_float(grad[c]) * to_float(out[c]);
  sum = warp_sum(sum);
  if (lane == 0) a.delta[row] = a.scale * sum;
}

}  // namespace

const char* attention_delta(const AttentionShape& s, const Rows& grad, const void* out, float* delta,
                            void* stream) {
  const int64_t rows = s.batch * s.heads * s.queries;
  const DeltaArguments a{grad, out, delta, s.queries, s.heads, rows, s.dim, s.scale};
  const auto run = [&](auto kernel) { return launch(kernel, (rows + 7) / 8, 256, 0, stream, a); };
  if (s.type == Type::f32) return run(delta_kernel<float>);
  if (s.type == Type::f16) return run(delta_kernel<Float16>);
  return run(delta_kernel<Bfloat16>);
}

}  // namespace depict::cuda
