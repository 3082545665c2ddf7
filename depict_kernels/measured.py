"""What ``auto`` takes on a GPU, written by ``benchmarks/choose.py``: nothing yet, no GPU has run the kernels."""

# architecture -> operator -> dtype -> class of shapes -> backends, the fastest first; and the record that says so
AUTO: dict[str, dict[str, dict[str, dict[str, tuple[str, ...]]]]] = {}
SOURCES: dict[str, str] = {}
