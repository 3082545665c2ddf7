"""Measures launch configurations of the Triton kernels on this GPU: opt-in tuning, bounded in time.

    python benchmarks/tune.py [--seconds 240] [--match TEXT] [--write] [--output FILE.json]

Every kernel and shape class of the calls below gets its share of the time. A candidate counts only if all outputs and
gradients of the call are within the float64 error budget; then its whole call is timed (median of CUDA events, cold
L2, interleaved with the default). The table is printed and written as JSON, by default to
benchmarks/results/tuning_<device>.json; DEPICT_KERNELS_TUNING=FILE makes the kernels use it. ``--write`` also merges it
into depict_kernels/ops/triton_kernels/tuned.py, which is shipped. Without a GPU: a tiny run in Triton's interpreter
(TRITON_INTERPRET=1), whose times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from torch import Tensor

from benchmarks import timing
from depict_kernels import ops
from depict_kernels.ops.triton_kernels import launch, tuning
from depict_kernels.ops.triton_kernels.tuning import Config
from depict_kernels.testing import assert_within_budget, logits_and_target, value_and_gradients

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "depict_kernels" / "ops" / "triton_kernels" / "tuned.py"
WORTH_IT = 1.03  # a smaller gain is noise: the default stays


@dataclass(frozen=True)
class Call:
    """An operator at one shape: inputs for a batch size, and what runs on them with a backend."""

    name: str
    inputs: Callable[[int], list[Tensor]]  # on the CPU, floating ones first
    run: Callable[..., Tensor]  # (*inputs, backend=...)
    batch: int

    def outputs(self, inputs: list[Tensor], backend: str) -> list[Tensor]:
        run = lambda *t: self.run(*t, backend=backend)
        if not any(t.is_floating_point() and t.requires_grad for t in inputs):
            return [run(*inputs)]
        value, gradients = value_and_gradients(run, inputs)
        return [value, *gradients]


def calls(tiny: bool) -> Iterator[Call]:
    """The shapes of the ViT decoders at 512 x 512 pixels; ``tiny``: one small call of each family."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator)
    dtypes = (torch.float32,) if tiny else (torch.bfloat16, torch.float32)
    batch, heads, n, m = (1, 1, 9, 5) if tiny else (8, 3, 1174, 150)
    for dtype, dim in itertools.product(dtypes, (16,) if tiny else (100, 50, 192)):
        tag = f"d{dim} {str(dtype).removeprefix('torch.')}"
        w = lambda b, dim=dim, dtype=dtype: random(b, n, heads, dim).to(dtype).requires_grad_()
        q = lambda b, dim=dim, dtype=dtype: random(b, m, heads, dim).to(dtype).requires_grad_()
        yield Call(f"self attention {tag}", lambda b, w=w: [w(b)], ops.subspace_self_attention, batch)
        yield Call(
            f"cross attention {tag}", lambda b, q=q, w=w: [q(b), w(b)], ops.subspace_cross_attention, batch
        )
    grid, dim = ((2, 2), 8) if tiny else ((32, 32), 384)
    for dtype, classes in itertools.product(dtypes, (5,) if tiny else (150, 19, 847)):

        def tensors(b, dtype=dtype, classes=classes):
            shapes = [(b, grid[0] * grid[1], dim), (b, classes, dim)]
            return [random(*s).to(dtype).requires_grad_() for s in shapes] + [
                random(classes).requires_grad_() for _ in range(2)
            ]

        run = lambda *t, backend: ops.mask_logits(*t, grid, backend=backend)
        yield Call(f"mask_logits C{classes} {str(dtype).removeprefix('torch.')}", tensors, run, batch)
    shapes = [(150, (32, 32), (512, 512)), (19, (128, 128), (512, 512)), (150, (40, 40), (640, 640))]
    for classes, low, high in [(3, (1, 1), (2, 2))] if tiny else shapes:

        def pair(b, classes=classes, low=low, high=high):
            logits, target = logits_and_target(b, classes, low, high, smooth=True)
            return [logits.requires_grad_(), target]

        name = f"C{classes} {low[0]}x{low[1]} to {high[0]}x{high[1]}"
        loss = lambda x, t, backend: ops.upsample_cross_entropy(x, t, check_targets=False, backend=backend)
        yield Call(f"upsample loss {name}", pair, loss, batch)
        labels = lambda x, t, backend: ops.upsample_argmax(x, t.shape[1:], torch.uint8, backend=backend)
        map_inputs = lambda b, pair=pair: [t.detach() for t in pair(b)]
        yield Call(f"upsample label map {name}", map_inputs, labels, batch)


