"""Which position bias survives a larger window? Table 1 of Swin V2 (arXiv 2111.09883) in small.

Three classifiers that differ in nothing but their position bias are trained at one window size.
Each then works on larger images with windows enlarged in proportion: as it is, and after some steps
of fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure

from simmim.data import CenterCrop, Decoder, RandomCrop, Shapes, evaluation_batches, labelled_sources, training_batches
from simmim.data.loader import Batches
from simmim.data.sources import Labelled
from simmim.experiments.results import percent, write_results
from simmim.rng import derive_seed
from simmim.signals import StopRequest
from simmim.stages.run_folder import starting_point
from simmim.tasks.classification import Classification
from simmim.training.checkpoint import Checkpoints, load_checkpoint
from simmim.training.engine import LoopSettings, evaluate, fit
from simmim.training.optim import make_lr, make_optimizer
from simmim.training.run_log import RunLog
from swin import SwinEncoder, make_config, transfer

VARIANTS = {"log_cpb": "log-spaced CPB", "linear_cpb": "linear-spaced CPB", "table": "table, bicubic"}
FACTORS = (1.0, 1.5, 2.0, 3.0)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
VALIDATION = 500
SMALLEST_CROP = 0.25  # of the area; training has to show what enlarging does: everything larger

Cell = tuple[str, float, bool]
"""Arm, factor, and whether it was fine-tuned there."""


@dataclass(frozen=True)
class Plan:
    """Image and window are those of training, in px and tokens; the patch is 4 px."""

    data: str = "builtin:shapes"
    seeds: int = 3
    image_size: int = 48
    window_size: int = 6
    steps: int = 1000
    finetune_steps: int = 40
    batch_size: int = 32
    lr: float = 6e-3
    finetune_lr: float = 1e-3
    embed_dim: int = 32

    def __post_init__(self) -> None:
        """Raises ValueError: numbers that no encoder can be built of."""
        for name in ("seeds", "image_size", "window_size", "steps", "finetune_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.lr, self.finetune_lr) <= 0:
            raise ValueError(f"rates must be above 0, got {self.lr} and {self.finetune_lr}")
        if self.image_size % 8 or self.window_size % 2:
            raise ValueError(
                f"images are enlarged 1.5 times, so an image size that is a multiple of 8 and an even window are "
                f"needed, got {self.image_size} and {self.window_size}"
            )
        if self.window_size * 4 > self.image_size:
            raise ValueError(
                f"a window of {self.window_size} tokens of 4 px is larger than an image of {self.image_size} px"
            )


def window_transfer(plan: Plan, out: Path, say: Callable[[str], None] = print) -> dict[Cell, list[float]]:
    """Train, enlarge and judge every arm; write ``table.txt``, ``table.json`` and ``table.png``.

    What is finished is not done again: the same call continues an interrupted one.

    Returns:
        For every cell of the table the top-1 accuracy of each seed.

    Raises:
        ValueError: data without labels, or a folder that was made with another plan.
    """
    accelerator = Accelerator()
    cells: dict[Cell, list[float]] = {}
    for seed in range(plan.seeds):
        for variant in VARIANTS:
            say(
                f"{VARIANTS[variant]}, seed {seed} ({seed * len(VARIANTS) + list(VARIANTS).index(variant) + 1} of {plan.seeds * len(VARIANTS)})"
            )
            for cell, accuracy in _evaluate_variant(
                plan, variant, seed, out / f"{variant}_seed{seed}", accelerator
            ).items():
                cells.setdefault(cell, []).append(accuracy)
                tuned = "fine-tuned" if cell[2] else "as it is"
                say(f"  window x {cell[1]:g} {tuned}: {accuracy:.1%}")
    content = [
        {"arm": variant, "factor": factor, "fine_tuned": tuned, "top1": values}
        for (variant, factor, tuned), values in cells.items()
    ]
    results = {"plan": asdict(plan), "cells": content}
    write_results(out, "table", format_table(plan, cells), results, draw(plan, cells), say)
    return cells


def _evaluate_variant(plan: Plan, variant: str, seed: int, folder: Path, accelerator: Accelerator) -> dict[Cell, float]:
    training, _ = _sources(plan)
    torch.manual_seed(derive_seed("step", seed, 0))
    config = make_config(
        "swinv2_tiny",
        image_size=plan.image_size,
        window_size=plan.window_size,
        embed_dim=plan.embed_dim,
        depths=(2, 2),
        num_heads=(2, 4),
        position_bias=variant,
    )
    trained = Classification(SwinEncoder(config), training.classes, mean=MEAN, std=STD)
    top1 = _train(plan, trained, 1.0, seed, folder / "x1", accelerator)
    cells: dict[Cell, float] = {(variant, 1.0, False): top1}
    for factor in FACTORS[1:]:
        larger = transfer(
            trained.encoder.cpu(),
            image_size=round(plan.image_size * factor),
            window_size=round(plan.window_size * factor),
        )
        task = Classification(larger, training.classes, mean=MEAN, std=STD)
        task.head.load_state_dict(trained.head.state_dict())
        task.to(accelerator.device)
        cells[variant, factor, False] = _top1(plan, task, factor, accelerator)
        cells[variant, factor, True] = _train(plan, task, factor, seed, folder / f"x{factor:g}", accelerator)
    return cells


def _train(plan: Plan, task: Classification, factor: float, seed: int, folder: Path, accelerator: Accelerator) -> float:
    """Train at ``factor`` times the size, or continue, and give the held-out accuracy."""
    is_first = factor == 1.0
    steps, lr = (plan.steps, plan.lr) if is_first else (plan.finetune_steps, plan.finetune_lr)
    training, _ = _sources(plan)
    settings = {**asdict(plan), "seeds": None, "factor": factor, "num_images": len(training)}
    checkpoint, start, *_ = starting_point(folder, settings)
    log = RunLog(folder, is_main=True, image_folder="predictions")
    optimizer = make_optimizer(task, task.no_decay_parameters(), weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8)
    if checkpoint is not None:
        load_checkpoint(checkpoint, task, optimizer)
    model, optimizer = accelerator.prepare(task, optimizer)
    if start < steps:
        shown = _views(plan, factor, 16)
        with StopRequest() as stop:
            fit(
                accelerator,
                model,
                optimizer,
                training_batches(
                    training,
                    RandomCrop(_size(plan, factor), scale=(SMALLEST_CROP, 1.0)),
                    seed=seed,
                    labelled=True,
                    batch_size=plan.batch_size,
                    micro_batch_size=plan.batch_size,
                    start_step=start,
                    end_step=steps,
                ),
                LoopSettings(
                    start_step=start,
                    total_steps=steps,
                    accumulation=1,
                    images_per_epoch=len(training),
                    seed=seed,
                    clip_grad_norm=5.0,
                    metrics_every_steps=max(1, steps // 4),
                    evaluate_every_steps=steps,
                    checkpoint_every_steps=100,
                ),
                lr_at=make_lr(
                    "cosine",
                    batch_size=512,
                    steps_per_epoch=steps,
                    total_steps=steps,
                    base_lr=lr,
                    warmup_epochs=0.1,
                    warmup_lr=0.0,
                ),
                log=log,
                checkpoints=Checkpoints(folder / "checkpoints", settings, keep=1),
                stop=stop,
                validation=[],
                preview=next(iter(shown)),
            )
    return _top1(plan, task, factor, accelerator)


def _top1(plan: Plan, task: Classification, factor: float, accelerator: Accelerator) -> float:
    task.eval()
    return evaluate(task, _views(plan, factor, plan.batch_size), accelerator)["top1"]


def _views(plan: Plan, factor: float, batch_size: int) -> Batches:
    _, validation = _sources(plan)
    return evaluation_batches(validation, CenterCrop(_size(plan, factor)), batch_size=batch_size, labelled=True)


def _sources(plan: Plan) -> tuple[Labelled, Labelled]:
    """The same pictures for every window, as photographs are: resized to what is asked."""
    if plan.data == "builtin:shapes":
        size = _size(plan, 2)
        return Shapes(plan.steps * plan.batch_size, size), Shapes(VALIDATION, size, validation=True)
    return labelled_sources(plan.data, Decoder(3), VALIDATION)


def _size(plan: Plan, factor: float) -> tuple[int, int]:
    return (round(plan.image_size * factor),) * 2


def format_table(plan: Plan, cells: dict[Cell, list[float]]) -> str:
    """Rows are arms, columns windows; ``without / with`` fine-tuning, mean ± standard deviation in percent."""
    heads = [f"W{plan.window_size * factor:g} I{plan.image_size * factor:g}" for factor in FACTORS]
    lines = [f"{'top-1 %, as it is / fine-tuned':<32}" + "".join(f"{head:>26}" for head in heads)]
    for variant, name in VARIANTS.items():
        texts = [
            " / ".join(
                percent(cells[variant, factor, tuned]) for tuned in (False, True) if (variant, factor, tuned) in cells
            )
            for factor in FACTORS
        ]
        lines.append(f"{name:<32}" + "".join(f"{text:>26}" for text in texts))
    return "\n".join(lines)


def draw(plan: Plan, cells: dict[Cell, list[float]]) -> Figure:
    """Accuracy over the window, one line per arm, a dot per seed; left as it is, right fine-tuned."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for tuned, axis, title in zip((False, True), axes, ("without fine-tuning", "fine-tuned"), strict=True):
        for number, (variant, name) in enumerate(VARIANTS.items()):
            values = [cells[variant, factor, tuned and factor > 1] for factor in FACTORS]
            axis.plot(FACTORS, [100 * mean(v) for v in values], color=f"C{number}", label=name)
            for factor, seeds in zip(FACTORS, values, strict=True):
                axis.plot([factor] * len(seeds), [100 * v for v in seeds], ".", color=f"C{number}", alpha=0.6)
        axis.set_xticks(FACTORS, [f"{plan.window_size * f:g}\n{plan.image_size * f:g} px" for f in FACTORS])
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.set_xlabel(f"window (tokens) and image; trained at {plan.window_size} and {plan.image_size} px")
    axes[0].set_ylabel("held-out top-1, %")
    axes[0].legend()
    return figure
