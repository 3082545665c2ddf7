"""What ``auto`` takes on a GPU, from a record of ``make gpu``: python benchmarks/choose.py RECORD.json [--write]

For every operator and dtype the fastest of our backends (geometric mean over the registered cases) that at no case is
slower than the best stock implementation beyond the spread, or nothing: ``auto`` stays with stock torch. ``--write``
puts the choice for the record's architecture into depict_kernels/measured.py, which is shipped.
"""

from __future__ import annotations

import argparse
import math
import pprint
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import goals, record
from benchmarks.implementations import STOCK
from depict_kernels import backends, measured

TABLE = Path(measured.__file__)
OURS = ("triton", "cuda")


def choose(data: dict) -> tuple[dict[str, dict[str, str]], list[str]]:
    """operator -> dtype -> backend, and a line of reasons for every pair that was measured."""
    groups: dict[tuple[str, str], list[list[dict]]] = {}
    for rows in goals.by_case(data).values():
        first = rows[0]
        if first["device"] == "cuda" and first["operator"] in backends.OPERATORS:
            groups.setdefault((first["operator"], first["dtype"]), []).append(rows)
    chosen: dict[str, dict[str, str]] = {}
    lines = []
    for (operator, dtype), cases in sorted(groups.items()):
        ratios, why_not = {}, {}
        for name in OURS:
            found = [_against_stock(rows, name) for rows in cases]
            if None in found:
                why_not[name] = f"not measured at {found.count(None)} of {len(cases)} cases"
            elif slower := [rows[0]["case"] for rows, (_, slow) in zip(cases, found) if slow]:
                why_not[name] = f"slower than stock at {', '.join(slower)}"
            else:
                ratios[name] = math.exp(sum(math.log(ratio) for ratio, _ in found) / len(found))
        if ratios:
            best = max(ratios, key=ratios.get)
            chosen.setdefault(operator, {})[dtype] = best
        said = [f"{name} {ratio:.2f} times the best stock" for name, ratio in ratios.items()]
        said += [f"{name} {reason}" for name, reason in why_not.items()]
        lines.append(f"{operator}, {dtype}: {best if ratios else 'torch'} ({'; '.join(said)})")
    return chosen, lines


def _against_stock(rows: list[dict], name: str) -> tuple[float, bool] | None:
    """(stock's best time over ours, whether ours is slower beyond the spread), or None where either is missing."""
    ours, stock = goals.best(rows, (name,)), goals.best(rows, STOCK)
    if ours is None or stock is None:
        return None
    return stock["median_ms"] / ours["median_ms"], ours["q1_ms"] > stock["q3_ms"]


def architecture(data: dict) -> str:
    """ "sm_90" of the record's GPU. Raises ValueError for a record of a CPU."""
    capability = data["environment"].get("capability")
    if capability is None:
        raise ValueError("the record is not one of an NVIDIA GPU; make gpu writes one")
    return "sm_" + capability.replace(".", "")


def text(auto: dict, sources: dict) -> str:
    """The source of measured.py."""
    return (
        '"""What ``auto`` takes on a GPU, written by ``benchmarks/choose.py``."""\n\n'
        "# architecture -> operator -> dtype -> backend, and the record that says so\n"
        f"AUTO: dict[str, dict[str, dict[str, str]]] = {pprint.pformat(auto, width=100)}\n"
        f"SOURCES: dict[str, str] = {pprint.pformat(sources, width=100)}\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path)
    parser.add_argument("--write", action="store_true", help="into depict_kernels/measured.py")
    args = parser.parse_args(arguments)
    try:
        data = record.load(args.record)
        name = architecture(data)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen, lines = choose(data)
    print("\n".join(lines) or "no operator was timed on a GPU")
    if args.write:
        TABLE.write_text(text({**measured.AUTO, name: chosen}, {**measured.SOURCES, name: args.record.name}))
        print(f"written to {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
