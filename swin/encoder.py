"""Hierarchical encoder from pixels to tokens to features, for any image size.

Letters: b batch, h w token grid, c channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from swin.activation_checkpointing import CHECKPOINTINGS, Checkpointing, run_checkpointed
from swin.attention import ATTENTIONS
from swin.blocks import (
    PatchEmbed,
    PatchMerging,
    PreNormBlock,
    PreNormPatchMerging,
    ResPostNormBlock,
    SwinBlock,
)
from swin.config import SwinConfig, make_config
from swin.position_bias import make_position_bias
from swin.triton_attention import available

# The classes of blocks and patch merging for each value of `norm`.
_PARTS: dict[str, tuple[type[PreNormBlock | ResPostNormBlock], type[PatchMerging | PreNormPatchMerging]]] = {
    "res-post": (ResPostNormBlock, PatchMerging),
    "pre": (PreNormBlock, PreNormPatchMerging),
}


class SwinStage(nn.Module):
    """Blocks at one resolution, every other one shifted, and the patch merging that leads to the next stage."""

    checkpointing: Checkpointing = "none"

    def __init__(self, blocks: list[SwinBlock], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks without merging: ``(b, h, w, c)`` -> ``(b, h, w, c)``."""
        for block in self.blocks:
            x = run_checkpointed(block, x, self.checkpointing)
        return x


class SwinEncoder(nn.Module):
    """Swin Transformer: V1, V2 or any combination of their parts.

    ``forward`` is :meth:`embed` followed by :meth:`encode`; call the two separately to change tokens before the first
    block. Grid sizes are taken from the tensors, so every call may use another image size.

    ``history`` lists the operations applied to the weights (import, transfer, ...), oldest first, as plain JSON. It is
    saved with them.
    """

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        self.history: list[dict[str, Any]] = []
        rates = torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").tolist()
        self.patch_embed = PatchEmbed(config.in_chans, config.embed_dim, config.patch_size)
        self.layers = nn.ModuleList(
            _make_stage(config, index, rates[sum(config.depths[:index]) :]) for index in range(len(config.depths))
        )
        self.norm = nn.LayerNorm(config.num_features)

    def save_memory(
        self, *, checkpointing: Checkpointing = "none", attention_chunks: int | Sequence[int] = 1
    ) -> SwinEncoder:
        """Set the memory options, which trade time for memory without changing results.

        Args:
            checkpointing: which activations blocks recompute in the backward pass, see
                :func:`swin.activation_checkpointing.run_checkpointed`.
            attention_chunks: number of chunks in which attention is computed, for all stages or one per stage; see
                :mod:`swin.chunked_attention`. Swin V2 uses chunks in the first two stages (section 3.5).

        Raises:
            ValueError: unknown checkpointing, or not one positive integer per stage.
        """
        if checkpointing not in CHECKPOINTINGS:
            raise ValueError(f"unknown checkpointing {checkpointing!r}: expected one of {', '.join(CHECKPOINTINGS)}")
        chunks = [attention_chunks] * len(self.layers) if isinstance(attention_chunks, int) else list(attention_chunks)
        if len(chunks) != len(self.layers) or not all(type(count) is int and count > 0 for count in chunks):
            raise ValueError(
                f"attention_chunks {chunks}: expected a positive integer for each of {len(self.layers)} stages"
            )
        for stage, count in zip(cast(Iterable[SwinStage], self.layers), chunks, strict=True):
            stage.checkpointing = checkpointing
            for block in cast(Iterable[SwinBlock], stage.blocks):
                block.attn.chunks = count
        return self

    def can_use_kernel(self, device: torch.device) -> bool:
        """Return whether the attention kernel runs on this device."""
        return available(device)

    def use_kernel(self, on: bool = True, *, device: torch.device | str | None = None) -> SwinEncoder:
        """Switch the fused kernel of :mod:`swin.triton_attention` on or off. Results differ by rounding only.

        Compiled and exported models do not use the kernel.

        Args:
            device: device on which the encoder will run, if its weights are not on it yet.

        Raises:
            ValueError: Triton is not installed or does not run on the device.
        """
        device = next(self.parameters()).device if device is None else torch.device(device)
        if on and not self.can_use_kernel(device):
            raise ValueError(
                f"the attention kernel cannot run on {device.type}: it needs Triton and a GPU (for tests, Triton on a "
                "CPU with TRITON_INTERPRET=1); switch it off on this device"
            )
        for stage in cast(Iterable[SwinStage], self.layers):
            for block in cast(Iterable[SwinBlock], stage.blocks):
                block.attn.fused = on
        return self

    def use_compiler(self, on: bool = True) -> SwinEncoder:
        """Compile blocks for training; equal blocks share the compiled code. Results differ by rounding only.

        In evaluation mode, and while :func:`swin.attention.watch_attention` is active, blocks run uncompiled. Do not
        combine ``watch_attention`` with a backward pass and checkpointing: the recomputation would run compiled. Other
        hooks inside blocks are not called, attention is not chunked, and compiler errors are raised.
        """
        for stage in cast(Iterable[SwinStage], self.layers):
            for block in cast(Iterable[SwinBlock], stage.blocks):
                block.compiled = on
        return self

    def embed(self, images: Tensor) -> Tensor:
        """Embed pixels ``(b, in_chans, H, W)`` as tokens ``(b, h, w, c)``, h = ceil(H / patch_size)."""
        return self.patch_embed(images)

    def encode(self, tokens: Tensor) -> Tensor:
        """Encode tokens ``(b, h, w, c)`` as normalized features of the last stage, ``(b, h', w', num_features)``."""
        for stage in cast(Iterable[SwinStage], self.layers):
            tokens = stage.downsample(stage(tokens))
        return self.norm(tokens)

    def forward(self, images: Tensor) -> Tensor:
        """Encode pixels ``(b, in_chans, H, W)`` as features ``(b, h', w', num_features)``."""
        return self.encode(self.embed(images))

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Compute the output of every stage before merging: ``(b, c, h, w)`` at strides ``patch_size * 2**i``.

        The maps are not normalized; detectors and segmenters have their own norm per map. The last map followed by
        ``norm`` equals :meth:`forward`.
        """
        tokens, maps = self.embed(images), []
        for stage in cast(Iterable[SwinStage], self.layers):
            tokens = stage(tokens)
            maps.append(rearrange(tokens, "b ... c -> b c ..."))
            tokens = stage.downsample(tokens)
        return maps

    def depth_of_parameters(self) -> dict[str, int]:
        """Return the depth of each parameter by name, for layer-wise learning-rate decay.

        The patch embedding has depth 0. Blocks are numbered from 1 through all stages. A merging layer has the depth
        of the last block before it, and the final norm has ``sum(depths) + 1``.
        """
        depths = {f"patch_embed.{name}": 0 for name, _ in self.patch_embed.named_parameters()}
        depth = 0
        for index, stage in enumerate(cast(Iterable[SwinStage], self.layers)):
            for block_index, block in enumerate(stage.blocks):
                depth += 1
                for name, _ in block.named_parameters():
                    depths[f"layers.{index}.blocks.{block_index}.{name}"] = depth
            for name, _ in stage.downsample.named_parameters():
                depths[f"layers.{index}.downsample.{name}"] = depth
        for name, _ in self.norm.named_parameters():
            depths[f"norm.{name}"] = depth + 1
        return depths

    def no_decay_parameters(self) -> set[nn.Parameter]:
        """Return the parameters that must not decay, as objects.

        These are all vectors (norms and biases), the temperatures and the position biases.
        """
        return no_decay_parameters(self)


def no_decay_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of a module that must not decay: vectors, temperatures and position biases."""
    no_decay = {parameter for parameter in module.parameters() if parameter.ndim <= 1}
    for part in module.modules():
        if isinstance(part, SwinBlock):
            no_decay |= part.attn.no_decay_parameters()
    return no_decay


