"""The registry of what is timed: operator, shape, dtype and pass, on the CPU and on a GPU.

``bytes_moved`` and ``flops`` are what any implementation must move and compute: every input read once, every output
and gradient written once; the products of the formulas. An implementation that keeps intermediates moves more,
which is what the percentages in the report show.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# operator -> names of its sizes. Upsample operators: logits (B, C, h, w) to (H, W).
SIZES = {
    "subspace_self_attention": "BNHd",
    "subspace_cross_attention": "BMNHd",
    "mask_logits": "BChwD",
    "upsample_cross_entropy": "BChwHW",
    "upsample_argmax": "BChwHW",
    "upsample_confusion": "BChwHW",
    "depict_sa_decoder": "BChwD",
    "depict_ca_decoder": "BChwD",
}
FAMILIES = {
    "attention": ("subspace_self_attention", "subspace_cross_attention"),
    "mask_head": ("mask_logits",),
    "upsample": ("upsample_cross_entropy", "upsample_argmax", "upsample_confusion"),
    "decoder": ("depict_sa_decoder", "depict_ca_decoder"),
}
NOT_DIFFERENTIABLE = ("upsample_argmax", "upsample_confusion")
WIDTHS = {"tiny": 192, "small": 384, "base": 768, "large": 1024}
HEADS, SELF_DIM, CROSS_DIM, DEPTH = 3, 100, 50, 3  # the paper's decoders


@dataclasses.dataclass(frozen=True)
class Case:
    """One operator at one shape. ``sizes`` are in the order of :data:`SIZES`."""

    operator: str
    sizes: tuple[int, ...]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    backward: bool = True
    smooth: bool = False  # logits like a trained model's, in large regions
    sharpness: float = 1.0  # multiplies the logits
    label: str = ""  # what the README's table calls it
    goal: float | None = None  # least ratio to plain eager torch
    compiled: bool = False  # torch.compile is a plausible strongest peer here: worth its compile time
    memory: bool = False  # on the CPU: measure peak memory, in a process of its own
    kept: bool = False  # on the CPU: time it also with an allocator that keeps freed memory
    full: bool = False  # only with --full
    growth: bool = False  # part of the series over resolutions

    def __getattr__(self, name: str) -> int:
        names = SIZES[object.__getattribute__(self, "operator")]
        if len(name) == 1 and name in names:
            return self.sizes[names.index(name)]
        raise AttributeError(name)

    @property
    def family(self) -> str:
        return next(name for name, operators in FAMILIES.items() if self.operator in operators)

    @property
    def passes(self) -> str:
        return "fwd+bwd" if self.backward else "fwd"

    @property
    def id(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"{self.operator}-{'x'.join(map(str, self.sizes))}-{dtype}-{self.passes}-{self.device}"
        if self.smooth:
            text += "-smooth"
        return text if self.sharpness == 1 else f"{text}-x{self.sharpness:g}"

    @property
    def shape(self) -> str:
        """The sizes as a reader of a table wants them."""
        if self.family == "upsample":
            return f"({self.B}, {self.C}, {self.h}, {self.w}) to ({self.H}, {self.W})"
        return ", ".join(f"{name} {size}" for name, size in zip(SIZES[self.operator], self.sizes))

    def inputs(self, seed: int = 0, device: str | None = None) -> tuple[Tensor, ...]:
        """The operator's tensors; decoders take patches and their parameters."""
        return _inputs(self, seed, device or self.device)

    @property
    def differentiable(self) -> tuple[int, ...]:
        """Positions of the inputs that get a gradient."""
        if not self.backward:
            return ()
        count = {"subspace_cross_attention": 2, "mask_logits": 4}.get(self.operator, 1)
        return tuple(range(len(decoder_parameters(self)) + 1 if self.family == "decoder" else count))

    def output_elements(self) -> int:
        if self.operator == "upsample_cross_entropy":
            return 1
        if self.operator == "upsample_argmax":
            return self.B * self.H * self.W
        if self.operator == "upsample_confusion":
            return self.C**2
        if self.family == "attention":
            rows = self.N if self.operator == "subspace_self_attention" else self.M
            return self.B * rows * self.H * self.d
        return self.B * self.C * self.h * self.w

    def bytes_moved(self) -> int:
        """Every input read once, the output written once; with backward its gradient read and the inputs' written."""
        inputs = [t.nbytes for t in self.inputs(device="meta")]
        size = self.dtype.itemsize if self.family == "attention" else 4
        output = self.output_elements() * (8 if self.operator in NOT_DIFFERENTIABLE else size)
        if not self.backward:
            return sum(inputs) + output
        return sum(inputs) + 2 * output + sum(inputs[i] for i in self.differentiable)

    def flops(self) -> int:
        """Matrix products (a multiply-add is 2) and, for the upsample operators, the arithmetic per upsampled logit.

        Of label map and confusion matrix that is the work of a kernel that looks at every class; ours need not.
        """
        if self.family == "attention":
            queries = self.N if self.operator == "subspace_self_attention" else self.M
            # Forward: scores, output. Backward without stored scores: those again and four gradients.
            return _product(self.B * self.H, queries, self.N, self.d) * (7 if self.backward else 2)
        if self.operator == "mask_logits":
            return _product(self.B, self.h * self.w, self.C, self.D) * (3 if self.backward else 1)
        if self.family == "decoder":
            return decoder_flops(self)
        per_logit = 6 if self.backward else 2  # multiply and add; twice more for the two corners' gradients
        return per_logit * self.B * self.C * self.H * self.W

    def eager_bytes(self) -> int:
        """About what plain eager torch holds at its peak: the arrays as large as the scores or upsampled logits."""
        if self.family == "upsample":
            copies = 4 if self.backward else 2
            return copies * 4 * self.B * self.C * self.H * self.W
        if self.family == "attention":
            queries = self.N if self.operator == "subspace_self_attention" else self.M
            return (4 if self.backward else 2) * self.dtype.itemsize * self.B * self.H * queries * self.N
        return 0

    def smaller_batch(self, largest: int = 2) -> Case:
        """The same case with at most ``largest`` images: float64 truths of the full batch would not fit."""
        return dataclasses.replace(self, sizes=(min(self.B, largest), *self.sizes[1:]))

    def rehearsal(self) -> Case:
        """A tiny copy on the CPU in float32: every line of the benchmark runs, no figure means anything."""
        small = {"B": 1, "C": 5, "h": 3, "w": 3, "H": 24, "W": 24, "N": 13, "M": 5, "D": 16, "d": 8}
        if self.family == "attention":
            small["H"] = 2
        sizes = tuple(min(size, small[name]) for name, size in zip(SIZES[self.operator], self.sizes))
        return dataclasses.replace(
            self, sizes=sizes, device="cpu", dtype=torch.float32, memory=False, kept=False
        )


