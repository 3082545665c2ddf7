"""The picture of :mod:`train.analysis`'s report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from train.analysis import mean_coherence, random_coherence, stage_names
from train.plots import BLUE, DARK, GREEN, ORANGE, new_axes
from train.predict import short_name


def analysis_figure(report: dict[str, Any], names: Sequence[str], title: str) -> Figure:
    """Coding rates and variance layer by layer, coherence of the class embeddings, scores against noise."""
    figure = Figure(figsize=(12.5, 9.6), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    grid = figure.add_gridspec(2, 2)
    _draw_rates(new_axes(figure, grid[0, 0]), report)
    _draw_variance(new_axes(figure, grid[0, 1]), report)
    _draw_coherence(figure, figure.add_subplot(grid[1, 0]), report["classes"], report["width"], names)
    _draw_noise(new_axes(figure, grid[1, 1]), report)
    return figure


def _draw_rates(axes: Axes, report: dict[str, Any]) -> None:
    stages = stage_names(report)
    at = np.arange(len(stages))
    for key, name, colour in (
        ("coding_rate", "coding rate", BLUE),
        ("rate_reduction", "reduction by annotated class", ORANGE),
    ):
        values = [np.nan if stage[key] is None else stage[key] for stage in report["embeddings"]]
        axes.plot(at, values, color=colour, linewidth=2, marker="o", label=name)
    for i, layer in enumerate(report["layers"]):
        label = "rate in each layer's subspaces, before and after it" if i == 0 else None
        axes.plot(
            at[i : i + 2], layer["subspace_coding_rate"], color=GREEN, linewidth=2, marker="o", label=label
        )
    axes.set_xticks(at, stages)
    axes.set_ylim(0, 1.08 * axes.dataLim.y1 or 1)
    axes.set_ylabel("nats")
    axes.set_title("Coding rate of the image embeddings", loc="left", fontweight="bold")
    axes.legend(frameon=False, fontsize=9)


def _draw_variance(axes: Axes, report: dict[str, Any]) -> None:
    stages = list(zip(stage_names(report), report["embeddings"]))
    for i, (name, stage) in enumerate(stages):
        shares = stage["cumulative_variance"]
        colour = ORANGE if i == len(stages) - 1 else BLUE
        strength = 1.0 if i == len(stages) - 1 else 0.35 + 0.65 * i / len(stages)
        label = f"{name}: effective rank {stage['effective_rank']:.1f}"
        axes.plot(range(1, len(shares) + 1), shares, color=colour, alpha=strength, linewidth=2, label=label)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("principal components")
    axes.set_ylabel("share of the variance")
    axes.set_title("Principal components of the image embeddings", loc="left", fontweight="bold")
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def _draw_coherence(
    figure: Figure, axes: Axes, classes: dict[str, Any], width: int, names: Sequence[str]
) -> None:
    matrix = np.array(classes["coherence"])
    shown = axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if len(names) <= 25:
        labels = [short_name(name, 20) for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), labels, fontsize=8)
    else:
        axes.set_xlabel("class")
        axes.set_ylabel("class")
    figure.colorbar(shown, ax=axes, shrink=0.8).set_label("|cosine|")
    mean = mean_coherence(classes)
    told = (
        ""
        if mean is None
        else f"\nmean of different classes {mean:.2f}, random {random_coherence(width):.2f}"
    )
    axes.set_title(f"Class embeddings: orthogonal where white{told}", loc="left", fontweight="bold")


def _draw_noise(axes: Axes, report: dict[str, Any]) -> None:
    rows = sorted((row["sigma"], row["miou"]) for row in report["noise"] if row["sigma"] > 0)
    label = f"without noise: {100 * report['miou']:.1f} %"
    axes.axhline(report["miou"], color=DARK, linestyle=(0, (5, 3)), linewidth=1.4, label=label)
    if rows:
        sigmas = [sigma for sigma, _ in rows]
        means, draws = [np.mean(scores) for _, scores in rows], len(rows[0][1])
        label = f"mean of {draws} draws" if draws > 1 else "one draw"
        if any(row["broken"] for row in report["noise"]):
            label += "; 0 for NaN or infinite masks"
        axes.plot(sigmas, means, color=BLUE, linewidth=2, marker="o", label=label)
        if draws > 1:
            lowest, highest = zip(*((min(scores), max(scores)) for _, scores in rows))
            axes.fill_between(sigmas, lowest, highest, color=BLUE, alpha=0.15, label="their range")
        axes.set_xscale("log")
    axes.set_ylim(0, 1.08 * axes.dataLim.y1 or 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
    axes.set_xlabel("standard deviation of the noise on the decoder's parameters")
    axes.set_ylabel("mIoU (per cent)")
    axes.set_title("Robustness to noise", loc="left", fontweight="bold")
    axes.legend(frameon=False, fontsize=9, loc="lower left")
