"""SimMIM with the encoders of other libraries, built as their users would: baselines of the step benchmark.

Each maps normalized images ``(b, c, H, W)`` and a token mask ``(b, h, w)``, True = masked, to the loss.
Letters: b batch, h w token grid, c channels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from simmim.export.convert import timm_arguments, transformers_arguments
from simmim.masking import expand_mask
from simmim.tasks.simmim import SimMIM
from swin import SwinConfig
from swin.weights.state_dict_names import from_native

Encode = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""Function of an encoder, images, token mask and mask token -> features ``(b, h, w, c)``."""


class Baseline(nn.Module):
    """SimMIM as in the official code: mask token, any encoder, one layer that predicts all pixels, masked L1."""

    def __init__(self, encoder: nn.Module, encode: Encode, ours: SimMIM) -> None:
        super().__init__()
        config = ours.encoder.config
        self.encoder, self.encode, self.token, self.stride = encoder, encode, config.patch_size, config.stride
        self.mask_token = nn.Parameter(ours.mask_token.detach().clone())
        self.head = nn.Conv2d(config.num_features, config.stride**2 * config.in_chans, kernel_size=1)
        with torch.no_grad():
            self.head.weight.copy_(ours.head.weight[:, :, None, None])  # type: ignore[index]
            self.head.bias.copy_(ours.head.bias)  # type: ignore[union-attr, arg-type]

    def forward(self, images: Tensor, token_mask: Tensor) -> Tensor:
        """Return the loss of a batch."""
        features = self.encode(self.encoder, images, token_mask, self.mask_token)
        prediction = F.pixel_shuffle(self.head(rearrange(features, "b h w c -> b c h w")), self.stride)
        mask = expand_mask(token_mask, self.token)[:, None]
        error = F.l1_loss(images, prediction, reduction="none")
        return (error * mask).sum() / (mask.sum() + 1e-5) / images.shape[1]


def make_baseline(name: str, ours: SimMIM) -> nn.Module:
    """Build a baseline with the weights of ``ours``.

    Args:
        name: ``timm``, ``transformers``, or ``FILE.py:FUNCTION`` for other code. The function is called with the
            encoder's settings and state under their official names, as dictionaries. It returns either an encoder with
            ``forward_features(images, token_mask, mask_token) -> (b, h, w, c)``, or a complete module like
            :class:`Baseline`, marked by an attribute ``is_complete = True``.
        ours: the model whose weights are copied.

    Raises:
        ValueError: the name is unknown, the file does not exist or has no such function, or the encoder is not Swin V2.
    """
    config = ours.encoder.config
    if name in ("timm", "transformers") and config.norm != "res-post":
        raise ValueError(
            f"the baseline {name} is Swin V2 only: remove it from --baselines, or give an encoder swinv2_..."
        )
    if name == "timm":
        return Baseline(_timm(config, ours), _encode_timm, ours)
    if name == "transformers":
        return Baseline(_transformers(config, ours), _encode_transformers, ours)
    file, colon, function = name.rpartition(":")
    if not colon:
        raise ValueError(f"unknown baseline {name!r}: expected timm, transformers or FILE.py:FUNCTION")
    if not Path(file).is_file():
        raise ValueError(f"baseline {name!r}: there is no file {file}")
    spec = importlib.util.spec_from_file_location("baseline", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ValueError(f"baseline {name!r}: {file} has no function {function}")
    theirs: Any = getattr(module, function)(config.to_dict(), dict(ours.encoder.state_dict()))
    return theirs if getattr(theirs, "is_complete", False) else Baseline(theirs, _encode_other, ours)


def _timm(config: SwinConfig, ours: SimMIM) -> nn.Module:
    import timm

    theirs = timm.models.swin_transformer_v2.SwinTransformerV2(num_classes=0, **timm_arguments(config))
    theirs.load_state_dict(from_native(ours.encoder.state_dict(), "timm"), strict=False)
    return theirs


def _encode_timm(encoder: Any, images: Tensor, token_mask: Tensor, mask_token: Tensor) -> Tensor:
    tokens = encoder.patch_embed(images)
    weight = token_mask[..., None].to(tokens.dtype)
    return encoder.norm(encoder.layers(tokens * (1 - weight) + mask_token * weight))


def _transformers(config: SwinConfig, ours: SimMIM) -> nn.Module:
    import transformers

    settings = transformers.Swinv2Config(**transformers_arguments(config))
    theirs = transformers.Swinv2Model(settings, add_pooling_layer=False, use_mask_token=True)
    theirs.load_state_dict(from_native(ours.encoder.state_dict(), "transformers"), strict=False)
    theirs.embeddings.mask_token = nn.Parameter(ours.mask_token.detach().view(1, 1, -1).clone())
    return theirs


def _encode_transformers(encoder: Any, images: Tensor, token_mask: Tensor, _: Tensor) -> Tensor:
    features = encoder(images, bool_masked_pos=token_mask.flatten(1)).last_hidden_state
    return rearrange(features, "b (h w) c -> b h w c", h=round(features.shape[1] ** 0.5))


def _encode_other(encoder: Any, images: Tensor, token_mask: Tensor, mask_token: Tensor) -> Tensor:
    return encoder.forward_features(images, token_mask, mask_token)
