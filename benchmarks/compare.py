"""Two records side by side: which of our figures became slower, which faster, and how much the others moved.

Only our implementations get a verdict: that stock torch took longer says something about the machine. On the CPU a
figure is its ratio to eager torch, which ran between its rounds: a busier machine slows both. On a GPU it is a time.
"""

from __future__ import annotations

from benchmarks.implementations import AUTO, OURS
from benchmarks.tables import PARTS, ms, same_code, table

# CPU: slower below this share of the old ratio, over the quietest rounds and over all of them. On a shared machine of
# two cores, figures of unchanged code fell to 0.72 on both counts: of the 14 stock ones of the records 2026-11-24 and
# 24a two fell below 0.8, of 12 of ours that were timed twice in ten minutes one was at 0.72 in the worse order.
CPU_MARGIN = 0.7
GPU_MARGIN = 0.05  # GPU: longer by more than this, with the quartile ranges apart


def _key(row: dict) -> tuple:
    """What makes rows figures of one thing: the implementation or way is left out."""
    if "case" in row:
        return (row["case"],)
    return tuple(row.get(k) for k in ("model", "mode", "batch", "size", "classes", "device"))


def _way(row: dict) -> str:
    return row["implementation"] if "case" in row else row["way"]


def _name(row: dict) -> str:
    if "case" in row:
        return f"{row['case']} {row['implementation']}"
    return f"{row['model']} {row['mode']} B{row['batch']} {row['size']} C{row['classes']} {row['device']} {row['way']}"


def is_ours(row: dict) -> bool:
    return _way(row).partition(" (")[0] in (*OURS, *AUTO)  # "auto (CUDA graph)" too


def _time(row: dict) -> float | None:
    return row.get("graph_median_ms") or row.get("quiet_ms") or row.get("median_ms") or row.get("total_ms")


def _rows(record: dict) -> dict[str, dict]:
    """All rows by name; of whole models on the CPU with the ratio to eager, the shared code counted once."""
    rows = list(record.get("operators", []))
    models: dict[tuple, dict[str, dict]] = {}
    for row in record.get("models", []):
        models.setdefault(_key(row), {})[row["way"]] = row
    for ways in models.values():
        timed = {way: row for way, row in ways.items() if row.get("total_ms")}
        first = next(iter(ways.values()))
        if first["device"] == "cpu" and "eager" in timed:
            parts = PARTS.get(first["mode"], ())
            if parts and all(row.get("backbone_ms") for row in timed.values()):
                timed = same_code(timed, first["mode"])
            for way, row in timed.items():
                if way != "eager":
                    timed[way] = row | {"ratio": timed["eager"]["total_ms"] / row["total_ms"]}
        rows += (ways | timed).values()
    return {_name(row): row for row in rows}


def change(before: dict, after: dict) -> float | None:
    """How many times as fast as before: of the ratios to eager on the CPU, of the times on a GPU. None: no ratio."""
    if after["device"] == "cpu":
        return after["ratio"] / before["ratio"] if before.get("ratio") and after.get("ratio") else None
    return _time(before) / _time(after)


def _apart(before: dict, after: dict) -> bool:
    """Whether the quartile ranges are apart; rows without quartiles say nothing against a change."""
    prefix = "graph_" if "graph_q1_ms" in before and "graph_q1_ms" in after else ""
    low, high = f"{prefix}q1_ms", f"{prefix}q3_ms"
    if low not in before or low not in after:
        return True
    return before[high] < after[low] or after[high] < before[low]


def _broken(row: dict) -> bool:
    return bool(row.get("wrong") or row.get("failed"))


def _comparable(before: dict, after: dict) -> bool:
    if _time(before) is None:
        return False
    return (_broken(after) and is_ours(after)) or (
        _time(after) is not None and change(before, after) is not None
    )


