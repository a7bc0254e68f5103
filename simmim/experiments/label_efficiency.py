"""Does pretraining help where labels are few? The arms of a recipe, over several seeds.

Stages that start from the pretrained encoder are compared with those that start from scratch on the
same labels with the same budget: images, batch size and epochs. Stages of transfer show what a larger
image does to the position bias, before and after they are trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from simmim.config import DetectStage, FinetuneStage, PretrainStage, Recipe, SegmentStage, Supervised, video_of
from simmim.data import Labelled
from simmim.evaluation.classification import evaluate_images, load_classifier, make_view
from simmim.experiments.page import draw_page, final_of, measure_of
from simmim.experiments.results import percent
from simmim.experiments.trials import check_seeds
from simmim.export.export import open_export
from simmim.stages import run, run_stage
from simmim.stages.datasets import make_datasets
from simmim.stages.initialization import geometry
from simmim.training.distributed import make_accelerator

BICUBIC = "as it is, bias table resampled"
CONTINUOUS = "as it is, continuous bias"
TUNED = "fine-tuned there"


class Pair(NamedTuple):
    """A stage that starts from a pretrained encoder and its control."""

    pretrained: str
    scratch: str

    @property
    def title(self) -> str:
        return f"{self.pretrained} / {self.scratch}"


class Findings(NamedTuple):
    """Held-out top-1, or of segmentation mean IoU, of every seed."""

    accuracy: dict[str, list[float]]
    """By stage."""
    transfers: dict[str, dict[str, list[float]]]
    """By stage of kind transfer, then by what was done to the encoder."""


def label_efficiency(
    recipe: Recipe,
    out: Path,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    precision: str | None = None,
    say: Callable[[str], None] = print,
) -> Findings:
    """Pretrain once, repeat the stages with labels for every seed, and write the table and the page.

    What is finished is not done again, so the same call continues an interrupted one. The table and the
    page are of the seeds of the last call.

    Args:
        out: as for :func:`simmim.stages.run`; seeds go into ``out / recipe.name / seeds``.

    Raises:
        ValueError: a recipe without anything to compare, a seed given twice, or a stage that cannot run.
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
                judged = evaluate_transfer(part, name, folder / "seeds", precision)
                for what, top1 in {**judged, TUNED: final}.items():
                    findings.transfers.setdefault(name, {}).setdefault(what, []).append(top1)
    if make_accelerator(precision).is_main_process:
        titles = dict.fromkeys(measure_of(recipe.stages[pair.pretrained]).title for pair in pairs)
        table = format_table(pairs, findings, seeds, " or ".join(titles))
        say(table)
        (folder / "label_efficiency.txt").write_text(table + "\n", encoding="utf-8")
        content = {"seeds": list(seeds), "pairs": [pair._asdict() for pair in pairs], **findings._asdict()}
        (folder / "label_efficiency.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        draw_page(folder, recipe, [tuple(pair) for pair in pairs], findings.transfers, seeds)
        say(f"table  {folder / 'label_efficiency.txt'}\npage   {folder / 'page.png'}")
    return findings


def find_pairs(recipe: Recipe) -> list[Pair]:
    """The stages that can be compared: the same labels and the same budget, from pretraining and from scratch.

    Raises:
        ValueError: there are none.
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
    """The stages with labels alone, under another seed; they start from the encoders pretrained by ``recipe``."""
    stages = {}
    for name, stage in recipe.stages.items():
        start = recipe.start_of(name)
        if isinstance(stage, Supervised):
            if isinstance(recipe.stages.get(start), PretrainStage):
                start = str(out / recipe.name / start / "export")
            stages[name] = stage.model_copy(update={"init_from": start})
    return recipe.model_copy(update={"name": f"seed_{seed}", "seed": seed, "stages": stages})


def evaluate_transfer(recipe: Recipe, name: str, out: Path, precision: str | None) -> dict[str, float]:
    """Top-1 of the classifier that a transfer starts from, at the size of the transfer, untrained.

    With its continuous bias, and with the same biases kept as a table that is resampled bicubically, as
    for Swin V1.
    """
    stage = recipe.stages[name]
    assert isinstance(stage, FinetuneStage)
    export = open_export(out / recipe.name / stage.init_from / "export")
    config = export.config
    size, window = geometry(stage, config)
    validation = cast(Labelled, make_datasets(recipe, name, size).validation)
    accuracies = {}
    ways = {CONTINUOUS: config.position_bias, BICUBIC: "table"}
    if config.position_bias == "table":
        del ways[CONTINUOUS]
    for what, bias in ways.items():
        task = load_classifier(export, image_size=size, window_size=window, position_bias=bias)
        view = make_view(task.encoder.config, stage.crop.interpolation, stage.video.inference if stage.video else None)
        accuracies[what] = evaluate_images(
            task, validation, view, make_accelerator(precision), batch_size=stage.micro_batch_size
        )["top1"]
    return accuracies


def format_table(pairs: Sequence[Pair], findings: Findings, seeds: Sequence[int], measure: str = "top-1") -> str:
    """Mean ± standard deviation over the seeds in percent; differences are paired by seed."""
    lines = [f"held-out {measure}, %, mean ± s.d. of seeds {', '.join(map(str, seeds))}"]
    width = max(len(name) for pair in pairs for name in (pair.title, *findings.transfers)) + 2
    lines.append(f"{'':<{width}}{'pretrained':>16}{'from scratch':>16}{'difference':>16}")
    for pair in pairs:
        first, second = findings.accuracy[pair.pretrained], findings.accuracy[pair.scratch]
        gains = [a - b for a, b in zip(first, second, strict=True)]
        cells = "".join(f"{percent(values):>16}" for values in (first, second, gains))
        lines.append(f"{pair.title:<{width}}{cells}")
    for name, ways in findings.transfers.items():
        lines.append(name)
        lines += [f"  {percent(values):>14}  {what}" for what, values in ways.items()]
    return "\n".join(lines)
