"""Conversion of encoders into the formats of other libraries, verified by reading them back."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from simmim.export.export import open_export
from swin import SwinEncoder, VideoConfig, import_encoder, load_encoder, save_encoder
from swin.config import SwinConfig, effective_window
from swin.position_bias import TableResampling
from swin.weights.state_dict_names import from_native
from swin.weights.transfer import Inflation

LARGEST_DIFFERENCE = 1e-4
V1 = {"attention": "dot", "norm": "pre", "position_bias": "table"}
V2 = {"attention": "cosine", "norm": "res-post", "position_bias": "log_cpb"}
Pixels = dict[str, Any]
"""Channel statistics, see :attr:`simmim.export.export.Export.pixels`."""
logger = logging.getLogger(__name__)


def convert(
    source: Path,
    out: Path,
    to: str = "native",
    *,
    inflate: Inflation | None = None,
    table_resampling: TableResampling = "bicubic",
    report: Callable[[str], None] = logger.info,
    **settings: Any,
) -> None:
    """Convert an encoder, read it back with the library it is for, and compare the features.

    Args:
        source: an export, or a checkpoint that :func:`swin.import_encoder` can read.
        out: a folder for ``native``, ``timm`` and ``transformers``; a file that ends in ``.pth`` for ``official``,
            ``.onnx`` for ``onnx``, ``.pt2`` for ``torch-export``.
        to: the format.
        report: called with each line of the report.
        settings: ``image_size``, ``window_size`` and ``in_chans``, as for :func:`swin.load_encoder`.

    Raises:
        ValueError: the source cannot be read, the encoder does not exist in that format, ``out`` exists, or features
            differ by more than 1e-4. Nothing is left at ``out`` then.
    """
    write, suffix = WRITERS[to]
    if out.exists():
        raise ValueError(f"{out} exists: choose another path, or remove it first")
    if out.suffix != suffix and suffix:
        raise ValueError(f"--to {to} writes a file whose name ends in {suffix}, got {out}")
    encoder, pixels = _open(source, report, inflate=inflate, table_resampling=table_resampling, **settings)
    encoder.eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".convert-", dir=out.parent) as unfinished:
        difference = write(encoder, Path(unfinished) / out.name, pixels)
        for part in Path(unfinished).iterdir():  # a large ONNX model has a second file with its weights
            os.replace(part, out.parent / part.name)
    size = " x ".join(map(str, encoder.config.input_size))
    report(f"{out}: {to} format, {size} px; features read back differ by at most {difference:.1e}")


def _open(source: Path, report: Callable[[str], None], **arguments: Any) -> tuple[SwinEncoder, Pixels]:
    export = open_export(source)
    pixels = export.pixels
    if export.is_native:
        encoder = export.encoder(**arguments)
        report(f"native export: {len(encoder.state_dict())} tensors loaded")
    else:
        encoder, tensors = import_encoder(source, **arguments)
        report(str(tensors))
    channels = encoder.config.in_chans
    per_channel = {key: [pixels[key][i % len(pixels[key])] for i in range(channels)] for key in ("mean", "std")}
    return encoder, {**pixels, **per_channel}


def _write_native(encoder: SwinEncoder, out: Path, pixels: Pixels) -> float:
    save_encoder(encoder, out, about={"pixels": pixels})
    return _compare(encoder, load_encoder(out).eval())


def _write_official(encoder: SwinEncoder, out: Path, pixels: Pixels) -> float:
    """Write a file for the official code, which reads the key ``model``; other keys describe the encoder."""
    _need(encoder, "the official code", V1, V2)
    content: dict[str, Any] = {
        "model": from_native(encoder.state_dict(), "official"),
        "encoder": json.dumps(encoder.config.to_dict()),
        "history": json.dumps(encoder.history),
        "pixels": json.dumps(pixels),
    }
    torch.save(content, out)
    difference = _compare(encoder, import_encoder(out)[0].eval())
    torch.save(content | {"largest_difference": difference}, out)
    return difference


def timm_arguments(config: SwinConfig) -> dict[str, Any]:
    """Return the constructor arguments of timm's Swin V1 or V2."""
    arguments: dict[str, Any] = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "embed_dim": config.embed_dim,
        "depths": config.depths,
        "num_heads": config.num_heads,
        "window_size": config.window_size,
        "mlp_ratio": config.mlp_ratio,
        "drop_path_rate": config.drop_path,
    }
    if config.attention == "cosine":
        arguments["pretrained_window_sizes"] = config.reference_windows
    return arguments


def _write_timm(encoder: SwinEncoder, out: Path, pixels: Pixels) -> float:
    import timm
    from timm.models import save_for_hf

    config = encoder.config
    is_v1 = _need(encoder, "timm", V1, V2) == V1
    architecture = "swin_base_patch4_window7_224" if is_v1 else "swinv2_base_window12_192"
    model_args = timm_arguments(config)
    theirs: Any = timm.create_model(architecture, num_classes=0, **model_args)
    theirs.load_state_dict(from_native(encoder.state_dict(), "timm"))
    data_config = {"input_size": (config.in_chans, *config.image_size), "mean": pixels["mean"], "std": pixels["std"]}

    def save(**notes: Any) -> None:
        save_for_hf(
            theirs,
            str(out),
            model_args=model_args,
            model_config=notes,
            data_config=data_config,
            safe_serialization=True,
        )

    save()
    read_back: Any = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    difference = _compare(encoder, read_back.forward_features)
    save(simmim={"largest_difference": difference})
    return difference


