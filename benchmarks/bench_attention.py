"""Subspace attention: the core of MSSA and MSCA against every stock attention kernel."""

FAMILY = "attention"


def test_attention(harness, benchmark, case, implementation):
    harness.measure(benchmark, case, implementation)
