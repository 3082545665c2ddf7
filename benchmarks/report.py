"""Records to tables, plots and the README's figures.

    python benchmarks/report.py [RECORD.json | FOLDER]    # pages and plots beside the records, the README's figures
    python benchmarks/report.py --compare A.json B.json   # what changed; 1 where ours is slower on the same device

Without arguments: every record in benchmarks/results/. The README takes the newest record of a CPU and of a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import compare, record, tables  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
LOADER = "loader_cpu.json"  # of bench_loader.py, which has a format of its own
OTHER = ("tuning_", "counts_")  # begin the names of tune.py's and count_instructions.py's, which have others
BEGIN, END = "<!-- speed: begin (benchmarks/report.py) -->", "<!-- speed: end -->"


def _files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.glob("*.json")) if p.name != LOADER and not p.name.startswith(OTHER)]


def records(folder: Path = RESULTS) -> dict[str, dict]:
    """File stem -> record, oldest first."""
    found = {path.stem: record.load(path) for path in _files(folder)}
    return dict(sorted(found.items(), key=lambda item: (item[1]["environment"]["date"], item[0])))


def _newest(found: dict[str, dict], device: str) -> tuple[str, dict] | None:
    def fits(data: dict) -> bool:
        where = data["environment"]
        of_cpu = where["device"] == where.get("cpu")
        return of_cpu == (device == "cpu") and any(
            row["device"] == device for row in data.get("operators", [])
        )

    chosen = [(stem, data) for stem, data in found.items() if fits(data)]
    return chosen[-1] if chosen else None


def speed(folder: Path = RESULTS) -> str:
    """The README's figures as Markdown."""
    found, lines = records(folder), []
    if cpu := _newest(found, "cpu"):
        lines += _cpu(*cpu)
    if (folder / LOADER).exists():
        lines += _loader(json.loads((folder / LOADER).read_text()))
    lines += _gpu(*gpu) if (gpu := _newest(found, "cuda")) else ["No record of a GPU yet.", ""]
    return "\n".join(lines).rstrip()


def _links(stem: str) -> str:
    base = "benchmarks/results"
    return f"[record]({base}/{stem}.json), [all figures]({base}/{stem}.md), [plots]({base}/plots)"


def _cpu(stem: str, data: dict) -> list[str]:
    unmet = [v for v in tables.goals.verdicts(data) if v.met is False]
    lines = [
        f"**CPU**: {tables.machine_line(data)}; float32, interleaved with eager torch in one process (medians of the "
        f"quietest third of the rounds; the ratio over all rounds in brackets). {_links(stem)}.",
        "",
        *tables.cpu_loss(data),
        *tables.cpu_labels(data),
        *tables.cpu_cores(data),
        *tables.kept_memory(data),
    ]
    lines += [f"Not met: {v.goal} (found {v.found})." for v in unmet] + ([""] if unmet else [])
    return [*lines, *tables.growth(data), *_training(data, "cpu")]


def _training(data: dict, device: str) -> list[str]:
    body = tables.end_to_end(data, "training", device)
    shares = [f"Shares: {' / '.join(tables.PARTS['training'])}.", ""] if body else []
    return [*shares, *body, *_where_not(data, device)]


def _where_not(data: dict, device: str) -> list[str]:
    """Said in words: the part no kernel here touches, and how much of a step it is."""
    shares, ratios = {}, {}
    for ways in tables.whole_models(data, "training", device):
        ours = tables.fastest(ways)
        name = ours["model"]
        shares[name] = ours["backbone_ms"] / ours["total_ms"]
        ratios[name] = ways["eager"]["total_ms"] / ours["total_ms"]
    if not shares:
        return []
    low, high = (min(ratios, key=ratios.get), max(ratios, key=ratios.get))
    lines = [
        "Where the kernels do not help: in the backbone, which is timm's and the same code in both columns. With the "
        f"loss gone it is {min(shares.values()):.0%} to {max(shares.values()):.0%} of a training step, so the larger "
        f"the backbone the less a whole step gains: {ratios[high]:.2f} times for {high}, {ratios[low]:.2f} for {low}."
    ]
    if device == "cpu":
        lost = tables.slower_than_eager(data)
        lines[0] += (
            " Nor does `auto` take one on a CPU for cross-attention, and for self-attention and mask head outside of "
            "the classes of shapes that were measured ahead"
            + (f"; it is slower than plain eager torch there for {', '.join(lost)}" if lost else "")
            + ". Backbone and optimizer are counted with the smaller of their two times: on "
            f"this shared machine the same backbone took up to {tables.unsteady(data, device):.1f} times longer in one "
            "column than in the other."
        )
    return [*lines, ""]


def _loader(data: dict) -> list[str]:
    times = data["ms_per_image"]
    ours = lambda key: f"{times[key]:.1f} ms ({times['plain'] / times[key]:.1f} times faster)"
    return [
        f"Loader, per 512 x 512 crop of real ADE20K images and thread ({data.get('cpu', 'another CPU')}): decode, "
        f"resize, crop, distort and normalise in the worker (torchvision v2) {times['plain']:.1f} ms; ours in the "
        f"worker {ours('jpeg')} from JPEG, {ours('cache')} from the decoded cache, and {times['device']:.1f} ms of "
        "work that moves to the device, if that is this CPU.",
        "",
    ]


def _gpu(stem: str, data: dict) -> list[str]:
    lines = [
        f"**GPU**: {tables.machine_line(data)}; CUDA events around eager calls, cold L2, rotated inputs; goals in "
        f"bfloat16 at batch 8, in brackets by CUDA-graph replays. {_links(stem)}.",
        "",
        *tables.goal_table(data),
    ]
    return [
        *lines,
        *_training(data, "cuda"),
        *tables.predictions(data, "cuda"),
        *tables.model_growth(data, "cuda"),
    ]


def with_speed(readme: str, folder: Path = RESULTS) -> str:
    """The README's text with the tables between the markers."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{speed(folder)}\n{END}{rest.split(END)[1]}"


def write(path: Path) -> None:
    """The page and the plots of one record, beside it."""
    data = record.load(path)
    path.with_suffix(".md").write_text(tables.page(data, path.stem))
    try:
        from benchmarks import plots

        drawn = plots.draw(data, path.stem, path.parent / "plots")
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
        drawn = []
    print(f"{path.with_suffix('.md')}, {len(drawn)} plots")
    for verdict in tables.goals.verdicts(data):
        word = {True: "met", False: "NOT MET", None: "not measured"}[verdict.met]
        print(f"  {word:12} {verdict.goal}: {verdict.found}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="*", type=Path)
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--no-readme", action="store_true", help="leave the README as it is")
    args = parser.parse_args()
    if args.compare:
        before, after = (record.load(path) for path in args.compare)
        text, slower = compare.compare(before, after)
        print(text)
        same = before["environment"]["device"] == after["environment"]["device"]
        return 1 if slower and same else 0
    for place in args.records or [RESULTS]:
        for path in _files(place) if place.is_dir() else [place]:
            write(path)
    if not args.no_readme:
        path = ROOT / "README.md"
        path.write_text(with_speed(path.read_text()))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:  # of a file that is no record
        sys.exit(f"error: {error}")
