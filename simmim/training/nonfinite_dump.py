"""Dumps the state needed to replay a non-finite step (``simmim replay``)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from simmim.training.checkpoint import Checkpoints, State, checkpoint_name
from simmim.training.run_log import write_atomically

FOLDER = "nonfinite"


class MicroBatch(NamedTuple):
    """A micro-batch of one process and its loss."""

    epochs: Tensor
    """``(b,)``; epoch of each sample."""
    indices: Tensor
    """``(b,)``; index of each sample in its source."""
    loss: Tensor
    """Scalar, detached."""


def write_nonfinite_dump(
    folder: Path,
    step: int,
    state: State,
    micro_batches: Sequence[MicroBatch],
    accelerator: Accelerator,
    **facts: Any,
) -> Path:
    """Save the training state before ``step``, and the samples and losses of every process.

    Args:
        folder: folder of the stage.
        state: training state before the step.
        facts: further entries of the report: loss, gradient norm, seed.

    Returns:
        ``nonfinite/step_00000123.json``; the state is stored next to it, as a checkpoint of the step before.

    Raises:
        OSError: the dump could not be written.
    """
    own = [
        {"epoch": batch.epochs.tolist(), "index": batch.indices.tolist(), "loss": batch.loss.item()}
        for batch in micro_batches
    ]
    processes = gather_object([own])
    checkpoints = Checkpoints(
        folder / FOLDER,
        {},
        keep=None,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        is_sharded=accelerator.is_fsdp2,
    )
    checkpoints.save(step - 1, state)
    checkpoints.wait()
    accelerator.wait_for_everyone()
    report = folder / FOLDER / f"{checkpoint_name(step)}.json"
    if accelerator.is_main_process:
        about = {"step": step, "weights": checkpoint_name(step - 1), "precision": accelerator.mixed_precision, **facts}
        write_atomically(report, json.dumps({**about, "processes": processes}, indent=1) + "\n")
    return report
