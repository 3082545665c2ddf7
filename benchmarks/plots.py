"""Plots of a record: speed-up bars, roofline, memory against resolution. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from benchmarks.cases import NOT_DIFFERENTIABLE
from benchmarks.goals import best, by_case, fastest
from benchmarks.implementations import AUTO, OURS, STOCK

COLOURS = {"eager": "#b0b0b0", "stock": "#4c72b0", "ours": "#c44e52"}


def draw(record: dict, stem: str, folder: Path) -> list[Path]:
    """Writes <stem>_{speedup,roofline,memory}.png where the record has the figures; gives the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, make in (("speedup", _speedup), ("roofline", _roofline), ("memory", _memory)):
        figure = make(record, plt)
        if figure is not None:
            path = folder / f"{stem}_{name}.png"
            figure.savefig(path, dpi=80, metadata={"Software": None})
            plt.close(figure)
            written.append(path)
    return written


def _time(row: dict) -> float:
    return row.get("quiet_ms") or row["median_ms"]


def speedups(record: dict) -> list[tuple[str, float, float | None]]:
    """(case, ratio of the best stock implementation to eager, ratio of our best to eager) per case."""
    result = []
    for rows in by_case(record).values():
        timed = [row for row in rows if row.get("median_ms")]
        eager = best(timed, ("eager",))
        stock = fastest(timed, STOCK[1:]) or eager
        ours = fastest(timed, (*OURS, *AUTO))
        if eager is None or (ours is None and stock is eager):
            continue
        ratio = lambda row, base=eager: row.get("ratio") or base["median_ms"] / row["median_ms"]
        result.append((short(rows[0]), ratio(stock), None if ours is None else ratio(ours)))
    return result


def short(row: dict) -> str:
    """A case in few words: operator, sizes, and what is unusual about it."""
    name = row["operator"].removeprefix("subspace_").removeprefix("upsample_")
    sizes = "x".join(str(size) for size in row["sizes"].values())
    notes = [] if row["dtype"] in ("bfloat16", "float32") else [row["dtype"]]
    if row["device"] == "cuda" and row["dtype"] == "float32":
        notes.append("float32")
    if row["passes"] == "fwd" and "argmax" not in name and "confusion" not in name:
        notes.append("fwd")
    return " ".join([name, sizes, *([row["label"]] if row.get("label") else []), *notes])


def _speedup(record: dict, plt):
    bars = speedups(record)
    if not bars:
        return None
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.3 * len(bars)), layout="constrained")
    places = range(len(bars))
    axes.barh(
        [i - 0.2 for i in places], [b[1] for b in bars], 0.38, color=COLOURS["stock"], label="best stock"
    )
    ours = [(i + 0.2, b[2]) for i, b in enumerate(bars) if b[2]]
    axes.barh([i for i, _ in ours], [r for _, r in ours], 0.38, color=COLOURS["ours"], label="depict_kernels")
    for place, ratio in [*((i - 0.2, b[1]) for i, b in enumerate(bars)), *ours]:
        axes.text(ratio * 1.03, place, f"{ratio:.3g}", va="center", fontsize=7)
    axes.axvline(1, color=COLOURS["eager"], linewidth=1)
    axes.set_yticks(list(places), [b[0] for b in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    ratios = [r for bar in bars for r in bar[1:] if r]
    axes.set_xlim(min(0.5, min(ratios) / 2), 2 * max(2, *ratios))
    axes.set_xlabel("times faster than plain eager torch")
    axes.set_title(record["environment"]["device"], fontsize=9)
    axes.legend(fontsize=8)
    return figure


def _roofline(record: dict, plt):
    machine = record.get("machine")
    # A label map needs few of the classes that its FLOPs count: it has no roof.
    counted = [r for r in record.get("operators", []) if r["operator"] not in NOT_DIFFERENTIABLE]
    rows = [r for r in counted if r.get("median_ms") and r.get("flops")]
    if not machine or not rows:
        return None
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    low, high = (f(r["flops"] / r["bytes"] for r in rows) for f in (min, max))
    span = [low / 3 * (3 * high / (low / 3)) ** (i / 60) for i in range(61)]
    for kind, rate in machine["flop_per_s"].items():
        roof = [min(rate, x * machine["copy_bytes_per_s"]) / 1e9 for x in span]
        axes.plot(span, roof, linewidth=1, color="black", alpha=0.6)
        axes.text(span[-1], roof[-1], kind, ha="right", va="bottom", fontsize=7)
    for kind, names in (("eager", ("eager",)), ("stock", STOCK[1:]), ("ours", (*OURS, *AUTO))):
        chosen = [r for r in rows if r["implementation"] in names]
        points = [(r["flops"] / r["bytes"], r["flops"] / (_time(r) / 1e3) / 1e9) for r in chosen]
        label = {"eager": "eager", "stock": "other stock", "ours": "depict_kernels"}[kind]
        axes.scatter(
            *(zip(*points) if points else ((), ())), s=16, color=COLOURS[kind], label=label, zorder=3
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte that must move")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"{record['environment']['device']}: measured copy bandwidth and matrix rates", fontsize=9)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def _memory(record: dict, plt):
    series: dict[str, list[tuple[int, float]]] = {}
    for row in record.get("operators", []):
        if row.get("growth") and row.get("peak_bytes"):
            point = (row["sizes"]["H"], max(1.0, row["peak_bytes"] / 2**20))  # below, it is the measurement
            series.setdefault(row["implementation"], []).append(point)
    series = {name: sorted(points) for name, points in series.items() if len(points) > 1}
    if not series:
        return None
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, points in series.items():
        axes.plot(*zip(*points), marker="o", label=name, color=COLOURS["eager"] if name == "eager" else None)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({size for points in series.values() for size, _ in points})
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.set_xlabel("side of the image, pixels (1 image, 150 classes, masks of 1/16)")
    axes.set_ylabel("extra peak memory of the loss, MiB (1: or less)")
    axes.set_title(record["environment"]["device"], fontsize=9)
    axes.legend(fontsize=8)
    return figure
