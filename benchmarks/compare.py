"""Two records side by side: what became faster, slower, appeared or went away."""

from __future__ import annotations

from benchmarks.tables import ms, table

NOTABLE = 0.05  # changes below 5 % are not spoken of


def _time(row: dict) -> float | None:
    return row.get("graph_median_ms") or row.get("quiet_ms") or row.get("median_ms") or row.get("total_ms")


def _cell(row: dict) -> str:
    return ms(_time(row)) + (f" (eager / {row['ratio']:.0f})" if row.get("ratio") else "")


def _name(row: dict) -> str:
    if "case" in row:
        return f"{row['case']} {row['implementation']}"
    return f"{row['model']} {row['mode']} B{row['batch']} {row['size']} C{row['classes']} {row['device']} {row['way']}"


def _rows(record: dict) -> dict[str, dict]:
    rows = [*record.get("operators", []), *record.get("models", [])]
    return {_name(row): row for row in rows if _time(row) is not None}


def change(before: dict, after: dict) -> float:
    """after / before in time. Where both hold a ratio to a baseline beside which they were interleaved, of those:
    a busier machine slows the baseline too."""
    if before.get("ratio") and after.get("ratio"):
        return before["ratio"] / after["ratio"]
    return _time(after) / _time(before)


def apart(before: dict, after: dict) -> bool:
    """Whether the quartile ranges are apart; records without quartiles say nothing against a change."""
    if "q1_ms" not in before or "q1_ms" not in after:
        return True
    return before["q3_ms"] < after["q1_ms"] or after["q3_ms"] < before["q1_ms"]


def compare(before: dict, after: dict) -> tuple[str, int]:
    """(Markdown, number of regressions): a regression takes notably longer, by more than the spread."""
    old, new = _rows(before), _rows(after)
    rows, slower = [], 0
    for name in old.keys() & new.keys():
        factor = change(old[name], new[name])
        if abs(factor - 1) <= NOTABLE or not apart(old[name], new[name]):
            continue
        slower += factor > 1
        word = "**slower**" if factor > 1 else "faster"
        rows.append([name, _cell(old[name]), _cell(new[name]), f"{factor:.2f}", word])
    rows.sort(key=lambda row: -float(row[3]))
    lines = [
        f"{len(old.keys() & new.keys())} figures in both records, {slower} slower by more than 5 % and the spread."
    ]
    first, second = (r["environment"] for r in (before, after))
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
    lines += ["", *table(["figure", "before", "after", "after / before", ""], rows)]
    for title, only in (("Only before", old.keys() - new.keys()), ("Only after", new.keys() - old.keys())):
        if only:
            names = sorted(only)
            rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
            lines += [f"{title}: {', '.join(names[:4])}{rest}", ""]
    return "\n".join(lines).rstrip() + "\n", slower
