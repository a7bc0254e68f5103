"""Random numbers as a pure function of (seed, stream, epoch, sample index): a counter-based generator.

Masks and augmentations drawn from here do not depend on how many workers or processes there are or
on what was drawn before, so a resumed run continues exactly and no generator state is ever saved.
The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15

# One stream per purpose, so that the mask of a sample says nothing about its crop.
STREAMS = {"order": 1, "crop": 2, "mask": 3, "shapes": 4, "step": 5, "validation": 6, "grain": 7, "motion": 8}


def random_bits(stream: str, seed: int, epoch: Tensor, index: Tensor, count: int) -> Tensor:
    """``count`` independent 64-bit numbers for every sample.

    Args:
        stream: what the numbers are for, a key of ``STREAMS``.
        epoch: int64 ``(n,)``, the epoch in which each sample is seen.
        index: int64 ``(n,)``, the number of each sample in its source.

    Returns:
        int64 ``(n, count)`` over the whole signed range, on the device of ``index``; the same on
        every device.
    """
    key = _mix(_mix(_constant(seed, index) + STREAMS[stream]) + epoch)
    key = _mix(key + index)
    counters = torch.arange(1, count + 1, device=index.device) * _signed(_GOLDEN)
    return _mix(key[:, None] + counters)


def uniform(stream: str, seed: int, epoch: Tensor, index: Tensor, count: int) -> Tensor:
    """Like :func:`random_bits`, as float64 in [0, 1)."""
    return _shift_right(random_bits(stream, seed, epoch, index, count), 11).double() * 2.0**-53


def derive_seed(stream: str, seed: int, *numbers: int) -> int:
    """One non-negative seed for torch's own generators, from a seed and any numbers."""
    key = _constant(seed, torch.zeros(1, dtype=torch.int64)) + STREAMS[stream]
    for number in numbers:
        key = _mix(_mix(key) + number)
    return int(_shift_right(_mix(key), 1))


def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """The order of ``size`` samples in an epoch: int64 ``(size,)``."""
    generator = torch.Generator().manual_seed(derive_seed("order", seed, epoch))
    return torch.randperm(size, generator=generator)


def _constant(seed: int, like: Tensor) -> Tensor:
    return torch.full_like(like, _signed(seed * _GOLDEN))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's ``>>`` copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The signed 64-bit integer with the same low bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value
