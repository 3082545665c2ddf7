"""What a trained decoder does to the embeddings of a split's images, and noise on its parameters to the scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from depict_kernels import analysis
from depict_kernels.models import SegmentationModel
from depict_kernels.ops import default_ignore_index
from train.windows import NotFinite, enlarged_size, normalised, resize_image, scaled_size


def patches_and_labels(model: SegmentationModel, image: Tensor, target: Tensor, cfg) -> tuple[Tensor, Tensor]:
    """One image's patch embeddings (1, N, D) and the annotated class at every patch's centre (N,).

    The image is resized as for evaluation; where that takes windows, it is the one in the middle.
    """
    size = scaled_size(tuple(image.shape[-2:]), cfg.resize)
    if cfg.mode == "slide":
        size = enlarged_size(size, cfg.window)
    pixels = normalised(resize_image(image, size), model)
    labels = F.interpolate(target[None, None].float(), size, mode="nearest-exact")[0, 0].long()
    if cfg.mode == "slide":
        top, left = ((side - cfg.window) // 2 for side in size)
        window = (..., slice(top, top + cfg.window), slice(left, left + cfg.window))
        pixels, labels = pixels[window], labels[window]
    height, width = labels.shape
    below, beside = (whole - side for whole, side in zip(model.padded_size(height, width), (height, width)))
    pixels = F.pad(pixels, (0, beside, 0, below))
    labels = F.pad(labels, (0, beside, 0, below), value=default_ignore_index(model.num_classes))
    p = model.patch_size
    return model.backbone(pixels[None]), labels[p // 2 :: p, p // 2 :: p].flatten()


@torch.no_grad()
def measure(
    model: SegmentationModel,
    dataset,
    cfg,
    count: int,
    *,
    amp_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Measures of the embeddings, means over ``count`` images spread evenly over ``dataset``; ``model`` evaluates.

    Image embeddings are taken as every layer normalises them first (LayerNorm, without its affine part), at length one.

    Returns:
        "embeddings": of what enters each self-attention layer and what leaves the last one: coding_rate,
        rate_reduction (None where no patch is annotated), effective_rank and cumulative_variance of the principal
        components. "layers": DEPICT's step sizes, and subspace_coding_rate of what enters and leaves each. "classes":
        coherence of the class embeddings that the mask head takes, their span_energy and best_span_energy in the image
        embeddings it takes. All by :mod:`depict_kernels.analysis`.
    """
    ignored = default_ignore_index(model.num_classes)
    device = next(model.parameters()).device
    depict_layers = getattr(model.decoder, "layers", ())
    count = min(count, len(dataset))
    bases = [analysis.subspace_bases(layer.proj, layer.num_heads) for layer in depict_layers]
    embeddings, rates, classes = [], [], []
    for i in range(count):
        image, target = dataset.read(i * len(dataset) // count)
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            patches, labels = patches_and_labels(model, image.to(device), target.to(device), cfg)
            stages, (images, queries) = analysis.layer_embeddings(model.decoder, patches)
        stages = [analysis.unit_length(F.layer_norm(x[0].double(), x.shape[-1:])) for x in stages]
        embeddings.append([_embedding_measures(z, labels, labels != ignored) for z in stages])
        rates.append(
            [
                [analysis.subspace_coding_rate(z, heads).item() for z in pair]
                for heads, pair in zip(bases, pairwise(stages))
            ]
        )
        share, best = analysis.span_energy(images[0], queries[0])
        classes.append((analysis.coherence(queries[0]).cpu(), share.item(), best.item()))
    coherence, share, best = (sum(values) / count for values in zip(*classes))
    return {
        "embeddings": [_mean_of(stage) for stage in zip(*embeddings)],
        "layers": [
            {"step": layer.step.item(), "subspace_coding_rate": np.mean(pairs, axis=0).tolist()}
            for layer, pairs in zip(depict_layers, zip(*rates))
        ],
        "classes": {"coherence": coherence.tolist(), "span_energy": share, "best_span_energy": best},
    }


def _embedding_measures(z: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Any]:
    shares = analysis.explained_variance(z)
    known = z[valid]
    reduction = (
        (analysis.coding_rate(known) - analysis.class_coding_rate(known, labels[valid])).item()
        if len(known)
        else None
    )
    return {
        "coding_rate": analysis.coding_rate(z).item(),
        "rate_reduction": reduction,
        "effective_rank": analysis.effective_rank(shares).item(),
        "cumulative_variance": shares.cumsum(0).tolist(),
    }


def _mean_of(measures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of what several images gave; None where none gave a number. Lists are cut to the shortest."""
    mean: dict[str, Any] = {}
    for key in measures[0]:
        values = [one[key] for one in measures if one[key] is not None]
        if values and isinstance(values[0], list):
            mean[key] = np.mean([list(row) for row in zip(*values)], axis=1).tolist()
        else:
            mean[key] = float(np.mean(values)) if values else None
    return mean


def noise_scores(
    model: SegmentationModel, sigmas: Sequence[float], repeats: int, score: Callable[[], float]
) -> list[dict[str, Any]]:
    """mIoU with Gaussian noise on the decoder's parameters: for each sigma {"sigma", "miou": of each draw, "broken"}.

    "broken" counts the draws that gave NaN or infinite masks: they label no pixel, so that their mIoU is 0.
    """
    rows = []
    for sigma in sigmas:
        scores, broken = [], 0
        for seed in range(repeats):
            with analysis.perturbed(model.decoder, sigma, seed):
                try:
                    scores.append(score())
                except NotFinite:
                    scores.append(0.0)
                    broken += 1
        rows.append({"sigma": sigma, "miou": scores, "broken": broken})
    return rows


def random_span(report: dict[str, Any]) -> float:
    """Share of any embeddings' energy that as many random directions as there are classes span, on the average."""
    return min(len(report["classes"]["coherence"]), report["width"]) / report["width"]


def random_coherence(width: int) -> float:
    """Mean |cosine| of random directions in ``width`` dimensions, nearly."""
    return math.sqrt(2 / (math.pi * width))


def mean_coherence(classes: dict[str, Any]) -> float | None:
    """Mean |cosine| of two different class embeddings; None where there is one class."""
    matrix = np.array(classes["coherence"])
    return float(matrix[~np.eye(len(matrix), dtype=bool)].mean()) if len(matrix) > 1 else None


def stage_names(report: dict[str, Any]) -> list[str]:
    count = len(report["embeddings"]) - 1
    return [*(f"into layer {i + 1}" for i in range(count)), f"after layer {count}"]


def lines(report: dict[str, Any]) -> list[str]:
    """The report for the console."""
    text = [
        f"  {'image embeddings':<18}{'coding rate':>12}{'reduction':>12}{'effective rank':>16}   of the layer: step, "
        "rate in its subspaces"
    ]
    for i, (name, stage) in enumerate(zip(stage_names(report), report["embeddings"])):
        reduction = "" if stage["rate_reduction"] is None else f"{stage['rate_reduction']:.2f}"
        row = f"  {name:<18}{stage['coding_rate']:>12.2f}{reduction:>12}{stage['effective_rank']:>16.1f}"
        if i < len(report["layers"]):
            layer = report["layers"][i]
            before, after = layer["subspace_coding_rate"]
            row += f"   {layer['step']:+.3f}, {before:.2f} -> {after:.2f}"
        text.append(row)
    classes = report["classes"]
    if (mean := mean_coherence(classes)) is not None:
        text.append(
            f"  class embeddings: mean |cosine| {mean:.3f}, random directions {random_coherence(report['width']):.3f}"
        )
    text.append(
        f"  their span holds {100 * classes['span_energy']:.1f} % of the image embeddings' energy, a random one "
        f"{100 * random_span(report):.1f} %, the best one {100 * classes['best_span_energy']:.1f} %"
    )
    text.append("  mIoU with Gaussian noise on the decoder's parameters, by its standard deviation")
    text.append(f"    {'none':<10}{report['miou']:.4f}")
    for row in report["noise"]:
        draws = ", ".join(f"{score:.4f}" for score in row["miou"])
        each = f"  ({draws})" if len(row["miou"]) > 1 else ""
        text.append(f"    {row['sigma']:<10g}{np.mean(row['miou']):.4f}{each}")
        if row["broken"]:
            text[-1] += (
                f"  NaN or infinite masks, which count as 0, in {row['broken']} of {len(row['miou'])} draws"
            )
    return text
