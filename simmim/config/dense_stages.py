"""Stages whose labels are for places in an image: semantic segmentation, and detection."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from simmim.config.sections import (
    Count,
    Fraction,
    NotNegative,
    Positive,
    Schedule,
    Settings,
    Size,
    SizeOrNone,
    Stage,
    Supervised,
)
from swin import SwinConfig


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
    classes: Count | Annotated[str, Field(min_length=1)] | None = Field(
        None, description="how many, or a file of names; null: a file of names in path, or as many as labels ask for"
    )
    ignore_zero: bool = Field(False, description="label 0 says nothing and the first class is 1 (ADE20K)")


class SegmentAugment(Settings):
    """What is done to training images and their label maps (Swin V2, appendix A1.2)."""

    scale: tuple[Positive, Positive] = Field((0.5, 2.0), description="least and largest zoom")
    short_px: Count | None = Field(None, description="short side of an image at zoom 1; null: of the crop")
    max_fraction: Fraction = Field(0.75, description="of a class in a crop, if ten attempts find such a crop")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
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


class SegmentInference(Settings):
    """How whole images are looked at."""

    short_px: Count | None = Field(None, description="short side of an image; null: of the crop")
    stride: SizeOrNone = Field(None, description="of windows, px; null: two thirds of them")
    scales: list[Positive] = Field([1.0], min_length=1, description="of the image; predictions are averaged")
    flip: bool = Field(False, description="mirrored, too")


class SegmentTest(SegmentInference):
    """How whole images are looked at to be judged; may change while a stage goes on."""

    window: bool = Field(False, description="in windows as large as the crop; no: the whole image at once")


class SegmentSchedule(Schedule):
    """Of ADE20K: 160,000 steps of 16 images, 1,500 of warm-up (Swin V2, appendix A1.2)."""

    name: Literal["cosine", "linear", "multistep"] = Field("linear", description="after the warm-up")
    epochs: Positive = Field(126.7, description="passes over the images; fractions too")
    base_lr: Positive = Field(1.28e-3, description="after the warm-up, for 512 images per step")
    warmup_epochs: NotNegative = Field(1.2, description="linear rise from warmup_lr")
    warmup_lr: NotNegative = Field(0, description="at the first step, for 512 images per step")
    min_lr: NotNegative = Field(0, description="where cosine and linear end")


class SegmentStage(Supervised):
    """Semantic segmentation with UPerNet; what is left open is as for ADE20K (Swin V2, appendix A1.2)."""

    mutable_on_resume = Stage.mutable_on_resume | {
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
    def _windows_cover(self) -> SegmentStage:
        stride = self.test.stride
        if stride and not self.test.window:
            raise ValueError(f"test.stride {list(stride)} is for windows: set test.window to true, or leave it out")
        if stride and (stride[0] > self.image_size[0] or stride[1] > self.image_size[1]):
            raise ValueError(f"test.stride {list(stride)} must not be above image_size {list(self.image_size)}")
        return self

    @property
    def labels_path(self) -> str:
        return self.labels.path

    def check_encoder(self, where: str, config: SwinConfig) -> None:
        if self.augment.distort and config.in_chans != 3:
            raise ValueError(f"{where}.augment.distort is for 3 channels: set it to false")
        if len(config.depths) < 2:
            raise ValueError(f"{where} needs a pyramid, but the encoder has one stage: give it two or more")


class DetectLabels(Settings):
    """Which images with objects: a folder with annotations/instances_train2017.json and train2017, as of COCO, or
    annotations/train.json and train; and so for val."""

    path: str = Field("", description="empty: data.path")
    val_images: Count = Field(5000, description="held out of train where there is no val, at most a tenth")


class DetectJitter(Settings):
    """What is done to training images: their size, and a horizontal flip."""

    kind: Literal["short_side", "large_scale"] = Field(
        "short_side",
        description="the short side drawn from short_px (Swin); or image_size times a drawn scale, cropped to it "
        "(arXiv 2012.07177)",
    )
    short_px: Annotated[list[Count], Field(min_length=1)] = Field(
        list(range(480, 801, 32)), description="short_side: one of these"
    )
    long_px: Count = Field(1333, description="short_side: the other side is at most so long")
    scale: tuple[Positive, Positive] = Field((0.1, 2.0), description="large_scale: least and largest")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    interpolation: Literal["bilinear", "bicubic"] = Field("bilinear", description="of resizing, always antialiased")

    @model_validator(mode="after")
    def _ordered(self) -> DetectJitter:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale must go from low to high, got {self.scale[0]}, {self.scale[1]}")
        if self.long_px < max(self.short_px):
            raise ValueError(f"long_px {self.long_px} is below the short side of {max(self.short_px)} px: raise it")
        return self


class DetectTest(Settings):
    """How images are looked at that are not trained on; may change while a stage goes on."""

    short_px: Count = Field(800, description="short side of the image")
    long_px: Count = Field(1333, description="the other side is at most so long")
    scales: Annotated[list[Positive], Field(min_length=1)] = Field(
        [1.0], description="looked at in so many times that size; what is found is merged"
    )
    flip: bool = Field(False, description="looked at mirrored too")
    soft_nms: Literal["linear", "gaussian"] | None = Field(
        None, description="overlapping detections lose score instead of being dropped (arXiv 1704.04503)"
    )

    @model_validator(mode="after")
    def _ordered(self) -> DetectTest:
        if self.long_px < self.short_px:
            raise ValueError(f"long_px {self.long_px} is below short_px {self.short_px}: raise it")
        return self


class DetectSchedule(Schedule):
    """36 epochs with two steps: "3x"."""

    name: Literal["cosine", "linear", "multistep"] = Field("multistep", description="after the warm-up")
    epochs: Positive = Field(36, description="passes over the images; fractions too")
    base_lr: Positive = Field(3.2e-3, description="after the warm-up, for 512 images per step")
    warmup_epochs: NotNegative = Field(0.07, description="linear rise from warmup_lr")
    warmup_lr: NotNegative = Field(3.2e-6, description="at the first step, for 512 images per step")
    milestones_epochs: list[Positive] = Field([27, 33], description="multistep: when the rate is multiplied by gamma")


class DetectStage(Supervised):
    """Detection and instance segmentation: Mask R-CNN (arXiv 1703.06870) or a cascade (arXiv 1712.00726)."""

    mutable_on_resume = Stage.mutable_on_resume | {"test": True, "labels": {"path": True}}

    kind: Literal["detect"] = Field("detect", description="by default what the name of the stage begins with")
    image_size: SizeOrNone = Field(
        None,
        description="px; what the planner counts with, and the size of large_scale; null: as the encoder was trained",
    )
    batch_size: Count = Field(16, description="images per optimizer step, over all processes")
    micro_batch_size: Count = Field(2, description="images per forward pass of one process")
    layer_decay: float = Field(1.0, gt=0, le=1, description="learning rate of a layer over that of the next")
    labels: DetectLabels = Field(DetectLabels(), description="which images, and their objects")
    masks: bool = Field(True, description="a mask for every box; no: boxes only (Faster R-CNN)")
    cascade: bool = Field(False, description="three box heads, each on the boxes of the one before")
    width: Count = Field(256, description="channels of the feature pyramid")
    hidden: Count = Field(1024, description="channels of the box heads")
    anchor_px: list[Count] | None = Field(
        None, description="side of the anchors on each map and one more; null: 8 times its stride"
    )
    regions_per_image: Count = Field(512, description="each box head is trained on so many at most")
    jitter: DetectJitter = Field(DetectJitter(), description="what is done to training images")
    test: DetectTest = Field(DetectTest(), description="how other images are looked at")
    schedule: DetectSchedule = Field(DetectSchedule(), description="for how long, and how fast")

    @property
    def labels_path(self) -> str:
        return self.labels.path

    def check_encoder(self, where: str, config: SwinConfig) -> None:
        depth = len(config.depths)
        if self.anchor_px is not None and len(self.anchor_px) != depth + 1:
            raise ValueError(
                f"{where}.anchor_px has {len(self.anchor_px)} sides, but an encoder of {depth} stages "
                f"gives {depth + 1} maps to find objects on"
            )
