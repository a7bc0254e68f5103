"""Comparison with transformers' Swin V1 and V2, whose saved folders are imported, in float64.

Its V2 attends to padding and its V1 cannot run if a grid is smaller than the window, so it is a reference only where
the windows divide the grids. It adds the shift mask (-100) twice, which is negligible at these tolerances.
"""

from __future__ import annotations

import pytest
import torch
import transformers

import swin
from simmim.masking import MaskGenerator, expand_mask
from simmim.tasks.simmim import SimMIM

transformers.utils.logging.disable_progress_bar()
SMALL = {"embed_dim": 24, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "drop_path_rate": 0.0}
KINDS = {
    "v1": (transformers.SwinConfig, transformers.SwinModel),
    "v2": (transformers.Swinv2Config, transformers.Swinv2Model),
}


def save_theirs(model, folder):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.double().eval()


@pytest.mark.parametrize(("image_size", "window_size"), [(128, 4), (64, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_folder_is_imported_with_equal_outputs(kind, image_size, window_size, tmp_path):
    make_config, make_model = KINDS[kind]
    settings = {"pretrained_window_sizes": [8, 4, 3]} if kind == "v2" else {}
    theirs = save_theirs(
        make_model(make_config(image_size=image_size, window_size=window_size, **SMALL, **settings)), tmp_path
    )
    ours, report = swin.import_encoder(tmp_path)
    assert report.layout == "transformers" and not report.ignored
    assert ours.config.image_size == (image_size, image_size)
    assert ours.config.reference_windows == (((8, 8), (4, 4), (3, 3)) if kind == "v2" else ((4, 4),) * 3)
    images = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    with torch.no_grad():
        expected, got = theirs(images).last_hidden_state, ours.double()(images)
    torch.testing.assert_close(got.flatten(1, 2), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_transformers(kind, tmp_path):
    make_config, make_model = KINDS[kind]
    theirs = save_theirs(make_model(make_config(image_size=64, window_size=4, **SMALL)), tmp_path)
    ours = swin.import_encoder(tmp_path)[0].double()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    theirs(images).last_hidden_state.square().sum().backward()
    ours(images).square().sum().backward()
    for name in ("patch_embed.proj.weight", "layers.1.downsample.reduction.weight", "norm.weight"):
        parameter = dict(ours.named_parameters())[name]
        foreign = {
            "patch_embed.proj.weight": theirs.embeddings.patch_embeddings.projection.weight,
            "layers.1.downsample.reduction.weight": theirs.encoder.layers[1].downsample.reduction.weight,
            "norm.weight": theirs.layernorm.weight,
        }[name]
        torch.testing.assert_close(parameter.grad, foreign.grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_masked_loss_equals_transformers(kind, tmp_path):
    """Their masked image modeling is SimMIM without normalized targets; their loss adds 1e-5 to the patch count."""
    make_config = KINDS[kind][0]
    make_model = {"v1": transformers.SwinForMaskedImageModeling, "v2": transformers.Swinv2ForMaskedImageModeling}[kind]
    theirs = save_theirs(make_model(make_config(image_size=96, window_size=6, encoder_stride=16, **SMALL)), tmp_path)
    encoder, report = swin.import_encoder(tmp_path)
    assert sorted(set(report.ignored.values())) == [
        "the mask token of masked pretraining",
        "the reconstruction head of masked pretraining",
    ]
    masks = MaskGenerator((96, 96), 32, 0.6)
    ours = SimMIM(encoder, masks, mean=[0.0] * 3, std=[1.0] * 3).double()
    root = theirs.swin if kind == "v1" else theirs.swinv2
    with torch.no_grad():
        ours.mask_token.copy_(root.embeddings.mask_token[None])
        ours.head.weight.copy_(theirs.decoder[0].weight[:, :, 0, 0])
        ours.head.bias.copy_(theirs.decoder[0].bias)
        images, patch_mask = torch.randn(2, 3, 96, 96, dtype=torch.float64), masks(torch.arange(2), torch.arange(2))
        expected = theirs(images, bool_masked_pos=expand_mask(patch_mask, 8).flatten(1)).loss
        torch.testing.assert_close(ours.loss(images, patch_mask), expected, rtol=1e-8, atol=0)
