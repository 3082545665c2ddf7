"""Runs Triton's host functions with their kernels compiled for a GPU and executed by the machine."""

from __future__ import annotations

import contextlib
import struct
import threading
from collections import Counter
from collections.abc import Iterator

import torch
import triton

from depict_kernels.ops.triton_kernels import launch
from tests.ptx import machine, program

_FORMATS = {"i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "fp32": "<f", "fp64": "<d"}
# Older ones leave out the fence between cp.async and wgmma, which the PTX ISA asks for and Hopper in practice not
# (https://github.com/triton-lang/triton/pull/9610).
FENCES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
_compiled: dict[tuple, tuple] = {}


class Executor(list):
    """Takes the place of the list of recorded launches; executes each instead and keeps the kernels' names."""

    def __init__(self, architecture: str, options: dict):
        self.architecture, self.options = architecture, options
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()  # of kernels with the dtype of their first argument

    def append(self, recorded: launch.Launch) -> None:
        with self.lock:  # tensors are copied in and out: two launches at once would undo each other
            self._run(recorded)

    def _run(self, recorded: launch.Launch) -> None:
        key = (self.architecture, launch.fingerprint(recorded))
        if key not in _compiled:
            kernel = launch.compile_ahead(recorded, self.architecture)
            _compiled[key] = program.parse(kernel.asm["ptx"]), kernel.metadata.shared
        parsed, shared = _compiled[key]
        kinds, _, _ = launch.signature(recorded)
        values, regions = [], []
        for name, kind in kinds.items():
            value = recorded.arguments[name]
            if kind == "constexpr":
                continue
            if isinstance(value, torch.Tensor):
                values.append(struct.pack("<Q", value.data_ptr()))
                storage = value.untyped_storage()
                regions.append(machine.Region(storage.data_ptr(), storage.nbytes()))
            else:
                values.append(struct.pack(_FORMATS[kind], value))
        blob = bytearray(parsed.parameter_bytes)  # what Triton appends (scratch memory) stays a null pointer
        for packed, parameter in zip(values, parsed.parameters.values()):
            assert parameter.size == len(packed), (parsed.name, parameter, packed)
            blob[parameter.offset : parameter.offset + parameter.size] = packed
        machine.launch(
            parsed,
            recorded.grid,
            32 * recorded.num_warps,
            bytes(blob),
            regions,
            shared_bytes=shared,
            fences=FENCES,
            **self.options,
        )
        name, first = recorded.kernel.__name__, next(iter(kinds.values()))
        self.counts[f"{name} {first.lstrip('*')}"] += 1
        super().append(name)


@contextlib.contextmanager
def executing(architecture: str, **options) -> Iterator[Executor]:
    """Within the context host functions on CPU tensors run the kernels' PTX for ``architecture`` ("sm_80").

    ``options``: races, profile and approximate of machine.launch.
    """
    executor = Executor(architecture, options)
    before, launch._recording = launch._recording, (architecture, executor)
    try:
        yield executor
    finally:
        launch._recording = before
