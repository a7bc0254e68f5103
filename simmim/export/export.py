"""An export: an encoder with its head and their description, opened once and passed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from simmim.data import Decoder, VideoDecoder
from simmim.export.classifier import CLASSIFIER, ClassifierHead, read_foreign_classifier
from simmim.export.heads import DECODER, HEAD, load_tensors
from swin import SwinConfig, SwinEncoder, VideoConfig, import_encoder, load_description
from swin.weights.serialization import DESCRIPTION, config_from, encoder_from

SIZES = ("image_size", "window_size")
"""Sizes of an encoder that may differ from those it was trained at."""
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HeadKind = Literal["classifier", "segmenter", "detector", "reconstruction", "none"]


class _Head(NamedTuple):
    """Storage of one kind of head."""

    key: str
    """Key of ``encoder.json`` with the settings of the head."""
    file: str
    stage: str
    """The stages that write such a head, for error messages."""


HEADS: dict[str, _Head] = {
    "segmenter": _Head("segmentation", HEAD, "a stage of kind segment"),
    "detector": _Head("detection", HEAD, "a stage of kind detect"),
    "reconstruction": _Head("reconstruction", DECODER, "a pretraining stage"),
    "classifier": _Head("classes", CLASSIFIER, "a fine-tuning stage"),
}


@dataclass(frozen=True)
class Export:
    """The export folder of a stage, or a checkpoint of another project; see :func:`open_export`."""

    path: Path
    description: Mapping[str, Any]
    """Content of ``encoder.json``; empty for a checkpoint of another project."""

    @property
    def is_native(self) -> bool:
        """Return whether this is an export folder of this toolkit."""
        return bool(self.description)

    @cached_property
    def config(self) -> SwinConfig:
        """Configuration of the encoder, as it was trained."""
        return config_from(dict(self.description), self.path) if self.is_native else self.encoder().config

    @property
    def pixels(self) -> dict[str, Any]:
        """Channel statistics ``mean``, ``std`` and perhaps ``value_range``; those of ImageNet if unknown."""
        return dict(self.description.get("pixels", IMAGENET))

    @property
    def mean(self) -> list[float]:
        """Mean of each channel, for pixels in [0, 1]."""
        return list(self.pixels["mean"])

    @property
    def std(self) -> list[float]:
        """Standard deviation of each channel, for pixels in [0, 1]."""
        return list(self.pixels["std"])

    @property
    def value_range(self) -> tuple[float, float] | None:
        """Black and white of image files with more than 8 bits; None: the range of the data type."""
        black_white = self.pixels.get("value_range")
        return (black_white[0], black_white[1]) if black_white else None

    @property
    def video(self) -> dict[str, int]:
        """Inference settings for videos, ``stride``, ``views`` and ``crops``; empty for images."""
        return dict(self.description.get("video", {}))

    @property
    def training_settings(self) -> dict[str, Any] | None:
        """The resume fingerprint of the stage that wrote the export; None if it is not recorded."""
        return self.description.get("trained", {}).get("settings")

    @property
    def interpolation(self) -> str:
        """Interpolation of the evaluation crops during training; bicubic if it is not recorded."""
        settings = self.training_settings or {}
        return settings.get("stage", {}).get("crop", {}).get("interpolation", "bicubic")

    @property
    def head_kind(self) -> HeadKind:
        """Kind of the head beside the encoder; checkpoints of other projects count as classifiers."""
        if "segmentation" in self.description:
            return "segmenter"
        if "detection" in self.description:
            return "detector"
        if not self.is_native or (self.path / CLASSIFIER).exists():
            return "classifier"
        return "reconstruction" if "reconstruction" in self.description else "none"

    def head_settings(self, kind: HeadKind) -> dict[str, Any]:
        """Return the settings of a segmenter, detector or reconstruction head.

        Raises:
            ValueError: the export has no head of this kind.
        """
        head = HEADS[kind]
        settings = self.description.get(head.key)
        if settings is None or not (self.path / head.file).exists():
            raise ValueError(f"{self.path} holds no {kind}: give the export of {head.stage}")
        return dict(settings)

    def encoder(self, **settings: Any) -> SwinEncoder:
        """Load the encoder, on the CPU.

        Args:
            settings: of :func:`swin.load_encoder`: ``image_size``, ``window_size``, ...

        Raises:
            ValueError: missing or damaged weights, or settings that do not fit them.
        """
        if self.is_native:
            return encoder_from(dict(self.description), self.path, **settings)
        return import_encoder(self.path, **settings)[0]

    def load_head(self, task: nn.Module) -> None:
        """Load all weights of ``task`` but its encoder's from the head of the export.

        Raises:
            ValueError: an unreadable file, or weights of another model.
        """
        file = self.path / HEADS[self.head_kind].file
        try:
            missing, unknown = task.load_state_dict(self._head_tensors, strict=False)
        except RuntimeError as error:
            raise ValueError(f"cannot read {file}: {error}") from None
        missing = [name for name in missing if not name.startswith("encoder.")]
        for problem, names in (("lacks", missing), ("has an unknown", unknown)):
            if names:
                raise ValueError(f"{file} {problem} {names[0]}: its {DESCRIPTION} describes another model")

    def classifier_head(self) -> ClassifierHead:
        """Load the weights and class names of the classifier, once.

        Raises:
            ValueError: there is no classifier, or it cannot be read.
        """
        return self._classifier_head

    @cached_property
    def _classifier_head(self) -> ClassifierHead:
        if not self.is_native:
            return read_foreign_classifier(self.path)
        if not (self.path / CLASSIFIER).exists():
            raise ValueError(f"{self.path} holds no classifier: give the export of a fine-tuned encoder")
        tensors = load_tensors(self.path / CLASSIFIER)
        return ClassifierHead(tensors["weight"], tensors["bias"], self.description.get("classes"))

    @cached_property
    def _head_tensors(self) -> dict[str, Tensor]:
        return load_tensors(self.path / HEADS[self.head_kind].file)

    def make_decoder(self, config: SwinConfig) -> Decoder:
        """Make the decoder of the images or videos of an encoder with this configuration."""
        if isinstance(config, VideoConfig):
            return VideoDecoder(config.in_chans)
        return Decoder(config.in_chans, self.value_range)


def open_export(source: Export | Path | str) -> Export:
    """Open an export folder, or a checkpoint of another project; an open export is returned as it is.

    ``encoder.json`` is read here, and weights when they are asked for.

    Raises:
        ValueError: ``encoder.json`` is unreadable, or from a newer format.
    """
    if isinstance(source, Export):
        return source
    path = Path(source)
    return Export(path, load_description(path) if (path / DESCRIPTION).exists() else {})
