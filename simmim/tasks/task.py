"""Base class of everything the training loop trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from swin import SwinEncoder
from swin.encoder import no_decay_parameters


class Task(nn.Module):
    """An encoder with its head and loss; ``forward(batch)`` returns the training loss of a batch.

    Args:
        mean, std: channel statistics of pixels in [0, 1], one value per channel.

    Raises:
        ValueError: the statistics do not match the channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: SwinEncoder, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        channels = encoder.config.in_chans
        if len(mean) != channels or len(std) != channels:
            raise ValueError(
                f"mean and std have {len(mean)} and {len(std)} numbers for {channels} channels: "
                "give one number per channel"
            )
        self.encoder = encoder
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize uint8 pixels ``(b, c, H, W)`` or ``(b, c, T, H, W)`` with the channel statistics."""
        mean, std = (self.mean, self.std) if images.ndim == 4 else (self.mean[:, None], self.std[:, None])
        return (images.to(mean.dtype) / 255 - mean) / std

    def eval_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the evaluation numbers of a validation batch, each a mean over its images; one is ``loss``."""
        raise NotImplementedError

    def visualize(self, batch: Mapping[str, Tensor]) -> Image.Image:
        """Render a preview image of a batch."""
        raise NotImplementedError

    def loss_on_fake_tensors(self, images: Tensor) -> Tensor:
        """Return the loss of normalized fake (meta) images, through all modules that a training step uses.

        It is run to plan memory and FLOPs, so it must not depend on the values of tensors.
        """
        raise NotImplementedError

    def no_decay_parameters(self) -> set[nn.Parameter]:
        """Return the parameters without weight decay, in encoder and head: vectors, temperatures, position biases."""
        return no_decay_parameters(self)

    def depth_of_parameters(self) -> dict[nn.Parameter, int]:
        """Return the depth of every parameter for layer-wise learning rates.

        Depths inside the encoder are its own; all other parameters are as deep as the last norm of the encoder.
        """
        depths = self.encoder.depth_of_parameters()
        by_parameter = {parameter: depths[name] for name, parameter in self.encoder.named_parameters()}
        return {parameter: by_parameter.get(parameter, max(depths.values())) for parameter in self.parameters()}
