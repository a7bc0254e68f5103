"""Stages of images, or of clips: masked modelling, and classification."""

from __future__ import annotations

from math import gcd
from typing import Literal

from pydantic import Field, model_validator

from simmim.config.sections import (
    Count,
    Crop,
    Fraction,
    NotNegative,
    Positive,
    Schedule,
    Settings,
    Size,
    Stage,
    Supervised,
)
from simmim.masking import MaskGenerator
from swin import SwinConfig


class Video(Settings):
    """Clips of videos in place of images; by default as of Video Swin (arXiv 2106.13230), with the views of Swin V2."""

    frames: Count = Field(32, description="of a clip")
    stride: Count = Field(2, description="from one frame of a clip to the next, in frames of the video")
    temporal_patch: Count = Field(2, description="frames of a token")
    temporal_window: Count = Field(8, description="of attention, tokens")
    views: Count = Field(4, description="clips of a video that a trained classifier is judged by, spread over its time")
    crops: Count = Field(5, description="of each of them, along the longer side")

    @property
    def time(self) -> dict[str, int]:
        """What the encoder has to know."""
        return self.model_dump(include={"frames", "temporal_patch", "temporal_window"})

    @property
    def inference(self) -> dict[str, int]:
        """Inference settings of a trained classifier."""
        return self.model_dump(include={"stride", "views", "crops"})


class Mask(Settings):
    """Masking (SimMIM, section 3.2)."""

    strategy: Literal["random", "square", "block"] = Field(
        "random", description="random cells; one square; or rectangles as in BEiT"
    )

    patch_size: Count = Field(32, description="side of a masked cell, px")
    ratio: float = Field(0.6, gt=0, lt=1, description="share of cells, rounded up")


class Target(Settings):
    """What is predicted (SimMIM, sections 3.3 and 3.4)."""

    loss: Literal["l1", "l2", "smooth_l1"] = Field("l1", description="of a pixel")
    pixels: Literal["masked", "all"] = Field("masked", description="of which pixels the loss is")
    downsample: Count = Field(1, description="side of the squares over which prediction and target are averaged, px")
    head: Literal["linear", "mlp", "inverse_swin"] = Field(
        "linear", description="one layer; two; or the encoder upside down, with two blocks at every scale"
    )
    norm_window: Count | None = Field(None, description="sliding window for normalised targets, px, odd; 47 in Swin V2")


class PretrainStage(Stage):
    """Masked image modelling (SimMIM, arXiv 2111.09886)."""

    mutable_on_resume = Stage.mutable_on_resume | {"micro_batch_size": True, "video": {"views": True, "crops": True}}

    kind: Literal["pretrain"] = Field("pretrain", description="by default what the name of the stage begins with")
    init_from: str = Field("scratch", description="scratch, or any encoder that is to be trained further")
    image_size: Size = Field((192, 192), description="px; one number or [height, width]")
    window_size: Size = Field((12, 12), description="tokens; one number or [height, width]")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the last block, linear from 0")
    video: Video | None = Field(None, description="clips, their masks the same in all frames; null: images")
    crop: Crop = Field(Crop(), description="of training images")
    mask: Mask = Field(Mask(), description="what is hidden")
    target: Target = Field(Target(), description="what is predicted")

    @model_validator(mode="after")
    def _masks_fit(self) -> PretrainStage:
        MaskGenerator(self.image_size, self.mask.patch_size, self.mask.ratio, strategy=self.mask.strategy)
        window = self.target.norm_window
        if window is not None and (window % 2 == 0 or window < 3):
            raise ValueError(f"target.norm_window must be odd, from 3, got {window}")
        if self.video and self.target != Target():
            raise ValueError(
                "target: of clips it is every masked pixel, by L1 and one layer: leave it out beside video"
            )
        return self

    def check_encoder(self, where: str, config: SwinConfig) -> None:
        if self.mask.patch_size % config.patch_size:
            raise ValueError(
                f"{where}.mask.patch_size {self.mask.patch_size} must be a multiple of encoder.patch_size "
                f"{config.patch_size}"
            )
        largest = gcd(config.stride, self.mask.patch_size)
        if largest % self.target.downsample:
            raise ValueError(
                f"{where}.target.downsample {self.target.downsample} must divide mask.patch_size and "
                f"the stride of the encoder: take a divisor of {largest}"
            )


