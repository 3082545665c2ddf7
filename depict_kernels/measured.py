"""What ``auto`` takes on a GPU, written by ``benchmarks/choose.py``: nothing yet, no GPU has run the kernels."""

# architecture -> operator -> dtype -> backend, and the record that says so
AUTO: dict[str, dict[str, dict[str, str]]] = {}
SOURCES: dict[str, str] = {}
