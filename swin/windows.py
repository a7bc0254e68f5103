"""Windows over a token grid: padding, shifting, partitioning, and who may attend to whom.

Letters: b batch, h w token grid, c channels, n windows, t tokens per window.

Everything here is a pure function of sizes and holds for any grid, also one that the window does
not divide. The order is fixed: pad at the bottom and right, then roll, then partition; so that the
shifted windows of a padded grid still contain neighbours only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from swin.config import Pair, effective_window

P = ParamSpec("P")
T = TypeVar("T")
MOST_KEPT = 128


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


class Windows(NamedTuple):
    """How one block cuts a grid ``(h, w)`` into windows."""

    window: Pair
    shift: Pair
    padding: Pair
    """Rows added at the bottom and columns added at the right."""


def fit_windows(grid: Pair, window_size: Pair, shifted: bool) -> Windows:
    """Window, shift and padding for a grid.

    On an axis where the window covers the whole grid attention is global and there is nothing to
    shift (Swin V1, section 3.2, and the official clamp).
    """
    window = effective_window(grid, window_size)
    shift = tuple(w // 2 if shifted and w < g else 0 for w, g in zip(window, grid, strict=True))
    padding = tuple(-g % w for w, g in zip(window, grid, strict=True))
    return Windows(window, (shift[0], shift[1]), (padding[0], padding[1]))


def partition(x: Tensor, windows: Windows) -> Tensor:
    """``(b, h, w, c)`` -> ``(b n, t, c)``: pad, roll by the shift, cut."""
    (th, tw), shift, padding = windows
    if any(padding):
        x = F.pad(x, (0, 0, 0, padding[1], 0, padding[0]))
    if any(shift):
        x = torch.roll(x, (-shift[0], -shift[1]), dims=(1, 2))
    return rearrange(x, "b (nh th) (nw tw) c -> (b nh nw) (th tw) c", th=th, tw=tw)


def merge(x: Tensor, windows: Windows, grid: Pair) -> Tensor:
    """The inverse of :func:`partition`: ``(b n, t, c)`` -> ``(b, h, w, c)``."""
    (th, tw), shift, padding = windows
    nh, nw = (grid[0] + padding[0]) // th, (grid[1] + padding[1]) // tw
    x = rearrange(x, "(b nh nw) (th tw) c -> b (nh th) (nw tw) c", nh=nh, nw=nw, th=th, tw=tw)
    if any(shift):
        x = torch.roll(x, shift, dims=(1, 2))
    return x[:, : grid[0], : grid[1]] if any(padding) else x


@kept
def attention_mask(grid: Pair, windows: Windows, device: torch.device) -> Tensor | None:
    """Which pairs of tokens may attend: bool ``(n, t, t)``, or None when all may.

    Rolling brings the far side of the grid into the last windows. A token attends to the tokens of
    its window that come from the same side, and real tokens never attend to padding. Padding
    attends to itself, which keeps its softmax finite; its output is cut off by :func:`merge`.
    """
    (th, tw), shift, padding = windows
    if not any(shift) and not any(padding):
        return None
    rows = _side(grid[0], padding[0], th, shift[0])
    columns = _side(grid[1], padding[1], tw, shift[1])
    is_padding = (rows[:, None] < 0) | (columns[None, :] < 0)
    side = torch.where(is_padding, -1, rows[:, None] * 2 + columns[None, :])
    side = rearrange(side, "(nh th) (nw tw) -> (nh nw) (th tw)", th=th, tw=tw)
    return (side[:, :, None] == side[:, None, :]).to(device)


def _side(grid: int, padding: int, window: int, shift: int) -> Tensor:
    """Along one axis after the roll: 0 for tokens in place, 1 for those rolled round, -1 for padding."""
    position = torch.roll(torch.arange(grid + padding, device="cpu"), -shift)
    return torch.where(position >= grid, -1, (position < shift).long())


@kept
def relative_index(window: Pair, device: torch.device) -> Tensor:
    """Row of the table of relative offsets for every pair of tokens: int64 ``(t, t)``.

    Row ``(dy + wh - 1) * (2 ww - 1) + (dx + ww - 1)`` with ``(dy, dx)`` = query minus key.
    """
    wh, ww = window
    axis = partial(torch.arange, device="cpu")
    y, x = (part.flatten() for part in torch.meshgrid(axis(wh), axis(ww), indexing="ij"))
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return ((dy + wh - 1) * (2 * ww - 1) + dx + ww - 1).to(device)
