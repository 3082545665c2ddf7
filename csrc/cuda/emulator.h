// Runs CUDA kernels on the CPU, one fiber per CUDA thread, so that they can be tested without a GPU: the same
// source, compiled by the host's compiler with DEPICT_EMULATE. What it checks, it checks on purpose:
//
// - Shared memory is poisoned with NaN before every block.
// - Asynchronous copies land when they are waited for, not earlier.
// - Threads run until they must wait, in an order that DEPICT_EMULATE_SEED permutes: a missing barrier shows
//   as a result that depends on the seed.
// - A warp operation that not all lanes reach, or a barrier that not all threads reach, is an error.
// - Products of a warpgroup happen when they are waited for, and are errors where the memory they read
//   changes before that or was not made visible to them (emulator_sm90.cpp).
//
// It says nothing of speed. mma.sync cuts off as tensor cores do (add_products); wgmma, which serves 16-bit
// results alone, is summed in double.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace depict::emulated {

constexpr int kWarp = 32, kSlotBytes = 64;

struct alignas(16) Slot {
  unsigned char bytes[kSlotBytes];
};

int thread_index();
int64_t block_index();
int thread_count();
int64_t block_count();
unsigned char* shared_memory();
void barrier();
// Every lane of the calling warp hands in up to kSlotBytes bytes and sees what the others handed in.
const Slot* exchange(const void* in, int bytes, const char* what);
// bytes of zeros are appended up to `size`.
void copy_async(void* to, const void* from, int bytes, int size);
void commit_copies();
void wait_for_copies(int groups_left);
[[noreturn]] void fail(const char* what);

// What tensor cores that read shared memory need to know (device_sm90.h).
size_t shared_bytes();
void fence_tensor_core_reads();
bool fenced_and_published();  // a fence and then a barrier since this thread last waited for copies
struct Attachment {           // a thread's state, dropped before every block
  virtual ~Attachment() = default;
  virtual const char* unfinished() const = 0;  // what the thread may not end with, or null
};
std::unique_ptr<Attachment>& attachment(int thread);

struct Launch {
  const void* kernel;  // the host's function
  int64_t blocks;
  int threads;
  size_t shared_bytes;
  const void* const* arguments;
  const size_t* sizes;
  int count;
};

// Runs every block; returns the first error or null.
const char* run(const Launch& launch, const std::function<void()>& kernel);

}  // namespace depict::emulated

namespace depict::cuda {

using Stream = void*;

inline int thread_index() { return emulated::thread_index(); }
inline int64_t block_index() { return emulated::block_index(); }
inline int thread_count() { return emulated::thread_count(); }
inline int64_t block_count() { return emulated::block_count(); }
inline unsigned char* shared_memory() { return emulated::shared_memory(); }
inline void barrier() { emulated::barrier(); }
inline void warp_barrier() { emulated::exchange(nullptr, 0, "warp_barrier"); }

inline float fast_exp2(float x) { return __builtin_exp2f(x); }
inline float fast_log2(float x) { return __builtin_log2f(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }
inline float rounded_product(float x, float y) { return x * y; }

template <class T>
T read(const emulated::Slot& slot) {
  T value;
  std::memcpy(&value, slot.bytes, sizeof(T));
  return value;
}

template <class T>
T shuffle(T value, int lane) {
  return read<T>(emulated::exchange(&value, sizeof(T), "shuffle")[lane & 31]);
}
template <class T>
T shuffle_xor(T value, int mask) {
  const int lane = thread_index() % 32;
  return read<T>(emulated::exchange(&value, sizeof(T), "shuffle_xor")[lane ^ mask]);
}
inline uint32_t ballot(bool predicate) {
  const emulated::Slot* slots = emulated::exchange(&predicate, sizeof(bool), "ballot");
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(read<bool>(slots[i])) << i;
  return bits;
}
inline uint32_t match_any(uint32_t value) {
  const emulated::Slot* slots = emulated::exchange(&value, sizeof(value), "match_any");
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(read<uint32_t>(slots[i]) == value) << i;
  return bits;
}
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }
inline int first_bit(uint32_t bits) { return __builtin_ctz(bits); }  // bits != 0

inline int64_t atomic_add(int64_t* at, int64_t value) {
  const int64_t before = *at;
  *at += value;
  return before;
}

inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float float16_to_float(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &wide, 4);
  value *= 0x1p112f;  // the exponents' bias differs by 112; right for subnormal numbers too
  if ((bits & 0x7c00) == 0x7c00) value = bits & 0x3ff ? __builtin_nanf("") : __builtin_inff();
  return bits & 0x8000 ? -value : value;
}
inline uint16_t float_to_float16(float value) {
  const uint16_t sign = __builtin_signbit(value) ? 0x8000 : 0;
  const float size = __builtin_fabsf(value);
  if (value != value) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 6.103515625e-05f)  // subnormal: multiples of 2^-24
    return sign | static_cast<uint16_t>(__builtin_rintf(__builtin_ldexpf(size, 24)));
  int exponent;
  __builtin_frexpf(size, &exponent);  // size = m 2^exponent with m in [0.5, 1)
  const float scaled = __builtin_rintf(__builtin_ldexpf(size, 11 - exponent));  // in [1024, 2048]
  return sign | static_cast<uint16_t>(((exponent + 13) << 10) + static_cast<int>(scaled));
}

