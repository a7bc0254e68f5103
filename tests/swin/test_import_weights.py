"""Import of files from other projects: architecture, every tensor accounted for, no code executed."""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

import swin
from swin.weights.import_weights import check_tensors, read_tensors
from swin.weights.infer_config import Geometry, infer_config
from swin.weights.state_dict_names import detect_layout, from_native, to_native

# The 63 published SimMIM encoders of Swin V2: size, fraction of the images, iterations.
FRACTIONS = {
    "small": ("1kper10", "1kper20", "1kper50", "1k"),
    "base": ("1kper10", "1kper20", "1kper50", "1k", "22k"),
    "large": ("1kper10", "1kper20", "1kper50", "1k", "22k"),
    "huge": ("1kper20", "1kper50", "1k", "22k"),
    "giant": ("1kper50", "1k", "22k"),
}
PUBLISHED = [
    f"swinv2_{size}_{fraction}_{iterations}.pth"
    for size, fractions in FRACTIONS.items()
    for fraction in fractions
    for iterations in ("125k", "250k", "500k")
]
SMALL = {"embed_dim": 8, "depths": (2, 2, 6, 2), "num_heads": (1, 1, 2, 2)}


def official_buffers(config: swin.SwinConfig, reference: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Build index, coordinates and shift masks with the formulas of the official code."""
    buffers = {}
    for stage, (grid, _) in enumerate(config.grids()):
        window = min(grid, config.window_size[0])
        tokens = window * window
        axis = torch.arange(-(window - 1), window, dtype=torch.float32) * 8 / max(reference[stage] - 1, 1)
        axis = torch.sign(axis) * torch.log2(axis.abs() + 1) / math.log2(8)
        table = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)[None]
        for block in range(config.depths[stage]):
            prefix = f"layers.{stage}.blocks.{block}."
            buffers[prefix + "attn.relative_position_index"] = torch.zeros(1).long().expand(tokens, tokens)
            if config.attention == "cosine":
                buffers[prefix + "attn.relative_coords_table"] = table
            if block % 2 and window < grid:
                buffers[prefix + "attn_mask"] = torch.zeros(1).expand((grid // window) ** 2, tokens, tokens)
    return buffers


def official_state(
    config: swin.SwinConfig, *, reference=None, prefix="", rpe_mlp=False, buffers=True, **more
) -> dict[str, torch.Tensor]:
    """Build a state dict of zeros without memory, because the tests use only names and shapes."""
    with torch.device("meta"):
        encoder = swin.SwinEncoder(config)
    state = from_native(encoder.state_dict(), "official")
    state = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in state.items()}
    if buffers:
        state |= official_buffers(config, reference or tuple(side for side, _ in config.reference_windows))
    state |= {name: torch.zeros(1).expand(shape) for name, shape in more.items()}
    if rpe_mlp:
        state = {name.replace("cpb_mlp", "rpe_mlp"): tensor for name, tensor in state.items()}
    return {prefix + name: tensor for name, tensor in state.items()}


def simmim_state(config: swin.SwinConfig, **options) -> dict[str, torch.Tensor]:
    state = official_state(config, prefix="encoder.", mask_token=(1, 1, config.embed_dim), **options)
    head = {"decoder.0.weight": (3072, config.num_features, 1, 1), "decoder.0.bias": (3072,)}
    return state | {name: torch.zeros(1).expand(shape) for name, shape in head.items()}


@pytest.mark.slow
@pytest.mark.parametrize("file", PUBLISHED)
def test_published_simmim_files_are_imported(file, tmp_path):
    expected = swin.make_config("_".join(file.split("_")[:2]), image_size=192, window_size=12)
    state = simmim_state(expected, rpe_mlp="125k" in file)
    if "250k" in file:
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 4e-4, "params": [0]}]}
    torch.save({"model": state, "optimizer": optimizer, "epoch": 799, "max_accuracy": 0.0}, tmp_path / file)
    encoder, report = swin.import_encoder(tmp_path / file)
    assert encoder.config == expected
    assert encoder.config.reference_windows == ((12, 12), (12, 12), (12, 12), (6, 6))
    assert report.loaded == len(encoder.state_dict())
    assert report.loaded + len(report.ignored) == len(state)
    assert encoder.history == [{"step": "import", "layout": "official", "file": file}]


def test_all_63_published_files_are_covered():
    assert len(PUBLISHED) == 63


@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize(
    ("file", "size", "image_size", "window_size", "reference"),
    [
        ("swinv2_tiny_patch4_window8_256.pth", "swinv2_tiny", 256, 8, (8, 8, 8, 8)),
        ("swinv2_tiny_patch4_window16_256.pth", "swinv2_tiny", 256, 16, (16, 16, 16, 8)),
        ("swinv2_base_patch4_window12to24_192to384_22kto1k_ft.pth", "swinv2_base", 384, 24, (12, 12, 12, 6)),
        ("swin_tiny_patch4_window7_224.pth", "swin_tiny", 224, 7, (7, 7, 7, 7)),
        ("swin_base_patch4_window12_384.pth", "swin_base", 384, 12, (12, 12, 12, 12)),
    ],
)
def test_official_classifiers_are_imported(file, size, image_size, window_size, reference, buffers, tmp_path):
    expected = swin.make_config(size, image_size=image_size, window_size=window_size, reference_windows=reference)
    classes = {"head.weight": (1000, expected.num_features), "head.bias": (1000,)}
    torch.save({"model": official_state(expected, buffers=buffers, **classes)}, tmp_path / file)
    encoder, report = swin.import_encoder(tmp_path / file)
    assert encoder.config == expected
    assert {report.ignored[name] for name in classes} == {"a classifier"}


def test_image_and_window_size_are_required_if_the_file_lacks_them(tmp_path):
    config = swin.make_config("swinv2_tiny", **SMALL, image_size=192, window_size=12)
    torch.save({"model": official_state(config, buffers=False)}, tmp_path / "best.pth")
    with pytest.raises(ValueError, match=r"cannot infer the image and window size .*--image-size 256"):
        swin.import_encoder(tmp_path / "best.pth")
    assert swin.import_encoder(tmp_path / "best.pth", image_size=192, window_size=12)[0].config == config


def test_given_sizes_are_a_transfer_if_the_file_contains_its_own(tmp_path):
    config = swin.make_config("swinv2_tiny", **SMALL, image_size=192, window_size=12)
    torch.save(official_state(config), tmp_path / "best.pth")
    encoder, _ = swin.import_encoder(tmp_path / "best.pth", image_size=384, window_size=24)
    assert encoder.config.reference_windows == config.reference_windows
    assert [step["step"] for step in encoder.history] == ["import", "transfer"]


@pytest.mark.parametrize("name", ["swinv2_tiny", "swin_tiny", "swinv2_huge"])
@pytest.mark.parametrize("seed", range(3))
def test_missing_tensors_are_listed_by_name(name, seed, tmp_path):
    depths = {} if name == "swinv2_huge" else {"depths": SMALL["depths"]}
    config = swin.make_config(name, embed_dim=8, num_heads=(1, 1, 2, 2), **depths)
    state = official_state(config)
    needed = [name for name in state if "relative_coords" not in name and "index" not in name and "mask" not in name]
    lost = random.Random(seed).sample(needed, math.ceil(len(needed) / 100))
    torch.save({"model": {key: value for key, value in state.items() if key not in lost}}, tmp_path / "some.pth")
    with pytest.raises(ValueError, match=f"{len(lost)} missing: ") as refusal:
        swin.import_encoder(tmp_path / "some.pth")
    for key in lost:
        assert key.replace("_bias_table", "_bias.table") in str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["official", "timm", "transformers"])
@pytest.mark.parametrize("name", ["swinv2_tiny", "swin_tiny"])
def test_every_single_missing_tensor_is_detected(name, layout, tmp_path):
    config = swin.make_config(name, embed_dim=8, depths=(2, 2), num_heads=(1, 2), image_size=56, window_size=7)
    foreign = from_native(swin.SwinEncoder(config).state_dict(), layout)
    known = Geometry(config.image_size, config.window_size, config.reference_windows)
    for lost in foreign:
        state = to_native({key: value for key, value in foreign.items() if key != lost}, layout)[0]
        with pytest.raises(ValueError, match=r"missing: "):
            check_tensors(infer_config(state, known), state, tmp_path)


def test_unknown_tensors_and_wrong_shapes_are_refused(tmp_path):
    config = swin.make_config("swinv2_tiny", **SMALL)
    state = official_state(config, absolute_pos_embed=(1, 2304, 8))
    state["norm.bias"] = torch.zeros(7)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(
        ValueError, match=r"1 unknown: absolute_pos_embed; 1 of the wrong shape: norm.bias \(7,\) instead of \(64,\)"
    ):
        swin.import_encoder(tmp_path / "x.pth")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["official", "timm", "transformers"])
@pytest.mark.parametrize("name", ["swin_tiny", "swin_base", "swinv2_tiny", "swinv2_base"])
def test_renaming_round_trips_are_bit_exact(name, layout):
    torch.manual_seed(0)
    state = swin.make_encoder(name).state_dict()
    foreign = from_native(state, layout)
    assert (layout == "official" and name.startswith("swinv2")) or set(foreign) != set(state)
    assert detect_layout(list(foreign)) == layout
    back, _, ignored = to_native(foreign, layout)
    assert set(back) == set(state) and not ignored
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("layout", ["official", "timm", "transformers"])
@pytest.mark.parametrize("name", ["swinv2_huge", "swinv2_giant", "swinv2_3b"])
def test_renaming_round_trips_of_large_sizes_keep_names_and_shapes(name, layout):
    with torch.device("meta"):
        encoder = swin.make_encoder(name)
        shapes = {key: tensor.shape for key, tensor in encoder.state_dict().items()}
        back = to_native(from_native(encoder.state_dict(), layout), layout)[0]
    assert {key: tensor.shape for key, tensor in back.items()} == shapes
    known = Geometry(encoder.config.image_size, encoder.config.window_size)
    assert infer_config(back, known) == encoder.config


VARIANTS = [
    {"attention": "cosine", "norm": "pre", "position_bias": "table"},
    {"attention": "dot", "norm": "res-post", "position_bias": "log_cpb"},
    {"mlp_ratio": 2.5, "in_chans": 5, "extra_norm_interval": 2, "patch_size": 2},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_inferred(variant):
    config = swin.make_config("swinv2_tiny", embed_dim=8, depths=(2, 6), num_heads=(1, 4), window_size=6, **variant)
    state = swin.SwinEncoder(config).state_dict()
    assert infer_config(state, Geometry(config.image_size, config.window_size)) == config


def test_half_precision_weights_are_converted_to_fp32(tmp_path):
    config = swin.make_config("swinv2_tiny", **SMALL)
    state = {key: value.bfloat16() for key, value in swin.SwinEncoder(config).state_dict().items()}
    save_file(state, tmp_path / "swinv2_window12_192.safetensors")
    encoder, _ = swin.import_encoder(tmp_path / "swinv2_window12_192.safetensors")
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_pickled_configurations_are_read_as_plain_containers(tmp_path, monkeypatch):
    class CfgNode(dict):
        def __init__(self, *args):
            super().__init__(*args)
            self.__dict__["__immutable__"] = False

    module = types.ModuleType("yacs.config")
    module.CfgNode, CfgNode.__module__, CfgNode.__qualname__ = CfgNode, "yacs.config", "CfgNode"
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    config = swin.make_config("swinv2_tiny", **SMALL)
    content = {
        "model": official_state(config),
        "config": CfgNode({"MODEL": CfgNode({"TYPE": "swinv2"})}),
        "args": argparse.Namespace(local_rank=0),
    }
    torch.save(content, tmp_path / "ckpt_epoch_799.pth")
    monkeypatch.undo()
    assert swin.import_encoder(tmp_path / "ckpt_epoch_799.pth")[0].config == config


class Program:
    def __reduce__(self):
        return open, ("executed.txt", "w")


def test_other_pickled_objects_are_refused_without_executing_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"x": torch.zeros(1)}, "hook": Program()}, "evil.pth")
    with pytest.raises(ValueError, match=r"pickled Python objects \(.*open\).*could execute any code.*torch.save") as e:
        swin.import_encoder("evil.pth")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "executed.txt").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.zip", b"PK", r"weights.zip: unknown file type, expected .safetensors, .pth"),
        ("weights.pth", b"not a checkpoint", "is not a PyTorch file, or it is corrupt"),
        ("weights.pth", b"", "is not a PyTorch file, or it is corrupt"),
        ("weights.safetensors", b"\x00" * 20, "is not a complete safetensors file"),
        ("weights.bin", None, "does not exist: expected a weights file or a folder"),
    ],
)
def test_unreadable_files_are_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        swin.import_encoder(tmp_path / name)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files_are_refused_by_name(suffix, tmp_path):
    state = swin.make_encoder("swinv2_tiny", **SMALL).state_dict()
    file = tmp_path / f"complete{suffix}"
    if suffix == ".pth":
        torch.save(state, file)
    else:
        save_file(state, file)
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=f"complete{suffix} is not a"):
        swin.import_encoder(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"epoch": 3}}, "contains no tensors, only epoch"),
        ([torch.zeros(1)], "contains a list, expected a dictionary of tensors"),
        ({"fc.weight": torch.zeros(10, 10)}, r"found blocks in stages \[\]: expected a complete Swin encoder"),
        ({"layers.0.blocks.0.x": torch.zeros(3)}, "cannot infer the width"),
        ({"layers.0.blocks.0.norm1.weight": torch.zeros(8)}, "cannot infer the number of heads of stage 0"),
        ({"layers.1.blocks.0.norm1.weight": torch.zeros(8)}, r"found blocks in stages \[1\]"),
    ],
)
def test_files_without_a_swin_encoder_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        swin.import_encoder(tmp_path / "x.pth")


def test_sharded_folders_are_read_and_invalid_json_is_refused(tmp_path):
    state = from_native(swin.make_encoder("swinv2_tiny", **SMALL).state_dict(), "transformers")
    names = sorted(state)
    save_file({name: state[name].contiguous() for name in names[:100]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: state[name].contiguous() for name in names[100:]}, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"image_size": 192, "window_size": 12}))
    assert len(read_tensors(tmp_path)[0]) == len(state)
    assert swin.import_encoder(tmp_path)[0].config.window_size == (12, 12)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        swin.import_encoder(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"contains no encoder.json, model\*.safetensors or pytorch_model\*.bin"):
        swin.import_encoder(empty)


def test_import_report_accounts_for_every_tensor(tmp_path):
    config = swin.make_config("swinv2_tiny", **SMALL)
    torch.save(simmim_state(config), tmp_path / "x.pth")
    report = str(swin.import_encoder(tmp_path / "x.pth")[1])
    assert report.splitlines()[0].startswith("official layout: 219 tensors loaded, 219 of them renamed")
    assert "1 ignored, the mask token of masked pretraining: encoder.mask_token" in report
    assert "2 ignored, the reconstruction head of masked pretraining: decoder.0.weight ..." in report
