"""SimMIM with tube masks on clips, and classification of clips."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simmim.masking import MaskGenerator, expand_mask
from simmim.tasks.classification import Classification
from simmim.tasks.video import VideoSimMIM
from swin import VideoEncoder, inflate, make_encoder

STATISTICS = {"mean": [0.5] * 3, "std": [0.25] * 3}


def make_video(size=(32, 32), frames=8) -> VideoEncoder:
    torch.manual_seed(0)
    encoder = make_encoder("swinv2_tiny", embed_dim=8, depths=(2, 2), num_heads=(1, 2), image_size=size, window_size=4)
    return inflate(encoder, frames=frames, temporal_window=2)


def shake(model) -> None:
    """Add noise to all parameters, so that none is at a special value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def make_model(size=(32, 32), patch=16) -> VideoSimMIM:
    model = VideoSimMIM(make_video(size), MaskGenerator(size, patch, 0.6), **STATISTICS).double()
    shake(model)
    return model


def moving_squares(n=8, size=(32, 32), frames=8) -> dict[str, torch.Tensor]:
    """Return clips of squares of random color and start that move left (label 0) or right (label 1)."""
    generator = torch.Generator().manual_seed(1)
    label = torch.arange(n) % 2
    clips = torch.full((n, 3, frames, *size), 40, dtype=torch.uint8)
    for clip, direction in zip(clips, label.tolist(), strict=True):
        top, left = torch.randint(size[0] - 8, (2,), generator=generator).tolist()
        color = torch.randint(120, 256, (3, 1, 1), generator=generator, dtype=torch.uint8)
        for index in range(frames):
            columns = [(left + x + (2 * direction - 1) * 2 * index) % size[1] for x in range(8)]
            clip[:, index, top : top + 8, columns] = color
    return {"image": clips, "label": label, "epoch": torch.zeros(n, dtype=torch.int64), "index": torch.arange(n)}


@pytest.mark.parametrize(("size", "patch", "frames"), [((32, 32), 16, 8), ((40, 24), 8, 5), ((36, 60), 12, 1)])
def test_loss_is_the_mean_over_masked_pixels_of_all_frames(size, patch, frames):
    model = make_model(size, patch)
    clips, patch_mask = model.inputs(moving_squares(3, size, frames))
    error = (model.reconstruct(clips, patch_mask) - clips).abs()
    tubes = expand_mask(patch_mask, patch)[:, None, None].expand_as(error)
    torch.testing.assert_close(model.loss(clips, patch_mask), error[tubes].mean(), rtol=1e-12, atol=0)


def test_prediction_does_not_depend_on_masked_pixels_of_any_frame():
    model = make_model()
    clips, patch_mask = model.inputs(moving_squares(3))
    tubes = expand_mask(patch_mask, 16)[:, None, None]
    before = model.reconstruct(clips, patch_mask)
    hidden = torch.where(tubes, torch.randn_like(clips), clips)
    assert torch.equal(model.reconstruct(hidden, patch_mask), before)
    seen = torch.where(tubes, clips, torch.randn_like(clips))
    assert not torch.equal(model.reconstruct(seen, patch_mask), before)