def candidates(key: str, default: Config) -> list[Config]:
    """A bounded list for a key, those nearest to the default (in powers of two) first."""
    family, kernel = key.split()[:2]
    if family == "attention":
        values = ((32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3))
    elif family == "mask_head":
        values = ((16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
    elif kernel in ("series", "careful", "labels"):  # rows come from the tile
        values = ((default.rows,), (4, 8, 16, 32, 64, 128), (1, 2, 4), (1,))
    elif kernel == "finish":
        values = ((1,), (1024, 2048, 4096), (4, 8, 16), (1,))
    else:
        values = ((16, 32, 64), (16, 32, 64, 128), (2, 4, 8), (1,))
    distance = lambda c: sum(
        abs(a.bit_length() - b.bit_length()) for a, b in zip(astuple(c), astuple(default))
    )
    every = [Config(*v) for v in itertools.product(*values)]
    return sorted((c for c in every if c != default), key=distance)


def clock(run: Callable[[], object], device: str, flush: Tensor) -> float:
    """Seconds of one run on the device, with nothing of it left in the L2 cache."""
    if device == "cuda":
        flush.zero_()
        # About 2 ms in which the host queues the whole call: no gaps between its kernels.
        torch.cuda._sleep(4_000_000)
    return timing.timed(run, timing.clock(device))


class Bench:
    """One call on one device: checks a configuration and measures it against the default."""

    def __init__(self, call: Call, device: str) -> None:
        self.call, self.device = call, device
        place = lambda b: [t.detach().to(device).requires_grad_(t.requires_grad) for t in call.inputs(b)]
        self.inputs, self.small = place(call.batch), place(1)
        exact = lambda t: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        self.truths = call.outputs([exact(t) for t in self.small], "torch")
        self.peers = call.outputs(self.small, "torch")
        self.flush = torch.empty(1 if device == "cpu" else 256 << 20, dtype=torch.uint8, device=device)

    def defaults(self) -> dict[str, Config]:
        """Every key that the call asks for, with its configuration now."""
        with tuning.trial({}) as chosen:
            self.call.outputs(self.inputs, "triton")
        return chosen

    def compile(self, key: str, configs: list[Config], workers: int) -> None:
        """Compiles a call's kernels for ``configs`` in parallel; what fails here fails again, by name, in check."""

        def warm(one: launch.Launch) -> None:
            options = {"num_warps": one.num_warps, "num_stages": one.num_stages, "enable_fp_fusion": True}
            with torch.cuda.device(self.device):
                one.kernel.warmup(**one.arguments, grid=(1,), **options)

        recorded = {}
        for config in configs:
            with (
                tuning.trial({key: config}),
                launch.recording(launch.architecture(torch.device(self.device))) as launches,
            ):
                self.call.outputs(self.inputs, "triton")
            recorded.update({launch.fingerprint(one): one for one in launches})
        with ThreadPoolExecutor(workers) as pool:
            for job in [pool.submit(warm, one) for one in recorded.values()]:
                job.exception()

    def check(self, key: str, config: Config) -> str | None:
        """Why ``config`` cannot be taken, or None."""
        try:
            with tuning.trial({key: config}):
                values = self.call.outputs(self.small, "triton")
            for value, peer, truth in zip(values, self.peers, self.truths):
                if not truth.is_floating_point():
                    if (value != truth).float().mean() > 1e-4:  # ties of float32 in the label map
                        return "other labels"
                    continue
                # factor 4: two summation orders, neither the better one, as in the tests
                assert_within_budget(value, peer.to(value.dtype), truth, factor=4)
        except Exception as error:  # what Triton or the device says of a configuration that it cannot take
            return _line(error)
        return None

    def seconds(self, key: str, config: Config, default: Config, rounds: int) -> tuple[float, float]:
        """Medians of the call with ``config`` and with ``default``, interleaved."""
        times: dict[Config, list[float]] = {config: [], default: []}
        for turn in range(rounds + (rounds > 1)):
            for one in times:
                with tuning.trial({key: one}):
                    taken = clock(lambda: self.call.outputs(self.inputs, "triton"), self.device, self.flush)
                if turn or rounds == 1:  # the first turn warms up
                    times[one].append(taken)
        return statistics.median(times[config]), statistics.median(times[default])


def tune(
    device: str, seconds: float, match: str = "", most: int = 1000, rounds: int = 20, tiny: bool = False
) -> tuple[list[dict], list[str]]:
    """One row per key: default, best configuration, both times, how many candidates were tried and rejected.

    And the calls that failed: a candidate may break the device's context, and what was found before counts.
    """
    end = time.monotonic() + seconds
    rows: list[dict] = []
    failed: list[str] = []
    done: set[str] = set()
    todo = [c for c in calls(tiny) if match in c.name]
    for i, call in enumerate(todo):
        if time.monotonic() > end:
            print(f"out of time before {', '.join(c.name for c in todo[i:])}")
            break
        try:
            bench = Bench(call, device)
            keys = {k: c for k, c in bench.defaults().items() if k not in done}
        except Exception as error:
            failed.append(f"{call.name}: {_line(error)}")
            print(failed[-1], flush=True)
            continue
        for j, (key, default) in enumerate(keys.items()):
            done.add(key)
            left = end - time.monotonic()
            until = time.monotonic() + left / (len(todo) - i) / (len(keys) - j)
            row = {"call": call.name, "key": key, "default": astuple(default), "best": astuple(default)}
            row |= {"gain": 1.0, "tried": 0, "rejected": {}}
            every = candidates(key, default)[:most]
            workers = os.cpu_count() or 1
            for start in range(0, len(every), workers):
                if device != "cpu" and time.monotonic() < until:
                    with contextlib.suppress(Exception):
                        bench.compile(key, every[start : start + workers], workers)
                for config in every[start : start + workers]:
                    if time.monotonic() > until:
                        break
                    row["tried"] += 1
                    reason = bench.check(key, config)
                    if reason is None:
                        try:
                            taken, usual = bench.seconds(key, config, default, rounds)
                        except Exception as error:  # at the full batch, as in check
                            reason = _line(error)
                    if reason is not None:
                        row["rejected"][str(astuple(config))] = reason
                        continue
                    if usual / taken > max(row["gain"], WORTH_IT):
                        row |= {"best": astuple(config), "gain": round(usual / taken, 3)}
                        row |= {"seconds": taken, "default_seconds": usual}
            rows.append(row)
            print(
                f"{key:38} {call.name:40} default {row['default']!s:18} best {row['best']!s:18} "
                f"call x{row['gain']:.2f}  tried {row['tried']}, rejected {len(row['rejected'])}",
                flush=True,
            )
    return rows, failed


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:100]


def write_table(path: Path, architecture: str, device: str, rows: list[dict]) -> None:
    """Merges the rows that beat the default into the table of ``path`` (tuned.py)."""
    table = runpy.run_path(str(path))["TUNED"]
    found = {r["key"]: tuple(r["best"]) for r in rows if tuple(r["best"]) != tuple(r["default"])}
    table[architecture] = dict(sorted({**table.get(architecture, {}), **found}.items()))
    lines = []
    for name, entries in sorted(table.items()):
        lines += [
            f'    "{name}": {{',
            *(f'        "{key}": {values},' for key, values in entries.items()),
            "    },",
        ]
    text = "\n".join(["{", *lines, "}"])
    path.write_text(
        f'"""Measured launch configurations, written by ``benchmarks/tune.py --write``; last on {device}."""\n\n'
        "# architecture -> key (see tuning.py) -> rows, columns, warps, stages\n"
        f"TUNED: dict[str, dict[str, tuple[int, int, int, int]]] = {text}\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=240, help="time for everything")
    parser.add_argument("--match", default="", help="only calls whose name contains this")
    parser.add_argument("--candidates", type=int, default=1000, help="at most so many per key")
    parser.add_argument("--rounds", type=int, default=20, help="timed runs per candidate")
    parser.add_argument("--write", action="store_true", help="merge the table into tuned.py")
    parser.add_argument("--output", type=Path, help="JSON; default benchmarks/results/tuning_<device>.json")
    args = parser.parse_args(arguments)
    if torch.cuda.is_available():
        device, name = "cuda", torch.cuda.get_device_name()
    elif os.environ.get("TRITON_INTERPRET") == "1":
        device, name = "cpu", "interpreter"
    else:
        print("no GPU here; TRITON_INTERPRET=1 runs a tiny example in Triton's interpreter", file=sys.stderr)
        return 2
    architecture = launch.architecture(torch.device(device))
    rounds = 1 if device == "cpu" else args.rounds
    rows, failed = tune(device, args.seconds, args.match, args.candidates, rounds, tiny=device == "cpu")
    record = {"device": name, "architecture": architecture, "torch": torch.__version__}
    record |= {"triton": triton.__version__, "seconds": args.seconds, "rows": rows}
    record["table"] = {architecture: {r["key"]: r["best"] for r in rows if r["best"] != r["default"]}}
    output = args.output or ROOT / "benchmarks" / "results" / f"tuning_{name.replace(' ', '_')}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(rows)} keys, {len(record['table'][architecture])} better than their default: {output}")
    if args.write:
        write_table(TABLE, architecture, name, rows)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
