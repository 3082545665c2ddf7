// What keeps the CUDA runtime, which is linked in, from running here (see bindings_cuda.h).
#include "bindings_cuda.h"

#ifndef DEPICT_EMULATE
#include <cuda_runtime_api.h>
#endif

#include <string>

namespace depict::cuda {
namespace {

// Empty where the driver is new enough. It may be older than the runtime within one major version.
std::string why_no_runtime() {
#ifndef DEPICT_EMULATE
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver), cudaRuntimeGetVersion(&runtime);
  const auto text = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  if (driver / 1000 < runtime / 1000)
    return "the CUDA kernels were built with CUDA " + text(runtime) + " and the driver supports CUDA " +
           text(driver) + "; update the driver or build with an older toolkit";
#endif
  return "";
}

}  // namespace
}  // namespace depict::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(DEPICT_CUDA_LIBRARY, m) { m.def("why_no_runtime() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(DEPICT_CUDA_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("why_no_runtime", TORCH_BOX(&depict::cuda::why_no_runtime));
}
