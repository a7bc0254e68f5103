"""Datasets of a stage. No stage trains on the evaluation data of another stage of its recipe."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from simmim.config import Data, Recipe, Stage, Video, video_of
from simmim.data import Decoder, MovingShapes, Shapes, Source, VideoDecoder
from simmim.data.loader import reason_of
from simmim.data.sources import Files, Subset, validation_files
from simmim.stages.job import Datasets
from simmim.stages.stage_type import stage_type_of
from swin.config import Pair

BUILTIN = "builtin:shapes"
UNKNOWN = "its evaluation data cannot be excluded from training"


def make_datasets(recipe: Recipe, name: str, size: Pair | None = None) -> Datasets:
    """Open the datasets of a stage: the number of images that it asks for, none of which other stages are evaluated on.

    Images are the same if their files are, however a path is spelled. Label maps of other stages inside an image
    folder are not images.

    Args:
        size: of builtin images; None: ``image_size`` of the stage.

    Raises:
        ValueError, OSError: data that the stage cannot use; no training image is left.
    """
    stage = recipe.stages[name]
    stage_type = stage_type_of(stage)
    datasets = open_datasets(recipe, stage, size)
    excluded, problems = _evaluation_files(recipe, name)
    if datasets.validation is not None and stage_type.is_supervised:
        excluded |= _files_of(datasets.validation)  # it may lie inside the training folder
    label_maps = {folder for other in recipe.stages.values() for folder in _label_map_folders(recipe, other)}
    training = _without(datasets.training, excluded, label_maps)
    if not len(training):
        raise ValueError(
            f"none of {len(datasets.training)} images is left to train on: all are evaluation data of stages of the "
            "recipe; add more images"
        )
    validation = datasets.validation and _without(datasets.validation, set(), label_maps)
    return datasets._replace(
        training=stage_type.select_training(training, recipe, stage),
        validation=validation or None,
        problems=[*datasets.problems, *problems],
    )


def open_datasets(recipe: Recipe, stage: Stage, size: Pair | None = None) -> Datasets:
    """Open all images of a stage, including evaluation data of other stages.

    Raises:
        ValueError, OSError: as :func:`make_datasets`.
    """
    path, stage_type = data_path(recipe, stage), stage_type_of(stage)
    is_builtin = path.startswith("builtin:")
    if not path or (is_builtin and not stage_type.has_builtin_data):
        raise ValueError(f"the recipe names no {stage_type.data_description}: set {stage_type.data_keys}")
    if is_builtin and path != BUILTIN:
        raise ValueError(f"data.path {path!r}: the only builtin data is {BUILTIN}")
    return stage_type.open_datasets(recipe, stage, path, size)


def check_stages(recipe: Recipe, names: Iterable[str]) -> None:
    """Check the inputs of stages before the first of them is trained.

    Raises:
        ValueError: data that a stage cannot use, initial weights that do not exist, or a missing library.
    """
    for name in names:
        stage, start = recipe.stages[name], recipe.start_of(name)
        try:
            make_datasets(recipe, name, stage.image_size or (64, 64))
            for path in _test_paths(stage):
                validation_files(path)
            if start and start != "scratch" and start not in recipe.stages and not Path(start).expanduser().exists():
                raise ValueError(f"init_from {start!r} is no stage, and no file or folder of that name exists")
            stage_type_of(stage).check_requirements(stage)
        except (ValueError, OSError) as error:
            raise ValueError(f"stages.{name}: {reason_of(error)}") from None


def data_path(recipe: Recipe, stage: Stage) -> str:
    """Return the path of the data of a stage."""
    return stage.labels_path or recipe.data.path


def decoder_of(data: Data, channels: int, video: Video | None) -> Decoder:
    """Return the decoder of images, or of videos."""
    return Decoder(channels, data.value_range) if video is None else VideoDecoder(channels)


def builtin_datasets(recipe: Recipe, stage: Stage, size: Pair | None, validation_images: int) -> Datasets:
    """Return builtin images, or builtin videos if the stage has a video block.

    Args:
        size: None: ``image_size`` of the stage.
    """
    size = size or stage.image_size
    assert size is not None
    kind, channels = Shapes if video_of(stage) is None else MovingShapes, recipe.encoder.in_chans
    training = kind(recipe.data.num_images, size, channels)
    validation = kind(validation_images, size, channels, validation=True) if validation_images else None
    return Datasets(training, validation, list(training.classes))


def _evaluation_files(recipe: Recipe, name: str) -> tuple[set[str], list[tuple[str, str]]]:
    """Collect the evaluation files of all stages but the validation split of this stage.

    Returns:
        The files, and stages whose evaluation data could not be opened, with the reason.
    """
    files: set[str] = set()
    problems = []
    seen = {_split_of(recipe.stages[name])}
    for other, stage in recipe.stages.items():
        for path in _test_paths(stage):
            try:
                files |= _files_of(validation_files(path))
            except (ValueError, OSError) as error:
                problems.append((f"stages.{other}.labels.tests", f"{error}; {UNKNOWN}"))
        path, stage_type = data_path(recipe, stage), stage_type_of(stage)
        if not stage_type.is_supervised or path == BUILTIN or _split_of(stage) in seen:
            continue
        seen.add(_split_of(stage))
        try:
            if not path or path.startswith("builtin:"):
                open_datasets(recipe, stage)  # raises an error that names the missing data
            validation = stage_type.open_validation(recipe, stage, path)
            assert validation is not None
            files |= _files_of(validation)
        except (ValueError, OSError) as error:
            problems.append((f"stages.{other}", f"{error}; {UNKNOWN}"))
    return files, problems


def _test_paths(stage: Stage) -> list[str]:
    """Return the paths of further evaluation data that are files."""
    return [path for path in stage_type_of(stage).test_paths(stage) if path != BUILTIN]


def _split_of(stage: Stage) -> tuple[type[Stage], str]:
    """Return a key that is equal for stages with the same validation images."""
    labels = getattr(stage, "labels", None)
    if labels is None:
        return type(stage), ""
    return type(stage), labels.model_dump_json(exclude={"tests", "labels_per_class", "images"})


def _label_map_folders(recipe: Recipe, stage: Stage) -> list[str]:
    folders = stage_type_of(stage).label_map_folders(stage, data_path(recipe, stage))
    return [_folder(folder) + os.sep for folder in folders]


def _without(source: Source, files: set[str], folders: set[str]) -> Source:
    """Leave out images that are one of these files or lie in one of these folders."""
    if not files and not folders:
        return source
    names, below = {os.path.basename(file) for file in files}, tuple(folders)
    kept = []
    for index in range(len(source)):
        name = source.name(index)
        if os.path.basename(name) in names or below:  # comparing base names first is faster
            file = _file(name)
            if file in files or file.startswith(below):
                continue
        kept.append(index)
    return source if len(kept) == len(source) else Subset(source, kept)


def _files_of(source: Source | Files) -> set[str]:
    return {_file(source.name(index)) for index in range(len(source))}


def _file(name: str) -> str:
    """Return one spelling for each file; symbolic links are resolved for folders only, which needs fewer calls."""
    folder, file = os.path.split(name)
    return os.path.join(_folder(folder), file)


@lru_cache(maxsize=100_000)
def _folder(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))
