"""Classes of shapes: within one of them ``auto`` takes one backend, on a GPU that of depict_kernels/measured.py.

A backend may be the fastest at one shape and slower than stock torch at another. What divides them is asked of
dimensions that a model fixes, and of image sizes only by thresholds far from the sizes in use: under torch.compile
a threshold on a dynamic dimension is one guard that every usual image passes, so that a new image size compiles
nothing anew. Batch, number of heads and number of queries divide nothing.

    attention     head_dim, exactly, and tokens (keys) up to 512 or over. Stock attention is fastest at multiples of 8
                  and worst just above 64 or 128, to which its kernels pad: a measurement at 100 says nothing of 96.
                  Few tokens are a matter of launches, many of arithmetic.
    mask head     number of classes, width of the embeddings and patches up to 1000 or over. Up to 32 classes are one
                  tile of the kernels, above 256 they no longer stay in registers; the wider the embeddings, the larger
                  the share of the matrix product, at which stock torch is good; few patches are a matter of launches.
    upsampling    number of classes, as above, and the factor, the smaller one of the two axes: up to 8, or over, where
                  a cell holds enough pixels for its series of exponentials to pay.

A shape outside of every class takes ``torch``, and so does one in a class that was not measured (in the upsample
operators a kernel that passed its check: depict_kernels/self_check.py), not what its nearest neighbour takes: at worst
that costs speed that nobody measured, while a neighbour's backend could be slower than stock, or run a configuration
of a kernel that no benchmark has checked. A shape that matters belongs into benchmarks/cases.py.
"""

from __future__ import annotations

HEAD_DIMS = (50, 100)  # the paper's, and benchmarks/cases.py's
MANY_TOKENS = 512
MANY_PATCHES = 1000
WIDE = 512
# Largest number of classes of each class but the last, the largest factor of the lower class, the least factor.
CLASSES = (32, 256)
HIGH_FACTOR, LEAST_FACTOR = 8, 2


def shape_class(operator: str, **sizes) -> str | None:
    """The class of a shape, or None outside of all of them. Sizes may be symbolic (torch.SymInt).

    Args:
        operator: a key of :data:`depict_kernels.backends.OPERATORS`.
        sizes: tokens, head_dim of attention (of cross-attention the keys are the tokens); classes, width, patches of
            the mask head; classes, grid (h, w), size (H, W) of the upsample operators.
    """
    if operator.startswith("subspace"):
        return _attention(**sizes)
    if operator == "mask_logits":
        return _mask_head(**sizes)
    return _upsample(**sizes)


def _attention(tokens: int, head_dim: int) -> str | None:
    # Compared, not formatted: a symbolic head_dim becomes a constant only where it is a known one.
    for known in HEAD_DIMS:
        if head_dim == known:
            return f"head_dim {known}, {_against(tokens, MANY_TOKENS)} tokens"
    return None


def _mask_head(classes: int, width: int, patches: int) -> str:
    return f"{_classes(classes)}, width {_against(width, WIDE)}, {_against(patches, MANY_PATCHES)} patches"


def _upsample(classes: int, grid: tuple[int, int], size: tuple[int, int]) -> str | None:
    if size[0] > HIGH_FACTOR * grid[0] and size[1] > HIGH_FACTOR * grid[1]:
        return f"{_classes(classes)}, factor over {HIGH_FACTOR}"
    if size[0] >= LEAST_FACTOR * grid[0] and size[1] >= LEAST_FACTOR * grid[1]:
        return f"{_classes(classes)}, factor {LEAST_FACTOR} to {HIGH_FACTOR}"
    return None


def _against(value: int, threshold: int) -> str:
    return f"over {threshold}" if value > threshold else f"up to {threshold}"


def _classes(count: int) -> str:
    few, many = CLASSES
    if count > many:
        return f"over {many} classes"
    return f"{few + 1} to {many} classes" if count > few else f"up to {few} classes"
