"""All implementations that the step benchmark compares run the same step."""

from __future__ import annotations

import json

import pytest
import torch

from simmim.benchmarks.competitors import make_baseline
from simmim.benchmarks.step import kept_bytes, make_step, make_steps, perturb, step_speed
from simmim.masking import MaskGenerator, expand_mask
from simmim.tasks.simmim import SimMIM
from swin import make_encoder

OTHER = """
import torch
from torch import nn

class Other(nn.Module):
    is_complete = True
    def __init__(self, config, state):
        super().__init__()
        self.weight = nn.Parameter(state["norm.weight"].clone())
        self.width = config["embed_dim"]
    def forward(self, images, token_mask):
        return self.weight.sum() * 0 + self.width + images.mean() * 0

def make(config, state):
    return Other(config, state)
"""


def make_small() -> SimMIM:
    torch.manual_seed(0)
    encoder = make_encoder("swinv2_tiny", embed_dim=24, depths=(2, 2), num_heads=(2, 4), image_size=64, window_size=4)
    return perturb(SimMIM(encoder, MaskGenerator((64, 64), 16, 0.6), mean=[0.5] * 3, std=[0.2] * 3))


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_baselines_have_our_loss_and_gradients(name):
    task = make_small().double()
    baseline = make_baseline(name, task).double().train()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    patch_mask = task.mask_generator(torch.zeros(2, dtype=torch.int64), torch.arange(2))
    tokens = expand_mask(patch_mask, task.mask_generator.mask_patch_size // task.encoder.config.patch_size)
    ours, theirs = task.loss(images, patch_mask), baseline(images, tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # the baseline adds 1e-5 to the number of masked pixels
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(task.mask_token.grad, _mask_token(baseline).grad.view(1, 1, 1, -1), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(task.head.bias.grad, baseline.head.bias.grad, rtol=1e-6, atol=1e-9)


def _mask_token(baseline):
    own = getattr(getattr(baseline.encoder, "embeddings", None), "mask_token", None)
    return baseline.mask_token if own is None else own


@pytest.mark.slow
def test_all_implementations_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("simmim.benchmarks.step.make_task", lambda *_, **__: make_small())
    (tmp_path / "other.py").write_text(OTHER)
    said: list[str] = []
    found = step_speed(
        ["swinv2_tiny"],
        [(64, 4)],
        batch_size=2,
        precisions=["fp32", "bf16"],
        baselines=["timm", f"{tmp_path / 'other.py'}:make"],
        compiled=False,
        rounds=1,
        out=tmp_path / "speed.json",
        echo=said.append,
    )
    names = ["simmim", "timm", "other"]
    assert [(speed.precision, speed.name) for speed in found] == [(p, n) for p in ("fp32", "bf16") for n in names]
    ours, theirs, other = found[:3]
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-4) and other.loss == 24 and ours.ratio == 1
    assert 0 < ours.saved_bytes < 0.7 * theirs.saved_bytes and ours.fraction_of_limit > 0
    written = json.loads((tmp_path / "speed.json").read_text())
    assert [row["name"] for row in written] == names * 2 and len(said) == 10
    for name, message in (
        ("nobody", "unknown baseline 'nobody'"),
        ("gone.py:make", "there is no file gone.py"),
        (f"{tmp_path / 'other.py'}:made", "has no function made"),
    ):
        with pytest.raises(ValueError, match=message):
            make_baseline(name, make_small())
    encoder = make_encoder("swin_tiny", embed_dim=24, depths=(2, 2), num_heads=(2, 4), image_size=64, window_size=4)
    first = SimMIM(encoder, MaskGenerator((64, 64), 16, 0.6), mean=[0.5] * 3, std=[0.2] * 3)
    with pytest.raises(ValueError, match="timm is Swin V2 only"):
        make_baseline("timm", first)


def test_kept_bytes_are_those_of_the_backward_pass():
    weight = torch.nn.Parameter(torch.zeros(1000, 10))
    step = make_step(
        lambda images, _: (images @ weight.T).exp().sum(),
        torch.optim.SGD([weight]),
        torch.zeros(7, 10),
        torch.zeros(1),
        "fp32",
    )
    assert kept_bytes(step, torch.device("cpu")) == 4 * (70 + 7000)  # the inputs of the product, and exp


@pytest.mark.slow
def test_a_compiled_step_is_the_same_step(traced):
    task = make_small()
    steps = make_steps(task, [], True, 2, "fp32", torch.device("cpu"))
    assert list(steps) == ["simmim", "simmim, compiled"]
    losses = [[float(step()) for _ in range(2)] for step in steps.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(traced) == len(task.encoder.config.depths) * 2
