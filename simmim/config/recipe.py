"""The recipe: data, encoder and an ordered set of stages, and the checks across them."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, Union, get_args

from pydantic import BeforeValidator, Field, PlainValidator, SerializeAsAny, TypeAdapter, model_validator

from simmim.config.dense_stages import DetectStage, SegmentStage
from simmim.config.image_stages import FinetuneStage, PretrainStage, video_of
from simmim.config.sections import Data, Encoder, Settings, Stage
from swin import SwinConfig, make_config
from swin.inflation import inflated_config

KINDS: dict[str, type[Stage]] = {}
"""The settings of every kind of stage, by the ``kind`` of a recipe."""


def add_kinds(settings: type[Stage]) -> None:
    """Let recipes have stages with these settings, of all kinds that their field ``kind`` names.

    Raises:
        ValueError: another class has one of these kinds.
    """
    for kind in get_args(settings.model_fields["kind"].annotation):
        if KINDS.setdefault(kind, settings) is not settings:
            raise ValueError(f"stages of kind {kind!r} have the settings {KINDS[kind].__name__} already")


def remove_kinds(settings: type[Stage]) -> None:
    """Undo :func:`add_kinds`."""
    for kind in get_args(settings.model_fields["kind"].annotation):
        KINDS.pop(kind, None)


for _settings in (PretrainStage, FinetuneStage, SegmentStage, DetectStage):
    add_kinds(_settings)


def _name_kinds(stages: Any) -> Any:
    """Add the stage type to stages without ``kind``, from the beginning of their names."""
    if not isinstance(stages, dict):
        return stages
    named = {}
    for name, stage in stages.items():
        kind = str(name).split("_")[0]
        if isinstance(stage, dict) and "kind" not in stage:
            if kind not in KINDS:
                raise ValueError(
                    f"stage {name!r}: cannot infer its kind; start the name with one of {', '.join(KINDS)}, or set kind"
                )
            stage = {"kind": kind, **stage}
        named[name] = stage
    return named


@lru_cache
def _union_of(settings: tuple[type[Stage], ...]) -> TypeAdapter:
    """Make the validator of a stage that has one of these settings, chosen by its kind."""
    union: Any = Annotated[Union[settings], Field(discriminator="kind")]  # noqa: UP007 - the members are computed
    return TypeAdapter(union)


def _validate_stage(value: Any) -> Any:
    return _union_of(tuple(dict.fromkeys(KINDS.values()))).validate_python(value)


AnyStage = Annotated[SerializeAsAny[Stage], PlainValidator(_validate_stage)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")]
Stages = Annotated[dict[Name, AnyStage], BeforeValidator(_name_kinds), Field(min_length=1)]


class Recipe(Settings):
    """Top level of the file."""

    name: str = Field(
        "",
        pattern=r"^[\w+-][\w .+-]*$|^$",
        description="name of the run and of its folder; default: the name of the file",
    )
    seed: int = Field(0, ge=0, description="seed of all random numbers")
    data: Data = Field(Data(), description="image data")
    encoder: Encoder = Field(Encoder(), description="encoder architecture")
    stages: Stages = Field({"pretrain": PretrainStage()}, description="training stages, in this order")

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        channels = self.encoder.in_chans
        for name in ("mean", "std"):
            count = len(getattr(self.data, name))
            if count != channels:
                raise ValueError(f"data.{name} has {count} values, but encoder.in_chans is {channels}")
        if "scratch" in self.stages:
            raise ValueError("a stage cannot be named scratch, which means random weights: choose another name")
        for name, stage in self.stages.items():
            chunks, config = stage.memory.attention_chunks, encoder_config(self.encoder, stage)
            if isinstance(chunks, list) and len(chunks) != len(config.depths):
                raise ValueError(
                    f"stages.{name}.memory.attention_chunks has {len(chunks)} values, but the encoder has "
                    f"{len(config.depths)} stages"
                )
            stage.check_encoder(f"stages.{name}", config)
            if not self.start_of(name):
                raise ValueError(
                    f"stages.{name} has no initial weights: put a stage before it, or set init_from to "
                    "an export folder, a weights file, or scratch"
                )
            if stage.init_from == "scratch" and stage.image_size is None:
                raise ValueError(f"stages.{name} starts from scratch: set its image_size and window_size")
            if stage.init_from in list(self.stages)[list(self.stages).index(name) :]:
                raise ValueError(
                    f"stages.{name}.init_from {stage.init_from!r} is not an earlier stage: move it before {name}"
                )
            self._agree_on_clips(name)
        return self

    def _agree_on_clips(self, name: str) -> None:
        video, start = video_of(self.stages[name]), self.start_of(name)
        before = video_of(self.stages[start]) if start in self.stages else None
        if before and video is None:
            raise ValueError(f"stages.{name} starts from {start}, an encoder of clips: add a video section to it")
        if before and video and before.temporal_patch != video.temporal_patch:
            raise ValueError(
                f"stages.{name} starts from {start}, whose tokens have {before.temporal_patch} frames: "
                f"set video.temporal_patch to {before.temporal_patch}, not {video.temporal_patch}"
            )
        if video and self.data.value_range:
            raise ValueError(f"data.value_range is for image files, but stages.{name} reads videos: remove it")
        if video and self.stages[name].speed.fused_attention is True:
            raise ValueError(f"stages.{name}.speed.fused_attention: the kernel does not support clips, use auto")

    def start_of(self, name: str) -> str:
        """Return the initial weights of a stage: its ``init_from``, else the previous stage, else an empty string."""
        names = list(self.stages)
        before = ["", *names][names.index(name)]
        return self.stages[name].init_from or before


def encoder_config(encoder: Encoder, stage: Stage) -> SwinConfig:
    """Return the configuration of the encoder that a stage trains from scratch."""
    given = {key: value for key, value in encoder if value is not None and key != "name"}
    for name in ("image_size", "window_size"):
        if getattr(stage, name) is not None:
            given[name] = getattr(stage, name)
    config, video = make_config(encoder.name, **given, drop_path=stage.drop_path), video_of(stage)
    return config if video is None else inflated_config(config, **video.time)
