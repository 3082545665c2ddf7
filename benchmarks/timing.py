"""How a time is taken: clocks, rotated inputs, a cold cache, CUDA graphs, memory, and what is said of many rounds."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import Case

host_clock = time.perf_counter


class DeviceMark:
    """A point in the GPU's stream; the difference of two is the seconds the GPU spent between them."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: DeviceMark) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def clock(device: str) -> Callable:
    """What pytest-benchmark calls before and after a run: CUDA events on a GPU, else the host's timer."""
    return DeviceMark if device == "cuda" else host_clock


class Flush:
    """Empties the GPU's L2 cache by writing a buffer of twice its size; nothing to do on a CPU."""

    def __init__(self, device: str) -> None:
        self.buffer = None
        if device == "cuda":
            size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
            self.buffer = torch.empty(max(size, 2**26), dtype=torch.uint8, device="cuda")

    def __call__(self) -> None:
        if self.buffer is not None:
            self.buffer.zero_()


class Runner:
    """A function on several sets of inputs in turn, with or without its backward pass."""

    def __init__(self, case: Case, function: Callable, sets: int = 1) -> None:
        self.function, self.backward = function, case.backward
        self.sets: list[list[Tensor]] = []
        for seed in range(sets):
            inputs = [t.detach() for t in case.inputs(seed)]
            for i in case.differentiable:
                inputs[i].requires_grad_()
            self.sets.append(inputs)
        self.turn = 0
        self.upstream: Tensor | None = None

    def rotate(self) -> None:
        self.turn = (self.turn + 1) % len(self.sets)

    def __call__(self) -> object:
        inputs = self.sets[self.turn]
        if not self.backward:
            with torch.no_grad():
                return self.function(*inputs)
        out = self.function(*inputs)
        if self.upstream is None or self.upstream.shape != out.shape:
            # From the host's generator: the device's is unusable after a graph capture that failed.
            self.upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
            if out.ndim == 0:
                self.upstream = torch.ones_like(out)
        return torch.autograd.grad(out, [t for t in inputs if t.requires_grad], self.upstream)


def input_sets(case: Case) -> int:
    """How many sets to rotate over: inputs that together pass twice the L2, and at most 4."""
    if case.device != "cuda":
        return 1
    one = sum(t.nbytes for t in case.inputs(device="meta"))
    return min(4, 1 + 2 * torch.cuda.get_device_properties(0).L2_cache_size // max(one, 1))


def spread(seconds: Sequence[float]) -> dict[str, float | int]:
    """Median, quartiles and minimum in milliseconds, and the number of rounds."""
    if not seconds:
        raise ValueError("no rounds were timed")
    first, middle, third = (
        statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    )
    return {
        "median_ms": 1e3 * middle,
        "q1_ms": 1e3 * first,
        "q3_ms": 1e3 * third,
        "min_ms": 1e3 * min(seconds),
        "rounds": len(seconds),
    }


def quietest(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """(baseline, candidate) seconds of interleaved rounds -> milliseconds and ratio.

    ``ratio`` is the median over the third of the rounds in which the baseline was fastest, that is in which the
    machine was least busy with other things; ``median_ratio`` is the median over all rounds.
    """
    pairs = sorted(pairs)
    quiet = pairs[: (len(pairs) + 2) // 3]
    return {
        "baseline_ms": 1e3 * statistics.median(a for a, _ in quiet),
        "quiet_ms": 1e3 * statistics.median(b for _, b in quiet),
        "ratio": statistics.median(a / b for a, b in quiet),
        "median_ratio": statistics.median(a / b for a, b in pairs),
    }


def rounds_within(seconds: float, one: float, least: int, most: int) -> int:
    """How many rounds of ``one`` seconds fit ``seconds``, between ``least`` and ``most``."""
    return max(least, min(most, int(seconds / max(one, 1e-9))))


def timed(call: Callable, now: Callable) -> float:
    start = now()
    call()
    return now() - start


def graph_times(call: Callable, flush: Callable, rounds: int) -> list[float]:
    """Seconds of replays of a CUDA graph of ``call``: the GPU's work without Python and launch overhead."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep = call()  # held, so that no replay writes over memory that was given away
    times = []
    for _ in range(rounds):
        flush()
        times.append(timed(graph.replay, DeviceMark))
    torch.cuda.synchronize()
    del keep
    return times


def device_peak(call: Callable) -> int:
    """Bytes a GPU call needs at its peak above what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def host_peak(call: Callable) -> int | None:
    """The same of this process's resident memory, from Linux's high-water mark; None elsewhere.

    Only exact in a young process: memory that malloc kept from earlier calls is not seen (see
    :mod:`benchmarks.own_process`).
    """
    if not sys.platform.startswith("linux"):
        call()
        return None
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def available_memory(device: str) -> int:
    """Bytes that are free now: of the GPU, or what Linux calls available."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**63
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
