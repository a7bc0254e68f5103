"""What a run leaves to read: console lines, ``metrics.jsonl``, ``events.jsonl``, ``environment.json``, pictures."""

from __future__ import annotations

import csv
import json
import math
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

PACKAGES = ("simmim", "torch", "timm", "accelerate", "datasets", "pillow", "einops", "safetensors", "numpy")


class RunLog:
    """Writes into the folder of a stage; on processes other than the main one it writes nothing.

    Broken images are the exception: each process names its own.
    """

    def __init__(
        self, folder: Path, *, is_main: bool, pictures: str = "reconstructions", max_broken: float = math.inf
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.is_main, self.pictures = folder, is_main, folder / pictures
        self.metrics_file, self.events_file = folder / "metrics.jsonl", folder / "events.jsonl"
        self.broken_file = folder / "bad_images.csv"
        self.max_broken = max_broken
        self._bar: tqdm | None = None
        self._broken = self._read_broken()
        self._images, self._since = 0, time.perf_counter()

    def say(self, text: str) -> None:
        """One line to the console, above the progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def start(self, step: int, total_steps: int) -> None:
        """Begin (or continue) at ``step``: lines of later steps belong to work that was lost."""
        if not self.is_main:
            return
        for file in (self.metrics_file, self.events_file):
            if file.exists():
                lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
                kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
                file.write_text("".join(kept), encoding="utf-8")
        self._images, self._since = 0, time.perf_counter()
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)
        self._first_step, self._total_steps, self._begin = step, total_steps, self._since

    def count(self, num_images: int) -> None:
        """One optimizer step over ``num_images`` is done."""
        self._images += num_images
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
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        text = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        if self._bar:
            self._bar.set_postfix_str(text, refresh=False)
        else:
            done, left = step - self._first_step, self._total_steps - step
            eta = f"  eta {(now - self._begin) / done * left:.0f} s" if done and left else ""
            self.say(f"step {step}/{self._total_steps}  {text}{eta}")

    def history(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; none on other processes than the main one."""
        return read_lines(self.metrics_file) if self.is_main else []

    def warn(self, step: int, text: str) -> None:
        """A warning to the console and to ``events.jsonl``."""
        self.say(f"warning: step {step}: {text}")
        if self.is_main:
            with self.events_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "event": "warning", "text": text}) + "\n")

    def broken(self, images: list[tuple[str, str]]) -> None:
        """Name every broken image once, in ``bad_images.csv`` and on the console.

        Raises:
            ValueError: more than ``max_broken`` by now.
        """
        for name, reason in images:
            if name in self._broken:
                continue
            self._broken |= self._read_broken()  # another process may have named it
            if name in self._broken:
                continue
            self._broken.add(name)
            with self.broken_file.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow([name, reason])
            tqdm.write(f"skipped a broken image: {name} ({reason})", file=sys.stdout)
            if len(self._broken) > self.max_broken:
                self.end()
                raise ValueError(
                    f"{len(self._broken)} images could not be read, more than data.max_broken_share allows "
                    f"({self.max_broken:.0f}): see {self.broken_file}, mend them or raise the share; "
                    "the same command then continues from the last checkpoint"
                )

    def _read_broken(self) -> set[str]:
        if not self.broken_file.exists():
            return set()
        with self.broken_file.open(newline="", encoding="utf-8") as file:
            return {row[0] for row in csv.reader(file) if row}

    def picture(self, step: int, picture: Image.Image) -> None:
        """Save a picture as ``step_00001000.png``."""
        if self.is_main:
            self.pictures.mkdir(exist_ok=True)
            picture.save(self.pictures / f"step_{step:08d}.png")

    def end(self) -> None:
        """Close the progress bar and sum up."""
        if self._bar:
            self._bar.close()
        if broken := self._read_broken():
            self.say(f"{len(broken)} broken image(s) skipped so far, named in {self.broken_file}")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object per line."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_environment(folder: Path, **facts: Any) -> None:
    """``environment.json``: what the run ran on."""
    environment = {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "packages": {package: version(package) for package in PACKAGES},
        **facts,
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")
