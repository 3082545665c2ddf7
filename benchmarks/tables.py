"""Markdown tables of a record: for the README a selection, for the page beside the record everything."""

from __future__ import annotations

from benchmarks import goals
from benchmarks.end_to_end import EVALUATION, GRAPH, TRAINING
from benchmarks.implementations import OURS, STOCK
from benchmarks.plots import short

PARTS = {"training": TRAINING, "evaluation": EVALUATION}
ORDER = {"tiny": "ViT-T", "small": "ViT-S", "base": "ViT-B", "large": "ViT-L"}
KINDS = {"depict_sa": "DEPICT-SA", "depict_ca": "DEPICT-CA", "segmenter_mask": "Segmenter"}


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table with an empty line after it; nothing where there are no rows."""
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def ms(value: float | None) -> str:
    """Milliseconds with two to three digits; seconds above ten."""
    if value is None:
        return ""
    if value >= 1e4:
        return f"{value / 1e3:.1f} s"
    return f"{value:.0f} ms" if value >= 20 else f"{value:.1f} ms" if value >= 1 else f"{value:.3f} ms"


def mib(value: int | None) -> str:
    if value is None:
        return ""
    return "under 1 MiB" if value < 2**20 else f"{value / 2**20:.0f} MiB"


def machine_line(record: dict) -> str:
    where = record["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items() if v and k in ("torch", "triton"))
    day = where["date"][:10]
    parts = [where["device"], versions, f"commit {where['commit']}", day]
    if where.get("driver"):
        parts.insert(1, f"driver {where['driver']}")
    if "cuda" not in {row["device"] for row in record.get("operators", [])}:
        parts.insert(1, f"{where['threads']} threads")
    return "; ".join(parts)


def rows_of(record: dict, operator: str, **fields) -> list[dict]:
    rows = [row for row in record.get("operators", []) if row["operator"] == operator]
    return [row for row in rows if all(row.get(key) == value for key, value in fields.items())]


def _shape(row: dict) -> str:
    s = row["sizes"]
    return f"({s['B']}, {s['C']}, {s['h']}, {s['w']}) to ({s['H']}, {s['W']})"


# --- the CPU's tables ---


def cpu_loss(record: dict) -> list[str]:
    rows = []
    for row in rows_of(record, "upsample_cross_entropy", device="cpu", implementation="cpp"):
        if row.get("label") and row.get("ratio"):
            # errors of loss and gradient; the gradient's is what training sees
            error, other = row["error"][1], row["peer_error"][1]
            rows.append([
                f"{row['label']}: {_shape(row)}", ms(row["baseline_ms"]), ms(row["quiet_ms"]),
                f"{row['ratio']:.0f} ({row['median_ratio']:.0f})", f"{error:.1e} ({other:.1e})",
            ])  # fmt: skip
    head = ["against `F.interpolate` and `F.cross_entropy`, forward + backward", "stock", "`cpp`", "ratio"]
    return table([*head, "gradient error (stock's)"], rows)


def cpu_labels(record: dict) -> list[str]:
    rows = []
    for operator in ("upsample_argmax", "upsample_confusion"):
        what = operator.removeprefix("upsample_").replace("confusion", "confusion matrix")
        for row in rows_of(record, operator, device="cpu", implementation="cpp"):
            if row.get("ratio"):
                rows.append([
                    f"{what}, {row['label']}, {_shape(row)}", ms(row["baseline_ms"]), ms(row["quiet_ms"]),
                    f"{row['ratio']:.0f} ({row['median_ratio']:.0f})", str(row["mismatches"]),
                ])  # fmt: skip
    return table(
        ["against `F.interpolate` and `argmax`", "stock", "`cpp`", "ratio", "different labels"], rows
    )


def cpu_cores(record: dict) -> list[str]:
    """What ``auto`` takes C++ for on the CPU beside the upsample operators, against the fastest of stock torch."""
    names = {"subspace_self_attention": "self-attention", "mask_logits": "mask head"}
    rows = []
    for found in goals.by_case(record).values():
        kernel, stock = goals.fastest(found, ("cpp",)), goals.fastest(found, STOCK[1:])
        name = names.get(found[0]["operator"])
        if name is None or not (kernel and stock and stock.get("ratio")):
            continue
        name = f"{name} ({', '.join(map(str, found[0]['sizes'].values()))}), {found[0]['passes']}"
        best = f"{stock['ratio']:.2f} ({stock['implementation']})"
        rows.append([name, best, f"{kernel['ratio']:.2f}", f"{kernel['ratio'] / stock['ratio']:.2f}"])
    head = [
        "self-attention (B, N, H, d), mask head (B, C, h, w, D), times eager torch",
        "stock torch's fastest, uncompiled",
        "`cpp`",
        "quotient",
    ]
    return table(head, rows)


def kept_memory(record: dict) -> list[str]:
    """What eager torch gains where the allocator keeps freed memory: the ratio at eager torch's best."""
    found = []
    for row in record.get("operators", []):
        if kept := row.get("kept"):
            what = row["operator"].removeprefix("upsample_").replace("cross_entropy", "loss")
            times = f"{ms(kept['baseline_ms'])} against {ms(kept['quiet_ms'])}, ratio {kept['ratio']:.0f}"
            found.append(f"{what}, {row['label']}: {times}")
    if not found:
        return []
    return [
        "Much of stock torch's time is page faults of arrays that glibc maps afresh. With an allocator that keeps "
        "freed memory (`MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_` raised) the ratios are lower: "
        f"{'; '.join(found)}.",
        "",
    ]


