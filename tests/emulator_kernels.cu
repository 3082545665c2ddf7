// Kernels for tests/test_cuda_emulator.py: some right, some with a planted error. Compiled for the emulator.
#include "cuda/device.h"

namespace depict::cuda {
namespace {

// out[i] = the next thread's index, through shared memory; without the barrier it needs where `broken`.
__global__ void neighbours(float* out, bool broken) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = thread_index(), n = thread_count();
  shared[i] = static_cast<float>(i);
  if (!broken) barrier();
  out[i] = shared[(i + 1) % n];
}

__global__ void divergent_warp(float* out) {
  const int lane = thread_index() % 32;
  if (lane < 16)
    out[lane] = shuffle(1.0f, 0);
  else
    out[lane] = shuffle_xor(1.0f, 1);
}

__global__ void half_a_warp(float* out) {
  if (thread_index() % 32 < 16) out[thread_index()] = shuffle_xor(1.0f, 1);
}

// Half of the block waits at a barrier, the other half for a warp that waits there.
__global__ void half_a_barrier(float* out) {
  if (thread_index() % 2) barrier();
  out[thread_index()] = warp_sum(1.0f);
}

__global__ void copy(const float* from, float* out, bool wait) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = thread_index();
  copy_async(shared + i, from + i, 4, 4);
  commit_copies();
  if (wait) wait_for_copies<0>();
  out[i] = shared[i];
  wait_for_copies<0>();
}

__global__ void never_waited(const float* from) {
  copy_async(shared_memory() + 4 * thread_index(), from, 4, 4);
  commit_copies();
}

__global__ void misaligned(const float* from) {
  copy_async(shared_memory() + 16 * thread_index(), from + 1, 16, 16);
  commit_copies();
  wait_for_copies<0>();
}

// out (16 x 8) = a (16 x 16) b (8 x 16)^T by fragments; b is given as it is or transposed (16 x 8).
template <class T, bool Transposed>
__global__ void product(const T* a, const T* b, float* out) {
  T* shared = reinterpret_cast<T*>(shared_memory());
  const int lane = thread_index();
  for (int i = lane; i < 256; i += 32) shared[i] = a[i];
  for (int i = lane; i < 128; i += 32) shared[256 + i] = b[i];
  barrier();
  uint32_t x[4], y[2];
  load_matrices<4, false>(x, shared + lane % 16 * 16 + lane / 16 * 8);
  if (Transposed)
    load_matrices<2, true>(y, shared + 256 + lane % 16 * 8);
  else
    load_matrices<2, false>(y, shared + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
  float d[4] = {0, 0, 0, 0};
  mma_k16<T>(d, x, y);
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// The same by two k8 steps: float32 as TF32.
__global__ void product_tf32(const float* a, const float* b, float* out) {
  const int lane = thread_index(), g = lane / 4, t = lane % 4;
  float d[4] = {0, 0, 0, 0};
  for (int k = 0; k < 16; k += 8) {
    uint32_t x[4], y[2];
    for (int i = 0; i < 4; ++i) x[i] = bits_of(round_tf32(a[(g + i % 2 * 8) * 16 + k + t + i / 2 * 4]));
    for (int i = 0; i < 2; ++i) y[i] = bits_of(round_tf32(b[g * 16 + k + t + 4 * i]));
    mma_tf32_k8(d, x, y);
  }
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = d[i];
}

}  // namespace
}  // namespace depict::cuda

// Null, or the emulator's error.
#define EXPORT extern "C" __attribute__((visibility("default"))) const char*
using namespace depict::cuda;
EXPORT run_neighbours(float* out, bool broken) {
  return launch(neighbours, 1, 64, 256, nullptr, out, broken);
}
EXPORT run_divergent_warp(float* out) { return launch(divergent_warp, 1, 32, 0, nullptr, out); }
EXPORT run_half_a_warp(float* out) { return launch(half_a_warp, 1, 32, 0, nullptr, out); }
EXPORT run_half_a_barrier(float* out) { return launch(half_a_barrier, 1, 64, 0, nullptr, out); }
EXPORT run_copy(const float* from, float* out, bool wait) {
  return launch(copy, 1, 32, 128, nullptr, from, out, wait);
}
EXPORT run_never_waited(const float* from) { return launch(never_waited, 1, 32, 128, nullptr, from); }
EXPORT run_misaligned(const float* from) { return launch(misaligned, 1, 32, 512, nullptr, from); }
EXPORT run_product(const void* a, const void* b, float* out, int type, bool transposed) {
  if (type == 0)
    return launch(product_tf32, 1, 32, 0, nullptr, static_cast<const float*>(a), static_cast<const float*>(b),
                  out);
  const auto run = [&](auto element) {
    using T = decltype(element);
    const T *x = static_cast<const T*>(a), *y = static_cast<const T*>(b);
    return transposed ? launch(product<T, true>, 1, 32, 768, nullptr, x, y, out)
                      : launch(product<T, false>, 1, 32, 768, nullptr, x, y, out);
  };
  return type == 1 ? run(Float16{}) : run(Bfloat16{});
}
