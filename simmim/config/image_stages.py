"""Settings of pretraining and classification stages, on images or video clips."""

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
    """Video clips instead of images. Defaults: Video Swin (arXiv 2106.13230), with the test views of Swin V2."""

    frames: Count = Field(32, description="frames per clip")
    stride: Count = Field(2, description="interval between frames of a clip, in frames of the video")
    temporal_patch: Count = Field(2, description="frames per token")
    temporal_window: Count = Field(8, description="temporal size of the attention window, tokens")
    views: Count = Field(4, description="clips per video in evaluation, evenly spaced in time")
    crops: Count = Field(5, description="crops per clip in evaluation, along the longer side")

    @property
    def time(self) -> dict[str, int]:
        """Return the settings that the encoder needs."""
        return self.model_dump(include={"frames", "temporal_patch", "temporal_window"})

    @property
    def inference(self) -> dict[str, int]:
        """Inference settings of a trained classifier."""
        return self.model_dump(include={"stride", "views", "crops"})


class Mask(Settings):
    """Masking (SimMIM, section 3.2)."""

    strategy: Literal["random", "square", "block"] = Field(
        "random", description="random: independent mask patches; square: one square; block: rectangles as in BEiT"
    )
    patch_size: Count = Field(32, description="side of a mask patch, px")
    ratio: float = Field(0.6, gt=0, lt=1, description="fraction of mask patches that are masked, rounded up")


class Target(Settings):
    """Prediction target and head (SimMIM, sections 3.3 and 3.4)."""

    loss: Literal["l1", "l2", "smooth_l1"] = Field("l1", description="loss per pixel")
    pixels: Literal["masked", "all"] = Field("masked", description="pixels that the loss includes")
    downsample: Count = Field(1, description="average prediction and target over squares of this side, px")
    head: Literal["linear", "mlp", "inverse_swin"] = Field(
        "linear",
        description="linear: one layer; mlp: two layers; inverse_swin: a decoder with two Swin blocks at each scale",
    )
    norm_window: Count | None = Field(
        None,
        description="side of the sliding window for normalized targets, px, odd; 47 in Swin V2; null: no normalization",
    )


class PretrainStage(Stage):
    """Masked image modeling (SimMIM, arXiv 2111.09886)."""

    mutable_on_resume = Stage.mutable_on_resume | {"micro_batch_size": True, "video": {"views": True, "crops": True}}

    kind: Literal["pretrain"] = Field("pretrain", description="stage type; default: the beginning of the stage name")
    init_from: str = Field(
        "scratch", description="scratch, or an encoder to continue pretraining: a stage, an export or a weights file"
    )
    image_size: Size = Field((192, 192), description="image size, px; one number or [height, width]")
    window_size: Size = Field((12, 12), description="attention window, tokens; one number or [height, width]")
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="stochastic depth rate of the last block, increasing linearly from 0"
    )
    video: Video | None = Field(
        None, description="train on video clips, with the same mask in all frames; null: images"
    )
    crop: Crop = Field(Crop(), description="random crops of training images")
    mask: Mask = Field(Mask(), description="masking")
    target: Target = Field(Target(), description="prediction target and head")

    @model_validator(mode="after")
    def _masks_fit(self) -> PretrainStage:
        MaskGenerator(self.image_size, self.mask.patch_size, self.mask.ratio, strategy=self.mask.strategy)
        window = self.target.norm_window
        if window is not None and (window % 2 == 0 or window < 3):
            raise ValueError(f"target.norm_window must be odd and at least 3, got {window}")
        if self.video and self.target != Target():
            raise ValueError(
                "target cannot be changed for clips (masked pixels, L1, linear head): remove it, or remove video"
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
                f"the stride of the encoder: use a divisor of {largest}"
            )


