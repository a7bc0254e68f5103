"""Windows over a token grid: padding, shifting, partitioning, and attention masks.

Letters: b batch, f h w token grid, c channels, n windows, t tokens per window.

All functions depend only on sizes and work for every grid, including those that the window does not divide; a grid is
``(h, w)``, or ``(f, h, w)`` for a video. The order is fixed: pad at the end of every axis, then roll, then partition.
This way the shifted windows of a padded grid still contain only neighboring tokens.
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
CACHE_SIZE = 128
# einops patterns by the number of axes.
_GRID = {2: "b (nh th) (nw tw) c", 3: "b (nf tf) (nh th) (nw tw) c"}
_WINDOWS = {2: "(b nh nw) (th tw) c", 3: "(b nf nh nw) (tf th tw) c"}


def cache_tensors(make: Callable[P, T]) -> Callable[P, T]:
    """Cache the tensors that a pure function of sizes returns, so that all blocks of the same sizes share them.

    ``functools.lru_cache`` is not enough, because some tensors must not be cached:

    - while ``torch.compile`` or ``torch.export`` traces a model, they belong to the trace;
    - under ``FakeTensorMode``, which plans memory, they have a subclass of Tensor and hold no values;
    - in inference mode they could not be used in training later, so they are made outside of it.

    The cache holds ``CACHE_SIZE`` results and drops the oldest first.
    """
    cache: dict[tuple, T] = {}

    @wraps(make)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return make(*args, **kwargs)
        key = (args, *kwargs.items())
        if key not in cache:
            with torch.inference_mode(False):
                result = make(*args, **kwargs)
            if isinstance(result, Tensor) and type(result) is not Tensor:
                return result
            if len(cache) >= CACHE_SIZE:
                del cache[next(iter(cache))]
            cache[key] = result
        return cache[key]

    return wrapper


class WindowLayout(NamedTuple):
    """Window size, shift and padding with which one block partitions a grid."""

    window: Size
    shift: Size
    padding: Size
    """Frames added at the end, rows at the bottom and columns at the right."""


def fit_windows(grid: Size, window_size: Size, shifted: bool) -> WindowLayout:
    """Compute window, shift and padding for a grid.

    An axis on which the window covers the whole grid is not shifted, because attention is global there (Swin V1,
    section 3.2; the official code clamps the window to the grid in the same way).
    """
    window = effective_window(grid, window_size)
    shift = tuple(w // 2 if shifted and w < g else 0 for w, g in zip(window, grid, strict=True))
    padding = tuple(-g % w for w, g in zip(window, grid, strict=True))
    return WindowLayout(window, shift, padding)


def window_partition(x: Tensor, windows: WindowLayout) -> Tensor:
    """Pad, roll by the shift and partition: ``(b, h, w, c)`` or ``(b, f, h, w, c)`` -> ``(b n, t, c)``."""
    window, shift, padding = windows
    if any(padding):
        x = F.pad(x, [0, 0, *(amount for added in reversed(padding) for amount in (0, added))])
    if any(shift):
        x = torch.roll(x, [-amount for amount in shift], dims=_axes(shift))
    return _partition(x, window)


def window_reverse(x: Tensor, windows: WindowLayout, grid: Size) -> Tensor:
    """Undo :func:`window_partition`: ``(b n, t, c)`` -> ``(b, h, w, c)`` or ``(b, f, h, w, c)``."""
    window, shift, padding = windows
    counts = [(g + p) // w for g, p, w in zip(grid, padding, window, strict=True)]
    pattern = f"{_WINDOWS[len(grid)]} -> {_GRID[len(grid)]}"
    x = rearrange(x, pattern, **_named("n", counts), **_named("t", window))
    if any(shift):
        x = torch.roll(x, shift, dims=_axes(shift))
    return x[:, *(slice(size) for size in grid)] if any(padding) else x


def _partition(x: Tensor, window: Size) -> Tensor:
    """Partition a padded and rolled grid."""
    return rearrange(x, f"{_GRID[len(window)]} -> {_WINDOWS[len(window)]}", **_named("t", window))


def _named(letter: str, sizes: Sequence[int]) -> dict[str, int]:
    """Name the sizes of the grid axes for einops: ``th`` and ``tw`` for the letter t."""
    return {letter + axis: size for axis, size in zip("fhw"[-len(sizes) :], sizes, strict=True)}


def _axes(sizes: Size) -> list[int]:
    return list(range(1, len(sizes) + 1))


@cache_tensors
def attention_mask(grid: Size, windows: WindowLayout, device: torch.device) -> Tensor | None:
    """Build the attention mask: bool ``(n, t, t)``, True where a query may attend to a key; None if all may.

    Rolling moves tokens from one side of the grid into the last windows on the opposite side. A token attends to the
    tokens of its window that come from the same side, and real tokens never attend to padding. Padding attends to
    padding, which keeps its softmax finite; :func:`window_reverse` removes its output.
    """
    window, shift, padding = windows
    if not any(shift) and not any(padding):
        return None
    sides = torch.meshgrid(*(_side(*axis) for axis in zip(grid, padding, shift, strict=True)), indexing="ij")
    side = torch.zeros_like(sides[0])
    for axis_side in sides:
        side = torch.where((side < 0) | (axis_side < 0), -1, side * 2 + axis_side)
    side = _partition(side[None, ..., None], window)[..., 0]
    return (side[:, :, None] == side[:, None, :]).to(device)


def _side(grid: int, padding: int, shift: int) -> Tensor:
    """Label the positions of one axis after the roll: 1 if rolled around the edge, 0 if not, -1 for padding."""
    position = torch.roll(torch.arange(grid + padding, device="cpu"), -shift)
    return torch.where(position >= grid, -1, (position < shift).long())


@cache_tensors
def relative_index(window: Size, device: torch.device) -> Tensor:
    """Compute the row in a table of relative offsets for every pair of tokens: int64 ``(t, t)``.

    The row is ``(dy + wh - 1) * (2 ww - 1) + (dx + ww - 1)`` with ``(dy, dx)`` = query minus key; for a video
    ``(df, dy, dx)`` is numbered in the same way, time first.
    """
    coordinates = torch.meshgrid(*(torch.arange(size, device="cpu") for size in window), indexing="ij")
    row = torch.zeros((), dtype=torch.int64, device="cpu")
    for size, coordinate in zip(window, coordinates, strict=True):
        offset = coordinate.flatten()[:, None] - coordinate.flatten()[None, :]
        row = row * (2 * size - 1) + offset + size - 1
    return row.to(device)
