"""Replay of a non-finite training step: which images and modules made its loss or gradient non-finite."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from simmim.config.loading import load_recipe
from simmim.data.loader import Batch, SampleDataset
from simmim.rng import derive_seed
from simmim.stages.job import Job
from simmim.stages.runner import make_job
from simmim.training.attention_backend import restore_attention_backend
from simmim.training.checkpoint import load_weights, verify
from simmim.training.distributed import allocate_parameters, make_accelerator
from simmim.training.engine import to_device
from simmim.training.nonfinite_dump import FOLDER

MAX_NAMES = 5


class Replay(NamedTuple):
    """Result of a replayed step."""

    loss: float
    grad_norm: float
    is_reproduced: bool
    text: str


def replay(report: Path) -> Replay:
    """Replay a step in one process from its non-finite dump.

    Args:
        report: the JSON file of a dump, or the run folder of a stage, for its newest dump.

    Raises:
        ValueError: there is no dump, or a file that it needs is missing or damaged.
    """
    report = report.resolve()
    if report.is_dir():
        found = sorted((report / FOLDER).glob("step_*.json"))
        if not found:
            raise ValueError(f"{report} has no {FOLDER}/step_*.json: no non-finite step was recorded")
        report = found[-1]
    try:
        dump = json.loads(report.read_text(encoding="utf-8"))
        stage_folder, weights = report.parents[1], report.parent / dump["weights"]
        dump["processes"][0][0]["index"], dump["step"], dump["seed"]
    except (ValueError, FileNotFoundError, LookupError, TypeError) as error:
        raise ValueError(f"{report} is not the dump of a step ({error!r})") from None
    verify(weights)
    accelerator = make_accelerator(dump["precision"])
    recipe = load_recipe(str(stage_folder / "recipe.yaml"))
    name = stage_folder.name
    job = make_job(recipe, name, stage_folder.parents[1], accelerator.mixed_precision)
    allocate_parameters(job.task, torch.device("cpu"))
    load_weights(weights, job.task)
    job.task.to(accelerator.device).train()
    restore_attention_backend(job.task.encoder, recipe.stages[name], stage_folder, accelerator.device)
    return _replay_step(dump, job, recipe.data.read_timeout_s, accelerator)


def _replay_step(dump: dict[str, Any], job: Job, timeout_s: float, accelerator: Accelerator) -> Replay:
    samples = SampleDataset(
        job.datasets.training,
        job.transforms.training,
        dump["seed"],
        labelled=job.stage_type.has_image_labels,
        timeout_s=timeout_s,
    )
    task, processes = job.task, dump["processes"]
    accumulation, losses = len(processes[0]), []
    modules: list[str] = []
    batches: list[Batch] = []
    for rank, micro_batches in enumerate(processes):
        set_seed(derive_seed("step", dump["seed"], dump["step"], rank) % 2**32)
        for keys in micro_batches:
            batch = samples.__getitems__(list(zip(keys["epoch"], keys["index"], strict=True)))
            batches.append(batch)
            with accelerator.autocast(), _watch(task, modules):
                loss = task(to_device(batch, accelerator.device))
            accelerator.backward(loss / (accumulation * len(processes)))
            losses.append(loss.item())
    gradients = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(gradients.values()).item()
    images = [name for batch in batches for name in _nonfinite_images(batch, samples, job, accelerator)]
    loss_value = sum(losses) / len(losses)
    bad = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    reproduced = _same(loss_value, dump["loss"]) and _same(norm, dump["grad_norm"])
    lines = [
        f"step {dump['step']}: loss {loss_value}, gradient norm {norm}; "
        f"recorded: {dump['loss']} and {dump['grad_norm']}",
        "reproduced" if reproduced else "not reproduced: other hardware or library versions may give other results",
        f"first module with a non-finite output: {modules[0]}" if modules else "the outputs of all modules are finite",
        f"non-finite gradients: {_few(bad)}",
        f"images with a non-finite loss: {_few(images)}",
    ]
    return Replay(loss_value, norm, reproduced, "\n".join(lines))


@torch.no_grad()
def _nonfinite_images(batch: Batch, samples: SampleDataset, job: Job, accelerator: Accelerator) -> list[str]:
    """Return the names of the images of a batch that have a non-finite loss when evaluated alone."""
    job.task.eval()
    names = []
    with accelerator.autocast():
        for epoch, index in zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True):
            one = samples.__getitems__([(epoch, index)])
            if not math.isfinite(float(job.task.eval_step(to_device(one, accelerator.device))["loss"])):
                names.append(job.datasets.training.name(index))
    job.task.train()
    return names


@contextmanager
def _watch(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Collect the modules with a non-finite output, in the order of the forward pass."""

    def make_hook(name: str) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(module: nn.Module, _: tuple, output: Any) -> None:
            if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(f"{name} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(make_hook(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same(now: float, before: float) -> bool:
    """Return whether both are non-finite, or equal up to the difference that another number of processes makes."""
    if math.isfinite(now) and math.isfinite(before):
        return math.isclose(now, before, rel_tol=1e-2)
    return math.isfinite(now) == math.isfinite(before)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more if names else "none"
