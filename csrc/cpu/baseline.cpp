// What every processor of the architecture has: SSE2 on x86-64, NEON on aarch64.
#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__FMA__)
#include <immintrin.h>
#endif

#include <cstddef>
#include <cstdint>

#include "kernels.h"

#define DEPICT_ISA baseline
#define DEPICT_LANES 4
#if defined(__aarch64__)
#define DEPICT_PIXELS 16  // 32 vector registers
#else
#define DEPICT_PIXELS 8
#endif
#include "kernels_isa.h"

namespace depict::cpu {

static bool supported() { return true; }

extern const InstructionSet kBaseline{"baseline", supported, baseline::table<float>(),
                                      baseline::table<double>()};

}  // namespace depict::cpu
