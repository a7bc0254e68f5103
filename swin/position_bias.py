"""Relative position bias: continuous in log-spaced or linear coordinates, or one table entry per offset.

Letters: t tokens per window, m heads. An offset is query position minus key position, ``(dy, dx)`` in tokens, or
``(df, dy, dx)`` in a video. :func:`swin.windows.relative_index` defines the row of each offset in a table.
Shapes are written for images; in a video the time axis comes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from swin.config import Size, effective_window
from swin.linear import Linear
from swin.weights.state_dict_names import CPB_MLP_LAYERS
from swin.windows import cache_tensors, relative_index

TableResampling = Literal["bicubic", "geometric"]


def log_axis(offset: Tensor, reference: int) -> Tensor:
    """Compute the log-spaced coordinate of an offset ``d`` for a reference window ``r``, as the official code does::

        u = 8 d / (r - 1)
        coordinate = sign(u) log2(1 + |u|) / log2(8)

    The edge of the reference window has the coordinate log2(9) / 3 = 1.0566. A reference window of one token would
    divide by zero and is treated as two tokens.
    """
    u = offset / max(reference - 1, 1) * 8
    return torch.sign(u) * torch.log2(1 + u.abs()) / math.log2(8)


def log_paper_axis(offset: Tensor, reference: int) -> Tensor:
    """Compute ``sign(d) ln(1 + |d|)`` (Swin V2, equation 4), which does not depend on the reference window."""
    return torch.sign(offset) * torch.log1p(offset.abs())


def linear_axis(offset: Tensor, reference: int) -> Tensor:
    """Compute ``d / (r - 1)``, 1 at the edge of the reference window (linear-spaced variant of Swin V2, table 1)."""
    return offset / max(reference - 1, 1)


Axis = Callable[[Tensor, int], Tensor]


@cache_tensors
def coordinates(axis: Axis, window: Size, reference: Size, device: torch.device) -> Tensor:
    """Compute the coordinates of all offsets inside a window: float32 ``((2 wh - 1) (2 ww - 1), 2)``.

    The current window determines only which offsets occur, so an offset has the same coordinate at every window size.
    Always float32, because the published weights were trained with float32 coordinates.
    """
    offsets = (torch.arange(-(size - 1), size, dtype=torch.float32, device="cpu") for size in window)
    grid = torch.meshgrid(*(axis(d, r) for d, r in zip(offsets, reference, strict=True)), indexing="ij")
    return torch.stack(grid, dim=-1).flatten(0, -2).to(device)


class PositionBias(nn.Module):
    """Base class: looks up the bias of every pair of tokens in the table that a subclass makes.

    In evaluation mode without gradients the table of the last window is cached until a parameter changes.
    """

    reference_window: Size
    _cached: tuple[tuple[Any, ...], Tensor] | None = None
    """The window and the state of the parameters, and the table made from them."""

    def make_table(self, window: Size) -> Tensor:
        """Compute the bias of every offset and head: ``((2 wh - 1) (2 ww - 1), m)``."""
        raise NotImplementedError

    def forward(self, window: Size) -> Tensor:
        """Return the bias of every pair of tokens in a window: ``(m, t, t)``."""
        table = self._table(window)
        return table[relative_index(window, table.device)].permute(2, 0, 1)

    def _table(self, window: Size) -> Tensor:
        parameters = list(self.parameters())
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or parameters[0].is_inference():
            return self.make_table(window)
        state = (window, *((p.data_ptr(), p._version, p.dtype) for p in parameters))
        if self._cached is None or self._cached[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._cached = state, self.make_table(window)
        return self._cached[1]

    def train(self, mode: bool = True) -> PositionBias:
        self._cached = None
        return super().train(mode)


class ContinuousBias(PositionBias):
    """``B(dy, dx) = 16 sigmoid(MLP(coordinates))``, with a small network per block (Swin V2, equation 3).

    The factor 16 comes from the official code; the paper does not mention it.
    """

    def __init__(self, axis: Axis, num_heads: int, reference_window: Size, hidden: int = 512) -> None:
        super().__init__()
        self.axis = axis
        self.reference_window = reference_window
        hidden_name, output_name = CPB_MLP_LAYERS
        self.add_module(hidden_name, Linear(len(reference_window), hidden))
        self.add_module(output_name, Linear(hidden, num_heads, bias=False))

    @property
    def layers(self) -> tuple[Linear, Linear]:
        """The hidden layer and the output layer of the network."""
        hidden, output = self.children()
        return cast(Linear, hidden), cast(Linear, output)

    def make_table(self, window: Size) -> Tensor:
        hidden, output = self.layers
        x = coordinates(self.axis, window, self.reference_window, hidden.weight.device).to(hidden.weight.dtype)
        return 16 * torch.sigmoid(output(F.relu(hidden(x), inplace=True)))


class BiasTable(PositionBias):
    """One parameter per head and offset of the reference window (Swin V1, section 3.2).

    A smaller window, as on a small grid, uses the entries of its own offsets. For a larger window the table is
    resampled bicubically, as the official code does once when it loads weights.
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
    """Build the position bias of a kind, one of the values of ``SwinConfig.position_bias``."""
    if kind == "table":
        return BiasTable(num_heads, reference_window)
    axis = {"log_cpb": log_axis, "log_cpb_paper": log_paper_axis, "linear_cpb": linear_axis}[kind]
    return ContinuousBias(axis, num_heads, reference_window)


