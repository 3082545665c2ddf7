"""Options of ``pytest benchmarks``, the parameters of every benchmark function, and the record they write."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: as train/run.py has it

import pytest
import torch

from benchmarks import cases, choose, end_to_end, gate, implementations, record, tables, timing
from benchmarks.harness import Harness
from depict_kernels import measured

# A script of its own, which needs torchvision and ADE20K's images.
collect_ignore = ["bench_loader.py"]
HARNESS = pytest.StashKey[Harness]()


def pytest_addoption(parser):
    group = parser.getgroup("depict_kernels")
    group.addoption("--record", metavar="PATH", help="JSON record to write or go on with, or a folder for it")
    group.addoption(
        "--full", action="store_true", help="every case and implementation; takes an hour on two cores"
    )
    group.addoption(
        "--rehearse", action="store_true", help="all cases at tiny sizes on the CPU: no figure counts"
    )
    group.addoption("--threads", type=int, default=2, help="CPU threads (default: 2)")
    group.addoption("--rounds", type=int, default=9, help="most rounds of a CPU case (default: 9)")
    group.addoption("--budget", type=float, metavar="S", help="skip what has not begun after so many seconds")


def _marks(device: str, group: str):
    timer = timing.clock(device)
    marks = [pytest.mark.benchmark(group=group, timer=timer, disable_gc=True, warmup=False)]
    if device == "cuda":
        marks.append(pytest.mark.gpu)
        if not torch.cuda.is_available():
            marks.append(pytest.mark.skip(reason="needs a CUDA GPU"))
    return marks


def pytest_generate_tests(metafunc):
    full, rehearse = metafunc.config.getoption("full"), metafunc.config.getoption("rehearse")
    if "implementation" in metafunc.fixturenames:
        chosen = [
            case for case in cases.of_family(metafunc.module.FAMILY) if full or rehearse or not case.full
        ]
        rows = []
        for case in chosen:
            names = implementations.names_for(case, full)
            if rehearse:
                case = case.rehearsal()
                names = [n for n in names if n not in implementations.COMPILED]
            rows += [
                pytest.param(case, n, marks=_marks(case.device, case.id), id=f"{case.id}-{n}") for n in names
            ]
        # Rehearsed cases of one shape and pass are one case.
        metafunc.parametrize("case, implementation", list({row.id: row for row in rows}.values()))
    if "model" in metafunc.fixturenames:
        chosen = [model for model in end_to_end.MODELS if full or rehearse or not model.full]
        chosen = [model for model in chosen if model.mode == metafunc.function.__name__.removeprefix("test_")]
        if rehearse:
            chosen = list({m.rehearsal().id: m.rehearsal() for m in chosen}.values())
        metafunc.parametrize(
            "model", [pytest.param(m, marks=_marks(m.device, m.id), id=m.id) for m in chosen]
        )


def pytest_collection_modifyitems(items):
    """Registered order, that with goals first and growth last: a run that its time limit cuts off has the former."""
    order = {case.id: i for i, case in enumerate(cases.CASES)}

    def rank(item) -> int:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "model" in parameters:
            return len(order) + parameters["model"].growth
        return order.get(getattr(parameters.get("case"), "id", None), len(order))

    benchmarks = [item for item in items if Path(item.fspath).parent == Path(__file__).parent]
    if len(benchmarks) == len(items):
        items.sort(key=rank)


@pytest.fixture(scope="session")
def harness(request) -> Harness:
    option = request.config.getoption
    torch.set_num_threads(option("threads"))
    gpu = torch.cuda.is_available() and not option("rehearse")
    only_cpu = "not gpu" in (request.config.getoption("markexpr") or "")
    device = "cuda" if gpu and not only_cpu else "cpu"
    written = None
    if option("record"):
        path = record.where(option("record"), device)
        written = record.Record(path, device)
        if "machine" not in written.data:
            from benchmarks import machine

            written.set("machine", machine.abilities(device))
        if variants := written.data.get("attention_variants"):
            # The CUDA attention as it will be shipped from this record.
            measured.WGMMA_FROM_HEAD_DIM[choose.architecture(written.data)] = variants["wgmma_from"]
        print(f"\nrecord: {path}")
    made = Harness(written, rounds=option("rounds"), threads=option("threads"), budget=option("budget"))
    request.config.stash[HARNESS] = made
    return made


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    """What was timed beside eager torch, which pytest-benchmark's own table does not know."""
    made = config.stash.get(HARNESS, None)
    lines = [] if made is None else tables.session(*(list(rows.values()) for rows in made.timed.values()))
    if lines:
        terminalreporter.section("against eager torch")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _free_memory(request):
    yield
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if torch.cuda.is_available() and getattr(parameters.get("case"), "device", "") == "cuda":
        largest = 32 << 30
        if torch.cuda.memory_reserved() > largest:
            gate.forget()
            torch.cuda.empty_cache()
