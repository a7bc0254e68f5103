"""Our numbers against those of the official code, float64, 1e-9 relative."""

from __future__ import annotations

import pytest
import torch

import swin
from simmim.masking import MaskGenerator
from simmim.tasks.simmim import SimMIM
from swin import SwinConfig, SwinEncoder
from tests import golden_numbers as golden

RELATIVE = 1e-9
SIMMIM = [name for name, entry in golden.ENTRIES.items() if "loss" in entry]
LOGITS = [name for name, entry in golden.ENTRIES.items() if "logits" in entry]


def encoder_for(entry: dict, **settings) -> SwinEncoder:
    arch = entry["arch"]
    return SwinEncoder(
        SwinConfig(
            embed_dim=arch["embed_dim"],
            depths=arch["depths"],
            num_heads=arch["num_heads"],
            image_size=entry["image_size"],
            window_size=entry["window"],
            **settings,
        )
    ).double()


def test_every_entry_is_used():
    assert len(SIMMIM) == 3 and len(LOGITS) == 5


@pytest.mark.parametrize("name", SIMMIM)
def test_simmim(name):
    entry = golden.ENTRIES[name]
    encoder = encoder_for(entry)
    masks = MaskGenerator((192, 192), 32, 0.6)
    assert masks.num_masked == entry["masked_cells"] == 22
    model = SimMIM(
        encoder, masks, mean=[0.0] * 3, std=[1.0] * 3, norm_target_window=entry["norm_target"] or None
    ).double()
    official = golden.weights({name: tuple(shape) for name, shape, _ in entry["parameters"]})
    ours = {official_name(name): parameter for name, parameter in model.named_parameters()}
    assert set(ours) == set(official)
    with torch.no_grad():
        for key, parameter in ours.items():
            parameter.copy_(official[key].view(parameter.shape))

    images, patch_mask = golden.image(192), golden.patch_mask()
    loss = model.loss(images, patch_mask)
    loss.backward()
    assert loss.item() == pytest.approx(entry["loss"], rel=RELATIVE)
    for key, _, norm in entry["parameters"]:
        assert ours[key].grad.norm().item() == pytest.approx(norm, rel=RELATIVE), key

    with torch.no_grad():
        same(model.masked_features(images, patch_mask).permute(0, 3, 1, 2), entry["features"])
        same(model.reconstruct(images, patch_mask).prediction, entry["prediction"])


@pytest.mark.parametrize("name", LOGITS)
def test_logits_with_reference_windows(name):
    entry = golden.ENTRIES[name]
    reference = entry["pretrained_window_sizes"]
    encoder = encoder_for(entry, reference_windows=tuple(reference) if any(reference) else None)
    head = fill(encoder, entry)
    assert_logits(encoder, head, entry)


@pytest.mark.parametrize("name", [name for name in LOGITS if "pre12" in name and "192" not in name])
def test_transfer_without_flags(name, tmp_path):
    """The encoder of 192 px, saved and loaded for another geometry, gives the official numbers there."""
    first, entry = golden.ENTRIES["v2_logits_192_w12_pre12_12_12_6"], golden.ENTRIES[name]
    encoder = encoder_for(first)
    head = fill(encoder, first)
    swin.save_encoder(encoder, tmp_path, about={})
    moved = swin.load_encoder(tmp_path, image_size=entry["image_size"], window_size=entry["window"])
    assert_logits(moved, head, entry)


def fill(encoder: SwinEncoder, entry: dict) -> dict[str, torch.Tensor]:
    """Golden values into the encoder; returns those of the classifier."""
    ours = dict(encoder.named_parameters())
    head = {"head.weight": (entry["num_classes"], 256), "head.bias": (entry["num_classes"],)}
    shapes = {key: tuple(parameter.shape) for key, parameter in ours.items()} | head
    assert sorted(shapes) == entry["parameters"]
    values = golden.weights(shapes)
    with torch.no_grad():
        for key, parameter in ours.items():
            parameter.copy_(values[key])
    return {key: values[key] for key in head}


@torch.no_grad()
def assert_logits(encoder: SwinEncoder, head: dict[str, torch.Tensor], entry: dict) -> None:
    features = encoder(golden.image(entry["image_size"])).mean(dim=(1, 2))
    logits = features @ head["head.weight"].T + head["head.bias"]
    torch.testing.assert_close(logits, torch.tensor(entry["logits"], dtype=torch.float64), rtol=RELATIVE, atol=1e-12)


def official_name(name: str) -> str:
    name = {"mask_token": "encoder.mask_token"}.get(name, name)
    return name.replace("head.", "decoder.0.")


def same(tensor: torch.Tensor, expected: dict) -> None:
    flat = tensor.flatten()
    assert list(tensor.shape) == expected["shape"]
    assert flat.norm().item() == pytest.approx(expected["l2"], rel=RELATIVE)
    assert flat.sum().item() == pytest.approx(expected["sum"], rel=RELATIVE)
    assert flat[:8].tolist() == pytest.approx(expected["first8"], rel=RELATIVE)
    assert flat[-8:].tolist() == pytest.approx(expected["last8"], rel=RELATIVE)
