"""Transfer of weights to other resolutions, windows and channel counts, and refused settings."""

from __future__ import annotations

import json

import pytest
import torch

import swin
from swin.position_bias import resample_table
from swin.weights.transfer import inflate_channels

SMALL = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2)}
PUBLISHED = ((12, 12), (12, 12), (12, 12), (6, 6))


def trained(name: str = "swinv2_tiny", **settings) -> swin.SwinEncoder:
    torch.manual_seed(0)
    encoder = swin.make_encoder(name, **(SMALL | {"image_size": 192, "window_size": 12} | settings))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return encoder


@pytest.fixture
def export(tmp_path):
    swin.save_encoder(trained(), tmp_path / "export", about={})
    return tmp_path / "export"


def biases(encoder: swin.SwinEncoder, window: tuple[int, int]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [block.attn.position_bias.make_table(window) for layer in encoder.layers for block in layer.blocks]


@pytest.mark.parametrize("position_bias", ["log_cpb", "linear_cpb", "log_cpb_paper"])
@pytest.mark.parametrize(("image_size", "window_size"), [(384, 24), ((256, 320), (16, 20)), (224, 14), (100, 5)])
def test_transfer_preserves_a_continuous_bias(position_bias, image_size, window_size, tmp_path):
    encoder = trained(position_bias=position_bias)
    swin.save_encoder(encoder, tmp_path, about={})
    moved = swin.load_encoder(tmp_path, image_size=image_size, window_size=window_size)
    assert moved.config.reference_windows == PUBLISHED
    for before, after in zip(biases(encoder, (10, 7)), biases(moved, (10, 7)), strict=True):
        assert torch.equal(before, after)
    images = torch.randn(1, 3, *moved.config.image_size)
    assert moved(images).isfinite().all()
    # The transferred encoder equals the old one with only the window size of its blocks changed.
    for block in (block for layer in encoder.layers for block in layer.blocks):
        block.window_size = moved.config.window_size
    torch.testing.assert_close(moved(images), encoder(images))


def test_chained_transfers_keep_the_original_reference_windows(export, tmp_path):
    for size, window in ((224, 14), (384, 24)):
        moved = swin.load_encoder(export, image_size=size, window_size=window)
        export = tmp_path / str(size)
        swin.save_encoder(moved, export, about={})
    description = swin.load_description(export)
    assert description["encoder"]["reference_windows"] == [list(window) for window in PUBLISHED]
    assert [step["image_size"] for step in description["history"]] == [[224, 224], [384, 384]]
    images = torch.randn(1, 3, 64, 64)
    back = swin.load_encoder(export, image_size=192, window_size=12)
    torch.testing.assert_close(back(images), trained()(images))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference_windows": (24, 24, 24, 12)}, "reference_windows .* contradicts the stored .*change every bias"),
        ({"embed_dim": 16}, "embed_dim 16 contradicts the stored 8: the weights depend on it"),
        ({"position_bias": "linear_cpb"}, "position_bias linear_cpb contradicts the stored log_cpb"),
        ({"patch_size": 2}, "patch_size 2 contradicts the stored 4"),
        ({"in_chans": 5}, "the weights have 3 channels, but in_chans is 5: set inflate='mean' or 'repeat'"),
        ({"in_chans": 5, "inflate": "copy"}, "unknown inflation 'copy': expected mean or repeat"),
        ({"resolution": 224}, "unknown encoder settings .'resolution'.: expected some of .*image_size"),
        ({"image_size": 64, "window_size": 24}, "window_size 24 x 24 is larger than the 16 x 16 tokens"),
        ({"image_size": 0}, "image_size must be one or two positive integers"),
        ({"window_size": "12"}, "window_size must be one or two positive integers"),
    ],
)
def test_contradicting_settings_are_refused_with_the_reason(export, settings, message):
    with pytest.raises(ValueError, match=message):
        swin.load_encoder(export, **settings)


def test_settings_equal_to_the_stored_ones_are_accepted(export):
    same = swin.load_encoder(export, embed_dim=8, reference_windows=[12, 12, 12, 6], num_heads=[1, 1, 2, 2])
    assert same.config == trained().config
    assert swin.load_encoder(export, drop_path=0.3).layers[3].blocks[1].drop_path.rate == pytest.approx(0.3)


@pytest.mark.parametrize("method", ["bicubic", "geometric"])
def test_tables_are_resampled_to_the_new_windows(method, tmp_path):
    encoder = trained("swin_tiny")
    swin.save_encoder(encoder, tmp_path, about={})
    moved = swin.load_encoder(tmp_path, image_size=256, window_size=16, table_resampling=method)
    assert moved.config.reference_windows == ((16, 16), (16, 16), (16, 16), (8, 8))
    old, new = encoder.layers[3].blocks[0].attn, moved.layers[3].blocks[0].attn
    expected = resample_table(old.position_bias.table, (6, 6), (8, 8), method)
    torch.testing.assert_close(new.position_bias.table, expected)
    assert all(
        parameter.is_contiguous() for parameter in moved.parameters()
    )  # FSDP cannot shard non-contiguous tensors
    assert moved.history == [
        {"step": "transfer", "image_size": [256, 256], "window_size": [16, 16], "table_resampling": method}
    ]
    assert swin.load_encoder(tmp_path, drop_path=0.1).config.reference_windows == PUBLISHED


