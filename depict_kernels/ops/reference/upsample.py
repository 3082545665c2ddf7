"""What is computed from bilinearly upsampled logits (align_corners=False): loss, label map, confusion matrix.

The formulas, with the upsampled logits stored: the specification for the kernels that never store them. A label that is
neither a class nor ``ignore_index`` counts as ignored; what reads labels first returns the report of ops/targets.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from depict_kernels.ops.reference import accumulation_dtype
from depict_kernels.ops.targets import sanitize_target


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """logits (B, C, h, w) -> (B, C, H, W) in float32, or float64 for float64 logits."""
    logits = logits.to(accumulation_dtype(logits.dtype))
    if logits.shape[0] == 0:  # of no images the size may be 0, which F.interpolate refuses
        some = [max(1, pixels) for pixels in size]
        return F.interpolate(logits, some, mode="bilinear", align_corners=False)[..., : size[0], : size[1]]
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def upsample_backward(grad: Tensor, shape: torch.Size) -> Tensor:
    """The adjoint of :func:`upsample`: (B, C, H, W) -> (B, C, h, w)."""
    if shape[0] == 0:
        return grad.new_empty(shape)
    return torch.ops.aten.upsample_bilinear2d_backward(
        grad, list(grad.shape[-2:]), list(shape), False, None, None
    )


def _class_weight(weight: Tensor | None, z: Tensor) -> Tensor:
    return torch.ones(z.shape[1], dtype=z.dtype, device=z.device) if weight is None else weight.to(z.dtype)


def _loss_and_gradient(logits, target, weight, ignore_index, label_smoothing):
    """Per-pixel loss (B, H, W), its gradient for the upsampled logits, the weight w_y of each pixel, the report."""
    z = upsample(logits, target.shape[-2:])
    w = _class_weight(weight, z)
    clean, report = sanitize_target(target, z.shape[1], ignore_index)
    valid = (clean != ignore_index).unsqueeze(1)  # (B, 1, H, W)
    y = torch.where(valid, clean.unsqueeze(1), 0)
    log_p = z.log_softmax(1)
    w_y = torch.where(valid, w[y], 0)
    s, smooth = label_smoothing, label_smoothing / z.shape[1]
    w_c = w.view(1, -1, 1, 1)
    loss = -(1 - s) * w_y * log_p.gather(1, y)
    # d loss / d z_k = ((1-s) w_y + s W / C) softmax_k - (1-s) w_y [k = y] - s w_k / C
    grad = (1 - s) * w_y * log_p.exp()
    if s > 0:  # without smoothing an infinite weight counts only where its class occurs
        loss = loss - smooth * (w_c * log_p).sum(1, keepdim=True)
        grad = ((1 - s) * w_y + smooth * w.sum()) * log_p.exp() - smooth * w_c
    grad.scatter_add_(1, y, -(1 - s) * w_y)
    return torch.where(valid, loss, 0).squeeze(1), torch.where(valid, grad, 0), w_y.squeeze(1), report


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """logits (B, C, h, w), target (B, H, W) -> loss, for a scalar reduction its gradient (B, C, h, w), the report.

    Loss and gradient are float32 for 16-bit logits. "mean" divides by the summed weight of the valid
    pixels; where that is 0, loss and gradient are 0.
    """
    loss, grad, w_y, report = _loss_and_gradient(logits, target, weight, ignore_index, label_smoothing)
    if reduction == "none":
        return loss, None, report
    total = w_y.sum(dtype=torch.float64)
    divisor = torch.where(total == 0, torch.inf, total) if reduction == "mean" else torch.ones_like(total)
    value = (loss.sum(dtype=torch.float64) / divisor).to(loss.dtype)
    if not need_grad:
        return value, None, report
    return value, upsample_backward((grad / divisor).to(grad.dtype), logits.shape), report


def cross_entropy_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Gradient (B, C, h, w) of the unreduced loss for the upstream gradient (B, H, W)."""
    _, grad, _, _ = _loss_and_gradient(logits, target, weight, ignore_index, label_smoothing)
    return upsample_backward(grad_loss.unsqueeze(1).to(grad.dtype) * grad, logits.shape)


def argmax(logits: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(B, C, h, w) -> label map (B, H, W); ties go to the lowest class index, as in torch.argmax."""
    return upsample(logits, size).argmax(1).to(dtype)


def confusion(logits: Tensor, target: Tensor, ignore_index: int, out: Tensor) -> Tensor:
    """Adds the counts of (target, label) over the valid pixels into out (C, C) int64, rows = target; the report."""
    return count(argmax(logits, tuple(target.shape[-2:]), torch.int64), target, ignore_index, out)


def count(label: Tensor, target: Tensor, ignore_index: int, out: Tensor) -> Tensor:
    """Adds the counts of (target, label), both (B, H, W), over the valid pixels into out (C, C) int64; the report."""
    num_classes = out.shape[0]
    clean, report = sanitize_target(target, num_classes, ignore_index)
    if out.device.type == "cpu" and report[0] > 0:
        return report  # which raises there: nothing is added
    valid = clean != ignore_index
    pairs = clean[valid] * num_classes + label[valid]
    out += torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
    return report
