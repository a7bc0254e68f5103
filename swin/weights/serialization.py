"""An encoder on disk: ``encoder.safetensors`` and the ``encoder.json`` that says how to rebuild it."""

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
from swin.weights.transfer import Inflation, assemble, transfer

FORMAT = 1
WEIGHTS, DESCRIPTION = "encoder.safetensors", "encoder.json"


def save_encoder(
    encoder: SwinEncoder, folder: Path | str, *, about: dict[str, Any], weights: dict[str, Tensor] | None = None
) -> None:
    """Write weights and description into ``folder``.

    Args:
        about: what else a later reader should know, under keys of its own: channel statistics, how
            the weights were trained. Must be plain JSON.
        weights: the state to write instead of the encoder's own, for gathered or averaged weights.
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
        ValueError: missing, unreadable, or from a newer format.
    """
    path = Path(folder) / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        written = description["format"]
    except FileNotFoundError:
        raise ValueError(f"no {DESCRIPTION} in {folder}: give the export folder of a run") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an encoder description ({error})") from None
    if written != FORMAT:
        raise ValueError(f"{path} has format {written}, this version reads {FORMAT}: update the toolkit")
    return description


def load_config(folder: Path) -> SwinConfig:
    """The configuration of an exported encoder, from its ``encoder.json``.

    Raises:
        ValueError: as of :func:`load_description`, or a file that describes no encoder.
    """
    return config_from(load_description(folder), Path(folder))


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

    ``load_encoder("export")`` gives what was saved; ``load_encoder("export", image_size=384,
    window_size=24)`` the same weights at another geometry, one number or ``(height, width)`` each. Where videos were
    encoded it is a :class:`swin.VideoEncoder`.
    The other arguments are those of :func:`swin.weights.transfer.transfer`.

    Raises:
        ValueError: a missing or damaged file, weights that do not fit the description, or a setting
            that contradicts them.
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
        encoder = assemble(config, load_file(folder / WEIGHTS))
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"cannot read {folder / WEIGHTS}: {error}") from None
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit its {DESCRIPTION}: {error}") from None
    encoder.history = description.get("history", [])
    if not settings:
        return encoder
    return transfer(encoder, inflate=inflate, table_resampling=table_resampling, **settings)
