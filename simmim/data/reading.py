"""Prefetching: threads fetch the bytes of images ahead of decoding and return them in order.

A disk or network that does not answer blocks only one thread: after a timeout the image counts as corrupt, and
another thread continues with the remaining ones.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any

AHEAD = 24
"""Images fetched before they are needed: enough to hide network latency, few enough to keep in memory."""
IMAGES_PER_JOB = 8
"""Images per job of a thread: waking a thread costs as much as reading a small file."""
THREADS = 4
Job = deque[tuple[Future, int]]


class Reader:
    """Background threads that call ``fetch`` for many indices.

    Args:
        fetch: returns the content of the image with an index; must be thread-safe.
        timeout_s: timeout of one image, s.
    """

    def __init__(self, fetch: Callable[[int], Any], timeout_s: float = 60.0) -> None:
        self.fetch, self.timeout_s = fetch, timeout_s
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._num_threads, self._process = 0, -1

    def __reduce__(self) -> Any:
        return Reader, (self.fetch, self.timeout_s)

    def one(self, index: int) -> Any:
        """Return the content of one image.

        Raises:
            TimeoutError: ``fetch`` took longer than the timeout.
            Exception: anything that ``fetch`` raises.
        """
        (content,) = self.many([index])
        return content()

    def many(self, indices: Sequence[int]) -> Iterator[Callable[[], Any]]:
        """Yield for each index a function that returns its content; the next images are fetched meanwhile."""
        waiting: deque[tuple[Future, Job]] = deque()
        position = 0
        for _ in indices:
            while position < len(indices) and len(waiting) <= AHEAD - IMAGES_PER_JOB:
                waiting.extend(self._submit(indices[position : position + IMAGES_PER_JOB]))
                position += IMAGES_PER_JOB
            yield partial(self._wait, *waiting.popleft())

    def _submit(self, indices: Sequence[int]) -> list[tuple[Future, Job]]:
        if self._process != os.getpid():  # a forked process has no threads
            self._jobs, self._num_threads, self._process = SimpleQueue(), 0, os.getpid()
        if self._num_threads < THREADS:
            self._start()
        job: Job = deque((Future(), index) for index in indices)
        submitted = [(future, job) for future, _ in job]
        self._jobs.put(job)
        return submitted

    def _start(self) -> None:
        self._num_threads += 1
        # Daemon threads: a thread that hangs in a system call must not keep the process from exiting.
        threading.Thread(target=_work, args=(self._jobs, self.fetch), daemon=True).start()

    def _wait(self, future: Future, job: Job) -> Any:
        try:
            return future.result(self.timeout_s)
        except TimeoutError as error:
            if future.done():  # raised by the fetch itself, for instance by the network
                raise
            self._jobs.put(job)  # the rest of the job of the blocked thread
            self._start()
            raise TimeoutError(f"no answer within {self.timeout_s:g} s") from error


def _work(jobs: SimpleQueue[Job], fetch: Callable[[int], Any]) -> None:
    while True:
        job = jobs.get()
        while True:
            try:
                future, index = job.popleft()
            except IndexError:  # finished, perhaps by another thread
                break
            try:
                future.set_result(fetch(index))
            except Exception as error:
                future.set_exception(error)
