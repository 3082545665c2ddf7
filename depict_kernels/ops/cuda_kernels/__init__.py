"""Backend ``cuda``: allocates and calls the kernels of csrc/cuda. With DEPICT_KERNELS_EMULATE_CUDA=1, in a build that
has them for the emulator, it takes CPU tensors too: the same kernels, run on the CPU for tests."""