def _product(batch: int, rows: int, columns: int, depth: int) -> int:
    return 2 * batch * rows * columns * depth


def _normal(shape: Iterable[int], seed: int, device: str, dtype: torch.dtype) -> Tensor:
    shape = tuple(shape)
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _inputs(case: Case, seed: int, device: str) -> tuple[Tensor, ...]:
    normal = functools.partial(_normal, device=device, dtype=case.dtype)
    if case.operator == "subspace_self_attention":
        return (normal((case.B, case.N, case.H, case.d), seed),)
    if case.operator == "subspace_cross_attention":
        return (
            normal((case.B, case.M, case.H, case.d), seed),
            normal((case.B, case.N, case.H, case.d), seed + 1),
        )
    if case.operator == "mask_logits":
        # Weight and bias are float32: parameters stay so under autocast, and the logits have their dtype.
        affine = [_normal((case.C,), seed + i, device, torch.float32) for i in (2, 3)]
        patches = normal((case.B, case.h * case.w, case.D), seed)
        return (patches, normal((case.B, case.C, case.D), seed + 1), *affine)
    if case.family == "decoder":
        parameters = decoder_parameters(case).values()
        return (normal((case.B, case.h * case.w, case.D), seed), *(p.to(device) for p in parameters))
    if case.smooth and device != "meta":
        coarse = _normal((case.B, case.C, 4, 4), seed, "cpu", torch.float32) * 4
        logits = F.interpolate(coarse, size=(case.h, case.w), mode="bicubic", align_corners=True)
        logits = logits.to(device, case.dtype)
    else:
        logits = normal((case.B, case.C, case.h, case.w), seed)
    if device != "meta":
        logits = logits * case.sharpness
    if case.operator == "upsample_argmax":
        return (logits,)
    size = (case.B, case.H, case.W)
    if device == "meta":
        return logits, torch.empty(size, dtype=torch.int64, device="meta")
    generator = torch.Generator().manual_seed(seed + 1)
    return logits, torch.randint(0, case.C, size, generator=generator).to(device)


def make_decoder(case: Case) -> torch.nn.Module:
    from depict_kernels.models import DepictDecoder

    torch.manual_seed(0)
    # Steps near 1 would let three layers amplify noise: a trained decoder's are small.
    return DepictDecoder(case.C, case.D, mode=case.operator.split("_")[1], step_init=0.1)


@functools.lru_cache(maxsize=4)
def decoder_parameters(case: Case) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in make_decoder(case).named_parameters()}


