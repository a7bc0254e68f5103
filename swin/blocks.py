"""The parts of a stage: patch embedding, blocks with the norm before or after a branch, patch merging.

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
    """Stochastic depth: drop the branch of a whole sample with probability ``rate`` (arXiv 1603.09382).

    What survives is divided by the survival rate, so that the expectation stays.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def draw(self, x: Tensor) -> Tensor | None:
        """What the branches of x ``(b, ...)`` are multiplied by, ``(b, 1, ...)``; None for one."""
        if not self.training or self.rate == 0:
            return None
        return x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def add(x: Tensor, branch: Tensor, drop_path_scale: Tensor | None) -> Tensor:
    """``x + branch``, times what :meth:`DropPath.draw` said."""
    return x + branch if drop_path_scale is None else x + branch * drop_path_scale


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, which is computed again for the gradient."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if torch.compiler.is_compiling():
            return self.fc2(self.act(x))
        # Under autocast x is in half precision already, and so are the weights for both of its passes.
        out: Tensor = _GeluLinear.apply(x, self.fc2.weight.to(x.dtype), self.fc2.bias.to(x.dtype))
        return out


class _GeluLinear(torch.autograd.Function):
    """``linear(gelu(x))`` that keeps x alone: a quarter less of all that a block keeps."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        context.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        x, weight = context.saved_tensors
        of_rows = gradient.flatten(0, -2)
        dweight = of_rows.T @ F.gelu(x).flatten(0, -2)
        return torch.ops.aten.gelu_backward(gradient @ weight, x), dweight, of_rows.sum(dim=0)


class PatchEmbed(nn.Module):
    """Pixels -> tokens: non-overlapping patches through one linear map, then a norm."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """``(b, in_chans, H, W)`` -> ``(b, h, w, c)``; a remainder is padded with zeros at bottom and right."""
        bottom, right = -images.shape[-2] % self.patch_size, -images.shape[-1] % self.patch_size
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom))
        return self.norm(rearrange(self.proj(images), "b c h w -> b h w c"))


class PatchMerging(nn.Module):
    """Halve the grid, double the channels; the norm follows the reduction (Swin V2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(b, h, w, c)`` -> ``(b, ceil(h/2), ceil(w/2), 2c)``; an odd side is padded with zeros."""
        return self.norm(self.reduction(merge_2x2(x)))


class PreNormPatchMerging(nn.Module):
    """Halve the grid, double the channels; the norm precedes the reduction (Swin V1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(b, h, w, c)`` -> ``(b, ceil(h/2), ceil(w/2), 2c)``; an odd side is padded with zeros."""
        return self.reduction(self.norm(merge_2x2(x)))


def merge_2x2(x: Tensor) -> Tensor:
    """The four tokens of every 2 x 2 cell side by side: ``(b, h, w, c)`` -> ``(b, ceil(h/2), ceil(w/2), 4c)``.

    Frames of a video, ``(b, f, h, w, c)``, stay as many as they are (Video Swin, arXiv 2106.13230).
    """
    bottom, right = x.shape[-3] % 2, x.shape[-2] % 2
    if bottom or right:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    # Column by column inside a cell: the order of the official weights.
    return rearrange(x, "b ... (h two_h) (w two_w) c -> b ... h w (two_w two_h c)", two_h=2, two_w=2)


class SwinBlock(nn.Module):
    """Attention inside windows and an MLP, each on a residual branch; the kinds below place the norms.

    With ``extra_norm`` the main branch is normalised at the end, which Huge and 3b need to stay
    stable (Swin V2, section 3.6).
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
        """``(b, h, w, c)`` -> ``(b, h, w, c)``"""
        drop_path_scale = self.drop_path.draw(x), self.drop_path.draw(x)
        # What is hooked to the attention wants to see numbers, and a compiled block has them nowhere.
        if self.compiled and self.training and not self.attn._forward_pre_hooks:
            out: Tensor = compiled_branches()(self, x, *drop_path_scale)
            return out
        return self.branches(x, *drop_path_scale)

    def branches(self, x: Tensor, *drop_path_scale: Tensor | None) -> Tensor:
        """Both residual branches; ``keep`` is what each is multiplied by."""
        raise NotImplementedError

    def attend(self, x: Tensor) -> Tensor:
        """``(b, h, w, c)`` -> ``(b, h, w, c)``, every token mixed with those of its window."""
        return self.attn(x, fit_windows(tuple(x.shape[1:-1]), self.window_size, self.shifted))


@cache
def compiled_branches() -> Callable[..., Tensor]:
    """:meth:`SwinBlock.branches` through ``torch.compile``: blocks of the same sizes share what was compiled.

    What is drawn comes from outside: a rate of stochastic depth that is traced would be another program per block.
    """
    import torch._dynamo  # takes a second

    # Two of each stage, for every size of images and every batch size.
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), 1024))
    return torch.compile(
        lambda block, x, *drop_path_scale: block.branches(x, *drop_path_scale), fullgraph=True, dynamic=False
    )


class ZeroInitNorm(nn.LayerNorm):
    """A norm that starts at weight 0."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class ResPostNormBlock(SwinBlock):
    """``x + LN(attention(x))``, then ``x + LN(mlp(x))`` (Swin V2, figure 1).

    Both branch norms start at weight 0: the block is the identity at first and every branch grows
    from nothing (official initialisation).
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
