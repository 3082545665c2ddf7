"""What ``auto`` takes on a GPU, from a record of ``make gpu``: python benchmarks/choose.py RECORD.json [--write]

For every operator, dtype and class of shapes (depict_kernels/shape_classes.py) those of our backends that at no
registered case of the class, training or inference, are slower than the best stock implementation beyond the spread,
the fastest first (geometric mean over the cases); ``auto`` takes the first that is built where it runs. Where there is
none it stays with stock torch. A class in which neither backend was timed at every case, and neither was seen to fail
or to be slower, is left out: the record says nothing of it.

``--write`` puts the choice for the record's architecture, and from which head_dim on the CUDA attention takes wgmma
(benchmarks/compare_attention_variants.py), into depict_kernels/measured.py, which is shipped.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import goals, record
from benchmarks.cases import CASES, SIZES, Case
from benchmarks.implementations import STOCK
from depict_kernels import backends, measured
from depict_kernels.shape_classes import shape_class

TABLE = Path(measured.__file__)
OURS = ("triton", "cuda")


Choice = dict[str, dict[str, dict[str, tuple[str, ...]]]]


def choose(data: dict) -> tuple[Choice, list[str]]:
    """operator -> dtype -> class of shapes -> backends, and a line of reasons for every class with a case timed."""
    groups: dict[tuple[str, str, str], dict[str, list[dict]]] = {}
    for case, rows in goals.by_case(data).items():
        first = rows[0]
        if first["device"] == "cuda" and first["operator"] in backends.OPERATORS:
            shape = _shape_class(first["operator"], first["sizes"])
            groups.setdefault((first["operator"], first["dtype"], str(shape)), {})[case] = rows
    registered: dict[tuple[str, str, str], dict[str, list[dict]]] = {}
    for case in CASES:  # without rows, as a run that was cut off leaves them
        if case.device == "cuda" and not case.full and case.operator in backends.OPERATORS:
            registered.setdefault(_key(case), {})[case.id] = []
    chosen: Choice = {}
    lines = []
    for (operator, dtype, shape), measured_cases in sorted(groups.items()):
        cases = registered.get((operator, dtype, shape), {}) | measured_cases
        ratios, why_not, decided = {}, {}, False
        for name in OURS:
            found = {case: _against_stock(rows, name) for case, rows in cases.items()}
            failed = [case for case, rows in cases.items() if _failed(rows, name)]
            slower = [case for case, pair in found.items() if pair and pair[1]]
            unknown = list(found.values()).count(None)
            if shape == "None":
                why_not[name] = "outside of every class"
                continue
            decided |= bool(failed or slower or not unknown)
            if failed:
                why_not[name] = f"failed at {', '.join(failed)}"
            elif slower:
                why_not[name] = f"slower than stock at {', '.join(slower)}"
            elif unknown:
                why_not[name] = f"not measured at {unknown} of {len(cases)} cases"
            else:
                ratios[name] = math.exp(sum(math.log(ratio) for ratio, _ in found.values()) / len(found))
        best = tuple(sorted(ratios, key=ratios.get, reverse=True))
        if decided:
            chosen.setdefault(operator, {}).setdefault(dtype, {})[shape] = best
        said = [f"{name} {ratios[name]:.2f} times the best stock" for name in best]
        said += [f"{name} {reason}" for name, reason in why_not.items()]
        taken = ", ".join(best) or ("torch" if decided else "undecided")
        lines.append(f"{operator}, {dtype}, {shape}: {taken} ({'; '.join(said)})")
    return chosen, lines


def _key(case: Case) -> tuple[str, str, str]:
    shape = _shape_class(case.operator, dict(zip(SIZES[case.operator], case.sizes)))
    return case.operator, str(case.dtype).removeprefix("torch."), str(shape)


def _shape_class(operator: str, sizes: dict[str, int]) -> str | None:
    """The class of a case's sizes, whose letters are in benchmarks/cases.py."""
    if operator in ("subspace_self_attention", "subspace_cross_attention"):
        return shape_class(operator, tokens=sizes["N"], head_dim=sizes["d"])
    if operator == "mask_logits":
        return shape_class(operator, classes=sizes["C"], width=sizes["D"], patches=sizes["h"] * sizes["w"])
    low, high = (sizes["h"], sizes["w"]), (sizes["H"], sizes["W"])
    return shape_class(operator, classes=sizes["C"], grid=low, size=high)


def _against_stock(rows: list[dict], name: str) -> tuple[float, bool] | None:
    """(stock's best time over ours, whether ours is slower beyond the spread), or None where either is missing."""
    ours, stock = goals.best(rows, (name,)), goals.best(rows, STOCK)
    if ours is None or stock is None:
        return None
    return stock["median_ms"] / ours["median_ms"], ours["q1_ms"] > stock["q3_ms"]


def _failed(rows: list[dict], name: str) -> bool:
    """Whether a kernel was wrong or raised at a case."""
    return any(row["implementation"] == name and ("wrong" in row or "failed" in row) for row in rows)


def architecture(data: dict) -> str:
    """ "sm_90" of the record's GPU. Raises ValueError for a record of a CPU or an AMD GPU."""
    environment = data["environment"]
    capability = environment.get("capability")
    of_amd = environment.get("cuda", "") is None  # torch counts its architectures too: gfx942 as 9.4
    if of_amd or not re.fullmatch(r"\d+\.\d+", str(capability)):
        raise ValueError("the record is not one of an NVIDIA GPU; make gpu writes one")
    return "sm_" + str(capability).replace(".", "")


def text(auto: dict, sources: dict, wgmma: dict) -> str:
    """The source of measured.py."""
    return (
        '"""What ``auto`` takes on a GPU, written by ``benchmarks/choose.py``."""\n\n'
        "# architecture -> operator -> dtype -> class of shapes -> backends, the fastest first, none where stock is\n"
        "# the fastest; a class that is not here was not measured. And the record that says so\n"
        f"AUTO: dict[str, dict[str, dict[str, dict[str, tuple[str, ...]]]]] = {_literal(auto)}\n"
        f"SOURCES: dict[str, str] = {_literal(sources)}\n"
        "# architecture -> direction of the CUDA attention -> the head_dim from which on its wgmma variant is faster\n"
        f"WGMMA_FROM_HEAD_DIM: dict[str, dict[str, int]] = {_literal(wgmma)}\n"
    )


def _literal(value: dict | tuple | str | int, indent: str = "") -> str:
    """Python source, laid out as ruff leaves it: an entry of a dictionary per line."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, (str, int)):
        return json.dumps(value)
    inner = indent + "    "
    entries = (f"{inner}{json.dumps(key)}: {_literal(entry, inner)},\n" for key, entry in value.items())
    return "{\n" + "".join(entries) + indent + "}" if value else "{}"


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
        variants = data.get("attention_variants", {})
        wgmma = {**measured.WGMMA_FROM_HEAD_DIM, name: variants.get("wgmma_from", {})}
        TABLE.write_text(
            text(
                {**measured.AUTO, name: chosen},
                {**measured.SOURCES, name: args.record.name},
                {architecture: table for architecture, table in wgmma.items() if table},
            )
        )
        print(f"written to {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