def growth(record: dict) -> list[str]:
    """Time and memory of the loss against the side of the image."""
    found: dict[int, dict[str, dict]] = {}
    for row in rows_of(record, "upsample_cross_entropy", growth=True):
        if row["implementation"] in ("eager", *OURS):
            found.setdefault(row["sizes"]["H"], {})[row["implementation"]] = row
    names = [n for n in ("eager", *OURS) if any(n in v and v[n].get("median_ms") for v in found.values())]
    rows = []
    for size, ways in sorted(found.items()):
        cells = [f"{size} x {size}"]
        for name in names:
            row = ways.get(name, {})
            cells += [row.get("skipped", "") or ms(row.get("median_ms")), mib(row.get("peak_bytes"))]
        rows.append(cells)
    head = [f"{name}, {what}" for name in names for what in ("time", "extra peak memory")]
    return table(["loss, forward + backward, 1 image, 150 classes, masks of 1/16", *head], rows)


RATIO = (
    "A ratio to eager (times eager) is the median over the quietest third of interleaved rounds, each set against the "
    "eager run beside it; the plain medians are over all rounds, so that their quotient is another number."
)


def _without_upsampling(record: dict) -> list[list[dict]]:
    """The rows of each case of attention, mask head and decoder on the CPU."""
    cases = goals.by_case(record).values()
    return [c for c in cases if c[0]["device"] == "cpu" and not c[0]["operator"].startswith("upsample")]


def _auto(rows: list[dict]) -> dict | None:
    """What ``auto`` takes on the CPU for a case: where it was not timed itself, stock operators."""
    return goals.fastest(rows, ("auto",)) or goals.fastest(rows, ("torch",))


def cores(record: dict) -> list[str]:
    """Attention, mask head and decoder on the CPU: eager, stock operators, C++ and what ``auto`` takes."""
    rows = []
    for found in _without_upsampling(record):
        eager, stock = goals.best(found, ("eager",)), goals.fastest(found, STOCK[1:])
        kernel, auto = goals.fastest(found, ("cpp",)), _auto(found)
        if eager is None or auto is None or not auto.get("ratio"):
            continue
        best = f"{stock['ratio']:.2f} ({stock['implementation']})" if stock else "eager alone was timed"
        ours = f"{kernel['ratio']:.2f}" if kernel else "no kernel"
        name = f"{short(found[0]).removesuffix(' fwd')}, {found[0]['passes']}"
        rows.append([name, ms(eager["median_ms"]), best, ours, f"{auto['ratio']:.2f}"])
    head = [
        "attention, mask head, decoder (float32)",
        "eager",
        "best stock, times eager",
        "`cpp`, times eager",
        "`auto`, times eager",
    ]
    return table(head, rows)