inline uint32_t pack_bfloat16(float first, float second) {
  return float_to_bfloat16(first) | static_cast<uint32_t>(float_to_bfloat16(second)) << 16;
}
inline uint32_t pack_float16(float first, float second) {
  return float_to_float16(first) | static_cast<uint32_t>(float_to_float16(second)) << 16;
}

inline float round_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0x1000) & 0xffffe000u;  // cvt.rna: half away from zero
  std::memcpy(&value, &bits, 4);
  return value;
}

template <int N>
void store_words(void* to, const uint32_t (&words)[N]) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(words) != 0) emulated::fail("a misaligned store");
  std::memcpy(to, words, sizeof(words));
}
inline void copy_async(void* to, const void* from, int bytes, int size) {
  emulated::copy_async(to, from, bytes, size);
}
inline void commit_copies() { emulated::commit_copies(); }
template <int GroupsLeft>
void wait_for_copies() {
  emulated::wait_for_copies(GroupsLeft);
}

// Four 8 x 8 matrices of 16-bit values; lane i names row i % 8 of matrix i / 8.
template <int N, bool Transposed>
void load_matrices(uint32_t* out, const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    emulated::fail("load_matrices: a row is not aligned to 16 bytes");
  const emulated::Slot* slots = emulated::exchange(&row, sizeof(row), "load_matrices");
  const int lane = thread_index() % 32;
  for (int m = 0; m < N; ++m)
    for (int half = 0; half < 2; ++half) {
      const int r = Transposed ? lane % 4 * 2 + half : lane / 4;
      const int c = Transposed ? lane / 4 : lane % 4 * 2 + half;
      uint16_t value;
      std::memcpy(&value, read<const char*>(slots[8 * m + r]) + 2 * c, 2);
      out[m] = half ? out[m] | static_cast<uint32_t>(value) << 16 : value;
    }
}

// sum + products as tensor cores of compute capability 8.0 add them (Fasi et al., "Numerical behavior of
// NVIDIA tensor cores", PeerJ CS 2021): what lies 24 bits below the largest of the five is cut off before the
// exact addition, and what the result has beyond 24 bits after it. Later ones keep a bit more of the
// products.
inline float add_products(float sum, const double (&products)[4]) {
  double largest = std::fabs(sum), all = sum;
  for (const double product : products) largest = std::fmax(largest, std::fabs(product)), all += product;
  if (!std::isfinite(all) || largest == 0) return static_cast<float>(all);
  uint64_t bits;
  std::memcpy(&bits, &largest, 8);
  bits &= uint64_t{0x7ff} << 52;  // the power of two that `largest` starts with
  double unit;
  std::memcpy(&unit, &bits, 8);
  unit *= 0x1p-24;
  const auto units = [per = 1 / unit](double value) { return static_cast<int64_t>(value * per); };
  int64_t count = units(sum);
  for (const double product : products) count += units(product);
  const double exact = static_cast<double>(count) * unit;
  std::memcpy(&bits, &exact, 8);
  bits &= ~uint64_t{0} << 29;
  double cut;
  std::memcpy(&cut, &bits, 8);
  return static_cast<float>(cut);
}

