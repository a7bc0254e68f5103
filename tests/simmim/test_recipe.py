"""Recipes: loading, overrides, published settings and error messages."""

from __future__ import annotations

import pytest
import torch
import yaml

from simmim.config import encoder_config
from simmim.config.loading import dump_recipe, load_recipe, shipped_recipes
from simmim.stages.initialization import derive_accumulation
from swin import SwinEncoder
from swin.config import check_window


@pytest.fixture
def write(tmp_path):
    def write(text: str):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_every_stage_of_every_shipped_recipe_builds(path):
    recipe = load_recipe(str(path))
    assert recipe.name == path.stem
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ") and f"recipes/{path.name}" in first
    for stage in recipe.stages.values():
        with torch.device("meta"):
            config = SwinEncoder(encoder_config(recipe.encoder, stage)).config
        assert check_window(config) is None
        for processes in (1, 8) if stage.batch_size > 512 else (1,):
            assert derive_accumulation(stage, processes) >= 1


CHAINS = {
    "simmim_swinv2_t": [(192, 12), (224, 14)],
    "simmim_swinv2_s": [(192, 12), (224, 14)],
    "simmim_swinv2_b": [(192, 12), (224, 14), (384, 24)],
    "simmim_swinv2_l": [(192, 12), (224, 14), (512, 32)],
    "simmim_swinv2_h": [(192, 12), (224, 14), (512, 32)],
    "simmim_swinv2_3b": [(192, 12), (192, 12), (640, 40)],
    "kinetics_swinv2_3b": [(256, 16), (320, 20)],
    "imagenet_swinv2_b": [(192, 12), (384, 24)],
    "imagenet_swinv2_l": [(192, 12), (384, 24)],
    "simmim_swin_b": [(192, 6), (224, 7)],
    "simmim_swin_l": [(192, 12), (224, 14)],
}


@pytest.mark.parametrize("name", CHAINS)
def test_image_and_window_sizes_of_the_published_chains(name):
    stages = load_recipe(name).stages.values()
    assert [(stage.image_size[0], stage.window_size[0]) for stage in stages] == CHAINS[name]


SEGMENTATION = {"segment_demo", "segment_swinv2_t", "segment_swinv2_l", "segment_swinv2_3b"}


@pytest.mark.parametrize(
    ("name", "steps", "warmup_steps", "lr"),
    [("t", 160_000, 1500, 4e-5), ("l", 40_000, 375, 6e-5), ("3b", 80_000, 750, 4e-5)],
)
def test_published_segmentation_schedules(name, steps, warmup_steps, lr):
    """Appendices A1.2, A2.1 and A2.2 of Swin V2, on the 20,210 images of ADE20K."""
    stage = load_recipe(f"segment_swinv2_{name}").stages["segment"]
    steps_per_epoch = 20_210 / stage.batch_size
    assert stage.schedule.epochs * steps_per_epoch == pytest.approx(steps, rel=1e-3)
    assert stage.schedule.warmup_epochs * steps_per_epoch == pytest.approx(warmup_steps, rel=1e-3)
    assert stage.schedule.base_lr * stage.batch_size / 512 == pytest.approx(lr)
    assert (stage.schedule.name, stage.layer_decay, stage.optimizer.weight_decay) == ("linear", 0.95, 0.05)


def test_learning_rates_of_the_published_recipes():
    """Peak rates at the published batch sizes: SimMIM's repository, and appendix A2.2 of Swin V2."""
    expected = {
        "simmim_swin_b": [4e-4, 5e-3],
        "simmim_swinv2_b": [4e-4, 5e-3, 4e-5],
        "simmim_swinv2_3b": [1.4e-3, 1.4e-3, 2.1e-5],
        "imagenet_swinv2_b": [1e-3, 4e-5],
        "imagenet_swinv2_l": [1e-3, 4e-5],
        "kinetics_swinv2_3b": [3.6e-4, 5e-5],
    }
    for name, rates in expected.items():
        stages = load_recipe(name).stages.values()
        found = [stage.schedule.base_lr * stage.batch_size / 512 for stage in stages]
        assert found == pytest.approx(rates, rel=1e-4)
    giant = list(load_recipe("simmim_swinv2_3b").stages.values())
    steps = [stage.schedule.warmup_epochs * 70e6 / stage.batch_size for stage in giant[:2]]
    assert steps == pytest.approx([30_000, 20_000], rel=2e-3)


LARGE = ("l_1536", "3b_1536")