class Labels(Settings):
    """Labeled images: a folder with one subfolder per class, a list or table with a label column, or builtin:shapes."""

    path: str = Field(
        "", description="labeled images; their train and val (or test) subfolders if both exist; empty: data.path"
    )
    val_path: str = Field("", description="validation images; empty: the val subfolder, or val_images of path")
    val_images: Count = Field(
        5000, description="validation images taken from path if there is no validation folder, at most a tenth"
    )
    labels_per_class: Count | None = Field(None, description="labeled training images per class; null: all")
    tests: tuple[str, ...] = Field(
        (),
        description="paths of further labeled images, each evaluated separately after training; "
        "for ImageNet-V2 the folder of its variants",
    )


class Augment(Settings):
    """Augmentation of classification images by timm (official Swin recipes)."""

    rand_augment: str | None = Field(
        "rand-m9-mstd0.5-inc1",
        pattern=r"^rand(-[a-z]+[\d.]+)+$",
        description="RandAugment in timm's notation; null: none",
    )
    erasing: Fraction = Field(0.25, description="probability of random erasing (a box of noise)")
    mixup: NotNegative = Field(0.8, description="alpha of mixup; 0: none")
    cutmix: NotNegative = Field(1.0, description="alpha of cutmix; 0: none")


class FinetuneCrop(Crop):
    """Random resized crop for classification, with smaller crops."""

    scale: tuple[Positive, Positive] = Field(
        (0.08, 1.0), description="smallest and largest area of the crop, relative to the image"
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bicubic", description="interpolation of resizing, always antialiased"
    )


class FinetuneSchedule(Schedule):
    """Training length and learning rates for classification, with higher rates."""

    base_lr: Positive = Field(1.25e-3, description="learning rate after the warm-up, for 512 images per step")
    warmup_epochs: NotNegative = Field(20, description="epochs of linear warm-up from warmup_lr to base_lr")
    warmup_lr: NotNegative = Field(2.5e-7, description="learning rate of the first step, for 512 images per step")
    min_lr: NotNegative = Field(2.5e-7, description="final learning rate of cosine and linear, for 512 images per step")


class FinetuneStage(Supervised):
    """Classification: supervised training, fine-tuning, or transfer to another image size."""

    mutable_on_resume = Stage.mutable_on_resume | {
        "head": True,
        "labels": {"path": True, "val_path": True, "tests": True},
        "video": {"views": True, "crops": True},
    }

    kind: Literal["supervised", "finetune", "transfer"] = Field(
        description="stage type; default: the beginning of the stage name"
    )
    video: Video | None = Field(None, description="train on video clips; null: images")
    head: str = Field(
        "",
        description="classification head: fresh, keep, or a file mapping classes; empty: keep in transfer, else fresh",
    )
    labels: Labels = Field(Labels(), description="labeled images")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing")
    crop: FinetuneCrop = Field(FinetuneCrop(), description="random crops of training images")
    augment: Augment = Field(Augment(), description="further augmentation of training images")
    schedule: FinetuneSchedule = Field(FinetuneSchedule(), description="training length and learning rates")

    @property
    def in_pairs(self) -> bool:
        return bool(self.augment.mixup or self.augment.cutmix)

    @property
    def labels_path(self) -> str:
        return self.labels.path

    def check_encoder(self, where: str, config: SwinConfig) -> None:
        if self.augment.rand_augment and config.in_chans != 3:
            raise ValueError(f"{where}.augment.rand_augment needs 3 channels: set it to null")

    @model_validator(mode="after")
    def _pairs_to_mix(self) -> FinetuneStage:
        if self.in_pairs and self.micro_batch_size % 2:
            raise ValueError(
                f"mixup and cutmix mix pairs of images: micro_batch_size must be even, got {self.micro_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _images_only(self) -> FinetuneStage:
        if self.video and self.augment.rand_augment:
            raise ValueError("augment.rand_augment is for images, not for clips: set it to null if video is set")
        return self


def video_of(stage: Stage) -> Video | None:
    """Return the video settings of a stage; None if it trains on images."""
    return stage.video if isinstance(stage, PretrainStage | FinetuneStage) else None
