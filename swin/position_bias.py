"""Continuous relative position bias in log-spaced coordinates (Swin V2, section 3.3)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from swin.config import Pair
from swin.windows import relative_index


@lru_cache(maxsize=128)
def log_coordinates(window: Pair, reference: Pair, device: torch.device) -> Tensor:
    """Log-spaced coordinates of all offsets inside a window: float32 ``((2 wh - 1) (2 ww - 1), 2)``.

    For an offset ``d`` along an axis whose reference window is ``r`` tokens wide::

        u = 8 d / (r - 1)
        coordinate = sign(u) log2(1 + |u|) / log2(8)

    This is the normalisation of the official code (the paper's equation 4 takes the natural log of
    the raw offset). The edge of the reference window lies at log2(9) / 3 = 1.0566. The current
    window only decides which offsets occur, so a shared offset has the same coordinate at any
    window size. A reference of one token would divide by zero and counts as two. Always rounded to
    float32, as the released weights were trained with.
    """

    def axis(size: int, reference_size: int) -> Tensor:
        offset = torch.arange(-(size - 1), size, dtype=torch.float32, device="cpu")
        u = offset / max(reference_size - 1, 1) * 8
        return torch.sign(u) * torch.log2(1 + u.abs()) / math.log2(8)

    with torch.inference_mode(False):
        rows, columns = axis(window[0], reference[0]), axis(window[1], reference[1])
        grid = torch.meshgrid(rows, columns, indexing="ij")
        return torch.stack(grid, dim=-1).flatten(0, 1).to(device)


class LogCPB(nn.Sequential):
    """``B(dy, dx) = 16 sigmoid(MLP(log coordinates))``, one value per head and offset (equation 3).

    The bound of 16 is the official code's; the paper does not name it.
    """

    def __init__(self, num_heads: int, reference_window: Pair, hidden: int = 512) -> None:
        super().__init__(nn.Linear(2, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, num_heads, bias=False))
        self.reference_window = reference_window

    def forward(self, window: Pair) -> Tensor:
        """The bias of every pair of tokens in a window: ``(heads, t, t)``."""
        weight: Tensor = self[0].weight  # type: ignore[assignment]
        coordinates = log_coordinates(window, self.reference_window, weight.device).to(weight.dtype)
        table = 16 * torch.sigmoid(super().forward(coordinates))
        return table[relative_index(window, weight.device)].permute(2, 0, 1)
