"""Configuration of an encoder, and the table of published sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Pair = tuple[int, int]
Size = tuple[int, ...]
"""Size on every axis of a token grid: ``(h, w)``, or ``(f, h, w)`` for a video."""
Attention = Literal["cosine", "dot"]
Norm = Literal["res-post", "pre"]
PositionBias = Literal["log_cpb", "log_cpb_paper", "linear_cpb", "table"]

# Swin Transformer V1 (arXiv 2103.14030), with the image and window size of its ImageNet training.
_V1: dict[str, Any] = dict(attention="dot", norm="pre", position_bias="table", image_size=224, window_size=7)

# Widths, depths and heads of V1 (section 3.3) and V2 (arXiv 2111.09883, section 3.6); every head has 32 channels.
# `swinv2_giant` is the model with 1.06 B parameters of the data-scaling study (448 channels, arXiv 2206.04664);
# `swinv2_3b` is the model called G in the V2 paper (512 channels).
# `extra_norm_interval` n adds a LayerNorm on the main branch after every n-th block of a stage.
SIZES: dict[str, dict[str, Any]] = {
    "swin_tiny": _V1 | dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "swin_small": _V1 | dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "swin_base": _V1 | dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "swin_large": _V1 | dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
    "swinv2_tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "swinv2_small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "swinv2_base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "swinv2_large": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
    "swinv2_huge": dict(embed_dim=352, depths=(2, 2, 18, 2), num_heads=(11, 22, 44, 88), extra_norm_interval=6),
    "swinv2_giant": dict(embed_dim=448, depths=(2, 2, 18, 2), num_heads=(14, 28, 56, 112)),
    "swinv2_3b": dict(embed_dim=512, depths=(2, 2, 42, 4), num_heads=(16, 32, 64, 128), extra_norm_interval=6),
}


@dataclass(frozen=True)
class SwinConfig:
    """All settings needed to build a :class:`swin.SwinEncoder`.

    ``image_size`` (pixels) and ``window_size`` (tokens) are ``(height, width)``. The encoder accepts images of any
    size; ``image_size`` only determines the default of ``reference_windows``: the window, at most as large as the grid
    of each stage.

    ``reference_windows`` holds, per stage, the window at which the position bias was trained. A continuous bias
    normalizes its coordinates by it, so it must not change with the resolution. A table has one row per offset of it.

    ``attention`` (scaled dot product or scaled cosine), ``norm`` (before each branch and before merging, or after) and
    ``position_bias`` can be combined freely. V1 and V2 are two of the combinations; the others include all variants of
    the V2 paper's ablations (tables 1 and 2).

    ``extra_norm_interval`` 0 means no extra norm. ``drop_path`` is the rate at the last block; it increases linearly
    from 0 at the first.

    Raises:
        ValueError: an invalid value or combination.
    """

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    image_size: Pair = (192, 192)
    window_size: Pair = (12, 12)
    reference_windows: tuple[Size, ...] | None = None
    in_chans: int = 3
    patch_size: int = 4
    mlp_ratio: float = 4.0
    extra_norm_interval: int = 0
    drop_path: float = 0.0
    attention: Attention = "cosine"
    norm: Norm = "res-post"
    position_bias: PositionBias = "log_cpb"

    def __post_init__(self) -> None:
        # JSON and YAML give lists and single integers; the attributes are always tuples.
        for name in ("image_size", "window_size"):
            object.__setattr__(self, name, as_pair(getattr(self, name), name))
        for name in ("depths", "num_heads"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check()
        windows = self.reference_windows
        if windows is None:
            windows = tuple(effective_window(grid, self.window) for grid in self.grids())
        windows = tuple(as_sizes(window, len(self.window), "reference_windows") for window in windows)
        if len(windows) != len(self.depths):
            raise ValueError(
                f"reference_windows has {len(windows)} entries, but the encoder has {len(self.depths)} stages"
            )
        object.__setattr__(self, "reference_windows", windows)

    def _check(self) -> None:
        if not self.depths or len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"depths {self.depths} and num_heads {self.num_heads} must name the same stages, at least one"
            )
        for name, choices in (("attention", Attention), ("norm", Norm), ("position_bias", PositionBias)):
            if getattr(self, name) not in get_args(choices):
                expected = ", ".join(get_args(choices))
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown: expected one of {expected}")
        for name in ("embed_dim", "in_chans", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.depths) < 1 or min(self.num_heads) < 1:
            raise ValueError(f"depths {self.depths} and num_heads {self.num_heads} must be at least 1")
        for stage, heads in enumerate(self.num_heads):
            channels = self.embed_dim * 2**stage
            if channels % heads:
                raise ValueError(
                    f"stage {stage} has {channels} channels, which {heads} heads do not divide: "
                    "change embed_dim or num_heads"
                )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")
        if self.mlp_ratio <= 0 or self.extra_norm_interval < 0:
            raise ValueError(
                f"mlp_ratio must be above 0 and extra_norm_interval at least 0, got {self.mlp_ratio} "
                f"and {self.extra_norm_interval}"
            )

    @property
    def stride(self) -> int:
        """Pixels per side of one token of the last stage."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @property
    def num_features(self) -> int:
        """Channels of the last stage."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)

    @property
    def input_size(self) -> Size:
        """Size of the input on every axis, in pixels."""
        return self.image_size

    @property
    def window(self) -> Size:
        """Attention window on every axis of the grid, in tokens."""
        return self.window_size

    def grids(self) -> tuple[Size, ...]:
        """Compute the token grid ``(h, w)`` of every stage at ``image_size``, rounded up where padding is needed."""
        h, w = (-(-side // self.patch_size) for side in self.image_size)
        grids = []
        for _ in self.depths:
            grids.append((h, w))
            h, w = -(-h // 2), -(-w // 2)
        return tuple(grids)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict for JSON, the inverse of :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SwinConfig:
        """Build a configuration from a plain dict.

        Raises:
            ValueError: unknown keys or invalid values.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown encoder settings {unknown}: if a newer version wrote them, update this package")
        return cls(**values)


