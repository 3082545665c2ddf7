"""Fused kernels, models and reference mathematics of the DEPICT segmentation decoder."""

from depict_kernels import ops
from depict_kernels.backends import BackendUnavailable, use_backend
from depict_kernels.losses import UpsampleCrossEntropyLoss

__version__ = "0.1.0"

__all__ = ["BackendUnavailable", "UpsampleCrossEntropyLoss", "__version__", "ops", "use_backend"]
