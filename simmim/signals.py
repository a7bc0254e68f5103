"""Being asked to stop: SIGTERM and SIGUSR1 (schedulers, before time is up), Ctrl-C, a launcher that is gone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ASKS = (signal.SIGTERM, signal.SIGUSR1)
LAUNCHER_SETS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


PARENT = os.getppid()
"""At the start: a launcher that is gone later was still there."""


class Stopped(BaseException):
    """Asked to stop, and everything until then is saved: the same command continues.

    No Exception, as KeyboardInterrupt is none: it must not be taken for the fault of what it interrupts.
    """


class StopRequest:
    """A context in which signals are remembered instead of obeyed, until the loop comes to a good place.

    A second Ctrl-C leaves at once. Signals reach the main thread only; in another one nothing changes.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        # A launcher for one process does not pass signals on; it dies and leaves its child behind.
        self._parent = PARENT if any(name in os.environ for name in LAUNCHER_SETS) else None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in (*ASKS, signal.SIGINT)}
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is None and self._signal is not None:  # came after the loop had last looked
            signal.raise_signal(self._signal)

    def reason(self) -> str | None:
        """What asked to stop, or None."""
        if self._signal is not None:
            return self._signal.name
        return "the end of its launcher" if self._parent not in (None, os.getppid()) else None

    def _remember(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._signal == signal.SIGINT:
                raise KeyboardInterrupt
            os.write(2, b"\nstopping after this step; Ctrl-C again leaves at once\n")
        self._signal = signal.Signals(number)


@contextmanager
def obey_signals() -> Iterator[None]:
    """Outside of the loop, what asks to stop does so at once: there is nothing to save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _stop) for number in ASKS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """For the processes beside a training process: it ends them itself."""
    for number in (*ASKS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _stop(number: int, _: FrameType | None) -> None:
    raise Stopped(f"stopped by {signal.Signals(number).name}; the same command continues what can be continued")
