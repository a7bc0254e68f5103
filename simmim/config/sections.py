"""What stages have in common, and what is not of stages: data and encoder."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from swin import SIZES
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
    numbers = value if isinstance(value, list) else [value]
    if value != "auto" and not (numbers and all(type(number) is int and number > 0 for number in numbers)):
        raise ValueError(f"expected auto, a positive number, or one for each stage of the encoder, got {value!r}")
    return value


Chunks = Annotated[str | int | list[int], BeforeValidator(_as_chunks)]


class Settings(BaseModel):
    """Frozen, finite, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Data(Settings):
    """Which images."""

    path: str = Field(
        "",
        description="a folder of images, a .zip, .tar, .parquet or .npy file, a pattern of such, a list (.txt, .csv), "
        "hf:NAME, stream:hf:NAME, or builtin:shapes",
    )
    mean: list[float] = Field([0.485, 0.456, 0.406], description="per channel, of pixels in [0, 1]")
    std: list[Positive] = Field([0.229, 0.224, 0.225], description="per channel, of pixels in [0, 1]")
    value_range: tuple[float, float] | None = Field(
        None, description="black and white in files of more than 8 bits; null: the whole range of 16 bits"
    )
    num_images: Count = Field(100_000, description="how many builtin images make an epoch")
    fraction: float = Field(
        1.0, gt=0, le=1, description="of the training images, for pretraining: of smaller shares all are in the larger"
    )
    validation_images: int = Field(64, ge=0, description="kept out of training for pictures and the held-out loss")
    max_corrupt_fraction: Fraction = Field(0.01, description="more broken images than that (and than 10) end the run")
    read_timeout_s: Positive = Field(60, description="an image that has not come by then counts as broken")
    num_workers: int | None = Field(
        None, ge=0, description="loader processes for each training process; null: by the number of cores"
    )

    @model_validator(mode="after")
    def _range(self) -> Data:
        if self.value_range and self.value_range[0] >= self.value_range[1]:
            raise ValueError(f"value_range must go from black to white, got {list(self.value_range)}")
        return self


class Encoder(Settings):
    """Which encoder; what is left open comes from the named size."""

    name: Literal[tuple(SIZES)] = Field("swinv2_base", description="a named size")  # type: ignore[valid-type]
    in_chans: Count = Field(3, description="channels of the images")
    embed_dim: Count | None = Field(None, description="channels of the first stage, doubled by every next one")
    depths: list[Count] | None = Field(None, description="blocks of each stage")
    num_heads: list[Count] | None = Field(None, description="attention heads of each stage")
    patch_size: Count | None = Field(None, description="side of a token of the first stage, px")
    mlp_ratio: Positive | None = Field(None, description="hidden channels of an MLP over those of its stage")
    extra_norm_interval: int | None = Field(
        None, ge=0, description="blocks between norms on the main branch; 0 for none"
    )
    attention: Attention | None = Field(None, description="similarity of tokens: cosine in V2, dot in V1")
    norm: Norm | None = Field(None, description="norms of the branches: res-post in V2, pre in V1")
    position_bias: PositionBias | None = Field(None, description="log_cpb in V2, table in V1")


class Crop(Settings):
    """Random resized crop and horizontal flip (SimMIM, section 4.1)."""

    scale: tuple[Positive, Positive] = Field((0.67, 1.0), description="least and largest share of the image's area")
    ratio: tuple[Positive, Positive] = Field((3 / 4, 4 / 3), description="least and largest width over height")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    interpolation: Literal["bilinear", "bicubic"] = Field("bilinear", description="of resizing, always antialiased")

    @model_validator(mode="after")
    def _ordered(self) -> Crop:
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must go from low to high, got {low}, {high}")
        if self.scale[1] > 1:
            raise ValueError(f"scale is a share of the image's area, at most 1, got {self.scale[1]}")
        return self


class Optimizer(Settings):
    """AdamW (arXiv 1711.05101)."""

    weight_decay: NotNegative = Field(0.05, description="of matrices; vectors, temperatures and position biases: none")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="decay of the moments")
    eps: Positive = Field(1e-8, description="added to the denominator")
    clip_grad_norm: Positive | None = Field(5.0, description="null: no clipping")


