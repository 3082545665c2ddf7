"""What ``auto`` takes: classes of shapes, the measured table, compiled graphs, the status page."""

import json
import subprocess
import sys

import pytest
import torch

import depict_kernels.__main__ as page
from depict_kernels import backends, measured, ops
from depict_kernels._constant import constant_in_graphs
from depict_kernels.shape_classes import HEAD_DIMS, shape_class

FEW_HIGH, MANY_HIGH = "up to 32 classes, factor over 8", "33 to 256 classes, factor over 8"


@pytest.fixture
def table(monkeypatch):
    """The CPU as if it were a GPU that was measured: operator -> dtype -> class -> backends. Nothing checks itself."""
    monkeypatch.setattr(backends, "_architecture", lambda device: "sm_90")
    monkeypatch.setattr(backends, "_checks_itself", lambda *_: False)
    torch.compiler.reset()

    def put(**operators):
        monkeypatch.setattr(measured, "AUTO", {"sm_90": operators})
        monkeypatch.setattr(measured, "SOURCES", {"sm_90": "a_record.json"})

    yield put
    torch.compiler.reset()


@pytest.fixture
def taken(monkeypatch):
    """The backends that choose() answered, in order."""
    names = []
    resolve = backends._resolve

    def noted(*arguments):
        names.append(resolve(*arguments))
        return names[-1]

    monkeypatch.setattr(backends, "_resolve", noted)
    return names


@pytest.mark.parametrize(
    "operator, sizes, expected",
    [
        ("subspace_self_attention", {"tokens": 512, "head_dim": 100}, "head_dim 100, up to 512 tokens"),
        ("subspace_cross_attention", {"tokens": 513, "head_dim": 50}, "head_dim 50, over 512 tokens"),
        ("subspace_self_attention", {"tokens": 1174, "head_dim": 101}, None),
        ("subspace_self_attention", {"tokens": 1174, "head_dim": 64}, None),
        (
            "mask_logits",
            {"classes": 32, "width": 512, "patches": 1001},
            "up to 32 classes, width up to 512, over 1000 patches",
        ),
        (
            "mask_logits",
            {"classes": 33, "width": 513, "patches": 1000},
            "33 to 256 classes, width over 512, up to 1000 patches",
        ),
        (
            "mask_logits",
            {"classes": 257, "width": 1, "patches": 4},
            "over 256 classes, width up to 512, up to 1000 patches",
        ),
        ("upsample_argmax", {"classes": 19, "grid": (32, 32), "size": (512, 512)}, FEW_HIGH),
        ("upsample_argmax", {"classes": 256, "grid": (37, 53), "size": (500, 683)}, MANY_HIGH),
        (
            "upsample_confusion",
            {"classes": 1, "grid": (4, 4), "size": (32, 33)},
            "up to 32 classes, factor 2 to 8",
        ),
        ("upsample_cross_entropy", {"classes": 19, "grid": (4, 4), "size": (64, 7)}, None),
    ],
)
def test_classes(operator, sizes, expected):
    assert shape_class(operator, **sizes) == expected


def test_every_gpu_case_is_in_a_class():
    """Else a measurement could decide nothing; and no known head_dim is without a case."""
    from benchmarks import cases, choose

    gpu = [case for case in cases.CASES if case.device == "cuda" and case.operator in backends.OPERATORS]
    assert all(choose._key(case)[2] != "None" for case in gpu)
    assert {case.d for case in gpu if case.family == "attention"} == set(HEAD_DIMS)


def test_choice_goes_by_operator_dtype_and_class(table, taken):
    table(
        upsample_argmax={"float32": {FEW_HIGH: ("reference",)}, "bfloat16": {MANY_HIGH: ("reference",)}},
        mask_logits={"float32": {"up to 32 classes, width up to 512, up to 1000 patches": ("reference",)}},
    )
    low = lambda classes, dtype=torch.float32: torch.randn(1, classes, 2, 2).to(dtype)
    ops.upsample_argmax(low(19), (32, 32))
    ops.upsample_argmax(low(33), (32, 32))  # another class
    ops.upsample_argmax(low(19), (16, 32))  # another factor
    ops.upsample_argmax(low(19, torch.bfloat16), (32, 32))  # another dtype
    ops.upsample_argmax(low(33, torch.bfloat16), (32, 32))
    ops.upsample_confusion(low(19), torch.zeros(1, 32, 32, dtype=torch.uint8))  # another operator
    assert taken == ["reference", "torch", "torch", "torch", "reference", "torch"]


