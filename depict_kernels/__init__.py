"""Fused kernels, models and reference mathematics of the DEPICT segmentation decoder."""

import importlib

from depict_kernels import ops
from depict_kernels.backends import BackendUnavailable, use_backend
from depict_kernels.losses import UpsampleCrossEntropyLoss

__version__ = "0.1.0"

__all__ = ["BackendUnavailable", "UpsampleCrossEntropyLoss", "__version__", "models", "ops", "use_backend"]


def __getattr__(name: str):
    if name == "models":  # imports timm, which who wants the operators alone should not wait for
        return importlib.import_module("depict_kernels.models")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
