// Products of a warpgroup (128 threads, four consecutive warps) on Hopper's tensor cores, wgmma: here as PTX
// for sm_90a, below for the emulator (emulator_sm90.cpp). DEPICT_SM90 is defined where they exist: in the
// passes of nvcc for 9.0a and in the emulator.
//
// A tile in shared memory is made of core matrices of 8 rows x 8 16-bit columns, 128 contiguous bytes, 16 per
// row (the layout without swizzle). Its descriptor names the tile's start and two distances between
// neighbouring core matrices, all in units of 16 bytes: bits 0-13 start, 16-29 `leading`, 32-45 `stride`,
// 62-63 swizzle, 0. Rows along m or n, contiguous along k (K-major): `leading` steps along k, `stride` along
// m or n. Rows along k, contiguous along n (MN-major, Transposed below): `leading` steps along k too, to the
// next 8 rows, `stride` along n. So one tile is either with the two exchanged. (PTX ISA, "Strides" and
// "Matrix Descriptor Format" of wgmma; CUTLASS, mma_sm90_desc.hpp and make_gmma_desc, agree.)
//
// d (64 x N float32): warp w of the group, lane 4 g + t, holds in d[j] columns 8 j + 2 t and 8 j + 2 t + 1 of
// row 16 w + g, then of row 16 w + g + 8; a from registers (64 x 16) is, for each warp, the fragment of
// mma.sync.m16n8k16. Products run asynchronously, in order: between issue and wait nobody may touch d or a,
// or write to the tiles.
#pragma once

#include "device.h"

#if defined(DEPICT_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DEPICT_SM90
#endif

#ifdef DEPICT_EMULATE

namespace depict::emulated {

struct Product {
  float* d;  // this thread's columns / 2 accumulators
  int columns;
  bool bfloat16, transposed, add, a_is_shared;
  uint64_t a, b;  // descriptors
  uint32_t a_registers[4];
};
uint32_t shared_address(const void* tile);
void fence_products();
void issue_product(const Product& product);
void commit_products();
void wait_for_products(int groups_left);

}  // namespace depict::emulated

#endif

namespace depict::cuda {

#if defined(DEPICT_EMULATE)

inline uint32_t shared_address(const void* tile) { return emulated::shared_address(tile); }
// What this thread wrote to shared memory becomes visible to tensor cores; others need a barrier as well.
inline void fence_tensor_core_reads() { emulated::fence_tensor_core_reads(); }
template <class... Registers>
void fence_products(Registers&...) {
  emulated::fence_products();
}
inline void commit_products() { emulated::commit_products(); }
template <int GroupsLeft, class... Registers>
void wait_for_products(Registers&...) {
  emulated::wait_for_products(GroupsLeft);
}

template <class T, int N, bool Transposed, bool Add>
void multiply_shared(float (&d)[N / 8][4], uint64_t a, uint64_t b) {
  emulated::issue_product({&d[0][0], N, T::kBfloat16, Transposed, Add, true, a, b, {}});
}
template <class T, int N, bool Transposed, bool Add>
void multiply_registers(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b) {
  emulated::issue_product(
      {&d[0][0], N, T::kBfloat16, Transposed, Add, false, 0, b, {a[0], a[1], a[2], a[3]}});
}

#elif defined(DEPICT_SM90)

__device__ __forceinline__ uint32_t shared_address(const void* tile) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(tile));
}
__device__ __forceinline__ void fence_tensor_core_reads() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Keeps the compiler from moving a computation on the registers across this point, as the asm statements
// around it stay in order and nothing else tells it that a product is under way.
__device__ __forceinline__ void pin(uint32_t& value) { asm volatile("" : "+r"(value)::"memory"); }
__device__ __forceinline__ void pin(float& value) { asm volatile("" : "+f"(value)::"memory"); }
template <class T, int N>
__device__ __forceinline__ void pin(T (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) pin(values[i]);
}

// Orders the registers' earlier use before the products that follow: before the first one, and again where
// registers were read or written in between, but for one accumulator in products of one shape.
template <class... Registers>
__device__ __forceinline__ void fence_products(Registers&... registers) {
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits for all products but those of the last GroupsLeft groups; names the accumulators that are used next.
template <int GroupsLeft, class... Registers>
__device__ __forceinline__ void wait_for_products(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GroupsLeft) : "memory");
  (pin(registers), ...);
}

template <class T, int N>
struct Product;

