"""Tests of masks and the counter-based generator: exact counts, determinism, expansion."""

from __future__ import annotations

import math

import pytest
import torch

from simmim.masking import MaskGenerator, expand_mask
from simmim.rng import permutation, random_bits, uniform


def keys(n: int, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((n,), epoch), torch.arange(n)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.6, 0.75, 0.9])
@pytest.mark.parametrize(("size", "patch"), [((192, 192), 32), ((64, 96), 8), ((96, 32), 16), ((80, 8), 8)])
def test_number_of_masked_patches_is_exact(size, patch, ratio):
    masks = MaskGenerator(size, patch, ratio)
    mask = masks(*keys(50))
    count = (size[0] // patch) * (size[1] // patch)
    assert mask.dtype == torch.bool and mask.shape == (50, size[0] // patch, size[1] // patch)
    assert (mask.sum(dim=(1, 2)) == math.ceil(round(ratio * count, 9))).all()


def test_paper_settings_mask_22_patches():
    assert MaskGenerator((192, 192), 32, 0.6).num_masked == 22


def test_mask_depends_only_on_seed_epoch_and_index():
    masks = MaskGenerator((192, 192))
    epoch, index = keys(20)
    masked = masks(epoch, index)
    assert torch.equal(masks(epoch[7:9], index[7:9]), masked[7:9])
    assert torch.equal(masks(epoch.flip(0), index.flip(0)), masked.flip(0))
    assert not torch.equal(masks(epoch + 1, index), masked)
    assert not torch.equal(MaskGenerator((192, 192), seed=1)(epoch, index), masked)
    assert len({tuple(m.flatten().tolist()) for m in masked}) == 20


def test_every_patch_is_masked_equally_often():
    frequency = MaskGenerator((64, 64), 8, 0.6)(*keys(4000)).float().mean(dim=0)
    expected = 39 / 64
    assert (frequency - expected).abs().max() < 5 * math.sqrt(expected * (1 - expected) / 4000)


def test_expand_mask_repeats_values():
    mask = torch.tensor([[[True, False], [False, True]]])
    expanded = expand_mask(mask, 3)
    assert expanded.shape == (1, 6, 6)
    assert expanded[0, :3, :3].all() and not expanded[0, :3, 3:].any()
    assert torch.equal(expanded[:, ::3, ::3], mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((192, 192), 28), "28 does not divide the image size 192 x 192: choose one of 4, 6, 8"),
        (((100, 101), 32), "no mask patch of at least 4 px divides both sides"),
        (((192, 192), 64, 0.9), "masks 9 of 9 mask patches"),
        (((32, 32), 32, 0.6), "masks 1 of 1 mask patches"),
    ],
)
def test_invalid_mask_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskGenerator(*arguments)


def test_random_numbers_are_uniform_and_streams_uncorrelated():
    epoch, index = keys(2000)
    u = uniform("crop", 0, epoch, index, 8)
    assert u.min() >= 0 and u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=0.01) and u.var().item() == pytest.approx(1 / 12, abs=0.005)
    correlation = torch.corrcoef(torch.cat([u, uniform("mask", 0, epoch, index, 8)], dim=1).T)
    assert (correlation - torch.eye(16)).abs().max() < 0.1
    assert random_bits("crop", 0, epoch, index, 8).unique().numel() == 16000


def test_random_numbers_are_stable_across_versions():
    """Runs that an earlier version started must resume with the same random numbers."""
    bits = random_bits("mask", 3, torch.tensor([1, 2]), torch.tensor([5, 1 << 40]), 2)
    assert bits.tolist() == FROZEN_BITS
    assert permutation(0, 0, 6).tolist() == FROZEN_ORDER


FROZEN_BITS = [[6713227248777135062, 5412709083655710349], [4956942946716182364, 3717193887314378158]]
FROZEN_ORDER = [1, 0, 2, 5, 4, 3]