def transformers_arguments(config: SwinConfig) -> dict[str, Any]:
    """Return the arguments of the Swin V1 or V2 configuration of transformers; windows must be square."""
    arguments: dict[str, Any] = {
        "image_size": config.image_size[0] if config.image_size[0] == config.image_size[1] else config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "embed_dim": config.embed_dim,
        "depths": list(config.depths),
        "num_heads": list(config.num_heads),
        "window_size": config.window_size[0],
        "mlp_ratio": config.mlp_ratio,
        "drop_path_rate": config.drop_path,
    }
    if config.attention == "cosine":
        assert config.reference_windows is not None
        arguments["pretrained_window_sizes"] = [side for side, _ in config.reference_windows]
    return arguments


def _write_transformers(encoder: SwinEncoder, out: Path, pixels: Pixels) -> float:
    transformers = _library("transformers", "transformers")
    config = encoder.config
    is_v1 = _need(encoder, "transformers", V1, V2) == V1
    assert config.reference_windows is not None
    if any(height != width for height, width in (config.window_size, *config.reference_windows)):
        raise ValueError(
            f"transformers supports square windows only, got {config.window_size} (references "
            f"{config.reference_windows})"
        )
    if is_v1 and set(config.reference_windows) != {config.window_size}:
        raise ValueError(
            f"transformers' SwinModel cannot run where a grid is smaller than the window {config.window_size[0]}: "
            f"choose a window of at most {min(config.reference_windows)[0]}, or an image of at least "
            f"{config.window_size[0] * config.stride} px"
        )
    description = (transformers.SwinConfig if is_v1 else transformers.Swinv2Config)(**transformers_arguments(config))
    description.architectures = ["SwinModel" if is_v1 else "Swinv2Model"]
    out.mkdir()
    description.save_pretrained(out)
    weights = _cpu(from_native(encoder.state_dict(), "transformers"))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    theirs = _open_transformers(transformers, out)
    difference = _compare(encoder, lambda images: theirs(images).last_hidden_state)
    description.simmim = {"largest_difference": difference, "pixels": pixels}
    description.save_pretrained(out)
    return difference


def _open_transformers(transformers: Any, folder: Path) -> Any:
    transformers.utils.logging.disable_progress_bar()
    theirs, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    if left := {kind: names for kind, names in report.items() if names}:
        raise ValueError(f"transformers {transformers.__version__} did not load all weights: {left}")
    return theirs.eval()


def _write_onnx(encoder: SwinEncoder, out: Path, pixels: Pixels) -> float:
    _library("onnxscript", "onnx")
    runtime = _library("onnxruntime", "onnx")
    program = torch.onnx.export(
        encoder,
        (_images(encoder.config),),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(out)
    session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    difference = _compare(encoder, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]))
    notes = {"encoder": encoder.config.to_dict(), "pixels": pixels, "largest_difference": difference}
    program.model.metadata_props.update({f"simmim.{key}": json.dumps(value) for key, value in notes.items()})
    program.save(out)
    return difference


def _write_torch_export(encoder: SwinEncoder, out: Path, pixels: Pixels) -> float:
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(encoder, (_images(encoder.config),), dynamic_shapes=({0: batch},))
    torch.export.save(program, out)
    difference = _compare(encoder, torch.export.load(out).module())
    notes = {"encoder": encoder.config.to_dict(), "pixels": pixels, "largest_difference": difference}
    torch.export.save(program, out, extra_files={"simmim.json": json.dumps(notes)})
    return difference


Writer = Callable[[SwinEncoder, Path, Pixels], float]
WRITERS: dict[str, tuple[Writer, str]] = {
    "native": (_write_native, ""),
    "timm": (_write_timm, ""),
    "transformers": (_write_transformers, ""),
    "official": (_write_official, ".pth"),
    "onnx": (_write_onnx, ".onnx"),
    "torch-export": (_write_torch_export, ".pt2"),
}


@torch.no_grad()
def _compare(encoder: SwinEncoder, theirs: Callable[[Tensor], Any]) -> float:
    """Return the largest difference of the features on random images of the size of the encoder.

    Raises:
        ValueError: the difference is above 1e-4.
    """
    config = encoder.config
    images = _images(config)
    ours = encoder(images)
    difference = (theirs(images).reshape(ours.shape) - ours).abs().max().item()
    if not difference <= LARGEST_DIFFERENCE:
        uneven = [
            f"{' x '.join(map(str, grid))} tokens by {' x '.join(map(str, window))}"
            for grid in config.grids()
            for window in [effective_window(grid, config.window)]
            if any(side % step for side, step in zip(grid, window, strict=True))
        ]
        reason = (
            f": windows do not divide the grid ({'; '.join(uneven)}), which other libraries pad differently. "
            "Choose an image size whose grids are multiples of the window"
            if uneven
            else ""
        )
        raise ValueError(f"features read back differ by {difference:.1e} (allowed {LARGEST_DIFFERENCE:.0e}){reason}")
    return difference


def _images(config: SwinConfig) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, config.in_chans, *config.input_size, generator=generator)


def _need(encoder: SwinEncoder, library: str, *known: dict[str, str]) -> dict[str, str]:
    """Return which of the ``known`` architectures the encoder has.

    Raises:
        ValueError: none of them; the library does not implement the encoder.
    """
    config = encoder.config
    if isinstance(config, VideoConfig):
        raise ValueError(f"{library} has no Swin encoder of clips: use --to native, onnx or torch-export")
    kind = {name: getattr(config, name) for name in V1}
    if kind in known and not config.extra_norm_interval:
        return kind
    extra = f" with an extra norm every {config.extra_norm_interval} blocks" if config.extra_norm_interval else ""
    raise ValueError(
        f"{library} implements plain Swin V1 and V2, but not {', '.join(kind.values())}{extra}: use --to native, "
        "onnx or torch-export"
    )


def _library(name: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise ValueError(f"this needs {name}: pip install 'simmim[{extra}]'") from None


def _cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
