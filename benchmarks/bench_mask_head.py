"""The mask head: cosines and LayerNorm over the classes."""

FAMILY = "mask_head"


def test_mask_head(harness, benchmark, case, implementation):
    harness.measure(benchmark, case, implementation)
