"""Memory options: chunked attention and activation checkpointing do not change results."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from simmim.training.memory import TrackedMemory, choose_chunks
from swin import SwinEncoder, make_config, make_encoder
from swin.activation_checkpointing import CHECKPOINTINGS
from swin.attention import ATTENTIONS, WindowAttention, watch_attention
from swin.chunked_attention import CACHE_BYTES, attend, chunks_in_cache, split_chunks
from swin.encoder import make_blocks
from swin.position_bias import make_position_bias
from swin.windows import attention_mask, fit_windows, window_partition, window_reverse

# Window, grid, shifted. The cases: plain, shifted, padded, both, global, one window on one axis.
CASES = [
    ((4, 4), (8, 8), False),
    ((3, 3), (9, 9), True),
    ((4, 4), (10, 7), False),
    ((4, 3), (10, 7), True),
    ((5, 5), (5, 5), True),
    ((4, 4), (4, 12), True),
]


@pytest.mark.parametrize("kind", ["cosine", "dot"])
@pytest.mark.parametrize(("window", "grid", "shifted"), CASES)
def test_chunked_attention_equals_reference_attention(window, grid, shifted, kind):
    torch.manual_seed(0)
    attention = ATTENTIONS[kind](8, 2, make_position_bias("log_cpb", 2, window)).double()
    windows = fit_windows(grid, window, shifted)
    mask = attention_mask(grid, windows, torch.device("cpu"))
    images = torch.randn(2, *grid, 8, dtype=torch.float64)

    def reference_attention(x: Tensor) -> Tensor:
        bias, factor = attention.position_bias(windows.window), attention.factor()
        return attention.proj(attention.reference_attention(x, factor, bias, mask))

    def run(chunks: int | None) -> list[Tensor]:
        attention.chunks = chunks or 1
        attention.zero_grad()
        x = images.clone().requires_grad_()
        out = (
            attention(x, windows)
            if chunks
            else window_reverse(reference_attention(window_partition(x, windows)), windows, grid)
        )
        (out * out.sin()).sum().backward()
        return [out.detach(), x.grad, *(parameter.grad for parameter in attention.parameters())]

    expected = [tensor.clone() for tensor in run(None)]
    for chunks in (1, 2, 3, 4, 7, 16, 1000):
        for found, wanted in zip(run(chunks), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1, 3, 8])
@pytest.mark.parametrize("cosine", [True, False])
def test_chunked_attention_passes_gradcheck(chunks, cosine):
    torch.manual_seed(0)
    qkv = torch.randn(4, 3, 3 * 8, dtype=torch.float64, requires_grad=True)
    factor = torch.rand(2, 1, 1, dtype=torch.float64).add(0.5).requires_grad_()
    bias = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 3, 3) < 0.6
    mask |= torch.eye(3, dtype=torch.bool)

    def run(*inputs: Tensor) -> Tensor:
        return attend(*inputs, mask, cosine=cosine, chunks=chunks)

    assert torch.autograd.gradcheck(run, (qkv, factor, bias))


def test_zero_queries_have_the_gradient_of_normalize():
    torch.manual_seed(0)
    attention = ATTENTIONS["cosine"](8, 2, make_position_bias("log_cpb", 2, (2, 2))).double()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    x[0, 1] = 0
    windows = fit_windows((2, 2), (2, 2), False)
    gradients = []
    for run in (attention.reference_attention, None):
        tokens = x.clone().requires_grad_()
        bias, factor = attention.position_bias((2, 2)), attention.factor()
        grids = tokens.view(3, 2, 2, 8)
        out = attention.proj(run(tokens, factor, bias, None)) if run else attention(grids, windows).view_as(tokens)
        gradients.append(torch.autograd.grad((out * out.sin()).sum(), tokens)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)


def test_cache_sized_chunks_reduce_peak_memory():
    bias = torch.zeros(3, 144, 144)
    assert chunks_in_cache(4, bias) == 1 and chunks_in_cache(64, bias) * CACHE_BYTES >= 64 * bias.nbytes
    encoder = make_encoder("swinv2_tiny", embed_dim=16, depths=(2,), num_heads=(2,), image_size=192, window_size=24)
    peaks = []
    for in_cache in (True, False):
        for block in encoder.layers[0].blocks:
            block.attn.in_cache = in_cache
        with TrackedMemory() as memory:
            encoder(torch.zeros(2, 3, 192, 192)).sum().backward()
        peaks.append(memory.peak)
    assert peaks[0] < 0.5 * peaks[1]


@pytest.mark.parametrize(("windows", "heads", "chunks"), [(8, 4, 1), (8, 4, 3), (8, 4, 16), (1, 4, 3), (2, 3, 100)])
def test_chunks_cover_every_window_and_head_once(windows, heads, chunks):
    seen = torch.zeros(windows, heads)
    parts = list(split_chunks(windows, heads, chunks))
    for part in parts:
        seen[part] += 1
    assert (seen == 1).all() and len(parts) >= min(chunks, windows * heads)


def test_chunks_do_not_change_outputs_under_bf16_autocast():
    torch.manual_seed(0)
    encoder = make_encoder("swinv2_tiny", embed_dim=16, depths=(2, 2), num_heads=(2, 4), image_size=48, window_size=6)
    images = torch.randn(2, 3, 48, 48)
    outputs = []
    for chunks in (1, 4):
        encoder.save_memory(attention_chunks=chunks)
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(encoder(images))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("name", ["swinv2_tiny", "swin_tiny"])
def test_model_converted_to_bf16_stays_accurate(name):
    torch.manual_seed(0)
    encoder = make_encoder(name, embed_dim=16, depths=(2, 2), num_heads=(2, 4), image_size=48, window_size=4)
    images = torch.randn(2, 3, 48, 48)
    expected = encoder(images).detach()
    encoder.bfloat16()
    features = encoder(images.bfloat16())
    features.sum().backward()
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(features.float(), expected, rtol=0.05, atol=0.05)
    with watch_attention(encoder) as watched:
        encoder(images.bfloat16())
    assert watched["max_attention_logit"] > 0
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


@pytest.mark.slow
def test_chunks_reduce_memory_of_large_windows_fourfold():
    """Chunks alone reduce the peak at least fourfold, for a block of V2-B at 768 px, windows of 24 tokens, bf16."""
    config = make_config("swinv2_base", image_size=768, window_size=24)
    with torch.device("meta"):
        block = make_blocks(config, 0, [0.0, 0.0])[1]

    def peak(chunks: int) -> int:
        fake_block = copy.deepcopy(block)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake_block.to_empty(device="cpu")
            fake_block.attn.chunks, fake_block.attn.in_cache = chunks, False
            x = torch.empty(1, 192, 192, 128, requires_grad=True)
            with TrackedMemory() as memory:
                with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                    out = fake_block(x)
                out.float().sum().backward()
        return memory.peak

    assert peak(1) > 4 * peak(16)


def make_small(**settings) -> SwinEncoder:
    torch.manual_seed(0)
    encoder = make_encoder(
        "swinv2_tiny", embed_dim=16, depths=(2, 4), num_heads=(2, 4), image_size=48, window_size=6, **settings
    ).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return encoder


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", CHECKPOINTINGS)
@pytest.mark.parametrize("chunks", [1, (8, 2)])
@pytest.mark.parametrize(
    "settings", [{"drop_path": 0.4}, {"extra_norm_interval": 2}, {"norm": "pre", "attention": "dot"}]
)
def test_memory_options_do_not_change_gradients(checkpointing, chunks, settings):
    encoder = make_small(**settings).train()
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)

    def run() -> list[Tensor]:
        encoder.zero_grad()
        torch.manual_seed(3)
        loss = (encoder(images) ** 2).mean()
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in encoder.parameters())]

    expected = run()
    encoder.save_memory(checkpointing=checkpointing, attention_chunks=chunks)
    for found, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


def test_checkpointing_stores_fewer_activations():
    encoder = make_small().train()
    images = torch.randn(4, 3, 48, 48, dtype=torch.float64)
    encoder(images)  # fills the caches of masks and coordinates, which stay allocated
    stored = {}
    for checkpointing in CHECKPOINTINGS:
        encoder.save_memory(checkpointing=checkpointing)
        with TrackedMemory() as memory:
            loss = encoder(images).sum()
            stored[checkpointing] = memory.current
            loss.backward()
    assert stored["selective"] < 0.6 * stored["none"] and stored["full"] < 0.4 * stored["none"]
    assert stored["full"] < 0.5 * stored["selective"]


def test_tracked_memory_counts_live_tensors():
    given = torch.zeros(1000)
    with TrackedMemory() as memory:
        given.view(10, 100)
        assert memory.current == 0  # a view of memory allocated earlier
        first = torch.zeros(1000)
        view = first[:10]
        assert memory.current == 4000
        second = first + 1
        assert (memory.current, memory.peak) == (8000, 8000)
        del first
        assert memory.current == 8000  # its view keeps the memory allocated
        del view, second
        assert (memory.current, memory.peak) == (0, 8000)


def test_chunks_are_chosen_by_available_memory():
    config = make_config("swinv2_base", image_size=768, window_size=24)
    assert choose_chunks(config, 1, 10**15) == [1, 1, 1, 1]
    chunks = choose_chunks(config, 1, 4 * 10**9)
    # 192 x 192 tokens, 4 heads and 576 keys, three copies in fp32, must fit into a sixteenth of 4 GB.
    assert chunks[0] == 8 and chunks == sorted(chunks, reverse=True)
    assert choose_chunks(config, 2, 4 * 10**9)[0] == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpointing": "some"}, "unknown checkpointing 'some': expected one of none, selective, full"),
        ({"attention_chunks": 0}, "expected a positive integer for each of 2 stages"),
        ({"attention_chunks": [2, 2, 1]}, "expected a positive integer for each of 2 stages"),
    ],
)
def test_invalid_memory_options_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_small().save_memory(**settings)


@pytest.mark.parametrize("checkpointing", CHECKPOINTINGS)
def test_checkpointing_of_windows_with_fewer_tokens_than_head_channels(checkpointing):
    """In this case selective checkpointing saves the logits, so they must not be modified in place."""
    torch.manual_seed(0)
    encoder = make_encoder(
        "swinv2_tiny", embed_dim=32, depths=(2, 2), num_heads=(1, 2), image_size=60, window_size=5
    ).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    images = torch.randn(2, 3, 60, 60, dtype=torch.float64)

    def gradients() -> list[Tensor]:
        encoder.zero_grad()
        (encoder(images) ** 2).mean().backward()
        return [parameter.grad.clone() for parameter in encoder.parameters()]

    expected = gradients()
    encoder.save_memory(checkpointing=checkpointing, attention_chunks=4)
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


def test_watch_attention_computes_logits_in_chunks():
    encoder = make_encoder("swinv2_tiny", embed_dim=16, depths=(2, 2), num_heads=(2, 4), image_size=96, window_size=24)
    images = torch.randn(4, 3, 96, 96)
    numbers = []
    for chunks in (1, 7):
        encoder.save_memory(attention_chunks=chunks)
        for attention in (module for module in encoder.modules() if isinstance(module, WindowAttention)):
            attention.in_cache = False
        with TrackedMemory() as memory, torch.no_grad(), watch_attention(encoder) as watched:
            encoder(images)
        numbers.append((watched["max_attention_logit"], memory.peak))
    assert numbers[0][0] == pytest.approx(numbers[1][0]) and numbers[1][1] < 0.7 * numbers[0][1]
