"""Whole training steps and evaluations, and where their time goes: backbone, decoder, loss or label map, optimizer.

A step is cut at the patch embeddings and at the masks (detached there, their gradients handed on by hand), which
computes the same numbers and lets every part be timed inside one step. Ways are interleaved, step by step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from benchmarks import implementations, timing
from benchmarks.harness import first_line, leave_if_broken
from depict_kernels import backends, ops
from depict_kernels.models import create_model

KINDS = ("depict_sa", "depict_ca", "segmenter_mask")
TRAINING = ("backbone", "decoder", "loss", "optimizer")
EVALUATION = ("backbone", "decoder", "labels")
SLOW, PATIENCE = 3.0, 12.0  # seconds: of a step on a CPU that is run once, of all rounds of a model


@dataclasses.dataclass(frozen=True)
class Model:
    """A model at a batch of images; ``mode`` is "training", "evaluation" or "prediction" (one call, small batches)."""

    name: str
    mode: str
    device: str = "cpu"
    batch: int = 2
    size: int = 512
    classes: int = 150
    full: bool = False
    growth: bool = False
    tiny: bool = False  # a rehearsal: a backbone of one narrow layer

    @property
    def id(self) -> str:
        return f"{self.name}-{self.mode}-B{self.batch}-{self.size}-C{self.classes}-{self.device}"

    def rehearsal(self) -> Model:
        return dataclasses.replace(self, device="cpu", batch=1, size=32, classes=5, full=False, tiny=True)

    def build(self) -> torch.nn.Module:
        options = {}
        if self.tiny:
            options["backbone_kwargs"] = {"depth": 1, "embed_dim": 64, "num_heads": 1}
        torch.manual_seed(0)
        with torch.device(self.device):
            model = create_model(self.name, self.classes, img_size=self.size, **options)
        for layer in [*getattr(model.decoder, "layers", ()), *getattr(model.decoder, "cross_layers", ())]:
            torch.nn.init.constant_(layer.step, 0.1)  # drawn steps near 1 blow untrained embeddings up
        return model.train(self.mode == "training")


def _models() -> Iterator[Model]:
    for kind in KINDS:
        for size in ("tiny", "small"):
            yield Model(f"{kind}_vit_{size}", "prediction", "cuda", batch=1)
    yield Model("depict_sa_vit_small", "prediction", "cuda", batch=4)
    for mode in ("training", "evaluation"):
        for kind in KINDS:
            yield Model(f"{kind}_vit_tiny", mode)
            yield Model(f"{kind}_vit_small", mode, full=mode == "evaluation" and kind != "depict_sa")
            # ViT-B and ViT-L take tens of seconds a step on two cores: one image, one decoder unless --full.
            other = kind != "depict_sa"
            yield Model(f"{kind}_vit_base", mode, batch=1, full=other)
            once = other or mode == "evaluation"
            yield Model(f"{kind}_vit_large", mode, batch=1, size=640, full=once)
        for size in (256, 1024):
            yield Model("depict_sa_vit_tiny", mode, batch=1, size=size, full=True, growth=True)
        for size in ("small", "tiny", "base", "large"):
            for kind in KINDS:
                pixels = 640 if size == "large" else 512
                yield Model(f"{kind}_vit_{size}", mode, "cuda", batch=8, size=pixels)
        for size in (256, 512, 1024, 2048):
            yield Model("depict_sa_vit_small", mode, "cuda", batch=1, size=size, growth=True)
        for batch in (16, 32):
            yield Model("depict_sa_vit_small", mode, "cuda", batch=batch, growth=True)
        for classes in (19, 1000):
            yield Model("depict_sa_vit_small", mode, "cuda", batch=8, classes=classes, growth=True)


MODELS = tuple(_models())


def ways(model: Model) -> list[str]:
    """Eager torch, stock operators, our backends that have all operators here, and what ``auto`` takes (last)."""
    if model.device == "cpu":
        return ["eager", "auto"]
    names = ["eager", "torch"]
    for name in ("triton", "cuda"):
        if all(
            backends.why_unavailable(name, op, "cuda", torch.bfloat16) is None for op in backends.OPERATORS
        ):
            names.append(name)
    return [*names, "auto"]


class Step:
    """Runs one step in a given way and gives the seconds of its parts."""

    def __init__(self, model: Model) -> None:
        self.setup = model
        self.module = model.build()
        self.parts = TRAINING if model.mode == "training" else EVALUATION
        self.now = timing.clock(model.device)
        side = model.size // self.module.patch_size
        self.grid = (side, side)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(model.batch, 3, model.size, model.size, generator=generator)
        target = torch.randint(0, model.classes, (model.batch, model.size, model.size), generator=generator)
        self.images, self.target = images.to(model.device), target.to(model.device)
        self.optimizer = None
        if model.mode == "training":
            self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-3, momentum=0.9)

    def __call__(self, name: str) -> list:
        """The marks between the parts; :meth:`seconds` reads them later, so that no GPU is waited for in a step."""
        with self.context(name):
            if self.setup.mode == "training":
                return self._train()
            with torch.no_grad():
                return self._evaluate()

    def seconds(self, marks: list) -> dict[str, float]:
        spans = [b - a for a, b in pairwise(marks)]
        result = dict.fromkeys(self.parts, 0.0)
        # A training step passes forward and then back: backbone, decoder, loss, loss, decoder, backbone.
        order = (
            (*TRAINING[:3], *TRAINING[2::-1], "optimizer") if self.setup.mode == "training" else EVALUATION
        )
        for part, span in zip(order, spans):
            result[part] += span
        return result | {"total": sum(spans)}

    @contextlib.contextmanager
    def context(self, name: str) -> Iterator[None]:
        half = self.setup.device == "cuda"
        with implementations.way(name), torch.autocast(self.setup.device, torch.bfloat16, enabled=half):
            yield

    def _train(self) -> list:
        marks = [self.now()]
        self.optimizer.zero_grad(set_to_none=True)
        patches = self.module.backbone(self.images)
        marks.append(self.now())
        patches_leaf = patches.detach().requires_grad_()
        masks = self.module.decoder(patches_leaf, self.grid)
        marks.append(self.now())
        masks_leaf = masks.detach().requires_grad_()
        loss = ops.upsample_cross_entropy(masks_leaf, self.target)
        marks.append(self.now())
        loss.backward()
        marks.append(self.now())
        masks.backward(masks_leaf.grad)
        marks.append(self.now())
        patches.backward(patches_leaf.grad)
        marks.append(self.now())
        self.optimizer.step()
        return [*marks, self.now()]

    def _evaluate(self) -> list:
        marks = [self.now()]
        patches = self.module.backbone(self.images)
        marks.append(self.now())
        masks = self.module.decoder(patches, self.grid)
        marks.append(self.now())
        ops.upsample_argmax(masks, self.images.shape[-2:])
        return [*marks, self.now()]


def measure(harness, benchmark, model: Model) -> None:
    """Times a model in every way, interleaved; the last way is pytest-benchmark's, the record has them all."""
    if harness.spent():
        pytest.skip("the run's time was spent (--budget)")
    gc.collect()  # an earlier model
    step, cuda = Step(model), model.device == "cuda"
    marks: dict[str, list] = {}
    peaks: dict[str, int | None] = {}
    failures: list[str] = []
    slow = False  # where a step takes many seconds the first is as good as the others

    def first(name: str) -> None:
        call = lambda: marks.setdefault(name, []).append(step(name))
        # A CPU process keeps memory of earlier steps and models: there only an operator's is measured, in its own.
        peaks[name] = timing.device_peak(call) if cuda else call()

    for name in ways(model):
        try:
            if name in ("eager", "torch") and _upsampled_bytes(model) > 0.6 * timing.available_memory(
                model.device
            ):
                raise torch.OutOfMemoryError("the upsampled logits do not fit")
            if name != "auto" or not slow:
                first(name)
                slow = slow or (not cuda and step.seconds(marks[name][0])["total"] > SLOW)
        except Exception as error:
            # The other ways are timed all the same; a failure of ours fails the benchmark in the end.
            marks.pop(name, None)
            memory = isinstance(error, torch.OutOfMemoryError)
            word = "skipped" if memory else "failed"
            harness.add("models", _row(model, name) | {word: first_line(error)})
            if cuda:
                leave_if_broken(name)
                torch.cuda.empty_cache()
            if not memory:
                failures.append(f"{name}: {first_line(error)}")
    if "auto" not in marks and not slow:
        if not failures:
            pytest.skip("out of memory")
        pytest.fail("; ".join(failures))
    if slow:
        benchmark.pedantic(first, args=("auto",), rounds=1)
    else:

        def others() -> None:
            for name in marks:
                if name != "auto":
                    marks[name].append(step(name))

        once = sum(step.seconds(runs.pop())["total"] for runs in marks.values())  # the warm-up
        rounds = timing.rounds_within(PATIENCE, once, 2, 5) if not cuda else 4
        benchmark.pedantic(lambda: marks["auto"].append(step("auto")), setup=others, rounds=rounds)
    for name, runs in marks.items():
        seconds = [step.seconds(run) for run in runs]
        found = {key: statistics.median(s[key] for s in seconds) for key in seconds[0]}
        row = _row(model, name) | {"rounds": len(runs), "peak_bytes": peaks[name]}
        row |= {f"{key}_ms": 1e3 * value for key, value in found.items()}
        harness.add("models", row | {"images_per_s": model.batch / found["total"]})
    if failures:
        pytest.fail("; ".join(failures))


