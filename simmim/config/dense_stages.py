"""Settings of dense prediction stages: semantic segmentation and detection."""

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
    """Images and their label maps: one class index per pixel, 255 for ignored pixels."""

    path: str = Field(
        "",
        description="folder with images and annotations (ADE20K), or with images only; empty: data.path",
    )
    annotations: str = Field(
        "", description="label maps, with the same relative paths as their images except for the extension"
    )
    val_path: str = Field(
        "", description="validation images; empty: the validation folders of path, or val_images of path"
    )
    val_annotations: str = Field("", description="label maps of val_path")
    val_images: Count = Field(
        5000, description="validation images taken from path if there is no validation folder, at most a tenth"
    )
    images: Count | None = Field(None, description="number of training images, drawn at random by the seed; null: all")
    classes: Count | Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="number of classes, or a file of their names; null: a file of names in path, or the number of "
        "classes in the labels",
    )
    ignore_zero: bool = Field(False, description="ignore label 0; the first class is 1 (ADE20K)")


class SegmentAugment(Settings):
    """Augmentation of training images and their label maps (Swin V2, appendix A1.2)."""

    scale: tuple[Positive, Positive] = Field((0.5, 2.0), description="smallest and largest scale factor")
    short_px: Count | None = Field(
        None, description="short side of the image at scale 1, px; null: short side of the crop"
    )
    max_fraction: Fraction = Field(
        0.75, description="largest fraction of a crop that one class may fill; ten attempts are made"
    )
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    distort: bool = Field(True, description="photometric distortion: brightness, contrast, saturation and hue")

    @model_validator(mode="after")
    def _ordered(self) -> SegmentAugment:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale must be [low, high] with low not above high, got {self.scale[0]}, {self.scale[1]}")
        return self


class SegmentHead(Settings):
    """UPerNet (arXiv 1807.10221) and its auxiliary head."""

    channels: Count = Field(512, description="channels of UPerNet")
    auxiliary_channels: Count = Field(256, description="channels of the auxiliary head, which is used only in training")
    auxiliary_weight: NotNegative = Field(0.4, description="weight of the loss of the auxiliary head")
    dropout: float = Field(0.1, ge=0, lt=1, description="channel dropout before the last layer of both heads")


class SegmentInference(Settings):
    """Inference on full images."""

    short_px: Count | None = Field(None, description="short side of the image, px; null: short side of the crop")
    stride: SizeOrNone = Field(None, description="stride of sliding windows, px; null: two thirds of the window")
    scales: list[Positive] = Field(
        [1.0], min_length=1, description="scale factors for test-time augmentation; predictions are averaged"
    )
    flip: bool = Field(False, description="test-time augmentation by a horizontal flip")


class SegmentTest(SegmentInference):
    """Inference in evaluation. Mutable on resume."""

    window: bool = Field(False, description="sliding windows of the crop size; false: the full image at once")


class SegmentSchedule(Schedule):
    """Training length and learning rates. Defaults: ADE20K, 160,000 steps of 16 images, 1,500 of them warm-up (Swin V2,
    appendix A1.2).
    """

    name: Literal["cosine", "linear", "multistep"] = Field(
        "linear", description="learning-rate decay after the warm-up"
    )
    epochs: Positive = Field(126.7, description="passes over the training images; may be fractional")
    base_lr: Positive = Field(1.28e-3, description="learning rate after the warm-up, for 512 images per step")
    warmup_epochs: NotNegative = Field(1.2, description="epochs of linear warm-up from warmup_lr to base_lr")
    warmup_lr: NotNegative = Field(0, description="learning rate of the first step, for 512 images per step")
    min_lr: NotNegative = Field(0, description="final learning rate of cosine and linear, for 512 images per step")


class SegmentStage(Supervised):
    """Semantic segmentation with UPerNet. Defaults: ADE20K (Swin V2, appendix A1.2)."""

    mutable_on_resume = Stage.mutable_on_resume | {
        "test": True,
        "labels": {key: True for key in ("path", "annotations", "val_path", "val_annotations", "classes")},
    }

    kind: Literal["segment"] = Field("segment", description="stage type; default: the beginning of the stage name")
    image_size: Size = Field((512, 512), description="crop size, px; one number or [height, width]")
    drop_path: float = Field(
        0.3, ge=0, lt=1, description="stochastic depth rate of the last block, increasing linearly from 0"
    )
    layer_decay: float = Field(0.95, gt=0, le=1, description="learning rate of a layer relative to the next deeper one")
    batch_size: Count = Field(16, description="images per optimizer step, over all processes")
    micro_batch_size: Count = Field(2, description="images per forward pass of one process")
    labels: SegmentLabels = Field(SegmentLabels(), description="images and label maps")
    augment: SegmentAugment = Field(SegmentAugment(), description="augmentation of training images")
    head: SegmentHead = Field(SegmentHead(), description="UPerNet head settings")
    test: SegmentTest = Field(SegmentTest(), description="inference in evaluation")
    schedule: SegmentSchedule = Field(SegmentSchedule(), description="training length and learning rates")

    @model_validator(mode="after")
    def _windows_cover(self) -> SegmentStage:
        stride = self.test.stride
        if stride and not self.test.window:
            raise ValueError(
                f"test.stride {list(stride)} needs sliding windows: set test.window to true, or remove test.stride"
            )
        if stride and (stride[0] > self.image_size[0] or stride[1] > self.image_size[1]):
            raise ValueError(f"test.stride {list(stride)} must not exceed image_size {list(self.image_size)}")
        return self

    @property
    def labels_path(self) -> str:
        return self.labels.path

    def check_encoder(self, where: str, config: SwinConfig) -> None:
        if self.augment.distort and config.in_chans != 3:
            raise ValueError(f"{where}.augment.distort needs 3 channels: set it to false")
        if len(config.depths) < 2:
            raise ValueError(f"{where} needs a feature pyramid, but the encoder has one stage: use two or more")


