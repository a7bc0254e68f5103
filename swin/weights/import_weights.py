"""Import of encoders from files of other projects: infers the architecture and accounts for every tensor."""

from __future__ import annotations

import argparse
import json
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from swin.config import SwinConfig, as_pair
from swin.encoder import SwinEncoder
from swin.position_bias import TableResampling
from swin.weights.infer_config import Geometry, geometry_of_buffers, geometry_of_json, geometry_of_name, infer_config
from swin.weights.serialization import DESCRIPTION
from swin.weights.state_dict_names import Layout, State, detect_layout, to_native
from swin.weights.transfer import Inflation, encoder_from_state, transfer

_NAMES_SHOWN = 50
_NESTED = ("model", "state_dict", "model_state_dict", "module")


@dataclass(frozen=True)
class ImportReport:
    """Result of an import for every tensor of a file."""

    layout: Layout
    loaded: int
    renamed: dict[str, str]
    """``{name in the file: native name}``"""
    ignored: dict[str, str]
    """``{name in the file: reason}``"""

    def __str__(self) -> str:
        lines = [f"{self.layout} layout: {self.loaded} tensors loaded, {len(self.renamed)} of them renamed"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.ignored.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            lines.append(f"{len(names)} ignored, {reason}: {names[0]}{' ...' if len(names) > 1 else ''}")
        return "\n".join(lines)


def import_encoder(
    path: Path | str,
    *,
    inflate: Inflation | None = None,
    table_resampling: TableResampling = "bicubic",
    **settings: Any,
) -> tuple[SwinEncoder, ImportReport]:
    """Load an encoder from a file of another project.

    Supported are the official Swin V1 and V2 classifiers, the official SimMIM pretraining and fine-tuning files, timm's
    ``swin_*`` and ``swinv2_*`` and transformers' ``Swin`` and ``Swinv2`` models; as a file (``.safetensors``, ``.pth``,
    ``.pt``, ``.bin``, ``.ckpt``) or a folder that contains one next to ``config.json``.

    The other arguments are those of :func:`swin.weights.transfer.transfer`. If the file does not contain the
    ``image_size`` and ``window_size`` of training, the given ones are assumed to be those.

    Raises:
        ValueError: a file that cannot be read or is not a Swin encoder, any tensor that is missing, unknown or of the
            wrong shape, or a setting that contradicts the weights.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    layout = detect_layout(list(tensors))
    state, renamed, ignored = to_native(tensors, layout)
    if "encoder" in metadata:
        config = SwinConfig.from_dict(metadata["encoder"])
    else:
        config = infer_config(state, _geometry(tensors, metadata, path.name).or_else(_given(settings)))
    check_tensors(config, state, path)
    encoder = encoder_from_state(config, {name: _full_precision(tensor) for name, tensor in state.items()})
    encoder.history = [*metadata.get("history", []), {"step": "import", "layout": layout, "file": path.name}]
    if settings:
        encoder = transfer(encoder, inflate=inflate, table_resampling=table_resampling, **settings)
    return encoder, ImportReport(layout, len(state), renamed, ignored)


def _geometry(tensors: State, metadata: dict[str, Any], file_name: str) -> Geometry:
    """Infer the geometry from the buffers, the JSON file and the file name, in this order of priority."""
    stages = {int(match[1]) for match in map(re.compile(r"layers\.(\d+)\.").search, tensors) if match}
    known = geometry_of_buffers(tensors).or_else(geometry_of_json(metadata, len(stages)))
    return known.or_else(geometry_of_name(file_name, len(stages)))


def _given(settings: dict[str, Any]) -> Geometry:
    """Return the geometry that the caller gave."""
    sizes = (settings.get("image_size"), settings.get("window_size"))
    image_size, window_size = (None if size is None else as_pair(size, "image_size or window_size") for size in sizes)
    return Geometry(image_size, window_size)


def check_tensors(config: SwinConfig, state: State, source: Path) -> None:
    """Check that ``state`` has the names and shapes that the configuration needs.

    Raises:
        ValueError: lists all tensors that are missing, unknown or of the wrong shape.
    """
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in SwinEncoder(config).state_dict().items()}
    missing = sorted(set(expected) - set(state))
    unknown = sorted(set(state) - set(expected))
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    problems = [
        f"{len(names)} {problem}: {', '.join(names[:_NAMES_SHOWN])}{' ...' if len(names) > _NAMES_SHOWN else ''}"
        for names, problem in ((missing, "missing"), (unknown, "unknown"), (wrong, "of the wrong shape"))
        if names
    ]
    if problems:
        raise ValueError(
            f"{source} does not contain a complete Swin encoder of {len(expected)} tensors (names as in the official "
            f"code). " + "; ".join(problems)
        )


def read_tensors(path: Path) -> tuple[State, dict[str, Any]]:
    """Read the tensors of a file or folder, and the metadata in it. No code in a file is executed.

    Returns:
        The tensors, and the content of ``config.json`` (folder) or the native entries of a PyTorch file.

    Raises:
        ValueError: the file is missing, of an unknown type, corrupt, or contains pickled objects.
    """
    if path.is_dir():
        files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not files:
            raise ValueError(f"{path} contains no {DESCRIPTION}, model*.safetensors or pytorch_model*.bin")
        tensors: State = {}
        for file in files:
            tensors |= read_tensors(file)[0]
        return tensors, _read_json(path / "config.json")
    if not path.is_file():
        raise ValueError(f"{path} does not exist: expected a weights file or a folder that contains one")
    if path.suffix == ".safetensors":
        try:
            return load_file(path), {}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file ({error}): download it again") from None
    if path.suffix not in (".pth", ".pt", ".bin", ".ckpt"):
        raise ValueError(f"{path.name}: unknown file type, expected .safetensors, .pth, .pt, .bin or .ckpt")
    content = _load_torch(path)
    metadata = {key: json.loads(content[key]) for key in ("encoder", "history") if isinstance(content.get(key), str)}
    for key in _NESTED:
        if isinstance(content.get(key), dict):
            content = content[key]
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} contains no tensors, only {', '.join(map(str, list(content)[:10])) or 'nothing'}")
    return tensors, metadata


def _load_torch(path: Path) -> dict[str, Any]:
    """Read a PyTorch file without executing code."""
    # Training scripts often save these two harmless classes; they are read as plain containers.
    plain = [(OrderedDict, "yacs.config.CfgNode"), argparse.Namespace]
    try:
        with torch.serialization.safe_globals(plain):  # type: ignore[arg-type]
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load can raise many types for corrupt files
        names = _unsafe_classes(path)
        if not names:
            raise ValueError(f"{path} is not a PyTorch file, or it is corrupt ({_first_line(error)})") from None
        raise ValueError(
            f"{path} contains pickled Python objects ({', '.join(names)}); unpickling them could execute any code, so "
            "the file is refused. If you trust it, extract its weights once, where those classes are installed: "
            "python -c \"import torch; f = torch.load('IN.pth', map_location='cpu', weights_only=False); "
            "torch.save({'model': f['model']}, 'OUT.pth')\""
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} contains a {type(content).__name__}, expected a dictionary of tensors")
    return content


def _unsafe_classes(path: Path) -> list[str]:
    """List the classes in a PyTorch file that are not safe to unpickle."""
    try:
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (RuntimeError, ValueError, EOFError):  # not a zip file
        return []


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    content.pop("encoder", None)
    return content


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
