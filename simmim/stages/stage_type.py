"""Stage types: everything that differs between kinds of stages, and the table of all of them.

A new stage type is one module: the settings (a subclass of :class:`simmim.config.Stage`), the task (a subclass of
:class:`simmim.tasks.task.Task`) and a subclass of :class:`StageType`, given to :func:`register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from accelerate import Accelerator
from torch import Tensor

from simmim.config import Recipe, Stage, Supervised, add_kinds, remove_kinds
from simmim.data import Source
from simmim.export.heads import HEAD, save_head
from simmim.stages.initialization import Start
from simmim.stages.job import Datasets, TrainedStage, Transforms
from simmim.tasks.task import Task
from swin import SwinConfig, SwinEncoder
from swin.config import Pair

S = TypeVar("S", bound=Stage)
T = TypeVar("T", bound="StageType")
U = TypeVar("U", bound=Supervised)


class StageType(ABC, Generic[S]):
    """One kind of stage: its settings, datasets, task, evaluation, export and plan."""

    settings: type[S]
    """Schema of the stage in a recipe; its field ``kind`` names the kinds of stages."""
    data_description: ClassVar[str] = "images"
    data_keys: ClassVar[str] = "data.path"
    """Recipe keys that name the data, for error messages."""
    preview_folder: ClassVar[str] = "predictions"
    """Folder of the preview images in the run folder."""
    has_builtin_data: ClassVar[bool] = False
    """True if ``builtin:shapes`` can be used."""
    has_image_labels: ClassVar[bool] = False
    """True if batches hold one label per image."""
    is_supervised: ClassVar[bool] = False
    """True if the stage has labels. Validation images of such a stage are excluded from training in all stages."""

    # Datasets

    def check_requirements(self, stage: S) -> None:
        """Check before training that the libraries for the evaluation are installed.

        Raises:
            ValueError: a library is missing.
        """

    @abstractmethod
    def open_datasets(self, recipe: Recipe, stage: S, path: str, size: Pair | None) -> Datasets:
        """Open all images of the stage, including those that other stages are evaluated on.

        Args:
            path: of the data.
            size: of builtin images; None: the image size of the stage.

        Raises:
            ValueError, OSError: data that the stage cannot use.
        """

    def open_validation(self, recipe: Recipe, stage: S, path: str) -> Source | None:
        """Open the validation images, to exclude them from training in other stages.

        Raises:
            ValueError, OSError: as :meth:`open_datasets`.
        """
        return self.open_datasets(recipe, stage, path, None).validation

    def open_tests(self, recipe: Recipe, stage: S, config: SwinConfig, classes: list[str]) -> dict[str, Source]:
        """Open more evaluation data, by path.

        Raises:
            ValueError, OSError: data that the model cannot be evaluated on.
        """
        return {}

    def test_paths(self, stage: S) -> list[str]:
        """Return the paths of :meth:`open_tests`."""
        return []

    def label_map_folders(self, stage: S, path: str) -> list[str]:
        """Return folders of label maps, which are not images to train on."""
        return []

    def select_training(self, source: Source, recipe: Recipe, stage: S) -> Source:
        """Select the part of the training images that the settings ask for.

        Raises:
            ValueError: there are fewer images.
        """
        return source

    @abstractmethod
    def make_transforms(self, recipe: Recipe, stage: S, size: Pair) -> Transforms:
        """Make the transforms for images of this size."""

    # Task

    @abstractmethod
    def make_task(self, recipe: Recipe, stage: S, encoder: SwinEncoder, classes: list[str]) -> Task:
        """Build the task around the encoder, with a freshly initialized head."""

    def make_fake_task(self, recipe: Recipe, stage: S, encoder: SwinEncoder, num_classes: int) -> Task:
        """Build the task for planning, around an encoder on the meta device."""
        return self.make_task(recipe, stage, encoder, [""] * num_classes)

    def initialize_head(self, stage: S, task: Any, start: Start) -> None:
        """Initialize the head from where the stage starts, if the settings ask for it.

        Raises:
            ValueError: there is no such head, or it does not fit.
        """

    def fingerprint(self, stage: S, task: Any) -> dict[str, Any]:
        """Return facts for the resume fingerprint besides settings, data and encoder weights."""
        return {}

    def layer_decay(self, stage: S) -> float:
        """Return the factor between the learning rates of adjacent layers."""
        return 1.0

    def ema_decay(self, stage: S) -> float | None:
        """Return the decay of the EMA of the weights; None: no EMA."""
        return None

    # Evaluation, export and plan

    @abstractmethod
    def evaluate(self, trained: TrainedStage, accelerator: Accelerator) -> dict[str, Any]:
        """Evaluate the trained model and log the result.

        Returns:
            Content of ``summary.json``, the keys beginning with ``validation_`` or ``test_``; empty: no such file.

        Raises:
            ValueError: no validation image could be read.
        """

    @abstractmethod
    def describe(self, stage: S, task: Any) -> dict[str, Any]:
        """Return the content of ``encoder.json`` besides the encoder: all that is needed to rebuild the head."""

    def save_head(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the head into an export folder.

        Args:
            weights: full state dict of the task.
        """
        save_head(folder / HEAD, weights)

    def plan(self, task: Any) -> Mapping[str, str]:
        """Return lines for ``simmim plan``, by title."""
        return {}


class SupervisedType(StageType[U]):
    """A kind of stage with labels."""

    is_supervised = True

    def layer_decay(self, stage: U) -> float:
        return stage.layer_decay

    def ema_decay(self, stage: U) -> float | None:
        return stage.ema_decay


STAGE_TYPES: dict[type[Stage], StageType] = {}
"""The type of every kind of stage, by its settings class."""


def register(stage_type: T) -> T:
    """Add a stage type to :data:`STAGE_TYPES`, and its settings to the recipe schema.

    Raises:
        ValueError: another type has the same kind of stage.
    """
    add_kinds(stage_type.settings)
    STAGE_TYPES[stage_type.settings] = stage_type
    return stage_type


def unregister(stage_type: StageType) -> None:
    """Undo :func:`register`."""
    remove_kinds(stage_type.settings)
    STAGE_TYPES.pop(stage_type.settings, None)


def stage_type_of(stage: Stage) -> StageType:
    """Return the type of a stage."""
    return STAGE_TYPES[type(stage)]
