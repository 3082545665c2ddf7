"""One measurement: check it, time it, put it in the record. What ``conftest.py`` gives every benchmark function."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import gate, own_process, timing
from benchmarks.cases import SIZES, Case
from benchmarks.implementations import AUTO, OURS, Unavailable, build
from benchmarks.record import KEYS, Record


class Harness:
    """State of a run: where figures go, how long it may still take."""

    def __init__(self, record: Record | None, *, rounds: int, threads: int, budget: float | None) -> None:
        self.record = record
        self.rounds = rounds
        self.threads = threads
        self.end = None if budget is None else time.monotonic() + budget
        self.timed: dict[str, dict[tuple, dict]] = {"operators": {}, "models": {}}  # of this session
        self._flush: timing.Flush | None = None

    def flush(self, device: str) -> timing.Flush:
        if self._flush is None or (self._flush.buffer is None) == (device == "cuda"):
            self._flush = timing.Flush(device)
        return self._flush

    def spent(self) -> bool:
        """Whether the run's time is over: nothing new begins."""
        return self.end is not None and time.monotonic() > self.end

    def add(self, section: str, row: dict) -> None:
        self.timed[section][tuple(row.get(key) for key in KEYS[section])] = row
        if self.record is not None:
            self.record.add(section, row)

    def measure(self, benchmark, case: Case, name: str) -> None:
        """Times one implementation of one case; skips with the reason where it cannot run here."""
        row = {
            "case": case.id,
            "implementation": name,
            "operator": case.operator,
            "sizes": dict(zip(SIZES[case.operator], case.sizes)),
            "dtype": str(case.dtype).removeprefix("torch."),
            "passes": case.passes,
            "device": case.device,
        }
        row |= {key: getattr(case, key) for key in ("label", "goal", "growth") if getattr(case, key)}
        if self.spent():
            self._skip(row, "the run's time was spent (--budget)")
        try:
            if name not in (*OURS, *AUTO):
                need, free = case.eager_bytes(), timing.available_memory(case.device)
                if need > 0.75 * free:
                    raise Unavailable(f"needs about {need / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
            function = build(case, name)
            row |= gate.check(case, name, function)
            row |= self._times(benchmark, case, name, function, row)
        except (Unavailable, torch.OutOfMemoryError) as error:
            self._skip(row, str(error))
        except AssertionError as error:
            self.add("operators", row | {"wrong": str(error)})
            raise
        except Exception as error:
            # Stock kernels refuse what they cannot do with a plain RuntimeError; of ours that is a defect.
            if name in (*OURS, *AUTO):
                self.add("operators", row | {"failed": first_line(error)})
            if case.device == "cuda":
                leave_if_broken(name)
            if name in (*OURS, *AUTO):
                raise
            self._skip(row, first_line(error))
        benchmark.extra_info.update(
            {k: row[k] for k in ("ratio", "graph_median_ms", "peak_bytes") if k in row}
        )
        self.add("operators", row)

    def _skip(self, row: dict, reason: str) -> None:
        if row["device"] == "cuda":
            torch.cuda.empty_cache()
        self.add("operators", row | {"skipped": first_line(reason)})
        pytest.skip(first_line(reason))

    def _times(self, benchmark, case: Case, name: str, function, row: dict) -> dict:
        now, flush = timing.clock(case.device), self.flush(case.device)
        runner = timing.Runner(case, function, timing.input_sets(case))
        one = timing.timed(runner, now)
        if one < 2:
            one = timing.timed(runner, now)  # the first warmed up
        result = {"bytes": case.bytes_moved(), "flops": case.flops()}
        baseline = None
        if case.device == "cpu" and name != "eager" and not case.growth:
            baseline = timing.Runner(case, build(case, "eager"))
        repeats = 1
        if baseline is not None:
            base = timing.timed(baseline, now)
            # Three runs, the middle one: a single interruption weighs more on a run this short.
            repeats = 3 if 3 * one < base else 1
            rounds = timing.rounds_within(8.0, base + repeats * one, 3, self.rounds)
        elif case.device == "cpu":
            rounds = timing.rounds_within(3.0, one, 1 if one > 2 else 3, self.rounds)
        else:
            rounds = timing.rounds_within(0.2, one, 10, 60)
        baseline_seconds: list[float] = []
        turn = 0

        def setup() -> None:
            nonlocal turn
            if baseline is not None and turn % repeats == 0:
                baseline_seconds.append(timing.timed(baseline, now))
            turn += 1
            runner.rotate()
            flush()

        benchmark.pedantic(runner, setup=setup, rounds=rounds * repeats)
        if benchmark.stats is None:  # --benchmark-disable: one run, no figure
            pytest.skip("ran once; nothing is timed under --benchmark-disable")
        seconds = benchmark.stats.stats.data
        result |= timing.spread(seconds)
        if baseline is not None:
            groups = [sorted(seconds[i : i + repeats])[repeats // 2] for i in range(0, len(seconds), repeats)]
            result |= timing.quietest(list(zip(baseline_seconds, groups)))
            eager = {k: v for k, v in row.items() if k not in ("error", "peer_error", "mismatches", "goal")}
            eager |= {"implementation": "eager", "bytes": result["bytes"], "flops": result["flops"]}
            if case.memory:
                eager["peak_bytes"] = own_process.run("peak", case.id, "eager", self.threads)
            self.add("operators", eager | timing.spread(baseline_seconds))
        if case.device == "cuda":
            result |= self._graph(runner, flush, rounds)
            result["peak_bytes"] = timing.device_peak(runner)
        elif case.memory:
            result["peak_bytes"] = own_process.run("peak", case.id, name, self.threads)
        if case.device == "cpu" and case.kept:
            result["kept"] = own_process.run("kept", case.id, name, self.threads)
        return result

    def _graph(self, runner, flush, rounds: int) -> dict:
        try:
            graph = timing.spread(timing.graph_times(runner, flush, min(rounds, 20)))
        except Exception as error:  # whatever cannot be captured is still timed eagerly
            torch.cuda.synchronize()
            return {"graph_refused": first_line(error)}
        return {f"graph_{key}": graph[key] for key in ("median_ms", "q1_ms", "q3_ms")}


def leave_if_broken(name: str) -> None:
    """Ends the run where the GPU's context is lost: every later figure of this process would be an error."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"{name} broke the GPU's context: {first_line(error)}", returncode=1)


def first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
