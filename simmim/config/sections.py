"""Settings shared by all stages, plus data and encoder settings."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from swin import SIZES, SwinConfig
from swin.activation_checkpointing import Checkpointing
from swin.config import Attention, Norm, PositionBias, as_pair

Size = Annotated[tuple[int, int], BeforeValidator(lambda value: as_pair(value, "this"))]
SizeOrNone = Annotated[
    tuple[int, int] | None, BeforeValidator(lambda value: None if value is None else as_pair(value, "this"))
]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(gt=0, strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _as_chunks(value: Any) -> Any:
    counts = value if isinstance(value, list) else [value]
    if value != "auto" and not (counts and all(type(count) is int and count > 0 for count in counts)):
        raise ValueError(f"expected auto, a positive integer, or a list of one for each encoder stage, got {value!r}")
    return value


Chunks = Annotated[str | int | list[int], BeforeValidator(_as_chunks)]


class Settings(BaseModel):
    """Base of all settings: frozen, without infinite values, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Data(Settings):
    """Image data: where it is, how it is normalized, and how it is split."""

    path: str = Field(
        "",
        description="image folder; .zip, .tar, .parquet or .npy file, or a glob pattern of them; list of paths (.txt, "
        ".csv); hf:NAME, stream:hf:NAME, or builtin:shapes",
    )
    mean: list[float] = Field([0.485, 0.456, 0.406], description="mean of each channel, for pixels in [0, 1]")
    std: list[Positive] = Field(
        [0.229, 0.224, 0.225], description="standard deviation of each channel, for pixels in [0, 1]"
    )
    value_range: tuple[float, float] | None = Field(
        None, description="[black, white] values of files with more than 8 bits; null: the full 16-bit range"
    )
    num_images: Count = Field(100_000, description="images per epoch of builtin:shapes")
    fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="fraction of the training images used for pretraining; smaller subsets are nested in larger ones",
    )
    validation_images: int = Field(
        64, ge=0, description="images excluded from pretraining, for previews and the validation loss"
    )
    max_corrupt_fraction: Fraction = Field(
        0.01, description="the run ends when more than this fraction of the images, and more than 10, are corrupt"
    )
    read_timeout_s: Positive = Field(60, description="an image that takes longer to read counts as corrupt")
    num_workers: int | None = Field(
        None, ge=0, description="data-loader workers per training process; null: depends on the number of cores"
    )

    @model_validator(mode="after")
    def _range(self) -> Data:
        if self.value_range and self.value_range[0] >= self.value_range[1]:
            raise ValueError(f"value_range must be [black, white] with black below white, got {list(self.value_range)}")
        return self


class Encoder(Settings):
    """Encoder: a named size; the other keys override its values."""

    name: Literal[tuple(SIZES)] = Field("swinv2_base", description="named size")  # type: ignore[valid-type]
    in_chans: Count = Field(3, description="input channels")
    embed_dim: Count | None = Field(
        None, description="channels of the first encoder stage; they double from stage to stage"
    )
    depths: list[Count] | None = Field(None, description="blocks of each encoder stage")
    num_heads: list[Count] | None = Field(None, description="attention heads of each encoder stage")
    patch_size: Count | None = Field(None, description="side of the patch of one token, px")
    mlp_ratio: Positive | None = Field(
        None, description="hidden channels of an MLP relative to the channels of its stage"
    )
    extra_norm_interval: int | None = Field(
        None, ge=0, description="add a norm to the main branch after every n-th block; 0: none"
    )
    attention: Attention | None = Field(None, description="attention logits: cosine in Swin V2, dot in Swin V1")
    norm: Norm | None = Field(None, description="norm placement: res-post in Swin V2, pre in Swin V1")
    position_bias: PositionBias | None = Field(
        None, description="relative position bias: log_cpb in Swin V2, table in Swin V1"
    )


class Crop(Settings):
    """Random resized crop and horizontal flip (SimMIM, section 4.1)."""

    scale: tuple[Positive, Positive] = Field(
        (0.67, 1.0), description="smallest and largest area of the crop, relative to the image"
    )
    ratio: tuple[Positive, Positive] = Field(
        (3 / 4, 4 / 3), description="smallest and largest aspect ratio (width / height)"
    )
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="interpolation of resizing, always antialiased"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Crop:
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be [low, high] with low not above high, got {low}, {high}")
        if self.scale[1] > 1:
            raise ValueError(f"scale is an area relative to the image, at most 1, got {self.scale[1]}")
        return self


class Optimizer(Settings):
    """AdamW (arXiv 1711.05101)."""

    weight_decay: NotNegative = Field(
        0.05, description="weight decay of matrices; vectors, temperatures and position biases have none"
    )
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="decay rates of the moment estimates")
    eps: Positive = Field(1e-8, description="added to the denominator for stability")
    clip_grad_norm: Positive | None = Field(5.0, description="largest norm of the gradient; null: no clipping")


