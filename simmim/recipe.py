"""A recipe: one YAML file with data, encoder and stages. This is its schema and its loader."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from simmim.masking import MaskGenerator
from swin import SIZES, SwinConfig, make_config
from swin.config import Attention, Norm, PositionBias, as_pair

MAX_BYTES = 1_000_000
Size = Annotated[tuple[int, int], BeforeValidator(lambda value: as_pair(value, "this"))]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(gt=0, strict=True)]
Share = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Frozen, finite, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Data(Settings):
    """Which images."""

    path: str = Field("", description="a folder of images, flat or nested, or builtin:shapes")
    mean: list[float] = Field([0.485, 0.456, 0.406], description="per channel, of pixels in [0, 1]")
    std: list[Positive] = Field([0.229, 0.224, 0.225], description="per channel, of pixels in [0, 1]")
    num_images: Count = Field(100_000, description="how many builtin images make an epoch")
    holdout_images: int = Field(64, ge=0, description="kept out of training for pictures and the held-out loss")
    num_workers: int = Field(2, ge=0, description="loader processes for each training process")


class Encoder(Settings):
    """Which encoder; what is left open comes from the named size."""

    name: Literal[tuple(SIZES)] = Field("swinv2_base", description="a named size")  # type: ignore[valid-type]
    in_chans: Count = 3
    embed_dim: Count | None = None
    depths: list[Count] | None = None
    num_heads: list[Count] | None = None
    patch_size: Count | None = Field(None, description="side of a token of the first stage, px")
    mlp_ratio: Positive | None = None
    extra_norm_interval: int | None = Field(
        None, ge=0, description="blocks between norms on the main branch; 0 for none"
    )
    attention: Attention | None = Field(None, description="similarity of tokens: cosine in V2, dot in V1")
    norm: Norm | None = Field(None, description="norms of the branches: res-post in V2, pre in V1")
    position_bias: PositionBias | None = Field(None, description="log_cpb in V2, table in V1")


class Crop(Settings):
    """Random resized crop and horizontal flip."""

    scale: tuple[Positive, Positive] = (0.67, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    flip: Share = 0.5

    @model_validator(mode="after")
    def _ordered(self) -> Crop:
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must go from low to high, got {low}, {high}")
        if self.scale[1] > 1:
            raise ValueError(f"scale is a share of the image's area, at most 1, got {self.scale[1]}")
        return self


class Mask(Settings):
    """Random masking (SimMIM, section 3.2)."""

    patch_size: Count = Field(32, description="side of a masked cell, px")
    ratio: float = Field(0.6, gt=0, lt=1, description="share of cells, rounded up")


class Target(Settings):
    """What is predicted (SimMIM, section 3.4)."""

    loss: Literal["l1", "l2", "smooth_l1"] = "l1"
    norm_window: Count | None = Field(None, description="sliding window for normalised targets, px, odd; 47 in Swin V2")


class Optimizer(Settings):
    """AdamW."""

    weight_decay: NotNegative = 0.05
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Positive = 1e-8
    clip_grad_norm: Positive | None = Field(5.0, description="null: no clipping")


class Schedule(Settings):
    """Learning rates are given for a batch of 512 and scaled with the batch size."""

    name: Literal["cosine", "multistep"] = "cosine"
    epochs: Positive = 100
    base_lr: Positive = 1e-4
    warmup_epochs: NotNegative = 10
    warmup_lr: NotNegative = 5e-7
    min_lr: NotNegative = Field(1e-6, description="where cosine ends")
    milestones_epochs: list[Positive] = Field([], description="multistep: when the rate is multiplied by gamma")
    gamma: Positive = 0.1

    @model_validator(mode="after")
    def _consistent(self) -> Schedule:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} must be below epochs {self.epochs:g}")
        if self.name == "multistep" and not self.milestones_epochs:
            raise ValueError("a multistep schedule needs milestones_epochs, for instance [700]")
        return self


class Log(Settings):
    """What is written during a run, and how often; in optimizer steps."""

    metrics_every_steps: Count = 10
    pictures_every_steps: Count = 1000
    checkpoint_every_steps: Count = 1000
    keep_checkpoints: Count = 2


class Pretrain(Settings):
    """Masked image modelling."""

    image_size: Size = Field((192, 192), description="px; one number or [height, width]")
    window_size: Size = Field((12, 12), description="tokens; one number or [height, width]")
    drop_path: float = Field(0.0, ge=0, lt=1)
    batch_size: Count = Field(2048, description="images per optimizer step, over all processes")
    micro_batch_size: Count = Field(128, description="images per forward pass of one process")
    crop: Crop = Crop()
    mask: Mask = Mask()
    target: Target = Target()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    log: Log = Log()

    @model_validator(mode="after")
    def _masks_fit(self) -> Pretrain:
        MaskGenerator(self.image_size, self.mask.patch_size, self.mask.ratio)
        if self.target.norm_window is not None and self.target.norm_window % 2 == 0:
            raise ValueError(f"target.norm_window must be odd, got {self.target.norm_window}")
        return self


class Stages(Settings):
    """What is done, in this order."""

    pretrain: Pretrain = Pretrain()


class Recipe(Settings):
    """The whole file."""

    name: str = Field(
        "",
        pattern=r"^[\w+-][\w .+-]*$|^$",
        description="folder of the run below the output folder; the file's name by default",
    )
    seed: int = Field(0, ge=0)
    data: Data = Data()
    encoder: Encoder = Encoder()
    stages: Stages = Stages()

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        channels = self.encoder.in_chans
        for name in ("mean", "std"):
            count = len(getattr(self.data, name))
            if count != channels:
                raise ValueError(f"data.{name} has {count} numbers, but encoder.in_chans is {channels}")
        token = encoder_config(self.encoder, self.stages.pretrain).patch_size
        if self.stages.pretrain.mask.patch_size % token:
            raise ValueError(
                f"stages.pretrain.mask.patch_size {self.stages.pretrain.mask.patch_size} must be a "
                f"multiple of encoder.patch_size {token}"
            )
        return self


def encoder_config(encoder: Encoder, stage: Pretrain) -> SwinConfig:
    """The encoder that a stage trains."""
    given = {key: value for key, value in encoder if value is not None and key != "name"}
    return make_config(
        encoder.name,
        **given,
        image_size=stage.image_size,
        window_size=stage.window_size,
        drop_path=stage.drop_path,
    )


def load_recipe(path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply ``key.path=value`` overrides; values are YAML.

    Args:
        path: a file, or the name of a shipped recipe.

    Raises:
        ValueError: no such file, not a recipe, or values that are refused; every problem on a line.
    """
    file = find_recipe(path)
    values = _read_yaml(file)
    origin = {}
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r}: expected key.path=value")
        _set(values, key, _parse_yaml(text, f"override {override!r}"), override)
        origin[key] = override
    if not values.get("name"):
        values["name"] = file.stem
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_explain(detail, origin, file.name) for detail in error.errors()]
        raise ValueError(f"{len(lines)} problem(s) in {path}:\n" + "\n".join(lines)) from None


