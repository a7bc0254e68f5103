"""SimMIM: the loss, the inputs it depends on, reconstruction heads and baselines."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from simmim.masking import MaskGenerator, expand_mask
from simmim.metrics.baselines import copy_nearest_visible, masked_l1, mean_of_visible
from simmim.tasks.reconstruction_heads import make_head
from simmim.tasks.simmim import SimMIM, normalize_locally
from swin import make_config, make_encoder


def make_model(size=(64, 64), patch=16, channels=3, **settings) -> SimMIM:
    torch.manual_seed(0)
    encoder = make_encoder(
        "swinv2_tiny", embed_dim=8, depths=(2, 2), num_heads=(1, 2), image_size=size, window_size=4, in_chans=channels
    )
    model = SimMIM(
        encoder, MaskGenerator(size, patch, 0.6), mean=[0.5] * channels, std=[0.25] * channels, **settings
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def make_batch(size=(64, 64), channels=3, n=3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (n, channels, *size), generator=generator, dtype=torch.uint8)
    return {"image": image, "epoch": torch.zeros(n, dtype=torch.int64), "index": torch.arange(n)}


SHAPES = [
    ((64, 64), 16, 3),
    ((64, 64), 4, 1),
    ((32, 96), 32, 5),
    ((40, 24), 8, 2),
    ((36, 60), 12, 14),
    ((56, 56), 28, 3),
]


@pytest.mark.parametrize(("size", "patch", "channels"), SHAPES)
@pytest.mark.parametrize("loss", ["l1", "l2", "smooth_l1"])
def test_loss_of_masked_tokens_equals_loss_of_full_reconstruction(size, patch, channels, loss):
    model = make_model(size, patch, channels, loss=loss)
    images, mask = model.inputs(make_batch(size, channels))
    full = model.reconstruct(images, mask)
    error = model.elementwise_loss(full.prediction, full.target, reduction="none")
    expected = error[full.pixel_mask.expand_as(error)].mean()
    torch.testing.assert_close(model.loss(images, mask), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("head", ["linear", "mlp", "inverse_swin"])
@pytest.mark.parametrize("pixels", ["masked", "all"])
@pytest.mark.parametrize("downsample", [1, 2, 8])
def test_heads_pixels_and_downsampling_equal_their_definition(head, pixels, downsample):
    size, patch, channels = (40, 56), 8, 2
    model = make_model(size, patch, channels, head=head, pixels=pixels, downsample=downsample, norm_target_window=5)
    images, mask = model.inputs(make_batch(size, channels))
    shown = model.reconstruct(images, mask)
    target = normalize_locally(images, 5)
    squares = target.unflatten(3, (-1, downsample)).unflatten(2, (-1, downsample)).mean(dim=(3, 5))
    spread = squares.repeat_interleave(downsample, dim=2).repeat_interleave(downsample, dim=3)
    torch.testing.assert_close(shown.target, spread)
    error = (shown.prediction - spread).abs()
    expected = error.mean() if pixels == "all" else error[shown.pixel_mask.expand_as(error)].mean()
    loss = model.loss(images, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    no_decay = model.no_decay_parameters()
    kept = {name for name, parameter in model.head.named_parameters() if parameter not in no_decay}
    assert all(name.endswith("weight") for name in kept) and ("0.weight" in kept) == (head == "mlp")


def test_inverse_swin_keeps_the_position_of_tokens():
    config = make_config(
        "swinv2_tiny", embed_dim=8, depths=(2, 2, 2), num_heads=(1, 2, 4), patch_size=2, image_size=48, window_size=3
    )
    head = make_head("inverse_swin", config)
    # Blocks are the identity at initialization, so only the splitting layers act.
    x = features = torch.randn(2, 5, 6, 32)
    for scale in head.scales:
        x = F.pixel_shuffle(scale[-1](x).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    drawn = head(features).unflatten(3, (3, 8, 8)).permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)
    torch.testing.assert_close(drawn, x)


@pytest.mark.parametrize("norm_target_window", [None, 9])
def test_prediction_depends_on_visible_pixels_only(norm_target_window):
    model = make_model(norm_target_window=norm_target_window)
    images, mask = model.inputs(make_batch())
    before = model.reconstruct(images, mask)
    other = torch.where(before.pixel_mask, torch.randn_like(images), images)
    torch.testing.assert_close(model.reconstruct(other, mask).prediction, before.prediction, rtol=0, atol=0)
    assert model.loss(other, mask) != model.loss(images, mask)


def test_loss_depends_on_targets_of_masked_pixels_only():
    model = make_model()
    images, mask = model.inputs(make_batch())
    target = images.clone()
    model._target = lambda _: target
    before = model.loss(images, mask)
    visible = ~expand_mask(mask, 16)[:, None]
    target += 100 * visible
    assert model.loss(images, mask) == before
    target += ~visible
    assert model.loss(images, mask) != before


def test_gradient_reaches_every_parameter_and_the_mask_token():
    model = make_model()
    model(make_batch()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_images_are_normalized_with_the_channel_statistics():
    model = make_model()
    batch = make_batch()
    images, _ = model.inputs(batch)
    torch.testing.assert_close(images * 0.25 + 0.5, batch["image"].double() / 255)


@pytest.mark.parametrize("window", [3, 47])
def test_local_normalization_equals_its_definition(window):
    torch.manual_seed(0)
    images = torch.randn(2, 2, 20, 24, dtype=torch.float64)
    result, half = normalize_locally(images, window), window // 2
    for y, x in [(0, 0), (10, 12), (19, 23), (1, 20)]:
        around = images[:, :, max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1].flatten(2)
        expected = (images[:, :, y, x] - around.mean(-1)) / (around.var(-1) + 1e-6).sqrt()
        torch.testing.assert_close(result[:, :, y, x], expected, rtol=1e-9, atol=1e-9)


def test_local_normalization_of_a_flat_image_is_zero_in_single_precision():
    result = normalize_locally(torch.full((1, 1, 64, 64), 2.6), 47)
    assert result.abs().max() < 1e-2


def test_bfloat16_stays_close():
    model = make_model().float()
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(batch), rtol=0.02, atol=0)


def test_gray_out_removes_masked_pixels_only():
    from simmim.visualization.drawing import MASK_GRAY, gray_out

    images, mask = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8) > 0.5
    hidden = gray_out(images, mask)
    assert (hidden[mask.expand_as(hidden)] == MASK_GRAY).all()
    assert torch.equal(hidden[~mask.expand_as(hidden)], images[~mask.expand_as(images)])


@pytest.mark.parametrize(("channels", "window", "panels"), [(3, None, 5), (1, None, 5), (2, 9, 6), (5, None, 5)])
def test_previews_of_any_channel_count(channels, window, panels):
    model = make_model((32, 64), 8, channels, norm_target_window=window).eval()
    preview = model.visualize(make_batch((32, 64), channels, n=3))
    assert preview.mode == "RGB"
    assert preview.size == (panels * (64 * 4 + 6) + 12, 3 * (32 * 4 + 6) + 28)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": [0.5], "std": [0.5]}, "mean and std have 1 and 1 numbers for 3 channels"),
        ({"norm_target_window": 8}, "must be an odd number from 3 on, got 8"),
        ({"norm_target_window": 1}, "must be an odd number from 3 on, got 1"),
        ({"downsample": 3}, "downsample 3 must divide mask_patch_size 32 and the stride 32 of the encoder: 32 is"),
    ],
)
def test_invalid_settings_raise(settings, message):
    encoder = make_encoder("swinv2_tiny", image_size=64)
    arguments = {"mean": [0.5] * 3, "std": [0.5] * 3} | settings
    with pytest.raises(ValueError, match=message):
        SimMIM(encoder, MaskGenerator((64, 64), 32, 0.5), **arguments)


def test_mask_patch_size_must_be_a_multiple_of_the_token_size():
    with pytest.raises(ValueError, match="must be a multiple of the token size 4 px"):
        SimMIM(make_encoder("swinv2_tiny", image_size=60), MaskGenerator((60, 60), 6, 0.5), mean=[0] * 3, std=[1] * 3)


def test_baselines_equal_brute_force():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 9, 14)
    mask = torch.rand(2, 1, 9, 14) < 0.7
    nearest = copy_nearest_visible(images, mask)
    for n in range(2):
        visible = (~mask[n, 0]).nonzero()
        for y, x in [(0, 0), (4, 7), (8, 13)]:
            distance = ((visible - torch.tensor([y, x])) ** 2).sum(dim=1)
            candidates = visible[distance == distance.min()]
            assert any(torch.equal(nearest[n, :, y, x], images[n, :, i, j]) for i, j in candidates.tolist())
    mean = mean_of_visible(images, mask)
    torch.testing.assert_close(mean[0, 0, 3, 3], images[0, 0][~mask[0, 0]].mean())
    assert masked_l1(images + mask, images, mask) == pytest.approx(1.0)
    assert masked_l1(images + ~mask * 5.0, images, mask) == 0
