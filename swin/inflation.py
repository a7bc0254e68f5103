"""Inflation of an image encoder to a video encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch.nn.functional as F
from einops import repeat

from swin.config import SwinConfig
from swin.encoder import SwinEncoder
from swin.video import VideoConfig, VideoEncoder
from swin.weights.transfer import encoder_from_state


def inflate(encoder: SwinEncoder, *, frames: int, temporal_patch: int = 2, temporal_window: int = 8) -> VideoEncoder:
    """Build a video encoder from an image encoder: a clip of one repeated image gets the features of that image.

    The patch embedding is repeated over the frames of a patch and divided by their count (I3D, arXiv 1705.07750).
    The position bias initially ignores time: a table is repeated for every offset in time (Video Swin,
    arXiv 2106.13230), and the network of a continuous bias gets a third input, placed first, whose weights start at 0
    and are trained. Where the offset in time is 0, the bias does not depend on those weights.

    The features of a repeated image are exact: each token has the logits of the image, repeated for every frame in its
    window. This includes shifted and padded windows, because the mask allows the same frames for every token. A
    softmax over n copies gives each copy 1/n of the weight, and their values are equal.

    Args:
        frames: number of frames of a clip.
        temporal_patch: number of frames per token.
        temporal_window: size of the attention window in time, in tokens.

    Raises:
        ValueError: the encoder is a video encoder, the window is longer than the clip, or a value is invalid.
    """
    time = {"frames": frames, "temporal_patch": temporal_patch, "temporal_window": temporal_window}
    config = inflated_config(encoder.config, **time)
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    for name, tensor in state.items():
        if name == "patch_embed.proj.weight":
            state[name] = repeat(tensor, "d c p q -> d c k p q", k=temporal_patch) / temporal_patch
        elif name.endswith(".cpb_mlp.0.weight"):
            state[name] = F.pad(tensor, (1, 0))
        elif name.endswith(".relative_position_bias.table"):
            state[name] = repeat(tensor, "yx m -> (f yx) m", f=2 * temporal_window - 1)
    video = cast(VideoEncoder, encoder_from_state(config, state))
    video.history = [*encoder.history, {"step": "inflate to videos", **time}]
    return video


def inflated_config(old: SwinConfig, *, frames: int, temporal_patch: int, temporal_window: int) -> VideoConfig:
    """Compute the configuration of the encoder that :func:`inflate` returns; raises the same errors."""
    if isinstance(old, VideoConfig):
        raise ValueError("the encoder is already a video encoder: change its frames and temporal_window with transfer")
    time = {"frames": frames, "temporal_patch": temporal_patch, "temporal_window": temporal_window}
    config = VideoConfig(**(old.to_dict() | time | {"reference_windows": None}))
    length = config.grids()[0][0]
    if temporal_window > length:
        raise ValueError(
            f"temporal_window {temporal_window} is longer than the {length} tokens of {frames} frames, "
            f"{temporal_patch} frames per token: use at most {length}, or more frames"
        )
    return replace(config, reference_windows=tuple((temporal_window, *w) for w in old.reference_windows or ()))
