"""Measured launch configurations, written by ``benchmarks/tune.py --write``: none yet, no GPU has run the kernels."""

# architecture -> key (see tuning.py) -> rows, columns, warps, stages
TUNED: dict[str, dict[str, tuple[int, int, int, int]]] = {}
