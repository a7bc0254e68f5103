"""Windows over a token grid: padding, shifting, partitioning, and who may attend to whom.

Letters: b batch, f h w token grid, c channels, n windows, t tokens per window.

Everything here is a pure function of sizes and holds for any grid, also one that the window does
not divide; a grid is ``(h, w)``, or ``(f, h, w)`` of a video. The order is fixed: pad at the end of
every axis, then roll, then partition; so that the shifted windows of a padded grid still contain
neighbours only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from swin.config import Size, effective_window

P = ParamSpec("P")
T = TypeVar("T")
MOST_KEPT = 128
# By the number of axes.
_GRID = {2: "b (nh th) (nw tw) c", 3: "b (nf tf) (nh th) (nw tw) c"}
_WINDOWS = {2: "(b nh nw) (th tw) c", 3: "(b nf nh nw) (tf th tw) c"}


def kept(make: Callable[P, T]) -> Callable[P, T]:
    """Keep the tensors that a pure function of sizes makes, for all blocks that ask with the same sizes.

    While torch traces a model (compile, export, plan) they are made afresh: tensors of a trace are not real.
    """
    remembered: dict[tuple, T] = {}

    @wraps(make)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return make(*args, **kwargs)
        key = (args, *kwargs.items())
        if key not in remembered:
            with torch.inference_mode(False):  # must stay usable in training after an inference call
                made = make(*args, **kwargs)
            if isinstance(made, Tensor) and type(made) is not Tensor:
                return made
            if len(remembered) >= MOST_KEPT:
                del remembered[next(iter(remembered))]
            remembered[key] = made
        return remembered[key]

    return wrapper


class WindowLayout(NamedTuple):
    """How one block cuts a grid into windows."""

    window: Size
    shift: Size
    padding: Size
    """Frames added after the last, rows at the bottom and columns at the right."""


def fit_windows(grid: Size, window_size: Size, shifted: bool) -> WindowLayout:
    """Window, shift and padding for a grid.

    On an axis where the window covers the whole grid attention is global and there is nothing to
    shift (Swin V1, section 3.2, and the official clamp).
    """
    window = effective_window(grid, window_size)
    shift = tuple(w // 2 if shifted and w < g else 0 for w, g in zip(window, grid, strict=True))
    padding = tuple(-g % w for w, g in zip(window, grid, strict=True))
    return WindowLayout(window, shift, padding)


def window_partition(x: Tensor, windows: WindowLayout) -> Tensor:
    """``(b, h, w, c)`` or ``(b, f, h, w, c)`` -> ``(b n, t, c)``: pad, roll by the shift, cut."""
    window, shift, padding = windows
    if any(padding):
        x = F.pad(x, [0, 0, *(amount for added in reversed(padding) for amount in (0, added))])
    if any(shift):
        x = torch.roll(x, [-amount for amount in shift], dims=_axes(shift))
    return _cut(x, window)


def window_reverse(x: Tensor, windows: WindowLayout, grid: Size) -> Tensor:
    """The inverse of :func:`partition`: ``(b n, t, c)`` -> ``(b, h, w, c)`` or ``(b, f, h, w, c)``."""
    window, shift, padding = windows
    counts = [(g + p) // w for g, p, w in zip(grid, padding, window, strict=True)]
    pattern = f"{_WINDOWS[len(grid)]} -> {_GRID[len(grid)]}"
    x = rearrange(x, pattern, **_named("n", counts), **_named("t", window))
    if any(shift):
        x = torch.roll(x, shift, dims=_axes(shift))
    return x[:, *(slice(size) for size in grid)] if any(padding) else x


def _cut(x: Tensor, window: Size) -> Tensor:
    return rearrange(x, f"{_GRID[len(window)]} -> {_WINDOWS[len(window)]}", **_named("t", window))


def _named(letter: str, sizes: Sequence[int]) -> dict[str, int]:
    """Sizes of the axes of a grid as einops wants them: ``th`` and ``tw`` for the letter t."""
    return {letter + axis: size for axis, size in zip("fhw"[-len(sizes) :], sizes, strict=True)}


def _axes(sizes: Size) -> list[int]:
    return list(range(1, len(sizes) + 1))


@kept
def attention_mask(grid: Size, windows: WindowLayout, device: torch.device) -> Tensor | None:
    """Which pairs of tokens may attend: bool ``(n, t, t)``, or None when all may.

    Rolling brings the far side of the grid into the last windows. A token attends to the tokens of
    its window that come from the same side, and real tokens never attend to padding. Padding
    attends to itself, which keeps its softmax finite; its output is cut off by :func:`window_reverse`.
    """
    window, shift, padding = windows
    if not any(shift) and not any(padding):
        return None
    sides = torch.meshgrid(*(_side(*axis) for axis in zip(grid, padding, shift, strict=True)), indexing="ij")
    side = torch.zeros_like(sides[0])
    for of_axis in sides:
        side = torch.where((side < 0) | (of_axis < 0), -1, side * 2 + of_axis)
    side = _cut(side[None, ..., None], window)[..., 0]
    return (side[:, :, None] == side[:, None, :]).to(device)


def _side(grid: int, padding: int, shift: int) -> Tensor:
    """Along one axis after the roll: 0 for tokens in place, 1 for those rolled round, -1 for padding."""
    position = torch.roll(torch.arange(grid + padding, device="cpu"), -shift)
    return torch.where(position >= grid, -1, (position < shift).long())


@kept
def relative_index(window: Size, device: torch.device) -> Tensor:
    """Row of the table of relative offsets for every pair of tokens: int64 ``(t, t)``.

    Row ``(dy + wh - 1) * (2 ww - 1) + (dx + ww - 1)`` with ``(dy, dx)`` = query minus key; of a video
    ``(df, dy, dx)``, counted in the same way.
    """
    places = torch.meshgrid(*(torch.arange(size, device="cpu") for size in window), indexing="ij")
    row = torch.zeros((), dtype=torch.int64, device="cpu")
    for size, place in zip(window, places, strict=True):
        offset = place.flatten()[:, None] - place.flatten()[None, :]
        row = row * (2 * size - 1) + offset + size - 1
    return row.to(device)