def decoder_flops(case: Case) -> int:
    """Projections, attention cores and mask head; backward counts two products for one, cores as in attention."""
    patches = case.h * case.w
    self_tokens = patches + (case.C if case.operator == "depict_sa_decoder" else 0)
    inner, cross = HEADS * SELF_DIM, HEADS * CROSS_DIM
    linear = DEPTH * 2 * _product(case.B, self_tokens, case.D, inner) + _product(
        case.B, patches, case.C, case.D
    )
    cores = DEPTH * _product(case.B * HEADS, self_tokens, self_tokens, SELF_DIM)
    if case.operator == "depict_ca_decoder":
        linear += DEPTH * _product(case.B, patches + 2 * case.C, case.D, cross)
        cores += DEPTH * _product(case.B * HEADS, case.C, patches, CROSS_DIM)
    return linear * (3 if case.backward else 1) + cores * (7 if case.backward else 2)


# --- the CPU's cases ---

_LOSS = [  # label, B, C, low, high, sharpness, smooth, least ratio asked for
    ("random", 2, 150, (32, 32), (512, 512), 1, False, 60),
    ("smooth", 2, 150, (32, 32), (512, 512), 1, True, 60),
    ("smooth x 5", 2, 150, (32, 32), (512, 512), 5, True, 60),
    ("smooth x 30", 2, 150, (32, 32), (512, 512), 30, True, 12),
    ("x 5", 2, 150, (32, 32), (512, 512), 5, False, 60),
    ("x 30 (careful path)", 2, 150, (32, 32), (512, 512), 30, False, 12),
    ("x 200 (careful path)", 2, 150, (32, 32), (512, 512), 200, False, 12),
    ("Cityscapes, C = 19", 1, 19, (48, 96), (768, 1536), 1, False, 20),
    ("scale 13.5 and 12.9", 1, 150, (37, 53), (500, 683), 1, False, 20),
    ("scale 4", 1, 150, (128, 128), (512, 512), 1, False, 20),
]
GROWTH = (256, 512, 1024, 2048)


def _cpu() -> Iterator[Case]:
    for label, batch, classes, low, high, sharpness, smooth, goal in _LOSS:
        yield Case(
            "upsample_cross_entropy", (batch, classes, *low, *high), smooth=smooth, sharpness=sharpness,
            label=label, goal=goal, memory=label == "random", kept=label == "random",
        )  # fmt: skip
    for label, goal in (("random", 80), ("smooth", 300)):
        yield Case(
            "upsample_argmax", (2, 150, 32, 32, 512, 512), backward=False, smooth=label == "smooth",
            label=f"{label} logits", goal=goal, kept=label == "random",
        )  # fmt: skip
    yield Case("upsample_confusion", (2, 150, 32, 32, 512, 512), backward=False, label="random logits")
    for size in GROWTH:
        low = size // 16
        yield Case("upsample_cross_entropy", (1, 150, low, low, size, size), memory=True, growth=True)
    for batch in (4, 8):
        yield Case("upsample_cross_entropy", (batch, 150, 32, 32, 512, 512), memory=True, full=True)
    for classes in (19, 1000):
        yield Case("upsample_cross_entropy", (1, classes, 32, 32, 512, 512), memory=True, full=True)
    for backward in (False, True):
        for batch in (1, 2):
            yield Case("subspace_self_attention", (batch, 1174, HEADS, SELF_DIM), backward=backward)
        yield Case("subspace_cross_attention", (2, 150, 1024, HEADS, CROSS_DIM), backward=backward)
        yield Case("subspace_self_attention", (1, 1750, HEADS, SELF_DIM), backward=backward, full=True)
        yield Case("mask_logits", (2, 150, 32, 32, 192), backward=backward)
        yield Case("mask_logits", (1, 150, 40, 40, 1024), backward=backward)  # ViT-L
        for width in (192, 768):  # Cityscapes' 19 classes
            yield Case("mask_logits", (1, 19, 48, 96, width), backward=backward)
        for width in (384, 768):
            yield Case("mask_logits", (2, 150, 32, 32, width), backward=backward, full=True)
    for mode in ("sa", "ca"):
        yield Case(f"depict_{mode}_decoder", (2, 150, 32, 32, 192))


# --- the GPU's cases: batch 8, what the models call at 512 x 512 and, for ViT-L, 640 x 640 ---

_BF16 = torch.bfloat16


