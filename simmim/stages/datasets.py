"""Which images, or clips, a stage is trained on and judged by; none is trained on that another stage is judged by."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, cast

import torch

from simmim.config import (
    Data,
    DetectStage,
    FinetuneStage,
    PretrainStage,
    Recipe,
    SegmentLabels,
    SegmentStage,
    Stage,
    Video,
    video_of,
)
from simmim.data import (
    Decoder,
    LabelledSource,
    MovingShapes,
    Shapes,
    Source,
    VideoDecoder,
    labelled_sources,
    limit_labels,
    training_images,
)
from simmim.data.boxes import coco_sources, has_split, open_coco
from simmim.data.loader import reason_of
from simmim.data.segments import SegmentedSources, read_class_names, segmented_sources
from simmim.data.sources import Files, Subset, imagenet_v2_parts, validation_files
from simmim.metrics.average_precision import AveragePrecision
from simmim.metrics.mean_iou import MeanIoU
from simmim.rng import permutation
from swin.config import Pair

BUILTIN = "builtin:shapes"
UNKNOWN = "what it will be judged by may be trained on here"


class Sources(NamedTuple):
    """The images of a stage."""

    training: Source
    validation: Source | None
    """None where pretraining holds out nothing."""
    classes: list[str]
    """Empty of pretraining."""
    problems: list[tuple[str, str]]
    """What is left out of them from the beginning, with the reason."""


def make_sources(recipe: Recipe, name: str, size: Pair | None = None) -> Sources:
    """The images of a stage: as many as its settings ask for, and none to train on that a stage is judged by.

    Images are the same if their files are, however a path is spelled. Where pretraining is on a folder that holds the
    annotations of another stage as well, these are no images.

    Args:
        size: of builtin images; None: ``image_size`` of the stage.

    Raises:
        ValueError, OSError: data that the stage cannot use; nothing is left to train on.
    """
    stage = recipe.stages[name]
    training, validation, classes, problems = open_sources(recipe, stage, size)
    judged, unknown = _of_others(recipe, name)
    if validation is not None and not isinstance(stage, PretrainStage):
        judged |= _files_of(validation)  # which may lie below the place of the others
    label_maps = {folder for its in recipe.stages.values() for folder in _label_maps(recipe, its)}
    kept = _without(training, judged, label_maps)
    if not len(kept):
        raise ValueError(
            f"none of {len(training)} images is left to train on, stages of the recipe are judged by all of them: "
            "add some"
        )
    unseen = validation and _without(validation, set(), label_maps)
    return Sources(_share(kept, recipe, stage), unseen or None, classes, problems + unknown)


def _of_others(recipe: Recipe, name: str) -> tuple[set[str], list[tuple[str, str]]]:
    """Files that the stages of a recipe are judged by but for those held out by one, and what could not be opened."""
    judged: set[str] = set()
    unknown = []
    seen = {_split(recipe.stages[name])}  # the same labels hold out the same
    for other, stage in recipe.stages.items():
        for place in _test_places(stage):
            try:
                judged |= _files_of(validation_files(place))
            except (ValueError, OSError) as error:
                unknown.append((f"stages.{other}.labels.tests", f"{error}; {UNKNOWN}"))
        if isinstance(stage, PretrainStage) or _path(recipe, stage) == BUILTIN or _split(stage) in seen:
            continue
        seen.add(_split(stage))
        try:
            judged |= _files_of(_validation(recipe, stage))
        except (ValueError, OSError) as error:
            unknown.append((f"stages.{other}", f"{error}; {UNKNOWN}"))
    return judged, unknown


def check_stages(recipe: Recipe, names: Iterable[str]) -> None:
    """What is missing had better be missed before the first of these stages is trained.

    Raises:
        ValueError: images that a stage cannot use, something to start from that is not there, or nothing installed
            that could judge.
    """
    for name in names:
        stage, start = recipe.stages[name], recipe.start_of(name)
        try:
            make_sources(recipe, name, stage.image_size or (64, 64))
            for place in _test_places(stage):
                validation_files(place)
            if start and start != "scratch" and start not in recipe.stages and not Path(start).expanduser().exists():
                raise ValueError(f"init_from {start!r} is no stage, no export and no file")
            if isinstance(stage, SegmentStage):
                MeanIoU(2)
            if isinstance(stage, DetectStage):
                AveragePrecision(masks=stage.masks)
        except (ValueError, OSError) as error:
            raise ValueError(f"stages.{name}: {reason_of(error)}") from None


def open_sources(recipe: Recipe, stage: Stage, size: Pair | None = None) -> Sources:
    """All images of a stage, whatever the others are judged by.

    Raises:
        ValueError, OSError: as of :func:`make_sources`.
    """
    path, data, channels = _path(recipe, stage), recipe.data, recipe.encoder.in_chans
    if path.startswith("builtin:") and isinstance(stage, PretrainStage | FinetuneStage):
        return _builtin(recipe, stage, path, size or stage.image_size)
    if not path or path.startswith("builtin:"):
        what, where = _WANTED[type(stage)]
        raise ValueError(f"the recipe names no {what}: set {where}")
    decoder = decoder_of(data, channels, video_of(stage))
    if isinstance(stage, PretrainStage):
        training, validation = training_images(path, decoder, data.validation_images)
        return Sources(training, validation, [], [])
    if isinstance(stage, FinetuneStage):
        labels = stage.labels
        labelled, validation = labelled_sources(path, decoder, labels.val_images, labels.val_path or None)
        return Sources(labelled, validation, list(labelled.classes), [])
    if isinstance(stage, SegmentStage):
        return Sources(*_segmented(path, decoder, stage.labels))
    assert isinstance(stage, DetectStage)
    scenes, unseen, problems = coco_sources(path, decoder, stage.labels.val_images, masks=stage.masks)
    return Sources(scenes, unseen, list(cast(LabelledSource, scenes).classes), problems)


def tests_of(stage: FinetuneStage) -> list[str]:
    """More places that a classifier is judged by."""
    return [place for path in stage.labels.tests for place in imagenet_v2_parts(path)]


def decoder_of(data: Data, channels: int, video: Video | None) -> Decoder:
    """Of images, or of videos."""
    return Decoder(channels, data.value_range) if video is None else VideoDecoder(channels)


def images_of_fraction(share: float, images: int) -> int:
    """How many of the training images ``data.fraction`` leaves."""
    return max(1, round(share * images))


_WANTED: dict[type[Stage], tuple[str, str]] = {
    PretrainStage: ("images", "data.path=FOLDER_OF_IMAGES (or builtin:shapes)"),
    FinetuneStage: ("labelled images", "data.path or the labels.path of the stage"),
    SegmentStage: ("images with label maps", "the labels.path of the stage, or data.path"),
    DetectStage: ("images with objects", "data.path or the labels.path of the stage"),
}
"""What a stage needs, and which settings name it."""


def _path(recipe: Recipe, stage: Stage) -> str:
    own = stage.labels.path if isinstance(stage, FinetuneStage | SegmentStage | DetectStage) else ""
    return own or recipe.data.path


def _validation(recipe: Recipe, stage: Stage) -> Source:
    """What a stage with labels is judged by."""
    path = _path(recipe, stage)
    if isinstance(stage, DetectStage) and has_split(path, "val"):  # the annotations of train are many
        return open_coco(path, "val", training=False, masks=False)
    if isinstance(stage, SegmentStage):  # which classes there are is not asked: all label maps might be read for it
        stage = stage.model_copy(update={"labels": stage.labels.model_copy(update={"classes": 2})})
    validation = open_sources(recipe, stage).validation
    assert validation is not None
    return validation


def _test_places(stage: Stage) -> list[str]:
    """Those of :func:`tests_of` with files."""
    return [place for place in tests_of(stage) if place != BUILTIN] if isinstance(stage, FinetuneStage) else []


def _split(stage: Stage) -> tuple[type[Stage], str]:
    """Stages for which it is the same hold out the same images."""
    labels = getattr(stage, "labels", None)
    return type(stage), labels.model_dump_json(
        exclude={"tests", "labels_per_class", "images"}
    ) if labels is not None else ""


def _label_maps(recipe: Recipe, stage: Stage) -> list[str]:
    """Folders of files that look like images."""
    if not isinstance(stage, SegmentStage):
        return []
    folders = (stage.labels.annotations or f"{_path(recipe, stage)}/annotations", stage.labels.val_annotations)
    return [_folder(folder) + os.sep for folder in folders if folder]


def _builtin(recipe: Recipe, stage: PretrainStage | FinetuneStage, path: str, size: Pair | None) -> Sources:
    """Shapes, which move where videos are wanted; held-out ones are others."""
    if path != BUILTIN:
        raise ValueError(f"data.path {path!r}: the only builtin data is {BUILTIN}")
    assert size is not None
    kind, channels = Shapes if stage.video is None else MovingShapes, recipe.encoder.in_chans
    validation = recipe.data.validation_images if isinstance(stage, PretrainStage) else stage.labels.val_images
    training = kind(recipe.data.num_images, size, channels)
    classes = [] if isinstance(stage, PretrainStage) else list(training.classes)
    return Sources(training, kind(validation, size, channels, validation=True) if validation else None, classes, [])


def _segmented(path: str, decoder: Decoder, labels: SegmentLabels) -> SegmentedSources:
    return segmented_sources(
        path,
        decoder,
        labels.val_images,
        annotations=labels.annotations or None,
        val_path=labels.val_path or None,
        val_annotations=labels.val_annotations or None,
        classes=read_class_names(Path(labels.classes)) if isinstance(labels.classes, str) else labels.classes,
        ignore_zero=labels.ignore_zero,
    )


def _share(source: Source, recipe: Recipe, stage: Stage) -> Source:
    """As many images as the settings of a stage ask for."""
    count = len(source)
    if isinstance(stage, PretrainStage) and recipe.data.fraction < 1:
        # One order for all seeds and shares; of a stream the first, so that they lie together.
        in_blocks = source.blocks is not None
        order = torch.arange(count) if in_blocks else permutation(0, 0, count)
        return Subset(source, order[: images_of_fraction(recipe.data.fraction, count)].sort().values)
    if isinstance(stage, FinetuneStage) and stage.labels.labels_per_class is not None:
        return limit_labels(cast(LabelledSource, source), stage.labels.labels_per_class, recipe.seed)
    if isinstance(stage, SegmentStage) and stage.labels.images is not None:
        if stage.labels.images > count:
            raise ValueError(
                f"{_path(recipe, stage)} has {count} training images, but labels.images is {stage.labels.images}: "
                "lower it"
            )
        return Subset(source, permutation(recipe.seed, 0, count)[: stage.labels.images])
    return source


def _without(source: Source, files: set[str], folders: set[str]) -> Source:
    """The images that are none of these files and in none of these folders."""
    if not files and not folders:
        return source
    names, below = {os.path.basename(file) for file in files}, tuple(folders)
    kept = []
    for number in range(len(source)):
        name = source.name(number)
        if os.path.basename(name) in names or below:  # most images are told apart by that alone
            file = _file(name)
            if file in files or file.startswith(below):
                continue
        kept.append(number)
    return source if len(kept) == len(source) else Subset(source, kept)


def _files_of(source: Source | Files) -> set[str]:
    return {_file(source.name(number)) for number in range(len(source))}


def _file(name: str) -> str:
    """One spelling for each file, without a look at every one of them."""
    folder, file = os.path.split(name)
    return os.path.join(_folder(folder), file)


@lru_cache(maxsize=100_000)
def _folder(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))
