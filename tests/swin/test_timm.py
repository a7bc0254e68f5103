"""Against timm's Swin V2 with the weights carried across: outputs and gradients, float64.

timm rolls before it pads, so it is a reference only where windows divide the grid.
"""

from __future__ import annotations

import pytest
import timm
import torch

import swin


def from_timm(state: dict) -> dict:
    """timm keeps a merging layer at the start of the next stage, the official code at the end of this one."""
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        renamed[".".join(parts)] = value
    return renamed


@pytest.mark.parametrize(("image_size", "window_size"), [(128, 4), (64, 8), (96, 6)])
def test_outputs_and_gradients(image_size, window_size):
    torch.manual_seed(0)
    theirs = timm.models.swin_transformer_v2.SwinTransformerV2(
        img_size=image_size,
        window_size=window_size,
        embed_dim=24,
        depths=(2, 2, 2),
        num_heads=(2, 4, 8),
        num_classes=0,
        drop_path_rate=0.0,
    ).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    ours = swin.make_encoder(
        "swinv2_tiny",
        embed_dim=24,
        depths=(2, 2, 2),
        num_heads=(2, 4, 8),
        image_size=image_size,
        window_size=window_size,
    ).double()
    ours.load_state_dict(from_timm(theirs.state_dict()), strict=True)

    images = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    expected, got = theirs.forward_features(images), ours(images)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)

    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    gradients = from_timm({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-9, msg=name)
