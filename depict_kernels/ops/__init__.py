"""The operators: one function each, every backend behind it. To learn one, read its stem in each folder."""

from depict_kernels.ops.attention import subspace_cross_attention, subspace_self_attention
from depict_kernels.ops.mask_head import mask_logits
from depict_kernels.ops.targets import default_ignore_index, raise_on_bad_target
from depict_kernels.ops.upsample import upsample_argmax, upsample_confusion, upsample_cross_entropy

__all__ = [
    "default_ignore_index",
    "mask_logits",
    "raise_on_bad_target",
    "subspace_cross_attention",
    "subspace_self_attention",
    "upsample_argmax",
    "upsample_confusion",
    "upsample_cross_entropy",
]