class Schedule(Settings):
    """Learning rates are given for a batch of 512 and scaled with the batch size."""

    name: Literal["cosine", "linear", "multistep"] = Field("cosine", description="after the warm-up")
    epochs: Positive = Field(100, description="passes over the images; fractions too")
    base_lr: Positive = Field(1e-4, description="after the warm-up, for 512 images per step")
    warmup_epochs: NotNegative = Field(10, description="linear rise from warmup_lr")
    warmup_lr: NotNegative = Field(5e-7, description="at the first step, for 512 images per step")
    min_lr: NotNegative = Field(1e-6, description="where cosine and linear end")
    milestones_epochs: list[Positive] = Field([], description="multistep: when the rate is multiplied by gamma")
    gamma: Positive = Field(0.1, description="multistep: by which it is multiplied")

    @model_validator(mode="after")
    def _consistent(self) -> Schedule:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} must be below epochs {self.epochs:g}")
        if self.name == "multistep" and not self.milestones_epochs:
            raise ValueError("a multistep schedule needs milestones_epochs, for instance [700]")
        return self


class Memory(Settings):
    """The same numbers in less memory and more time (Swin V2, section 3.5); may change while a stage goes on."""

    checkpointing: Checkpointing = Field(
        "none", description="blocks keep everything; their matrix products; or only what goes in"
    )
    attention_chunks: Chunks = Field(
        "auto", description="attention one part after the other: for all stages or each; auto: where memory asks for it"
    )


class Speed(Settings):
    """The same numbers sooner; may change while a stage goes on."""

    compile: bool = Field(False, description="blocks through torch.compile: some minutes at the start")
    fused_attention: Literal["auto"] | bool = Field(
        "auto", description="attention as one kernel; auto: on a GPU where it is measured to be faster"
    )

    @model_validator(mode="after")
    def _check_ways(self) -> Speed:
        if self.compile and self.fused_attention is True:
            raise ValueError("compile and fused_attention: compiled blocks do not use the fused kernel, set one of them to false")
        return self


class Log(Settings):
    """What is written during a run, and how often; in optimizer steps."""

    metrics_every_steps: Count = Field(10, description="a line of metrics.jsonl")
    evaluate_every_steps: Count = Field(1000, description="a picture, and the held-out loss")
    checkpoint_every_steps: Count = Field(1000, description="a checkpoint; also at the end and when asked to stop")
    keep_checkpoints: Count = Field(2, description="so many of the newest stay")
    keep_every_steps: Count | None = Field(None, description="checkpoints at multiples of it stay too; null: none")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field([], description="told of the metrics as well")


class Stage(Settings):
    """What all stages have."""

    mutable_on_resume: ClassVar[dict[str, Any]] = {"log": True, "memory": True, "speed": True, "init_from": True}
    """What of it may change while it goes on: bookkeeping, places, and how predictions are tested."""

    kind: str = Field(description="by default what the name of the stage begins with")
    init_from: str = Field("", description="a stage, an export, a file, or scratch; empty: the stage before")
    image_size: SizeOrNone = Field(None, description="px; null: as the encoder was trained")
    window_size: SizeOrNone = Field(None, description="tokens; null: in proportion to the image")
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth of the last block, linear from 0")
    batch_size: Count = Field(2048, description="images per optimizer step, over all processes")
    micro_batch_size: Count = Field(128, description="images per forward pass of one process")
    optimizer: Optimizer = Field(Optimizer(), description="how weights move")
    schedule: Schedule = Field(Schedule(), description="for how long, and how fast")
    memory: Memory = Field(Memory(), description="what is computed again, or in parts")
    speed: Speed = Field(Speed(), description="what is computed in another way")
    log: Log = Field(Log(), description="what is written, and how often")

    @property
    def in_pairs(self) -> bool:
        """Whether images are mixed, which takes an even number of them."""
        return False


class Supervised(Stage):
    """What all stages with labels have."""

    layer_decay: float = Field(0.8, gt=0, le=1, description="learning rate of a layer over that of the next")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="average of the weights, judged and exported")
