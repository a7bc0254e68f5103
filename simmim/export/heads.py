"""What an export has around its encoder: a file of tensors, and what ``encoder.json`` says of it."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HEAD = "head.safetensors"
"""What an export has beside its encoder, where its answers have places in the image."""


def save_head(file: Path, weights: dict[str, Tensor]) -> None:
    """Write, of the weights of an objective, those that are not its encoder's."""
    own = {name: tensor for name, tensor in weights.items() if not name.startswith("encoder.")}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in own.items()}, file)


def load_head(file: Path, task: nn.Module) -> None:
    """Give an objective the weights that :func:`save_head` wrote.

    Raises:
        ValueError: an unreadable file, or weights of another objective.
    """
    try:
        missing, unknown = task.load_state_dict(load_file(file), strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None
    missing = [name for name in missing if not name.startswith("encoder.")]
    for word, names in (("lacks", missing), ("has an unknown", unknown)):
        if names:
            raise ValueError(f"{file} {word} {names[0]}: its encoder.json describes another model")
