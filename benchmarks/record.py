"""Records: one JSON file per device, day and commit, written after every figure, so that a cut-off run keeps its own.

{"schema": 1, "environment": {...}, "machine": {...}, "operators": [...], "models": [...], "parts": {...}}
"""

from __future__ import annotations

import datetime
import json
import math
import os
import string
from pathlib import Path

from benchmarks import machine
from benchmarks.cases import SIZES

RESULTS = Path(__file__).resolve().parent / "results"
SCHEMA = 1
# What makes a row of a section the same row in a later run: measured again, it is replaced.
KEYS = {
    "operators": ("case", "implementation"),
    "models": ("model", "mode", "way", "size", "batch", "classes"),
}
# What the tables and comparisons read of every one.
ENVIRONMENT = ("date", "device", "commit", "versions")
COLUMNS = {
    "operators": (*KEYS["operators"], "operator", "sizes", "dtype", "device"),
    "models": (*KEYS["models"], "device"),
}


def load(path: str | Path) -> dict:
    """A record. Raises ValueError for a file that is none."""
    try:
        data = json.loads(Path(path).read_text())
    except ValueError as error:  # no JSON, or no text at all
        raise ValueError(f"{path} is not JSON ({error}); was it cut off?") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or "environment" not in data:
        raise ValueError(
            f"{path} is not a record of schema {SCHEMA}; pytest benchmarks --record FILE writes one"
        )
    if wrong := _wrong(data):
        raise ValueError(f"{path} is no whole record: {wrong}; pytest benchmarks --record FILE writes one")
    return data


def _wrong(data: dict) -> str | None:
    """What keeps a file from being a whole record: keys that are missing, times that are none."""
    where = data["environment"]
    if not isinstance(where, dict) or not isinstance(where.get("versions"), dict):
        return "its environment names no versions"
    if missing := [key for key in ENVIRONMENT if key not in where]:
        return f"its environment lacks {', '.join(missing)}"
    for section, columns in COLUMNS.items():
        rows = data.get(section, [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            return f"its {section} are no list of rows"
        for i, row in enumerate(rows):
            if missing := [key for key in columns if key not in row]:
                return f"row {i} of its {section} lacks {', '.join(missing)}"
            for key, value in row.items():
                if (key.endswith("_ms") or key in ("ratio", "median_ratio")) and not _positive(value):
                    return f"row {i} of its {section} has {value!r} as {key}"
            if section == "operators" and (missing := _missing(row)):
                return f"row {i} of its {section} lacks {', '.join(missing)}"
    return None


def _missing(row: dict) -> list[str]:
    """Of an operator's row: the quartiles of a time, and sizes that say which class of shapes it is of."""
    sizes = row["sizes"] if isinstance(row["sizes"], dict) else {}
    lacks = [f"size {letter}" for letter in SIZES.get(row["operator"], ()) if letter not in sizes]
    timed = row.get("median_ms") is not None
    return lacks + [key for key in ("q1_ms", "q3_ms") if timed and row.get(key) is None]


def _positive(value: object) -> bool:
    """Whether it is a time or a ratio, or None for one that was not measured."""
    if value is None:
        return True
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def path_for(device: str, folder: Path = RESULTS) -> Path:
    """<device>_<date>.json, with a letter where that day's file is of another commit."""
    date = datetime.date.today().isoformat()
    for suffix in ("", *string.ascii_lowercase):
        path = folder / f"{machine.slug(device)}_{date}{suffix}.json"
        if not path.exists() or load(path)["environment"]["commit"] == machine.commit():
            return path
    raise FileExistsError(f"{folder} has 27 records of {date}; remove some or name one with --record FILE")


def where(place: str | Path, device: str) -> Path:
    """A file as it is; a folder's file of this device, day and commit."""
    place = Path(place)
    return place if place.suffix == ".json" else path_for(device, place)


class Record:
    """A record being written. An existing file is gone on with: rows measured again are replaced.

    Without ``auto`` no kernel is run to say what that takes; what an earlier run said of it stays.
    """

    def __init__(self, path: Path, device: str, *, auto: bool = True) -> None:
        self.path = Path(path)
        self.data = load(path) if self.path.exists() else {"schema": SCHEMA}
        before = self.data.get("environment", {})
        commands = before.get("commands", [])
        environment = machine.environment(device, auto=auto)
        if not auto and "auto" in before:
            environment["auto"] = before["auto"]
        command = environment.pop("command")
        environment["commands"] = commands if command in commands else [*commands, command]
        self.data["environment"] = environment
        for section in KEYS:
            self.data.setdefault(section, [])

    def add(self, section: str, row: dict) -> None:
        def key(r: dict) -> tuple:
            return tuple(r.get(name) for name in KEYS[section])

        rows = self.data[section]
        same = [i for i, other in enumerate(rows) if key(other) == key(row)]
        if same:
            rows[same[0]] = row
        else:
            rows.append(row)
        self.save()

    def set(self, name: str, value: object) -> None:
        self.data[name] = value
        self.save()

    def save(self) -> None:
        """Under a temporary name, then renamed: a run that is killed leaves the last whole file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(_rounded(self.data), indent=1) + "\n")
        os.replace(temporary, self.path)


def _rounded(value):
    """Six significant digits: what a timing has, in half the space."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value