def resample_table(table: Tensor, old: Size, new: Size, method: TableResampling = "bicubic") -> Tensor:
    """Resample a bias table ``((2 wh - 1) (2 ww - 1), m)`` from the window ``old`` to the window ``new``.

    ``bicubic`` stretches the whole field of offsets evenly (V1 and V2 official code). ``geometric`` moves near offsets
    little: the k-th old offset moves to ``1 + q + ... + q^(k-1)``, with q such that the outermost one reaches the new
    edge, and a bicubic spline is evaluated at the integer offsets (SimMIM's and BEiT's code; here q may also be
    below 1, to shrink a window, and has no upper limit). Along time, entries of offsets that both windows contain are
    copied, because the interval between frames does not change; larger offsets repeat the last entry.

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
    """Compute the positions of offsets 1 .. old - 1 after resampling to a window ``new``: float64 ``(old - 1,)``.

    ``p_k = (q^k - 1) / (q - 1)`` with ``p_(old-1) = new - 1``; q is found by bisection.
    """
    powers = torch.arange(old - 1, dtype=torch.float64, device="cpu")
    low, high = 0.0, float(max(new, 2))
    for _ in range(100):
        q = (low + high) / 2
        low, high = (low, q) if (q**powers).sum().item() > new - 1 else (q, high)
    return torch.cumsum(high**powers, dim=0)


def _geometric_matrix(old: int, new: int) -> Tensor:
    """Build the matrix from old to new offsets of one axis: float64 ``(2 new - 1, 2 old - 1)``."""
    if min(old, new) <= 2:
        # With one or two offsets the ratio is undefined: copy common offsets and repeat the last for larger ones.
        offset = torch.arange(-(new - 1), new, device="cpu").clamp(1 - old, old - 1)
        return F.one_hot(offset + old - 1, 2 * old - 1).double()
    positive = geometric_positions(old, new)
    knots = torch.cat([-positive.flip(0), positive.new_zeros(1), positive])
    return _spline_matrix(knots, torch.arange(-(new - 1), new, dtype=torch.float64, device="cpu"))


def _spline_matrix(x: Tensor, at: Tensor) -> Tensor:
    """Build the matrix ``(len(at), len(x))`` from values at the knots ``x`` to values of their cubic spline at ``at``.

    Boundary conditions are not-a-knot (the third derivative is continuous at the second knot), as in SciPy's
    interpolating splines. Needs at least five knots.
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
