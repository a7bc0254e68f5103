"""Checkpoints: ``checkpoints/step_00001000/`` with weights, optimizer state, EMA and step.

A checkpoint is written under a temporary name, with a checksum of every file, and renamed when it is
complete. So every folder named ``step_...`` was complete when it was written, and later damage is detected.
Tensors are stored as safetensors by torch.distributed.checkpoint, one file for each process that
holds a shard; any number of processes can read them. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

_NAME = re.compile(r"step_(\d{8})")
State = dict[str, Tensor]


class Checkpoints:
    """Writes the checkpoints of a stage in a background thread and removes old ones.

    Every process creates one and calls the same methods at the same steps.

    Args:
        folder: folder of the checkpoints, shared by all processes.
        settings: settings that must match on resume; plain JSON.
        keep: number of most recent checkpoints to keep; None: all.
        keep_every_steps: checkpoints at multiples of this step are kept as well.
        rank: index of this process.
        world_size: number of processes.
        is_sharded: whether each process holds a shard of the state; if not, the first process writes it all.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        *,
        keep: int | None,
        keep_every_steps: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        is_sharded: bool = False,
    ) -> None:
        self.folder, self.settings = folder, settings
        self.keep, self.keep_every_steps = keep, keep_every_steps
        self.rank, self.world_size = rank, world_size
        self.is_writer = rank == 0 or is_sharded
        # A separate process group, so that saving does not interfere with the exchange of gradients.
        self._group: Any = dist.new_group(backend="gloo") if is_sharded and world_size > 1 else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: State) -> None:
        """Copy the state after ``step`` optimizer steps and start to write it in the background.

        Raises:
            OSError: the previous checkpoint could not be written.
        """
        self.wait()
        if not self.is_writer:
            return
        partial = self.folder / f".writing_{checkpoint_name(step)}"
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        # Copy, because the next step changes the tensors.
        copy = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in state.items()}
        # Not a daemon thread: it finishes writing when the main thread fails.
        self._thread = threading.Thread(target=self._try_to_write, args=(step, copy, partial))
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            OSError: it could not be written; earlier checkpoints are intact.
        """
        if self._thread is not None:
            self._thread.join()
        self.check()

    def check(self) -> None:
        """Raise the error of a failed checkpoint; do not wait for one that is still being written."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _try_to_write(self, step: int, state: State, partial: Path) -> None:
        try:
            self._write(step, state, partial)
        except BaseException as error:  # raised by check(), which the loop calls after every step
            cause = _cause(error)
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(cause, OSError):
                cause = OSError(
                    f"the checkpoint of step {step} could not be written ({cause.strerror or cause}): "
                    f"{self._space(state)}; {self._last()}. Free or repair the disk, then run the same command "
                    "again to resume from it"
                )
            self._error = cause

    def _write(self, step: int, state: State, partial: Path) -> None:
        if self._group is not None:
            dist.barrier(group=self._group)  # wait until the folder exists
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(
                state,
                storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
                process_group=self._group,
                no_dist=self._group is None,
            )
        digests = self._checksums(partial)
        if self.rank != 0:
            return
        about = {"step": step, "settings": self.settings, "processes": self.world_size, "files": digests}
        about["sha256"] = _digest_of(about)
        (partial / "state.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        fsync(partial / "state.json")
        fsync(partial)
        final = self.folder / checkpoint_name(step)
        if final.exists():  # it was found damaged, else this step would not run again
            os.replace(final, final.with_name(f".damaged_{final.name}"))
            shutil.rmtree(final.with_name(f".damaged_{final.name}"))
        os.replace(partial, final)
        fsync(self.folder)
        self._prune(step)

    def _checksums(self, partial: Path) -> dict[str, str]:
        """Return the checksum of every file on the first process; each process reads a part of the files."""
        files = sorted(partial.glob("*.safetensors"))
        if self._group is None:
            return {file.name: checksum(file) for file in files}
        own = {file.name: checksum(file) for file in files[self.rank :: self.world_size]}
        parts: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(own, parts, group=self._group)
        return {name: digest for part in parts or [] for name, digest in part.items()}

    def _prune(self, step: int) -> None:
        if self.keep is None:
            return
        for path in [path for path in list_checkpoints(self.folder) if _step_of(path) <= step][: -self.keep]:
            if not self.keep_every_steps or _step_of(path) % self.keep_every_steps:
                # Ignore deletion failures.
                path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)

    def _space(self, state: State) -> str:
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        free = shutil.disk_usage(self.folder).free
        return f"it needs about {size / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free in {self.folder}"

    def _last(self) -> str:
        complete = list_checkpoints(self.folder)
        return f"the last valid checkpoint is {complete[-1].name}" if complete else "there is no earlier checkpoint"


def list_checkpoints(folder: Path) -> list[Path]:
    """List all checkpoints, oldest first; they may have been damaged since they were written."""
    return sorted(path for path in folder.glob("step_*") if _NAME.fullmatch(path.name))


