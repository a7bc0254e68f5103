"""Linear layer with the initialization of Swin Transformer."""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """Linear layer whose weights start as truncated normal (std 0.02) and biases as 0 (official initialization)."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
