"""Trained models are read again, and training starts from them: same classes, other classes, other image sizes."""

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from tiny_run import SIDE, arguments, make_data, settings

from depict_kernels.models import create_model, load_model, start_from
from depict_kernels.models.checkpoints import read_checkpoint, weights_of
from train import checkpoint, run

DECODERS = ("depict_sa", "depict_ca", "segmenter_mask", "segmenter_linear")


def train(data, runs, **overrides):
    assert run.main(arguments(settings(data, runs, **overrides))) == 0
    return runs / "tiny"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("trained"), train__ema_decay=0.5, train__steps=3)


@pytest.fixture
def four_classes(tmp_path):
    """The same kind of data with a class fewer: door is wall."""
    from PIL import Image

    root = make_data(tmp_path / "four", train_images=4)
    for path in root.glob("annotations/*/*.png"):
        Image.open(path).point(lambda value: value - (value > 3)).save(path)
    (root / "classes.txt").write_text("sky\ngrass\nwall\nroof")
    return root


def test_a_run_folder_gives_its_best_model_back(trained):
    model = load_model(trained)
    state = read_checkpoint(trained / "best.pt")
    assert not model.training and model.num_classes == 5
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["model"][name]), name
    images = torch.randn(2, 3, SIDE, SIDE)
    torch.testing.assert_close(model.predict(images), load_model(trained / "best.pt").predict(images))
    last = read_checkpoint(trained / "last.pt")
    averaged = load_model(trained / "last.pt", backend="reference")
    assert averaged.backend == "reference"
    for name, value in averaged.state_dict().items():
        assert torch.equal(value, last["ema"][name]), name
    assert any(not torch.equal(last["ema"][name], value) for name, value in last["model"].items())


@pytest.mark.parametrize("name", DECODERS)
def test_what_has_a_row_per_class_starts_anew(name, tmp_path):
    def make(num_classes, img_size=32):
        return create_model(f"{name}_vit_tiny", num_classes, img_size=img_size, backbone_kwargs={"depth": 1})

    source = make(7)
    config = {"model": {"name": f"{name}_vit_tiny", "img_size": None}, "data": {"crop_size": [32, 32]}}
    state = {"model": source.state_dict(), "config": config, "classes": list("abcdefg"), "step": 1}
    checkpoint.save(tmp_path / "a.pt", state)
    same = make(7)
    assert start_from(same, tmp_path / "a.pt") == []
    for key, value in same.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key

    other = make(4)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    anew = start_from(other, tmp_path / "a.pt")
    grown = {key for key, value in make(7).state_dict().items() if value.shape != before[key].shape}
    assert set(anew) == grown and grown
    for key, value in other.state_dict().items():
        assert torch.equal(value, (before if key in anew else source.state_dict())[key]), key


def test_position_embeddings_are_resized(tmp_path):
    def make(img_size):
        return create_model("depict_sa_vit_tiny", 3, img_size=img_size, backbone_kwargs={"depth": 1})

    source, wide = make((32, 64)), make((64, 32))  # as many patches, elsewhere
    config = {
        "model": {"name": "depict_sa_vit_tiny", "img_size": None},
        "data": {"crop_size": [32, 64]},
    }
    state = {"model": source.state_dict(), "config": config, "classes": list("abc"), "step": 1}
    checkpoint.save(tmp_path / "a.pt", state)
    start_from(wide, tmp_path / "a.pt")
    expected = resample_abs_pos_embed(source.backbone.vit.pos_embed, [4, 2], [2, 4], 1)
    torch.testing.assert_close(wide.backbone.vit.pos_embed, expected)
    assert not torch.equal(wide.backbone.vit.pos_embed, source.backbone.vit.pos_embed)


def test_another_model_is_refused_and_nothing_is_loaded(trained):
    kwargs = {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8}
    for name, options, words in (
        ("segmenter_mask_vit_tiny", kwargs, "depict_sa_vit_tiny.*decoder.proj_patch is missing"),
        ("segmenter_mask_vit_tiny", kwargs | {"embed_dim": 96}, "shape"),
        ("depict_sa_vit_tiny", kwargs | {"patch_size": 16}, "has shape"),
    ):
        model = create_model(name, 5, img_size=SIDE, backbone_kwargs=options)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=words):
            start_from(model, trained)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        start_from(model, trained / "none.pt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_model(trained / "config.yaml")


def test_a_checkpoint_of_another_version_is_refused(trained, tmp_path):
    model, state = load_model(trained), read_checkpoint(trained / "best.pt")
    torch.save(state | {"format": "depict_kernels checkpoint 0"}, tmp_path / "a.pt")
    for read in (load_model, lambda path: start_from(model, path)):
        with pytest.raises(ValueError, match="not a checkpoint of this version"):
            read(tmp_path / "a.pt")
    for key in ("model", "config", "classes", "step"):
        torch.save({k: value for k, value in state.items() if k != key}, tmp_path / "a.pt")
        for read in (load_model, lambda path: start_from(model, path)):
            with pytest.raises(ValueError, match=f"is damaged: it lacks {key}"):
                read(tmp_path / "a.pt")
    state["config"]["model"]["decoder_kwargs"] = {"depth": 2}
    checkpoint.save(tmp_path / "a.pt", state)
    with pytest.raises(ValueError, match="do not fit its configuration"):
        load_model(tmp_path / "a.pt")


def test_training_goes_on_from_a_run_with_other_classes(trained, four_classes, tmp_path, capsys):
    overrides = {
        "model__initial_checkpoint": str(trained),
        "model__pretrained": True,
        "optim__lr": 1e-30,
        "optim__min_lr": 0.0,
    }
    folder = train(four_classes, tmp_path, train__steps=1, **overrides)
    assert f"from {trained}; anew: decoder.class_embed, decoder.mask_norm.weight" in capsys.readouterr().out
    model, source = load_model(folder), weights_of(read_checkpoint(trained / "best.pt"))
    assert model.num_classes == 4
    changed = {
        key
        for key, value in model.state_dict().items()
        if value.shape != source[key].shape or not torch.allclose(value, source[key], rtol=0, atol=1e-6)
    }
    assert changed == {"decoder.class_embed", "decoder.mask_norm.weight", "decoder.mask_norm.bias"}
    # Resuming takes the run's own checkpoint, wherever the first one went.
    overrides["model__initial_checkpoint"] = str(tmp_path / "gone.pt")
    train(four_classes, tmp_path, train__steps=1, **overrides)


def test_wrong_files_are_one_line(trained, data, tmp_path, capsys):
    for overrides, words in (
        (
            {"model.initial_checkpoint": str(tmp_path / "none.pt")},
            ["model.initial_checkpoint", "no such checkpoint"],
        ),
        ({"model.initial_checkpoint": str(trained), "model.checkpoint_path": "a"}, ["give one of them"]),
        (
            {"model.checkpoint_path": str(trained / "best.pt")},
            ["whole model", "--model.initial_checkpoint takes it"],
        ),
        (
            {"model.initial_checkpoint": str(trained), "model.decoder_kwargs": {"depth": 2}},
            ["decoder.layers"],
        ),
    ):
        assert run.main(arguments(settings(data, tmp_path) | overrides)) == 2
        error = capsys.readouterr().err
        assert all(word in error for word in words), error
        assert not (tmp_path / "tiny").exists()
