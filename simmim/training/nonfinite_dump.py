"""What is left of a step that was not taken: enough to do it again, anywhere (``simmim replay``)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from simmim.training.checkpoint import Checkpoints, State, name_of
from simmim.training.run_log import write_whole

FOLDER = "blackbox"


class MicroBatch(NamedTuple):
    """What a process computed in a micro-step."""

    epochs: Tensor
    indices: Tensor
    loss: Tensor


def write_nonfinite_dump(
    folder: Path,
    step: int,
    state: State,
    micro_batches: Sequence[MicroBatch],
    accelerator: Accelerator,
    **facts: Any,
) -> Path:
    """Save the weights from before ``step``, the samples of every process and what came of them.

    Args:
        folder: of the stage.
        facts: loss, gradient norm, seed.

    Raises:
        OSError: it could not be written.

    Returns:
        ``blackbox/step_00000123.json``; the weights lie beside it as a checkpoint of the step before.
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
    report = folder / FOLDER / f"{name_of(step)}.json"
    if accelerator.is_main_process:
        about = {"step": step, "weights": name_of(step - 1), "precision": accelerator.mixed_precision, **facts}
        write_whole(report, json.dumps({**about, "processes": processes}, indent=1) + "\n")
    return report
