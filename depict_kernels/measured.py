"""What ``auto`` takes on a GPU, written by ``benchmarks/choose.py``: nothing yet, no GPU has run the kernels."""

# architecture -> operator -> dtype -> class of shapes -> backends, the fastest first, none where stock is
# the fastest; a class that is not here was not measured. And the record that says so
AUTO: dict[str, dict[str, dict[str, dict[str, tuple[str, ...]]]]] = {}
SOURCES: dict[str, str] = {}
# architecture -> direction of the CUDA attention -> the head_dim from which on its wgmma variant is faster
WGMMA_FROM_HEAD_DIM: dict[str, dict[str, int]] = {}
