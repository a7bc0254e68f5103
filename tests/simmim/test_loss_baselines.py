"""Loss baselines: predictors that learn nothing, on the images of a recipe."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt

from simmim.cli.main import main
from simmim.masking import MaskGenerator, expand_mask
from simmim.metrics.baselines import average_distance, nearest_visible

SMALL = ["data.path=builtin:shapes", "data.validation_images=20", "stages.pretrain.image_size=32"]
SMALL += ["stages.pretrain.window_size=4", "stages.pretrain.mask.patch_size=8", "encoder.embed_dim=8"]


def masks(size: int, mask_patch_size: int, ratio: float, count: int) -> torch.Tensor:
    index = torch.arange(count)
    return expand_mask(MaskGenerator((size, size), mask_patch_size, ratio)(index * 0, index), mask_patch_size)


def test_distances_are_those_of_scipy():
    for mask in masks(48, 8, 0.6, 5):
        distances = distance_transform_edt(mask.numpy())
        assert average_distance(mask) == pytest.approx(distances[mask.numpy()].mean(), rel=1e-9)
        rows, columns = nearest_visible(mask)
        y, x = torch.meshgrid(*map(torch.arange, mask.shape), indexing="ij")
        found = ((rows - y) ** 2 + (columns - x) ** 2).sqrt()
        torch.testing.assert_close(found, torch.from_numpy(distances).float())
        assert not mask[rows, columns].any()


@pytest.mark.slow
@pytest.mark.parametrize(("mask_patch_size", "ratio", "expected"), [(4, 0.6, 2.07), (16, 0.6, 7.23), (32, 0.5, 12.3)])
def test_average_distance_of_the_paper(mask_patch_size, ratio, expected):
    """At 192 px, over 60 masks: the spread of coarse masks is some 3 px."""
    found = [average_distance(mask) for mask in masks(192, mask_patch_size, ratio, 60)]
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.08)


def test_a_table_for_every_mask(tmp_path, capsys):
    arguments = ["demo", *SMALL, "stages.pretrain.target.norm_window=7", "--out", str(tmp_path)]
    assert (
        main(["experiment", "loss-baselines", *arguments, "--mask-patch-sizes", "4", "8", "--ratios", "0.3", "0.6"])
        == 0
    )
    printed = capsys.readouterr().out
    baselines = json.loads((tmp_path / "demo/loss_baselines.json").read_text())
    assert [(row["mask_patch_size"], row["ratio"]) for row in baselines] == [(4, 0.3), (4, 0.6), (8, 0.3), (8, 0.6)]
    for row in baselines:
        assert row["nearest_visible"] < row["mean_of_visible"] < row["zero"] and 0.4 < row["zero_normalized"] < 1
    assert baselines[0]["nearest_visible"] < baselines[3]["nearest_visible"]
    assert printed.count("<- demo") == 1 and f"{baselines[3]['nearest_visible']:.4f}" in printed
    assert (tmp_path / "demo/loss_baselines.txt").read_text() in printed


def test_losses_of_a_known_image(tmp_path, capsys):
    """White on the left, black on the right, mean 0.5 and deviation 0.5: everything is 1 away from zero."""
    for index in range(20):
        image = Image.new("RGB", (32, 32))
        image.paste((255, 255, 255), (0, 0, 16, 32))
        image.save(tmp_path / f"{index}.png")
    overrides = [*SMALL[2:], f"data.path={tmp_path}", "data.mean=[0.5, 0.5, 0.5]", "data.std=[0.5, 0.5, 0.5]"]
    assert main(["experiment", "loss-baselines", "demo", *overrides, "--out", str(tmp_path / "out")]) == 0
    (row,) = json.loads((tmp_path / "out/demo/loss_baselines.json").read_text())
    assert row["zero"] == pytest.approx(1) and row["zero_normalized"] is None
    assert row["nearest_visible"] < 0.7 < row["mean_of_visible"] < 1.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", *SMALL, "--mask-patch-sizes", "5"], "does not divide"),
        (["demo", *SMALL, "--ratios", "1"], "at least one mask patch must be masked and one visible"),
        (["demo", *SMALL, "data.path=nowhere"], "nowhere"),
        (["demo", *SMALL, "--images", "0"], "at least 1"),
    ],
)
def test_mistakes(arguments, message, tmp_path, capsys):
    assert main(["experiment", "loss-baselines", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
