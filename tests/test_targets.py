"""The record of bad labels that a device keeps: when it is made, what it keeps, CUDA graphs, inference mode."""

import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from depict_kernels import ops
from depict_kernels.ops import targets

CPU = torch.device("cpu")


@pytest.fixture
def records(monkeypatch):
    """No buffer was made yet; those that a test makes are gone after it."""
    made = {}
    monkeypatch.setattr(targets, "_records", made)
    return made


def report_of(value: int, b: int, y: int, x: int) -> torch.Tensor:
    return torch.tensor([1, value, b, y, x])


def test_the_first_bad_label_stays_until_it_is_read(records):
    good = torch.zeros(5, dtype=torch.int64)
    targets.record_bad_target(good)
    buffer = records[CPU]
    for report in (good, report_of(77, 0, 2, 3), good, report_of(99, 1, 1, 1)):
        targets.record_bad_target(report)
    with pytest.raises(
        ValueError, match=r"target value 77 at \(batch 0, row 2, column 3\) of a batch on cpu"
    ):
        ops.raise_on_bad_target()
    ops.raise_on_bad_target()  # told once
    targets.record_bad_target(report_of(99, 1, 1, 1))
    assert records[CPU] is buffer and buffer[1] == 99  # graphs hold this address


@pytest.mark.parametrize("first", ["inference", "training"])
def test_evaluation_and_training_share_the_buffer(first, records):
    with torch.inference_mode(first == "inference"):
        targets.record_bad_target(torch.zeros(5, dtype=torch.int64))
    assert not records[CPU].is_inference()
    with torch.inference_mode(first != "inference"):
        targets.record_bad_target(report_of(77, 0, 2, 3))
    with pytest.raises(ValueError, match="target value 77"):
        ops.raise_on_bad_target()


def test_a_capture_makes_no_buffer(records, monkeypatch):
    """Its zeros would be captured: each replay would forget the label that the last one recorded."""
    device = torch.device("cuda", 0)
    zeros, capturing = torch.zeros, True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    made = lambda *shape, device, **options: zeros(*shape, **options)  # there may be no GPU
    monkeypatch.setattr(torch, "zeros", made)

    class Report:  # of a loss on the GPU
        device = torch.device("cuda", 0)

    with pytest.raises(RuntimeError, match="once on cuda:0 before the capture.*check_targets=False"):
        targets.record_bad_target(Report)
    assert records == {}
    capturing = False
    assert targets._make_record(device)
    buffer = records[device]
    assert buffer.tolist() == [0] * 5
    # After a warm-up the capture writes to what is there.
    capturing, records[CPU] = True, buffer
    assert not targets._make_record(device) and records[device] is buffer
    targets.record_bad_target(report_of(77, 0, 2, 3))
    assert buffer[1] == 77 and records[CPU] is buffer


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("first", ["inference", "training"])
def test_compiled_code_records_from_its_first_call_on(first, backend, records):
    """One graph, whether the buffer is there or not, and a buffer that is no part of it."""
    if backend == "inductor" and shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler on the CPU")
    torch.compiler.reset()
    counter = torch._dynamo.utils.counters["stats"]
    counter.clear()

    def f(report):
        targets.record_bad_target(report + 0)
        return report * 2

    compiled = torch.compile(f, fullgraph=True, backend=backend)
    good = torch.zeros(5, dtype=torch.int64)  # made here: an inference tensor would be another graph
    with torch.inference_mode(first == "inference"):
        compiled(good)
    buffer = records[CPU]
    graphs = counter["unique_graphs"]
    for report in (report_of(77, 0, 2, 3), report_of(99, 1, 1, 1)):
        with torch.inference_mode(first == "inference"):
            assert torch.equal(compiled(report), report * 2)
    assert counter["unique_graphs"] == graphs == 1
    assert records[CPU] is buffer and buffer[1] == 77
    with torch.inference_mode(first != "inference"):  # another graph, the same buffer
        buffer.zero_()
        compiled(report_of(5, 0, 0, 0))
    assert records[CPU] is buffer and buffer[1] == 5
    torch.compiler.reset()


