"""Linear maps with the weights that a Swin Transformer starts from."""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """A linear map that starts from a truncated normal (std 0.02) and a bias of zero (official initialisation)."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
