// x86-64-v3; see avx512.cpp.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace depict::cpu {

static bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

}  // namespace depict::cpu

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,lzcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,bmi2,lzcnt")
#endif
#define DEPICT_ISA avx2
#define DEPICT_LANES 8
#define DEPICT_PIXELS 8
#include "kernels_isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace depict::cpu {

extern const InstructionSet kAvx2{"avx2", supported, avx2::table<float>(), avx2::table<double>()};

}  // namespace depict::cpu
#endif
