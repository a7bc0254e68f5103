"""Encoder: parameter counts, shapes, invariances, parameter groups and receptive fields."""

from __future__ import annotations

import pytest
import torch

import swin
from swin import attention
from swin.attention import CosineAttention, DotAttention
from swin.blocks import DropPath, PreNormBlock, ResPostNormBlock, SwinBlock, add
from swin.chunked_attention import split_heads
from swin.position_bias import make_position_bias
from swin.windows import fit_windows

V1 = {"attention": "dot", "norm": "pre", "position_bias": "table"}
VARIANTS = [
    {"attention": attention, "norm": norm, "position_bias": position_bias}
    for attention in ("cosine", "dot")
    for norm in ("res-post", "pre")
    for position_bias in ("log_cpb", "log_cpb_paper", "linear_cpb", "table")
]

PARAMETERS_WITH_HEAD = {
    "swin_tiny": 28_288_354,
    "swin_small": 49_606_258,
    "swin_base": 87_768_224,
    "swin_large": 196_532_476,
    "swinv2_tiny": 28_347_154,
    "swinv2_small": 49_728_418,
    "swinv2_base": 87_918_816,
    "swinv2_large": 196_739_932,
    "swinv2_huge": 658_036_370,
    "swinv2_giant": 1_064_561_996,
    "swinv2_3b": 3_001_940_680,
}


def small_encoder(**settings) -> swin.SwinEncoder:
    settings = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "image_size": 32, "window_size": 4} | settings
    torch.manual_seed(0)
    encoder = swin.make_encoder("swinv2_tiny", **settings).double()
    randomize_parameters(encoder)
    return encoder


def small_block(window, *, shifted: bool, v1: bool = False) -> SwinBlock:
    torch.manual_seed(0)
    if v1:
        block = PreNormBlock(8, DotAttention(8, 2, make_position_bias("table", 2, window)), window, shifted=shifted)
    else:
        attention = CosineAttention(8, 2, make_position_bias("log_cpb", 2, window))
        block = ResPostNormBlock(8, attention, window, shifted=shifted)
    return block.double()


def cosine_attention(window) -> CosineAttention:
    return CosineAttention(16, 2, make_position_bias("log_cpb", 2, window))


