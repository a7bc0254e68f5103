"""The same weights at another image size, window, length of clips or number of channels."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Literal

import torch
from einops import reduce, repeat
from torch import Tensor

from swin.config import Size, SwinConfig, as_pair, check_window, effective_window
from swin.encoder import SwinEncoder
from swin.position_bias import TableResampling, resample_table
from swin.video import build

Inflation = Literal["mean", "repeat"]
GEOMETRY = ("image_size", "window_size", "frames", "temporal_window")
FREE = (*GEOMETRY, "drop_path", "in_chans")


def transfer(
    encoder: SwinEncoder,
    *,
    inflate: Inflation | None = None,
    table_resampling: TableResampling = "bicubic",
    share: bool = False,
    **settings: Any,
) -> SwinEncoder:
    """An encoder with the weights of another, rebuilt for other ``settings``.

    A continuous position bias needs nothing: its reference windows stay, through any number of
    transfers, so a shared offset keeps its bias. A table is resampled to the new windows. With
    ``position_bias="table"`` a continuous bias is frozen: its values at the present windows become
    a table.

    Args:
        settings: ``image_size``, ``window_size``, ``drop_path``; ``in_chans`` together with ``inflate``;
            of an encoder of videos also ``frames`` and ``temporal_window``.
            Any other field of the configuration may be named only to confirm what is stored.
        inflate: how the patch embedding gets another number of channels, see :func:`inflate_channels`.
        table_resampling: ``bicubic`` or ``geometric``, see :func:`swin.position_bias.resample_table`.
        share: weights that stay as they are are the same memory, for whoever has no more use for ``encoder``.

    Raises:
        ValueError: a setting that contradicts the weights, or that cannot be built.
    """
    old = encoder.config
    new = changed(old, settings, inflate)
    state = {name: tensor if share else tensor.clone() for name, tensor in encoder.state_dict().items()}
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
    result = assemble(new, state)
    result.history = history
    return result


def assemble(config: SwinConfig, state: dict[str, Tensor]) -> SwinEncoder:
    """An encoder that holds exactly the tensors of ``state``.

    Raises:
        RuntimeError: torch's list of what is missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        encoder = build(config)
    # Views of other shapes, as resampling leaves them, cannot be shared out among processes.
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    encoder.load_state_dict(state, strict=True, assign=True)
    return encoder


def inflate_channels(weight: Tensor, channels: int, how: Inflation) -> Tensor:
    """A patch embedding for another number of channels: ``(d, c, ...)`` -> ``(d, channels, ...)``.

    ``mean`` gives every channel the mean of the old ones; ``repeat`` cycles through them. Both are
    scaled by c / channels, so that the size of the sum stays.

    Raises:
        ValueError: unknown ``how``.
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
    """What resolution and windows are, for JSON."""
    found = {name: getattr(config, name) for name in GEOMETRY if hasattr(config, name)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def changed(old: SwinConfig, settings: dict[str, Any], inflate: Inflation | None) -> SwinConfig:
    """The configuration of :func:`transfer`, which raises the same."""
    known = {field.name for field in fields(old)}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"unknown encoder settings {unknown}: expected some of {', '.join(sorted(known))}")
    for name in ("image_size", "window_size"):
        if name in settings:
            settings[name] = as_pair(settings[name], name)
    wanted = replace(old, **settings)  # tuples for lists, numbers checked
    for name in sorted(set(settings) - set(FREE)):
        given, stored = getattr(wanted, name), getattr(old, name)
        if given != stored and (name, given) != ("position_bias", "table"):
            reason = (
                "the position bias was trained with the stored ones, and others would shift every bias"
                if name == "reference_windows"
                else "the weights were made for it"
            )
            raise ValueError(f"{name} {given} contradicts the stored {stored}: {reason}. Leave it out")
    if wanted.in_chans != old.in_chans and inflate is None:
        raise ValueError(
            f"the weights take {old.in_chans} channels, but in_chans is {wanted.in_chans}: "
            "ask for inflate='mean' or 'repeat' to spread them over other channels"
        )
    if not {"window_size", "temporal_window"}.isdisjoint(settings):
        check_window(wanted)
    moved = geometry(wanted) != geometry(old) or wanted.position_bias != old.position_bias
    return replace(wanted, reference_windows=None) if moved and wanted.position_bias == "table" else wanted


def _table_windows(config: SwinConfig) -> tuple[Size, ...]:
    """The window of every stage's table; of a continuous bias, the one that :func:`_freeze_bias` takes."""
    if config.position_bias == "table":
        assert config.reference_windows is not None
        return config.reference_windows
    return tuple(effective_window(grid, config.window) for grid in config.grids())


@torch.no_grad()
def _freeze_bias(state: dict[str, Tensor], encoder: SwinEncoder) -> None:
    windows = _table_windows(encoder.config)
    for stage, layer in enumerate(encoder.layers):
        for number, block in enumerate(layer.blocks):  # type: ignore[arg-type]
            prefix = f"layers.{stage}.blocks.{number}.attn."
            for key in [key for key in state if key.startswith(f"{prefix}cpb_mlp.")]:
                del state[key]
            table = block.attn.position_bias.make_table(windows[stage])
            state[f"{prefix}relative_position_bias.table"] = table.clone()


def _resample_tables(state: dict[str, Tensor], old: tuple[Size, ...], new: SwinConfig, method: TableResampling) -> None:
    assert new.reference_windows is not None
    for stage, windows in enumerate(zip(old, new.reference_windows, strict=True)):
        for block in range(new.depths[stage]):
            key = f"layers.{stage}.blocks.{block}.attn.relative_position_bias.table"
            state[key] = resample_table(state[key], *windows, method)
