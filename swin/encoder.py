"""The hierarchical encoder: pixels -> tokens -> features, at any image size.

Letters: b batch, h w token grid, c channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from swin.activation_checkpointing import CHECKPOINTINGS, Checkpointing, run_saving
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

# The block and the merging of each `norm`.
_PARTS: dict[str, tuple[type[PreNormBlock | ResPostNormBlock], type[PatchMerging | PreNormPatchMerging]]] = {
    "res-post": (ResPostNormBlock, PatchMerging),
    "pre": (PreNormBlock, PreNormPatchMerging),
}


class SwinStage(nn.Module):
    """Blocks at one resolution, every other one shifted, then the merging that leads to the next."""

    checkpointing: Checkpointing = "none"

    def __init__(self, blocks: list[SwinBlock], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """``(b, h, w, c)`` -> ``(b, h, w, c)``, before merging."""
        for block in self.blocks:
            x = run_saving(block, x, self.checkpointing)
        return x


class SwinEncoder(nn.Module):
    """Swin Transformer, V1, V2 or anything between.

    ``forward`` is :meth:`embed` followed by :meth:`encode`; whoever wants to change tokens before
    the first block works between the two. Grids are read off the tensors, so any image size can be
    given at any time.

    ``history`` is what has been done to the weights, oldest first, as plain JSON; it is saved with them.
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
        """Train the same in less memory and more time.

        Args:
            checkpointing: what blocks compute again for the gradient, see :func:`swin.activation_checkpointing.run_saving`.
            attention_chunks: in how many chunks attention is computed, for all stages or each of them; see
                :mod:`swin.chunked_attention`. Swin V2 does so in the first two stages (section 3.5).

        Raises:
            ValueError: unknown checkpointing, or not one positive number for each stage.
        """
        if checkpointing not in CHECKPOINTINGS:
            raise ValueError(f"unknown checkpointing {checkpointing!r}: expected one of {', '.join(CHECKPOINTINGS)}")
        chunks = [attention_chunks] * len(self.layers) if isinstance(attention_chunks, int) else list(attention_chunks)
        if len(chunks) != len(self.layers) or not all(type(number) is int and number > 0 for number in chunks):
            raise ValueError(
                f"attention_chunks {chunks}: expected a positive number for each of {len(self.layers)} stages"
            )
        for stage, number in zip(cast(Iterable[SwinStage], self.layers), chunks, strict=True):
            stage.checkpointing = checkpointing
            for block in cast(Iterable[SwinBlock], stage.blocks):
                block.attn.chunks = number
        return self

    def can_use_kernel(self, device: torch.device) -> bool:
        """Whether :meth:`use_kernel` would do there."""
        return available(device)

    def use_kernel(self, on: bool = True, *, device: torch.device | str | None = None) -> SwinEncoder:
        """Attend by one kernel, see :mod:`swin.triton_attention`: the same numbers but for rounding; ``False`` goes back.

        Models that are compiled or exported attend as without it.

        Args:
            device: where the encoder will run, if its weights are not there yet.

        Raises:
            ValueError: Triton is not installed, or does not run there.
        """
        place = next(self.parameters()).device if device is None else torch.device(device)
        if on and not self.can_use_kernel(place):
            raise ValueError(
                f"the attention kernel cannot run on {place.type}: it needs Triton and a GPU (or, to be tried, "
                "TRITON_INTERPRET=1 on a processor); leave it off there"
            )
        for stage in cast(Iterable[SwinStage], self.layers):
            for block in cast(Iterable[SwinBlock], stage.blocks):
                block.attn.fused = on
        return self

    def use_compiler(self, on: bool = True) -> SwinEncoder:
        """Compile blocks for training, one program for all that are alike: the same numbers but for rounding.

        Without training they run as they are, and so does what :func:`swin.attention.watch_attention` looks at (not in
        a pass whose gradient is wanted with checkpointing, which would go both ways). Other hooks inside of blocks
        are passed over, attention is never cut into chunks, and an error of the compiler is raised.
        """
        for stage in cast(Iterable[SwinStage], self.layers):
            for block in cast(Iterable[SwinBlock], stage.blocks):
                block.compiled = on
        return self

    def embed(self, images: Tensor) -> Tensor:
        """Pixels ``(b, in_chans, H, W)`` -> tokens ``(b, h, w, c)``, h = ceil(H / patch_size)."""
        return self.patch_embed(images)

    def encode(self, tokens: Tensor) -> Tensor:
        """Tokens ``(b, h, w, c)`` -> normalised features of the last stage ``(b, h', w', num_features)``."""
        for stage in cast(Iterable[SwinStage], self.layers):
            tokens = stage.downsample(stage(tokens))
        return self.norm(tokens)

    def forward(self, images: Tensor) -> Tensor:
        """Pixels ``(b, in_chans, H, W)`` -> features ``(b, h', w', num_features)``."""
        return self.encode(self.embed(images))

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """The output of every stage before merging: ``(b, c, h, w)`` at strides 4, 8, 16, 32.

        The maps are not normalised; a detector or segmenter brings its own norm per map. The last
        map followed by ``norm`` equals :meth:`forward`.
        """
        tokens, maps = self.embed(images), []
        for stage in cast(Iterable[SwinStage], self.layers):
            tokens = stage(tokens)
            maps.append(rearrange(tokens, "b ... c -> b c ..."))
            tokens = stage.downsample(tokens)
        return maps

    def depth_of_parameters(self) -> dict[str, int]:
        """How deep each parameter sits, by name, for layer-wise learning-rate decay.

        0 for the patch embedding; blocks count from 1 through all stages; a merging layer belongs
        to the last block before it; the final norm is ``sum(depths) + 1``.
        """
        depths = {f"patch_embed.{name}": 0 for name, _ in self.patch_embed.named_parameters()}
        block_number = 0
        for index, stage in enumerate(cast(Iterable[SwinStage], self.layers)):
            for block_index, block in enumerate(stage.blocks):
                block_number += 1
                for name, _ in block.named_parameters():
                    depths[f"layers.{index}.blocks.{block_index}.{name}"] = block_number
            for name, _ in stage.downsample.named_parameters():
                depths[f"layers.{index}.downsample.{name}"] = block_number
        for name, _ in self.norm.named_parameters():
            depths[f"norm.{name}"] = block_number + 1
        return depths

    def no_decay_parameters(self) -> set[nn.Parameter]:
        """Parameters that weight decay must leave alone, as objects.

        All vectors (norms and biases), the temperatures and the position biases.
        """
        return no_decay_parameters(self)


