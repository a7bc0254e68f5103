"""A stage that is ready to be trained, and a trained one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from simmim.config import Recipe, Stage
from simmim.data import Source
from simmim.data.loader import Batch, Batches
from simmim.data.transforms import Transform
from simmim.tasks.task import Task
from simmim.training.run_log import RunLog

if TYPE_CHECKING:
    from simmim.stages.stage_type import StageType


class Datasets(NamedTuple):
    """Images or videos of a stage."""

    training: Source
    validation: Source | None
    """None if pretraining has no validation images."""
    classes: list[str]
    """Class names; empty for pretraining."""
    problems: Sequence[tuple[str, str]] = ()
    """Files that are left out from the beginning, with the reason."""
    tests: Mapping[str, Source] = {}
    """More evaluation data, by path."""


class Transforms(NamedTuple):
    """Transforms of decoded images or videos."""

    training: Transform
    evaluation: Transform
    """Fixed view of validation images, the same in every epoch."""
    final: Transform | None = None
    """View for the evaluation after training; None: as ``evaluation``."""


@dataclass(frozen=True)
class Job:
    """A stage of a recipe with its task and data."""

    recipe: Recipe
    name: str
    """Name of the stage."""
    stage_type: StageType
    task: Task
    datasets: Datasets
    transforms: Transforms
    fingerprint: dict[str, Any]
    """Resume fingerprint: settings that must match when the stage continues."""
    init_from: str
    """Source of the initial weights: a path, or ``scratch``."""

    @property
    def stage(self) -> Stage:
        """Settings of the stage."""
        return self.recipe.stages[self.name]

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps."""
        return max(1, round(self.stage.schedule.epochs * len(self.datasets.training) / self.stage.batch_size))


class TrainedStage(NamedTuple):
    """Result of training: the model to evaluate and export, and batches of evaluation data."""

    task: Task
    """In evaluation mode; with the EMA of the weights if the stage keeps one."""
    weights: dict[str, Tensor]
    """Full state dict; under FSDP2 on the first process only."""
    datasets: Datasets
    validation: Batches | list
    preview: Batch
    tests: dict[str, Batches | list]
    log: RunLog
