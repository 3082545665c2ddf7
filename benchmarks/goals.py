"""The speed goals that were set before anything was measured, and whether a record meets them.

On a GPU a goal is judged by CUDA events around a call, launches included, which is what a user waits for; the figure of
CUDA-graph replays stands beside it. A whole decoder may be compiled, as its strongest peer is. On the CPU a goal is
judged by the ratio to eager torch of the quietest rounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from benchmarks.implementations import AUTO, STOCK

_LOSS = "upsample_cross_entropy-8x150x32x32x512x512-bfloat16-fwd+bwd-cuda"
_LABELS = "upsample_argmax-8x150x32x32x512x512-bfloat16-fwd-cuda"
_CORES = tuple(f"subspace_self_attention-8x{n}x3x100-bfloat16-fwd+bwd-cuda" for n in (1174, 1750))
_DECODER = "depict_sa_decoder-8x150x32x32x384-bfloat16-fwd+bwd-cuda"
_SDPA = tuple(name for name in STOCK if name.startswith("sdpa"))
_COMPILED = ("compile(eager)", "compile(torch)")


@dataclasses.dataclass(frozen=True)
class Verdict:
    goal: str
    found: str
    met: bool | None  # None: not measured


# case, ours, the fastest of these peers, least ratio
_RATIOS = [
    *((case, ("triton",), _SDPA, 1.2) for case in _CORES),
    *((case, ("cuda",), _SDPA, 1.5) for case in _CORES),
    (_DECODER, AUTO, ("eager",), 6.0),
    (_DECODER, AUTO, ("compile(torch)",), 1.5),
    (_LOSS, ("triton",), ("eager",), 20.0),
    (_LOSS, ("triton",), _COMPILED, 5.0),
    (_LOSS, ("cuda",), ("eager",), 40.0),
    (_LOSS, ("cuda",), _COMPILED, 8.0),
    (_LABELS, ("triton",), ("eager",), 10.0),
    (_LABELS, ("cuda",), ("eager",), 10.0),
]
MOST_MEMORY = 0.02  # of eager torch's extra peak, for the loss


def best(rows: Iterable[dict], names: Iterable[str], key: str = "median_ms") -> dict | None:
    """The fastest of the named implementations among the rows of one case, or None where none was timed."""
    found = [row for row in rows if row["implementation"] in names and row.get(key) is not None]
    return min(found, key=lambda row: row[key], default=None)


def fastest(rows: Iterable[dict], names: Iterable[str]) -> dict | None:
    """Like :func:`best`, by the ratio to eager torch where rows have one.

    Medians of two implementations on a shared CPU are of different minutes; the ratio is to eager runs in between.
    """
    found = [row for row in rows if row["implementation"] in names]
    return max(
        (row for row in found if row.get("ratio")), key=lambda row: row["ratio"], default=best(found, names)
    )


def by_case(record: dict) -> dict[str, list[dict]]:
    cases: dict[str, list[dict]] = {}
    for row in record.get("operators", []):
        cases.setdefault(row["case"], []).append(row)
    return cases


def on_gpu(record: dict) -> Iterator[Verdict]:
    cases = by_case(record)
    for case, ours, peers, least in _RATIOS:
        rows = cases.get(case, [])
        who = (
            "the best SDPA kernel"
            if peers is _SDPA
            else "torch.compile"
            if "compile" in peers[0]
            else peers[0]
        )
        goal = f"{case.removesuffix('-cuda')}: {ours[0]} at least {least:g} times {who}"
        yield _ratio(goal, best(rows, ours), rows, peers, least)
    rows = cases.get(_LOSS, [])
    eager = next(
        (r["peak_bytes"] for r in rows if r["implementation"] == "eager" and r.get("peak_bytes")), None
    )
    for name in ("triton", "cuda"):
        goal = (
            f"{_LOSS.removesuffix('-cuda')}: extra peak memory of {name} at most {MOST_MEMORY:.0%} of eager's"
        )
        peak = next((r.get("peak_bytes") for r in rows if r["implementation"] == name), None)
        if eager is None or peak is None:
            yield Verdict(goal, "not measured", None)
        else:
            yield Verdict(goal, f"{peak / eager:.1%}", peak <= MOST_MEMORY * eager)
    yield _never_slower(cases)


def _ratio(goal: str, row: dict | None, rows: list[dict], peers: tuple[str, ...], least: float) -> Verdict:
    peer = best(rows, peers)
    if row is None or peer is None:
        return Verdict(goal, "not measured", None)
    ratio = peer["median_ms"] / row["median_ms"]
    found = f"{ratio:.2f} against {peer['implementation']}"
    if row["implementation"].startswith("compile"):
        found = f"{found}, by {row['implementation']}"
    graph = best(rows, peers, "graph_median_ms")
    if graph and row.get("graph_median_ms"):
        found += f" (graphs: {graph['graph_median_ms'] / row['graph_median_ms']:.2f})"
    return Verdict(goal, found, ratio >= least)


def _never_slower(cases: dict[str, list[dict]]) -> Verdict:
    goal = "auto is never slower than the best stock implementation"
    slower, compared = [], 0
    for case, rows in cases.items():
        auto, compiled = (best(rows, (name,)) for name in AUTO)
        # Where auto was compiled too, compiled stock torch is that one's peer.
        plain = [name for name in STOCK if compiled is None or name not in _COMPILED]
        for ours, peer in ((auto, best(rows, plain)), (compiled, best(rows, STOCK))):
            if ours is None or peer is None or ours["device"] != "cuda":
                continue
            compared += ours is auto
            # Slower where it is by more than the spread: its first quartile lies above the peer's third.
            if ours["q1_ms"] > peer["q3_ms"]:
                how = "" if ours is auto else "compiled, "
                slower.append(
                    f"{case} ({how}{peer['median_ms'] / ours['median_ms']:.2f} of {peer['implementation']})"
                )
    if not compared:
        return Verdict(goal, "not measured", None)
    return Verdict(goal, f"{len(slower)} of {compared} slower: {'; '.join(slower)}" if slower else
                   f"{compared} cases", not slower)  # fmt: skip


def on_cpu(record: dict) -> Iterator[Verdict]:
    for row in record.get("operators", []):
        if row["device"] == "cpu" and row.get("goal") and row["implementation"] == "cpp":
            what = f"{row['operator']}, {row.get('label', row['case'])}"
            goal = f"{what}: {row['implementation']} at least {row['goal']:g} times eager"
            ratio = row.get("ratio")
            met = None if ratio is None else ratio >= row["goal"]
            yield Verdict(goal, "not measured" if ratio is None else f"{ratio:.0f}", met)


def verdicts(record: dict) -> list[Verdict]:
    gpu = any(row["device"] == "cuda" for row in record.get("operators", []))
    return list(on_gpu(record) if gpu else on_cpu(record))