def test_gradient_reaches_every_parameter_and_decay_groups_are_right():
    model = make_model()
    model(moving_squares(2)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    decayed = {name for name, parameter in model.named_parameters() if parameter not in model.no_decay_parameters()}
    assert "head.weight" in decayed and "encoder.patch_embed.proj.weight" in decayed
    assert not any("cpb" in name or "mask_token" in name or name.endswith("bias") for name in decayed)


def losses_of(model, steps: int) -> list[float]:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, batch = [], moving_squares()
    for _ in range(steps):
        loss = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_a_few_steps_reduce_both_losses():
    masked = losses_of(VideoSimMIM(make_video(), MaskGenerator((32, 32), 16, 0.5), **STATISTICS), 35)
    assert masked[-1] < 0.7 * masked[0]
    classified = losses_of(Classification(make_video(), ["left", "right"], **STATISTICS), 35)
    assert classified[-1] < 0.5 * classified[0]


def test_logits_are_computed_from_the_mean_over_time_and_space():
    model = Classification(make_video(), ["left", "right"], **STATISTICS).double()
    shake(model)
    batch = moving_squares(4)
    clips = model.normalize(batch["image"])
    torch.testing.assert_close(clips[:, 1], (batch["image"][:, 1] / 255 - 0.5).double() / 0.25, rtol=0, atol=1e-6)
    expected = model.head(model.encoder(clips).flatten(1, 3).mean(dim=1))
    torch.testing.assert_close(model.logits(clips), expected)
    torch.testing.assert_close(model.class_activation(clips).mean(dim=(2, 3, 4)), expected)
    loss = torch.nn.functional.cross_entropy(expected.float(), batch["label"])
    torch.testing.assert_close(model(batch), loss)
    assert set(model.depth_of_parameters()) == set(model.parameters())


def test_probabilities_are_averaged_over_views():
    model = Classification(make_video(), ["left", "right", "up"], **STATISTICS)
    shake(model)
    views = moving_squares(6)["image"].unflatten(0, (2, 3))
    expected = torch.stack([model.logits(model.normalize(clip)).softmax(dim=1) for clip in views]).mean(dim=1)
    torch.testing.assert_close(model.predict(views).exp(), expected)
    batch = {"image": views, "label": torch.tensor([0, 2])}
    numbers = model.eval_step(batch)
    torch.testing.assert_close(numbers["loss"], -expected[[0, 1], [0, 2]].log().mean())
    assert numbers["top1"] == (expected.argmax(dim=1) == batch["label"]).float().mean()


@pytest.mark.parametrize("settings", [{"mixup": 0.0, "cutmix": 1.0}, {"erasing": 1.0}], ids=["cutmix", "erasing"])
def test_cutmix_and_erasing_replace_the_same_region_in_all_frames(settings):
    model = Classification(make_video(), ["left", "right"], **STATISTICS, **settings).train()
    still = torch.stack([torch.full((3, 8, 32, 32), value, dtype=torch.uint8) for value in (10, 200, 90, 160)])
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    np.random.seed(0)
    model({"image": still, "label": torch.tensor([0, 1, 0, 1])})
    changed = (seen[0] - model.normalize(still)).abs() > 1e-6
    assert changed.any() and not changed.all()
    assert torch.equal(changed.any(dim=1), changed[:, :, :1].any(dim=1).expand(-1, 8, -1, -1))


def test_previews_show_frames_side_by_side():
    batch = moving_squares(2)
    model = make_model()
    preview = np.asarray(model.visualize(batch)).astype(int)
    panel = 4 * (4 * 32 + 3)  # four frames of 32 px with white gaps, enlarged four times
    assert preview.shape[1] > 3 * panel and preview.shape[0] > 2 * 128
    original, masked = (preview[22 : 22 + 128, 6 + k * (panel + 6) :][:, :panel] for k in range(2))
    patches = expand_mask(model.inputs(batch)[1], 16)[0].numpy()
    for position, frame_index in enumerate([0, 2, 5, 7]):
        frame = batch["image"][0, :, frame_index].permute(1, 2, 0).numpy()
        shown, hidden = (x[::4, ::4][:, position * 33 :][:, :32] for x in (original, masked))
        assert np.array_equal(shown, frame)
        assert (hidden[patches] == 128).all() and np.array_equal(hidden[~patches], frame[~patches])
        assert (original[:, (position * 33 + 32) * 4 :][:, :4] == 255).all()
    shown = Classification(make_video(), ["left", "right"], **STATISTICS).visualize(batch)
    assert shown.width > 2 * panel


def test_invalid_settings_raise():
    with pytest.raises(ValueError, match="mask_patch_size 2 must be a multiple of the token size 4 px"):
        VideoSimMIM(make_video(), MaskGenerator((32, 32), 2, 0.6), **STATISTICS)
    with pytest.raises(ValueError, match="give one number per channel"):
        VideoSimMIM(make_video(), MaskGenerator((32, 32), 8, 0.6), mean=[0.5], std=[0.5])
