"""Transfer of weights to another image size, window size, clip length or number of channels."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Literal

import torch
from einops import reduce, repeat
from torch import Tensor

from swin.config import Size, SwinConfig, as_pair, check_window, effective_window
from swin.encoder import SwinEncoder
from swin.position_bias import TableResampling, resample_table
from swin.video import build_encoder

Inflation = Literal["mean", "repeat"]
GEOMETRY = ("image_size", "window_size", "frames", "temporal_window")
CHANGEABLE = (*GEOMETRY, "drop_path", "in_chans")


def transfer(
    encoder: SwinEncoder,
    *,
    inflate: Inflation | None = None,
    table_resampling: TableResampling = "bicubic",
    reuse_tensors: bool = False,
    **settings: Any,
) -> SwinEncoder:
    """Build an encoder with the weights of another one for changed ``settings``.

    A continuous position bias is not changed: its reference windows stay the same through any number of transfers, so
    every offset keeps its bias. A table is resampled to the new windows. With ``position_bias="table"`` a continuous
    bias is replaced by a table of its values at the current windows.

    Args:
        settings: ``image_size``, ``window_size``, ``drop_path``; ``in_chans`` together with ``inflate``; for a video
            encoder also ``frames`` and ``temporal_window``. Other fields of the configuration are accepted only if
            they equal the stored value.
        inflate: method to change the number of channels of the patch embedding, see :func:`inflate_channels`.
        table_resampling: ``bicubic`` or ``geometric``, see :func:`swin.position_bias.resample_table`.
        reuse_tensors: use the tensors of ``encoder`` where they do not change instead of copies, which saves memory;
            ``encoder`` must not be used afterwards.

    Raises:
        ValueError: a setting that contradicts the weights or is invalid.
    """
    old = encoder.config
    new = transferred_config(old, settings, inflate)
    state = {name: tensor if reuse_tensors else tensor.clone() for name, tensor in encoder.state_dict().items()}
    history = list(encoder.history)
    if new.in_chans != old.in_chans:
        assert inflate is not None
        key = "patch_embed.proj.weight"
        state[key] = inflate_channels(state[key], new.in_chans, inflate)
        history.append({"step": "inflate", "from": old.in_chans, "to": new.in_chans, "how": inflate})
    if new.position_bias != old.position_bias:
        _freeze_bias(state, encoder)
        history.append({"step": "freeze", "position_bias": old.position_bias})
    if geometry(new) != geometry(old):
        step = {"step": "transfer", **geometry(new)}
        if new.position_bias == "table":
            _resample_tables(state, _table_windows(old), new, table_resampling)
            step["table_resampling"] = table_resampling
        history.append(step)
    result = encoder_from_state(new, state)
    result.history = history
    return result


def encoder_from_state(config: SwinConfig, state: dict[str, Tensor]) -> SwinEncoder:
    """Build an encoder whose parameters are the tensors of ``state``.

    Raises:
        RuntimeError: ``state`` lacks tensors, has unexpected ones, or some have another shape.
    """
    with torch.device("meta"):
        encoder = build_encoder(config)
    # Resampling returns non-contiguous views, which FSDP cannot shard.
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    encoder.load_state_dict(state, strict=True, assign=True)
    return encoder


def inflate_channels(weight: Tensor, channels: int, how: Inflation) -> Tensor:
    """Change the number of channels of a patch embedding: ``(d, c, ...)`` -> ``(d, channels, ...)``.

    ``mean`` sets every channel to the mean of the old ones; ``repeat`` cycles through them. Both are scaled by
    c / channels, so that the output keeps its magnitude.

    Raises:
        ValueError: ``how`` is neither ``mean`` nor ``repeat``.
    """
    if how not in ("mean", "repeat"):
        raise ValueError(f"unknown inflation {how!r}: expected mean or repeat")
    old = weight.shape[1]
    if how == "mean":
        wide = repeat(reduce(weight, "d c ... -> d ...", "mean"), "d ... -> d c ...", c=channels)
    else:
        wide = weight[:, torch.arange(channels, device=weight.device) % old]
    return (wide * (old / channels)).contiguous()


def geometry(config: SwinConfig) -> dict[str, Any]:
    """Return image size, window size and, for videos, frames and temporal window, as plain JSON."""
    found = {name: getattr(config, name) for name in GEOMETRY if hasattr(config, name)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def transferred_config(old: SwinConfig, settings: dict[str, Any], inflate: Inflation | None) -> SwinConfig:
    """Compute the configuration of the encoder that :func:`transfer` returns; raises the same errors."""
    known = {field.name for field in fields(old)}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"unknown encoder settings {unknown}: expected some of {', '.join(sorted(known))}")
    for name in ("image_size", "window_size"):
        if name in settings:
            settings[name] = as_pair(settings[name], name)
    new = replace(old, **settings)  # converts lists to tuples and checks values
    for name in sorted(set(settings) - set(CHANGEABLE)):
        given, stored = getattr(new, name), getattr(old, name)
        if given != stored and (name, given) != ("position_bias", "table"):
            reason = (
                "the position bias was trained with the stored windows, and others would change every bias"
                if name == "reference_windows"
                else "the weights depend on it"
            )
            raise ValueError(f"{name} {given} contradicts the stored {stored}: {reason}. Omit this setting")
    if new.in_chans != old.in_chans and inflate is None:
        raise ValueError(
            f"the weights have {old.in_chans} channels, but in_chans is {new.in_chans}: "
            "set inflate='mean' or 'repeat' to convert them"
        )
    if not {"window_size", "temporal_window"}.isdisjoint(settings):
        check_window(new)
    has_changed = geometry(new) != geometry(old) or new.position_bias != old.position_bias
    return replace(new, reference_windows=None) if has_changed and new.position_bias == "table" else new


def _table_windows(config: SwinConfig) -> tuple[Size, ...]:
    """Return the window of the bias table of every stage; for a continuous bias, that of its future table."""
    if config.position_bias == "table":
        assert config.reference_windows is not None
        return config.reference_windows
    return tuple(effective_window(grid, config.window) for grid in config.grids())


@torch.no_grad()
def _freeze_bias(state: dict[str, Tensor], encoder: SwinEncoder) -> None:
    """Replace the continuous biases in ``state`` by tables of their values."""
    windows = _table_windows(encoder.config)
    for stage, layer in enumerate(encoder.layers):
        for index, block in enumerate(layer.blocks):  # type: ignore[arg-type]
            prefix = f"layers.{stage}.blocks.{index}.attn."
            for key in [key for key in state if key.startswith(f"{prefix}cpb_mlp.")]:
                del state[key]
            table = block.attn.position_bias.make_table(windows[stage])
            state[f"{prefix}relative_position_bias.table"] = table.clone()


def _resample_tables(state: dict[str, Tensor], old: tuple[Size, ...], new: SwinConfig, method: TableResampling) -> None:
    """Resample the bias tables in ``state`` to the windows of the new configuration."""
    assert new.reference_windows is not None
    for stage, windows in enumerate(zip(old, new.reference_windows, strict=True)):
        for block in range(new.depths[stage]):
            key = f"layers.{stage}.blocks.{block}.attn.relative_position_bias.table"
            state[key] = resample_table(state[key], *windows, method)