class Labels(Settings):
    """Which labelled images: one subfolder per class, a list or table with a column of labels, builtin:shapes."""

    path: str = Field("", description="empty: data.path; its train and val (or test) subfolders where it has both")
    val_path: str = Field("", description="empty: the val subfolder, or val_images held out of the others")
    val_images: Count = Field(5000, description="held out where there is no folder for validation, at most a tenth")
    labels_per_class: Count | None = Field(None, description="labelled images of each class; null: all")
    tests: tuple[str, ...] = Field(
        (),
        description="more labelled images that the trained classifier is judged by, of each place by itself; "
        "of ImageNet-V2, the folder with its variants",
    )


class Augment(Settings):
    """What timm does to the images of a classifier (official Swin recipes)."""

    rand_augment: str | None = Field(
        "rand-m9-mstd0.5-inc1", pattern=r"^rand(-[a-z]+[\d.]+)+$", description="timm's notation; null: none"
    )
    erasing: Fraction = Field(0.25, description="probability of a box of noise")
    mixup: NotNegative = Field(0.8, description="alpha; 0: none")
    cutmix: NotNegative = Field(1.0, description="alpha; 0: none")


class FinetuneCrop(Crop):
    """The crops of a classifier are smaller."""

    scale: tuple[Positive, Positive] = Field((0.08, 1.0), description="least and largest share of the image's area")
    interpolation: Literal["bilinear", "bicubic"] = Field("bicubic", description="of resizing, always antialiased")


class FinetuneSchedule(Schedule):
    """The rates of a classifier are higher."""

    base_lr: Positive = Field(1.25e-3, description="after the warm-up, for 512 images per step")
    warmup_epochs: NotNegative = Field(20, description="linear rise from warmup_lr")
    warmup_lr: NotNegative = Field(2.5e-7, description="at the first step, for 512 images per step")
    min_lr: NotNegative = Field(2.5e-7, description="where cosine and linear end")


class FinetuneStage(Supervised):
    """Classification: the supervised stage on many labels, fine-tuning, and transfer to another size."""

    mutable_on_resume = Stage.mutable_on_resume | {
        "head": True,
        "labels": {"path": True, "val_path": True, "tests": True},
        "video": {"views": True, "crops": True},
    }

    kind: Literal["supervised", "finetune", "transfer"] = Field(
        description="by default what the name of the stage begins with"
    )
    video: Video | None = Field(None, description="clips; null: images")
    head: str = Field("", description="fresh, keep, or a file that maps classes; empty: keep to transfer, else fresh")
    labels: Labels = Field(Labels(), description="which images, and their classes")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of the label given to all classes")
    crop: FinetuneCrop = Field(FinetuneCrop(), description="of training images")
    augment: Augment = Field(Augment(), description="what else is done to them")
    schedule: FinetuneSchedule = Field(FinetuneSchedule(), description="for how long, and how fast")

    @property
    def in_pairs(self) -> bool:
        return bool(self.augment.mixup or self.augment.cutmix)

    @property
    def labels_path(self) -> str:
        return self.labels.path

    def check_encoder(self, where: str, config: SwinConfig) -> None:
        if self.augment.rand_augment and config.in_chans != 3:
            raise ValueError(f"{where}.augment.rand_augment is for 3 channels: set it to null")

    @model_validator(mode="after")
    def _pairs_to_mix(self) -> FinetuneStage:
        if self.in_pairs and self.micro_batch_size % 2:
            raise ValueError(f"mixup and cutmix mix pairs: micro_batch_size must be even, got {self.micro_batch_size}")
        return self

    @model_validator(mode="after")
    def _no_painting(self) -> FinetuneStage:
        if self.video and self.augment.rand_augment:
            raise ValueError("augment.rand_augment paints on single images, not on clips: set it to null beside video")
        return self


def video_of(stage: Stage) -> Video | None:
    """What a stage says of clips; None if it has images."""
    return stage.video if isinstance(stage, PretrainStage | FinetuneStage) else None
