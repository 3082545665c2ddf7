"""DEPICT and Segmenter: decoders, and whole models on any timm ViT."""

from depict_kernels.models.backbone import Backbone, PretrainedWeightsError
from depict_kernels.models.checkpoints import load_model, start_from
from depict_kernels.models.depict import DepictDecoder, SubspaceCrossAttention, SubspaceSelfAttention
from depict_kernels.models.factory import create_model, list_models
from depict_kernels.models.segmentation import SegmentationModel
from depict_kernels.models.segmenter import LinearDecoder, SegmenterDecoder
from depict_kernels.models.upstream import load_upstream_checkpoint, load_upstream_decoder

__all__ = [
    "Backbone",
    "DepictDecoder",
    "LinearDecoder",
    "PretrainedWeightsError",
    "SegmentationModel",
    "SegmenterDecoder",
    "SubspaceCrossAttention",
    "SubspaceSelfAttention",
    "create_model",
    "list_models",
    "load_model",
    "load_upstream_checkpoint",
    "load_upstream_decoder",
    "start_from",
]
