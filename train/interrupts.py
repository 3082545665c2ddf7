"""Ctrl-C and SIGTERM, by which schedulers and containers end a job: where training may be divided, and where not."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


def _interrupt(*_: object) -> None:
    # Of a signal to the whole group the loader's processes die too, which torch would raise.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    raise KeyboardInterrupt


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # handlers are set there alone


@contextlib.contextmanager
def termination_as_ctrl_c() -> Iterator[None]:
    """Within the context SIGTERM does what Ctrl-C does, unless somebody else handles it.

    Not for one of several processes, which a launcher ends so where another has failed: some may wait for that one.
    """
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Ctrl-C and SIGTERM within the context are raised at its end; a second one at once.

    Where one is ignored, as Ctrl-C by a job in the background, or somebody else handles it, it stays so.
    """
    ours = (signal.default_int_handler, _interrupt)
    before = {s: h for s in (signal.SIGINT, signal.SIGTERM) if (h := signal.getsignal(s)) in ours}
    if not _in_main_thread() or not before:
        yield
        return
    pressed: list[int] = []

    def wait(number: int, frame: object) -> None:
        if pressed:
            before[number](number, frame)
        pressed.append(number)

    for number in before:
        signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if pressed:
        before[pressed[0]](pressed[0], None)
