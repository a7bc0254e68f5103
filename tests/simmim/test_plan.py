"""The planner says beforehand what training will need, and what cannot work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from simmim.benchmarks import memory as memory_benchmark
from simmim.cli.main import main
from simmim.cli.plan import duration, parse_bytes, readable
from simmim.config.loading import load_recipe
from simmim.planning.plan import config_of, grids_of, make_fake_task, official_flops
from simmim.stages import runner
from simmim.stages.pretrain import PRETRAIN
from simmim.training import memory
from simmim.training.footprint import Footprint, Sizes, flops, footprint, sizes, states_bytes
from swin import SwinEncoder, make_config, make_encoder, save_encoder, transfer

# Backbone, and with mask token and linear head: exact.
PARAMETERS = {
    "swinv2_tiny": (27_578_154, 29_940_618),
    "swinv2_small": (48_959_418, 51_321_882),
    "swinv2_base": (86_893_816, 90_042_744),
    "swinv2_large": (195_202_932, 199_924_788),
    "swinv2_huge": (655_219_370, 663_873_546),
    "swinv2_giant": (1_060_976_996, 1_071_990_564),
    "swinv2_3b": (2_997_843_680, 3_010_430_176),
}
# Official counting, 10^9 multiply-adds: without a classifier at 192 px, with one of 1000 classes elsewhere.
FLOPS = [
    *(("swinv2_tiny", 256, 8, 5.93), ("swinv2_small", 256, 8, 11.51), ("swinv2_base", 256, 8, 20.29)),
    *(("swinv2_tiny", 256, 16, 6.61), ("swinv2_small", 256, 16, 12.65), ("swinv2_base", 256, 16, 21.80)),
    *(("swinv2_base", 384, 24, 54.75), ("swinv2_large", 256, 16, 47.49), ("swinv2_large", 384, 24, 115.42)),
    *(("swin_tiny", 224, 7, 4.49), ("swin_base", 224, 7, 15.44), ("swin_large", 384, 12, 103.95)),
    *(("swinv2_tiny", 192, 12, 3.49), ("swinv2_small", 192, 12, 6.74), ("swinv2_base", 192, 12, 11.76)),
    *(("swinv2_large", 192, 12, 25.96), ("swinv2_huge", 192, 12, 85.8), ("swinv2_giant", 192, 12, 138.3)),
    *(("swinv2_3b", 192, 12, 370.7), ("swinv2_huge", 512, 16, 620.0), ("swinv2_huge", 512, 32, 687.0)),
    ("swinv2_3b", 640, 40, 4639.0),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_exact(name):
    recipe = load_recipe("simmim_swinv2_b", [f"encoder.name={name}"])
    found = sizes(make_fake_task(recipe, "pretrain", 1000))
    assert (found.encoder, found.all) == PARAMETERS[name]
    labelled = sizes(make_fake_task(recipe, "finetune_224", 1000))
    assert labelled.all == found.encoder + 1000 * (make_config(name).num_features + 1)


@pytest.mark.parametrize(("name", "size", "window", "expected"), FLOPS)
def test_flops_as_officially_counted(name, size, window, expected):
    config = make_config(name, image_size=size, window_size=window)
    classifier = 1000 * config.num_features if size in (224, 256, 384) else 0
    assert (official_flops(config) + classifier) / 1e9 == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_flops_with_everything():
    planned = make_fake_task(load_recipe("simmim_swinv2_b"), "pretrain", 1)
    plain = flops(planned, "none")
    # Beside the official count: position biases, and a head of 22 of 36 tokens; norms are no products.
    assert plain.forward / 1e9 == pytest.approx(11.92, abs=0.01)
    assert plain.training / plain.forward == pytest.approx(3, rel=0.01)
    assert flops(planned, "full").training / plain.forward == pytest.approx(4, rel=0.01)
    assert plain.training < flops(planned, "selective").training < 3.2 * plain.forward


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("checkpointing", "chunks"), [("none", 1), ("none", 4), ("selective", 1), ("full", 4)])
@pytest.mark.parametrize(("size", "window", "batch_size"), [(64, 8, 3), (96, 12, 2), (128, 16, 1)])
def test_planned_bytes_are_those_of_a_step(size, window, batch_size, checkpointing, chunks, precision):
    changes = [f"image_size={size}", f"window_size={window}", "mask.patch_size=32", "drop_path=0.1"]
    recipe = load_recipe(
        "simmim_swinv2_b", ["encoder.name=swinv2_tiny", *(f"stages.pretrain.{change}" for change in changes)]
    )
    planned = footprint(make_fake_task(recipe, "pretrain", 1), checkpointing, chunks, precision=precision, device="cpu")
    task = PRETRAIN.make_task(recipe, recipe.stages["pretrain"], SwinEncoder(config_of(recipe, "pretrain")))
    task.encoder.save_memory(checkpointing=checkpointing, attention_chunks=chunks)
    found = memory_benchmark.measured_bytes(task.train(), batch_size, precision)
    assert planned.of(batch_size) == pytest.approx(found, rel=0.1)


@pytest.mark.slow
def test_checkpointing_saves_what_the_papers_say(monkeypatch):
    """V2-B at 192 px: at least 60 % with checkpointing, 40 % with the selective kind and without any, of what plain
    operations keep for a step."""
    planned = make_fake_task(load_recipe("simmim_swinv2_b", ["encoder.depths=[2,2,2,2]"]), "pretrain", 1)
    kept = {
        kind: footprint(planned, kind, 1, precision="fp32", device="cpu").per_image
        for kind in ("none", "selective", "full")
    }
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    plain = footprint(planned, "none", 1, precision="fp32", device="cpu").per_image
    assert kept["none"] < 0.6 * plain and kept["selective"] < 0.6 * plain and kept["full"] < 0.4 * plain
    assert kept["full"] < 0.5 * kept["none"] and kept["selective"] < kept["none"]


def test_arithmetic_of_zero():
    three_billion = Sizes(3_001_940_680, 2_997_843_680, 201_000_000)
    assert states_bytes(three_billion, "none", 64) / 1e9 == pytest.approx(48.0, abs=0.1)  # Swin V2, section 3.5
    by_kind = [states_bytes(three_billion, kind, 64) for kind in ("none", "1", "2", "3")]
    assert by_kind == sorted(by_kind, reverse=True)
    assert by_kind[1] / 1e9 == pytest.approx(24.0 + 24.0 / 64, abs=0.1)
    assert states_bytes(three_billion, "none", 1) == states_bytes(three_billion, "1", 1)
    small = Footprint(10, 5)
    assert small.of(3) == 25 and small.largest_batch(24) == 2 and small.largest_batch(3) == 0


def test_geometry_is_that_of_the_blocks():
    grids = grids_of(make_config("swinv2_tiny", image_size=(200, 640), window_size=12))
    assert [grid.grid for grid in grids] == [(50, 160), (25, 80), (13, 40), (7, 20)]
    assert [grid.window for grid in grids] == [(12, 12), (12, 12), (12, 12), (7, 12)]
    assert [grid.shift for grid in grids] == [(6, 6), (6, 6), (6, 6), (0, 6)]
    assert [grid.padding for grid in grids] == [(10, 8), (11, 4), (11, 8), (0, 4)]
    assert not any(grid.is_global for grid in grids)
    chain = load_recipe("simmim_swinv2_b")
    last = grids_of(config_of(chain, "transfer_384"))
    assert [grid.reference for grid in last] == [(12, 12)] * 3 + [(6, 6)]  # of pretraining, through two transfers
    assert last[2].is_global and last[3].window == (12, 12)


@pytest.mark.slow
def test_a_plan_on_the_screen(capsys):
    command = ["plan", "simmim_swinv2_b", "--stage", "pretrain", "--memory", "80G", "--tflops", "100"]
    assert main([*command, "--gpus", "8", "--images", "1281167"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "48x48      12x12      6x6",
        "6x6        6x6      0x0       0x0        6x6       1  global",
        "22 of 6 x 6 mask patches of 32 px",
        "90,042,744, encoder 86,893,816",
        "11.8 in the encoder by the official count",
        "<- planned",
        "epoch of 1,281,167 images",
        "disk        3.6 GB",
    ):
        assert part in printed, part
    assert "does not work" not in printed


@pytest.mark.slow
def test_plan_suggests_settings_that_fit(capsys):
    command = ["plan", "simmim_swinv2_l", "--stage", "pretrain", "--tflops", "100"]
    command += ["encoder.depths=[1,1,1,1]", "stages.pretrain.micro_batch_size=512"]
    command += ["stages.pretrain.memory.attention_chunks=1"]
    assert main([*command, "--memory", "14G"]) == 1
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith("does not work: pretrain: a rank needs 0.8 GB for weights, gradients and optimizer state")
    fixes = printed.split(": use ")[1].split(", or ")
    assert fixes[0] == "stages.pretrain.micro_batch_size=256" and fixes[1].endswith("memory.checkpointing=full")
    for fix in fixes:
        assert main([*command, "--memory", "14G", fix]) == 0  # what is suggested works
    assert main([*command, "--memory", "500M"]) == 1
    assert "more or larger GPUs" in capsys.readouterr().out.splitlines()[-1]
    assert main(["plan", "demo", "--gpus", "3", "--memory", "8G", "--stage", "pretrain", "--tflops", "1"]) == 1
    assert "batch_size 16 cannot be divided among 3 processes" in capsys.readouterr().out


BAD = [
    ("stages.pretrain.image_size=0", "positive integers"),
    ("stages.pretrain.image_size=[32,32,32]", "positive integers"),
    ("stages.pretrain.image_size=33", "does not divide"),
    ("stages.pretrain.window_size=0", "positive integers"),
    ("stages.pretrain.window_size=17", "larger than the 16 x 16 tokens"),
    ("stages.pretrain.mask.patch_size=3", "does not divide"),
    ("stages.pretrain.mask.patch_size=1", "multiple of encoder.patch_size"),
    ("stages.pretrain.mask.patch_size=64", "does not divide"),
    ("stages.pretrain.mask.ratio=0", "greater than 0"),
    ("stages.pretrain.mask.ratio=1", "less than 1"),
    ("stages.pretrain.mask.ratio=0.999", "mask"),
    ("stages.pretrain.mask.strategy=stripes", "random"),
    ("stages.pretrain.target.norm_window=8", "must be odd"),
    ("stages.pretrain.target.downsample=3", "use a divisor of 4"),
    ("stages.pretrain.target.head=conv", "linear"),
    ("stages.pretrain.memory.attention_chunks=[1,2,3]", "3 values, but the encoder has 2 stages"),
    ("stages.pretrain.memory.attention_chunks=0", "expected auto, a positive integer, or a list of one for each"),
    ("stages.pretrain.memory.checkpointing=some", "selective"),
    ("stages.pretrain.batch_size=0", "greater than 0"),
    ("stages.pretrain.schedule.warmup_epochs=6", "must be below epochs"),
    ("stages.pretrain.drop_path=1", "less than 1"),
    ("stages.finetune_32.image_size=-1", "positive integers"),
    ("stages.finetune_32.window_size=40", "larger than the 16 x 16 tokens"),
    ("stages.finetune_32.init_from=transfer_48", "is not an earlier stage"),
    ("stages.finetune_32.init_from=nowhere", "which does not exist"),
    ("stages.scratch_32.image_size=null", "set its image_size"),
    ("encoder.num_heads=[3,2]", "heads do not divide"),
    ("encoder.depths=[2]", "must name the same stages"),
    ("encoder.patch_size=5", "larger than the 7 x 7 tokens"),
    ("encoder.in_chans=4", "encoder.in_chans is 4"),
    ("encoder.name=swinv2_enormous", "swinv2_base"),
    ("encoder.embed_dim=0", "greater than 0"),
    ("data.fraction=0", "greater than 0"),
    ("data.std=[0.1,0.1,0]", "greater than 0"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[change for change, _ in BAD])
def test_bad_configurations_have_one_message(change, message, capsys):
    assert main(["plan", "demo", change, "--tflops", "1", "--stage", "finetune_32"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in "\n".join(said)
    problems = [line for line in said if change.split("=")[0].split(".")[-1] in line or message in line]
    assert len(problems) <= 2


def test_plan_checks_the_initial_weights(tmp_path, capsys):
    other = make_encoder("swinv2_tiny", embed_dim=8, depths=(2, 2), num_heads=(1, 2), image_size=32, window_size=4)
    save_encoder(other, tmp_path / "export", about={})
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/encoder.json").write_text('{"format": 1}')
    (tmp_path / "weights.pth").write_bytes(b"")
    for name, message in (
        ("export", "whose embed_dim is 8, but the recipe says 32"),
        ("damaged", "does not describe an encoder"),
        ("weights.pth", "does not record its sizes: set image_size and window_size"),
    ):
        start = [f"stages.scratch_32.init_from={tmp_path / name}", "stages.scratch_32.window_size=null"]
        assert main(["plan", "demo", *start, "--tflops", "1", "--stage", "scratch_32"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_gets_no_micro_batch(capsys):
    command = ["plan", "demo", "--stage", "pretrain", "--gpus", "3", "--memory", "30M", "--tflops", "1"]
    assert main([*command, "stages.pretrain.batch_size=64", "stages.pretrain.micro_batch_size=64"]) == 1
    printed = capsys.readouterr().out
    assert "batch_size 64 cannot be divided among 3" in printed and "micro_batch_size=" not in printed


def test_a_stage_that_cannot_fit_does_not_start(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runner, "device_bytes", lambda _: 1_000_000)
    assert main(["pretrain", "demo", "--out", str(tmp_path)]) == 2
    assert "weights, gradients and optimizer state take 2.8 MB on each of 1 process(es)" in capsys.readouterr().err
    assert not list(tmp_path.rglob("checkpoints"))


def test_chunks_of_a_stage_follow_recipe_and_memory(monkeypatch):
    recipe = load_recipe("simmim_swinv2_b", ["stages.pretrain.memory.attention_chunks=[8,4,1,1]"])
    config = config_of(recipe, "pretrain")
    assert runner.chunks_of(recipe.stages["pretrain"], config, 10**12) == [8, 4, 1, 1]
    assert runner.chunks_of(load_recipe("simmim_swinv2_b").stages["pretrain"], config, 10**12) == [1, 1, 1, 1]
    assert memory.choose_chunks(replace(config, image_size=(768, 768)), 1, 10**9)[0] > 1


def test_numbers_for_people():
    assert [readable(x) for x in (0.01751, 25.96, 371.0, 4639.3)] == ["0.0175", "26.0", "371", "4,640"]
    assert [duration(x) for x in (3.5, 90, 7200, 86400 * 3)] == ["3.50 s", "1.50 min", "2.00 h", "3.00 days"]
    assert [parse_bytes(x) for x in ("80G", "80GB", "1.5t", "12k")] == [80e9, 80e9, 1.5e12, 12e3]


@pytest.mark.slow
def test_the_benchmark_measures_every_saver():
    lines: list[str] = []
    costs = memory_benchmark.memory_costs(
        ["swinv2_tiny"], [(64, 8)], batch_size=1, precisions=["fp32"], rounds=1, echo=lines.append
    )
    assert [(cost.checkpointing, cost.chunks) for cost in costs] == list(memory_benchmark.MEMORY_OPTIONS)
    assert len(lines) == 1 + len(costs) and costs[0].time == 1
    assert all(cost.estimated == pytest.approx(cost.measured, rel=0.1) for cost in costs)
    assert costs[-1].measured < costs[0].measured


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "x"], "expected a size such as 80G"),
        (["--memory", "inf"], "expected a size such as 80G"),
        (["--memory", "0G"], "expected a size such as 80G"),
        (["--tflops", "0"], "--tflops must be between"),
        (["--tflops=-5"], "--tflops must be between"),
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--stage", "nowhere"], "has no stage 'nowhere'"),
    ],
)
def test_words_that_cannot_work(words, message, capsys):
    try:
        code = main(["plan", "demo", *words])
    except SystemExit as end:
        code = end.code
    assert code == 2 and message in capsys.readouterr().err


def test_a_table_is_planned_at_its_new_window():
    """As transfer does it: the rows of a table follow the window."""
    chain = load_recipe("simmim_swin_b")
    config = config_of(chain, "finetune_224")
    first = SwinEncoder(replace(config_of(chain, "pretrain"), depths=(1, 1, 1, 1)))
    moved = transfer(first, image_size=config.image_size, window_size=config.window_size).config
    assert config.reference_windows == moved.reference_windows == ((7, 7),) * 4


def test_an_average_of_the_weights_is_planned():
    parameters = Sizes(1000, 900, 100)
    for zero, more in (("none", 4000), ("1", 4000), ("2", 500), ("3", 500)):
        assert states_bytes(parameters, zero, 8, ema=True) - states_bytes(parameters, zero, 8) == more
