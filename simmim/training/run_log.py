"""What a run leaves to read: console lines, ``metrics.jsonl``, ``events.jsonl``, ``environment.json``, pictures."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

ENVIRONMENT = "environment.json"
PACKAGES = ("simmim", "torch", "timm", "accelerate", "datasets", "pillow", "einops", "safetensors", "numpy")


class RunLog:
    """Writes into the folder of a stage; on processes other than the main one it writes nothing.

    Broken images are the exception: each process names its own.

    Args:
        track: also given the numbers of every line of ``metrics.jsonl``, and the step.
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_main: bool,
        pictures: str = "reconstructions",
        max_corrupt: float = math.inf,
        track: Callable[[dict[str, float], int], None] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.is_main, self.pictures = folder, is_main, folder / pictures
        self.metrics_file, self.events_file = folder / "metrics.jsonl", folder / "events.jsonl"
        self.corrupt_file = folder / "bad_images.csv"
        self.max_corrupt, self.track = max_corrupt, track
        self._bar: tqdm | None = None
        self._corrupt = self._read_corrupt()
        self._images, self._since, self._step = 0, time.perf_counter(), 0

    def say(self, text: str) -> None:
        """One line to the console, above the progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def start(self, step: int, total_steps: int) -> None:
        """Begin (or continue) at ``step``: numbers and warnings of later steps are to come again."""
        self._step = step
        if not self.is_main:
            return
        for file in (self.metrics_file, self.events_file):
            if file.exists():
                comes_again = {None, "warning"}  # of the metrics, every line
                rows = [row for row in read_lines(file) if row["step"] <= step or row.get("event") not in comes_again]
                write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
        self._images, self._since = 0, time.perf_counter()
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)
        self._first_step, self._total_steps, self._begin = step, total_steps, self._since

    def count(self, num_images: int) -> None:
        """One optimizer step over ``num_images`` is done."""
        self._images += num_images
        self._step += 1
        if self._bar:
            self._bar.update()

    def metrics(self, step: int, numbers: dict[str, float]) -> None:
        """Append a line to ``metrics.jsonl`` and show it."""
        if not self.is_main:
            return
        now = time.perf_counter()
        numbers = dict(numbers)
        if self._images:
            numbers["images_per_s"] = self._images / (now - self._since)
            self._images, self._since = 0, now
        _append(self.metrics_file, {"step": step, **numbers})
        if self.track is not None:
            self.track(numbers, step)
        text = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        if self._bar:
            self._bar.set_postfix_str(text, refresh=False)
        else:
            done, left = step - self._first_step, self._total_steps - step
            eta = f"  eta {(now - self._begin) / done * left:.0f} s" if done and left else ""
            self.say(f"step {step}/{self._total_steps}  {text}{eta}")

    def settle(self) -> None:
        """Bring the numbers so far to the disk: what follows them there must not outlive them."""
        if self.is_main and self.metrics_file.exists():
            with self.metrics_file.open("rb") as file:
                os.fsync(file.fileno())

    def history(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; none on other processes than the main one."""
        return read_lines(self.metrics_file) if self.is_main and self.metrics_file.exists() else []

    def event(self, step: int, kind: str, text: str) -> None:
        """What happened, to ``events.jsonl``; a warning also to the console."""
        if kind == "warning":
            self.say(f"warning: step {step}: {text}")
        if self.is_main or kind == "skipped":
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            _append(self.events_file, {"step": step, "event": kind, "text": text, "time": now})

    def corrupt(self, images: list[tuple[str, str]]) -> None:
        """Name every broken image once, in ``bad_images.csv`` and on the console.

        Raises:
            ValueError: more than ``max_corrupt`` by now.
        """
        for name, reason in images:
            if name in self._corrupt:
                continue
            self._corrupt |= self._read_corrupt()  # another process may have named it
            if name in self._corrupt:
                continue
            self._corrupt.add(name)
            with self.corrupt_file.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow([name, reason])
            self.event(self._step + 1, "skipped", f"{name} ({reason})")
            tqdm.write(f"skipped a broken image: {name} ({reason})", file=sys.stdout)
            if len(self._corrupt) > self.max_corrupt:
                self.end()
                raise ValueError(
                    f"{len(self._corrupt)} images could not be read, more than data.max_corrupt_fraction allows "
                    f"({self.max_corrupt:.0f}): see {self.corrupt_file}, mend them or raise the share; "
                    "the same command then continues from the last checkpoint"
                )

    def _read_corrupt(self) -> set[str]:
        if not self.corrupt_file.exists():
            return set()
        with self.corrupt_file.open(newline="", encoding="utf-8") as file:
            return {row[0] for row in csv.reader(file) if row}

    def image(self, step: int, picture: Image.Image) -> None:
        """Save a picture as ``step_00001000.png``."""
        if self.is_main:
            self.pictures.mkdir(exist_ok=True)
            notes = PngInfo()
            for key, value in picture.info.items():
                notes.add_text(str(key), str(value))
            picture.save(self.pictures / f"step_{step:08d}.png", pnginfo=notes)

    def end(self) -> None:
        """Close the progress bar and sum up."""
        if self._bar:
            self._bar.close()
        if corrupt := self._read_corrupt():
            self.say(f"{len(corrupt)} broken image(s) skipped so far, named in {self.corrupt_file}")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object per line; a line that was cut off is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
    return rows


def write_whole(file: Path, text: str) -> None:
    """The new content or the old one, whatever happens."""
    partial = file.with_name(f".writing_{file.name}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def _append(file: Path, row: dict[str, Any]) -> None:
    with file.open("ab+") as lines:
        if lines.tell() and lines.seek(-1, os.SEEK_END) and lines.read(1) != b"\n":
            lines.write(b"\n")  # after a line that was cut off
        lines.write(json.dumps(row).encode() + b"\n")


@contextmanager
def locked(folder: Path, *, is_main: bool) -> Iterator[None]:
    """Keep other runs out of a folder; the system opens the lock when the process ends, however it ends.

    Raises:
        ValueError: another run is in there.
    """
    if not is_main:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            # Of the kind that forked loader processes do not inherit, or they would outlive a killed run with it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise ValueError(
                    f"{folder} is in use by {file.read().strip() or 'another run'}: wait for it or stop it, "
                    "or give another name=... or --out"
                ) from None
            print(f"warning: {folder} cannot be locked ({error.strerror}): start no second run there", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        file.flush()
        yield


def write_environment(folder: Path, **facts: Any) -> None:
    """``environment.json``: what the run ran on."""
    environment = {
        "command": sys.argv,
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "packages": {package: version(package) for package in PACKAGES},
        **facts,
    }
    write_whole(folder / ENVIRONMENT, json.dumps(environment, indent=2) + "\n")


def _commit() -> str | None:
    """Of the toolkit, when it runs from a git checkout; marked when files differ from it."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed, perhaps below a repository of something else
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(git, capture_output=True, text=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
