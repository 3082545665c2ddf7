// Element types of the CUDA kernels, as their host interfaces name them.
#pragma once

namespace depict::cuda {

enum class Type { f32, f16, bf16 };

}  // namespace depict::cuda
