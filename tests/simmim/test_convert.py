"""Exports open in the library they are for, say how far they differ, and come back bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

import simmim.export.convert
from simmim.cli.main import main
from simmim.export.convert import LARGEST_DIFFERENCE, WRITERS, convert
from swin import SwinEncoder, import_encoder, load_encoder, make_config, save_encoder

V1 = {"attention": "dot", "norm": "pre", "position_bias": "table"}
V2 = {"attention": "cosine", "norm": "res-post", "position_bias": "log_cpb"}
TINY = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "image_size": 32, "window_size": 4}
KINDS = pytest.mark.parametrize("kind", [V1, V2], ids=["v1", "v2"])
LAYOUTS = pytest.mark.parametrize("to", WRITERS)
PIXELS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def make_encoder(**settings) -> SwinEncoder:
    """Every parameter random: nothing may hide behind a zero or a one."""
    torch.manual_seed(0)
    encoder = SwinEncoder(make_config("swinv2_tiny", **{**TINY, **settings}))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return encoder.eval()


def export(folder, **settings) -> SwinEncoder:
    encoder = make_encoder(**settings)
    save_encoder(encoder, folder, about={"pixels": PIXELS})
    return encoder


def out_of(tmp_path, to):
    return tmp_path / f"out{WRITERS[to][1]}"


def quiet(_: str) -> None:
    pass


def metadata(path, to) -> dict:
    if to == "native":
        return json.loads((path / "encoder.json").read_text())
    if to == "timm":
        return json.loads((path / "config.json").read_text())["simmim"]
    if to == "transformers":
        return json.loads((path / "config.json").read_text())["simmim"]
    if to == "official":
        return torch.load(path, weights_only=True)
    if to == "onnx":
        properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        return {key.removeprefix("simmim."): json.loads(value) for key, value in properties.items()}
    files = {"simmim.json": ""}
    torch.export.load(path, extra_files=files)
    return json.loads(files["simmim.json"])


@pytest.mark.slow
@KINDS
@LAYOUTS
def test_every_layout_says_its_difference(kind, to, tmp_path):
    export(tmp_path / "export", **kind)
    said = []
    convert(tmp_path / "export", out_of(tmp_path, to), to, report=said.append)
    if to != "native":
        difference = metadata(out_of(tmp_path, to), to)["largest_difference"]
        assert 0 <= difference <= LARGEST_DIFFERENCE
        assert f"{difference:.1e}" in said[-1]
    assert "read back" in said[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["export", out_of(tmp_path, to).name])


@KINDS
@pytest.mark.parametrize("to", ["native", "timm", "transformers", "official"])
def test_there_and_back_is_bit_exact(kind, to, tmp_path):
    encoder = export(tmp_path / "export", **kind)
    convert(tmp_path / "export", out_of(tmp_path, to), to, report=quiet)
    convert(out_of(tmp_path, to), tmp_path / "back", report=quiet)
    back = load_encoder(tmp_path / "back")
    assert back.config == encoder.config
    assert back.state_dict().keys() == encoder.state_dict().keys()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


@pytest.mark.slow
def test_timm_loads_a_base_encoder(tmp_path):
    torch.manual_seed(0)
    encoder = SwinEncoder(make_config("swinv2_base")).eval()
    save_encoder(encoder, tmp_path / "export", about={})
    convert(tmp_path / "export", tmp_path / "timm", "timm", report=quiet)
    overlay = {"file": str(tmp_path / "timm" / "model.safetensors")}
    theirs = timm.create_model(
        "swinv2_base_window12_192", pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay
    ).eval()
    images = torch.randn(1, 3, 192, 192)
    with torch.no_grad():
        difference = (theirs.forward_features(images) - encoder(images)).abs().max().item()
    assert difference <= LARGEST_DIFFERENCE


@KINDS
def test_transformers_opens_its_folder_offline(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    encoder = export(tmp_path / "export", **kind)
    convert(tmp_path / "export", tmp_path / "hf", "transformers", report=quiet)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (theirs(images).last_hidden_state - encoder(images).flatten(1, 2)).abs().max() <= LARGEST_DIFFERENCE


@pytest.mark.slow
@KINDS
def test_exported_programs_take_any_batch(kind, tmp_path):
    encoder = export(tmp_path / "export", **kind)
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        ours = encoder(images)
        convert(tmp_path / "export", tmp_path / "out.pt2", "torch-export", report=quiet)
        theirs = torch.export.load(tmp_path / "out.pt2").module()(images)
        assert (theirs - ours).abs().max() <= LARGEST_DIFFERENCE
    convert(tmp_path / "export", tmp_path / "out.onnx", "onnx", report=quiet)
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"images": images.numpy()})
    assert np.abs(theirs - ours.numpy()).max() <= LARGEST_DIFFERENCE


COLD = """
import sys
from pathlib import Path
import torch
from simmim.export.convert import convert
from swin import load_encoder
source, out = map(Path, sys.argv[1:])
convert(source, out, "torch-export")
# What the export has traced must not stay behind in what the windows of real images share.
encoder = load_encoder(source).eval()
with torch.no_grad():
    assert type(encoder(torch.zeros(1, 3, 40, 40))) is torch.Tensor
