// The few device primitives that the CUDA kernels are written in: here as PTX, in emulator.h for the CPU.
//
// One-dimensional grids and blocks, dynamic shared memory only. Matrix fragments are those of PTX's
// mma.sync.m16n8k16 and m16n8k8: lane = 4 g + t holds of a (16 x k) rows g and g + 8, of b (k x 8) column g,
// of d (16 x 8) rows g and g + 8 at columns 2 t and 2 t + 1.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

#ifdef DEPICT_EMULATE
#include "emulator.h"
#else

#include <cuda_runtime.h>

#include <cstdio>

namespace depict::cuda {

using Stream = void*;  // a cudaStream_t

#ifdef __CUDACC__

__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int64_t block_index() { return blockIdx.x; }
__device__ __forceinline__ int thread_count() { return blockDim.x; }
__device__ __forceinline__ int64_t block_count() { return gridDim.x; }
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char depict_shared_memory[];
  return depict_shared_memory;
}
__device__ __forceinline__ void barrier() { __syncthreads(); }
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// Relative error 2^-22; flushes subnormal results.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_reciprocal(float x) {  // to an ulp
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Not contracted to a fused multiply-add with what follows: the same value wherever it is computed.
__device__ __forceinline__ float rounded_product(float x, float y) { return __fmul_rn(x, y); }

template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ __forceinline__ uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
__device__ __forceinline__ uint32_t match_any(uint32_t value) { return __match_any_sync(0xffffffffu, value); }
__device__ __forceinline__ int count_bits(uint32_t bits) { return __popc(bits); }
__device__ __forceinline__ int first_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

__device__ __forceinline__ int64_t atomic_add(int64_t* at, int64_t value) {
  return static_cast<int64_t>(
      atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value)));
}

__device__ __forceinline__ float bfloat16_to_float(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
__device__ __forceinline__ uint16_t float_to_bfloat16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ __forceinline__ float float16_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ __forceinline__ uint16_t float_to_float16(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
// Two values, the first in the lower half.
__device__ __forceinline__ uint32_t pack_bfloat16(float first, float second) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}
__device__ __forceinline__ uint32_t pack_float16(float first, float second) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}
__device__ __forceinline__ float round_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

// N (1, 2 or 4) words at once to global memory, at an address that their size divides. (As PTX: beside a
// branch that stores them one by one nvcc takes a vector apart.)
template <int N>
__device__ __forceinline__ void store_words(void* to, const uint32_t (&words)[N]) {
  static_assert(N == 1 || N == 2 || N == 4);
  const size_t address = __cvta_generic_to_global(to);
  if constexpr (N == 1) asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(words[0]) : "memory");
  if constexpr (N == 2)
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1]) : "memory");
  if constexpr (N == 4)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(words[0]), "r"(words[1]),
                 "r"(words[2]), "r"(words[3])
                 : "memory");
}

// Asynchronous copy of `size` (4, 8 or 16) bytes to shared memory, of which `bytes` are read, the rest zeros.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes, int size) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if (size == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
                 : "memory");
  else if (size == 8)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(address), "l"(from), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's copies but those of the last GroupsLeft groups. Others see them after a barrier.
template <int GroupsLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GroupsLeft) : "memory");
}

// N (2 or 4) 8 x 8 matrices of 16-bit values from shared memory; lane i names row i % 8 of matrix i / 8, 16
// bytes that are aligned to 16. Lane 4 g + t gets elements (g, 2 t) and (g, 2 t + 1), or of the transposed
// matrices.
template <int N, bool Transposed>
__device__ __forceinline__ void load_matrices(uint32_t* out, const void* row) {
  static_assert(N == 2 || N == 4);
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (N == 4 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  if constexpr (N == 4 && Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  if constexpr (N == 2 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address)
                 : "memory");
  if constexpr (N == 2 && Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address)
                 : "memory");
}

#define DEPICT_MMA_K16(name, type)                                                       \
  __device__ __forceinline__ void name(float* d, const uint32_t* a, const uint32_t* b) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                           \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"           \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                 \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));             \
  }