def no_decay_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Vectors, temperatures and position biases, anywhere in a module."""
    no_decay = {parameter for parameter in module.parameters() if parameter.ndim <= 1}
    for part in module.modules():
        if isinstance(part, SwinBlock):
            no_decay |= part.attn.no_decay_parameters()
    return no_decay


def make_blocks(config: SwinConfig, index: int, drop_path: Sequence[float]) -> list[SwinBlock]:
    """The blocks of a stage, every other one shifted; ``drop_path`` has a rate for each."""
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
    _, make_merging = _PARTS[config.norm]
    is_last = index == len(config.depths) - 1
    downsample = nn.Identity() if is_last else make_merging(config.embed_dim * 2**index)
    return SwinStage(make_blocks(config, index, drop_path), downsample)


def make_encoder(name: str, **settings: Any) -> SwinEncoder:
    """Build a named encoder with fresh weights.

    Args:
        name: ``swinv2_`` + ``tiny, small, base, large, huge, giant`` or ``3b``, ``swin_`` + ``tiny,
            small, base`` or ``large``.
        settings: any field of :class:`swin.SwinConfig`, for instance ``image_size=192``,
            ``window_size=12``, ``in_chans=3``, ``drop_path=0.1``. One number means a square.

    Raises:
        ValueError: unknown name or settings that cannot be built.
    """
    return SwinEncoder(make_config(name, **settings))