encoder.train()(torch.zeros(1, 3, 32, 32)).sum().backward()
"""


@pytest.mark.slow
@KINDS
def test_a_fresh_process_exports_before_it_has_run_the_encoder(kind, tmp_path):
    """Indices and shift masks are made during the trace then, not taken from what an earlier run left."""
    export(tmp_path / "export", **kind)
    command = [sys.executable, "-c", COLD, str(tmp_path / "export"), str(tmp_path / "out.pt2")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("to", ["timm", "official", "onnx"])
def test_another_geometry_and_more_channels_on_the_way(to, tmp_path):
    export(tmp_path / "export")
    arguments = ["--image-size", "48x64", "--window-size", "6x8", "--in-chans", "5", "--inflate", "mean"]
    assert main(["convert", str(tmp_path / "export"), str(out_of(tmp_path, to)), "--to", to, *arguments]) == 0
    if to == "onnx":
        stored = metadata(out_of(tmp_path, to), to)
        assert stored["encoder"]["image_size"] == [48, 64] and stored["pixels"]["mean"] == [0.1, 0.2, 0.3, 0.1, 0.2]
        return
    back, _ = import_encoder(out_of(tmp_path, to))
    assert (back.config.image_size, back.config.window_size, back.config.in_chans) == ((48, 64), (6, 8), 5)
    assert back.config.reference_windows == ((4, 4), (4, 4))


@pytest.mark.slow
@LAYOUTS
def test_a_difference_is_an_error_and_leaves_nothing(to, tmp_path, monkeypatch, capsys):
    export(tmp_path / "export")
    monkeypatch.setattr(simmim.export.convert, "LARGEST_DIFFERENCE", -1.0)
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", str(tmp_path / "export"), str(out_of(tmp_path, to)), "--to", to]) == 2
    assert "features read back differ" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_comparison_sees_a_wrong_weight(tmp_path, monkeypatch):
    export(tmp_path / "export")
    truth = simmim.export.convert.from_native

    def wrong(state, layout):
        return {
            name: tensor * 1.01 if tensor.ndim == 4 else tensor  # the patch embedding
            for name, tensor in truth(state, layout).items()
        }

    monkeypatch.setattr(simmim.export.convert, "from_native", wrong)
    for to in ("timm", "transformers", "official"):
        with pytest.raises(ValueError, match="features read back differ"):
            convert(tmp_path / "export", out_of(tmp_path, to), to, report=quiet)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["timm", "transformers", "official"])
@pytest.mark.parametrize(
    "variant",
    [V2 | {"position_bias": "linear_cpb"}, V1 | {"attention": "cosine"}, V2 | {"extra_norm_interval": 2}],
    ids=str,
)
def test_models_unknown_to_the_other_library_are_refused(variant, to, tmp_path):
    export(tmp_path / "export", **variant)
    with pytest.raises(ValueError, match="use --to native"):
        convert(tmp_path / "export", out_of(tmp_path, to), to, report=quiet)
    convert(tmp_path / "export", tmp_path / "out.pt2", "torch-export", report=quiet)


def test_padding_that_others_do_in_another_way_is_explained(tmp_path):
    export(tmp_path / "export", image_size=40)
    with pytest.raises(ValueError, match="10 x 10 tokens by 4 x 4"):
        convert(tmp_path / "export", tmp_path / "timm", "timm", report=quiet)


def test_models_that_transformers_cannot_run_are_refused(tmp_path):
    export(tmp_path / "export", image_size=(32, 64), window_size=(4, 8))
    with pytest.raises(ValueError, match="square windows only"):
        convert(tmp_path / "export", tmp_path / "hf", "transformers", report=quiet)
    export(tmp_path / "v1", **V1, window_size=8)
    with pytest.raises(ValueError, match="grid is smaller than the window"):
        convert(tmp_path / "v1", tmp_path / "hf", "transformers", report=quiet)


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, capsys):
    export(tmp_path / "export")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["convert", str(tmp_path / "export"), str(tmp_path / "out.onnx"), "--to", "onnx"]) == 2
    assert "pip install 'simmim[onnx]'" in capsys.readouterr().err


def put(folder, name: str, content: bytes):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def newer(folder) -> None:
    path = folder / "encoder.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))


def truncated(folder) -> None:
    path = folder / "encoder.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def one_less(folder) -> None:
    path = folder / "encoder.safetensors"
    state = load_file(path)
    state.pop("layers.0.blocks.1.attn.qkv.weight")
    save_file(state, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (newer, "format 99, this version reads 1: update"),
        (truncated, "encoder.safetensors"),
        (one_less, "layers.0.blocks.1.attn.qkv.weight"),
    ],
)
def test_damaged_exports(damage, message, tmp_path, capsys):
    export(tmp_path / "export")
    damage(tmp_path / "export")
    assert main(["convert", str(tmp_path / "export"), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{export}", "{tmp}"], "exists: choose another path"),
        (["{export}", "{tmp}/out.bin", "--to", "onnx"], "ends in .onnx"),
        (["{export}", "{tmp}/out", "--in-chans", "5"], "set inflate='mean' or 'repeat'"),
        (["{export}", "{tmp}/out", "--window-size", "64"], "larger than the"),
        (["{export}", "{tmp}/out", "--image-size", "0"], "image_size"),
        (["{tmp}/nothing", "{tmp}/out"], "nothing"),
        (["{tmp}/text.txt", "{tmp}/out"], "text.txt"),
        (["{tmp}/half.safetensors", "{tmp}/out"], "half.safetensors"),
        (["{tmp}/empty", "{tmp}/out"], "empty"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, tmp_path, capsys):
    export(tmp_path / "export")
    (tmp_path / "empty").mkdir()
    put(tmp_path, "text.txt", b"hello")
    put(tmp_path, "half.safetensors", (tmp_path / "export" / "encoder.safetensors").read_bytes()[:5000])
    before = sorted(tmp_path.rglob("*"))
    given = [word.format(export=tmp_path / "export", tmp=tmp_path) for word in arguments]
    assert main(["convert", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("size", ["12y", "8x", "x", "3x4x5", "1.5", ""])
def test_sizes_that_are_none(size, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["convert", "a", "b", f"--image-size={size}"])
    assert stop.value.code == 2
    assert "--image-size" in capsys.readouterr().err