def slower_than_eager(record: dict) -> list[str]:
    """Of these, where what ``auto`` takes on the CPU is slower than plain eager torch."""
    found = [(rows[0], _auto(rows)) for rows in _without_upsampling(record)]
    return [
        f"{case['operator']} {case['passes']} ({taken['ratio']:.2f})"
        for case, taken in found
        if taken and taken.get("ratio", 1) < 1
    ]


# --- end to end ---


def _label(row: dict) -> str:
    kind, size = row["model"].split("_vit_")
    return f"{KINDS[kind]} {ORDER[size]}, batch {row['batch']}, {row['size']} x {row['size']}"


def _rank(row: dict) -> tuple:
    kind, size = row["model"].split("_vit_")
    return (list(ORDER).index(size), list(KINDS).index(kind), row["size"], row["batch"], row["classes"])


def whole_models(record: dict, mode: str, device: str) -> list[dict[str, dict]]:
    """Per model its rows by way, in the order of size and kind; on a CPU with one figure for what is the same code."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in record.get("models", []):
        if (
            row["mode"] == mode
            and row["device"] == device
            and not row.get("growth")
            and row.get("backbone_ms")
        ):
            groups.setdefault(_rank(row), {})[row["way"]] = row
    found = [ways for _, ways in sorted(groups.items()) if "eager" in ways and fastest(ways)]
    return [same_code(ways, mode) for ways in found] if device == "cpu" else found


def same_code(ways: dict[str, dict], mode: str) -> dict[str, dict]:
    """Backbone and optimizer are one code in every way: the smallest of their times stands for all of them.

    Where a step takes seconds and is run a few times on a shared machine, their noise would hide what differs.
    """
    shared = {f"{part}_ms" for part in PARTS[mode]} & {"backbone_ms", "optimizer_ms"}
    least = {key: min(row[key] for row in ways.values()) for key in shared}
    result = {}
    for way, row in ways.items():
        row = row | least
        row["total_ms"] = sum(row[f"{part}_ms"] for part in PARTS[mode])
        result[way] = row | {"images_per_s": 1e3 * row["batch"] / row["total_ms"]}
    return result


def unsteady(record: dict, device: str) -> float:
    """How many times longer the same backbone took in one way than in another, at most."""
    backbones: dict[tuple, list[float]] = {}
    for row in record.get("models", []):
        if row["device"] == device and row.get("backbone_ms"):
            backbones.setdefault((row["mode"], *_rank(row)), []).append(row["backbone_ms"])
    return max((max(times) / min(times) for times in backbones.values()), default=1.0)


def end_to_end(record: dict, mode: str, device: str) -> list[str]:
    """Eager torch against ``auto`` and, where measured, each backend: time, shares of the parts, memory."""
    head = [
        "training step" if mode == "training" else "evaluation",
        "eager torch",
        "ours",
        "ratio",
        "images/s",
    ]
    memory = device == "cuda" and mode == "training"
    rows = []
    for ways in whole_models(record, mode, device):
        eager, ours = ways["eager"], fastest(ways)
        row = [_label(eager), _with_shares(eager, mode), _with_shares(ours, mode)]
        row += [f"{eager['total_ms'] / ours['total_ms']:.2f}"]
        row += [f"{eager['images_per_s']:.3g} to {ours['images_per_s']:.3g}"]
        rows.append([*row, *([f"{mib(eager['peak_bytes'])} to {mib(ours['peak_bytes'])}"] if memory else [])])
    return table([*head, *(["extra peak memory"] if memory else [])], rows)


def fastest(ways: dict[str, dict]) -> dict | None:
    """The fastest of our ways, which on a GPU may be a backend that ``auto`` does not take yet."""
    return min(
        (r for n, r in ways.items() if n in (*OURS, "auto")), key=lambda r: r["total_ms"], default=None
    )


def _with_shares(row: dict, mode: str) -> str:
    shares = " / ".join(f"{100 * row[f'{part}_ms'] / row['total_ms']:.0f}" for part in PARTS[mode])
    way = "" if row["way"] in ("eager", "auto") else f" (`{row['way']}`)"
    return f"{ms(row['total_ms'])}{way}: {shares} %"


def predictions(record: dict, device: str) -> list[str]:
    """``model.predict`` of small batches: the fastest of our ways with and without a CUDA graph."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in record.get("models", []):
        if row["mode"] == "prediction" and row["device"] == device and row.get("total_ms"):
            groups.setdefault(_rank(row), {})[row["way"]] = row
    rows = []
    for _, ways in sorted(groups.items()):
        eager, plain = ways.get("eager"), fastest(ways)
        graph = min(
            (row for way, row in ways.items() if way.endswith(GRAPH)),
            key=lambda r: r["total_ms"],
            default=None,
        )
        if not eager or not plain or not graph:
            continue
        cells = [ms(eager["total_ms"])]
        cells += [f"{ms(r['total_ms'])} (`{r['way'].removesuffix(GRAPH)}`)" for r in (plain, graph)]
        ratios = [f"{eager['total_ms'] / r['total_ms']:.2f}" for r in (plain, graph)]
        rows.append([_label(eager), *cells, *ratios])
    head = ["prediction", "eager torch", "ours", "ours as a CUDA graph", "ratio", "ratio as a graph"]
    return table(head, rows)