def make_blocks(config: SwinConfig, index: int, drop_path: Sequence[float]) -> list[SwinBlock]:
    """Build the blocks of a stage, every other one shifted, with the drop-path rate of each."""
    make_block, _ = _PARTS[config.norm]
    dim, heads = config.embed_dim * 2**index, config.num_heads[index]
    assert config.reference_windows is not None
    reference = config.reference_windows[index]
    return [
        make_block(
            dim,
            ATTENTIONS[config.attention](dim, heads, make_position_bias(config.position_bias, heads, reference)),
            config.window,
            shifted=block % 2 == 1,
            mlp_ratio=config.mlp_ratio,
            drop_path=drop_path[block],
            extra_norm=bool(config.extra_norm_interval) and (block + 1) % config.extra_norm_interval == 0,
        )
        for block in range(config.depths[index])
    ]


def _make_stage(config: SwinConfig, index: int, drop_path: Sequence[float]) -> SwinStage:
    """Build the blocks of a stage and its patch merging, which the last stage lacks."""
    _, make_merging = _PARTS[config.norm]
    is_last = index == len(config.depths) - 1
    downsample = nn.Identity() if is_last else make_merging(config.embed_dim * 2**index)
    return SwinStage(make_blocks(config, index, drop_path), downsample)


def make_encoder(name: str, **settings: Any) -> SwinEncoder:
    """Build a named encoder with newly initialized weights.

    Args:
        name: ``swinv2_`` + ``tiny, small, base, large, huge, giant`` or ``3b``, ``swin_`` + ``tiny,
            small, base`` or ``large``.
        settings: any field of :class:`swin.SwinConfig`, for instance ``image_size=192``,
            ``window_size=12``, ``in_chans=3``, ``drop_path=0.1``. A single integer means a square.

    Raises:
        ValueError: unknown name or invalid settings.
    """
    return SwinEncoder(make_config(name, **settings))