def randomize_parameters(module: torch.nn.Module) -> None:
    """Add noise to all parameters, because block norms start at 0 and would hide every branch."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@pytest.mark.parametrize("name", PARAMETERS_WITH_HEAD)
def test_parameter_counts_with_a_head_of_1000_classes(name):
    with torch.device("meta"):
        encoder = swin.make_encoder(name)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert count + (encoder.config.num_features + 1) * 1000 == PARAMETERS_WITH_HEAD[name]


def test_blocks_are_initialized_as_identity():
    block = swin.make_encoder("swinv2_tiny", embed_dim=16, depths=(2,), num_heads=(2,), window_size=4).layers[0]
    x = torch.randn(2, 8, 8, 16)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (30, 41), (4, 4), (5, 60)])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: " ".join(variant.values()))
def test_any_image_size_gives_finite_maps_of_the_expected_shape(variant, size):
    encoder = small_encoder(**variant)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    h, w = -(-size[0] // 4), -(-size[1] // 4)
    features, maps = encoder(images), encoder.pyramid(images)
    assert features.shape == (2, -(-h // 2), -(-w // 2), 32)
    assert [m.shape for m in maps] == [(2, 16, h, w), (2, 32, -(-h // 2), -(-w // 2))]
    assert features.isfinite().all()
    torch.testing.assert_close(encoder.norm(maps[-1].permute(0, 2, 3, 1)), features)


def test_pyramid_of_a_published_size_has_strides_4_8_16_32():
    with torch.device("meta"):
        encoder = swin.make_encoder("swinv2_tiny")
    maps = encoder.pyramid(torch.empty(1, 3, 224, 160, device="meta"))
    assert [tuple(m.shape) for m in maps] == [(1, 96, 56, 40), (1, 192, 28, 20), (1, 384, 14, 10), (1, 768, 7, 5)]


@pytest.mark.parametrize("variant", [{}, V1], ids=["v2", "v1"])
def test_images_of_a_batch_are_independent(variant):
    encoder = small_encoder(**variant)
    images = torch.randn(3, 3, 36, 28, dtype=torch.float64)
    order = [2, 0, 1]
    torch.testing.assert_close(encoder(images[order]), encoder(images)[order], rtol=1e-12, atol=1e-12)


def products(attention, q, k) -> torch.Tensor:
    """Logits without a bias."""
    q, k = attention.scale(q, k, attention.factor())
    return q @ k.transpose(-2, -1)


def test_cosine_logits_do_not_depend_on_the_norm_of_queries_and_keys():
    attention = cosine_attention((4, 4)).double()
    randomize_parameters(attention)
    q, k = torch.randn(2, 3, 2, 16, 8, dtype=torch.float64).unbind()
    torch.testing.assert_close(products(attention, 7 * q, 0.1 * k), products(attention, q, k))


def test_temperature_is_clamped_at_one_hundredth():
    attention = cosine_attention((2, 2)).double()
    q, k = torch.randn(2, 1, 2, 4, 8, dtype=torch.float64).unbind()
    with torch.no_grad():
        attention.logit_scale.fill_(torch.tensor(100.0).log())
        expected = products(attention, q, k)
        attention.logit_scale.fill_(50.0)
        torch.testing.assert_close(products(attention, q, k), expected)


def test_attention_weights_are_computed_in_fp32_under_autocast():
    attention = cosine_attention((4, 4))
    randomize_parameters(attention)
    seen = []
    softmax = torch.Tensor.softmax
    x, windows = torch.randn(3, 4, 4, 16), fit_windows((4, 4), (4, 4), False)
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(torch.Tensor, "softmax", lambda t, **k: seen.append(t) or softmax(t, **k))
        result = attention(x, windows)
        qkv = attention.project(x.flatten(1, 2))
    assert qkv.dtype == torch.bfloat16
    assert [logits.dtype for logits in seen] == [torch.float32]
    # The inputs of the logits are rounded to bf16, but the logits are not.
    q, k, _ = split_heads(qkv.detach(), 3, attention.num_heads).double()
    cosine = torch.nn.functional.normalize(q, dim=-1) @ torch.nn.functional.normalize(k, dim=-1).transpose(-2, -1)
    exact = cosine * attention.factor().detach() + attention.position_bias((4, 4)).detach()
    torch.testing.assert_close(seen[0].double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.float(), attention(x, windows), rtol=0.05, atol=0.05)


def test_extra_norms_follow_every_nth_block_of_a_stage():
    encoder = swin.make_encoder(
        "swinv2_tiny", embed_dim=8, depths=(2, 7), num_heads=(1, 1), extra_norm_interval=3, image_size=32
    )
    with_norm = [
        (stage, index)
        for stage, layer in enumerate(encoder.layers)
        for index, block in enumerate(layer.blocks)
        if isinstance(block.norm3, torch.nn.LayerNorm)
    ]
    assert with_norm == [(1, 2), (1, 5)]
    x = torch.randn(1, 4, 4, 16) * 50
    out = encoder.layers[1].blocks[2](x)
    torch.testing.assert_close(out.var(dim=-1, correction=0), torch.ones(1, 4, 4), rtol=1e-3, atol=1e-3)


def test_drop_path_drops_samples_and_preserves_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 2, 3)
    drop_path_scale = drop.draw(x)
    assert drop_path_scale.shape == (4000, 1, 1, 1)
    assert drop_path_scale.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert drop_path_scale.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(add(x, 2 * x, drop_path_scale), x + 2 * x * drop_path_scale)
    assert drop.eval().draw(x) is None and torch.equal(add(x, 2 * x, None), 3 * x)


def test_drop_path_grows_linearly_over_all_blocks():
    encoder = swin.make_encoder("swinv2_tiny", drop_path=0.2, image_size=64)
    rates = [block.drop_path.rate for layer in encoder.layers for block in layer.blocks]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(12)])


def test_every_parameter_has_one_depth():
    encoder = swin.make_encoder("swinv2_tiny", image_size=64)
    depths = encoder.depth_of_parameters()
    assert set(depths) == {name for name, _ in encoder.named_parameters()}
    assert depths["patch_embed.proj.weight"] == 0
    assert depths["layers.0.blocks.0.attn.logit_scale"] == 1
    assert depths["layers.0.downsample.reduction.weight"] == 2
    assert depths["layers.2.blocks.5.mlp.fc1.weight"] == 10
    assert depths["norm.weight"] == 13


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: " ".join(variant.values()))
def test_no_decay_parameters_are_vectors_temperatures_and_position_biases(variant):
    encoder = small_encoder(**variant)
    no_decay = encoder.no_decay_parameters()
    for name, parameter in encoder.named_parameters():
        exempt = ("logit_scale", "cpb_mlp", "relative_position_bias")
        expected = parameter.ndim <= 1 or any(word in name for word in exempt)
        assert (parameter in no_decay) == expected, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": (3, 4)}, "16 channels, which 3 heads do not divide"),
        ({"num_heads": (2,)}, "must name the same stages"),
        ({"window_size": 0}, "window_size must be one or two positive integers"),
        ({"image_size": (32, 32, 3)}, "image_size must be one or two positive integers"),
        ({"in_chans": 0}, "in_chans must be at least 1"),
        ({"drop_path": 1.0}, "drop_path must be in"),
        ({"attention": "cos"}, "attention 'cos' is unknown: expected one of cosine, dot"),
        ({"norm": "post"}, "norm 'post' is unknown: expected one of res-post, pre"),
        ({"position_bias": "cpb"}, "position_bias 'cpb' is unknown: expected one of log_cpb, "),
        ({"window_size": (8, 9)}, "window_size 8 x 9 is larger than the 8 x 8 tokens .* use at most 8 x 8"),
        ({"reference_windows": (4,)}, "1 entries, but the encoder has 2 stages"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small_encoder(**settings)


def test_unknown_encoder_name_lists_known_names():
    with pytest.raises(ValueError, match=r"unknown encoder 'swinv3'.*swinv2_3b"):
        swin.make_encoder("swinv3")


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("window", [(4, 4), (3, 5), (2, 4), (1, 1), (7, 7), (9, 2)])
@pytest.mark.parametrize("grid", [(7, 7), (8, 8), (5, 9), (4, 6), (1, 3), (12, 4)])
@pytest.mark.parametrize("v1", [False, True], ids=["v2", "v1"])
def test_a_token_influences_exactly_its_window(grid, window, shifted, v1):
    """Perturb each token of a grid and compare the tokens that change after one block with the definition."""
    block = small_block(window, shifted=shifted, v1=v1)
    randomize_parameters(block)
    if not v1:
        with torch.no_grad():  # soft attention, so that every allowed key has a measurable influence
            block.attn.logit_scale.zero_()
            block.attn.cpb_mlp.layers[1].weight.mul_(0.1)
    h, w = grid
    x = torch.randn(1, h, w, 8, dtype=torch.float64)
    perturbed = x.repeat(h * w, 1, 1, 1)
    for token in range(h * w):
        perturbed[token, token // w, token % w] += torch.randn(8, dtype=torch.float64)
    with torch.no_grad():
        changed = ((block(perturbed) - block(x)).abs().amax(dim=-1) > 1e-9).view(h * w, h * w)
    expected = torch.tensor(
        [
            [same_window((i // w, i % w), (j // w, j % w), grid, window, shifted) for j in range(h * w)]
            for i in range(h * w)
        ]
    )
    assert torch.equal(changed, expected)


def same_window(a, b, grid, window, shifted) -> bool:
    """Return whether two tokens share a window: on each axis they are between the same two window borders.

    Borders are at multiples of the window, moved by half a window in a shifted block. If the window covers the axis,
    there is no border.
    """
    for i, j, size, side in zip(a, b, grid, window, strict=True):
        if side < size:
            shift = side // 2 if shifted else 0
            if (i - shift) // side != (j - shift) // side:
                return False
    return True


def test_tensors_cached_in_inference_mode_can_be_used_in_training():
    block = small_block((3, 3), shifted=True)
    x = torch.randn(1, 7, 5, 8, dtype=torch.float64)
    with torch.inference_mode():
        block(x)
    block(x).sum().backward()


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("v1", [False, True], ids=["v2", "v1"])
def test_padding_is_never_attended(shifted, v1):
    """A partial window at the border of a grid has the same outputs as a grid of the size of the partial window."""
    block = small_block((4, 4), shifted=shifted, v1=v1)
    randomize_parameters(block)
    alone = small_block((4, 4), shifted=False, v1=v1)
    alone.load_state_dict(block.state_dict())
    x = torch.randn(1, 7, 9, 8, dtype=torch.float64)
    # Window borders are at 4 and 8 if unshifted, at 2, 6 and 10 if shifted.
    rest = (slice(6, 7), slice(6, 9)) if shifted else (slice(4, 7), slice(8, 9))
    with torch.no_grad():
        torch.testing.assert_close(block(x)[:, *rest], alone(x[:, *rest]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["swinv2_tiny", "swin_tiny"])
def test_watch_attention_reports_largest_logit_and_heads_at_clamp(name):
    """The largest logit equals the largest input of the softmax, and watching does not change the output."""
    torch.manual_seed(0)
    encoder = swin.make_encoder(
        name, embed_dim=16, depths=(2, 2), num_heads=(2, 4), image_size=40, window_size=4
    ).eval()
    images = torch.randn(2, 3, 40, 40)
    seen = []

    def spy(logits, **options):
        seen.append(logits.max().item())
        return softmax(logits, **options)

    softmax = torch.Tensor.softmax
    with pytest.MonkeyPatch.context() as patch, attention.watch_attention(encoder) as numbers:
        patch.setattr(torch.Tensor, "softmax", spy)
        watched = encoder(images)
    assert len(seen) == 4 and numbers["max_attention_logit"] == pytest.approx(max(seen), rel=1e-6)
    assert numbers["heads_at_clamp"] == 0
    assert torch.equal(watched, encoder(images))
    if name == "swinv2_tiny":
        with torch.no_grad():
            encoder.layers[0].blocks[1].attn.logit_scale[0] = 5.0
            encoder.layers[1].blocks[0].attn.logit_scale[2] = attention.MAX_LOGIT_SCALE
        with attention.watch_attention(encoder) as numbers:
            encoder(images)
        assert numbers["heads_at_clamp"] == 2
