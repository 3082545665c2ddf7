// What the bindings of the CUDA kernels share: the checks that memory safety needs, and nothing else.
// Everything a user should be told about is checked in Python, where ValueError and TypeError exist. Only
// torch's stable interface is used, so that one binary serves every torch from the target version on.
//
// Compiled with DEPICT_EMULATE they register the same operators for CPU tensors, on kernels that run in
// cuda/emulator.h. The stream is an argument: torch's C interface to the current stream is in its CUDA
// library, which would keep this one from loading where there is none.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "cuda/types.h"

#ifdef DEPICT_EMULATE
#define DEPICT_CUDA_LIBRARY depict_kernels_cuda_emulated
#define DEPICT_CUDA_KEY CPU
#else
#define DEPICT_CUDA_LIBRARY depict_kernels_cuda
#define DEPICT_CUDA_KEY CUDA
#endif

namespace depict::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Sets the tensor's device for the launches that follow.
class Device {
 public:
#ifdef DEPICT_EMULATE
  explicit Device(const Tensor&) {}
#else
  explicit Device(const Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline bool on_device(const Tensor& tensor) {
#ifdef DEPICT_EMULATE
  return tensor.is_cpu();
#else
  return tensor.is_cuda();
#endif
}

inline Type type_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

// Checks device, dtype and shape; -1 in `shape` takes any size.
inline void check(const Tensor& tensor, const char* name, ScalarType type,
                  std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(
      on_device(tensor) && tensor.scalar_type() == type && tensor.dim() == static_cast<int64_t>(shape.size()),
      name, " has the wrong device, dtype or number of dimensions");
  int64_t i = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(size < 0 || tensor.size(i) == size, name, " has size ", tensor.size(i), " in dimension ",
                    i, ", expected ", size);
    ++i;
  }
}

inline void check_contiguous(const Tensor& tensor, const char* name, ScalarType type,
                             std::initializer_list<int64_t> shape) {
  check(tensor, name, type, shape);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_launch(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "depict_kernels: a CUDA kernel failed: ", error ? error : "");
}

}  // namespace depict::cuda
