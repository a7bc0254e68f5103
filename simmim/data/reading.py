"""Contents of images in the order they are asked for, fetched by threads ahead of the decoding.

A disk or network that does not answer holds up one thread and no more: the image is given up after a
while, as a broken one, and another thread takes over.
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
"""Images that are fetched before they are needed: enough to hide a network, few enough to keep in memory."""
TOGETHER = 8
"""Images that a thread fetches at a time: waking it costs as much as reading a small file."""
THREADS = 4
Task = deque[tuple[Future, int]]


class Reader:
    """Calls ``fetch`` for many numbers.

    Args:
        fetch: safe to be called by several threads.
        timeout_s: how long to wait for one image.
    """

    def __init__(self, fetch: Callable[[int], Any], timeout_s: float = 60.0) -> None:
        self.fetch, self.timeout_s = fetch, timeout_s
        self._tasks: SimpleQueue[Task] = SimpleQueue()
        self._num_threads, self._process = 0, -1

    def __reduce__(self) -> Any:
        return Reader, (self.fetch, self.timeout_s)

    def one(self, number: int) -> Any:
        """The content of one image. Raises what ``fetch`` raises, or TimeoutError."""
        (content,) = self.many([number])
        return content()

    def many(self, numbers: Sequence[int]) -> Iterator[Callable[[], Any]]:
        """For each number a function like :meth:`one`; the next few are on their way."""
        waiting: deque[tuple[Future, Task]] = deque()
        position = 0
        for _ in numbers:
            while position < len(numbers) and len(waiting) <= AHEAD - TOGETHER:
                waiting.extend(self._ask(numbers[position : position + TOGETHER]))
                position += TOGETHER
            yield partial(self._wait, *waiting.popleft())

    def _ask(self, numbers: Sequence[int]) -> list[tuple[Future, Task]]:
        if self._process != os.getpid():  # threads do not survive a fork
            self._tasks, self._num_threads, self._process = SimpleQueue(), 0, os.getpid()
        if self._num_threads < THREADS:
            self._start()
        task: Task = deque((Future(), number) for number in numbers)
        asked = [(future, task) for future, _ in task]
        self._tasks.put(task)
        return asked

    def _start(self) -> None:
        self._num_threads += 1
        # Daemons: a thread that hangs in the kernel must not keep the process from ending.
        threading.Thread(target=_work, args=(self._tasks, self.fetch), daemon=True).start()

    def _wait(self, future: Future, task: Task) -> Any:
        try:
            return future.result(self.timeout_s)
        except TimeoutError as error:
            if future.done():  # the fetch itself ran into one, of the network for instance
                raise
            self._tasks.put(task)  # what the thread that hangs would have fetched next
            self._start()
            raise TimeoutError(f"no answer within {self.timeout_s:g} s") from error


def _work(tasks: SimpleQueue[Task], fetch: Callable[[int], Any]) -> None:
    while True:
        task = tasks.get()
        while True:
            try:
                future, number = task.popleft()
            except IndexError:  # done, perhaps by another thread
                break
            try:
                future.set_result(fetch(number))
            except Exception as error:
                future.set_exception(error)