@pytest.mark.parametrize("size", ["t", "s", "b", *LARGE])
def test_published_detectors(size):
    """Peak rates and lengths of appendix A of Swin V2, and the milestones of the official detection recipes."""
    published = {"l_1536": (4e-5, 64, 32, 36), "3b_1536": (6e-4, 96, 32, 36.8)}
    rate, batch_size, window, epochs = published.get(size, (1e-4, 16, 16, 36))
    stages = [stage for stage in load_recipe(f"detect_swinv2_{size}").stages.values() if stage.kind == "detect"]
    assert [stage.cascade for stage in stages] == ([True] if size in LARGE else [False, True])
    for stage in stages:
        assert stage.schedule.base_lr * stage.batch_size / 512 == pytest.approx(rate)
        assert (stage.batch_size, stage.window_size[0], stage.schedule.epochs) == (batch_size, window, epochs)
        assert stage.schedule.milestones_epochs == [27, 33] and stage.optimizer.weight_decay == 0.05
        assert (stage.jitter.kind == "large_scale") == (size in LARGE)


def test_the_shipped_sizes():
    detectors = {
        f"detect_{name}" for name in ("miniature", "painted", *(f"swinv2_{size}" for size in ("t", "s", "b", *LARGE)))
    }
    others = {"demo", "cifar_swinv2_nano", "video_demo", "video_painted", "kinetics_mini"}
    assert {path.stem for path in shipped_recipes()} == {*others, *CHAINS, *SEGMENTATION, *detectors}


def test_the_official_base_recipe():
    recipe = load_recipe("simmim_swinv2_b")
    stage = recipe.stages["pretrain"]
    assert (stage.image_size, stage.window_size) == ((192, 192), (12, 12))
    assert (stage.batch_size, stage.drop_path) == (2048, 0.1)
    assert (stage.mask.patch_size, stage.mask.ratio, stage.target.norm_window) == (32, 0.6, 47)
    schedule = stage.schedule
    assert (schedule.name, schedule.epochs, schedule.milestones_epochs, schedule.base_lr) == (
        "multistep",
        800,
        [700],
        1e-4,
    )


def test_overrides_are_yaml(write):
    path = write("data: {path: images}\n")
    recipe = load_recipe(
        path, ["stages.pretrain.schedule.base_lr=2e-4", "stages.pretrain.image_size=[64, 96]", "name=other"]
    )
    assert recipe.stages["pretrain"].schedule.base_lr == 2e-4
    assert recipe.stages["pretrain"].image_size == (64, 96)
    assert recipe.name == "other" and recipe.data.path == "images"


def test_a_dumped_recipe_reads_the_same(write, tmp_path):
    recipe = load_recipe("simmim_swinv2_h")
    path = tmp_path / "again.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("data: {pth: x}", [], r"data.pth: unknown key, did you mean 'path'\? \(known here: path, mean"),
        ("maks: 1", [], r"maks: unknown key"),
        ("{}", ["stages.pretrain.mask.ration=0.5"], r"did you mean 'ratio'.*\[stages.pretrain.mask.ration=0.5\]"),
        ("{}", ["stages.pretrain.batch_size=many"], r"stages.pretrain.batch_size: Input should be a valid integer"),
        ("{}", ["stages.pretrain.batch_size=true"], r"stages.pretrain.batch_size: Input should be a valid integer"),
        ("{}", ["stages.pretrain.mask.ratio=1.5"], r"mask.ratio: Input should be less than 1 \(got 1.5\)"),
        ("{}", ["stages.pretrain.schedule.base_lr=.nan"], r"base_lr: Input should be a finite number"),
        ("{}", ["stages.pretrain.image_size=200"], r"does not divide the image size 200 x 200: choose one of 4, 5, 8"),
        ("{}", ["stages.pretrain.image_size=97"], r"choose one of 97|no mask patch"),
        ("{}", ["stages.pretrain.mask.patch_size=6"], r"must be a multiple of encoder.patch_size 4"),
        ("{}", ["stages.pretrain.target.norm_window=46"], r"norm_window must be odd and at least 3, got 46"),
        ("{}", ["stages.pretrain.schedule.warmup_epochs=200"], r"warmup_epochs 200 must be below epochs 100"),
        ("{}", ["stages.pretrain.schedule.name=multistep"], r"needs milestones_epochs"),
        (
            "{}",
            ["stages.pretrain.crop.scale=[1, 0.5]"],
            r"scale must be \[low, high\] with low not above high, got 1.0, 0.5",
        ),
        (
            "{}",
            ["stages.pretrain.image_size=[32]"],
            r"1 problem.*\n  stages.pretrain.image_size: this must be one or two positive",
        ),
        ("{}", ["stages.pretrain.window_size=true"], r"window_size: this must be one or two positive integers"),
        ("{}", ["name=../other"], r"name: String should match pattern"),
        ("{}", ["encoder.in_chans=4"], r"data.mean has 3 values, but encoder.in_chans is 4"),
        ("{}", ["encoder.num_heads=[3, 5, 7, 9]"], r"128 channels, which 3 heads do not divide"),
        ("{}", ["encoder.name=swinv2_bas"], r"encoder.name: Input should be 'swin_tiny', 'swin_small'"),
        ("{}", ["stages.finetune.epochs=3"], r"stages.finetune.epochs: unknown key \(known here: kind, init_from"),
        (
            "{}",
            ["stages.tune.head=keep"],
            r"stage 'tune': cannot infer its kind; start the name with one of pretrain, supervised",
        ),
        ("{}", ["stages.tune.kind=tune"], r"stages.tune: .*'tune' found using 'kind' does not match"),
        ("{}", ["stages={}"], r"stages: .* at least 1 item"),
        ("{}", ["stages.finetune.head=keep"], r"stages.finetune has no initial weights: put a stage before it"),
        ("{}", ["stages.finetune.init_from=scratch"], r"starts from scratch: set its image_size and window_size"),
        (
            "stages: {finetune_a: {init_from: finetune_b}, finetune_b: {init_from: x}}",
            [],
            r"'finetune_b' is not an earlier stage",
        ),
        ("stages: {finetune: {init_from: finetune}}", [], r"'finetune' is not an earlier stage"),
        ("stages: {finetune: {init_from: x, micro_batch_size: 3}}", [], r"micro_batch_size must be even, got 3"),
        ("stages: {finetune: {init_from: x, augment: {rand_augment: much}}}", [], r"rand_augment: String should match"),
        (
            "{encoder: {in_chans: 1}, data: {mean: [0], std: [1]}, stages: {finetune: {init_from: x}}}",
            [],
            r"rand_augment needs 3 channels: set it to null",
        ),
        ("{}", ["seed"], r"override 'seed': expected key.path=value"),
        ("{}", ["seed.a=1", "seed.a.b=1"], r"a is a value and has no keys"),
        ("{}", ["seed=[1"], r"is not valid YAML"),
        ("- a\n- b", [], r"is not a recipe: expected keys such as name, seed"),
        ("seed: 1\nseed: 2", [], r"seed is given twice"),
        ("a: !!python/object/apply:os.system [ls]", [], r"not valid YAML.*could not determine a constructor"),
        ("data: {path: x", [], r"is not valid YAML"),
    ],
)
def test_invalid_recipes_are_explained(write, text, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(text), overrides)