GRAPH = " (CUDA graph)"


def measure_prediction(harness, benchmark, model: Model) -> None:
    """Times ``model.predict`` whole, kernel by kernel and as a CUDA graph, interleaved; the last way is ``auto``."""
    if harness.spent():
        pytest.skip("the run's time was spent (--budget)")
    gc.collect()
    step, cuda, now = Step(model), model.device == "cuda", timing.clock(model.device)
    names = [n for n in ways(model) if n != "auto"] + ["auto"]
    if cuda:
        names = [n for name in names for n in ((name,) if name == "eager" else (name + GRAPH, name))]

    def call(name: str) -> None:
        with step.context(name.removesuffix(GRAPH)):
            step.module.predict(step.images, torch.uint8, cuda_graph=name.endswith(GRAPH))

    times: dict[str, list] = {}
    failures: list[str] = []
    for name in names:
        try:
            call(name)  # compiles, captures
            times[name] = []
        except Exception as error:
            harness.add("models", _row(model, name) | {"failed": first_line(error)})
            failures.append(f"{name}: {first_line(error)}")
            if cuda:
                leave_if_broken(name)

    def others() -> None:
        for name in times:
            if name != "auto":
                times[name].append(timing.timed(lambda name=name: call(name), now))

    if "auto" in times:
        timed = lambda: times["auto"].append(timing.timed(lambda: call("auto"), now))
        benchmark.pedantic(timed, setup=others, rounds=20 if cuda else 2)
        for name, seconds in times.items():
            total = statistics.median(seconds)
            row = _row(model, name) | {"rounds": len(seconds), "total_ms": 1e3 * total}
            harness.add("models", row | {"images_per_s": model.batch / total})
    if failures:
        pytest.fail("; ".join(failures))


def _row(model: Model, name: str) -> dict:
    row = {key: getattr(model, key) for key in ("mode", "size", "batch", "classes", "device")}
    return {"model": model.name, "way": name, **row, **({"growth": True} if model.growth else {})}


def _upsampled_bytes(model: Model) -> int:
    """What stock torch holds of upsampled float32 logits: four arrays in training, one image's in evaluation."""
    one = 4 * model.classes * model.size**2
    return 4 * model.batch * one if model.mode == "training" else 2 * one
