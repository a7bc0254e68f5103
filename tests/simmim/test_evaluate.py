"""One command judges, and one shows, what any export says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.cli.main import main
from simmim.config import DetectStage
from simmim.data import Decoder
from simmim.evaluation.classification import labelled_images
from simmim.export.classifier import save_classifier
from simmim.export.heads import HEAD, save_head
from simmim.stages.detect import describe, head_of
from simmim.tasks.classification import Classification
from simmim.tasks.detection import Detection
from simmim.tasks.segmentation import Segmentation
from simmim.visualization import drawing
from swin import make_encoder, save_encoder
from tests.simmim.test_detection_data import write_coco

PIXELS = {"mean": [0.5] * 3, "std": [0.3] * 3}
CLASSES = [f"name {number}" for number in range(12)]
SIZES = {"a.png": (40, 60), "b.png": (33, 32), "c.png": (64, 48)}


def make_small():
    torch.manual_seed(0)
    return make_encoder(
        "swinv2_tiny", embed_dim=8, depths=(1, 1), num_heads=(1, 2), image_size=32, window_size=4
    ).eval()


def write(task, folder, about):
    save_encoder(task.encoder, folder, about={"pixels": PIXELS, **about})
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A classifier that takes everything for its class 2, a segmenter and a detector that know nothing."""
    folder = tmp_path_factory.mktemp("exports")
    classifier = Classification(make_small(), CLASSES, **PIXELS)
    with torch.no_grad():
        classifier.head.weight.zero_()
        classifier.head.bias.zero_()[2] = 3.0
    save_classifier(write(classifier, folder / "classifier", {"classes": CLASSES}), classifier.head.state_dict())
    segmenter = Segmentation(make_small(), ["sky", "sea", "land"], channels=8, auxiliary_channels=8, **PIXELS)
    write(segmenter, folder / "segmenter", {"segmentation": segmenter.description()})
    save_head(folder / "segmenter" / HEAD, segmenter.state_dict())
    stage = DetectStage(init_from="scratch", width=8, hidden=16, test={"short_px": 32, "long_px": 64})
    detector = Detection(make_small(), ["cat", "dog"], **PIXELS, **head_of(stage))
    write(detector, folder / "detector", {"detection": describe(stage, detector.classes)})
    save_head(folder / "detector" / HEAD, detector.state_dict())
    save_encoder(make_small(), folder / "plain", about={"pixels": PIXELS})
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three pictures, and a file that is none."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, (height, width) in SIZES.items():
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
    (folder / "bad.png").write_bytes(b"nothing")
    return folder


def shown_by(capsys, *arguments) -> tuple[list[dict], str]:
    """Return the lines of JSON, and the standard output."""
    assert main(["predict", *map(str, arguments)]) == 0
    printed = capsys.readouterr().out
    out = arguments[-1]
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()], printed


@pytest.mark.parametrize("kind", ["classifier", "segmenter", "detector"])
def test_every_image_gets_a_preview_and_a_line(kind, exports, photos, tmp_path, capsys, caplog):
    lines, printed = shown_by(capsys, exports / kind, photos, "--least-score", 0, "--out", tmp_path / "out")
    assert [line["image"].rpartition("/")[2] for line in lines] == list(SIZES)
    assert "3 image(s)" in printed and "skipped a corrupt image: " in caplog.text and "bad.png" in caplog.text
    for line in lines:
        with Image.open(tmp_path / "out" / line["preview"]) as picture:
            assert min(picture.size) >= 32
    if kind == "classifier":
        assert all(next(iter(line["classes"])) == "name 2" and len(line["classes"]) == 5 for line in lines)
    if kind == "segmenter":
        for line, (height, width) in zip(lines, SIZES.values(), strict=True):
            with Image.open(tmp_path / "out" / line["label_map"]) as labels:
                assert (labels.mode, labels.size) == ("P", (width, height)) and np.asarray(labels).max() <= 2
            assert sum(line["classes"].values()) == pytest.approx(1)
    if kind == "detector":
        found = [thing for line in lines for thing in line["objects"]]
        assert found and {thing["class"] for thing in found} <= {"cat", "dog"} and "segmentation" in found[0]


