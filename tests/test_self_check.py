"""Kernels that prove themselves before ``auto`` takes them, on GPUs without a record. Here the CPU is such a GPU."""

import contextlib
import warnings

import pytest
import torch

import depict_kernels.__main__ as page
from depict_kernels import backends, measured, ops, self_check
from depict_kernels.ops import upsample
from depict_kernels.ops.cuda_kernels import upsample as cuda
from depict_kernels.testing import logits_and_target

SHAPE = "up to 32 classes, factor 2 to 8"
SIZES = {"classes": 7, "grid": (3, 4), "size": (12, 16)}


@pytest.fixture(autouse=True)
def unmeasured(request, monkeypatch):
    monkeypatch.setattr(self_check, "_verdicts", {})
    if "gpu" in request.keywords:
        return
    if reason := backends.why_unavailable("cuda", "upsample_argmax", "cpu", torch.float32):
        pytest.skip(reason)
    monkeypatch.setattr(backends, "_architecture", lambda device: "sm_86")
    monkeypatch.setattr(measured, "AUTO", {})
    monkeypatch.setattr(measured, "SOURCES", {})
    monkeypatch.setattr(backends, "_AUTO_CHECKED", ("cuda",))


def taken(operator="upsample_cross_entropy", dtype=torch.float32, **sizes):
    return backends.choose("auto", operator, torch.randn(1, 7, 3, 4).to(dtype), **{**SIZES, **sizes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operator", sorted(self_check.OPERATORS))
def test_right_kernels_are_taken_and_checked_once(operator, dtype, monkeypatch):
    ran = []
    check = self_check._CHECKS[operator]
    monkeypatch.setitem(self_check._CHECKS, operator, lambda *a: ran.append(a) or check(*a))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [taken(operator, dtype), taken(operator, dtype)] == ["cuda", "cuda"]
    assert ran == [("cuda", torch.device("cpu"), dtype, 19, 4)]


def test_what_has_no_example_or_another_operator_takes_torch():
    assert taken(size=(3, 4)) == "torch"  # no upsampling
    assert (
        backends.choose("auto", "mask_logits", torch.randn(1, 6, 8), classes=7, width=8, patches=6) == "torch"
    )
    assert (
        backends.choose("auto", "subspace_self_attention", torch.randn(1, 6, 2, 50), tokens=6, head_dim=50)
        == "torch"
    )
    assert self_check._verdicts == {}


def test_a_record_decides_of_the_classes_that_it_measured(monkeypatch):
    monkeypatch.setattr(measured, "SOURCES", {"sm_86": "a_record.json"})
    table = {"upsample_cross_entropy": {"float32": {SHAPE: ()}}}
    monkeypatch.setattr(measured, "AUTO", {"sm_86": table})
    assert taken() == "torch" and self_check._verdicts == {}  # stock torch was faster
    table["upsample_cross_entropy"]["float32"][SHAPE] = ("reference",)
    assert taken() == "reference" and self_check._verdicts == {}
    assert taken(size=(48, 64)) == taken("upsample_argmax") == taken(dtype=torch.bfloat16) == "cuda"
    assert len(self_check._verdicts) == 3


def test_old_gpus_are_not_asked(monkeypatch):
    monkeypatch.setattr(backends, "_architecture", lambda device: "sm_75")
    assert taken() == "torch" and self_check._verdicts == {}


def off(result, index, change):
    return tuple(change(r) if i == index else r for i, r in enumerate(result))


def without_options(right):
    """A kernel that forgets class weights and label smoothing."""
    return lambda logits, target, weight, ignored, smoothing, *rest: right(
        logits, target, None, ignored, 0.0, *rest
    )


@pytest.mark.parametrize(
    "change",
    [
        {"cross_entropy_forward": without_options},
        {"cross_entropy_backward": lambda right: lambda *a: torch.full_like(right(*a), 7.0)},
    ],
    ids=["options", "unreduced gradient"],
)
def test_options_and_unreduced_losses_are_checked(change, monkeypatch):
    for name, wrong in change.items():
        monkeypatch.setattr(cuda, name, wrong(getattr(cuda, name)))
    with pytest.warns(RuntimeWarning, match="from float64"):
        assert taken() == "torch"


WRONG = {
    "its loss is": ("cross_entropy_forward", lambda r: off(r, 0, lambda loss: loss * 1.001)),
    "its gradient is": ("cross_entropy_forward", lambda r: off(r, 1, lambda grad: grad.roll(1, 3))),
    "its gradient is nan": ("cross_entropy_forward", lambda r: off(r, 1, lambda grad: grad * torch.nan)),
    "a label lies outside": ("argmax", lambda r: r + 19),
    "a label's logit is": ("argmax", lambda r: r.flip(2)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_kernels_are_named_once_and_not_taken(message, monkeypatch):
    name, change = WRONG[message]
    right = getattr(cuda, name)
    monkeypatch.setattr(cuda, name, lambda *a, **kw: change(right(*a, **kw)))
    operator = "upsample_argmax" if name == "argmax" else "upsample_cross_entropy"
    message = message.removesuffix(" nan")
    with pytest.warns(RuntimeWarning, match=f"cuda kernel of {operator} failed its check.*{message}"):
        assert taken(operator) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert taken(operator) == "torch"
    with pytest.warns(RuntimeWarning):  # another class of shapes is another kernel
        assert taken(operator, classes=40) == "torch"


def test_miscounting_is_noticed(monkeypatch):
    right = cuda.confusion

    def wrong(logits, target, ignore_index, out):
        report = right(logits, target, ignore_index, out)
        out[0, 0] += 40
        out[1, 1] -= 40
        return report

    monkeypatch.setattr(cuda, "confusion", wrong)
    with pytest.warns(RuntimeWarning, match="80 counts are not those of float64"):
        assert taken("upsample_confusion") == "torch"


def test_a_kernel_that_differs_from_run_to_run_is_not_taken(monkeypatch):
    right, calls = cuda.argmax, []

    def unstable(logits, *a):
        calls.append(1)
        labels = right(logits, *a)
        z = torch.nn.functional.interpolate(logits.double(), labels.shape[1:], mode="bilinear")
        z[0, :, 0, 0] = 0
        return z.argmax(1) if len(calls) % 2 else z.argmax(1).roll(1, 2)

    monkeypatch.setattr(cuda, "argmax", unstable)
    monkeypatch.setattr(self_check, "_TOLERANCE", 10.0)
    with pytest.warns(RuntimeWarning, match="differed between two runs"):
        assert taken("upsample_argmax") == "torch"


def test_a_kernel_that_cannot_run_is_not_taken(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("ptxas died\nwith many\nlines")

    monkeypatch.setattr(cuda, "cross_entropy_forward", broken)
    logits, target = logits_and_target(2, 7, (3, 4), (12, 16))
    with pytest.warns(RuntimeWarning, match="RuntimeError: ptxas died. auto takes stock torch"):
        loss = ops.upsample_cross_entropy(logits, target)
    torch.testing.assert_close(loss, ops.upsample_cross_entropy(logits, target, backend="torch"))


@pytest.mark.parametrize(
    "surrounding",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
        torch._subclasses.FakeTensorMode,
    ],
    ids=["inference_mode", "no_grad", "autocast", "default device", "fake tensors"],
)
def test_the_check_runs_in_nobodys_context(surrounding):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with surrounding():
            names = [
                backends._resolve("auto", name, "cpu", torch.float32, SHAPE) for name in self_check.OPERATORS
            ]
    assert names == ["cuda"] * 3


def test_vmap_and_the_compiler_may_be_the_first_to_ask():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        logits, target = logits_and_target(2, 7, (3, 4), (12, 16))
        torch.vmap(lambda x: ops.upsample_argmax(x[None], (12, 16)))(logits)
        assert set(self_check._verdicts.values()) == {None}
        torch.compiler.reset()
        compiled = torch.compile(ops.upsample_cross_entropy, fullgraph=True, backend="aot_eager")
        loss = compiled(logits.requires_grad_(), target)
    loss.backward()
    assert logits.grad.isfinite().all()
    torch.testing.assert_close(loss, ops.upsample_cross_entropy(logits, target, backend="torch"))
    assert {key[1] for key in self_check._verdicts} == {"upsample_argmax", "upsample_cross_entropy"}
    torch.compiler.reset()


def test_nothing_is_checked_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    key = ("cuda", "upsample_argmax", torch.device("cuda:0"), torch.float32, SHAPE)
    reason = self_check.why_not(*key)
    assert "graph" in reason and self_check._verdicts == {}
    # What was checked before the capture, in its warm-up, is what the graph gets.
    self_check._verdicts[key] = None
    assert self_check.why_not(*key) is None


def test_the_check_needs_neither_autograds_threads_nor_the_record_of_bad_labels(monkeypatch):
    def forbidden(*arguments, **options):
        raise AssertionError("not in a check")

    # The first call may come from a backward pass, whose thread would then wait for itself.
    monkeypatch.setattr(torch.autograd.graph, "_engine_run_backward", forbidden)
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", forbidden)
    monkeypatch.setattr(upsample, "record_bad_target", forbidden)
    monkeypatch.setattr(upsample, "_raises_at_once", lambda logits: False)  # as on a GPU
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [taken(name) for name in sorted(self_check.OPERATORS)] == ["cuda"] * 3


def test_a_kernel_that_takes_a_class_for_a_bad_label_is_noticed(monkeypatch):
    right = cuda.cross_entropy_forward
    monkeypatch.setattr(
        cuda, "cross_entropy_forward", lambda *a, **kw: off(right(*a, **kw), 2, lambda report: report + 1)
    )
    with pytest.warns(RuntimeWarning, match="took a class for a bad label"):
        assert taken() == "torch"


def test_a_check_without_memory_decides_nothing(monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(cuda, "cross_entropy_forward", full)
        assert taken() == "torch" and self_check._verdicts == {}
    assert taken() == "cuda"


@pytest.mark.parametrize("mode", [0, 2])
def test_torch_is_not_made_to_warn_of_its_debug_mode(monkeypatch, mode):
    """Setting it at all makes torch warn that it is a prototype."""
    found = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", found.append)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with self_check._on(torch.device("cuda:0")):
        pass
    assert found == (["default", mode] if mode else [])


def test_status_page_names_what_was_checked(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["depict_kernels"])
    page.main()
    text = capsys.readouterr().out
    assert "auto takes (no record of sm_86 yet: kernels that agreed with float64 on this GPU" in text
    lines = [line.split() for line in text.splitlines()]
    assert [*f"float32, {SHAPE}".split(), "cuda"] in lines and [
        "upsample_argmax",
        "otherwise",
        "torch",
    ] in lines


@pytest.mark.gpu
@pytest.mark.parametrize("shape", self_check.SHAPES)
@pytest.mark.parametrize("operator", sorted(self_check.OPERATORS))
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_kernels_pass_on_this_gpu(backend, operator, shape):
    if reason := backends.why_unavailable(backend, operator, "cuda", torch.float32):
        pytest.skip(reason)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert self_check.why_not(backend, operator, torch.device("cuda"), dtype, shape) is None


@pytest.mark.gpu
def test_the_check_passes_under_deterministic_algorithms():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for operator in sorted(self_check.OPERATORS):
            assert (
                self_check.why_not(
                    "cuda", operator, torch.device("cuda"), torch.float32, self_check.SHAPES[0]
                )
                is None
            )
    finally:
        torch.use_deterministic_algorithms(before)
