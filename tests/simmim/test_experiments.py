"""The experiments on mask distance and activations reproduce the findings of the papers at tiny sizes."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from simmim.cli.main import main
from simmim.experiments import activations, mask_distance
from simmim.masking import MaskGenerator

# AvgDist at 192 px of random masks by exact geometry, means over many masks: ratio -> mask patch size -> px.
REFERENCE = {
    0.1: {8: 2.08, 16: 3.81, 32: 7.64, 64: 17.7},
    0.3: {8: 2.47, 16: 4.59, 32: 10.0, 64: 22.6},
    0.6: {8: 3.71, 16: 7.23, 32: 15.7, 64: 36.5},
    0.8: {8: 6.12, 16: 12.49, 32: 24.8, 64: 69.9},
}
MASKS = {8: 4, 16: 8, 32: 30, 64: 40}


@pytest.mark.slow
@pytest.mark.parametrize("ratio", REFERENCE)
def test_distances_are_those_of_exact_geometry(ratio):
    for size, expected in REFERENCE[ratio].items():
        found = torch.tensor(mask_distance.distances_of(MaskGenerator((192, 192), size, ratio, seed=0), MASKS[size]))
        # Both means have an error; the reference is one of some ten masks.
        error = found.std() * (1 / MASKS[size] + 1 / 10) ** 0.5
        assert abs(found.mean() - expected) < 2 * error + 0.01 * expected, (size, ratio)


@pytest.mark.slow
def test_the_band_of_the_paper(tmp_path, capsys):
    sizes, ratios = ("8", "16", "32", "64"), ("0.2", "0.4", "0.6", "0.8")
    command = [
        "experiment",
        "mask-distance",
        "--mask-patch-sizes",
        *sizes,
        "--ratios",
        *ratios,
        "--masks",
        "6",
        "--out",
        str(tmp_path),
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    marked = {
        line.split(" px")[0].strip(): line.count("*") for line in printed.splitlines() if line.startswith("random")
    }
    assert marked == {"random 8": 0, "random 16": 1, "random 32": 2, "random 64": 1}
    rows = json.loads((tmp_path / "mask_distance.json").read_text())
    assert len(rows) == 16 and (tmp_path / "mask_distance.png").stat().st_size > 10_000
    assert main([*command, "--image-size", "96", "128", "--strategies", "square", "block", "--masks", "3"]) == 2
    assert "mask_patch_size 64 does not divide" in capsys.readouterr().err
    assert main(["experiment", "mask-distance", "--masks", "1", "--out", str(tmp_path)]) == 2
    assert "--masks must be at least 2" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["random", "square", "block"])
def test_every_strategy_masks_exactly_so_many(strategy):
    epoch, index = torch.zeros(40, dtype=torch.int64), torch.arange(40)
    for size, cell, ratio in (((192, 192), 16, 0.4), ((192, 192), 32, 0.6), ((64, 96), 8, 0.75), ((32, 32), 8, 0.11)):
        generator = MaskGenerator(size, cell, ratio, seed=3, strategy=strategy)
        mask = generator(epoch, index)
        assert mask.dtype == torch.bool and mask.shape == (40, size[0] // cell, size[1] // cell)
        assert (mask.sum(dim=(1, 2)) == generator.num_masked).all()
        assert abs(generator.num_masked / generator.num_mask_patches - ratio) < (0.2 if strategy == "square" else 0.07)
        assert torch.equal(mask[7:9], generator(epoch[:2], index[7:9]))
        assert len({tuple(one.flatten().tolist()) for one in mask}) > 3
        assert not torch.equal(mask, generator(epoch + 1, index))
    with pytest.raises(ValueError, match="at least one mask patch must be masked and one visible"):
        MaskGenerator((32, 32), 16, 0.99, strategy=strategy)


def test_a_square_is_one_and_blocks_hang_together():
    epoch, index = torch.zeros(200, dtype=torch.int64), torch.arange(200)
    squares = MaskGenerator((192, 192), 32, 0.25, strategy="square")(epoch, index)
    for mask in squares:
        rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
        assert rows.tolist() == list(range(rows[0], rows[0] + 3)) and columns.tolist() == list(
            range(columns[0], columns[0] + 3)
        )
    assert squares.float().mean(dim=0).min() > 0.01  # everywhere

    def borders(strategy):
        masks = MaskGenerator((192, 192), 16, 0.4, strategy=strategy)(epoch, index)
        return (masks[:, 1:] != masks[:, :-1]).float().mean() + (masks[:, :, 1:] != masks[:, :, :-1]).float().mean()

    assert borders("block") < 0.5 * borders("random")


PLAN = activations.Plan(
    depths=(2, 2, 6, 2), embed_dim=16, image_size=32, window_size=4, batch_size=4, steps=20, lrs=(1.6e-2,), seeds=1
)


@pytest.mark.slow
def test_amplitudes_are_those_of_figure_2(tmp_path, capsys):
    options = ["--depths", "2", "2", "6", "2", "--embed-dim", "16", "--image-size", "32", "--window-size", "4"]
    options += ["--batch-size", "4", "--steps", "20", "--lrs", "0.016", "--seeds", "1", "--out", str(tmp_path)]
    assert main(["experiment", "activations", *options]) == 0
    table = capsys.readouterr().out
    assert "largest / smallest" in table and table.count("ones *") == 4
    content = json.loads((tmp_path / "activations.json").read_text())
    profiles = {(p["variant"], p["lr"]): p["rms"] for p in content["profiles"]}
    assert all(len(rms) == 12 for rms in profiles.values())
    longest = slice(4, 10)  # the third stage, between two mergings
    # Before the branch: it grows with depth.
    before = profiles["pre-norm", 0.0][longest]
    assert before[-1] > 1.02 * before[0]
    # Behind it: two branches of variance 1 for each block, whatever the weights; about the root of their number.
    post = profiles["res-post-norm", 0.0][longest]
    assert all(b <= a + 2 for a, b in pairwise(post)) and post[-1] < (post[0] ** 2 + 2 * 5) ** 0.5 * 1.3
    assert profiles["res-post-norm, extra norms", 0.0][9] == pytest.approx(1, abs=0.02)  # block 6 of its stage
    # Trained at a high rate: an order of magnitude, and every norm behind the branch below every one before it.
    trained = {variant: max(rms) for (variant, lr), rms in profiles.items() if lr}
    assert min(trained["pre-norm"], trained["pre-norm, cosine"]) > 5 * trained["res-post-norm"]
    assert trained["res-post-norm, extra norms"] <= trained["res-post-norm"] * 1.2


def test_a_profile_is_of_the_main_branch():
    one = activations.run(PLAN, "res-post-norm", 0.0, 0)
    two = activations.run(PLAN, "res-post-norm", 0.0, 0)
    other = activations.run(PLAN, "res-post-norm", 0.0, 1)
    assert one.rms == two.rms and one.rms != other.rms
    assert one.ratio == pytest.approx(max(one.rms) / min(one.rms))
