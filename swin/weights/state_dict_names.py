"""Names of the tensors of a Swin encoder: native names, and those of other libraries.

Native names are the keys of saved weights. They equal the attribute paths of the modules, without state-dict hooks, so
that parameter names, optimizer states, FSDP checkpoints and exports agree. Apart from the bias table they are the
official names, which fixes three attributes that would otherwise be named differently:

- ``attn.cpb_mlp`` is the continuous position bias of an attention layer (:class:`swin.position_bias.ContinuousBias`);
- ``attn.cpb_mlp.0`` and ``.2`` are the layers of its network, see ``CPB_MLP_LAYERS``;
- ``attn.relative_position_bias.table`` is the table of :class:`swin.position_bias.BiasTable`; the official name is
  ``attn.relative_position_bias_table``.

The layout ``official`` is that of microsoft/Swin-Transformer and SimMIM; ``timm`` and ``transformers`` are those of the
libraries.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["official", "timm", "transformers"]
State = dict[str, Tensor]

CPB_MLP_LAYERS = ("0", "2")
"""Hidden and output layer of a continuous bias: their positions in the official ``nn.Sequential``; 1 is the ReLU."""

# Tensors that a file may contain besides the encoder, and the reason to ignore them.
IGNORED = (
    (
        re.compile(r"(^|\.)(relative_position_index|relative_coords_table|attn_mask)$"),
        "derived from the geometry, recomputed",
    ),
    (re.compile(r"(^|\.)mask_token$"), "the mask token of masked pretraining"),
    (re.compile(r"^decoder\."), "the reconstruction head of masked pretraining"),
    (re.compile(r"^(head|classifier)\."), "a classifier"),
    (re.compile(r"\.attn\.k_bias$"), "always zero in Swin V2"),
)
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.|backbone\.|model\.)+")
_ENCODER = re.compile(r"^encoder\.(?=(patch_embed|layers|norm|mask_token)\b)")
_TRANSFORMERS_ROOT = re.compile(r"^swin(v2)?\.")
_DOWNSAMPLE = re.compile(r"^layers\.(\d+)\.downsample\.")
_OLD_NAMES = ((".attn.rpe_mlp.", ".attn.cpb_mlp."), (".enorm.", ".norm3."))  # used by unpublished and earlier versions
_TABLE = (".attn.relative_position_bias.table", ".attn.relative_position_bias_table")

# (native, transformers), in the order of replacement.
_TRANSFORMERS = (
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("patch_embed.norm.", "embeddings.norm."),
    (".attn.cpb_mlp.", ".attention.self.continuous_position_bias_mlp."),
    (".attn.logit_scale", ".attention.self.logit_scale"),
    (".attn.relative_position_bias.table", ".attention.self.relative_position_bias_table"),
    (".attn.proj.", ".attention.output.dense."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)


def detect_layout(names: list[str]) -> Layout:
    """Detect the library from the names. timm and the official code differ only in the stage of a merging layer."""
    if any(".attention.self." in name for name in names):
        return "transformers"
    merging = {name for name in map(_bare, names) if ".downsample." in name}
    if merging and not any(name.startswith("layers.0.") for name in merging):
        return "timm"
    return "official"


def to_native(state: State, layout: Layout) -> tuple[State, dict[str, str], dict[str, str]]:
    """Rename tensors from ``layout`` to native names and drop those that do not belong to the encoder.

    Returns:
        The tensors, ``{foreign name: native name}`` where they differ, and ``{foreign name: reason}`` of ignored ones.
    """
    native: State = {}
    renamed: dict[str, str] = {}
    ignored: dict[str, str] = {}
    for name, tensor in state.items():
        bare = _bare(name)
        if layout == "transformers":
            bare = _from_transformers(_TRANSFORMERS_ROOT.sub("", bare))
        else:
            bare = bare.replace(_TABLE[1], _TABLE[0])
        for old, new in _OLD_NAMES:
            bare = bare.replace(old, new)
        if layout == "timm":
            bare = _DOWNSAMPLE.sub(lambda match: f"layers.{int(match[1]) - 1}.downsample.", bare)
        reason = next((reason for pattern, reason in IGNORED if pattern.search(bare)), None)
        if reason is not None:
            ignored[name] = reason
            continue
        native[bare] = tensor
        if bare != name:
            renamed[name] = bare
    if layout == "transformers":
        native = _join_qkv(native)
        renamed = {old: _joined(new) for old, new in renamed.items()}
    return native, renamed, ignored


def from_native(state: State, layout: Layout) -> State:
    """Rename native tensors to the names of ``layout``, the inverse of :func:`to_native`."""
    if layout == "transformers":
        return {_to_transformers(name): tensor for name, tensor in _split_qkv(state).items()}
    if layout == "timm":
        state = {
            _DOWNSAMPLE.sub(lambda match: f"layers.{int(match[1]) + 1}.downsample.", name): tensor
            for name, tensor in state.items()
        }
    return {name.replace(*_TABLE): tensor for name, tensor in state.items()}


def _bare(name: str) -> str:
    """Remove the prefixes of wrappers."""
    return _ENCODER.sub("", _WRAPPERS.sub("", name))


def _from_transformers(name: str) -> str:
    name = re.sub(r"^encoder\.layers\.", "layers.", name)
    name = re.sub(r"^layernorm\.", "norm.", name)
    name = re.sub(r"^embeddings\.mask_token$", "mask_token", name)
    for native, foreign in _TRANSFORMERS:
        name = name.replace(foreign, native)
    return name.replace(".attention.self.", ".attn.")


def _to_transformers(name: str) -> str:
    for native, foreign in _TRANSFORMERS:
        name = name.replace(native, foreign)
    name = name.replace(".attn.", ".attention.self.")
    name = re.sub(r"^layers\.", "encoder.layers.", name)
    return re.sub(r"^norm\.", "layernorm.", name)


_PARTS = ("query", "key", "value")
_PART = re.compile(r"\.attn\.(query|key|value)\.(weight|bias)$")


def _joined(name: str) -> str:
    return _PART.sub(r".attn.qkv.\2", name)


def _join_qkv(state: State) -> State:
    """Join queries, keys and values into ``qkv``; an incomplete triple is left unchanged and reported later."""
    result = dict(state)
    for attention in {name[: match.start()] + ".attn." for name in state if (match := _PART.search(name))}:
        weights = [f"{attention}{part}.weight" for part in _PARTS]
        if all(name in result for name in weights):
            result[f"{attention}qkv.weight"] = torch.cat([result.pop(name) for name in weights])
        biases = [f"{attention}{part}.bias" for part in _PARTS]
        if all(name in result for name in biases):
            result[f"{attention}qkv.bias"] = torch.cat([result.pop(name) for name in biases])
        elif biases[1] not in result:  # V2: keys have no bias
            for part in ("query", "value"):
                if f"{attention}{part}.bias" in result:
                    result[f"{attention}{part[0]}_bias"] = result.pop(f"{attention}{part}.bias")
    return result


def _split_qkv(state: State) -> State:
    """Split ``qkv`` into separate queries, keys and values, the inverse of :func:`_join_qkv`."""
    result: State = {}
    for name, tensor in state.items():
        if match := re.search(r"\.attn\.qkv\.(weight|bias)$", name):
            for part, piece in zip(_PARTS, tensor.chunk(3), strict=True):
                result[f"{name[: match.start()]}.attn.{part}.{match[1]}"] = piece
        elif match := re.search(r"\.attn\.([qv])_bias$", name):
            result[f"{name[: match.start()]}.attn.{'query' if match[1] == 'q' else 'value'}.bias"] = tensor
        else:
            result[name] = tensor
    return result