def model_growth(record: dict, device: str) -> list[str]:
    groups: dict[tuple, dict[str, dict]] = {}
    for row in record.get("models", []):
        if row.get("growth") and row["mode"] == "training" and row["device"] == device:
            groups.setdefault((row["size"], row["batch"], row["classes"]), {})[row["way"]] = row
    rows = []
    for (_, _, classes), ways in sorted(groups.items()):
        eager, ours = (
            ways.get("eager", {}),
            fastest({n: r for n, r in ways.items() if r.get("total_ms")}) or {},
        )
        cells = [f"{_label(next(iter(ways.values())))}, {classes} classes"]
        for row in (eager, ours):
            cells += [row.get("skipped", "") or ms(row.get("total_ms")), mib(row.get("peak_bytes"))]
        rows.append(cells)
    return table(["training step", "eager", "peak memory", "ours", "peak memory"], rows)


# --- what a session of pytest prints ---


def session(rows: list[dict], models: list[dict]) -> list[str]:
    """Aligned lines: what was timed beside eager torch. Eager has a line of its own where nothing stands beside it."""
    body = []
    for case, found in goals.by_case({"operators": rows}).items():
        timed = [row for row in found if row.get("median_ms") is not None]
        eager = goals.best(timed, ("eager",))
        for row in [row for row in timed if row is not eager] or timed:
            base = row.get("baseline_ms") or (eager or {}).get("median_ms")
            time = row.get("quiet_ms") or row["median_ms"]
            body.append((case, row["implementation"], time, base, row.get("ratio") or (base and base / time)))
    for row in models:
        if row.get("total_ms") is None or row["way"] == "eager":
            continue
        key = ("model", "mode", "size", "batch", "classes", "device")
        same = [r for r in models if r["way"] == "eager" and all(r[k] == row[k] for k in key)]
        base = same[0].get("total_ms") if same else None
        body.append((
            f"{_label(row)}, {row['mode']}, {row['device']}", row["way"], row["total_ms"], base,
            base and base / row["total_ms"],
        ))  # fmt: skip
    if not body:
        return []
    lines = [("case", "implementation", "time", "eager", "times eager")]
    lines += [(c, name, ms(t), ms(base), f"{ratio:.3g}" if ratio else "") for c, name, t, base, ratio in body]
    widths = [max(map(len, column)) for column in zip(*lines)]
    align = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust)
    return ["  ".join(f(cell, w) for f, cell, w in zip(align, line, widths)).rstrip() for line in lines]