def test_builtin_images_and_a_limit(exports, tmp_path, capsys):
    lines, *_ = shown_by(capsys, exports / "classifier", "builtin:shapes", "--images", 2, "--out", tmp_path / "out")
    assert [line["preview"][:6] for line in lines] == ["00000_", "00001_"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["predict", "segmenter", "PHOTOS", "zooms=[1]"],
            "zooms: unknown key (known here: short_px, stride, scales, flip, window)",
        ),
        (["predict", "detector", "PHOTOS", "scales=[1"], "'scales=[1' is not valid YAML"),
        (["predict", "classifier", "PHOTOS", "views=2"], "which have no views"),
        (["predict", "classifier", "PHOTOS", "PHOTOS"], "expected one path with images, got 2"),
        (["predict", "segmenter", "PHOTOS", "annotations=maps"], "annotations: unknown key"),
        (["predict", "classifier", "PHOTOS", "views=two"], "views: Input should be a valid integer (got 'two')"),
        (["predict", "classifier", "PHOTOS", "images=2", "out=there"], "2 problem(s) with options:"),
        (["predict", "classifier", "PHOTOS", "path=there"], "path: unknown key"),
        (["predict", "detector", "PHOTOS", "soft_nms=foo"], "soft_nms: Input should be 'linear' or 'gaussian'"),
        (["predict", "detector", "PHOTOS", "scales=0.8"], "scales: Input should be a valid list (got 0.8)"),
        (["predict", "detector", "PHOTOS", "short_px=90"], "long_px 64 must be at least short_px, 90"),
        (["predict", "plain", "PHOTOS"], "holds no classifier, segmenter or detector"),
        (["evaluate", "detector", "COCO"], "has no object of the 2 classes of the detector (cat, dog)"),
        (["evaluate", "detector", "PHOTOS", "scales=[]"], "scales: List should have at least 1 item"),
        (["evaluate", "detector", "PHOTOS", "scales=[0]"], "scales.0: Input should be greater than 0"),
        (["evaluate", "segmenter", "PHOTOS", "short_px=-3"], "short_px: Input should be greater than 0"),
        (["evaluate", "segmenter", "PHOTOS", "scales=1"], "scales: Input should be a valid list"),
        (["evaluate", "segmenter", "PHOTOS", "annotations=nowhere"], "'nowhere' is not a folder"),
        (["evaluate", "classifier", "PHOTOS", "data=there"], "data: unknown key"),
        (["evaluate", "classifier", "PHOTOS", "typo"], "there is no 'typo': expected labelled images, or options"),
        (["evaluate", "classifier", ""], "got an empty path"),
        (["probe", "classifier", "PHOTOS", "views=2"], "simmim probe takes no key=value options, got 'views=2'"),
        (["predict", "classifier", "views=2"], "no data given, only the options views=2"),
        (["evaluate", "segmenter", "PHOTOS", "--batch-size", "4"], "a segmenter processes whole images one by one"),
        (["evaluate", "detector", "PHOTOS", "zooms=[1]"], "zooms: unknown key (known here: short_px"),
    ],
)
def test_mistakes(arguments, message, exports, photos, tmp_path, capsys):
    command, kind, *rest = arguments
    if "COCO" in rest:
        write_coco(tmp_path, "val", count=2)  # of other classes
    rest = [{"PHOTOS": str(photos), "COCO": str(tmp_path)}.get(text, text) for text in rest]
    out = ["--out", str(tmp_path / "out")] if command == "predict" else []
    assert main([command, str(exports / kind), *rest, *out]) == 2
    assert message in capsys.readouterr().err


def test_the_long_side_is_compared_with_the_short_one_of_the_export(exports, photos, tmp_path):
    out = ["--out", str(tmp_path / "out")]
    assert main(["predict", str(exports / "detector"), str(photos), "long_px=100", *out]) == 0


def test_classes_that_are_called_by_numbers_are_matched_by_name(exports, tmp_path):
    for name in ("2", "3"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / name / "a.png")
    config, decoder = make_small().config, Decoder()
    assert labelled_images(str(tmp_path), config, decoder, ["0", "3", "2"], 3).label(0) == 2
    with pytest.raises(ValueError, match="has classes that are not among the 2 training classes: 3"):
        labelled_images(str(tmp_path), config, decoder, ["2", "4"], 2)


def test_numbers_of_images_are_above_zero(exports, photos, capsys):
    for command, option in (("predict", "--images"), ("evaluate", "--batch-size"), ("probe", "--batch-size")):
        with pytest.raises(SystemExit, match="2"):
            main([command, str(exports / "classifier"), str(photos), option, "0"])
        assert "expected an integer of at least 1" in capsys.readouterr().err