// `registers` are the operand numbers of d, `at` that of the first operand after them and so on.
#define DEPICT_PRODUCT(T, type, N, registers, at, at1, at2, at3, at4, at5, at6, ...)                      \
  template <>                                                                                             \
  struct Product<T, N> {                                                                                  \
    template <bool Transposed, bool Add>                                                                  \
    static __device__ __forceinline__ void shared(float (&d)[N / 8][4], uint64_t a, uint64_t b) {         \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" at2 ", 0; wgmma.mma_async.sync.aligned.m64n" #N      \
                   "k16.f32." type "." type " {" registers "}, %" at ", %" at1 ", p, 1, 1, 0, %" at3 ";}" \
                   : __VA_ARGS__                                                                          \
                   : "l"(a), "l"(b), "n"(static_cast<int>(Add)), "n"(static_cast<int>(Transposed)));      \
    }                                                                                                     \
    template <bool Transposed, bool Add>                                                                  \
    static __device__ __forceinline__ void with_registers(float (&d)[N / 8][4], const uint32_t (&a)[4],   \
                                                          uint64_t b) {                                   \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" at5 ", 0; wgmma.mma_async.sync.aligned.m64n" #N      \
                   "k16.f32." type "." type " {" registers "}, {%" at ", %" at1 ", %" at2 ", %" at3       \
                   "}, %" at4 ", p, 1, 1, %" at6 ";}"                                                     \
                   : __VA_ARGS__                                                                          \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(static_cast<int>(Add)),      \
                     "n"(static_cast<int>(Transposed)));                                                  \
    }                                                                                                     \
  };
#define DEPICT_D(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define DEPICT_D4(j) DEPICT_D(j), DEPICT_D(j + 1), DEPICT_D(j + 2), DEPICT_D(j + 3)
#define DEPICT_28                                                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27"
#define DEPICT_32 DEPICT_28 ", %28, %29, %30, %31"
#define DEPICT_42 DEPICT_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41"
#define DEPICT_52 DEPICT_42 ", %42, %43, %44, %45, %46, %47, %48, %49, %50, %51"
#define DEPICT_64 DEPICT_52 ", %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DEPICT_PRODUCTS(T, type)                                                                  \
  DEPICT_PRODUCT(T, type, 56, DEPICT_28, "28", "29", "30", "31", "32", "33", "34", DEPICT_D4(0),  \
                 DEPICT_D(4), DEPICT_D(5), DEPICT_D(6))                                           \
  DEPICT_PRODUCT(T, type, 64, DEPICT_32, "32", "33", "34", "35", "36", "37", "38", DEPICT_D4(0),  \
                 DEPICT_D4(4))                                                                    \
  DEPICT_PRODUCT(T, type, 104, DEPICT_52, "52", "53", "54", "55", "56", "57", "58", DEPICT_D4(0), \
                 DEPICT_D4(4), DEPICT_D4(8), DEPICT_D(12))                                        \
  DEPICT_PRODUCT(T, type, 128, DEPICT_64, "64", "65", "66", "67", "68", "69", "70", DEPICT_D4(0), \
                 DEPICT_D4(4), DEPICT_D4(8), DEPICT_D4(12))
DEPICT_PRODUCTS(Bfloat16, "bf16")
DEPICT_PRODUCTS(Float16, "f16")
#undef DEPICT_PRODUCTS
#undef DEPICT_64
#undef DEPICT_52
#undef DEPICT_42
#undef DEPICT_32
#undef DEPICT_28
#undef DEPICT_D4
#undef DEPICT_D
#undef DEPICT_PRODUCT

// d (+)= a b^T, or a b where b is Transposed. Without Add d need not be initialised.
template <class T, int N, bool Transposed, bool Add>
__device__ __forceinline__ void multiply_shared(float (&d)[N / 8][4], uint64_t a, uint64_t b) {
  Product<T, N>::template shared<Transposed, Add>(d, a, b);
}
template <class T, int N, bool Transposed, bool Add>
__device__ __forceinline__ void multiply_registers(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b) {
  Product<T, N>::template with_registers<Transposed, Add>(d, a, b);
}

#endif

#ifdef DEPICT_SM90

// Distances in bytes, multiples of 16.
__device__ __forceinline__ uint64_t describe_tile(const void* tile, uint32_t leading, uint32_t stride) {
  const uint32_t start = (shared_address(tile) & 0x3ffff) >> 4;
  return static_cast<uint64_t>(stride >> 4) << 32 | (start | leading >> 4 << 16);
}
// The tile that starts `bytes` later. Never a carry: addresses are below 2^18.
__device__ __forceinline__ uint64_t step_tile(uint64_t tile, uint32_t bytes) {
  return (tile & 0xffffffff00000000u) | (static_cast<uint32_t>(tile) + (bytes >> 4));
}

#endif

}  // namespace depict::cuda
