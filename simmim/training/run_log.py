"""Records of a run: console lines, ``metrics.jsonl``, ``events.jsonl``, ``environment.json`` and preview images."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import logging
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

logger = logging.getLogger(__name__)

ENVIRONMENT = "environment.json"
PACKAGES = ("simmim", "torch", "timm", "accelerate", "datasets", "pillow", "einops", "safetensors", "numpy")


class RunLog:
    """Writes the records of a stage into its folder, on the main process only.

    Corrupt images are the exception: each process records its own.

    Args:
        folder: folder of the stage.
        image_folder: folder of the preview images, below ``folder``.
        max_corrupt: largest number of corrupt images.
        track: called with the metrics and the step of every line of ``metrics.jsonl``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_main: bool,
        image_folder: str = "reconstructions",
        max_corrupt: float = math.inf,
        track: Callable[[dict[str, float], int], None] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.is_main, self.image_folder = folder, is_main, folder / image_folder
        self.metrics_file, self.events_file = folder / "metrics.jsonl", folder / "events.jsonl"
        self.corrupt_file = folder / "corrupt_images.csv"
        self.max_corrupt, self.track = max_corrupt, track
        self._bar: tqdm | None = None
        self._corrupt = self._read_corrupt()
        self._images, self._since, self._step = 0, time.perf_counter(), 0

    def info(self, text: str) -> None:
        """Log a message."""
        if self.is_main:
            logger.info(text)

    def warning(self, text: str) -> None:
        """Log a warning."""
        if self.is_main:
            logger.warning("warning: %s", text)

    def start(self, step: int, total_steps: int) -> None:
        """Begin or resume after ``step``: remove metrics and warnings of later steps, which will be repeated."""
        self._step = step
        if not self.is_main:
            return
        for file in (self.metrics_file, self.events_file):
            if file.exists():
                repeated = {None, "warning"}  # lines of metrics have no event
                rows = [row for row in read_json_lines(file) if row["step"] <= step or row.get("event") not in repeated]
                write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
        self._images, self._since = 0, time.perf_counter()
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)
        self._first_step, self._total_steps, self._begin = step, total_steps, self._since

    def count_step(self, num_images: int) -> None:
        """Count an optimizer step over ``num_images`` images."""
        self._images += num_images
        self._step += 1
        if self._bar:
            self._bar.update()

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Append a line to ``metrics.jsonl`` and show it."""
        if not self.is_main:
            return
        now = time.perf_counter()
        values = dict(values)
        if self._images:
            values["images_per_s"] = self._images / (now - self._since)
            self._images, self._since = 0, now
        _append(self.metrics_file, {"step": step, **values})
        if self.track is not None:
            self.track(values, step)
        text = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
        if self._bar:
            self._bar.set_postfix_str(text, refresh=False)
        else:
            done, left = step - self._first_step, self._total_steps - step
            eta = f"  eta {(now - self._begin) / done * left:.0f} s" if done and left else ""
            self.info(f"step {step}/{self._total_steps}  {text}{eta}")

    def sync_to_disk(self) -> None:
        """Sync ``metrics.jsonl`` to disk, so that no checkpoint is newer than the metrics after a crash."""
        if self.is_main and self.metrics_file.exists():
            with self.metrics_file.open("rb") as file:
                os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl``; an empty list on processes other than the main one."""
        return read_json_lines(self.metrics_file) if self.is_main and self.metrics_file.exists() else []

    def log_event(self, step: int, kind: str, text: str) -> None:
        """Append an event to ``events.jsonl``; show it if its kind is ``warning``."""
        if kind == "warning":
            self.warning(f"step {step}: {text}")
        if self.is_main or kind == "corrupt_image":
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            _append(self.events_file, {"step": step, "event": kind, "text": text, "time": now})

    def log_corrupt_images(self, images: list[tuple[str, str]]) -> None:
        """Record every corrupt image once: in ``corrupt_images.csv``, in ``events.jsonl`` and on the console.

        Args:
            images: path and reason of each.

        Raises:
            ValueError: more than ``max_corrupt`` so far.
        """
        for name, reason in images:
            if name in self._corrupt:
                continue
            self._corrupt |= self._read_corrupt()  # another process may have recorded it
            if name in self._corrupt:
                continue
            self._corrupt.add(name)
            with self.corrupt_file.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow([name, reason])
            self.log_event(self._step + 1, "corrupt_image", f"{name} ({reason})")
            logger.info("skipped a corrupt image: %s (%s)", name, reason)
            if len(self._corrupt) > self.max_corrupt:
                self.close()
                raise ValueError(
                    f"{len(self._corrupt)} images could not be read, more than data.max_corrupt_fraction allows "
                    f"({self.max_corrupt:.0f}): see {self.corrupt_file}. Repair or remove them, or raise the fraction; "
                    "then run the same command again to resume from the last checkpoint"
                )

    def _read_corrupt(self) -> set[str]:
        if not self.corrupt_file.exists():
            return set()
        with self.corrupt_file.open(newline="", encoding="utf-8") as file:
            return {row[0] for row in csv.reader(file) if row}

    def save_image(self, step: int, image: Image.Image) -> None:
        """Save a preview image as ``step_00001000.png``, with its ``info`` as text chunks."""
        if self.is_main:
            self.image_folder.mkdir(exist_ok=True)
            notes = PngInfo()
            for key, value in image.info.items():
                notes.add_text(str(key), str(value))
            image.save(self.image_folder / f"step_{step:08d}.png", pnginfo=notes)

    def close(self) -> None:
        """Close the progress bar and report the number of corrupt images."""
        if self._bar:
            self._bar.close()
        if corrupt := self._read_corrupt():
            self.info(f"{len(corrupt)} corrupt image(s) skipped so far, listed in {self.corrupt_file}")


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line; incomplete lines are skipped."""
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
    return rows


def write_atomically(file: Path, text: str) -> None:
    """Replace the content of a file; after a crash it has either the old or the new content."""
    partial = file.with_name(f".writing_{file.name}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def _append(file: Path, row: dict[str, Any]) -> None:
    with file.open("ab+") as lines:
        if lines.tell() and lines.seek(-1, os.SEEK_END) and lines.read(1) != b"\n":
            lines.write(b"\n")  # after an incomplete line
        lines.write(json.dumps(row).encode() + b"\n")


@contextmanager
def locked(folder: Path, *, is_main: bool) -> Iterator[None]:
    """Hold the lock of a folder; the operating system releases it when the process ends, however it ends.

    Raises:
        ValueError: another run holds the lock.
    """
    if not is_main:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            # POSIX locks are not inherited by forked data-loader workers, which may outlive a killed run.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise ValueError(
                    f"{folder} is in use by {file.read().strip() or 'another run'}: wait for it, stop it, "
                    "or give another name=... or --out"
                ) from None
            logger.warning("warning: %s cannot be locked (%s): start no second run in it", folder, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        file.flush()
        yield


def write_environment(folder: Path, **facts: Any) -> None:
    """Write ``environment.json``: command, machine, versions of packages, and ``facts``."""
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
    write_atomically(folder / ENVIRONMENT, json.dumps(environment, indent=2) + "\n")


def _commit() -> str | None:
    """Return the commit of the toolkit if it runs from a git checkout; ``-dirty`` if files were changed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed, possibly inside another repository
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(git, capture_output=True, text=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
