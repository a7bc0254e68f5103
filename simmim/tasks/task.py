"""What the training loop trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from swin import SwinEncoder
from swin.encoder import no_decay_parameters


class Task(nn.Module):
    """An encoder and what is around it; ``forward(batch)`` is the loss of a batch of the stage's loader.

    Args:
        mean, std: channel statistics of pixels in [0, 1], one number per channel.

    Raises:
        ValueError: statistics that do not match the channels.
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
        """uint8 pixels ``(b, c, H, W)`` or ``(b, c, T, H, W)`` -> float, mean 0 and deviation 1 over the data."""
        mean, std = (self.mean, self.std) if images.ndim == 4 else (self.mean[:, None], self.std[:, None])
        return (images.to(mean.dtype) / 255 - mean) / std

    def eval_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Numbers of held-out images by name, each a mean over the images; ``loss`` is one of them."""
        raise NotImplementedError

    def visualize(self, batch: Mapping[str, Tensor]) -> Image.Image:
        """What is to be seen of a batch."""
        raise NotImplementedError

    def loss_on_fake_tensors(self, images: Tensor) -> Tensor:
        """Of normalised images without numbers, through all that a training step goes through, to be planned by."""
        raise NotImplementedError

    def no_decay_parameters(self) -> set[nn.Parameter]:
        """Vectors, temperatures and position biases, of the encoder and of what is around it."""
        return no_decay_parameters(self)

    def depth_of_parameters(self) -> dict[nn.Parameter, int]:
        """For layer-wise learning rates: as in the encoder, all else as deep as its last norm."""
        depths = self.encoder.depth_of_parameters()
        by_parameter = {parameter: depths[name] for name, parameter in self.encoder.named_parameters()}
        return {parameter: by_parameter.get(parameter, max(depths.values())) for parameter in self.parameters()}
