"""Experiments that compare variants of a recipe report only differences that their seeds support."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from simmim.cli.main import main
from simmim.config import Data, Recipe
from simmim.config.loading import load_recipe
from simmim.data import Shapes
from simmim.experiments import ablations, data_scaling, trials
from simmim.experiments.trials import Outcome
from simmim.stages.datasets import make_datasets
from simmim.training.checkpoint import different_settings
from simmim.visualization.reconstructions import load_simmim
from tests.simmim.test_label_efficiency import RECIPE


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "few.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return path


@pytest.mark.slow
def test_ablations_end_to_end(recipe, tmp_path, capsys):
    command = ["experiment", "ablations", str(recipe), "--out", str(tmp_path)]
    short = ["--variants", "head=inverse_swin", "downsample=4", "--seeds", "0", "1", "2"]
    assert main([*command, *short]) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "few/ablations"
    content = json.loads((folder / "ablations.json").read_text())
    assert list(content["variants"]) == ["recipe", "head=inverse_swin", "downsample=4"]
    assert [len(each) for each in content["variants"].values()] == [3, 3, 3]
    summary = json.loads((folder / "downsample_4_seed_1/finetune_32/summary.json").read_text())
    assert content["variants"]["downsample=4"][1]["top1"] == summary["validation_top1"]
    assert (folder / "ablations.txt").read_text().strip() in printed
    assert (folder / "ablations.png").stat().st_size > 5_000
    assert not (folder / "recipe_seed_0/scratch_32").exists()  # stages that are not compared are not trained
    # The exports contain the requested heads and target resolutions.
    drawn = load_simmim(folder / "head_inverse_swin_seed_0/pretrain/export")
    assert type(drawn.head).__name__ == "InverseSwin" and drawn.downsample == 1
    assert load_simmim(folder / "downsample_4_seed_0/pretrain/export").downsample == 4
    # Finished stages are skipped.
    before = (folder / "recipe_seed_2/pretrain/metrics.jsonl").stat().st_mtime_ns
    assert main([*command, *short]) == 0
    assert (folder / "recipe_seed_2/pretrain/metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "loss=l3"], "stages.pretrain.target.loss"),
        (["--variants", "downsample=3"], "use a divisor of 8"),
        (["--variants", "head=mlp", "nothing=1"], "nothing"),
        (["--seeds", "1", "1"], "seeds must be different"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(arguments, message, recipe, tmp_path, capsys):
    assert main(["experiment", "ablations", str(recipe), "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_default_variants_are_those_of_the_paper():
    demo = load_recipe("demo")
    assert ablations.default_variants(demo) == [
        *("loss=l2", "loss=smooth_l1", "pixels=all", "head=mlp", "head=inverse_swin", "downsample=2", "downsample=4")
    ]
    assert ablations.default_variants(load_recipe("simmim_swinv2_b"))[-1] == "downsample=32"
    coarse = load_recipe("demo", ["stages.pretrain.target.downsample=2", "stages.pretrain.target.loss=l2"])
    assert {"loss=l1", "downsample=1"} < set(ablations.default_variants(coarse))
    alone = load_recipe("simmim_swinv2_b")
    only = alone.model_copy(update={"stages": {"pretrain": alone.stages["pretrain"]}})
    with pytest.raises(ValueError, match="no classifier stage that starts from a pretraining stage"):
        trials.find_stages(only)


def test_intervals_are_those_of_the_tables():
    # Student's t: mean 2, s.d. 1, three values: 2 ± 4.303 / sqrt(3).
    low, high = trials.mean_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-3)
    assert trials.mean_interval([0.2, 0.2]) is None  # two values may agree by chance
    assert trials.verdict((0.1, 0.2)) == "higher" and trials.verdict((-0.2, -0.1)) == "lower"
    assert trials.verdict((-0.1, 0.1)) == "inconclusive" and trials.verdict(None) == "needs more seeds"
    # 95 % of the intervals contain the true mean.
    draws = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    contained = sum(low < 0 < high for low, high in map(trials.mean_interval, draws.tolist()))
    assert abs(contained / 4000 - 0.95) < 0.012


def test_correlations():
    r, (low, high) = trials.pearson([1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 4.0, 3.0, 5.0])
    assert r == pytest.approx(0.8)
    assert (low, high) == pytest.approx((-0.2796, 0.9862), abs=1e-3)
    assert trials.pearson([1.0, 2.0], [1.0, 2.0]) is None
    assert trials.pearson([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]) is None
    assert trials.pearson([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == (pytest.approx(-1.0), None)


def test_the_table_reports_only_significant_differences():
    def outcomes(*top1):
        return [Outcome(value, 0.5, 100.0) for value in top1]

    table = ablations.format_table(
        {
            "recipe": outcomes(0.50, 0.52, 0.51),
            "head=mlp": outcomes(0.60, 0.63, 0.61),
            "loss=l2": outcomes(0.55, 0.49, 0.52),
        },
        (0, 1, 2),
    ).splitlines()
    assert "higher" in table[3] and "+10.3" in table[3] and "8.9 to +11.8" in table[3]
    assert "inconclusive" in table[4]


@pytest.mark.slow
def test_data_scaling_end_to_end(recipe, tmp_path, capsys):
    command = ["experiment", "data-scaling", str(recipe), "--out", str(tmp_path)]
    grid = ["--fractions", "0.3", "1", "--sizes", "embed_dim=4", "embed_dim=8", "--lengths", "0.5", "1"]
    assert main([*command, *grid]) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "few/data_scaling"
    points = json.loads((folder / "data_scaling.json").read_text())["points"]
    assert [(point["fraction"], point["size"], point["length"]) for point in points][:3] == [
        (0.3, "embed_dim=4", 0.5),
        (0.3, "embed_dim=4", 1.0),
        (0.3, "embed_dim=8", 0.5),
    ]
    # The length is in steps for every fraction.
    steps = {
        (fraction, length): json.loads(
            (folder / f"fraction_{fraction}_embed_dim_4_length_{length}_seed_0/pretrain/metrics.jsonl")
            .read_text()
            .splitlines()[-1]
        )["step"]
        for fraction in ("0.3", "1")
        for length in ("0.5", "1")
    }
    assert steps["0.3", "1"] == steps["1", "1"] and steps["0.3", "0.5"] == steps["1", "0.5"]
    assert steps["1", "1"] == 2 * steps["1", "0.5"]
    assert "correlation (Pearson)" in printed and "all fractions" in printed
    assert (folder / "data_scaling.png").stat().st_size > 10_000
    assert main([*command, "--fractions", "0", "1"]) == 2
    assert "fractions must be above 0" in capsys.readouterr().err
    assert main([*command, "--sizes", "width=3"]) == 2
    assert "encoder.width" in capsys.readouterr().err


def test_correlations_by_share():
    def point(fraction, length, *pairs):
        return data_scaling.GridPoint(fraction, "embed_dim=8", length), [
            Outcome(top1, loss, 1.0) for loss, top1 in pairs
        ]

    found = data_scaling.correlations(
        dict([*(point(1.0, k, (0.5 - k / 10, 0.5 + k / 10)) for k in (1.0, 2.0, 3.0)), point(0.1, 1.0, (0.9, 0.2))])
    )
    assert found["fraction 1"] == (pytest.approx(-1.0), None) and found["fraction 0.1"] is None
    assert found["all fractions"][0] < -0.9 and found["all fractions"][1] is None
    more_seeds = data_scaling.correlations(
        dict([point(1.0, length, (0.5, 0.5 + length / 10), (0.4, 0.6)) for length in (1.0, 2.0, 3.0)])
    )
    assert more_seeds["fraction 1"] is None  # three points, however many seeds; all of one loss


def test_smaller_fractions_are_subsets_of_larger_ones(tmp_path):
    def names(fraction):
        data = Data(path="builtin:shapes", num_images=50, fraction=fraction)
        training, validation, *_ = make_datasets(Recipe(data=data), "pretrain")
        assert isinstance(validation, Shapes) and len(validation) == 64
        return [training.name(number) for number in range(len(training))]

    tenth, half, all_ = names(0.1), names(0.5), names(1.0)
    assert (len(tenth), len(half), len(all_)) == (5, 25, 50)
    assert set(tenth) < set(half) < set(all_)
    assert len(names(0.001)) == 1


def test_equal_differences_claim_nothing():
    assert trials.mean_interval([0.125] * 3) is None
    assert trials.verdict(trials.mean_interval([0.125] * 3)) == "needs more seeds"


def test_variants_keep_the_stages_that_they_start_from():
    pretrain = RECIPE["stages"]["pretrain"]
    again = {**pretrain, "kind": "pretrain", "init_from": "pretrain"}
    finetune = {**RECIPE["stages"]["finetune_32"], "init_from": "again"}
    stages = {"pretrain": pretrain, "again": again, "finetune": finetune, "other": {**finetune, "init_from": "scratch"}}
    recipe = Recipe.model_validate({**RECIPE, "name": "two", "stages": stages})
    assert list(trials.make_variant(recipe, []).stages) == ["pretrain", "again", "finetune"]
    assert trials.find_stages(recipe) == ("again", "finetune")
    without = recipe.model_copy(update={"data": recipe.data.model_copy(update={"validation_images": 0})})
    with pytest.raises(ValueError, match=r"set data\.validation_images"):
        trials.make_variant(without, [])


def test_the_length_is_in_steps_of_the_unchanged_recipe():
    recipe = Recipe.model_validate({**RECIPE, "data": {**RECIPE["data"], "fraction": 0.5}})
    epochs = {}
    for fraction in (0.1, 0.5, 1.0):
        whole, numbers = data_scaling.count_images(recipe, [fraction])
        images = numbers[fraction]
        point = data_scaling.GridPoint(fraction, "embed_dim=8", 1.0)
        (line,) = [line for line in data_scaling.overrides_of(recipe, point, whole / images) if ".epochs=" in line]
        epochs[fraction] = images * float(line.split("=")[1])
    assert list(epochs.values()) == pytest.approx([0.6 * 30] * 3)
    with pytest.raises(ValueError, match="choose fractions that differ"):
        data_scaling.data_scaling(recipe, Path("nowhere"), fractions=(0.001, 0.002))


@pytest.mark.parametrize("change", ["target.downsample=4", "mask.strategy=square", "target.norm_window=5"])
def test_baselines_are_of_the_target_and_masks_of_the_recipe(change, recipe, tmp_path):
    assert main(["pretrain", str(recipe), f"stages.pretrain.{change}", "--out", str(tmp_path)]) == 0
    assert main(["experiment", "loss-baselines", str(recipe), f"stages.pretrain.{change}", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "few/pretrain/summary.json").read_text())["validation_masked_l1"]
    (baseline,) = json.loads((tmp_path / "few/loss_baselines.json").read_text())
    if "norm" in change:
        assert baseline["zero_normalized"] == pytest.approx(summary["predict zero"], rel=1e-3)
    else:
        assert baseline["zero"] == pytest.approx(summary["predict zero"], rel=1e-3)
        assert baseline["nearest_visible"] == pytest.approx(summary["copy the nearest visible pixel"], rel=1e-3)
        assert load_simmim(tmp_path / "few/pretrain/export").mask_generator.strategy == (
            "square" if "square" in change else "random"
        )


def test_runs_from_before_a_setting_go_on():
    now = {
        "data": {"fraction": 1.0},
        "stage": {"target": {"loss": "l1", "pixels": "masked", "downsample": 1, "head": "linear"}},
    }
    before = {"data": {}, "stage": {"target": {"loss": "l1"}}}
    assert different_settings(before, now) == []
    now["stage"]["target"]["head"] = "mlp"
    assert different_settings(before, now) == ["stage.target.head: linear -> mlp"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mask-distance", "--ratios", "1.5", "--mask-patch-sizes", "32"], "--ratios between 0 and 1"),
        (["mask-distance", "--mask-patch-sizes", "0"], "--mask-patch-sizes must be at least 1 px"),
        (["mask-distance", "--mask-patch-sizes", "192", "--ratios", "0.1"], "mask all patches or none"),
        (["mask-distance", "--image-size", "192", "96", "3"], "one side, or height and width"),
        (["activations", "--steps", "0"], "steps must be at least 1"),
        (["activations", "--batch-size", "0"], "batch_size must be at least 1"),
        (["activations", "--seeds", "0"], "seeds must be at least 1"),
        (["window-transfer", "--lr", "-1"], "learning rates must be above 0"),
    ],
)
def test_numbers_that_cannot_work_are_named(arguments, message, tmp_path, capsys):
    assert main(["experiment", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_masks_of_any_ratio_are_drawn(tmp_path):
    assert (
        main(
            [
                "experiment",
                "mask-distance",
                "--ratios",
                "0.8",
                "--mask-patch-sizes",
                "32",
                "--masks",
                "2",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    assert (tmp_path / "mask_distance.png").exists()
