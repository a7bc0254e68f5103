"""Saving and loading of encoders: weights in ``encoder.safetensors``, configuration in ``encoder.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from swin.config import SwinConfig
from swin.encoder import SwinEncoder
from swin.position_bias import TableResampling
from swin.video import read_config
from swin.weights.transfer import Inflation, encoder_from_state, transfer

FORMAT = 1
WEIGHTS, DESCRIPTION = "encoder.safetensors", "encoder.json"


def save_encoder(
    encoder: SwinEncoder, folder: Path | str, *, about: dict[str, Any], weights: dict[str, Tensor] | None = None
) -> None:
    """Write the weights and the description of an encoder into ``folder``.

    Args:
        about: further entries of the description, such as channel statistics or training settings. Must be plain JSON.
        weights: state dict to write instead of the encoder's own, for gathered weights or EMA weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = encoder.state_dict() if weights is None else weights
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, folder / WEIGHTS)
    description = {"format": FORMAT, "encoder": encoder.config.to_dict(), "history": encoder.history, **about}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_description(folder: Path) -> dict[str, Any]:
    """Read ``encoder.json``.

    Raises:
        ValueError: the file is missing or unreadable, or has another format version.
    """
    path = Path(folder) / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        written = description["format"]
    except FileNotFoundError:
        raise ValueError(f"no {DESCRIPTION} in {folder}: expected the export folder of a run") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an encoder description ({error})") from None
    if written != FORMAT:
        raise ValueError(f"{path} has format {written}, this version reads {FORMAT}: update the toolkit")
    return description


def config_from(description: dict[str, Any], folder: Path) -> SwinConfig:
    """Return the encoder configuration of a description that has been read from ``folder``.

    Raises:
        ValueError: the description has no valid encoder configuration.
    """
    try:
        return read_config(description["encoder"])
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / DESCRIPTION} does not describe an encoder ({error})") from None


def load_encoder(
    folder: Path | str,
    *,
    inflate: Inflation | None = None,
    table_resampling: TableResampling = "bicubic",
    **settings: Any,
) -> SwinEncoder:
    """Rebuild an exported encoder with its weights, on the CPU, at any resolution.

    ``load_encoder("export")`` restores the saved encoder; ``load_encoder("export", image_size=384, window_size=24)``
    transfers its weights to another resolution, with one integer or ``(height, width)`` each. The other arguments are
    those of :func:`swin.weights.transfer.transfer`. A saved video encoder is loaded as :class:`swin.VideoEncoder`.

    Raises:
        ValueError: a missing or corrupt file, weights that do not fit the description, or a setting that contradicts
            them.
    """
    folder = Path(folder)
    return encoder_from(
        load_description(folder), folder, inflate=inflate, table_resampling=table_resampling, **settings
    )


def encoder_from(
    description: dict[str, Any],
    folder: Path,
    *,
    inflate: Inflation | None = None,
    table_resampling: TableResampling = "bicubic",
    **settings: Any,
) -> SwinEncoder:
    """Rebuild an encoder as :func:`load_encoder` does, from a description that has been read from ``folder``.

    Raises:
        ValueError: as :func:`load_encoder`.
    """
    config = config_from(description, folder)
    try:
        encoder = encoder_from_state(config, load_file(folder / WEIGHTS))
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"cannot read {folder / WEIGHTS}: {error}") from None
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit its {DESCRIPTION}: {error}") from None
    encoder.history = description.get("history", [])
    if not settings:
        return encoder
    return transfer(encoder, inflate=inflate, table_resampling=table_resampling, **settings)
