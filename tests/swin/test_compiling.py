"""Compiled blocks equal uncompiled ones and share compiled code."""

from __future__ import annotations

import shutil

import pytest
import torch

from swin import make_encoder
from swin.attention import watch_attention
from swin.blocks import compiled_branches
from tests.swin.test_encoder import randomize_parameters

SMALL = {"embed_dim": 8, "depths": (2, 4), "num_heads": (1, 2), "image_size": 36, "window_size": 4, "drop_path": 0.3}

BF16 = 0.04


def make_small(**settings):
    torch.manual_seed(0)
    encoder = make_encoder("swinv2_tiny", **SMALL | settings).train()
    randomize_parameters(encoder)
    return encoder


def outputs_and_gradients(encoder, images):
    """Return the output and all gradients; the fixed seed drops the same branches every time."""
    torch.manual_seed(3)
    encoder.zero_grad()
    out = encoder(images)
    (out * out.sin()).float().sum().backward()
    return [out.detach(), *(parameter.grad for parameter in encoder.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiled_blocks_equal_uncompiled_blocks(checkpointing, traced):
    """Compare in double precision, where rounding is negligible; equal blocks share one compilation."""
    encoder = make_small().double().save_memory(checkpointing=checkpointing)
    images = torch.randn(3, 3, 36, 36, dtype=torch.float64)
    plain = outputs_and_gradients(encoder, images)
    assert not traced
    compiled = outputs_and_gradients(encoder.use_compiler(), images)
    for found, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    # Shifted or not, in two stages. The first block, which has no drop path, is one of the four.
    assert len(traced) == 4
    outputs_and_gradients(encoder, images), outputs_and_gradients(encoder.use_compiler(False), images)
    assert len(traced) == 4


@pytest.mark.slow
def test_compiled_blocks_in_bf16_differ_by_rounding_only(traced):
    """The gradients, as one vector, differ by less than 4 % from uncompiled bf16 and from fp32."""
    encoder, images = make_small(), torch.randn(3, 3, 36, 36)
    exact = outputs_and_gradients(encoder, images)
    with torch.autocast("cpu", torch.bfloat16):
        plain = outputs_and_gradients(encoder, images)
        compiled = outputs_and_gradients(encoder.use_compiler(), images)
    vectors = [torch.cat([x.float().flatten() for x in gradients]) for _, *gradients in (exact, plain, compiled)]
    assert (vectors[2] - vectors[1]).norm() < BF16 * vectors[1].norm()
    assert (vectors[2] - vectors[0]).norm() < BF16 * vectors[0].norm()
    torch.testing.assert_close(compiled[0], plain[0], rtol=BF16, atol=BF16)


def test_blocks_run_uncompiled_in_evaluation_mode(traced):
    encoder = make_small().use_compiler().eval()
    encoder(torch.randn(1, 3, 36, 36))
    assert not traced


def test_watched_blocks_run_uncompiled(traced):
    encoder, images = make_small(), torch.randn(2, 3, 36, 36)
    found = []
    for is_compiled in (False, True):
        encoder.use_compiler(is_compiled)
        torch.manual_seed(3)
        with watch_attention(encoder) as seen:
            encoder(images)
        found.append(seen)
    assert found[0] == found[1] and found[0]["max_attention_logit"] > 0 and not traced


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_blocks_compile_with_the_default_backend():
    compiled_branches.cache_clear()
    encoder, images = make_small(depths=(1,), num_heads=(1,), image_size=16), torch.randn(2, 3, 16, 16)
    plain, compiled = outputs_and_gradients(encoder, images), outputs_and_gradients(encoder.use_compiler(), images)
    for found, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
