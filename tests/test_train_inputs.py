"""What a training run refuses: in one line that names the key or the file, before anything is made."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_run import CLASSES, arguments, configuration, make_data, settings

from depict_kernels import extension, ops
from depict_kernels.backends import BackendUnavailable
from depict_kernels.models import create_model, list_models
from train import build
from train import run as command_line
from train.errors import UserError
from train.run_folder import check_writable


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def refusal(capsys, keys: dict) -> str:
    """The one line that the command prints."""
    assert command_line.main(["train", *arguments(keys)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"optim.lrr": 1}, ["optim.lrr", "optim.lr?"]),
        ({"data.root": "/nowhere"}, ["/nowhere/images/training", "no such folder"]),
        ({"data.classes": "nowhere.csv"}, ["nowhere.csv", "no such file"]),
        ({"data.batch_size": 0}, ["data.batch_size", "at least 1"]),
        ({"model.name": "depict_sa_vit_tny"}, ["depict_sa_vit_tny", "depict_sa_vit_tiny"]),
        ({"model.backbone": "vit_tiny_patch16_383"}, ["vit_tiny_patch16_383", "vit_tiny_patch16_384"]),
        ({"model.backbone_kwargs": {"num_haeds": 3}}, ["model", "num_haeds"]),
        ({"model.backend": "cuad"}, ["cuad", "cuda"]),
        ({"model.backbone_kwargs": {"patch_size": 0}}, ["model: ", "zero"]),
        ({"model.decoder_kwargs": {"head_dim": 0}}, ["model: head_dim must be at least 1, got 0"]),
        ({"model.decoder_kwargs": {"num_heads": 0}}, ["model: num_heads must be at least 1, got 0"]),
        ({"model.decoder_kwargs": {"depth": -1}}, ["depth", "at least 0"]),
        ({"train.seed": 2**70}, ["train.seed", "at most 1e+18"]),
        ({"run.name": ".."}, ["run.name", "plain folder name"]),
        ({"train.device": "cuda:97"}, ["train.device", "cuda:97"]),
        ({"train.device": "gpu"}, ["train.device", "'gpu'"]),
        ({"run.resume": "nowhere.pt"}, ["nowhere.pt", "no such checkpoint"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line(data, tmp_path, capsys, overrides, words):
    text = refusal(capsys, settings(data, tmp_path) | overrides)
    assert all(word in text for word in words), text


@pytest.mark.parametrize("name", ["depict_sa_vit_tiny", "depict_ca_vit_tiny", "segmenter_mask_vit_tiny"])
def test_backend_is_refused_before_anything_is_made(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build, "GENERATED", tmp_path / "generated")
    monkeypatch.setattr(extension, "load", lambda part: "it was not built")
    keys = settings(tmp_path / "no_data", tmp_path / "runs", model__name=name, model__backend="cpp")
    text = refusal(capsys, keys | {"data.root": "null"})
    operator = "mask_logits" if name.startswith("segmenter") else "subspace_self_attention"
    assert f"error: model.backend: backend 'cpp' cannot run {operator} here: it was not built" in text
    assert "Available: auto, reference, torch" in text
    assert not (tmp_path / "generated").exists() and not (tmp_path / "runs").exists()


def test_backend_of_the_linear_decoder_needs_the_loss_alone(tmp_path):
    check = lambda device, **overrides: build.check_backend(
        configuration(tmp_path, tmp_path, model__name="segmenter_linear_vit_tiny", **overrides),
        torch.device(device),
        training=True,
    )
    check("cpu", model__backend="cpp")
    check("cpu", model__backend="auto")
    with pytest.raises(BackendUnavailable, match="triton.*cannot run upsample_cross_entropy here"):
        check("meta", model__backend="triton", train__precision="bf16")


def test_every_decoder_says_which_operators_it_runs():
    """check_backend must ask for what a forward calls, no more and no less."""
    decoders = {name.partition("_vit_")[0] for name in list_models()}
    assert decoders == build._OPERATORS.keys()
    for decoder in decoders:
        name = f"{decoder}_vit_tiny"
        model = create_model(name, 3, img_size=32, backbone_kwargs={"depth": 1}, decoder_kwargs={})
        called = []
        with pytest.MonkeyPatch.context() as patch:
            for operator in ("subspace_self_attention", "subspace_cross_attention", "mask_logits"):
                run = getattr(ops, operator)
                noted = lambda *a, run=run, operator=operator, **k: (called.append(operator), run(*a, **k))[1]
                patch.setattr(ops, operator, noted)
            model.eval()(torch.zeros(1, 3, 32, 32))
        assert set(called) == set(build._OPERATORS[decoder]), name


def test_more_workers_than_cores_are_kept_and_said_once(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
    assert command_line.main(arguments(settings(data, tmp_path, data__workers=2, train__steps=2))) == 0
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("2 loader processes share 1 cores") == 1


def test_bad_files_are_named(tmp_path, capsys):
    data = make_data(tmp_path / "data", train_images=2, val_images=1)
    keys = settings(data, tmp_path, data__batch_size=2)
    image, annotation = data / "images/training/image_001.jpg", data / "annotations/training/image_001.png"
    good = image.read_bytes(), annotation.read_bytes()
    for workers in (0, 1):
        keys["data.workers"] = workers
        image.write_bytes(good[0][: len(good[0]) // 2])
        assert str(image) in refusal(capsys, keys)
        image.write_bytes(good[0])
        Image.new("L", (32, 32), len(CLASSES) + 1).save(annotation)
        text = refusal(capsys, keys)
        assert str(annotation) in text and "label 6" in text
        Image.new("L", (30, 32), 1).save(annotation)
        assert str(annotation) in refusal(capsys, keys)
        annotation.write_bytes(good[1])


def test_pretrained_weights_that_cannot_be_had(data, tmp_path, capsys, monkeypatch):
    import timm

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("[Errno 101] Network is unreachable\nand a long story")
        return build(name, **options)

    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(
        "depict_kernels.models.backbone._why_no_hub", lambda config: None
    )  # it breaks off later
    text = refusal(capsys, settings(data, tmp_path, model__pretrained=True))
    for word in ("Network is unreachable", "--model.checkpoint_path FILE", "--model.pretrained false"):
        assert word in text
    assert not (tmp_path / "tiny").exists()


def unwritable(tmp_path, kind) -> Path:
    if kind == "file":
        (tmp_path / "file").write_text("")
        return tmp_path / "file"
    if kind == "link":
        (tmp_path / "link").symlink_to(tmp_path / "gone")
        return tmp_path / "link"
    if kind == "permission":
        (tmp_path / "closed").mkdir(mode=0o500)
        if os.access(tmp_path / "closed", os.W_OK):
            pytest.skip("root may write anywhere")
        return tmp_path / "closed"
    if not Path("/proc/self").is_dir():
        pytest.skip("there is no /proc, where root cannot make folders either")
    return Path("/proc/runs")


@pytest.mark.parametrize("kind", ["file", "link", "permission", "proc"])
def test_a_run_folder_that_cannot_be_made(data, tmp_path, capsys, monkeypatch, kind):
    """Said first: no data is read or made, no model built."""
    root = unwritable(tmp_path, kind)
    for name in ("data_root", "split", "model"):
        monkeypatch.setattr(
            build, name, lambda *args, name=name, **options: pytest.fail(f"build.{name} first")
        )
    text = refusal(capsys, settings(data, tmp_path, run__root=str(root)))
    assert f"{root / 'tiny'}: cannot be made: " in text and "change --run.root" in text
    assert str(root.parent if kind == "proc" else root) in text.partition("made: ")[2]


def test_checking_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "a" / "b", "--run.root")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="file: cannot be written: .*file is no folder"):
        (tmp_path / "file").write_text("")
        check_writable(tmp_path / "file", "--run.root")


def test_an_image_of_another_format_is_named(tmp_path, capsys):
    image = make_data(tmp_path) / "images" / "training" / "image_003.jpg"
    image.rename(image.with_suffix(".webp"))
    text = refusal(capsys, settings(tmp_path, tmp_path / "runs"))
    assert (
        "image_003.png: has no image, expected" in text and "image_003.webp is neither JPEG nor PNG" in text
    )
