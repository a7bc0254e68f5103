"""Video encoder: equality with the image encoder, time, receptive fields and transfer."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import swin
from swin.position_bias import make_position_bias
from swin.windows import attention_mask, fit_windows, relative_index, window_partition, window_reverse
from tests.swin.test_encoder import V1, randomize_parameters

CPU = torch.device("cpu")
KINDS = ("log_cpb", "log_cpb_paper", "linear_cpb", "table")


def image_encoder(**settings) -> swin.SwinEncoder:
    settings = {"embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "image_size": 32, "window_size": 4} | settings
    torch.manual_seed(0)
    encoder = swin.make_encoder("swinv2_tiny", **settings).double()
    randomize_parameters(encoder)
    return encoder


def video_encoder(frames=8, temporal_patch=2, temporal_window=2, **settings) -> swin.VideoEncoder:
    return swin.inflate(
        image_encoder(**settings), frames=frames, temporal_patch=temporal_patch, temporal_window=temporal_window
    )


def still(images: torch.Tensor, frames: int) -> torch.Tensor:
    return images[:, :, None].expand(-1, -1, frames, -1, -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", [{}, V1], ids=["v2", "v1"])
@pytest.mark.parametrize(
    ("size", "frames"), [((32, 32), 8), ((32, 32), 1), ((36, 28), 12), ((30, 41), 7), ((16, 48), 20)]
)
def test_a_still_clip_has_the_features_of_its_image_in_every_frame(variant, kind, size, frames):
    encoder = image_encoder(**(variant | {"position_bias": kind, "window_size": (4, 3)}))
    video = swin.inflate(encoder, frames=12, temporal_patch=2, temporal_window=4)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    expected, found = encoder(images), video(still(images, frames))
    assert found.shape == (2, -(-frames // 2), *expected.shape[1:])
    torch.testing.assert_close(found, expected[:, None].expand_as(found), rtol=0, atol=1e-12)
    maps = zip(video.pyramid(still(images, frames)), encoder.pyramid(images), strict=True)
    for found, expected in maps:
        torch.testing.assert_close(found, still(expected, found.shape[2]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("temporal_patch", [1, 3])
@pytest.mark.parametrize("variant", [{}, V1], ids=["v2", "v1"])
def test_windows_of_one_frame_equal_the_image_encoder_on_every_frame(variant, temporal_patch):
    encoder = image_encoder(**variant)
    video = swin.inflate(encoder, frames=6, temporal_patch=temporal_patch, temporal_window=1)
    frames = torch.randn(2, 3, 5, 36, 28, dtype=torch.float64)
    clips = frames.repeat_interleave(temporal_patch, dim=2)
    features = video(clips)
    for index in range(5):
        torch.testing.assert_close(features[:, index], encoder(frames[:, :, index]), rtol=0, atol=1e-12)


def test_frames_influence_each_other_only_within_shared_windows():
    encoder = video_encoder(depths=(2,), num_heads=(1,), frames=8, temporal_patch=1, temporal_window=4)
    randomize_parameters(encoder)
    clip = torch.randn(1, 3, 8, 16, 16, dtype=torch.float64)
    changed = clip.clone()
    changed[:, :, 0] += 1
    first, second = encoder.layers[0].blocks

    def reached(blocks) -> list[int]:
        x, y = encoder.embed(clip), encoder.embed(changed)
        for block in blocks:
            x, y = block(x), block(y)
        return (x != y).sum(dim=(0, 2, 3, 4)).nonzero().flatten().tolist()

    assert reached([first]) == [0, 1, 2, 3]
    assert reached([second]) == [0, 1]
    assert reached([first, second]) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_bias_at_time_offset_zero_equals_the_image_bias_and_others_differ_after_training(kind):
    torch.manual_seed(0)
    flat, deep = (make_position_bias(kind, 2, window).double() for window in ((3, 4), (2, 3, 4)))
    if kind == "table":
        with torch.no_grad():
            deep.table.view(3, 35, 2)[1] = flat.table
    else:
        with torch.no_grad():
            hidden, output = flat.layers
            hidden.weight.normal_()
            output.weight.normal_()
            deep.load_state_dict(flat.state_dict() | {"0.weight": torch.cat([torch.randn(512, 1), hidden.weight], 1)})
    for window in ((2, 3, 4), (3, 3, 2), (1, 3, 4)):
        bias = deep(window).unflatten(2, (window[0], -1)).unflatten(1, (window[0], -1))
        for f in range(window[0]):
            torch.testing.assert_close(bias[:, f, :, f], flat(window[1:]), rtol=0, atol=1e-12)
    now, before = deep((2, 3, 4))[:, :12].chunk(2, dim=2)
    assert (now - before).abs().max() > 0.01


def test_relative_index_numbers_offsets_by_time_then_row_then_column():
    window = (2, 3, 4)
    positions = list(itertools.product(*map(range, window)))
    expected = [[((q[0] - k[0] + 1) * 5 + q[1] - k[1] + 2) * 7 + q[2] - k[2] + 3 for k in positions] for q in positions]
    assert relative_index(window, CPU).tolist() == expected


@pytest.mark.parametrize(
    ("grid", "window"), [((4, 4, 4), (2, 2, 2)), ((3, 5, 4), (2, 4, 3)), ((2, 3, 6), (4, 2, 3)), ((5, 2, 2), (3, 4, 4))]
)
@pytest.mark.parametrize("shifted", [False, True])
def test_attention_masks_follow_their_definition(grid, window, shifted):
    windows = fit_windows(grid, window, shifted)
    padded = [g + p for g, p in zip(grid, windows.padding, strict=True)]
    mask = attention_mask(grid, windows, CPU)
    counts = [p // w for p, w in zip(padded, windows.window, strict=True)]
    offsets = list(itertools.product(*map(range, windows.window)))
    for index, corner in enumerate(itertools.product(*map(range, counts))):
        rolled = [[c * w + i for c, w, i in zip(corner, windows.window, offset, strict=True)] for offset in offsets]
        true = [[(r + s) % p for r, s, p in zip(at, windows.shift, padded, strict=True)] for at in rolled]
        real = [all(t < g for t, g in zip(at, grid, strict=True)) for at in true]
        for q, k in itertools.product(range(len(offsets)), repeat=2):
            apart = [a - b for a, b in zip(true[q], true[k], strict=True)]
            near = apart == [a - b for a, b in zip(rolled[q], rolled[k], strict=True)]
            allowed = mask is None or bool(mask[index, q, k])
            if real[q]:
                assert allowed == (near and real[k])
            else:
                assert allowed == (not real[k])


@pytest.mark.parametrize("shifted", [False, True])
def test_window_reverse_undoes_partition_and_windows_contain_neighbors(shifted):
    grid = (5, 6, 7)
    x = torch.arange(2 * 5 * 6 * 7).view(2, *grid, 1).double()
    windows = fit_windows(grid, (2, 4, 3), shifted)
    assert torch.equal(window_reverse(window_partition(x, windows), windows, grid), x)
    first = window_partition(x, windows)[0].view(2, 4, 3)
    df, dy, dx = windows.shift
    assert torch.equal(first, x[0, df : df + 2, dy : dy + 4, dx : dx + 3, 0].contiguous()[:2, :4, :3])


def test_every_parameter_gets_a_gradient_including_time_weights():
    video = video_encoder()
    clips = torch.randn(2, 3, 8, 32, 32, dtype=torch.float64)
    (video(clips) * torch.randn(2, 4, 4, 4, 16)).sum().backward()
    for name, parameter in video.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    for name, parameter in video.named_parameters():
        if name.endswith("cpb_mlp.0.weight"):
            assert (parameter[:, 0] == 0).all() and parameter.grad[:, 0].abs().max() > 0


def test_memory_options_do_not_change_features():
    encoder = video_encoder()
    randomize_parameters(encoder)
    clips = torch.randn(2, 3, 8, 32, 24, dtype=torch.float64)
    expected = encoder(clips)
    for checkpointing, chunks in (("full", 1), ("selective", 3), ("none", [2, 5])):
        found = encoder.save_memory(checkpointing=checkpointing, attention_chunks=chunks)(clips)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_parameter_groups_equal_those_of_the_image_encoder():
    video = video_encoder()
    names = {name for name, _ in video.named_parameters()}
    assert set(video.depth_of_parameters()) == names
    no_decay = {name for name, parameter in video.named_parameters() if parameter in video.no_decay_parameters()}
    images = image_encoder()
    same = {name for name, parameter in images.named_parameters() if parameter in images.no_decay_parameters()}
    assert no_decay == same and "patch_embed.proj.weight" not in no_decay


@pytest.mark.parametrize("kind", ["log_cpb", "table"])
def test_video_encoder_round_trip_and_transfer_from_disk(tmp_path, kind):
    video = video_encoder(position_bias=kind)
    randomize_parameters(video)
    video.float()
    swin.save_encoder(video, tmp_path, about={})
    loaded = swin.load_encoder(tmp_path)
    assert isinstance(loaded, swin.VideoEncoder) and loaded.config == video.config
    assert loaded.history == [{"step": "inflate to videos", "frames": 8, "temporal_patch": 2, "temporal_window": 2}]
    clips = torch.randn(1, 3, 8, 32, 32)
    assert torch.equal(loaded(clips), video(clips))
    description = json.loads((tmp_path / "encoder.json").read_text())["encoder"]
    assert description["frames"] == 8 and description["reference_windows"] == [[2, 4, 4], [2, 4, 4]]
    longer = swin.load_encoder(tmp_path, frames=16, temporal_window=4, image_size=64, window_size=8)
    assert longer.config.window == (4, 8, 8) and longer(torch.randn(1, 3, 16, 64, 64)).shape == (1, 8, 8, 8, 16)
    step = {"step": "transfer", "image_size": [64, 64], "window_size": [8, 8], "frames": 16, "temporal_window": 4}
    assert longer.history[-1] == step | ({"table_resampling": "bicubic"} if kind == "table" else {})


def test_transfer_preserves_the_bias_of_common_offsets():
    video = video_encoder()
    randomize_parameters(video)
    other = swin.transfer(video, frames=16, temporal_window=4, image_size=64, window_size=8)
    small, large = (e.layers[0].blocks[0].attn.position_bias.make_table(e.config.window) for e in (video, other))
    large = large.view(7, 15, 15, 1)[2:-2, 4:-4, 4:-4].reshape(-1, 1)
    torch.testing.assert_close(large, small, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["bicubic", "geometric"])
def test_table_transfer_copies_time_and_resamples_space_as_for_images(method):
    encoder = image_encoder(**V1)
    video = swin.inflate(encoder, frames=4, temporal_window=2)
    settings = {"image_size": 64, "window_size": 8, "table_resampling": method}
    longer = swin.transfer(video, frames=16, temporal_window=4, **settings)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = swin.transfer(encoder, **settings)(images)
    torch.testing.assert_close(longer(still(images, 16)), expected[:, None].expand(-1, 8, -1, -1, -1))
    randomize_parameters(video)
    longer = swin.transfer(video, frames=16, temporal_window=4)
    old, new = (e.layers[0].blocks[0].attn.position_bias.table.unflatten(0, (-1, 49)) for e in (video, longer))
    assert torch.equal(new, old[[0, 0, 0, 1, 2, 2, 2]])
    clips = torch.randn(1, 3, 4, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(longer(clips), video(clips))


def test_freezing_the_bias_preserves_video_features():
    video = video_encoder()
    randomize_parameters(video)
    clips = torch.randn(1, 3, 8, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(swin.transfer(video, position_bias="table")(clips), video(clips))


def test_channels_are_inflated_for_videos():
    video = video_encoder()
    clips = torch.randn(1, 1, 8, 32, 32, dtype=torch.float64).expand(-1, 5, -1, -1, -1)
    wide = swin.transfer(video, in_chans=5, inflate="mean")
    torch.testing.assert_close(wide(clips), video(clips[:, :3]))


def test_invalid_video_settings_are_refused():
    encoder = image_encoder()
    video = swin.inflate(encoder, frames=8, temporal_window=4)
    with pytest.raises(ValueError, match="already a video encoder"):
        swin.inflate(video, frames=8)
    with pytest.raises(ValueError, match="temporal_window 8 is longer than the 4 tokens of 8 frames"):
        swin.inflate(encoder, frames=8)
    with pytest.raises(ValueError, match="temporal_patch must be a positive integer, got 0"):
        swin.inflate(encoder, frames=8, temporal_patch=0)
    with pytest.raises(ValueError, match=r"unknown encoder settings \['frames'\]"):
        swin.transfer(encoder, frames=8)
    with pytest.raises(ValueError, match="temporal_patch 1 contradicts the stored 2"):
        swin.transfer(video, temporal_patch=1)
    with pytest.raises(ValueError, match="window_size 6 x 4 x 4 is larger than the 4 x 8 x 8 tokens"):
        swin.transfer(video, temporal_window=6)
    with pytest.raises(ValueError, match="reference_windows must be one or three positive integers"):
        swin.VideoConfig(embed_dim=8, depths=(1,), num_heads=(1,), reference_windows=((4, 4),))