// d (16 x 8) += a (16 x 2 Pairs * 4) b, fragments as PTX defines them for mma.m16n8k16 and m16n8k8.
template <int Registers, class ToFloat>
void multiply(float* d, const uint32_t* a, const uint32_t* b, const ToFloat& to_float, const char* what) {
  uint32_t mine[Registers + Registers / 2];
  std::memcpy(mine, a, Registers * 4);
  std::memcpy(mine + Registers, b, Registers * 2);
  const emulated::Slot* slots = emulated::exchange(mine, sizeof(mine), what);
  const int lane = thread_index() % 32, group = lane / 4, within = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int upper = i / 2, column = 2 * within + i % 2;
    for (int block = 0; block < Registers / 2; ++block) {  // of 4 lanes' registers along k
      double products[4];
      for (int t = 0; t < 4; ++t) {
        uint32_t x, y;
        std::memcpy(&x, slots[group * 4 + t].bytes + 4 * (2 * block + upper), 4);
        std::memcpy(&y, slots[column * 4 + t].bytes + 4 * (Registers + block), 4);
        products[t] = to_float(x, y);
      }
      d[i] = add_products(d[i], products);
    }
  }
}

inline double product_bfloat16(uint32_t x, uint32_t y) {
  return static_cast<double>(bfloat16_to_float(x & 0xffff)) * bfloat16_to_float(y & 0xffff) +
         static_cast<double>(bfloat16_to_float(x >> 16)) * bfloat16_to_float(y >> 16);
}
inline double product_float16(uint32_t x, uint32_t y) {
  return static_cast<double>(float16_to_float(x & 0xffff)) * float16_to_float(y & 0xffff) +
         static_cast<double>(float16_to_float(x >> 16)) * float16_to_float(y >> 16);
}
inline double product_tf32(uint32_t x, uint32_t y) {
  float a, b;
  x &= 0xffffe000u, y &= 0xffffe000u;
  std::memcpy(&a, &x, 4), std::memcpy(&b, &y, 4);
  return static_cast<double>(a) * b;
}

inline void mma_bfloat16_k16(float* d, const uint32_t* a, const uint32_t* b) {
  multiply<4>(d, a, b, product_bfloat16, "mma_bfloat16_k16");
}
inline void mma_bfloat16_k8(float* d, const uint32_t* a, const uint32_t* b) {
  multiply<2>(d, a, b, product_bfloat16, "mma_bfloat16_k8");
}
inline void mma_float16_k16(float* d, const uint32_t* a, const uint32_t* b) {
  multiply<4>(d, a, b, product_float16, "mma_float16_k16");
}
inline void mma_float16_k8(float* d, const uint32_t* a, const uint32_t* b) {
  multiply<2>(d, a, b, product_float16, "mma_float16_k8");
}
inline void mma_tf32_k8(float* d, const uint32_t* a, const uint32_t* b) {
  multiply<4>(d, a, b, product_tf32, "mma_tf32_k8");
}

template <class... P, class... A>
const char* launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared_bytes, Stream,
                   A... arguments) {
  std::tuple<P...> parameters(arguments...);
  const auto addresses = std::apply(
      [](const P&... each) { return std::array<const void*, sizeof...(P)>{&each...}; }, parameters);
  constexpr std::array<size_t, sizeof...(P)> sizes{sizeof(P)...};
  const emulated::Launch all{reinterpret_cast<const void*>(kernel),
                             blocks,
                             threads,
                             shared_bytes,
                             addresses.data(),
                             sizes.data(),
                             sizeof...(P)};
  return emulated::run(all, [&] { std::apply(kernel, parameters); });
}

}  // namespace depict::cuda
