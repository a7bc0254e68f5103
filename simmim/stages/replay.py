"""Doing a step again that was not taken: which images, which modules made its loss or gradient not finite."""

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
from simmim.stages.runner import Job
from simmim.stages.stage_type import room_of
from simmim.training.attention_backend import restore_attention_backend
from simmim.training.checkpoint import load_weights, verify
from simmim.training.distributed import allocate_parameters, make_accelerator
from simmim.training.engine import to_device
from simmim.training.nonfinite_dump import FOLDER

SHOWN = 5


class Replay(NamedTuple):
    """What came of a step that was done again."""

    loss: float
    grad_norm: float
    is_reproduced: bool
    text: str


def replay(report: Path) -> Replay:
    """Do a step again, in one process, from its black box.

    Args:
        report: ``nonfinite/step_00000123.json``, or the folder of a stage, for its newest one.

    Raises:
        ValueError: there is none, or what it needs is missing or damaged.
    """
    report = report.resolve()
    if report.is_dir():
        found = sorted((report / FOLDER).glob("step_*.json"))
        if not found:
            raise ValueError(f"{report} has no {FOLDER}/step_*.json: none of its steps was not finite")
        report = found[-1]
    try:
        about = json.loads(report.read_text(encoding="utf-8"))
        stage_folder, weights = report.parents[1], report.parent / about["weights"]
        about["processes"][0][0]["index"], about["step"], about["seed"]
    except (ValueError, FileNotFoundError, LookupError, TypeError) as error:
        raise ValueError(f"{report} is no report of a step ({error!r})") from None
    verify(weights)
    accelerator = make_accelerator(about["precision"])
    recipe = load_recipe(str(stage_folder / "recipe.yaml"))
    name = stage_folder.name
    job = room_of(recipe.stages[name]).make_job(recipe, stage_folder.parents[1], name, accelerator.mixed_precision)
    allocate_parameters(job.task, torch.device("cpu"))
    load_weights(weights, job.task)
    job.task.to(accelerator.device).train()
    restore_attention_backend(job.task.encoder, recipe.stages[name], stage_folder, accelerator.device)
    return _again(about, job, recipe.data.read_timeout_s, accelerator)


def _again(about: dict[str, Any], job: Job, timeout_s: float, accelerator: Accelerator) -> Replay:
    samples = SampleDataset(job.training, job.transform, about["seed"], labelled=job.labelled, timeout_s=timeout_s)
    task, processes = job.task, about["processes"]
    accumulation, losses = len(processes[0]), []
    modules: list[str] = []
    batches: list[Batch] = []
    for rank, micro_batches in enumerate(processes):
        set_seed(derive_seed("step", about["seed"], about["step"], rank) % 2**32)
        for keys in micro_batches:
            batch = samples.__getitems__(list(zip(keys["epoch"], keys["index"], strict=True)))
            batches.append(batch)
            with accelerator.autocast(), _watch(task, modules):
                loss = task(to_device(batch, accelerator.device))
            accelerator.backward(loss / (accumulation * len(processes)))
            losses.append(loss.item())
    gradients = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(gradients.values()).item()
    images = [name for batch in batches for name in _images_alone(batch, samples, job, accelerator)]
    loss_value = sum(losses) / len(losses)
    bad = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    reproduced = _same(loss_value, about["loss"]) and _same(norm, about["grad_norm"])
    lines = [
        f"step {about['step']}: loss {loss_value}, gradient norm {norm}; "
        f"they were {about['loss']} and {about['grad_norm']}",
        "reproduced" if reproduced else "not reproduced: another processor or version may compute otherwise",
        f"first module whose output is not finite: {modules[0]}" if modules else "the output of every module is finite",
        f"gradients that are not finite: {_few(bad)}",
        f"images whose own loss is not finite: {_few(images)}",
    ]
    return Replay(loss_value, norm, reproduced, "\n".join(lines))


@torch.no_grad()
def _images_alone(batch: Batch, samples: SampleDataset, job: Job, accelerator: Accelerator) -> list[str]:
    """The images of a batch that are not finite by themselves."""
    job.task.eval()
    names = []
    with accelerator.autocast():
        for place, number in enumerate(batch["index"].tolist()):
            one = samples.__getitems__([(int(batch["epoch"][place]), number)])
            if not math.isfinite(float(job.task.eval_step(to_device(one, accelerator.device))["loss"])):
                names.append(job.training.name(number))
    job.task.train()
    return names


@contextmanager
def _watch(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Note the modules whose output is not finite, in the order of the forward pass."""

    def looker(name: str) -> Callable[[nn.Module, tuple, Any], None]:
        def look(module: nn.Module, _: tuple, output: Any) -> None:
            if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(f"{name} ({type(module).__name__})")

        return look

    hooks = [module.register_forward_hook(looker(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _same(now: float, before: float) -> bool:
    """Both not finite, or equal to what another number of processes may change."""
    if math.isfinite(now) and math.isfinite(before):
        return math.isclose(now, before, rel_tol=1e-2)
    return math.isfinite(now) == math.isfinite(before)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more if names else "none"
