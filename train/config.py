"""Configuration: the dataclasses of train/schema.py, filled from YAML files and the command line.

A YAML file may start from another one (``base: ade20k.yaml``, a path relative to the file itself), so that
a configuration states its differences only. ``--section.key value`` on the command line comes last.
Nothing is ignored silently: an unknown key, a wrong type or a value out of range raises ``UserError``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import docstring_parser
import jsonargparse
import yaml

from train.errors import UserError, first_line
from train.schema import Config


class Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, and takes 1e-3 for a number as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        seen = set()
        for key in (key for key in keys if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes the strings that :class:`Loader` would take for numbers."""


for _either in (Loader, Dumper):
    _either.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )

CONFIGS = Path(__file__).parent / "configs"


def load_config(files: list[str | Path] = (), overrides: dict[str, Any] | None = None) -> Config:
    """The configuration from YAML files (later ones win) and dotted overrides ``{"optim.lr": "1e-3"}``.

    Raises ``UserError`` naming the key (with the nearest known one), the value and what would be right.
    """
    merged: dict[str, Any] = {}
    for file in files:
        merged = _merge(merged, _read_yaml(Path(file)))
    for key, value in (overrides or {}).items():
        _refuse_unknown(_nest(key, value), Config)
        merged = _merge(merged, _nest(key, _dict_entry(key, value)))
    config = _build(Config, _parse(merged))
    fill_sizes(config)
    check(config)
    return config