def shipped_recipes() -> list[Path]:
    """The YAML files that come with the package."""
    return sorted(_recipes_folder().glob("*.yaml"))


def find_recipe(path: str) -> Path:
    """A file of the user, else a shipped recipe of that name with or without folder and ending.

    Raises:
        ValueError: neither exists.
    """
    file = Path(path)
    if file.is_file():
        return file
    shipped = {recipe.stem: recipe for recipe in shipped_recipes()}
    if file.stem in shipped and file.parent in (Path("."), Path("recipes")):
        return shipped[file.stem]
    close = difflib.get_close_matches(file.stem, shipped, n=1)
    hint = f"did you mean {close[0]}?" if close else f"shipped recipes: {', '.join(shipped)}"
    raise ValueError(f"no recipe {path!r}: {hint}")


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with every value written out, as YAML that :func:`load_recipe` reads again."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _recipes_folder() -> Path:
    installed = Path(__file__).parent / "recipes"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "recipes"


class _Loader(yaml.SafeLoader):
    """Refuses what plain YAML passes over in silence: a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(sorted(twice))} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _read_yaml(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} is larger than {MAX_BYTES:,} bytes: this is no recipe")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not a text file") from None
    values = _parse_yaml(text, str(file))
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no recipe: expected keys such as {', '.join(Recipe.model_fields)}")
    return values


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def _set(values: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"override {override!r}: {parent} holds a value, not further keys")
        values = child
    values[last] = value


def _explain(detail: ErrorDetails, origin: dict[str, str], file: str) -> str:
    location = ".".join(str(part) for part in detail["loc"])
    where = f"   [{origin.get(location, file)}]"
    if detail["type"] == "extra_forbidden":
        known = _known_keys(detail["loc"][:-1])
        close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"  {location}: unknown key, {hint}(known here: {', '.join(known)}){where}"
    message = detail["msg"].removeprefix("Value error, ")
    given = "" if detail["type"] == "value_error" else f" (got {detail['input']!r})"
    return f"  {location}: {message}{given}{where}".replace("  : ", "  ", 1)


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in location:
        model = model.model_fields[part].annotation
    return list(model.model_fields)