def test_predictions_are_not_mixed_with_others(exports, photos, tmp_path, capsys):
    task = ["predict", str(exports / "classifier"), str(photos), "--out", str(tmp_path / "out")]
    assert main(task) == 0 and main(task) == 2
    assert "holds predictions already: give another --out" in capsys.readouterr().err


def test_missing_library_is_named_in_the_error(exports, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    task = ["predict", str(exports / "detector"), str(photos), "--least-score", "0", "--out", str(tmp_path / "out")]
    assert main(task) == 2 and "pip install 'simmim[detection]'" in capsys.readouterr().err


def test_error_names_the_reason_if_no_image_could_be_read(exports, tmp_path, capsys, caplog):
    for folder in ("images", "annotations"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(b"nothing")
    assert main(["evaluate", str(exports / "segmenter"), str(tmp_path), "--num-workers", "0"]) == 2
    assert "skipped a corrupt image: " in caplog.text and "none of 1 images" in capsys.readouterr().err


def test_predicting_without_images_is_an_error(exports, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes(b"nothing")
    assert main(["predict", str(exports / "classifier"), str(tmp_path / "bad"), "--out", str(tmp_path / "out")]) == 2
    assert "none of 1 images of " in capsys.readouterr().err


def test_all_variants_of_imagenet_v2_by_the_numbers_of_their_folders(exports, tmp_path, capsys):
    """Folder 10 comes after 9, not after 1: three of the images of one variant, one of the other, are of class 2."""
    for variant, of_two in (("imagenetv2-top-images-format-val", 3), ("imagenetv2-threshold0.7-format-val", 1)):
        for label in range(12):
            folder = tmp_path / variant / str(label)
            folder.mkdir(parents=True)
            for number in range(of_two if label == 2 else 1):
                Image.new("RGB", (40, 40), (20 * label, 90, 60)).save(folder / f"{number}.png")
    task = ["evaluate", str(exports / "classifier"), "--num-workers", "0"]
    assert main([*task, str(tmp_path), "--json", str(tmp_path / "v2.json")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == [
        "imagenetv2-threshold0.7-format-val",
        "imagenetv2-top-images-format-val",
    ]
    rows = json.loads((tmp_path / "v2.json").read_text())
    assert [row["top1"] for row in rows.values()] == pytest.approx([1 / 12, 3 / 14])
    assert main([*task, *(str(tmp_path / row.rpartition("/")[2]) for row in rows)]) == 0  # or one by one
    assert capsys.readouterr().out.splitlines() == printed


def test_bar_length_is_proportional_to_probability():
    picture = np.asarray(drawing.draw_ranked(torch.zeros(3, 128, 128), [("all", 1.0), ("half", 0.5), ("none", 0.0)]))
    blue = (picture == (190, 215, 240)).all(axis=2)
    lengths = [int(blue[22 + row * 23 + 16].sum()) for row in range(3)]
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=2) and lengths[0] > 60 and lengths[2] <= 1


@pytest.mark.parametrize("kind", ["classifier", "segmenter", "detector"])
@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_the_description_of_an_export_is_parsed_once(command, kind, exports, photos, tmp_path, monkeypatch):
    """Counts how often ``encoder.json`` is opened."""
    data = tmp_path / "data"
    if command == "predict":
        data = photos
    elif kind == "classifier":
        for name in CLASSES:
            (data / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(data / name / "a.png")
    elif kind == "segmenter":
        for folder, mode in (("images", "RGB"), ("annotations", "L")):
            (data / folder).mkdir(parents=True)
            Image.new(mode, (40, 40)).save(data / folder / "a.png")
    else:
        write_coco(data, "val", count=2)
        description = json.loads((data / "annotations/val.json").read_text())
        known = description["categories"][:2]
        description["categories"] = [
            {**category, "name": name} for category, name in zip(known, ("cat", "dog"), strict=True)
        ]
        ids = {category["id"] for category in known}
        description["annotations"] = [box for box in description["annotations"] if box["category_id"] in ids]
        (data / "annotations/val.json").write_text(json.dumps(description))
    opened, open_path = [], Path.open

    def count(path, *arguments, **options):
        opened.append(path.name)
        return open_path(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", count)
    options = ["--num-workers", "0"] if command == "evaluate" else ["--out", str(tmp_path / "out")]
    assert main([command, str(exports / kind), str(data), *options]) == 0
    assert opened.count("encoder.json") == 1