def remove_unfinished(folder: Path) -> None:
    """Remove incomplete checkpoints, left by interrupted writing."""
    for path in (*folder.glob(".writing_*"), *folder.glob(".damaged_*")):
        shutil.rmtree(path, ignore_errors=True)


def newest_checkpoint(folder: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Find the newest valid checkpoint.

    Returns:
        The checkpoint (None if there is none), its ``state.json``, and one message for each newer, damaged one.

    Raises:
        ValueError: there are checkpoints, but none is valid.
    """
    damaged: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            return checkpoint, verify(checkpoint), damaged
        except ValueError as error:
            damaged.append(str(error))
    if damaged:
        raise ValueError(
            f"{'; '.join(damaged)}: no checkpoint in {folder} is valid. If the disk is not temporarily failing, "
            "remove the folder to start again"
        )
    return None, {}, []


def verify(checkpoint: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its checksum.

    Returns:
        The content of ``state.json``: ``step``, ``settings``, ``processes`` and ``files``.

    Raises:
        ValueError: a file is missing or damaged.
    """
    try:
        about = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        digest = about.pop("sha256", None)
        if digest != _digest_of(about) or about["step"] != _step_of(checkpoint):
            raise ValueError("state.json does not match its checksum")
        if about["files"].keys() != {file.name for file in checkpoint.glob("*.safetensors")}:
            raise ValueError("files are missing or were added")
        for name, expected in about["files"].items():
            if checksum(checkpoint / name) != expected:
                raise ValueError(f"{name} does not match its checksum")
    except OSError as error:
        raise _damaged(checkpoint, f"{Path(error.filename or checkpoint).name}: {error.strerror or error}") from None
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise _damaged(checkpoint, error) from None
    return about


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None = None) -> State:
    """Return everything that training changes, by name: weights, optimizer state and EMA."""
    state = {f"model/{key}": tensor for key, tensor in model.state_dict().items()}
    if ema is not None:
        state |= {f"ema/{key}": tensor for key, tensor in ema.state_dict().items()}
    return state | {
        f"optimizer/{name}/{slot}": value
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def load_checkpoint(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None = None
) -> None:
    """Load a checkpoint into ``model``, ``optimizer`` and ``ema``, sharded or not.

    Raises:
        ValueError: a file of the checkpoint cannot be read, or its tensors do not match.
    """
    saved = _names_in(checkpoint)
    for name, parameter in model.named_parameters():
        slots = [key.rpartition("/")[2] for key in saved if key.rpartition("/")[0] == f"optimizer/{name}"]
        if slots:
            # AdamW counts its steps on the CPU.
            optimizer.state[parameter] = {
                slot: torch.zeros(()) if slot == "step" else torch.zeros_like(parameter.detach()) for slot in slots
            }
    state = training_state(model, optimizer, ema)
    if differing := sorted(state.keys() ^ saved):
        raise _damaged(checkpoint, f"{len(differing)} tensors are missing or unexpected, for instance {differing[0]}")
    _read(checkpoint, state)


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Load only the weights of a checkpoint into ``model``.

    Raises:
        ValueError: a file of the checkpoint cannot be read, or lacks a tensor.
    """
    state = {f"model/{key}": tensor for key, tensor in model.state_dict().items()}
    if missing := sorted(state.keys() - _names_in(checkpoint)):
        raise _damaged(checkpoint, f"{len(missing)} tensors are missing, for instance {missing[0]}")
    _read(checkpoint, state)


def _names_in(checkpoint: Path) -> set[str]:
    try:
        return set(HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata)
    except (OSError, SafetensorError) as error:
        raise _damaged(checkpoint, error) from None


def _read(checkpoint: Path, state: State) -> None:
    """Read the tensors of ``state`` in place; each process reads its shards."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    except (CheckpointException, OSError, SafetensorError) as error:
        raise _damaged(checkpoint, _cause(error)) from None


# Settings added later, with the value that older checkpoints were trained with.
DEFAULTS_OF_OLDER_CHECKPOINTS = {
    "data.fraction": 1.0,
    "stage.target.pixels": "masked",
    "stage.target.downsample": 1,
    "stage.target.head": "linear",
}


def different_settings(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """Return a line ``key: saved -> current`` for every setting that differs."""
    lines = []
    for key in sorted(set(saved) | set(current)):
        old, new = saved.get(key, DEFAULTS_OF_OLDER_CHECKPOINTS.get(prefix + key)), current.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += different_settings(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old} -> {new}")
    return lines


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint of a step."""
    return f"step_{step:08d}"


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _damaged(checkpoint: Path, reason: object) -> ValueError:
    return ValueError(f"checkpoint {checkpoint} is damaged ({reason})")


def _cause(error: BaseException) -> BaseException:
    """Return the first failure of any process."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def checksum(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _digest_of(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def fsync(path: Path) -> None:
    """Sync a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
