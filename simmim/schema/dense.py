"""Stages whose labels are for places in an image: semantic segmentation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from simmim.schema.parts import (
    Count,
    NotNegative,
    Positive,
    Schedule,
    Settings,
    Share,
    Size,
    SizeOrNone,
    Stage,
    Supervised,
)


class SegmentLabels(Settings):
    """Which images, and their label maps: one number per pixel, 255 where it says nothing."""

    path: str = Field(
        "",
        description="empty: data.path; holds images and annotations (ADE20K), or the images where annotations is set",
    )
    annotations: str = Field("", description="label maps, at the same paths as their images but for the ending")
    val_path: str = Field("", description="images to be judged by; empty: validation folders, or val_images of path")
    val_annotations: str = Field("", description="their label maps")
    val_images: Count = Field(5000, description="held out where there is no folder for validation, at most a tenth")
    images: Count | None = Field(None, description="so many of the training images, drawn by the seed; null: all")
    classes: Count | str | None = Field(
        None, description="how many, or a file of names; null: a file of names in path, or as many as labels ask for"
    )
    ignore_zero: bool = Field(False, description="label 0 says nothing and the first class is 1 (ADE20K)")

    def of_images(self, data_path: str) -> str:
        """Where the images lie."""
        path = self.path or data_path
        return path if self.annotations else f"{path.rstrip('/')}/images"


class SegmentAugment(Settings):
    """What is done to training images and their label maps (Swin V2, appendix A1.2)."""

    scale: tuple[Positive, Positive] = Field((0.5, 2.0), description="least and largest zoom")
    short_px: Count | None = Field(None, description="short side of an image at zoom 1; null: of the crop")
    max_share: Share = Field(0.75, description="of a class in a crop, if ten attempts find such a crop")
    flip: Share = Field(0.5, description="probability of a horizontal flip")
    distort: bool = Field(True, description="change brightness, contrast, saturation and hue")

    @model_validator(mode="after")
    def _ordered(self) -> SegmentAugment:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale must go from low to high, got {self.scale[0]}, {self.scale[1]}")
        return self


class SegmentHead(Settings):
    """UPerNet, and the auxiliary head (arXiv 1807.10221)."""

    channels: Count = Field(512, description="inside UPerNet")
    auxiliary_channels: Count = Field(256, description="inside the auxiliary head, which is only for training")
    auxiliary_weight: NotNegative = Field(0.4, description="of its loss")
    dropout: float = Field(0.1, ge=0, lt=1, description="of channels before the last layer of either")


class SegmentTest(Settings):
    """How whole images are looked at to be judged; may change while a stage goes on."""

    short_px: Count | None = Field(None, description="short side of an image; null: of the crop")
    window: bool = Field(False, description="in windows as large as the crop; no: the whole image at once")
    stride: SizeOrNone = Field(None, description="of windows, px; null: two thirds of them")
    scales: list[Positive] = Field([1.0], min_length=1, description="of the image; predictions are averaged")
    flip: bool = Field(False, description="mirrored, too")


class SegmentSchedule(Schedule):
    """Of ADE20K: 160,000 steps of 16 images, 1,500 of warm-up (Swin V2, appendix A1.2)."""

    name: Literal["cosine", "linear", "multistep"] = Field("linear", description="after the warm-up")
    epochs: Positive = Field(126.7, description="passes over the images; fractions too")
    base_lr: Positive = Field(1.28e-3, description="after the warm-up, for 512 images per step")
    warmup_epochs: NotNegative = Field(1.2, description="linear rise from warmup_lr")
    warmup_lr: NotNegative = Field(0, description="at the first step, for 512 images per step")
    min_lr: NotNegative = Field(0, description="where cosine and linear end")


class Segment(Supervised):
    """Semantic segmentation with UPerNet; what is left open is as for ADE20K (Swin V2, appendix A1.2)."""

    passing = Stage.passing | {
        "test": True,
        "labels": {key: True for key in ("path", "annotations", "val_path", "val_annotations", "classes")},
    }

    kind: Literal["segment"] = Field("segment", description="by default what the name of the stage begins with")
    image_size: Size = Field((512, 512), description="the crop, px; one number or [height, width]")
    drop_path: float = Field(0.3, ge=0, lt=1, description="stochastic depth of the last block, linear from 0")
    layer_decay: float = Field(0.95, gt=0, le=1, description="learning rate of a layer over that of the next")
    batch_size: Count = Field(16, description="images per optimizer step, over all processes")
    micro_batch_size: Count = Field(2, description="images per forward pass of one process")
    labels: SegmentLabels = Field(SegmentLabels(), description="which images, and their label maps")
    augment: SegmentAugment = Field(SegmentAugment(), description="what is done to training images")
    head: SegmentHead = Field(SegmentHead(), description="what is around the encoder")
    test: SegmentTest = Field(SegmentTest(), description="how whole images are looked at to be judged")
    schedule: SegmentSchedule = Field(SegmentSchedule(), description="for how long, and how fast")

    @model_validator(mode="after")
    def _windows_cover(self) -> Segment:
        stride = self.test.stride
        if stride and not self.test.window:
            raise ValueError(f"test.stride {list(stride)} is for windows: set test.window to true, or leave it out")
        if stride and (stride[0] > self.image_size[0] or stride[1] > self.image_size[1]):
            raise ValueError(f"test.stride {list(stride)} must not be above image_size {list(self.image_size)}")
        return self
