"""Backend ``cpp``: C++ kernels for the CPU (csrc/cpu). Modules have the stems of ``depict_kernels.ops``."""