class DetectLabels(Settings):
    """Images with objects: a folder with annotations/instances_train2017.json and train2017 as in COCO, or with
    annotations/train.json and train; likewise for val.
    """

    path: str = Field("", description="folder of images and annotations; empty: data.path")
    val_images: Count = Field(
        5000, description="validation images taken from train if there is no val, at most a tenth"
    )


class DetectJitter(Settings):
    """Augmentation of training images: resizing and a horizontal flip."""

    kind: Literal["short_side", "large_scale"] = Field(
        "short_side",
        description="short_side: short side drawn from short_px (Swin); large_scale: resized to image_size times a "
        "random scale and cropped to image_size (arXiv 2012.07177)",
    )
    short_px: Annotated[list[Count], Field(min_length=1)] = Field(
        list(range(480, 801, 32)), description="short_side: choices of the short side, px"
    )
    long_px: Count = Field(1333, description="short_side: largest length of the long side, px")
    scale: tuple[Positive, Positive] = Field((0.1, 2.0), description="large_scale: smallest and largest scale factor")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="interpolation of resizing, always antialiased"
    )

    @model_validator(mode="after")
    def _ordered(self) -> DetectJitter:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale must be [low, high] with low not above high, got {self.scale[0]}, {self.scale[1]}")
        if self.long_px < max(self.short_px):
            raise ValueError(f"long_px {self.long_px} must be at least the largest short_px, {max(self.short_px)}")
        return self


class DetectTest(Settings):
    """Inference in evaluation. Mutable on resume."""

    short_px: Count = Field(800, description="short side of the image, px")
    long_px: Count = Field(1333, description="largest length of the long side, px")
    scales: Annotated[list[Positive], Field(min_length=1)] = Field(
        [1.0], description="scale factors for test-time augmentation; detections are merged"
    )
    flip: bool = Field(False, description="test-time augmentation by a horizontal flip")
    soft_nms: Literal["linear", "gaussian"] | None = Field(
        None, description="overlapping detections lose score instead of being dropped (arXiv 1704.04503)"
    )

    @model_validator(mode="after")
    def _ordered(self) -> DetectTest:
        if self.long_px < self.short_px:
            raise ValueError(f"long_px {self.long_px} must be at least short_px, {self.short_px}")
        return self


class DetectSchedule(Schedule):
    """Training length and learning rates. Defaults: the "3x" schedule, 36 epochs with two steps."""

    name: Literal["cosine", "linear", "multistep"] = Field(
        "multistep", description="learning-rate decay after the warm-up"
    )
    epochs: Positive = Field(36, description="passes over the training images; may be fractional")
    base_lr: Positive = Field(3.2e-3, description="learning rate after the warm-up, for 512 images per step")
    warmup_epochs: NotNegative = Field(0.07, description="epochs of linear warm-up from warmup_lr to base_lr")
    warmup_lr: NotNegative = Field(3.2e-6, description="learning rate of the first step, for 512 images per step")
    milestones_epochs: list[Positive] = Field(
        [27, 33], description="multistep: epochs at which the learning rate is multiplied by gamma"
    )


class DetectStage(Supervised):
    """Detection and instance segmentation: Mask R-CNN (arXiv 1703.06870) or a cascade (arXiv 1712.00726)."""

    mutable_on_resume = Stage.mutable_on_resume | {"test": True, "labels": {"path": True}}

    kind: Literal["detect"] = Field("detect", description="stage type; default: the beginning of the stage name")
    image_size: SizeOrNone = Field(
        None,
        description="image size for `simmim plan` and for large_scale, px; null: as the encoder was trained",
    )
    batch_size: Count = Field(16, description="images per optimizer step, over all processes")
    micro_batch_size: Count = Field(2, description="images per forward pass of one process")
    layer_decay: float = Field(1.0, gt=0, le=1, description="learning rate of a layer relative to the next deeper one")
    labels: DetectLabels = Field(DetectLabels(), description="images and annotated objects")
    masks: bool = Field(True, description="predict a mask for every box; false: boxes only (Faster R-CNN)")
    cascade: bool = Field(False, description="three box heads, each on the boxes of the previous one")
    width: Count = Field(256, description="channels of the feature pyramid")
    hidden: Count = Field(1024, description="channels of the box heads")
    anchor_px: list[Count] | None = Field(
        None,
        description="side of anchors on each pyramid map, one more than encoder stages, px; null: 8 times its stride",
    )
    regions_per_image: Count = Field(512, description="largest number of training regions per image for each box head")
    jitter: DetectJitter = Field(DetectJitter(), description="augmentation of training images")
    test: DetectTest = Field(DetectTest(), description="inference in evaluation")
    schedule: DetectSchedule = Field(DetectSchedule(), description="training length and learning rates")

    @property
    def labels_path(self) -> str:
        return self.labels.path

    def check_encoder(self, where: str, config: SwinConfig) -> None:
        depth = len(config.depths)
        if self.anchor_px is not None and len(self.anchor_px) != depth + 1:
            raise ValueError(
                f"{where}.anchor_px has {len(self.anchor_px)} values, but an encoder of {depth} stages "
                f"gives a feature pyramid of {depth + 1} maps"
            )
