"""Typed configuration: what is accepted, what is refused, and how the refusal reads."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from depict_kernels.models import list_models
from train.config import (
    _SYNONYMS,
    CONFIGS,
    Config,
    flatten,
    help_text,
    load_config,
    parse_overrides,
    save_config,
    to_dict,
)
from train.errors import EXTRA, UserError


def refused(*arguments: str) -> str:
    files, overrides = parse_overrides(list(arguments))
    with pytest.raises(UserError) as error:
        load_config(files, overrides)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--optim.lrr", "1"], ["unknown key optim.lrr", "did you mean optim.lr?"], id="typo"),
        pytest.param(["--lr", "1"], ["unknown key lr", "did you mean optim.lr?"], id="no section"),
        pytest.param(["--train.batch_size", "1"], ["did you mean data.batch_size?"], id="wrong section"),
        pytest.param(["--data.genrate.seed", "1"], ["did you mean data.generate.seed?"], id="nested"),
        pytest.param(["--optim.lr", "fast"], ["optim.lr", "a number", "'fast'"], id="float"),
        pytest.param(["--train.steps", "1.5"], ["train.steps", "an integer or null", "'1.5'"], id="int"),
        pytest.param(["--model.pretrained", "maybe"], ["model.pretrained", "true or false"], id="bool"),
        pytest.param(["--optim.name", "adam"], ["optim.name", "sgd, adamw", "'adam'"], id="choice"),
        pytest.param(["--data.crop_size", "[1,2,3]"], ["data.crop_size", "2 values"], id="tuple"),
        pytest.param(
            ["--data.crop_size", "64"], ["data.crop_size", "write '[64, 64]' for two of it"], id="one of two"
        ),
        pytest.param(["--data.crop_size", "64,32"], ["write '[64, 32]'"], id="no brackets"),
        pytest.param(["--data.crop_size", "[32]"], ["write '[32, 32]' for two of it"], id="one in brackets"),
        pytest.param(["--optim.lr.x", "3"], ["optim.lr: expected a number, got {'x': 3}"], id="below a key"),
        pytest.param(["--eval.scales", "[1,x]"], ["eval.scales", "a list of"], id="list"),
        pytest.param(["--optim", "3"], ["optim", "optim.name"], id="section"),
        pytest.param(["--optim.lr", "0"], ["optim.lr", "above 0"], id="lr 0"),
        pytest.param(["--optim.lr", "nan"], ["optim.lr", "a number", "nan"], id="lr nan"),
        pytest.param(["--data.batch_size", "0"], ["data.batch_size", "at least 1"], id="batch 0"),
        pytest.param(["--optim.betas", "[0.9,1.0]"], ["optim.betas", "at least 0 and below 1"], id="betas"),
        pytest.param(["--data.scale", "[2,1]"], ["data.scale", "smaller number"], id="range reversed"),
        pytest.param(["--optim.min_lr", "1"], ["optim.min_lr", "optim.lr"], id="min_lr above lr"),
        pytest.param(["--eval.stride", "513"], ["eval.stride", "eval.window (512)"], id="gaps"),
        pytest.param(["--run.name", "a/b"], ["run.name", "run.root"], id="run name"),
        pytest.param(["--config", "nowhere.yaml"], ["nowhere.yaml", "demo.yaml"], id="no file"),
    ],
)
def test_refusal_names_the_key_and_what_is_right(arguments, words):
    text = refused(*arguments)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("optim.learning_rate", "optim.lr"),
        ("learning-rate", "optim.lr"),
        ("train.batch_size", "data.batch_size"),
        ("epochs", "train.epochs"),
        ("data.num_workers", "data.workers"),
        ("device", "train.device"),
        ("precision", "train.precision"),
        ("backbone", "model.backbone"),
        ("model.num_classes", "data.classes"),
        ("optim.seed", "train.seed"),
        ("model.backbone_kwarg.depth", "model.backbone_kwargs"),
    ],
)
def test_names_of_other_programs_lead_to_the_key(given, key):
    assert f"unknown key {given.partition('.d')[0]}; did you mean {key}?" in refused(f"--{given}", "3")


def test_synonyms_are_of_keys_that_exist_and_clash_with_none():
    known = set(flatten(to_dict(Config())))
    assert set(_SYNONYMS) <= known
    words = [word for others in _SYNONYMS.values() for word in others.split()]
    assert len(words) == len(set(words)) and not {key.rpartition(".")[2] for key in known} & set(words)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["train"], "'train'"),
        (["--optim.lr"], "needs a value"),
        (["--optim.lr", "--run.name", "x"], "needs a value"),
    ],
)
def test_malformed_command_line(arguments, word):
    with pytest.raises(UserError, match=word):
        parse_overrides(arguments)


def test_null_where_a_value_is_needed(tmp_path):
    (tmp_path / "c.yaml").write_text("optim: {lr: null}")
    assert "optim.lr: expected a number, got null" in refused("--config", str(tmp_path / "c.yaml"))


def test_two_values_are_suggested_only_where_that_helps():
    for value in ("[1,2,3]", "[1,x]", ""):
        assert refused("--data.crop_size", value).endswith(f"got {value!r}")


def test_yaml_errors_name_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    for text, word in [
        ("optim: {lrr: 1}", "did you mean optim.lr?"),
        ("optim: [", "not valid YAML"),
        ("- 1", "expected sections"),
        ("base: c.yaml", "circle"),
        ("base: d.yaml", "d.yaml: no such"),
        (
            "optim:\n  lr: 1e-3\n  momentum: 0\n  lr: 1e-2\n",
            "not valid YAML: the key lr is given twice at line 4, column 3",
        ),
        ("optim: {lr: 1}\ntrain: {seed: 1}\noptim: {momentum: 0}", "the key optim is given twice at line 3"),
    ]:
        file.write_text(text)
        message = refused("--config", str(file))
        assert word in message and str(tmp_path) in message


def test_numbers_with_an_exponent_are_numbers_wherever_they_stand(tmp_path):
    file = tmp_path / "c.yaml"
    written = "{a: -1e-1, b: [1E3, +.5e2], c: '1e-1', d: 1e-x, e: 3, f: 2e+5}"
    right = {"a": -0.1, "b": [1000.0, 50.0], "c": "1e-1", "d": "1e-x", "e": 3, "f": 200000.0}
    file.write_text(f"model: {{decoder_kwargs: {written}}}\nrun: {{name: '1e3'}}")
    config = load_config([file])
    assert config.model.decoder_kwargs == right and config.run.name == "1e3"
    save_config(config, file, {})
    assert load_config([file]) == config
    assert load_config([], {"model.decoder_kwargs.a": "-1e-1"}).model.decoder_kwargs == {"a": -0.1}
    assert load_config([], {"model.decoder_kwargs": written}).model.decoder_kwargs == right


def test_precedence_file_over_base_and_command_line_over_file(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "optim: {lr: 1e-2, momentum: 0.5}\ntrain: {seed: 3}\n"
        "model: {backbone_kwargs: {depth: 2, embed_dim: 48}}"
    )
    (tmp_path / "c.yaml").write_text(
        "base: base.yaml\noptim: {lr: 2e-2}\nmodel: {backbone_kwargs: {depth: 3}}"
    )
    files, overrides = parse_overrides(
        [
            "--config",
            str(tmp_path / "c.yaml"),
            "--train.seed=7",
            "--model.backbone_kwargs.eps",
            "1e-6",
            "--optim.clip_grad",
            "null",
        ]
    )
    config = load_config(files, overrides)
    assert (config.optim.lr, config.optim.momentum, config.train.seed) == (0.02, 0.5, 7)
    assert config.optim.clip_grad is None
    assert config.model.backbone_kwargs == {"depth": 3, "embed_dim": 48, "eps": 1e-6}


def test_saved_configuration_rebuilds_itself(tmp_path):
    files, overrides = parse_overrides(
        [
            "--data.crop_size",
            "[32,48]",
            "--loss.class_weights",
            "[1,0.5]",
            "--model.decoder_kwargs",
            "{depth: 1, a: {b: 2}}",
        ]
    )
    config = load_config(files, overrides)
    save_config(config, tmp_path / "config.yaml", {"torch": "2.11", "git_commit": None})
    assert load_config([tmp_path / "config.yaml"]) == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["versions"]["torch"] == "2.11"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_configurations_are_valid(file: Path):
    config = load_config([file])
    assert config.model.name in list_models()


def test_sizes_follow_from_the_crop_alone(tmp_path):
    config = load_config(
        [CONFIGS / "ade20k_depict_sa_vit_small.yaml"], {"data.crop_size": "[64, 96]", "eval.window": "80"}
    )
    sizes = lambda c: (c.data.base_size, c.eval.resize, c.eval.window, c.eval.stride)
    assert sizes(config) == (64, 64, 80, 48)
    save_config(config, tmp_path / "config.yaml", {})
    assert sizes(load_config([tmp_path / "config.yaml"], {"eval.resize": "null"})) == (64, 64, 80, 48)
    for key in ("data.base_size", "eval.resize", "eval.window", "eval.stride"):
        assert f"{key}: 0 is out of range" in refused(f"--{key}", "0")
    small = load_config([], {"data.crop_size": "[32, 32]", "eval.window": "null", "eval.stride": "null"})
    assert sizes(small) == (512, 512, 32, 16)


def test_ade20k_configurations_follow_the_paper():
    """design.md section 8; a configuration differs from another in what its name says and in nothing else."""
    names = {}
    for decoder in ("depict_sa", "depict_ca", "segmenter_mask"):
        for size in ("tiny", "small", "base", "large"):
            config = load_config([CONFIGS / f"ade20k_{decoder}_vit_{size}.yaml"])
            side, stride = (640, 608) if size == "large" else (512, 480)
            assert config.model.name == f"{decoder}_vit_{size}"
            assert config.model.pretrained and config.model.drop_path_rate == 0.1
            assert config.data.crop_size == (side, side) and config.data.base_size == side
            assert (config.eval.mode, config.eval.resize, config.eval.window, config.eval.stride) == (
                "slide",
                side,
                side,
                stride,
            )
            assert config.data.scale == (0.5, 2.0) and config.data.max_class_share == 0.75
            assert (config.optim.name, config.optim.lr, config.optim.momentum) == ("sgd", 1e-3, 0.9)
            assert (config.optim.weight_decay, config.optim.poly_power, config.optim.min_lr) == (
                0.0,
                0.9,
                1e-5,
            )
            assert (config.data.batch_size, config.train.epochs) == (8, 64)
            names[config.run.name] = flatten(to_dict(config))
    assert len(names) == 12
    allowed = {"run.name", "model.name"} | {
        "data.crop_size",
        "data.base_size",
        "eval.resize",
        "eval.window",
        "eval.stride",
    }
    one = names["ade20k_depict_sa_vit_tiny"]
    for other in names.values():
        assert {key for key in one if one[key] != other[key]} <= allowed


def test_help_explains_every_key():
    text = help_text()
    for key in flatten(to_dict(Config())):
        assert f"--{key} " in text
    assert "None" not in text


def printed(capsys, *arguments: str) -> str:
    from train import run

    assert run.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_help_of_a_command_is_its_own_arguments_first(capsys):
    from train.run import COMMANDS

    for name, command in COMMANDS.items():
        text = printed(capsys, name, "--help")
        assert text == printed(capsys, "help", name) == printed(capsys, name, "-h")
        assert text.startswith(f"usage: python train/run.py {name} ") and len(text.splitlines()) < 60
        places = [text.index(f"\n  --{option.name} ") for option in command.options]
        places += [text.index(f"  --{key}") for key in command.keys]
        assert places[: len(command.options) + 1] == sorted(places[: len(command.options) + 1])
        assert "--loss.label_smoothing" not in text and "python train/run.py keys" in text
    assert COMMANDS["eval"].split(["RUN", "--output=a", "--multiscale", "--data.root", "x"]) == (
        ["RUN"],
        {"output": "a", "multiscale": True},
        ["--data.root", "x"],
    )


def test_every_option_of_a_command_is_in_its_help_and_the_other_way(capsys):
    """What the functions read and what the help promises are the same names."""
    from train import command_eval
    from train.run import COMMANDS

    source = Path(command_eval.__file__).read_text()
    used = set(re.findall(r'own(?:\.get\(|\[)"([\w-]+)"', source))
    offered = {option.name for name in ("eval", "predict") for option in COMMANDS[name].options}
    assert used == offered - {"config"} and used


def test_help_without_a_command_names_all_of_them(capsys):
    from train.run import COMMANDS

    text = printed(capsys, "--help")
    assert all(f"\n  {name} " in text for name in COMMANDS) and text == printed(capsys, "help")
    assert "keys [SECTION|KEY ...]" in text and len(text.splitlines()) < 70


@pytest.mark.parametrize("command", ["check-data", "download-data", "cache-data"])
def test_help_shows_the_defaults_of_the_file_that_the_command_starts_from(capsys, command):
    text = printed(capsys, command, "--help")
    assert "--data.root (a string or null; default data/ADEChallengeData2016)" in text
    assert "Without --config the keys are those of train/configs/ade20k.yaml." in " ".join(text.split())
    assert "default null" in printed(capsys, "keys", "data.root")


def test_keys_of_all_sections_or_some(capsys):
    assert printed(capsys, "keys").rstrip() == help_text()
    text = printed(capsys, "keys", "optim", "data.generate", "train.device")
    shown = set(re.findall(r"^  --([\w.]+) ", text, re.MULTILINE))
    every = flatten(to_dict(Config()))
    assert shown == {"train.device"} | {k for k in every if k.startswith(("optim.", "data.generate."))}
    assert "\noptim: Optimiser" in text and "train: " not in text


@pytest.mark.parametrize(("name", "hint"), [("optm", "optim"), ("learning_rate", "optim.lr"), ("op", "keys")])
def test_keys_of_no_section(name, hint, capsys):
    from train import run

    assert run.main(["keys", name]) == 2
    text = capsys.readouterr().err
    assert f"unknown section or key {name}; " in text and hint in text.partition(";")[2]


@pytest.mark.parametrize("package", ["docstring_parser", "jsonargparse", "yaml"])
def test_a_missing_package_of_the_extra_is_one_line(package, monkeypatch, capsys):
    from train import run

    monkeypatch.delitem(sys.modules, "train.config")
    monkeypatch.setitem(sys.modules, package, None)  # what import then says is ModuleNotFoundError
    assert run.main(["--help"]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and EXTRA[package] in text and 'pip install -e ".[train]"' in text


def test_other_import_errors_keep_their_traceback(monkeypatch):
    from train import run

    def broken(names):
        import matplotlib.nowhere  # noqa: F401

    monkeypatch.setattr(run, "show_help", broken)
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        run.main(["--help"])


@pytest.mark.parametrize("compiled", [False, True])
def test_ctrl_c_while_a_command_imports_is_one_line(compiled, monkeypatch, capsys):
    from train import run

    class Interrupted:
        def find_spec(self, name, *_):
            if name == "train.config":
                try:
                    raise KeyboardInterrupt
                finally:
                    if compiled:  # which is what pybind11 makes of it
                        raise ImportError("initialization failed")

    # torch and the like are imported in main, not before it
    code = "import train.run, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parents[1], check=False).returncode == 0
    monkeypatch.delitem(sys.modules, "train.config")
    monkeypatch.delattr("train.config")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert run.main(["--help"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_every_package_of_the_extra_is_known():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    listed = re.findall(r'"([\w-]+)', text.partition("\ntrain = [")[2].partition("\n]")[0])
    assert len(listed) > 5 and set(listed) <= set(EXTRA.values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["help", "foo"], ["unknown command 'foo'", "check-data"], id="help of it"),
        pytest.param(["foo", "--help"], ["unknown command 'foo'"], id="its help"),
        pytest.param(["evl", "runs/demo"], ["did you mean eval?"], id="typo"),
        pytest.param(["help", "eval", "foo"], ["help takes one command"], id="two"),
        pytest.param(["eval", "RUN", "--multiscale=maybe"], ["--multiscale", "true or false"], id="switch"),
        pytest.param(["eval", "RUN", "--multi-scale"], ["did you mean --multiscale?"], id="option"),
        pytest.param(["eval", "RUN", "-m"], ["unknown option -m", "eval --help"], id="short option"),
        pytest.param(["eval", "RUN", "--output", "--multiscale"], ["--output needs a value"], id="no value"),
        pytest.param(["predict", "RUN", "--checkpoint="], ["--checkpoint needs a value"], id="empty value"),
        pytest.param(["--multiscale"], ["unknown key multiscale"], id="not an option of training"),
    ],
)
def test_unknown_words_are_one_line(arguments, words, capsys):
    from train import run

    assert run.main(arguments) == 2
    out, text = capsys.readouterr()
    assert not out and text.count("\n") == 1 and all(word in text for word in words)


def test_help_of_keys(capsys):
    text = printed(capsys, "keys", "--help")
    assert text == printed(capsys, "help", "keys") and "keys [SECTION|KEY ...]" in text.splitlines()[0]


@pytest.mark.parametrize("value, truth", [("", True), ("=true", True), ("=false", False), ("=No", False)])
def test_a_switch_honours_its_explicit_value(value, truth):
    from train.run import COMMANDS

    for name in ("multiscale", "compare-stock"):
        assert COMMANDS["eval"].split(["RUN", f"--{name}{value}"])[1] == {name: truth}
    assert COMMANDS["predict"].split(["RUN", "a", f"--multiscale{value}"])[1] == {"multiscale": truth}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optim.lr", "1e400", "finite"),
        ("data.scale", "[.inf, .inf]", "finite"),
        ("loss.class_weights", "[.inf, 1]", "finite"),
        ("loss.class_weights", "[0, 0]", "one must be above 0"),
        ("train.threads", "100000", "at most 1024"),  # torch crashes on it
    ],
)
def test_values_that_cannot_be_computed_with(key, value, words):
    text = refused(f"--{key}", value)
    assert text.startswith(f"{key}: ") and words in text


def test_configuration_files_are_utf8_with_or_without_a_mark(tmp_path):
    (tmp_path / "a.yaml").write_bytes("\ufeffdata: {root: grüße}\n".encode())
    assert load_config([tmp_path / "a.yaml"]).data.root == "grüße"