def test_transfer_does_not_modify_its_source():
    encoder = trained()
    moved = swin.transfer(encoder, image_size=64, window_size=4)
    before = encoder.norm.weight.clone()
    with torch.no_grad():
        moved.norm.weight.zero_()
    assert torch.equal(encoder.norm.weight, before) and encoder.history == []


@pytest.mark.parametrize("how", ["mean", "repeat"])
@pytest.mark.parametrize("channels", [1, 3, 4, 6, 13])
def test_inflated_channels_are_recorded_and_preserve_gray_images(export, how, channels, tmp_path):
    encoder = swin.load_encoder(export, in_chans=channels, inflate=how)
    images = torch.randn(1, channels, 64, 64)
    assert encoder(images).shape == (1, 2, 2, 64)
    history = [] if channels == 3 else [{"step": "inflate", "from": 3, "to": channels, "how": how}]
    assert encoder.history == history
    swin.save_encoder(encoder, tmp_path / "again", about={})
    written = json.loads((tmp_path / "again" / "encoder.json").read_text())
    assert written["history"] == history and written["encoder"]["in_chans"] == channels
    gray = torch.randn(1, 1, 64, 64)
    if how == "mean" or channels % 3 == 0:  # an image with equal channels has the same features
        torch.testing.assert_close(encoder(gray.repeat(1, channels, 1, 1)), trained()(gray.repeat(1, 3, 1, 1)))


def test_inflation_by_repeat_cycles_and_by_mean_averages():
    weight = torch.arange(3.0).view(1, 3, 1, 1)
    assert inflate_channels(weight, 6, "repeat").flatten().tolist() == [0.0, 0.5, 1.0, 0.0, 0.5, 1.0]
    assert inflate_channels(weight, 2, "mean").flatten().tolist() == [1.5, 1.5]


@pytest.mark.parametrize("position_bias", ["log_cpb", "linear_cpb", "table"])
def test_freezing_the_bias_preserves_features(position_bias, tmp_path):
    encoder = trained(position_bias=position_bias)
    swin.save_encoder(encoder, tmp_path / "export", about={})
    frozen = swin.load_encoder(tmp_path / "export", position_bias="table")
    assert frozen.config.position_bias == "table" and frozen.config.reference_windows == PUBLISHED
    images = torch.randn(1, 3, 192, 192)
    torch.testing.assert_close(frozen(images), encoder(images), rtol=1e-4, atol=1e-4)
    steps = [step["step"] for step in frozen.history]
    assert steps == ([] if position_bias == "table" else ["freeze"])
    swin.save_encoder(frozen, tmp_path / "frozen", about={})
    torch.testing.assert_close(swin.load_encoder(tmp_path / "frozen")(images), frozen(images))


def test_frozen_bias_is_resampled_for_a_larger_window(export):
    """The tables are made at the training windows, 12 12 12 6, independent of the reference windows."""
    moved = swin.load_encoder(export, image_size=288, window_size=18, position_bias="table")
    tables = [
        block.attn.position_bias.make_table((window, window))
        for layer, window in zip(swin.load_encoder(export).layers, (12, 12, 12, 6), strict=True)
        for block in layer.blocks
    ]
    windows = [(12, 18)] * 6 + [(6, 9)] * 2
    for old, found, (before, after) in zip(tables, _tables(moved), windows, strict=True):
        torch.testing.assert_close(found, resample_table(old.detach(), (before,) * 2, (after,) * 2, "bicubic"))
    assert [step["step"] for step in moved.history] == ["freeze", "transfer"]
    assert not any("cpb_mlp" in name for name in moved.state_dict())


def test_bias_can_be_frozen_after_a_transfer(export):
    """The bias is frozen at the current windows, not at those of the original training."""
    larger = swin.transfer(swin.load_encoder(export), image_size=384, window_size=24)
    frozen = swin.transfer(larger, position_bias="table")
    assert frozen.config.reference_windows == ((24, 24), (24, 24), (24, 24), (12, 12))
    images = torch.randn(1, 3, 384, 384)
    torch.testing.assert_close(frozen(images), larger(images), rtol=1e-4, atol=1e-4)


def test_converting_a_table_to_a_continuous_bias_is_refused(tmp_path):
    swin.save_encoder(trained(position_bias="table"), tmp_path, about={})
    with pytest.raises(ValueError, match="position_bias"):
        swin.load_encoder(tmp_path, position_bias="log_cpb")


def _tables(encoder: swin.SwinEncoder) -> list[torch.Tensor]:
    return [tensor for name, tensor in encoder.state_dict().items() if name.endswith("relative_position_bias.table")]
