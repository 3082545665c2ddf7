"""The scale of the mask head's intermediate gradient in float16, whose range it would leave at either end.

t, the gradient of the products x q^T, is as small as the upstream gradient and as large as one over the norms of
patches and classes. Stored in 16 bits for the products that follow, it goes with a power of two per image, from a bound
of |t|: what that leaves below float16's normal range is too small for the image's gradients to show.
"""

import triton
import triton.language as tl


@triton.jit
def _finite(x):
    """x >= 0, and 0 in place of infinity and NaN."""
    return tl.where(x < float("inf"), x, 0.0)


@triton.jit
def mask_peak(
    grad_ptr,  # (B, C, N) contiguous
    weight_ptr,  # (C,)
    inv_x_ptr,  # (B, N)
    inv_q_ptr,  # (B, C)
    rstd_ptr,  # (B, N)
    peak_ptr,  # (B, blocks of patches) float32
    patch_count,
    class_count,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A bound of |t| over a block of patches; infinite and NaN values, whose gradients are lost anyway, do not count.

    t = rstd / (|x| |q|) (g - mean(g) - z mean(g z)) with g = grad weight. In brackets stands g without its part along
    the ones and, but for eps, along z: no longer than g, whose norm is at most sqrt(C) times its largest element.
    """
    blocks = tl.cdiv(patch_count, BLOCK_N)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    patches = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    patch_valid = patches < patch_count
    grad_ptr += batch * class_count * patch_count
    gradient = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    inv_norm = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, class_count, BLOCK_C):
        classes = start + tl.arange(0, BLOCK_C)
        valid = classes < class_count
        offset = classes.to(tl.int64)[:, None] * patch_count + patches[None, :]
        grad = tl.load(grad_ptr + offset, mask=valid[:, None] & patch_valid[None, :], other=0.0).to(
            tl.float32
        )
        weight = tl.load(weight_ptr + classes, mask=valid, other=0.0).to(tl.float32)
        gradient = tl.maximum(gradient, _finite(tl.abs(grad * weight[:, None])))
        inv_q = tl.load(inv_q_ptr + batch * class_count + classes, mask=valid, other=0.0)
        inv_norm = tl.maximum(inv_norm, _finite(inv_q))
    inv_x = tl.load(inv_x_ptr + batch * patch_count + patches, mask=patch_valid, other=0.0)
    rstd = tl.load(rstd_ptr + batch * patch_count + patches, mask=patch_valid, other=0.0)
    peak = tl.max(_finite(tl.max(gradient, 0) * rstd * inv_x), 0) * tl.max(inv_norm, 0)
    peak = tl.minimum(peak * tl.sqrt(tl.zeros((), tl.float32) + class_count), 1e38)
    tl.store(peak_ptr + tl.program_id(0), peak)


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scales(peak_ptr, blocks):
    """Powers of two: the one that brings an image's largest peak to between 2**14 and 2**15, and its inverse.

    float16 ends at 2**16. Within 2**-100 and 2**100, so that no product with it overflows.
    """
    peak = tl.zeros((64,), tl.float32)
    for start in range(0, blocks, 64):
        block = start + tl.arange(0, 64)
        peak = tl.maximum(peak, tl.load(peak_ptr + block, mask=block < blocks, other=0.0))
    exponent = 14 - ((tl.max(peak, 0).to(tl.int32, bitcast=True) >> 23) - 127)
    exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    return _power_of_two(exponent), _power_of_two(-exponent)