# --- everything ---


def shares(row: dict, machine: dict | None) -> tuple[float, float] | None:
    """(share of the measured copy bandwidth, of the measured matrix rate) that a row's compulsory work reaches."""
    time = row.get("graph_median_ms") or row.get("quiet_ms") or row.get("median_ms")
    if not machine or not time or not row.get("flops"):
        return None
    rates = machine["flop_per_s"]
    # The upsample operators compute in float32 whatever the logits' dtype, and not in matrix products.
    kind = "float32" if row["operator"].startswith("upsample") else row["dtype"]
    rate = rates.get(kind, rates["float32"])
    return row["bytes"] / (time / 1e3) / machine["copy_bytes_per_s"], row["flops"] / (time / 1e3) / rate


def everything(record: dict) -> list[str]:
    lines = []
    for case, rows in goals.by_case(record).items():
        body = []
        eager = goals.best(rows, ("eager",))
        for row in rows:
            if reason := row.get("skipped") or row.get("wrong") or row.get("failed"):
                body.append([row["implementation"], reason.replace("|", "/"), "", "", "", "", "", ""])
                continue
            if row.get("median_ms") is None and row.get("quiet_ms") is None:
                continue
            ratio = row.get("ratio") or (eager["median_ms"] / row["median_ms"] if eager else None)
            reached = shares(row, record.get("machine"))
            spread = f"{ms(row['q1_ms'])} to {ms(row['q3_ms'])}" if "q1_ms" in row else ""
            body.append([
                row["implementation"], ms(row.get("median_ms") or row.get("quiet_ms")), spread,
                ms(row.get("graph_median_ms")) or row.get("graph_refused", ""),
                f"{ratio:.2f}" if ratio else "", mib(row.get("peak_bytes")),
                *(f"{100 * r:.1f}" if reached else "" for r in (reached or (0, 0))),
            ])  # fmt: skip
        if body:
            head = ["implementation", "median", "quartiles", "CUDA graph", "times eager", "extra peak memory"]
            head += ["% of copy bandwidth", "% of matrix rate"]
            lines += [f"### {case}", "", *table(head, body)]
    return lines


def page(record: dict, stem: str) -> str:
    """All of a record as Markdown."""
    lines = [f"# {stem}", "", machine_line(record), ""]
    lines += [f"`{command}`" for command in record["environment"].get("commands", [])] + [""]
    if note := record["environment"].get("note"):
        lines += [f"Note: {note}.", ""]
    if machine := record.get("machine"):
        rates = ", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in machine["flop_per_s"].items())
        lines += [f"Measured here: copy {machine['copy_bytes_per_s'] / 1e9:.4g} GB/s; products {rates}.", ""]
    for name, part in record.get("parts", {}).items():
        lines += [f"- {name}: exit status {part['status']}, {part['seconds']:.0f} s: {part['summary']}"]
    if any(row.get("ratio") for row in record.get("operators", [])):
        lines += ["", RATIO]
    lines += ["", *goal_table(record)]
    lines += cores(record)
    for device in ("cpu", "cuda"):
        for mode, parts in PARTS.items():
            if body := end_to_end(record, mode, device):
                lines += [f"Shares: {' / '.join(parts)}.", "", *body]
        lines += predictions(record, device)
        lines += model_growth(record, device)
    for row in record.get("models", []):
        if reason := row.get("skipped") or row.get("failed"):
            lines.append(
                f"- {_label(row)}, {row['mode']}, {row['classes']} classes, `{row['way']}`: {reason}"
            )
    return "\n".join([*lines, "", *growth(record), *everything(record)]).rstrip() + "\n"


def goal_table(record: dict) -> list[str]:
    words = {True: "met", False: "**not met**", None: "not measured"}
    rows = [[v.goal, v.found if v.met is not None else "", words[v.met]] for v in goals.verdicts(record)]
    return table(["goal", "found", ""], rows)
