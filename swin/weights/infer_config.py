"""Inference of an encoder's configuration from its tensors, its file name and the JSON file next to it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from swin.config import Pair, SwinConfig, as_pair

State = dict[str, Tensor]
_BLOCK = re.compile(r"^layers\.(\d+)\.blocks\.(\d+)\.(.+)$")
_FILE_NAME = re.compile(r"window(\d+)(?:to(\d+))?_(\d+)(?:to(\d+))?")


class Geometry(NamedTuple):
    """Image and window sizes used in training; None where unknown."""

    image_size: Pair | None = None
    window_size: Pair | None = None
    reference_windows: tuple[Pair, ...] | None = None

    def or_else(self, other: Geometry) -> Geometry:
        """Return this geometry with unknown values taken from ``other``."""
        return self._replace(**{key: value for key, value in other._asdict().items() if getattr(self, key) is None})


def infer_config(state: State, geometry: Geometry) -> SwinConfig:
    """Infer the configuration from native tensors. Compare the tensors with it afterwards to find missing ones.

    Raises:
        ValueError: the tensors are not a Swin encoder, or the geometry is needed and unknown.
    """
    depths = _depths(state)
    patches = state.get("patch_embed.proj.weight")
    widths = [state[name].shape[0] for name in ("patch_embed.proj.bias", "patch_embed.norm.weight") if name in state]
    widths += [tensor.shape[0] for _, name, tensor in _stage_tensors(state, 0) if name.startswith("norm")]
    if not widths:
        raise ValueError(
            "cannot infer the width of the encoder: no patch embedding or norms found. Expected a complete Swin encoder"
        )
    embed_dim = widths[0]
    names = {match[3] for match in map(_BLOCK.match, state) if match}
    cosine = bool(names & {"attn.logit_scale", "attn.q_bias", "attn.v_bias"})
    has_table = "attn.relative_position_bias.table" in names
    settings: dict[str, Any] = {
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": tuple(_heads(state, stage) for stage in range(len(depths))),
        "in_chans": 3 if patches is None else patches.shape[1],
        "patch_size": 4 if patches is None else patches.shape[2],
        "mlp_ratio": _mlp_ratio(state, embed_dim),
        "extra_norm_interval": _extra_norm_interval(state),
        "attention": "cosine" if cosine else "dot",
        "norm": _norm(state, embed_dim, "res-post" if cosine else "pre"),
        "position_bias": "table" if has_table else "log_cpb",
    }
    if has_table:
        windows = _windows_of_tables(state, len(depths))
        stride = settings["patch_size"] * 2 ** (len(depths) - 1)
        # V1 files do not contain the image size. In V1 training the grid of the last stage is one window.
        usual = Geometry((windows[-1][0] * stride, windows[-1][1] * stride))
        window = (max(w[0] for w in windows), max(w[1] for w in windows))
        geometry = Geometry(None, window, windows).or_else(geometry).or_else(usual)
    if geometry.image_size is None or geometry.window_size is None:
        raise ValueError(
            "cannot infer the image and window size of training, on which the position bias depends, from the tensors "
            "or the file name: give both (image_size=256, window_size=16; on the command line --image-size 256 "
            "--window-size 16; for a recipe, create an export first with `simmim convert`)"
        )
    return SwinConfig(**settings, **geometry._asdict())


def geometry_of_buffers(state: State) -> Geometry:
    """Infer the geometry from buffers in official files: index, coordinates and shift masks of every block.

    The coordinate c at the edge of the current window W determines the reference window r, see
    :func:`swin.position_bias.log_axis`: ``8^c - 1 = 8 (W - 1) / (r - 1)``.
    """
    windows: dict[int, Pair] = {}
    references: dict[int, Pair] = {}
    grids: dict[int, Pair] = {}
    for name, tensor in state.items():
        if not (match := re.search(r"layers\.(\d+)\.blocks\.\d+\.(.+)$", name)):
            continue
        stage, kind = int(match[1]), match[2].rpartition(".")[2]
        if kind == "relative_position_index":
            windows.setdefault(stage, _square(tensor.shape[0]))
        elif kind == "relative_coords_table" and tensor.ndim == 4:
            windows[stage] = ((tensor.shape[1] + 1) // 2, (tensor.shape[2] + 1) // 2)
            references[stage] = _references(tensor)
        elif kind == "attn_mask" and tensor.ndim == 3:
            per_side, side = math.isqrt(tensor.shape[0]), math.isqrt(tensor.shape[1])
            grids[stage] = (per_side * side, per_side * side)
    if not windows:
        return Geometry()
    window = (max(w[0] for w in windows.values()), max(w[1] for w in windows.values()))
    clamped = {stage: w for stage, w in windows.items() if w[0] < window[0] or w[1] < window[1]}
    image_size = None
    for stage, (h, w) in [*grids.items(), *clamped.items()]:
        image_size = image_size or (h * 4 * 2**stage, w * 4 * 2**stage)
    complete = sorted(references) == list(range(len(references)))
    return Geometry(image_size, window, tuple(references[i] for i in sorted(references)) if complete else None)


def geometry_of_name(name: str, num_stages: int) -> Geometry:
    """Infer the geometry from a file name.

    ``...window12to16_192to256...`` means trained at 192 px in windows of 12, then at 256 px in windows of 16.
    """
    match = _FILE_NAME.search(name)
    if not match:
        return Geometry()
    first_window, window, first_image, image = (int(part) if part else None for part in match.groups())
    assert first_window is not None and first_image is not None
    grids = [first_image // (4 * 2**stage) for stage in range(num_stages)]
    references = tuple(as_pair(max(1, min(first_window, grid)), "window") for grid in grids)
    return Geometry(as_pair(image or first_image, "image"), as_pair(window or first_window, "window"), references)


def geometry_of_json(config: dict[str, Any], num_stages: int) -> Geometry:
    """Read the geometry from the ``config.json`` of transformers or timm."""
    arguments = config.get("model_args") or {}
    input_size = (config.get("pretrained_cfg") or {}).get("input_size") or []  # channels, height, width
    size = config.get("image_size") or arguments.get("img_size") or input_size[1:]
    window = config.get("window_size") or arguments.get("window_size")
    reference = config.get("pretrained_window_sizes") or arguments.get("pretrained_window_sizes")
    known = Geometry(
        as_pair(size, "image_size") if size else None,
        as_pair(window, "window_size") if window else None,
        tuple(as_pair(side, "pretrained_window_sizes") for side in reference) if reference and all(reference) else None,
    )
    return known.or_else(geometry_of_name(config.get("architecture") or "", num_stages))


def _stage_tensors(state: State, stage: int) -> Iterator[tuple[int, str, Tensor]]:
    """Yield ``(block, name inside the block, tensor)`` for the tensors of a stage."""
    for name, tensor in state.items():
        match = _BLOCK.match(name)
        if match and int(match[1]) == stage:
            yield int(match[2]), match[3], tensor


def _depths(state: State) -> tuple[int, ...]:
    depths: dict[int, int] = {}
    for name in state:
        if match := _BLOCK.match(name):
            depths[int(match[1])] = max(depths.get(int(match[1]), 0), int(match[2]) + 1)
    if not depths or sorted(depths) != list(range(len(depths))):
        raise ValueError(
            f"found blocks in stages {sorted(depths)}: expected a complete Swin encoder with stages from 0"
        )
    return tuple(depths[stage] for stage in range(len(depths)))


def _heads(state: State, stage: int) -> int:
    axis = {"attn.logit_scale": 0, "attn.cpb_mlp.2.weight": 0, "attn.relative_position_bias.table": 1}
    for _, name, tensor in _stage_tensors(state, stage):
        if name in axis:
            return tensor.shape[axis[name]]
    raise ValueError(
        f"cannot infer the number of heads of stage {stage}: no tensor has it. Expected a complete Swin encoder"
    )


def _mlp_ratio(state: State, embed_dim: int) -> float:
    for name, tensor in state.items():
        if (match := _BLOCK.match(name)) and match[3] == "mlp.fc1.bias":
            return tensor.shape[0] / (embed_dim * 2 ** int(match[1]))
    return 4.0


def _extra_norm_interval(state: State) -> int:
    """Infer the interval n of extra norms, which follow blocks n, 2n, 3n, ... of a stage."""
    matches = [match for match in map(_BLOCK.match, state) if match and match[3].startswith("norm3.")]
    return math.gcd(*(int(match[2]) + 1 for match in matches))


def _norm(state: State, embed_dim: int, default: str) -> str:
    """Infer ``norm`` from a merging layer, whose norm has 2 c channels after the reduction and 4 c before it."""
    for name, tensor in state.items():
        if match := re.match(r"^layers\.(\d+)\.downsample\.norm\.", name):
            return "pre" if tensor.shape[0] == 4 * embed_dim * 2 ** int(match[1]) else "res-post"
    return default


def _windows_of_tables(state: State, num_stages: int) -> tuple[Pair, ...]:
    """Infer the window of every stage from its bias table, which has (2 w - 1)^2 rows."""
    windows = []
    for stage in range(num_stages):
        rows = next(
            (t.shape[0] for _, n, t in _stage_tensors(state, stage) if n == "attn.relative_position_bias.table"), 0
        )
        side = (_square(rows)[0] + 1) // 2
        windows.append((side, side))
    return tuple(windows)


def _square(count: int) -> Pair:
    """Return the sides of a square of ``count`` tokens or offsets."""
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(
            f"windows of {count} tokens or offsets are not square: only native exports support such encoders"
        )
    return side, side


def _references(table: Tensor) -> Pair:
    """Infer the reference window from the official coordinates ``(1, 2 wh - 1, 2 ww - 1, 2)``."""
    sides = []
    for axis in (1, 2):
        window = (table.shape[axis] + 1) // 2
        edge = table[..., axis - 1].max().item() if window > 1 else 0.0
        sides.append(round(8 * (window - 1) / (8**edge - 1)) + 1 if edge > 0 else 1)
    return sides[0], sides[1]
