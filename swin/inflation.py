"""From images to clips: the weights of an image encoder in an encoder of videos."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch.nn.functional as F
from einops import repeat

from swin.config import SwinConfig
from swin.encoder import SwinEncoder
from swin.video import VideoConfig, VideoEncoder
from swin.weights.transfer import assemble


def inflate(encoder: SwinEncoder, *, frames: int, temporal_patch: int = 2, temporal_window: int = 8) -> VideoEncoder:
    """An encoder of clips with the weights of an image encoder: a still clip gets the features of its image.

    The patch embedding is repeated over the frames of a patch and divided by their number (I3D, arXiv 1705.07750).
    A position bias starts blind to time: a table is repeated for every offset in time (Video Swin, arXiv 2106.13230),
    and the network of a continuous bias gets a third input, which comes first, with weights of zero, which learn.
    Where the offset in time is zero the bias stays that of the image encoder's network, whatever they become.

    Why a still clip is exact: the logits of a token are those of the image, once more for every frame in reach; in
    shifted and padded windows too, as a mask allows the same frames at every place. A softmax over n copies gives
    each an n-th of the weight, and their values are equal.

    Args:
        frames: of a clip.
        temporal_patch: frames of a token.
        temporal_window: of attention, in tokens.

    Raises:
        ValueError: an encoder of videos, a window longer than the clip, or numbers that cannot be built.
    """
    time = {"frames": frames, "temporal_patch": temporal_patch, "temporal_window": temporal_window}
    config = inflated(encoder.config, **time)
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    for name, tensor in state.items():
        if name == "patch_embed.proj.weight":
            state[name] = repeat(tensor, "d c p q -> d c k p q", k=temporal_patch) / temporal_patch
        elif name.endswith(".cpb_mlp.0.weight"):
            state[name] = F.pad(tensor, (1, 0))
        elif name.endswith(".relative_position_bias.table"):
            state[name] = repeat(tensor, "yx m -> (f yx) m", f=2 * temporal_window - 1)
    video = cast(VideoEncoder, assemble(config, state))
    video.history = [*encoder.history, {"step": "inflate to videos", **time}]
    return video


def inflated(old: SwinConfig, *, frames: int, temporal_patch: int, temporal_window: int) -> VideoConfig:
    """The configuration of :func:`inflate`, which raises the same."""
    if isinstance(old, VideoConfig):
        raise ValueError("this is an encoder of videos already: transfer changes its frames and temporal_window")
    time = {"frames": frames, "temporal_patch": temporal_patch, "temporal_window": temporal_window}
    config = VideoConfig(**(old.to_dict() | time | {"reference_windows": None}))
    length = config.grids()[0][0]
    if temporal_window > length:
        raise ValueError(
            f"temporal_window {temporal_window} is longer than the {length} tokens of {frames} frames, "
            f"{temporal_patch} each: use at most {length}, or more frames"
        )
    return replace(config, reference_windows=tuple((temporal_window, *w) for w in old.reference_windows or ()))