def parse_overrides(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """``["--config", F, "--optim.lr", "1"]`` -> ``([F], {"optim.lr": "1"})``; ``--optim.lr=1`` works too."""
    files, overrides = [], {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        if not key.startswith("--") or len(key) == 2:
            raise UserError(
                f"unexpected argument {word!r}; options look like --section.key value, several values '[64, 64]'"
            )
        if not equals:
            # A missing value is told from a negative number by what follows the dashes.
            if not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
                if key != "--config":
                    _refuse_unknown(_nest(key[2:], {}), Config)
                raise UserError(f"{key} needs a value: {key} VALUE")
            value = rest.pop(0)
        if key == "--config":
            files.append(value)
        else:
            overrides[key[2:]] = value
    return files, overrides


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dicts, lists, strings and numbers: what YAML and a weights-only checkpoint can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(entry) for key, entry in value.items()}
        return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"optim": {"lr": 1}}`` -> ``{"optim.lr": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def scoring(config: Config, multiscale: bool = False) -> dict[str, Any]:
    """The keys that a model's scores on the validation split depend on, by their dotted names, in JSON's types."""
    flat = flatten(to_dict(config))
    others = ["eval.batch_windows", "eval.strip_rows"]  # which change the memory alone
    others += ["eval.scales", "eval.flip"] if multiscale else ["eval.multiscale_scales"]
    if config.eval.mode == "whole":
        others += ["eval.window", "eval.stride"]
    keys = ["eval.", "data.val_split", "data.reduce_zero_label", "train.precision"]
    if config.data.root is None:
        keys.append("data.generate.")
    return {key: flat[key] for key in flat if key.startswith(tuple(keys)) and key not in others}


def save_config(config: Config, path: Path, versions: dict[str, Any]) -> None:
    """Writes the YAML file that rebuilds ``config``, and the versions it was used with."""
    document = {**to_dict(config), "versions": versions}
    text = yaml.dump(document, Dumper=Dumper, sort_keys=False, default_flow_style=None, width=110)
    path.write_text(text)


def fill_sizes(config: Config) -> None:
    """Sizes that are null follow from ``data.crop_size``, as those of the paper's protocol do."""
    data, evaluation = config.data, config.eval
    shorter = min(data.crop_size)
    if data.base_size is None:
        data.base_size = shorter
    if evaluation.resize is None:
        evaluation.resize = data.base_size
    if evaluation.window is None:
        evaluation.window = shorter
    if evaluation.stride is None:
        evaluation.stride = max(evaluation.window - 32, (evaluation.window + 1) // 2)


def check(config: Config) -> None:
    """Ranges of single values, then values that must fit each other. Raises ``UserError``."""
    for section in dataclasses.fields(config):
        _check_ranges(getattr(config, section.name), section.name)
    data, optim, train, evaluation = config.data, config.optim, config.train, config.eval
    if data.scale[0] > data.scale[1]:
        raise UserError(f"data.scale: {list(data.scale)} is no range; the smaller number comes first")
    if optim.min_lr > optim.lr:
        raise UserError(f"optim.min_lr: {optim.min_lr:g} is above optim.lr ({optim.lr:g}); lower it")
    weights = config.loss.class_weights
    if weights and not any(weights):
        raise UserError(f"loss.class_weights: {weights} leave nothing to learn; one must be above 0")
    if train.steps is None and train.epochs is None:
        raise UserError("train.steps and train.epochs are both null; give one of them")
    if evaluation.mode == "slide" and evaluation.stride > evaluation.window:
        raise UserError(
            f"eval.stride: {evaluation.stride} leaves gaps: at most eval.window ({evaluation.window}) fits"
        )
    if not evaluation.scales or not evaluation.multiscale_scales:
        raise UserError("eval.scales and eval.multiscale_scales need at least one scale")
    if config.run.name in ("", "..") or Path(config.run.name).name != config.run.name:
        raise UserError(
            f"run.name: {config.run.name!r} must be a plain folder name; the folder above is run.root"
        )


def help_text(only: Sequence[str] = (), defaults: Config | None = None) -> str:
    """Keys with type, default and meaning: all, or those of the sections and with the names in ``only``.

    ``defaults`` are those of the schema unless they are given. Raises ``UserError`` for a name that is neither.
    """
    for name in only:
        if not any(key == name or key.startswith(f"{name}.") for key in _types(Config)):
            close = difflib.get_close_matches(name, [entry.name for entry in dataclasses.fields(Config)], n=1)
            raise UserError(
                f"unknown section or key {name}" + (f"; did you mean {close[0]}?" if close else nearest(name))
            )
    wanted = [f"{name}." for name in only] or [""]
    lines = _help_lines(defaults or Config(), "", lambda dotted: f"{dotted}.".startswith(tuple(wanted)))
    return "\n".join(lines).strip("\n")


def _help_lines(section: Any, prefix: str, wanted: Callable[[str], bool]) -> list[str]:
    meanings = {
        entry.arg_name: entry.description
        for entry in docstring_parser.parse_from_object(type(section)).params
    }
    lines = []
    for key, hint in typing.get_type_hints(type(section)).items():
        dotted = f"{prefix}{key}"
        if dataclasses.is_dataclass(hint):
            if wanted(dotted):
                lines += ["", f"{dotted}: {hint.__doc__}"]
            lines += _help_lines(getattr(section, key), f"{dotted}.", wanted)
        elif wanted(dotted):
            default = getattr(section, key)
            default = "null" if default is None else default
            lines.append(f"  --{dotted} ({_readable(hint)}; default {default})\n      {meanings[key]}")
    return lines


def _read_yaml(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One YAML file merged over the file that its ``base`` key names."""
    if file.resolve() in above:
        raise UserError(f"{file}: the `base` keys lead in a circle")
    try:
        content = yaml.load(file.read_text(encoding="utf-8-sig"), Loader)
    except FileNotFoundError:
        known = ", ".join(sorted(path.name for path in CONFIGS.glob("*.yaml")))
        raise UserError(f"{file}: no such configuration file; {CONFIGS} has {known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {first_line(error)}") from None
    except yaml.YAMLError as error:
        text = str(error).replace('in "<unicode string>", ', "at ")
        raise UserError(f"{file}: not valid YAML: {' '.join(text.split())}") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected sections such as `optim:`, got {type(content).__name__}")
    base = content.pop("base", None)
    content.pop("versions", None)  # in a run folder's config.yaml they configure nothing
    try:
        _refuse_unknown(content, Config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if base is None:
        return content
    return _merge(_read_yaml(file.parent / str(base), (*above, file.resolve())), content)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _nest(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _dict_entry(dotted: str, value: Any) -> Any:
    """Free-form dicts and their entries (model.backbone_kwargs.depth) carry no type: YAML's rules decide."""
    if _types(Config).get(dotted, dict) is not dict or not isinstance(value, str):
        return value
    try:
        return yaml.load(value, Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{dotted}: expected YAML, got {value!r} ({first_line(error)})") from None


def _types(schema: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> type, for every key that is not a section."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint):
            found.update(_types(hint, f"{prefix}{name}."))
        else:
            found[prefix + name] = hint
    return found


def _refuse_unknown(nested: dict[str, Any], schema: type, prefix: str = "") -> None:
    hints = typing.get_type_hints(schema)
    for key, value in nested.items():
        dotted = f"{prefix}{key}"
        if key not in hints:
            raise UserError(f"unknown key {dotted}{nearest(dotted)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                example = f"{dotted}.{dataclasses.fields(hints[key])[0].name}"
                raise UserError(f"{dotted}: expected keys such as {example}, got {value!r}")
            _refuse_unknown(value, hints[key], f"{dotted}.")


# What other training programs call these keys, where no likeness of the words leads there.
_SYNONYMS = {
    "optim.name": "optimizer optimiser opt",
    "optim.lr": "learning_rate learningrate base_lr init_lr max_lr",
    "optim.min_lr": "final_lr end_lr eta_min",
    "optim.weight_decay": "wd",
    "optim.warmup_steps": "warmup warmup_iters",
    "optim.clip_grad": "grad_clip gradient_clip gradient_clipping gradient_clip_val max_grad_norm clip_grad_norm",
    "data.root": "dataset data_dir data_path data_root dataset_path",
    "data.batch_size": "batch bs batchsize train_batch_size per_device_train_batch_size",
    "data.workers": "num_workers n_workers dataloader_num_workers",
    "data.classes": "num_classes n_classes nclasses class_names",
    "data.crop_size": "image_size input_size resolution crop",
    "data.reduce_zero_label": "ignore_zero",
    "train.epochs": "epoch num_epochs max_epochs n_epochs num_train_epochs",
    "train.steps": "max_steps num_steps iters iterations max_iters num_iterations",
    "train.accumulate": "grad_accum accum_iter gradient_accumulation gradient_accumulation_steps",
    "train.precision": "dtype amp fp16 bf16 mixed_precision",
    "train.device": "gpu gpus accelerator",
    "train.threads": "num_threads",
    "train.ema_decay": "ema",
    "train.eval_every": "eval_interval eval_steps val_interval",
    "train.save_every": "save_interval save_steps checkpoint_interval",
    "train.log_every": "log_interval logging_steps print_freq",
    "model.name": "arch architecture decoder",
    "model.backbone": "encoder backbone_name",
    "model.drop_path_rate": "drop_path stochastic_depth",
    "model.checkpoint_path": "weights pretrained_path",
    "model.initial_checkpoint": "load_from init_from finetune finetune_from init_checkpoint start_from",
    "run.root": "output_dir out_dir work_dir save_dir output",
    "run.name": "experiment exp_name run_name",
    "run.resume": "resume_from resume_from_checkpoint",
}


def nearest(dotted: str) -> str:
    """``"; did you mean KEY?"`` for a key that there is not, or where to see all of them."""
    known = _types(Config)
    leaf = dotted.rpartition(".")[2].lower().replace("-", "_")
    same = [key for key in known if key.rpartition(".")[2] == leaf]  # the right name in the wrong section
    same = [key for key in same if key.count(".") == 1] or same  # train.seed rather than data.generate.seed
    same = same or [key for key, others in _SYNONYMS.items() if leaf in others.split()]
    if len(same) == 1:
        return f"; did you mean {same[0]}?"
    close = difflib.get_close_matches(dotted, known, n=1, cutoff=0.75)
    if not close:  # nearly the right name in the wrong section, or none
        leaves = {key.rpartition(".")[2]: key for key in reversed(known)}
        close = [leaves[leaf] for leaf in difflib.get_close_matches(dotted.rpartition(".")[2], leaves, n=1)]
    if not close:
        close = difflib.get_close_matches(dotted, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "; see `python train/run.py keys`"


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(prog="python train/run.py", exit_on_error=False, add_help=False)
    for section in dataclasses.fields(Config):
        parser.add_class_arguments(typing.get_type_hints(Config)[section.name], section.name)
    return parser


def _parse(merged: dict[str, Any]) -> dict[str, Any]:
    known = _types(Config)
    for dotted, value in flatten(merged).items():
        # jsonargparse lets null through for every type, and numbers are no names to it.
        if value is None and dotted in known and type(None) not in typing.get_args(known[dotted]):
            raise UserError(f"{dotted}: expected {_readable(known[dotted])}, got null")
    try:
        return _parser().parse_object(merged).as_dict()
    except Exception as error:  # jsonargparse raises several kinds, all with the key in the text
        text = str(error)
        for dotted, hint in known.items():
            if f'key "{dotted}"' in text:
                value = merged
                for part in dotted.split("."):
                    value = value[part]
                pair = typing.get_origin(hint) is tuple and len(typing.get_args(hint)) == 2
                example = _pair_example(value) if pair else ""
                raise UserError(f"{dotted}: expected {_readable(hint)}, got {value!r}{example}") from None
        raise UserError(" ".join(text.split())) from None


def _pair_example(value: Any) -> str:
    """How to write two values, where one or both were given in another way."""
    given = [word.strip() for word in str(value).strip("[]() ").split(",")]
    right = len(given) == 1 or (len(given) == 2 and not str(value).startswith("["))
    if not right or not all(given) or isinstance(value, dict):
        return ""
    return f"; write '[{', '.join(given * (3 - len(given)))}]'" + " for two of it" * (len(given) == 1)


def _readable(hint: Any) -> str:
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if part is type(None) else _readable(part) for part in arguments)
    if origin is tuple:
        return f"{len(arguments)} values [{', '.join(_readable(part) for part in arguments)}]"
    if origin is list:
        return f"a list of {_readable(arguments[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", dict: "a mapping"}
    return names.get(hint, str(hint))


def _build(schema: type, values: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(schema)
    built = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]):
            value = _build(hints[key], value)
        built[key] = tuple(value) if typing.get_origin(hints[key]) is tuple else value
    return schema(**built)


_LIMITS = {
    "gt": ("above", lambda value, limit: value > limit),
    "ge": ("at least", lambda value, limit: value >= limit),
    "lt": ("below", lambda value, limit: value < limit),
    "le": ("at most", lambda value, limit: value <= limit),
}


def _check_ranges(section: Any, name: str) -> None:
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            _check_ranges(value, f"{name}.{entry.name}")
        for single in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(single, float) and not math.isfinite(single):  # YAML has .inf and .nan
                raise UserError(f"{name}.{entry.name}: {value} is out of range; it must be finite")
            if single is None or not entry.metadata:
                continue
            if not all(_LIMITS[limit][1](single, bound) for limit, bound in entry.metadata.items()):
                wanted = " and ".join(
                    f"{_LIMITS[limit][0]} {bound:g}" for limit, bound in entry.metadata.items()
                )
                raise UserError(f"{name}.{entry.name}: {value} is out of range; it must be {wanted}")
