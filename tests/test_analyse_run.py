"""The command `analyse`: its report and picture, against the functions it is made of."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_inference import picture, settings, tiny
from tiny_run import arguments, make_data, write_config
from tiny_run import settings as run_settings

from depict_kernels import analysis
from depict_kernels.models import load_model
from train import run
from train.analysis import _mean_of, lines, measure, patches_and_labels
from train.analysis_plot import analysis_figure


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("analysed")
    data = make_data(root / "data")
    keys = run_settings(
        data,
        root / "runs",
        train__steps=3,
        model__decoder_kwargs={"depth": 2, "num_heads": 2, "head_dim": 16},
    )
    assert run.main(arguments(keys)) == 0
    return root / "runs" / "tiny"


def read(folder, name="analysis.json"):
    return json.loads((folder / name).read_text())


def test_the_report_agrees_with_the_evaluation_and_the_operators(trained, capsys):
    assert run.main(["analyse", str(trained), "--sigmas", "0.05,3", "--repeats", "2", "--images", "3"]) == 0
    printed = capsys.readouterr().out
    report = read(trained)
    assert report["miou"] == json.loads((trained / "results.json").read_text())["miou"]
    assert [row["sigma"] for row in report["noise"]] == [0.05, 3.0]
    assert all(len(row["miou"]) == 2 for row in report["noise"])
    assert len(set(report["noise"][1]["miou"])) == 2  # two draws
    assert (
        report["embedded_images"] == 3
        and report["images"] == 4
        and len(report["embeddings"]) == 3
        and len(report["layers"]) == 2
    )
    model = load_model(trained)
    assert [layer["step"] for layer in report["layers"]] == [
        layer.step.item() for layer in model.decoder.layers
    ]
    for stage in report["embeddings"]:
        assert stage["cumulative_variance"] == sorted(stage["cumulative_variance"])
        assert stage["cumulative_variance"][-1] == pytest.approx(1)
        assert 0 < stage["rate_reduction"] < stage["coding_rate"]
    matrix = np.array(report["classes"]["coherence"])
    assert matrix.shape == (5, 5) and np.allclose(matrix, matrix.T) and np.allclose(matrix.diagonal(), 1)
    assert report["classes"]["span_energy"] <= report["classes"]["best_span_energy"] <= 1
    assert "into layer 1" in printed and "after layer 2" in printed and f"{report['miou']:.4f}" in printed
    with Image.open(trained / "plots" / "analysis.png") as image:
        assert image.width > 1000 and image.convert("L").getextrema() == (0, 255)
    assert load_model(trained).state_dict().keys() == model.state_dict().keys()


def test_again_and_elsewhere(trained, tmp_path, capsys):
    few = ["--images", "1"]
    for _ in range(2):  # its own file may be written again
        assert (
            run.main(
                ["analyse", str(trained), "--checkpoint", "last", *few, "--sigmas", "0", "--repeats", "1"]
            )
            == 0
        )
    last = read(trained, "analysis_last.json")
    assert last["noise"] == [{"sigma": 0.0, "miou": [last["miou"]], "broken": 0}]
    assert (trained / "plots" / "analysis_last.png").exists()
    assert run.main(["analyse", str(trained), "--output", str(tmp_path / "there.json"), "--images", "1",
                     "--sigmas", "0.01"]) == 0  # fmt: skip
    assert read(tmp_path, "there.json")["checkpoint"] == "best" and (tmp_path / "there_analysis.png").exists()
    capsys.readouterr()
    results, own = (trained / "results.json").read_bytes(), (trained / "analysis_last.json").read_bytes()
    assert run.main(["analyse", str(trained), "--output", str(trained / "results.json")]) == 2
    assert run.main(["eval", str(trained), "--output", str(trained / "analysis_last.json")]) == 2
    assert capsys.readouterr().err.count("exists and holds no results of this command") == 2
    last_by_path = ["analyse", str(trained), "--checkpoint", str(trained / "last.pt")]
    assert run.main([*last_by_path, "--eval.max_images", "2"]) == 2  # it is the run's own, of other settings
    assert "analysis_last.json: holds the results of images 4, not 2" in capsys.readouterr().err
    assert (trained / "results.json").read_bytes() == results
    assert (trained / "analysis_last.json").read_bytes() == own


def test_noise_that_breaks_the_model_counts_as_0_and_is_told(trained, tmp_path, capsys):
    words = ["--images", "1", "--sigmas", "1e30,0", "--repeats", "2", "--output", str(tmp_path / "a.json")]
    assert run.main(["analyse", str(trained), *words]) == 0
    report, printed = read(tmp_path, "a.json"), capsys.readouterr().out
    assert report["noise"] == [
        {"sigma": 1e30, "miou": [0.0, 0.0], "broken": 2},
        {"sigma": 0.0, "miou": [report["miou"]] * 2, "broken": 0},
    ]
    assert (
        "1e+30     0.0000  (0.0000, 0.0000)  NaN or infinite masks, which count as 0, in 2 of 2 draws"
        in printed
    )
    assert printed.count("NaN") == 1
    axes = analysis_figure(report, "abcde", "").axes[-1]
    assert "mean of 2 draws; 0 for NaN or infinite masks" in [line.get_label() for line in axes.lines]


@pytest.mark.parametrize("command, name", [("analyse", "a_analysis.png"), ("eval", "a_confusion.png")])
def test_a_folder_in_the_place_of_the_picture_is_told_first(command, name, trained, tmp_path, capsys):
    (tmp_path / name).mkdir()
    assert run.main([command, str(trained), "--output", str(tmp_path / "a.json")]) == 2
    assert f"{name}: is a folder" in capsys.readouterr().err and not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--sigmas", "0.1,x"], "--sigmas 0.1,x: expected"),
        (["--sigmas", "-1"], "--sigmas -1: expected"),
        (["--sigmas", "nan"], "--sigmas nan: expected"),
        (["--repeats", "0"], "--repeats 0: expected a whole number"),
        (["--images", "two"], "--images two: expected a whole number"),
        (["more"], "takes one run, got"),
        (["--sigma", "1"], "did you mean --sigmas"),
    ],
)
def test_bad_arguments_are_one_line(trained, words, message, capsys):
    assert run.main(["analyse", str(trained), *words]) == 2
    assert message in capsys.readouterr().err


def test_other_decoders(tmp_path, capsys):
    dataset = OneImage(torch.randint(0, 5, (32, 64), dtype=torch.uint8))
    report = measure(tiny("segmenter_mask_vit_tiny"), dataset, settings(mode="whole"), 1)
    assert len(report["embeddings"]) == 3 and report["layers"] == []
    assert len(lines(report | {"width": 48, "miou": 0.5, "noise": []})) == 8
    data = make_data(tmp_path / "data", train_images=4, val_images=2)
    keys = run_settings(data, tmp_path, model__name="segmenter_linear_vit_tiny", train__steps=1)
    del keys["model.decoder_kwargs"]
    assert run.main(["train", "--config", str(write_config(tmp_path / "keys.yaml", keys))]) == 0
    capsys.readouterr()
    assert run.main(["analyse", str(tmp_path / "tiny")]) == 2
    assert "segmenter_linear_vit_tiny: LinearDecoder has no self-attention layers" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("size", [(32, 48), (50, 37), (20, 20)])
def test_labels_are_those_of_the_patches_centres(mode, size):
    model, cfg = tiny(), settings(mode=mode, resize=40, window=32)  # patches of 16
    target = torch.arange(size[0])[:, None].expand(size).clone().to(torch.uint8)
    image = picture(*size)
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    patches, labels = patches_and_labels(model, image, target, cfg)
    height, width = seen[0].shape[-2:]
    assert patches.shape[1] == len(labels) == (height // 16) * (width // 16)
    if mode == "slide":
        assert (height, width) == (32, 32)
    rows = labels.view(height // 16, width // 16)
    known = rows != 255
    assert known[0, 0] and ((rows == rows[:, :1]) | ~known).all()
    scaled = round(40 * size[0] / min(size))  # rows of the resized image
    top = (scaled - 32) // 2 if mode == "slide" else 0
    for i, row in enumerate(rows[:, 0].tolist()):
        at = top + 16 * i + 8
        expected = 255 if at >= scaled else (at + 0.5) * size[0] / scaled
        assert row == 255 if expected == 255 else abs(row + 0.5 - expected) <= 1


class OneImage:
    def __init__(self, target, times=1):
        self.target, self.times = target, times

    def __len__(self):
        return self.times

    def read(self, index):
        return picture(*self.target.shape), self.target


def test_measures_by_hand():
    model, cfg = tiny(), settings(mode="whole")
    target = torch.randint(0, 5, (32, 64), dtype=torch.uint8)
    dataset = OneImage(target)
    report = measure(model, dataset, cfg, 4)
    patches, labels = patches_and_labels(model, dataset.read(0)[0], target, cfg)
    x = analysis.layer_embeddings(model.decoder, patches)[0][0][0].double()
    z = F.normalize(x - x.mean(-1, keepdim=True), dim=-1)
    stage = report["embeddings"][0]
    assert stage["coding_rate"] == pytest.approx(analysis.coding_rate(z).item(), rel=1e-4)
    expected = analysis.coding_rate(z) - analysis.class_coding_rate(z, labels)
    assert stage["rate_reduction"] == pytest.approx(expected.item(), rel=1e-3)
    images, classes = (e[0] for e in model.decoder.embeddings(patches))
    assert report["classes"]["span_energy"] == pytest.approx(analysis.span_energy(images, classes)[0].item())
    unlabelled = measure(model, OneImage(torch.full_like(target, 255)), cfg, 1)
    assert unlabelled["embeddings"][0]["rate_reduction"] is None
    assert unlabelled["embeddings"][0]["coding_rate"] == pytest.approx(stage["coding_rate"])


def test_the_decoder_runs_once_per_image_and_bases_are_taken_once(monkeypatch):
    model, seen = tiny(), []
    model.decoder.layers[0].register_forward_hook(lambda *_: seen.append("run"))
    basis = analysis._basis
    monkeypatch.setattr(analysis, "_basis", lambda x: seen.append("basis") or basis(x))
    measure(model, OneImage(torch.zeros(32, 64, dtype=torch.uint8), 3), settings(mode="whole"), 3)
    heads = sum(layer.num_heads for layer in model.decoder.layers)
    assert seen.count("run") == 3 and seen.count("basis") == heads + 3  # and of each image's class embeddings


def test_means_leave_out_what_is_missing():
    ones = [{"a": 1.0, "b": None, "c": [1.0, 2.0, 3.0]}, {"a": 3.0, "b": None, "c": [3.0, 2.0]}]
    assert _mean_of(ones) == {"a": 2.0, "b": None, "c": [2.0, 2.0]}
    assert _mean_of([{"b": None}, {"b": 4.0}]) == {"b": 4.0}