def test_all_problems_are_reported_together(write):
    with pytest.raises(ValueError, match=r"(?s)3 problem\(s\).*seed.*pth.*base_lr"):
        load_recipe(write("data: {pth: x}\nseed: -1\nstages: {pretrain: {schedule: {base_lr: 0}}}"))


def test_a_missing_recipe_suggests_a_shipped_one(tmp_path):
    with pytest.raises(ValueError, match=r"did you mean simmim_swinv2_b\?"):
        load_recipe("simmim_swin2_b.yaml")
    with pytest.raises(ValueError, match=r"shipped recipes: .*demo"):
        load_recipe(str(tmp_path / "zzz"))


def test_files_that_are_not_recipes(tmp_path):
    path = tmp_path / "big.yaml"
    path.write_text("a" * 1_000_001)
    with pytest.raises(ValueError, match="larger than 1,000,000 bytes"):
        load_recipe(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a text file"):
        load_recipe(str(path))


def test_exponents_without_a_point_are_numbers(write):
    assert yaml.safe_load("1e-3") == "1e-3"
    recipe = load_recipe(write("stages: {pretrain: {schedule: {base_lr: 1e-3}}}"))
    assert recipe.stages["pretrain"].schedule.base_lr == 1e-3


def test_a_stage_can_repeat_another(write):
    """Values of a YAML merge key may be overridden; duplicate keys are still errors."""
    text = """
stages:
  finetune_a: &a {init_from: scratch, image_size: 32, window_size: 4, layer_decay: 0.5, drop_path: 0.3}
  finetune_b:
    <<: *a
    layer_decay: 1
"""
    stages = load_recipe(write(text)).stages
    assert (stages["finetune_a"].layer_decay, stages["finetune_b"].layer_decay) == (0.5, 1)
    assert stages["finetune_b"].drop_path == 0.3
    shared = text.replace("drop_path: 0.3", "labels: {labels_per_class: 5}")
    stages = load_recipe(write(shared), ["stages.finetune_b.labels.labels_per_class=9"]).stages
    assert (stages["finetune_a"].labels.labels_per_class, stages["finetune_b"].labels.labels_per_class) == (5, 9)
    with pytest.raises(ValueError, match="drop_path"):
        load_recipe(write(text + "    drop_path: 0\n    drop_path: 1\n"))


def test_a_partial_schedule_keeps_the_defaults_of_its_stage(write):
    text = (
        "stages: {finetune: {init_from: x, schedule: {epochs: 30}, crop: {scale: [0.3, 1]}}, pretrain: {init_from: y}}"
    )
    stages = load_recipe(write(text)).stages
    schedule = stages["finetune"].schedule
    assert (schedule.epochs, schedule.base_lr, schedule.warmup_epochs, schedule.min_lr) == (30, 1.25e-3, 20, 2.5e-7)
    assert stages["finetune"].crop.interpolation == "bicubic" and stages["finetune"].crop.scale == (0.3, 1)
    assert (stages["pretrain"].schedule.base_lr, stages["pretrain"].crop.interpolation) == (1e-4, "bilinear")