def without_values(inputs, how):
    loss = lambda logits, target: ops.upsample_cross_entropy(logits, target)
    if how == "meta":
        return loss(*(t.to("meta") for t in inputs))
    if how == "fake":
        with FakeTensorMode() as mode:
            return loss(*map(mode.from_tensor, inputs))
    if how == "make_fx":
        return make_fx(loss, tracing_mode="fake")(*inputs)

    class Loss(torch.nn.Module):
        forward = staticmethod(loss)

    return torch.export.export(Loss(), inputs, strict=False)


@pytest.mark.parametrize("how", ["meta", "fake", "make_fx", "export"])
def test_tensors_without_values_leave_no_record(how, monkeypatch, records):
    """A fake buffer would take the later calls' reports, and no label could be read from it."""
    monkeypatch.setattr(ops.upsample, "_raises_at_once", lambda logits: False)  # the way of a GPU
    logits, target = torch.randn(2, 5, 3, 4), torch.zeros(2, 6, 8, dtype=torch.int64)
    target[1, 2, 3] = 77
    without_values((logits, target), how)
    ops.raise_on_bad_target()
    assert ops.upsample_cross_entropy(logits, target).isnan()
    with pytest.raises(ValueError, match=r"target value 77 at \(batch 1, row 2, column 3\)"):
        ops.raise_on_bad_target()


@pytest.mark.parametrize("of_targets", [False, True])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_vmap_records_the_first_bad_label(backend, of_targets, monkeypatch, records):
    monkeypatch.setattr(ops.upsample, "_raises_at_once", lambda logits: False)
    logits, target = torch.randn(3, 2, 5, 3, 4), torch.zeros(3, 2, 6, 8, dtype=torch.int64)
    target[1, 0, 2, 3], target[2, 1, 1, 1] = 77, 99
    loss = lambda x, t: ops.upsample_cross_entropy(x, t, backend=backend)
    if of_targets:
        losses = torch.vmap(loss)(logits, target)
        assert losses.isnan().tolist() == [False, True, True]
    else:
        assert torch.vmap(loss, (0, None))(logits, target[1]).isnan().all()
    with pytest.raises(ValueError, match=r"target value 77 at \(batch 0, row 2, column 3\)"):
        ops.raise_on_bad_target()
    ops.raise_on_bad_target()


def test_opcheck():
    report = report_of(77, 0, 2, 3)
    record = torch.zeros(5, dtype=torch.int64)
    torch.library.opcheck(torch.ops.depict_kernels.record_bad_target.default, (record, report))


def _bad_batch():
    logits, target = torch.randn(1, 4, 3, 3, device="cuda"), torch.zeros(1, 7, 8, dtype=torch.int64).cuda()
    return logits, target


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_replays_record_their_bad_labels(backend, records):
    logits, target = _bad_batch()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ops.upsample_cross_entropy(logits, target, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.upsample_cross_entropy(logits, target, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        loss = ops.upsample_cross_entropy(logits, target, backend=backend)
    graph.replay()
    assert loss.isfinite()
    target[0, 2, 3] = 77
    graph.replay()
    assert loss.isnan()
    target[0, 2, 3] = 0
    graph.replay()  # a good batch forgets nothing
    assert loss.isfinite()
    with pytest.raises(ValueError, match=r"target value 77 at \(batch 0, row 2, column 3\)"):
        ops.raise_on_bad_target()


# What makes the host wait for a GPU: a number read from a tensor, a size that depends on values.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::bincount",
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_loss_on_a_gpu_waits_for_nothing(backend, reduction, monkeypatch, records):
    """The way of a GPU, taken on the CPU, where a wait would go unseen: labels are recorded, not raised."""
    monkeypatch.setattr(ops.upsample, "_raises_at_once", lambda logits: False)
    logits = torch.randn(2, 5, 3, 4, requires_grad=True)
    target = torch.randint(0, 5, (2, 9, 11))
    target[1, 2, 3] = 77
    with torch.autograd.profiler.profile() as profile:
        loss = ops.upsample_cross_entropy(
            logits, target, label_smoothing=0.1, reduction=reduction, backend=backend
        )
        loss.sum().backward()
    names = {event.name for event in profile.function_events}
    assert "aten::where" in names and not names & WAITING
    assert loss.isnan().any()
    with pytest.raises(ValueError, match=r"target value 77 at \(batch 1, row 2, column 3\)"):
        ops.raise_on_bad_target()
