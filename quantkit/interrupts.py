"""Ctrl-C during a long run: once asks it to stop behind the block that it is at, twice stops it at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def asked_once(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether the run was asked to stop; `say` is told when it is.

    Outside the context Ctrl-C does what it did before. A signal handler belongs to the main thread alone, which is
    where a command runs.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            signal.default_int_handler(number, frame)
        asked = True
        say("stopping behind this window of blocks, which is kept; Ctrl-C again stops at once")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