#define DEPICT_MMA_K8(name, type)                                                        \
  __device__ __forceinline__ void name(float* d, const uint32_t* a, const uint32_t* b) { \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." type "." type                            \
        ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                       \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                 \
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));                                              \
  }
DEPICT_MMA_K16(mma_bfloat16_k16, "bf16")
DEPICT_MMA_K16(mma_float16_k16, "f16")
DEPICT_MMA_K8(mma_bfloat16_k8, "bf16")
DEPICT_MMA_K8(mma_float16_k8, "f16")
#undef DEPICT_MMA_K16
#undef DEPICT_MMA_K8

__device__ __forceinline__ void mma_tf32_k8(float* d, const uint32_t* a, const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class T>
struct Same {
  using type = T;
};

// Why a block cannot get this much shared memory, which the runtime only calls an invalid argument.
inline const char* why_no_shared_memory(size_t bytes, cudaError_t error) {
  int device = 0, most = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess ||
      bytes <= static_cast<size_t>(most))
    return cudaGetErrorString(error);
  static thread_local char reason[160];
  std::snprintf(reason, sizeof(reason),
                "a block needs %zu bytes of shared memory and this GPU allows %d; use a 16-bit dtype or "
                "another backend",
                bytes, most);
  return reason;
}

// Null, or what went wrong. (Not <<< >>>, which formatters of C++ take apart.)
template <class... P>
const char* launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared_bytes, Stream stream,
                   typename Same<P>::type... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks > 2147483647) return "more than 2^31 - 1 blocks";
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return why_no_shared_memory(shared_bytes, error);
  }
  void* pointers[] = {&arguments...};
  const cudaError_t error = cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(threads),
                                             pointers, shared_bytes, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#endif  // __CUDACC__

}  // namespace depict::cuda

#endif  // DEPICT_EMULATE

namespace depict::cuda {

#if defined(__CUDACC__) || defined(DEPICT_EMULATE)

// 16-bit elements, by their bits.
struct Float16 {
  static constexpr bool kBfloat16 = false;
  uint16_t bits;
};
struct Bfloat16 {
  static constexpr bool kBfloat16 = true;
  uint16_t bits;
};

// Calls run(type), the element type in an Element.
template <class T>
struct Element {
  using type = T;
};
template <class Run>
__device__ __host__ __forceinline__ auto with_type(Type type, const Run& run) {
  if (type == Type::f32) return run(Element<float>{});
  if (type == Type::f16) return run(Element<Float16>{});
  return run(Element<Bfloat16>{});
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Float16 value) { return float16_to_float(value.bits); }
__device__ __forceinline__ float to_float(Bfloat16 value) { return bfloat16_to_float(value.bits); }

__device__ __forceinline__ uint32_t bits_of(float value) {
  union {
    float value;
    uint32_t bits;
  } both{value};
  return both.bits;
}

// Two values of a 16-bit type, the first in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  if constexpr (T::kBfloat16)
    return pack_bfloat16(first, second);
  else
    return pack_float16(first, second);
}

template <class T>
__device__ __forceinline__ void mma_k16(float* d, const uint32_t* a, const uint32_t* b) {
  if constexpr (T::kBfloat16)
    mma_bfloat16_k16(d, a, b);
  else
    mma_float16_k16(d, a, b);
}
template <class T>
__device__ __forceinline__ void mma_k8(float* d, const uint32_t* a, const uint32_t* b) {
  if constexpr (T::kBfloat16)
    mma_bfloat16_k8(d, a, b);
  else
    mma_float16_k8(d, a, b);
}

// A float32 value as the sum of two TF32 ones: products of both parts keep about float32's accuracy.
template <int N>
struct Split {
  uint32_t high[N], low[N];
  bool precise;

  __device__ __forceinline__ explicit Split(bool precise) : precise(precise) {}
  __device__ __forceinline__ void set(int i, float value) {
    const float rounded = round_tf32(value);
    high[i] = bits_of(rounded);
    low[i] = precise ? bits_of(round_tf32(value - rounded)) : 0u;
  }
};
// Tensor cores cut off what a sum has beyond float32 rather than round it: over a long reduction that always
// pulls towards zero, so every step's products are added outside of them.
__device__ __forceinline__ void mma_split(float* d, const Split<4>& a, const Split<2>& b) {
  if (a.precise) {
    float products[4] = {0, 0, 0, 0};
    mma_tf32_k8(products, a.low, b.high);
    mma_tf32_k8(products, a.high, b.low);
    mma_tf32_k8(products, a.high, b.high);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += products[i];
  } else {
    mma_tf32_k8(d, a.high, b.high);
  }
}

template <class T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else {
    T out;
    if constexpr (T::kBfloat16)
      out.bits = float_to_bfloat16(value);
    else
      out.bits = float_to_float16(value);
    return out;
  }
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}

#endif

}  // namespace depict::cuda
