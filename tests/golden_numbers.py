"""Deterministic weights, images and masks of the golden entries (numbers of the official code)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ENTRIES: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "official_v2.json").read_text())


def fraction(x: Tensor) -> Tensor:
    return x - x.floor()


def weights(names_and_shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Values by official name: a low-discrepancy sequence around a base that suits the parameter."""
    result = {}
    for number, name in enumerate(sorted(names_and_shapes)):
        shape = names_and_shapes[name]
        j = torch.arange(math.prod(shape), dtype=torch.float64)
        noise = fraction(j * 0.6180339887498949 + number * 0.3819660112501051) - 0.5
        if "logit_scale" in name:
            base, amplitude = math.log(10), 1.0
        elif name.endswith("weight") and any(part.startswith("norm") for part in name.split(".")):
            base, amplitude = 1.0, 0.5
        elif len(shape) >= 2 and "mask_token" not in name and "table" not in name:
            base, amplitude = 0.0, math.sqrt(12 / math.prod(shape[1:]))
        else:
            base, amplitude = 0.0, 0.5
        result[name] = (base + amplitude * noise).view(shape)
    return result


def image(size: int, channels: int = 3) -> Tensor:
    j = torch.arange(2 * channels * size * size, dtype=torch.float64)
    return (4 * (fraction(j * 0.7548776662466927) - 0.5) + torch.sin(0.003 * j)).view(2, channels, size, size)


def patch_mask(cells: int = 6, masked: int = 22) -> Tensor:
    number = torch.arange(cells * cells).view(cells, cells)
    return torch.stack([(7 * number + 3 * n) % cells**2 < masked for n in range(2)])
