"""Saving and loading of encoders, and errors for corrupt files."""

from __future__ import annotations

import json

import pytest
import torch

import swin


@pytest.fixture
def encoder():
    return swin.make_encoder(
        "swinv2_tiny", embed_dim=8, depths=(1, 2), num_heads=(1, 2), image_size=(32, 48), window_size=(4, 6), in_chans=5
    )


def test_saved_encoder_loads_bit_exactly(encoder, tmp_path):
    swin.save_encoder(encoder, tmp_path, about={"pixels": {"mean": [0.5]}})
    loaded = swin.load_encoder(tmp_path)
    assert loaded.config == encoder.config
    images = torch.randn(1, 5, 32, 48)
    assert torch.equal(loaded(images), encoder(images))
    assert swin.load_description(tmp_path)["pixels"] == {"mean": [0.5]}


def test_description_contains_reference_windows(tmp_path):
    encoder = swin.make_encoder("swinv2_tiny", embed_dim=8, num_heads=(1, 1, 1, 1), image_size=192, window_size=12)
    swin.save_encoder(encoder, tmp_path, about={})
    description = json.loads((tmp_path / "encoder.json").read_text())
    assert description["encoder"]["reference_windows"] == [[12, 12], [12, 12], [12, 12], [6, 6]]


def test_missing_and_corrupt_files_are_refused(encoder, tmp_path):
    with pytest.raises(ValueError, match=r"no encoder.json in"):
        swin.load_encoder(tmp_path)
    swin.save_encoder(encoder, tmp_path, about={})
    weights = tmp_path / "encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot read .*encoder.safetensors"):
        swin.load_encoder(tmp_path)
    (tmp_path / "encoder.json").write_text("[]")
    with pytest.raises(ValueError, match="is not an encoder description"):
        swin.load_encoder(tmp_path)


def test_other_formats_and_mismatched_weights_are_refused(encoder, tmp_path):
    swin.save_encoder(encoder, tmp_path, about={})
    description = swin.load_description(tmp_path)
    description["encoder"]["embed_dim"] = 16
    (tmp_path / "encoder.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="does not fit its"):
        swin.load_encoder(tmp_path)
    description["format"] = 2
    (tmp_path / "encoder.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="format 2, this version reads 1"):
        swin.load_encoder(tmp_path)