class Schedule(Settings):
    """Training length and learning rates, which are given for a batch of 512 and scaled with the batch size."""

    name: Literal["cosine", "linear", "multistep"] = Field(
        "cosine", description="learning-rate decay after the warm-up"
    )
    epochs: Positive = Field(100, description="passes over the training images; may be fractional")
    base_lr: Positive = Field(1e-4, description="learning rate after the warm-up, for 512 images per step")
    warmup_epochs: NotNegative = Field(10, description="epochs of linear warm-up from warmup_lr to base_lr")
    warmup_lr: NotNegative = Field(5e-7, description="learning rate of the first step, for 512 images per step")
    min_lr: NotNegative = Field(1e-6, description="final learning rate of cosine and linear, for 512 images per step")
    milestones_epochs: list[Positive] = Field(
        [], description="multistep: epochs at which the learning rate is multiplied by gamma"
    )
    gamma: Positive = Field(0.1, description="multistep: factor of the learning rate")

    @model_validator(mode="after")
    def _consistent(self) -> Schedule:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} must be below epochs {self.epochs:g}")
        if self.name == "multistep" and not self.milestones_epochs:
            raise ValueError("a multistep schedule needs milestones_epochs, for instance [700]")
        return self


class Memory(Settings):
    """Memory options: same results, less memory, more time (Swin V2, section 3.5). Mutable on resume."""

    checkpointing: Checkpointing = Field(
        "none",
        description="activations that blocks keep for backward: none: all of them; selective: matrix products; "
        "full: only the input of each block",
    )
    attention_chunks: Chunks = Field(
        "auto",
        description="number of chunks of the attention, one value or one per encoder stage; auto: as memory requires",
    )


class Speed(Settings):
    """Speed options: same results up to rounding. Mutable on resume."""

    compile: bool = Field(False, description="compile blocks with torch.compile; takes some minutes at the start")
    fused_attention: Literal["auto"] | bool = Field(
        "auto", description="fused attention kernel; auto: on a GPU if a benchmark shows that it is faster"
    )

    @model_validator(mode="after")
    def _check_ways(self) -> Speed:
        if self.compile and self.fused_attention is True:
            raise ValueError(
                "compile and fused_attention: compiled blocks do not use the fused kernel, set one of them to false"
            )
        return self


class Log(Settings):
    """Records of a run; intervals are in optimizer steps. Mutable on resume."""

    metrics_every_steps: Count = Field(10, description="steps between lines of metrics.jsonl")
    evaluate_every_steps: Count = Field(
        1000, description="steps between evaluations: a preview image and validation metrics"
    )
    checkpoint_every_steps: Count = Field(
        1000, description="steps between checkpoints; one is also saved at the end and on a stop signal"
    )
    keep_checkpoints: Count = Field(2, description="number of recent checkpoints to keep")
    keep_every_steps: Count | None = Field(
        None, description="also keep checkpoints at multiples of this step; null: none"
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="experiment trackers that also receive the metrics"
    )


class Stage(Settings):
    """Settings of every stage."""

    mutable_on_resume: ClassVar[dict[str, Any]] = {"log": True, "memory": True, "speed": True, "init_from": True}
    """Settings that may change when a stage resumes: logging, paths, memory and speed options, inference options."""

    kind: str = Field(description="stage type; default: the beginning of the stage name")
    init_from: str = Field(
        "", description="initial weights: a stage, an export, a weights file, or scratch; empty: the previous stage"
    )
    image_size: SizeOrNone = Field(None, description="image size, px; null: as the encoder was trained")
    window_size: SizeOrNone = Field(None, description="attention window, tokens; null: in proportion to the image size")
    drop_path: float = Field(
        0.1, ge=0, lt=1, description="stochastic depth rate of the last block, increasing linearly from 0"
    )
    batch_size: Count = Field(2048, description="images per optimizer step, over all processes")
    micro_batch_size: Count = Field(128, description="images per forward pass of one process")
    optimizer: Optimizer = Field(Optimizer(), description="AdamW settings")
    schedule: Schedule = Field(Schedule(), description="training length and learning rates")
    memory: Memory = Field(Memory(), description="activation checkpointing and attention chunking")
    speed: Speed = Field(Speed(), description="compilation and fused attention")
    log: Log = Field(Log(), description="metrics, evaluations and checkpoints")

    @property
    def in_pairs(self) -> bool:
        """Return whether mixup or cutmix mixes pairs of images, which needs an even micro-batch."""
        return False

    @property
    def labels_path(self) -> str:
        """Path of the labelled images of this stage; empty: ``data.path``."""
        return ""

    def check_encoder(self, where: str, config: SwinConfig) -> None:
        """Check the settings against the encoder that the stage trains.

        Args:
            where: key of the stage, to begin error messages with: ``stages.NAME``.
            config: the encoder, as if trained from scratch.

        Raises:
            ValueError: a setting that does not fit the encoder.
        """


class Supervised(Stage):
    """Settings of every stage with labels."""

    layer_decay: float = Field(0.8, gt=0, le=1, description="learning rate of a layer relative to the next deeper one")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of the EMA of the weights, which is then evaluated and exported; null: no EMA",
    )
