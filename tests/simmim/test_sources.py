"""No stage is trained on what another is judged by, however its place is spelled."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from simmim import stages
from simmim.config import Recipe
from simmim.data.sources import open_images
from simmim.evaluation.dispatch import evaluate_export
from simmim.stages.datasets import make_datasets
from simmim.stages.runner import make_job
from tests.simmim.test_detection_data import write_coco

STAGE = {"init_from": "scratch", "image_size": 16, "window_size": 2}


@pytest.fixture
def photos(tmp_path):
    """Two classes of 20 images with label maps: ``classes/{a,b}``, ``scenes/{images,annotations}``."""
    generator = np.random.default_rng(0)
    for number in range(40):
        pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        for folder in (f"classes/{'ab'[number % 2]}", "scenes/images"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number:02d}.png")
        (tmp_path / "scenes/annotations").mkdir(exist_ok=True)
        Image.fromarray(pixels[..., 0] // 128).save(tmp_path / f"scenes/annotations/{number:02d}.png")
    return tmp_path


def make_recipe(path, **later) -> Recipe:
    stages = {"pretrain": {"image_size": 16, "window_size": 2, "mask": {"patch_size": 8}}, **later}
    encoder = {"name": "swinv2_tiny", "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    return Recipe.model_validate({"data": {"path": str(path)}, "encoder": encoder, "stages": stages})


def names(source) -> set[str]:
    return {os.path.realpath(source.name(number)) for number in range(len(source))}


def finetune(path):
    return {"finetune": {**STAGE, "labels": {"path": str(path), "val_images": 4}}}


def segment(path):
    return {"segment": {**STAGE, "labels": {"path": str(path), "val_images": 4, "classes": 2}}}


@pytest.mark.parametrize("spelled", ["{0}", "{0}/", "./{0}", "{0}/../{0}", "{1}/{0}", "link", "{1}"])
def test_one_folder_has_many_spellings(photos, spelled, monkeypatch):
    monkeypatch.chdir(photos)
    (photos / "link").symlink_to(photos / "classes")
    recipe = make_recipe(spelled.format("classes", photos), **finetune("classes"))
    judged_by = names(make_datasets(recipe, "finetune").validation)
    seen = names(make_datasets(recipe, "pretrain").training)
    assert len(judged_by) == 4 and seen and not seen & judged_by


def test_label_maps_are_no_images(photos):
    recipe = make_recipe(photos / "scenes", **segment(photos / "scenes"))
    images, judged_by = names(make_datasets(recipe, "pretrain").training), make_datasets(recipe, "segment").validation
    validation = make_datasets(recipe, "pretrain").validation
    assert images and all("/images/" in name for name in images | names(validation)) and not images & names(judged_by)


@pytest.mark.parametrize("part", ["training", "validation", "test"])
def test_label_maps_of_any_part_are_no_images(photos, part):
    """Also of one that no stage opens."""
    for kind in ("images", "annotations"):
        for number in range(40):
            file = photos / "scenes" / kind / f"{number:02d}.png"
            folder = file.parent / (part if number > 35 else "validation" if number > 30 else "training")
            folder.mkdir(exist_ok=True)
            file.rename(folder / file.name)
    recipe = make_recipe(photos / "scenes", **segment(photos / "scenes"))
    seen = names(make_datasets(recipe, "pretrain").training)
    assert seen and all("/images/" in name for name in seen) and not any("/images/validation/" in name for name in seen)


def test_only_the_part_for_validation_tests_a_classifier(photos):
    for part, end in (("train", "[0-2]?.png"), ("val", "3?.png")):
        for name in "ab":
            (photos / "parts" / part / name).mkdir(parents=True)
            for file in (photos / "classes" / name).glob(end):
                file.rename(photos / "parts" / part / name / file.name)
    labels = {"path": str(photos / "parts"), "tests": [str(photos / "parts"), str(photos / "gone")]}
    sources = make_datasets(make_recipe(photos / "parts", finetune={**STAGE, "labels": labels}), "pretrain")
    assert len(names(sources.training)) == 27 and not any("/val/" in name for name in names(sources.training))
    ((where, why),) = sources.problems
    assert where == "stages.finetune.labels.tests" and "gone" in why


def test_inputs_of_later_stages_are_checked_before_training(photos, tmp_path):
    few = {"finetune": {**STAGE, "labels": {"path": str(photos / "classes"), "labels_per_class": 100}}}
    start = {"finetune": {**finetune(photos / "classes")["finetune"], "init_from": "nowhere"}}
    builtin = {"segment": {**STAGE, "labels": {"path": ""}}}
    for path, later, message in (
        (photos / "classes", few, "stages.finetune: .*100"),
        (photos / "classes", start, "stages.finetune: init_from .nowhere. is no stage, and no file or folder of"),
        ("builtin:shapes", builtin, "stages.segment: the recipe names no images with label maps"),
    ):
        with pytest.raises(ValueError, match=message):
            stages.run(make_recipe(path, **later), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stages_with_labels_keep_from_each_other(photos):
    later = finetune(photos / "classes") | {
        "supervised": {**STAGE, "labels": {"path": str(photos / "classes/../classes"), "val_images": 2}}
    }
    recipe = make_recipe(photos / "classes", **later)
    two, four = (names(make_datasets(recipe, name).validation) for name in ("supervised", "finetune"))
    assert len(two) == 2 and two < four and not names(make_datasets(recipe, "supervised").training) & four


def test_no_training_image_left_is_an_error(photos):
    """What is named by a list may be all that there is."""
    later = {"finetune": {**STAGE, "labels": {"path": str(photos / "classes"), "val_path": str(photos / "classes")}}}
    with pytest.raises(
        ValueError, match="none of 36 images is left to train on: all are evaluation data of stages of the recipe"
    ):
        make_datasets(make_recipe(photos / "classes", **later), "pretrain")


@pytest.mark.parametrize(
    "later", [finetune, segment, lambda path: {"detect": {**STAGE, "labels": {"path": str(path)}}}]
)
def test_missing_labels_are_missed_before_anything_is_trained(photos, later, tmp_path):
    recipe = make_recipe(photos / "classes", **later(photos / "gone"))
    with pytest.raises(ValueError, match=r"stages.(finetune|segment|detect): .*gone"):
        stages.run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    job = make_job(recipe, "pretrain", tmp_path / "out", "no")
    ((which, why),) = job.datasets.problems
    assert which.startswith("stages.") and "gone" in why and why.endswith("cannot be excluded from training")


def test_validation_images_may_be_inside_the_training_folder(photos):
    """A list of some of the images that a stage is trained on."""
    some = [f"classes/{name}/{number:02d}.png" for number, name in ((0, "a"), (1, "b"), (2, "a"))]
    rows = [f"{file},{file.split('/')[1]}" for file in some]
    (photos / "some.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    labels = {"path": str(photos / "classes"), "val_path": str(photos / "some.csv")}
    recipe = make_recipe(photos / "classes", finetune={**STAGE, "labels": labels})
    sources = make_datasets(recipe, "finetune")
    assert names(sources.validation) == {str(photos / file) for file in some}
    assert len(names(sources.training)) == 37 and not names(sources.training) & names(sources.validation)


def test_objects_too(tmp_path, monkeypatch):
    write_coco(tmp_path / "coco", count=40)
    monkeypatch.chdir(tmp_path)
    labels = {"detect": {**STAGE, "labels": {"path": "coco/", "val_images": 3}}}
    recipe = make_recipe(tmp_path, **labels)
    judged_by = names(make_datasets(recipe, "detect").validation)
    assert len(judged_by) == 3 and not names(make_datasets(recipe, "pretrain").training) & judged_by


def test_classifier_is_evaluated_on_several_test_sets(photos, tmp_path, capsys):
    """Each variant by the numbers of its folders, as ``simmim evaluate`` does; none of it is trained on."""
    for variant in ("imagenetv2-a", "imagenetv2-b"):
        for label, name in enumerate("ab"):
            shutil.copytree(photos / "classes" / name, photos / "v2" / variant / str(label))
    shutil.rmtree(photos / "v2/imagenetv2-b/1")
    labels = {"path": str(photos / "classes"), "tests": [str(photos / "v2")]}
    stage = {**STAGE, "labels": labels, "augment": {"rand_augment": None}, "batch_size": 8, "micro_batch_size": 8}
    stage["schedule"] = {"epochs": 1, "warmup_epochs": 0}
    recipe = make_recipe(photos, finetune=stage).model_copy(update={"name": "more"})
    export = stages.run_stage(recipe, "finetune", tmp_path / "out", precision="fp32")
    summary = json.loads((export.parent / "summary.json").read_text())
    for variant, images in (("imagenetv2-a", 40), ("imagenetv2-b", 20)):
        place = str(photos / "v2" / variant)
        found = evaluate_export(export, place, num_workers=0, precision="fp32")
        assert len(names(open_images(place))) == images
        assert summary["test_top1"][place] == pytest.approx(found["top1"])
        assert summary["test_loss"][place] == pytest.approx(found["loss"], rel=1e-5)
    assert summary["test_top1"].keys() == summary["test_loss"].keys() and "v2/imagenetv2-b" in capsys.readouterr().out
    assert not any("/v2/" in name for name in names(make_datasets(recipe, "pretrain").training))
    gone = make_recipe(photos, finetune=stage | {"labels": labels | {"tests": [str(photos / "gone")]}})
    with pytest.raises(ValueError, match=r"stages.finetune: '.*gone' is not a folder"):
        stages.run(gone, tmp_path / "other")
