"""Building blocks of the encoder: patch embedding, blocks with the norm before or after a branch, patch merging.

Letters: b batch, h w token grid, c channels. Shapes are written for images; tokens of a video are ``(b, f, h, w, c)``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from swin.attention import WindowAttention
from swin.config import Size
from swin.linear import Linear
from swin.windows import fit_windows


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch for a sample with probability ``rate`` (arXiv 1603.09382).

    The branches that are not dropped are divided by ``1 - rate``, so that the expectation does not change.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def draw(self, x: Tensor) -> Tensor | None:
        """Draw the scale of a branch per sample of x ``(b, ...)``: ``(b, 1, ...)``, or None if nothing is dropped."""
        if not self.training or self.rate == 0:
            return None
        return x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def add(x: Tensor, branch: Tensor, drop_path_scale: Tensor | None) -> Tensor:
    """Add a residual branch, multiplied by the scale from :meth:`DropPath.draw`."""
    return x + branch if drop_path_scale is None else x + branch * drop_path_scale


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, which the backward pass recomputes."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if torch.compiler.is_compiling():
            return self.fc2(self.act(x))
        # Under autocast x is already in half precision; the weights must match it in forward and backward.
        out: Tensor = _GeluLinear.apply(x, self.fc2.weight.to(x.dtype), self.fc2.bias.to(x.dtype))
        return out


class _GeluLinear(torch.autograd.Function):
    """``linear(gelu(x))`` that saves only x: a quarter less of all that a block saves for the backward pass."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        context.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        x, weight = context.saved_tensors
        rows = gradient.flatten(0, -2)
        dweight = rows.T @ F.gelu(x).flatten(0, -2)
        return torch.ops.aten.gelu_backward(gradient @ weight, x), dweight, rows.sum(dim=0)


class PatchEmbed(nn.Module):
    """Patch embedding: one linear layer on each non-overlapping patch, then a norm."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """Embed ``(b, in_chans, H, W)`` as ``(b, h, w, c)``, padding with zeros at the bottom and right if needed."""
        bottom, right = -images.shape[-2] % self.patch_size, -images.shape[-1] % self.patch_size
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom))
        return self.norm(rearrange(self.proj(images), "b c h w -> b h w c"))


class PatchMerging(nn.Module):
    """Downsampling to half the grid and twice the channels; the norm follows the reduction (Swin V2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Merge 2 x 2 tokens: ``(b, h, w, c)`` -> ``(b, ceil(h/2), ceil(w/2), 2c)``, odd sides padded with zeros."""
        return self.norm(self.reduction(merge_2x2(x)))


class PreNormPatchMerging(nn.Module):
    """Downsampling to half the grid and twice the channels; the norm precedes the reduction (Swin V1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Merge 2 x 2 tokens: ``(b, h, w, c)`` -> ``(b, ceil(h/2), ceil(w/2), 2c)``, odd sides padded with zeros."""
        return self.reduction(self.norm(merge_2x2(x)))


def merge_2x2(x: Tensor) -> Tensor:
    """Concatenate the four tokens of every 2 x 2 group: ``(b, h, w, c)`` -> ``(b, ceil(h/2), ceil(w/2), 4c)``.

    The number of frames of a video ``(b, f, h, w, c)`` does not change (Video Swin, arXiv 2106.13230).
    """
    bottom, right = x.shape[-3] % 2, x.shape[-2] % 2
    if bottom or right:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    # The tokens of a group are ordered column by column, as the official weights expect.
    return rearrange(x, "b ... (h two_h) (w two_w) c -> b ... h w (two_w two_h c)", two_h=2, two_w=2)


class SwinBlock(nn.Module):
    """Base class: window attention and an MLP, each on a residual branch. Subclasses place the norms.

    With ``extra_norm`` the main branch is normalized at the end, which Huge and 3b need for stable training
    (Swin V2, section 3.6).
    """

    branch_norm: type[nn.LayerNorm] = nn.LayerNorm
    compiled = False

    def __init__(
        self,
        dim: int,
        attn: WindowAttention,
        window_size: Size,
        *,
        shifted: bool,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        extra_norm: bool = False,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shifted = shifted
        self.attn = attn
        self.norm1 = self.branch_norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm2 = self.branch_norm(dim)
        self.norm3 = nn.LayerNorm(dim) if extra_norm else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block: ``(b, h, w, c)`` -> ``(b, h, w, c)``."""
        drop_path_scale = self.drop_path.draw(x), self.drop_path.draw(x)
        # Hooks on the attention need concrete tensors, which compiled blocks do not expose.
        if self.compiled and self.training and not self.attn._forward_pre_hooks:
            out: Tensor = compiled_branches()(self, x, *drop_path_scale)
            return out
        return self.branches(x, *drop_path_scale)

    def branches(self, x: Tensor, *drop_path_scale: Tensor | None) -> Tensor:
        """Apply both residual branches, each multiplied by its drop-path scale."""
        raise NotImplementedError

    def attend(self, x: Tensor) -> Tensor:
        """Apply attention within the windows that fit the grid of x: ``(b, h, w, c)`` -> ``(b, h, w, c)``."""
        return self.attn(x, fit_windows(tuple(x.shape[1:-1]), self.window_size, self.shifted))


@cache
def compiled_branches() -> Callable[..., Tensor]:
    """Compile :meth:`SwinBlock.branches`; blocks of the same sizes share the compiled code.

    The drop-path scales are arguments, because tracing the drop-path rate would compile every block separately.
    """
    import torch._dynamo  # the import takes a second

    # Each stage compiles two kinds of blocks, shifted or not, for every image size and batch size.
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), 1024))
    return torch.compile(
        lambda block, x, *drop_path_scale: block.branches(x, *drop_path_scale), fullgraph=True, dynamic=False
    )


class ZeroInitNorm(nn.LayerNorm):
    """LayerNorm whose weight starts at 0."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class ResPostNormBlock(SwinBlock):
    """``x + LN(attention(x))``, then ``x + LN(mlp(x))`` (Swin V2, figure 1).

    Both branch norms start with weight 0, so that the block is initially the identity (official initialization).
    """

    branch_norm = ZeroInitNorm

    def branches(self, x: Tensor, *drop_path_scale: Tensor | None) -> Tensor:
        x = add(x, self.norm1(self.attend(x)), drop_path_scale[0])
        x = add(x, self.norm2(self.mlp(x)), drop_path_scale[1])
        return self.norm3(x)


class PreNormBlock(SwinBlock):
    """``x + attention(LN(x))``, then ``x + mlp(LN(x))`` (Swin V1, equation 3)."""

    def branches(self, x: Tensor, *drop_path_scale: Tensor | None) -> Tensor:
        x = add(x, self.attend(self.norm1(x)), drop_path_scale[0])
        x = add(x, self.mlp(self.norm2(x)), drop_path_scale[1])
        return self.norm3(x)
