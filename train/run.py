"""Trains, evaluates and predicts.

python train/run.py [--config FILE] [--section.key VALUE ...]      train (without arguments: the demo)
python train/run.py eval RUN [--multiscale] [--compare-stock]      score a run folder's model
python train/run.py analyse RUN                                    coding rates, orthogonality, robustness
python train/run.py predict RUN PATH ... [--output DIR]            label maps and overlays of any images
python train/run.py check-data | generate-data | download-data | cache-data [--section.key VALUE ...]
python train/run.py COMMAND --help                                 what a command takes
python train/run.py keys [SECTION|KEY ...]                         the keys of a configuration, with their meaning
"""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this file runs without installing `train`
# Read when torch is first imported. OpenMP's threads otherwise spin while one of them waits for a core, which makes a
# run several times slower on a machine that does anything else besides.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# What takes long to import (torch, matplotlib, ...) is imported in main, where Ctrl-C is one line.
from train.command_analyse import ANALYSE
from train.command_data import CACHE_DATA, CHECK_DATA, DOWNLOAD_DATA, GENERATE_DATA
from train.command_eval import EVAL, PREDICT
from train.command_line import PROGRAM
from train.command_train import TRAIN
from train.errors import UserError, first_line, missing_extra

COMMANDS = {
    command.name: command
    for command in (TRAIN, EVAL, ANALYSE, PREDICT, CHECK_DATA, GENERATE_DATA, DOWNLOAD_DATA, CACHE_DATA)
}
WORDS = (*COMMANDS, "keys", "help")


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit status. Bad input is one line on stderr and status 2."""
    try:
        return run_command(arguments)
    except KeyboardInterrupt as error:
        print(str(error) or "stopped", file=sys.stderr)
        return 130
    except ImportError as error:
        if not isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
            raise
        print("stopped", file=sys.stderr)  # what Ctrl-C becomes while a compiled module is imported
        return 130


def run_command(arguments: list[str]) -> int:
    """As :func:`main`, but for Ctrl-C."""
    from depict_kernels.backends import BackendUnavailable
    from train import distributed

    try:
        names_command = bool(arguments) and not arguments[0].startswith("-")
        name, rest = (arguments[0], arguments[1:]) if names_command else ("train", arguments)
        if name not in WORDS:
            raise unknown_command(name)
        if any(word in ("-h", "--help") for word in rest):
            return show_help([name] if names_command else [])
        if name == "help":
            return show_help(rest)
        if name == "keys":
            return show_keys(rest)
        status = COMMANDS[name].run(rest)
        distributed.stop()
        return status
    except UserError as error:
        return failed(" ".join(str(error).split()))
    except ModuleNotFoundError as error:
        if message := missing_extra(error):
            return failed(message)
        raise
    except BackendUnavailable as error:
        return failed(f"model.backend: {first_line(error)}")
    except OSError as error:
        if error.errno is None:  # not the operating system's word about a file
            raise
        return failed(first_line(error))
    except RuntimeError as error:
        from train.loader import dead_worker

        if message := dead_worker(error):
            return failed(message)
        if not distributed.lost_a_process(error):
            raise
        return failed(f"process {os.environ.get('RANK', 0)} lost another one: see that one's error", 3)


def failed(message: str, status: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status


def unknown_command(name: str) -> UserError:
    if "=" in name:
        return UserError(f"unexpected argument {name!r}; keys are given as --section.key VALUE")
    close = difflib.get_close_matches(name, WORDS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return UserError(f"unknown command {name!r}; {hint}commands are {', '.join(WORDS)}")


KEYS_HELP = f"""usage: {PROGRAM} keys [SECTION|KEY ...]

Show the keys of a configuration with type, default and meaning: all of them, or those of the sections and with the
names that are given, e.g. `keys optim` or `keys train.steps data.generate`."""


def show_help(names: list[str]) -> int:
    """One command, or all of them in short. Raises ``UserError`` for a word that is no command."""
    if len(names) > 1:
        raise UserError(f"help takes one command, got {' '.join(names)}")
    if names and names[0] in COMMANDS:
        print(COMMANDS[names[0]].help_text())
        return 0
    if names == ["keys"]:
        print(KEYS_HELP)
        return 0
    if names not in ([], ["help"]):
        raise unknown_command(names[0])
    print(__doc__.strip())
    print("\nCommands:")
    for command in COMMANDS.values():
        print(f"  {command.name:<15}{command.summary}.")
    print("\n" + TRAIN.help_text())
    return 0


def show_keys(names: list[str]) -> int:
    from train.config import help_text

    print(help_text(names))
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    if status and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(status)  # taking the process group down in order would wait for the others, and they for us
    sys.exit(status)
