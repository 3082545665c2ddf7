// x86-64-v4. The instruction set is chosen here rather than by compiler flags, after every standard header:
// inline functions of those must stay usable on older processors.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace depict::cpu {

static bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

}  // namespace depict::cpu

#if defined(__clang__)
#pragma clang attribute push(                                                              \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,lzcnt"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,lzcnt")
#endif
#define DEPICT_ISA avx512
#define DEPICT_LANES 16
#define DEPICT_PIXELS 16
#include "kernels_isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace depict::cpu {

extern const InstructionSet kAvx512{"avx512", supported, avx512::table<float>(), avx512::table<double>()};

}  // namespace depict::cpu
#endif
