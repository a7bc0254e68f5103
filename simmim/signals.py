"""Signals and graceful shutdown: SIGTERM and SIGUSR1 (sent by schedulers), Ctrl-C, and the end of the launcher."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
"""Environment variables that launchers set."""
PARENT_PID = os.getppid()
"""Parent process at import: a change shows that the launcher has ended."""


class Stopped(BaseException):
    """Raised to stop the process after a signal; the same command resumes the run.

    Like KeyboardInterrupt not an ``Exception``, so that error handlers of interrupted code do not catch it.
    """


class StopRequest:
    """Context that records stop signals, so that the training loop can stop after a complete step.

    A second Ctrl-C stops immediately. Only the main thread receives signals; in other threads this has no effect.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        # A launcher of a single process does not forward signals: it ends and leaves its child running.
        self._parent = PARENT_PID if any(name in os.environ for name in LAUNCHER_VARIABLES) else None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._record) for signum in (*STOP_SIGNALS, signal.SIGINT)}
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        if error is None and self._signal is not None:  # received after the last check of the loop
            signal.raise_signal(self._signal)

    def reason(self) -> str | None:
        """Return the reason to stop, or None."""
        if self._signal is not None:
            return self._signal.name
        return "the end of its launcher" if self._parent not in (None, os.getppid()) else None

    def _record(self, signum: int, _: FrameType | None) -> None:
        if signum == signal.SIGINT:
            if self._signal == signal.SIGINT:
                raise KeyboardInterrupt
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop immediately\n")
        self._signal = signal.Signals(signum)


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise :class:`Stopped` immediately on a stop signal, for code outside the loop, which has nothing to save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, _stop) for signum in STOP_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def ignore_signals() -> None:
    """Ignore stop signals in a helper process that the training process ends itself."""
    for signum in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)


def _stop(signum: int, _: FrameType | None) -> None:
    raise Stopped(f"stopped by {signal.Signals(signum).name}; run the same command again to resume")
