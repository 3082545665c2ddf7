"""What a command of train/run.py is, how its words are taken apart, and what --help prints of it."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from train.errors import UserError

PROGRAM = "python train/run.py"


@dataclass(frozen=True)
class Option:
    """An option of one command: ``--name VALUE``, or a switch where ``value`` is None."""

    name: str
    meaning: str
    value: str | None = None

    def __str__(self) -> str:
        return f"--{self.name} {self.value}" if self.value else f"--{self.name}"


CONFIG = Option("config", "A YAML file of keys; may be given several times, later ones win.", "FILE")


@dataclass(frozen=True)
class Command:
    """A word that train/run.py takes first."""

    name: str
    run: Callable[[list[str]], int]
    summary: str
    words: str = ""  # as the usage line shows them
    text: str = ""
    options: tuple[Option, ...] = (CONFIG,)
    keys: tuple[str, ...] = ()  # those of the configuration that one gives with this command most often
    base: str = ""  # the file of train/configs that gives the keys where no --config does

    @property
    def usage(self) -> str:
        options = [f"[{option}]" for option in self.options]
        return " ".join(filter(None, [PROGRAM, self.name, self.words, *options, "[--section.key VALUE ...]"]))

    def help_text(self) -> str:
        """The command's own arguments, then the keys that matter with it, then how to see all of them."""
        from train.config import CONFIGS, help_text, load_config

        unbroken = re.sub(r"\[[^]]*\]", lambda option: option[0].replace(" ", "\xa0"), f"usage: {self.usage}")
        lines = textwrap.wrap(unbroken, 100, subsequent_indent=" " * 7)
        parts = ["\n".join(lines).replace("\xa0", " ")]
        text = f"{self.summary}. {self.text}".strip()
        if self.base:
            text += f" Without --config the keys are those of train/configs/{self.base}."
        parts.append("\n".join(textwrap.wrap(text, 100)))
        if self.options:
            width = max(len(str(option)) for option in self.options) + 2
            parts.append("\n".join(f"  {option!s:<{width}}{option.meaning}" for option in self.options))
        defaults = load_config([CONFIGS / self.base]) if self.base else None
        parts.append(f"Keys that are often given with it:\n{help_text(self.keys, defaults)}")
        without = "--config is given" if self.base else "file gives the key"
        parts.append(
            f"A default holds where no {without}. Every key may be given: `{PROGRAM} keys` shows them all, "
            f"`{PROGRAM} keys optim` those of a section."
        )
        return "\n\n".join(parts)

    def split(self, arguments: list[str]) -> tuple[list[str], dict[str, Any], list[str]]:
        """Positional words, the command's own options, and the rest for the keys. Raises ``UserError``.

        A switch may be given a truth value (``--multiscale=false``), as keys are.
        """
        takes_value = {option.name: option.value is not None for option in self.options if option != CONFIG}
        words: list[str] = []
        own: dict[str, Any] = {}
        rest: list[str] = []
        queue = list(arguments)
        while queue:
            word = queue.pop(0)
            key, equals, value = word.partition("=")
            name = key[2:]
            if not word.startswith("-"):
                words.append(word)
            elif name in takes_value and not takes_value[name]:
                own[name] = _truth(key, value) if equals else True
            elif name in takes_value:
                if not equals:
                    value = "" if not queue or queue[0].startswith("--") else queue.pop(0)
                if not value:
                    raise UserError(f"{key} needs a value: {key} VALUE")
                own[name] = value
            elif "." in name or name == CONFIG.name:
                rest.append(word)
                if not equals and queue:
                    rest.append(queue.pop(0))
            else:
                raise UserError(self._unknown(key))
        return words, own, rest

    def _unknown(self, option: str) -> str:
        from train.config import nearest

        names = [f"--{own.name}" for own in self.options]
        close = difflib.get_close_matches(option, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else nearest(option.lstrip("-"))
        if "did you mean" not in hint:
            hint = f"; see `{PROGRAM} {self.name} --help`"
        return f"{self.name}: unknown option {option}{hint}"


def _truth(key: str, value: str) -> bool:
    """A switch's explicit value, by YAML's words for truth."""
    truth = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if value.lower() not in truth:
        raise UserError(f"{key}: expected true or false, got {value!r}")
    return truth[value.lower()]