def make_config(name: str, **settings: Any) -> SwinConfig:
    """Build the configuration of a named size; ``settings`` override the values of ``SIZES``.

    Raises:
        ValueError: unknown name or invalid settings.
    """
    if name not in SIZES:
        raise ValueError(f"unknown encoder {name!r}: expected one of {', '.join(SIZES)}")
    config = SwinConfig(**(SIZES[name] | settings))
    if "window_size" in settings:
        check_window(config)
    return config


def check_window(config: SwinConfig) -> None:
    """Refuse a window that is larger than the grid of every stage; only later, smaller grids may clamp it.

    Raises:
        ValueError: the window is larger than the first grid.
    """
    grid, window = config.grids()[0], config.window
    fitting = effective_window(grid, window)
    if fitting != window:
        window_text, grid_text, fitting_text = (" x ".join(map(str, sizes)) for sizes in (window, grid, fitting))
        raise ValueError(
            f"window_size {window_text} is larger than the {grid_text} tokens of an image of "
            f"{config.image_size[0]} x {config.image_size[1]} px: use at most {fitting_text}, or a larger image_size"
        )


def as_pair(value: Any, name: str) -> Pair:
    """Convert one or two sizes to a pair: ``12`` -> ``(12, 12)``; ``[8, 12]`` -> ``(8, 12)``.

    Raises:
        ValueError: not one or two positive integers.
    """
    height, width = as_sizes(value, 2, name)
    return height, width


def as_sizes(value: Any, axes: int, name: str) -> Size:
    """Convert one size or one per axis to a tuple, for grids of two or three axes.

    Raises:
        ValueError: not one positive integer, or one per axis.
    """
    sizes = tuple(value) if isinstance(value, list | tuple) else (value,) * axes
    if len(sizes) != axes or not all(type(size) is int and size > 0 for size in sizes):
        expected = {2: "two positive integers (height, width)", 3: "three positive integers (time, height, width)"}
        raise ValueError(f"{name} must be one or {expected[axes]}, got {value!r}")
    return sizes


def effective_window(grid: Size, window: Size) -> Size:
    """Return the window used on a grid: ``window``, limited to the grid on every axis."""
    return tuple(min(sizes) for sizes in zip(grid, window, strict=True))
