"""Triton kernels (NVIDIA sm_80 and later, AMD), imported on first use; TRITON_INTERPRET=1 runs them on the CPU.

Not yet run on a GPU: tested in Triton's interpreter, and as PTX for sm_80 and sm_90 that tests/ptx executes.
"""
