"""Comparison with timm's Swin V1 and V2 at equal weights: outputs and gradients in float64.

timm's V2 rolls before it pads, so it is a reference only where the windows divide the grid.
"""

from __future__ import annotations

import pytest
import timm
import torch

import swin
from simmim.masking import MaskGenerator, expand_mask
from simmim.tasks.simmim import SimMIM
from swin.weights.state_dict_names import detect_layout, from_native, to_native

V1 = timm.models.swin_transformer.SwinTransformer
V2 = timm.models.swin_transformer_v2.SwinTransformerV2
SMALL = {"embed_dim": 24, "depths": (2, 2, 2), "num_heads": (2, 4, 8)}
NAMES = {V1: "swin_tiny", V2: "swinv2_tiny"}


def make_theirs(kind, image_size, window_size, **settings) -> torch.nn.Module:
    torch.manual_seed(0)
    theirs = kind(
        img_size=image_size, window_size=window_size, num_classes=0, drop_path_rate=0.0, **SMALL, **settings
    ).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return theirs


def make_ours(kind, image_size, window_size, theirs: torch.nn.Module, **settings) -> swin.SwinEncoder:
    ours = swin.make_encoder(NAMES[kind], image_size=image_size, window_size=window_size, **SMALL, **settings).double()
    ours.load_state_dict(native(theirs.state_dict()), strict=True)
    return ours


def native(state: dict) -> dict:
    assert detect_layout(list(state)) == "timm"
    return to_native(state, "timm")[0]


@pytest.mark.parametrize("kind", [V1, V2])
@pytest.mark.parametrize(("image_size", "window_size"), [(128, 4), (64, 8), (96, 6)])
def test_outputs_and_gradients_equal_timm(kind, image_size, window_size):
    theirs = make_theirs(kind, image_size, window_size)
    ours = make_ours(kind, image_size, window_size, theirs)

    images = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    expected, got = theirs.forward_features(images), ours(images)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)

    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    gradients = native({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", [V1, V2])
def test_exported_weights_load_into_timm(kind):
    theirs = make_theirs(kind, 64, 4)
    ours = make_ours(kind, 64, 4, theirs)
    fresh = make_theirs(kind, 64, 4, in_chans=3)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.5)
    fresh.load_state_dict(from_native(ours.state_dict(), "timm"), strict=True)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(fresh.forward_features(images), ours(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [V1, V2])
def test_masked_features_equal_timm(kind):
    """SimMIM replaces tokens between the patch embedding and the first stage of both versions."""
    theirs = make_theirs(kind, 96, 6)
    masks = MaskGenerator((96, 96), 32, 0.6)
    model = SimMIM(make_ours(kind, 96, 6, theirs), masks, mean=[0.0] * 3, std=[1.0] * 3).double()
    images, patch_mask = torch.randn(2, 3, 96, 96, dtype=torch.float64), masks(torch.arange(2), torch.arange(2))
    tokens = theirs.patch_embed(images)
    tokens = torch.where(expand_mask(patch_mask, 8)[..., None], model.mask_token, tokens)
    for stage in theirs.layers:
        tokens = stage(tokens)
    torch.testing.assert_close(model.masked_features(images, patch_mask), theirs.norm(tokens), rtol=1e-9, atol=1e-9)


def test_reference_windows_equal_pretrained_window_sizes_of_timm():
    """timm agrees with pretrained_window_sizes; without them (`set_input_size` leaves 0) every bias differs."""
    theirs = make_theirs(V2, 128, 8, pretrained_window_sizes=(6, 6, 3))
    ours = make_ours(V2, 128, 8, theirs, reference_windows=(6, 6, 3))
    images = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    torch.testing.assert_close(theirs.forward_features(images), ours(images), rtol=1e-9, atol=1e-9)
    shifted = make_ours(V2, 128, 8, theirs)
    assert (shifted(images) - ours(images)).abs().max() > 1e-3


def test_padding_of_timm_v2_differs():
    """12 x 12 tokens in windows of 8: timm's V2 rolls before it pads, so its shifted windows contain distant tokens."""
    theirs = make_theirs(V2, 96, 8, strict_img_size=False)
    ours = make_ours(V2, 96, 8, theirs)
    images = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    assert (theirs.forward_features(images) - ours(images)).abs().max() > 1e-3
