"""Files with the weights of a head, beside the encoder of an export."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

HEAD = "head.safetensors"
"""Head of a segmenter or detector."""
DECODER = "decoder.safetensors"
"""Mask token and reconstruction head of a pretrained model."""


def save_head(file: Path, weights: dict[str, Tensor]) -> None:
    """Write the weights of a task that do not belong to its encoder."""
    head = {name: tensor for name, tensor in weights.items() if not name.startswith("encoder.")}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in head.items()}, file)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a file.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None
