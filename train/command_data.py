"""The commands about data sets: `check-data`, `generate-data`, `download-data`, `cache-data`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from train.command_line import Command
from train.errors import UserError


def load_data_config(arguments: list[str]) -> Any:
    from train import config as configuration

    files, overrides = configuration.parse_overrides(arguments)
    return configuration.load_config(files or [configuration.CONFIGS / BASE], overrides)


def here() -> Any:
    import torch

    from train.distributed import World

    return World(torch.device("cpu"))


def check_data(arguments: list[str]) -> int:
    from train import build
    from train import check_data as checking
    from train.loader import worker_count

    config = load_data_config(arguments)
    root = build.data_root(config, here())
    report = checking.check_data(
        root,
        build.class_list(config, root),
        (config.data.train_split, config.data.val_split),
        config.data.reduce_zero_label,
        workers=worker_count(config.data.workers),
        progress=sys.stdout.isatty(),
    )
    print(report.text())
    return report.exit_status


def generate_data(arguments: list[str]) -> int:
    from train import build
    from train.config import CONFIGS

    config = load_data_config(arguments or ["--config", str(CONFIGS / "demo.yaml")])
    config.data.root = None
    print(f"generated data set: {build.data_root(config, here())}")
    return 0


def download_data(arguments: list[str]) -> int:
    from train.download import download

    config = load_data_config(arguments)
    if config.data.root is None:
        raise UserError("data.root: names the folder of the data set; give --data.root DIR")
    print(f"data set: {download(Path(config.data.root).parent)}")
    return 0


def cache_data(arguments: list[str]) -> int:
    from train import build

    config = load_data_config(arguments)
    if config.data.cache is None:
        raise UserError("data.cache: names the folder of the decoded cache; give --data.cache DIR")
    root = build.data_root(config, here())
    for name in (config.data.train_split, config.data.val_split):
        dataset = build.split(config, root, name, build.class_list(config, root))
        print(f"{name}: {len(dataset)} images in {config.data.cache}")
    return 0


BASE = "ade20k.yaml"  # whose keys hold without --config
LAYOUT = ("data.root", "data.classes", "data.train_split", "data.val_split", "data.reduce_zero_label")

CHECK_DATA = Command(
    "check-data",
    check_data,
    "Read every file of a data set and name each bad one",
    text="The exit status is 1 where there is one.",
    keys=(*LAYOUT, "data.workers"),
    base=BASE,
)
GENERATE_DATA = Command(
    "generate-data",
    generate_data,
    "Make the data set that training without data.root uses",
    text="Without an argument it is the demo's.",
    keys=("data.generate",),
)
DOWNLOAD_DATA = Command(
    "download-data",
    download_data,
    "Download ADE20K into the folder above data.root",
    keys=("data.root",),
    base=BASE,
)
CACHE_DATA = Command(
    "cache-data",
    cache_data,
    "Decode a data set's images once, into a memory-mapped cache",
    text="Training with the same data.cache builds it too, if it is missing.",
    keys=("data.cache", *LAYOUT),
    base=BASE,
)
