"""Random numbers as a pure function of (seed, stream, epoch, sample index): a counter-based generator.

Masks and augmentations drawn from it do not depend on the number of workers or processes or on earlier
draws, so a resumed run continues exactly and no generator state is ever saved.
The mixing function is the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15

# One stream per purpose, so that the mask of a sample is independent of its crop.
STREAMS = {"order": 1, "crop": 2, "mask": 3, "shapes": 4, "step": 5, "validation": 6, "grain": 7, "motion": 8}


def random_bits(stream: str, seed: int, epoch: Tensor, index: Tensor, count: int) -> Tensor:
    """Draw ``count`` independent 64-bit numbers for every sample.

    Args:
        stream: purpose of the numbers, a key of ``STREAMS``.
        epoch: int64 ``(n,)``, the epoch of each sample.
        index: int64 ``(n,)``, the index of each sample in its source.
        count: random numbers per sample.

    Returns:
        int64 ``(n, count)`` over the whole signed range, on the device of ``index``; the same on
        every device.
    """
    key = _mix(_mix(_constant(seed, index) + STREAMS[stream]) + epoch)
    key = _mix(key + index)
    counters = torch.arange(1, count + 1, device=index.device) * _signed(_GOLDEN)
    return _mix(key[:, None] + counters)


def uniform(stream: str, seed: int, epoch: Tensor, index: Tensor, count: int) -> Tensor:
    """Draw like :func:`random_bits`, but float64 in [0, 1)."""
    return _shift_right(random_bits(stream, seed, epoch, index, count), 11).double() * 2.0**-53


def derive_seed(stream: str, seed: int, *values: int) -> int:
    """Derive a non-negative seed for torch's own generators from a seed and any integers."""
    key = _constant(seed, torch.zeros(1, dtype=torch.int64)) + STREAMS[stream]
    for value in values:
        key = _mix(_mix(key) + value)
    return int(_shift_right(_mix(key), 1))


def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """Return the order of ``size`` samples in an epoch: int64 ``(size,)``."""
    generator = torch.Generator().manual_seed(derive_seed("order", seed, epoch))
    return torch.randperm(size, generator=generator)


def _constant(seed: int, like: Tensor) -> Tensor:
    return torch.full_like(like, _signed(seed * _GOLDEN))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift logically; torch's ``>>`` would extend the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """Return the signed 64-bit integer with the same low bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value
