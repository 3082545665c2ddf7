"""The specification: every operator's forward and backward as short formulas in plain torch, any dtype.

float16 and bfloat16 inputs are computed in float32 and rounded once at the end.
"""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 otherwise (numbers policy: accumulate in float32)."""
    return torch.float64 if dtype == torch.float64 else torch.float32
