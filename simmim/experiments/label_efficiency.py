"""Label efficiency: pretraining against training from scratch on few labels, over several seeds.

Stages that start from the pretrained encoder are compared with stages that start from scratch, on the same labels and
with the same budget: image size, batch size and epochs. Transfer stages show the effect of a larger image on the
position bias, before and after fine-tuning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from simmim.config import DetectStage, FinetuneStage, PretrainStage, Recipe, SegmentStage, Supervised, video_of
from simmim.data import LabelledSource
from simmim.evaluation.classification import evaluate_images, load_classifier, make_view
from simmim.experiments.page import draw_page, final_of, measure_of
from simmim.experiments.results import percent
from simmim.experiments.trials import check_seeds
from simmim.export.export import open_export
from simmim.stages import run, run_stage
from simmim.stages.datasets import make_datasets
from simmim.stages.initialization import geometry
from simmim.training.distributed import make_accelerator

BICUBIC = "not fine-tuned, bias table resampled"
CONTINUOUS = "not fine-tuned, continuous bias"
TUNED = "fine-tuned at the larger size"


class Pair(NamedTuple):
    """A stage that starts from a pretrained encoder and its control."""

    pretrained: str
    scratch: str

    @property
    def title(self) -> str:
        return f"{self.pretrained} / {self.scratch}"


class Findings(NamedTuple):
    """Validation metric of every seed: top-1, mean IoU for segmentation, box AP for detection."""

    accuracy: dict[str, list[float]]
    """By stage."""
    transfers: dict[str, dict[str, list[float]]]
    """By transfer stage, then by treatment of the encoder: ``BICUBIC``, ``CONTINUOUS`` or ``TUNED``."""


def label_efficiency(
    recipe: Recipe,
    out: Path,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    precision: str | None = None,
    echo: Callable[[str], None] = print,
) -> Findings:
    """Pretrain once, run the stages with labels for every seed, and write a table and a page.

    Finished stages are skipped, so the same call resumes an interrupted one. The table and the page cover the seeds
    of the last call.

    Args:
        recipe: the stages to run and compare.
        out: parent of the run folder, as for :func:`simmim.stages.run`; seeds are in ``out / recipe.name / seeds``.
        seeds: seeds of the stages with labels.
        precision: ``fp32``, ``bf16`` or None for the default.
        echo: called with every line of output.

    Raises:
        ValueError: the recipe has no stages to compare, a seed is repeated, or a stage cannot run.
    """
    check_seeds(seeds)
    pairs = find_pairs(recipe)
    folder = out / recipe.name
    for name, stage in recipe.stages.items():
        if isinstance(stage, PretrainStage):
            run_stage(recipe, name, out, precision=precision)
    findings = Findings({}, {})
    for seed in seeds:
        part = with_seed(recipe, seed, out)
        run(part, folder / "seeds", precision=precision)
        for name, stage in part.stages.items():
            final = final_of(folder / "seeds" / part.name / name, stage)
            findings.accuracy.setdefault(name, []).append(final)
            if stage.kind == "transfer" and stage.init_from in part.stages:
                untrained = evaluate_transfer(part, name, folder / "seeds", precision)
                for treatment, top1 in {**untrained, TUNED: final}.items():
                    findings.transfers.setdefault(name, {}).setdefault(treatment, []).append(top1)
    if make_accelerator(precision).is_main_process:
        titles = dict.fromkeys(measure_of(recipe.stages[pair.pretrained]).title for pair in pairs)
        table = format_table(pairs, findings, seeds, " or ".join(titles))
        echo(table)
        (folder / "label_efficiency.txt").write_text(table + "\n", encoding="utf-8")
        content = {"seeds": list(seeds), "pairs": [pair._asdict() for pair in pairs], **findings._asdict()}
        (folder / "label_efficiency.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        draw_page(folder, recipe, [tuple(pair) for pair in pairs], findings.transfers, seeds)
        echo(f"table  {folder / 'label_efficiency.txt'}\npage   {folder / 'page.png'}")
    return findings


def find_pairs(recipe: Recipe) -> list[Pair]:
    """Return the pairs of stages with equal labels and budget, one from pretraining and one from scratch.

    Raises:
        ValueError: there is no such pair.
    """
    controls = {
        _budget(recipe, stage): name
        for name, stage in recipe.stages.items()
        if isinstance(stage, Supervised) and stage.init_from == "scratch"
    }
    pairs = []
    for name, stage in recipe.stages.items():
        start = recipe.stages.get(recipe.start_of(name))
        if isinstance(stage, Supervised) and isinstance(start, PretrainStage) and _budget(recipe, stage) in controls:
            pairs.append(Pair(name, controls[_budget(recipe, stage)]))
    if not pairs:
        raise ValueError(
            f"{recipe.name} has nothing to compare: give it a stage that starts from the pretrained encoder and one "
            "with init_from: scratch, with the same labels, image_size, batch_size and schedule.epochs"
        )
    return pairs


def _budget(recipe: Recipe, stage: Supervised) -> tuple[Any, ...]:
    size = stage.image_size or next(
        (s.image_size for s in recipe.stages.values() if isinstance(s, PretrainStage)), None
    )
    labels = (
        stage.labels.model_dump_json(exclude={"tests"})
        if isinstance(stage, FinetuneStage | SegmentStage | DetectStage)
        else ""
    )
    return type(stage), labels, video_of(stage), size, stage.batch_size, stage.schedule.epochs


def with_seed(recipe: Recipe, seed: int, out: Path) -> Recipe:
    """Return the stages with labels under another seed; they start from the encoders pretrained by ``recipe``."""
    stages = {}
    for name, stage in recipe.stages.items():
        start = recipe.start_of(name)
        if isinstance(stage, Supervised):
            if isinstance(recipe.stages.get(start), PretrainStage):
                start = str(out / recipe.name / start / "export")
            stages[name] = stage.model_copy(update={"init_from": start})
    return recipe.model_copy(update={"name": f"seed_{seed}", "seed": seed, "stages": stages})


def evaluate_transfer(recipe: Recipe, name: str, out: Path, precision: str | None) -> dict[str, float]:
    """Return the top-1 of the classifier that a transfer starts from, at the transfer's size, without fine-tuning.

    Evaluated with its continuous position bias, and with the bias as a table that is resampled bicubically as in
    Swin V1.
    """
    stage = recipe.stages[name]
    assert isinstance(stage, FinetuneStage)
    export = open_export(out / recipe.name / stage.init_from / "export")
    config = export.config
    size, window = geometry(stage, config)
    validation = cast(LabelledSource, make_datasets(recipe, name, size).validation)
    accuracies = {}
    biases = {CONTINUOUS: config.position_bias, BICUBIC: "table"}
    if config.position_bias == "table":
        del biases[CONTINUOUS]
    for treatment, bias in biases.items():
        task = load_classifier(export, image_size=size, window_size=window, position_bias=bias)
        view = make_view(task.encoder.config, stage.crop.interpolation, stage.video.inference if stage.video else None)
        accuracies[treatment] = evaluate_images(
            task, validation, view, make_accelerator(precision), batch_size=stage.micro_batch_size
        )["top1"]
    return accuracies


def format_table(pairs: Sequence[Pair], findings: Findings, seeds: Sequence[int], measure: str = "top-1") -> str:
    """Format mean ± standard deviation over the seeds in percent; differences are paired by seed."""
    lines = [f"validation {measure}, %, mean ± s.d. of seeds {', '.join(map(str, seeds))}"]
    width = max(len(name) for pair in pairs for name in (pair.title, *findings.transfers)) + 2
    lines.append(f"{'':<{width}}{'pretrained':>16}{'from scratch':>16}{'difference':>16}")
    for pair in pairs:
        first, second = findings.accuracy[pair.pretrained], findings.accuracy[pair.scratch]
        gains = [a - b for a, b in zip(first, second, strict=True)]
        columns = "".join(f"{percent(values):>16}" for values in (first, second, gains))
        lines.append(f"{pair.title:<{width}}{columns}")
    for name, treatments in findings.transfers.items():
        lines.append(name)
        lines += [f"  {percent(values):>14}  {treatment}" for treatment, values in treatments.items()]
    return "\n".join(lines)
