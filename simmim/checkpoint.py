"""The training state on disk: ``checkpoints/step_00001000/`` with weights, optimizer and position.

A checkpoint is written beside its final name and renamed when it is whole, so a folder named
``step_...`` is always complete. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

_NAME = re.compile(r"step_(\d{8})")


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    *,
    keep: int,
    average: nn.Module | None = None,
) -> Path:
    """Write the state after ``step`` optimizer steps and remove all but the newest ``keep``.

    Args:
        settings: what must be the same when the run is resumed; plain JSON.
        average: of the weights, if one is kept.
    """
    final = folder / f"step_{step:08d}"
    partial = folder / f".writing_{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    moments = {
        f"{name}/{key}": value.detach().contiguous().cpu()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    for name, module in (("model", model), ("average", average)):
        if module is not None:
            weights = {key: tensor.detach().contiguous().cpu() for key, tensor in module.state_dict().items()}
            save_file(weights, partial / f"{name}.safetensors")
    save_file(moments, partial / "optimizer.safetensors")
    state = {"step": step, "settings": settings}
    (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        _flush(file)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _flush(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if _NAME.fullmatch(path.name))


def load_state(checkpoint: Path) -> dict[str, Any]:
    """``step`` and ``settings`` of a checkpoint.

    Raises:
        ValueError: a file of the checkpoint is missing or damaged.
    """
    try:
        return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(checkpoint, error) from None


def load_checkpoint(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None = None
) -> None:
    """Put the saved weights and optimizer state into ``model``, ``optimizer`` and ``average``.

    Raises:
        ValueError: a file of the checkpoint is missing or damaged.
    """
    try:
        weights = load_file(checkpoint / "model.safetensors")
        moments = load_file(checkpoint / "optimizer.safetensors")
        averaged = load_file(checkpoint / "average.safetensors") if average is not None else {}
    except (OSError, SafetensorError) as error:
        raise _damaged(checkpoint, error) from None
    model.load_state_dict(weights, strict=True)
    if average is not None:
        average.load_state_dict(averaged, strict=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    saved: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        name, _, slot = key.rpartition("/")
        saved.setdefault(name, {})[slot] = value
    current = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    current["state"] = {
        number: saved[names[parameter]] for number, parameter in enumerate(parameters) if names[parameter] in saved
    }
    optimizer.load_state_dict(current)


def different_settings(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """``key: saved -> current`` for every setting that differs."""
    lines = []
    for key in sorted(set(saved) | set(current)):
        old, new = saved.get(key), current.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += different_settings(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old} -> {new}")
    return lines


def _damaged(checkpoint: Path, error: Exception) -> ValueError:
    return ValueError(f"checkpoint {checkpoint} is damaged ({error}): remove it to continue from the one before")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