@pytest.mark.parametrize("operator", list(backends.OPERATORS))
def test_every_operator_gives_its_sizes(operator, table, taken):
    shapes = {
        "subspace_self_attention": "head_dim 50, up to 512 tokens",
        "subspace_cross_attention": "head_dim 50, up to 512 tokens",
        "mask_logits": "up to 32 classes, width up to 512, up to 1000 patches",
    }
    table(**{operator: {"float32": {shapes.get(operator, FEW_HIGH): ("reference",)}}})
    w, q, logits = torch.randn(1, 6, 2, 50), torch.randn(1, 4, 2, 50), torch.randn(1, 3, 2, 2)
    target = torch.zeros(1, 32, 32, dtype=torch.uint8)
    arguments = {
        "subspace_self_attention": (w,),
        "subspace_cross_attention": (q, w),
        "mask_logits": (torch.randn(1, 6, 8), torch.randn(1, 3, 8), torch.ones(3), torch.zeros(3), (2, 3)),
        "upsample_cross_entropy": (logits, target),
        "upsample_argmax": (logits, (32, 32)),
        "upsample_confusion": (logits, target),
    }[operator]
    ours = getattr(ops, operator)(*arguments)
    assert taken == ["reference"]
    torch.testing.assert_close(ours, getattr(ops, operator)(*arguments, backend="torch"))


def test_sliding_windows_ask_with_their_sizes(table):
    from train.inference import View, _fused

    table(upsample_argmax={"float32": {FEW_HIGH: ("cpp",)}})
    view = lambda size: View(torch.randn(2, 3, 4, 4), (0,), (0,), size, size, size, False)
    assert _fused("upsample_argmax", view((64, 64))) and not _fused("upsample_argmax", view((16, 16)))


def test_the_next_backend_serves_where_the_first_is_not_built(table):
    table(upsample_argmax={"float32": {FEW_HIGH: ("triton", "cuda", "cpp", "reference")}})
    expected = next(
        name
        for name in ("triton", "cuda", "cpp", "reference")
        if backends.why_unavailable(name, "upsample_argmax", "cpu", torch.float32) is None
    )
    sizes = {"classes": 3, "grid": (2, 2), "size": (32, 32)}
    assert backends.choose("auto", "upsample_argmax", torch.randn(1, 3, 2, 2), **sizes) == expected
    # What takes the tensor must take the parameters too; "reference" takes every dtype.
    half = {"parameter_dtype": torch.int8}
    assert backends.choose("auto", "upsample_argmax", torch.randn(1, 3, 2, 2), **half, **sizes) == "reference"


def test_explicit_backends_ask_no_table(table):
    table(upsample_argmax={"float32": {FEW_HIGH: ("reference",)}})
    assert backends.choose("torch", "upsample_argmax", torch.randn(1, 3, 2, 2)) == "torch"
    with backends.use_backend("torch"):
        assert backends.choose("auto", "upsample_argmax", torch.randn(1, 3, 2, 2)) == "torch"