def verdict(before: dict, after: dict) -> str:
    """Of one figure of ours: slower, faster, broken where it no longer runs, or nothing where noise explains it."""
    if _broken(after):
        return "broken"
    factor = change(before, after)
    if after["device"] == "cpu":
        factors = [factor]
        if before.get("median_ratio") and after.get("median_ratio"):
            factors.append(after["median_ratio"] / before["median_ratio"])
        if max(factors) < CPU_MARGIN:
            return "slower"
        return "faster" if min(factors) > 1 / CPU_MARGIN else ""
    if not _apart(before, after):
        return ""
    return "slower" if 1 / factor > 1 + GPU_MARGIN else "faster" if factor > 1 + GPU_MARGIN else ""


def compare(before: dict, after: dict) -> tuple[str, int]:
    """(Markdown, number of our figures that became slower or no longer run)."""
    old, new = _rows(before), _rows(after)
    timed = lambda row: _time(row) is not None
    both = [name for name in old if name in new and _comparable(old[name], new[name])]
    mine = [name for name in both if is_ours(old[name])]
    words = {name: verdict(old[name], new[name]) for name in mine}
    bad = sum(word in ("slower", "broken") for word in words.values())
    lines = [
        f"{len(mine)} figures of ours in both records, {bad} slower or broken.",
        *_differences(before, after),
    ]
    for device in ("cpu", "cuda"):
        here = [name for name in both if old[name]["device"] == device]
        lines += _of_device(device, here, old, new, words)
    for title, these, others in (("Only before", old, new), ("Only after", new, old)):
        only = [n for n, row in these.items() if timed(row) and n not in both]
        only = [n for n in only if n not in others or not timed(others[n])]
        if only:
            rest = f" and {len(only) - 4} more" if len(only) > 4 else ""
            lines += [f"{title}: {', '.join(sorted(only)[:4])}{rest}", ""]
    return "\n".join(lines).rstrip() + "\n", bad


def _differences(before: dict, after: dict) -> list[str]:
    first, second = (r["environment"] for r in (before, after))
    lines = []
    if first.get("device") != second.get("device"):
        lines.append(
            "**Two devices: these are differences of the machines first, and of the code only then.**"
        )
    for key in ("device", "commit", "threads"):
        if first.get(key) != second.get(key):
            lines.append(f"{key}: {first.get(key)}, then {second.get(key)}")
    versions = [e["versions"].get("torch") for e in (first, second)]
    if versions[0] != versions[1]:
        lines.append(f"torch: {versions[0]}, then {versions[1]}")
    return [*lines, ""]


def _of_device(device: str, names: list[str], old: dict, new: dict, words: dict[str, str]) -> list[str]:
    """Ours with verdicts, the worst first; then the others, whose changes are the noise, without."""
    cpu = device == "cpu"
    body, others = [], []
    for name in names:
        a, b = old[name], new[name]
        factor = None if _broken(b) else change(a, b)
        ratios = [f"{row['ratio']:.3g}" if row.get("ratio") else "" for row in (a, b)] if cpu else []
        cells = [name, *ratios, "" if factor is None else f"{factor:.2f}"]
        cells += [words.get(name, ""), ms(_time(a)), ms(_time(b))]
        (body if name in words else others).append((0.0 if factor is None else factor, cells))
    if not body and not others:
        return []
    if cpu:
        lines = [
            "CPU: times as fast as eager torch, which ran between the rounds; slower: below "
            f"{CPU_MARGIN:g} of the old ratio, in the quietest rounds and in all. The times are for orientation only."
        ]
        head = ["times eager", "old ratio", "new ratio", "new / old", "verdict", "old time", "new time"]
    else:
        lines = [f"GPU: time; slower: by more than {GPU_MARGIN:.0%} and with the quartile ranges apart."]
        head = ["time", "old / new", "verdict", "old time", "new time"]
    if others:
        factors = [factor for factor, _ in others]
        lines.append(
            f"The {len(others)} stock figures, which have no verdict, changed by {min(factors):.2f} to "
            f"{max(factors):.2f}: so far the machine and the stock versions alone move a figure."
        )
    ordered = [cells for part in (body, others) for _, cells in sorted(part, key=lambda pair: pair[0])]
    return [*lines, "", *table(head, ordered)]
