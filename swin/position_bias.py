"""Relative position bias: continuous in log-spaced or linear coordinates, or one table entry per offset.

Letters: t tokens per window, m heads. An offset is query minus key, ``(dy, dx)`` in tokens, or
``(df, dy, dx)`` in a video; the row of an offset is the one of :func:`swin.windows.relative_index`.
Shapes are written for two axes; a third one comes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from swin.config import Size, effective_window
from swin.linear import Linear
from swin.windows import kept, relative_index

TableResampling = Literal["bicubic", "geometric"]


def log_axis(offset: Tensor, reference: int) -> Tensor:
    """The official code's log-spaced coordinate of an offset ``d`` for a reference window ``r``::

        u = 8 d / (r - 1)
        coordinate = sign(u) log2(1 + |u|) / log2(8)

    The edge of the reference window lies at log2(9) / 3 = 1.0566. A reference of one token would
    divide by zero and counts as two.
    """
    u = offset / max(reference - 1, 1) * 8
    return torch.sign(u) * torch.log2(1 + u.abs()) / math.log2(8)


def log_paper_axis(offset: Tensor, reference: int) -> Tensor:
    """``sign(d) ln(1 + |d|)`` (Swin V2, equation 4); no reference window enters."""
    return torch.sign(offset) * torch.log1p(offset.abs())


def linear_axis(offset: Tensor, reference: int) -> Tensor:
    """``d / (r - 1)``: 1 at the edge of the reference window (the linear-spaced arm of Swin V2, table 1)."""
    return offset / max(reference - 1, 1)


Axis = Callable[[Tensor, int], Tensor]


@kept
def coordinates(axis: Axis, window: Size, reference: Size, device: torch.device) -> Tensor:
    """Coordinates of all offsets inside a window: float32 ``((2 wh - 1) (2 ww - 1), 2)``.

    The current window only decides which offsets occur, so a shared offset has the same coordinate
    at any window size. Always rounded to float32, as the released weights were trained with.
    """
    offsets = (torch.arange(-(size - 1), size, dtype=torch.float32, device="cpu") for size in window)
    grid = torch.meshgrid(*(axis(d, r) for d, r in zip(offsets, reference, strict=True)), indexing="ij")
    return torch.stack(grid, dim=-1).flatten(0, -2).to(device)


class PositionBias(nn.Module):
    """What every kind of bias shares: ``make_table(window)`` -> one bias per pair of tokens.

    In evaluation the table of the last window is kept until a parameter changes.
    """

    reference_window: Size
    _kept: tuple[tuple[Any, ...], Tensor] | None = None

    def make_table(self, window: Size) -> Tensor:
        """One bias per offset and head: ``((2 wh - 1) (2 ww - 1), m)``."""
        raise NotImplementedError

    def forward(self, window: Size) -> Tensor:
        """The bias of every pair of tokens in a window: ``(m, t, t)``."""
        table = self._table(window)
        return table[relative_index(window, table.device)].permute(2, 0, 1)

    def _table(self, window: Size) -> Tensor:
        parameters = list(self.parameters())
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or parameters[0].is_inference():
            return self.make_table(window)
        state = (window, *((p.data_ptr(), p._version, p.dtype) for p in parameters))
        if self._kept is None or self._kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = state, self.make_table(window)
        return self._kept[1]

    def train(self, mode: bool = True) -> PositionBias:
        self._kept = None
        return super().train(mode)


class ContinuousBias(PositionBias, nn.Sequential):
    """``B(dy, dx) = 16 sigmoid(MLP(coordinates))``, a small network per block (Swin V2, equation 3).

    The bound of 16 is the official code's; the paper does not name it.
    """

    def __init__(self, axis: Axis, num_heads: int, reference_window: Size, hidden: int = 512) -> None:
        first = Linear(len(reference_window), hidden)
        nn.Sequential.__init__(self, first, nn.ReLU(inplace=True), Linear(hidden, num_heads, bias=False))
        self.axis = axis
        self.reference_window = reference_window

    def make_table(self, window: Size) -> Tensor:
        weight: Tensor = self[0].weight  # type: ignore[assignment]
        x = coordinates(self.axis, window, self.reference_window, weight.device).to(weight.dtype)
        return 16 * torch.sigmoid(nn.Sequential.forward(self, x))


class BiasTable(PositionBias):
    """One free number per head and offset of the reference window (Swin V1, section 3.2).

    A window clamped by a small grid uses the entries of the offsets that it has; for a larger window
    the table is resampled bicubically, as the official code does once when it loads.
    """

    def __init__(self, num_heads: int, reference_window: Size) -> None:
        super().__init__()
        self.reference_window = reference_window
        self.table = nn.Parameter(torch.empty(math.prod(2 * size - 1 for size in reference_window), num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.table, std=0.02)

    def make_table(self, window: Size) -> Tensor:
        reference, inner = self.reference_window, effective_window(self.reference_window, window)
        field = self.table.unflatten(0, [2 * size - 1 for size in reference])
        field = field[*(slice(r - w, r + w - 1) for r, w in zip(reference, inner, strict=True))]
        return resample_table(field.flatten(0, -2), inner, window)


def make_position_bias(kind: str, num_heads: int, reference_window: Size) -> PositionBias:
    """The bias that :class:`swin.SwinConfig` calls ``kind``."""
    if kind == "table":
        return BiasTable(num_heads, reference_window)
    axis = {"log_cpb": log_axis, "log_cpb_paper": log_paper_axis, "linear_cpb": linear_axis}[kind]
    return ContinuousBias(axis, num_heads, reference_window)


def resample_table(table: Tensor, old: Size, new: Size, method: TableResampling = "bicubic") -> Tensor:
    """A bias table for another window: ``((2 wh - 1) (2 ww - 1), m)`` of ``old`` -> the same of ``new``.

    ``bicubic`` stretches the whole field of offsets evenly (V1 and V2 official code). ``geometric``
    keeps near offsets near: the k-th old offset moves to ``1 + q + ... + q^(k-1)``, with q such that
    the outermost one lands on the new edge, and a bicubic spline is read at the whole offsets
    (SimMIM's and BEiT's code; here q may also be below 1, which shrinks a window, and is not capped).
    In time, where the distance of frames stays, shared offsets stay and further ones repeat the last.

    Raises:
        ValueError: unknown method.
    """
    if method not in ("bicubic", "geometric"):
        raise ValueError(f"unknown table resampling {method!r}: expected bicubic or geometric")
    if len(old) == 3 and old[0] != new[0]:
        offset = torch.arange(1 - new[0], new[0], device=table.device).clamp(1 - old[0], old[0] - 1)
        table = table.unflatten(0, (2 * old[0] - 1, -1))[offset + old[0] - 1].flatten(0, 1)
    old, new = old[-2:], new[-2:]
    if old == new:
        return table
    field = rearrange(table, "(f y x) m -> (f m) y x", y=2 * old[0] - 1, x=2 * old[1] - 1)
    if method == "bicubic":
        field = F.interpolate(field[None], (2 * new[0] - 1, 2 * new[1] - 1), mode="bicubic")[0]
    else:
        rows, columns = (_geometric_matrix(*axis).to(table) for axis in zip(old, new, strict=True))
        field = torch.einsum("Yy, Xx, myx -> mYX", rows, columns, field)
    return rearrange(field, "(f m) y x -> (f y x) m", m=table.shape[1])


def geometric_positions(old: int, new: int) -> Tensor:
    """Where the offsets 1 .. old - 1 of a window move in a window of ``new``: float64 ``(old - 1,)``.

    ``p_k = (q^k - 1) / (q - 1)`` with ``p_(old-1) = new - 1``; q is found by bisection.
    """
    powers = torch.arange(old - 1, dtype=torch.float64, device="cpu")
    low, high = 0.0, float(max(new, 2))
    for _ in range(100):
        q = (low + high) / 2
        low, high = (low, q) if (q**powers).sum().item() > new - 1 else (q, high)
    return torch.cumsum(high**powers, dim=0)


def _geometric_matrix(old: int, new: int) -> Tensor:
    """The linear map of one axis from old to new offsets: float64 ``(2 new - 1, 2 old - 1)``."""
    if min(old, new) <= 2:
        # One or two offsets leave no ratio to choose: shared offsets stay, further ones repeat the last.
        offset = torch.arange(-(new - 1), new, device="cpu").clamp(1 - old, old - 1)
        return F.one_hot(offset + old - 1, 2 * old - 1).double()
    positive = geometric_positions(old, new)
    knots = torch.cat([-positive.flip(0), positive.new_zeros(1), positive])
    return _spline_matrix(knots, torch.arange(-(new - 1), new, dtype=torch.float64, device="cpu"))


def _spline_matrix(x: Tensor, at: Tensor) -> Tensor:
    """Values at the knots ``x`` -> values at ``at`` of the cubic spline through them: ``(len(at), len(x))``.

    The ends are not-a-knot (the third derivative continues through the second knot), as in SciPy's
    interpolating splines. At least five knots.
    """
    n, h = len(x), x.diff()
    values = torch.eye(n, dtype=x.dtype, device=x.device)
    slopes = values.diff(dim=0) / h[:, None]
    left, right = torch.zeros_like(values), torch.zeros_like(values)  # left @ curvature = right @ values
    inner = torch.arange(1, n - 1)
    left[inner, inner - 1], left[inner, inner], left[inner, inner + 1] = h[:-1], 2 * (h[:-1] + h[1:]), h[1:]
    right[1:-1] = 6 * slopes.diff(dim=0)
    left[0, :3] = torch.stack([h[1], -h[0] - h[1], h[0]])
    left[-1, -3:] = torch.stack([h[-1], -h[-2] - h[-1], h[-2]])
    curvature = torch.linalg.solve(left, right)
    i = (torch.searchsorted(x, at, right=True) - 1).clamp(0, n - 2)
    after, before, step = (at - x[i])[:, None], (x[i + 1] - at)[:, None], h[i, None]
    linear = (values[i] * before + values[i + 1] * after) / step
    bend = curvature[i] * before * (before**2 - step**2) + curvature[i + 1] * after * (after**2 - step**2)
    return linear + bend / (6 * step)