def counted(function, **options):
    """function compiled as one graph, and the list that grows with every graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **options), graphs


def names_in(graph) -> set[str]:
    return {str(node.target) for node in graph.graph.nodes if "depict_kernels" in str(node.target)}


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_new_image_size_compiles_nothing_anew(dynamic, table):
    table(
        upsample_argmax={"float32": {FEW_HIGH: ("reference",)}},
        upsample_cross_entropy={"float32": {FEW_HIGH: ("reference",)}},
    )

    def f(logits, target):
        loss = ops.upsample_cross_entropy(logits, target, check_targets=False)
        return loss, ops.upsample_argmax(logits, target.shape[1:])

    compiled, graphs = counted(f, dynamic=dynamic)
    for count, (batch, side) in enumerate([(2, 3), (3, 5), (4, 7), (5, 9)]):
        logits = torch.randn(batch, 5, side, side + 1)
        target = torch.randint(0, 5, (batch, 16 * side, 13 * side + 20))
        torch.testing.assert_close(compiled(logits, target), f(logits, target))
        # By default the second size makes dimensions dynamic; from then on, or from the start, one graph serves all.
        assert len(graphs) == (1 if dynamic or count == 0 else 2)
    assert all("upsample_argmax" in str(names_in(graph)) for graph in graphs)
    # Another class of shapes is another graph, on stock operators.
    before = len(graphs)
    logits, target = torch.randn(2, 5, 6, 6), torch.randint(0, 5, (2, 24, 24))
    torch.testing.assert_close(compiled(logits, target), f(logits, target))
    taken = lambda graph: {
        node.args[-1]
        for node in graph.graph.nodes
        if node.op == "call_function" and str(node.target).startswith("depict_kernels.upsample_cross_entropy")
    }
    assert len(graphs) == before + 1 and taken(graphs[-1]) == {"torch"} != taken(graphs[0])


def test_attention_and_mask_head_compile_once_for_all_image_sizes(table):
    table(
        subspace_self_attention={"float32": {"head_dim 50, up to 512 tokens": ("reference",)}},
        mask_logits={"float32": {"up to 32 classes, width up to 512, up to 1000 patches": ("reference",)}},
    )

    def f(w, classes, weight, bias, grid):
        out = ops.subspace_self_attention(w)
        return ops.mask_logits(out.flatten(2), classes, weight, bias, grid)

    compiled, graphs = counted(f, dynamic=True)
    arguments = lambda side: (
        torch.randn(2, side * 4, 2, 50), torch.randn(2, 5, 100), torch.ones(5), torch.zeros(5), (side, 4),
    )  # fmt: skip
    for side in (3, 5, 8):
        inputs = arguments(side)
        torch.testing.assert_close(compiled(*inputs), f(*inputs))
    assert len(graphs) == 1 and len(names_in(graphs[0])) == 2
    inputs = arguments(130)  # 520 tokens: many
    torch.testing.assert_close(compiled(*inputs), f(*inputs))
    assert len(graphs) == 2 and len(names_in(graphs[1])) == 1


def test_without_a_table_no_graph_is_guarded_by_the_shape(table):
    table()
    compiled, graphs = counted(
        lambda logits, target: ops.upsample_cross_entropy(logits, target), dynamic=True
    )
    for side in (4, 40, 3):  # factors 10, 1 and 40/3
        compiled(torch.randn(2, 5, side, side), torch.randint(0, 5, (2, 40, 40)))
    assert len(graphs) == 1


def test_export_with_dynamic_sizes(table):
    table(upsample_argmax={"float32": {FEW_HIGH: ("reference",)}})

    class Labels(torch.nn.Module):
        def forward(self, logits, image):
            return ops.upsample_argmax(logits, image.shape[-2:])

    auto = torch.export.Dim.AUTO
    logits, image = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 64, 80)
    program = torch.export.export(Labels(), (logits, image), dynamic_shapes=[{0: auto, 2: auto, 3: auto}] * 2)
    assert "depict_kernels.upsample_argmax" in str(program.graph)
    logits, image = torch.randn(3, 3, 7, 6), torch.randn(3, 3, 7 * 16, 6 * 16)
    assert torch.equal(program.module()(logits, image), Labels()(logits, image))


def test_status_page_shows_the_classes(table, monkeypatch, capsys):
    table(upsample_argmax={"bfloat16": {FEW_HIGH: ("reference",), MANY_HIGH: ("cpp", "reference")}})
    monkeypatch.setattr(sys, "argv", ["depict_kernels"])
    page.main()
    text = capsys.readouterr().out
    assert "auto takes (measured on sm_90: benchmarks/results/a_record.json):" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["upsample_argmax", "otherwise", "torch"] in lines and ["mask_logits", "torch"] in lines
    assert [*f"bfloat16, {FEW_HIGH}".split(), "reference"] in lines
    monkeypatch.setattr(sys, "argv", ["depict_kernels", "--json"])
    page.main()
    shown = json.loads(capsys.readouterr().out)["operators"]["upsample_argmax"]["auto"]
    assert shown.keys() == {f"bfloat16, {FEW_HIGH}", f"bfloat16, {MANY_HIGH}", "otherwise"}


def test_status_page_of_a_cpu(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["depict_kernels"])
    page.main()
    assert "auto takes (C++ where it is built and measured ahead):" in capsys.readouterr().out


def test_require_names_what_is_missing():
    backends.require("auto", backends.OPERATORS, "cpu", torch.float32)
    backends.require("reference", backends.OPERATORS, "cpu", torch.float32)
    with pytest.raises(
        backends.BackendUnavailable, match="'cpp' cannot run mask_logits here: it runs on CPU"
    ):
        backends.require("cpp", ["mask_logits", "upsample_argmax"], "meta", torch.float32)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        backends.require("fast", [], "cpu", torch.float32)


def test_importing_the_package_does_not_import_the_compiler():
    code = "import sys, depict_kernels; print('torch._dynamo' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False"]
    # The mark that spares it is torch's own.
    assert vars(constant_in_graphs(lambda: None)) == vars(torch.compiler.assume_constant_result(lambda: None))