def _gpu() -> Iterator[Case]:
    cuda = functools.partial(Case, device="cuda", dtype=_BF16)
    # Those with a registered goal first: a run that is cut off has them.
    yield cuda("upsample_cross_entropy", (8, 150, 32, 32, 512, 512), compiled=True)
    yield cuda("upsample_argmax", (8, 150, 32, 32, 512, 512), backward=False, compiled=True)
    for tokens in (1174, 1750):
        yield cuda("subspace_self_attention", (8, tokens, HEADS, SELF_DIM), compiled=tokens == 1174)
    yield cuda("depict_sa_decoder", (8, 150, 32, 32, WIDTHS["small"]), compiled=True)
    for tokens in (1024, 1600):
        yield cuda("subspace_cross_attention", (8, 150, tokens, HEADS, CROSS_DIM))
    for size, width in WIDTHS.items():
        grid = 40 if size == "large" else 32
        yield cuda("mask_logits", (8, 150, grid, grid, width), compiled=size == "small")
    for grid in (32, 40):
        for classes in (19, 150, 1000):
            sizes = (8, classes, grid, grid, 16 * grid, 16 * grid)
            if (classes, grid) != (150, 32):
                yield cuda("upsample_cross_entropy", sizes)
                yield cuda("upsample_argmax", sizes, backward=False)
    # The decoders' masks are float32 under autocast, and so are the logits that the loss then gets.
    yield cuda("upsample_cross_entropy", (8, 150, 32, 32, 512, 512), dtype=torch.float32)
    yield cuda("upsample_cross_entropy", (8, 150, 32, 32, 512, 512), dtype=torch.float32, smooth=True)
    yield cuda(
        "upsample_argmax", (8, 150, 32, 32, 512, 512), dtype=torch.float32, backward=False, smooth=True
    )
    yield cuda("upsample_confusion", (8, 150, 32, 32, 512, 512), backward=False)
    yield cuda("depict_ca_decoder", (8, 150, 32, 32, WIDTHS["small"]))
    # Evaluation: forward alone.
    yield cuda("upsample_cross_entropy", (8, 150, 32, 32, 512, 512), backward=False)
    for tokens in (1174, 1750):
        yield cuda("subspace_self_attention", (8, tokens, HEADS, SELF_DIM), backward=False)
    for tokens in (1024, 1600):
        yield cuda("subspace_self_attention", (8, tokens, HEADS, SELF_DIM))
        yield cuda("subspace_self_attention", (8, tokens, HEADS, SELF_DIM), backward=False)
        yield cuda("subspace_cross_attention", (8, 150, tokens, HEADS, CROSS_DIM), backward=False)
    for size, width in WIDTHS.items():
        grid = 40 if size == "large" else 32
        yield cuda("mask_logits", (8, 150, grid, grid, width), backward=False)
    for classes in (19, 1000):
        yield cuda("mask_logits", (8, classes, 32, 32, WIDTHS["small"]))
    for size in GROWTH:
        low = size // 16
        yield cuda("upsample_cross_entropy", (1, 150, low, low, size, size), growth=True)
    for dtype in (torch.float32, torch.float16):
        yield cuda("subspace_self_attention", (8, 1174, HEADS, SELF_DIM), dtype=dtype)
        yield cuda("subspace_cross_attention", (8, 150, 1024, HEADS, CROSS_DIM), dtype=dtype)
        yield cuda("mask_logits", (8, 150, 32, 32, WIDTHS["small"]), dtype=dtype)
    # Without a case of its own a class of shapes (depict_kernels/shape_classes.py) stays with stock torch.
    for backward in (False, True):
        yield cuda("mask_logits", (8, 150, 14, 14, WIDTHS["small"]), backward=backward)
    for classes in (19, 1000):
        yield cuda("upsample_cross_entropy", (8, classes, 32, 32, 512, 512), dtype=torch.float32)
        yield cuda("upsample_argmax", (8, classes, 32, 32, 512, 512), dtype=torch.float32, backward=False)
    for classes in (19, 150):
        sizes = (8, classes, 32, 32, 512, 512)
        yield cuda("upsample_confusion", sizes, dtype=torch.float32, backward=False)
    for dtype in (_BF16, torch.float32):  # masks of a quarter, as hierarchical backbones give them
        sizes = (4, 150, 128, 128, 512, 512)
        yield cuda("upsample_cross_entropy", sizes, dtype=dtype)
        yield cuda("upsample_argmax", sizes, dtype=dtype, backward=False)
    for size in ("tiny", "base", "large"):
        grid = 40 if size == "large" else 32
        for mode in ("sa", "ca"):
            yield cuda(f"depict_{mode}_decoder", (8, 150, grid, grid, WIDTHS[size]), full=True)


CASES: tuple[Case, ...] = (*_cpu(), *_gpu())
BY_ID = {case.id: case for case in CASES}
assert len(BY_ID) == len(CASES), "two cases of one id"


def of_family(family: str) -> list[Case]:
    return [case for case in CASES if case.family == family]
