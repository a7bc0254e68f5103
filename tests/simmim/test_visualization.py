"""Visualization: panels copy pixels exactly, masked panels reveal nothing, and reports are self-contained."""

from __future__ import annotations

import html.parser
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import swin
from simmim import stages
from simmim.cli.main import main
from simmim.config.reference import document
from simmim.data import Shapes
from simmim.masking import MaskGenerator
from simmim.tasks.simmim import SimMIM, local_statistics
from simmim.visualization import drawing, reconstructions
from simmim.visualization.report import write_report
from tests.simmim.test_training import TINY, tiny_recipe

ROOT = Path(__file__).parents[2]


def make_task(channels: int = 3, window: int | None = None) -> SimMIM:
    torch.manual_seed(0)
    encoder = swin.make_encoder(
        "swinv2_tiny", embed_dim=8, depths=(2, 2), num_heads=(1, 2), image_size=32, window_size=4, in_chans=channels
    )
    mask_generator = MaskGenerator((32, 32), 8, 0.6)
    mean, std = [0.2 + 0.05 * k for k in range(channels)], [0.3 + 0.02 * k for k in range(channels)]
    return SimMIM(encoder, mask_generator, mean=mean, std=std, norm_target_window=window).eval()


def synthetic(task: SimMIM, images: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return pixels in [0, 1], the same normalized, and patch masks."""
    torch.manual_seed(1)
    pixels = torch.randint(0, 256, (images, len(task.mean), 32, 32)) / 255
    return pixels, (pixels - task.mean) / task.std, reconstructions.make_masks(task, images)


def test_panels_equal_their_definition():
    task = make_task()
    pixels, images, patch_mask = synthetic(task)
    shown = dict(task.panels(images, patch_mask))
    assert list(shown) == ["original", "masked", "prediction", "prediction, pasted", "error"]
    mask = patch_mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand(-1, 3, -1, -1)
    torch.testing.assert_close(shown["original"], pixels)
    assert (shown["masked"][mask] == 0.5).all() and torch.equal(shown["masked"][~mask], shown["original"][~mask])
    predicted = task.reconstruct(images, patch_mask).prediction
    torch.testing.assert_close(shown["prediction"], predicted * task.std + task.mean)
    assert torch.equal(shown["prediction, pasted"][~mask], shown["original"][~mask])
    assert torch.equal(shown["prediction, pasted"][mask], shown["prediction"][mask])
    assert (shown["error"][~mask] == 0.5).all()
    error = (predicted - images).abs().mean(dim=1)
    expected = (error * 3).clamp(0, 1)  # red is the first third
    torch.testing.assert_close(shown["error"][:, 0][mask[:, 0]], expected[mask[:, 0]])


def test_panels_do_not_depend_on_masked_pixels():
    task = make_task()
    _, images, patch_mask = synthetic(task)
    mask = patch_mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    other = torch.where(mask, torch.randn_like(images), images)
    one, two = (dict(task.panels(x, patch_mask)) for x in (images, other))
    for name in ("masked", "prediction", "prediction, pasted"):
        assert torch.equal(one[name], two[name]), name
    assert not torch.equal(one["error"], two["error"])


def test_only_one_panel_of_a_normalized_target_uses_true_statistics():
    task = make_task(window=5)
    _, images, patch_mask = synthetic(task)
    shown = dict(task.panels(images, patch_mask))
    assert list(shown)[2:5] == ["normalized target", "its prediction, pasted", "with TRUE local mean, s.d."]
    mask = patch_mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    other = dict(task.panels(torch.where(mask, torch.randn_like(images), images), patch_mask))
    inside = mask & torch.ones_like(images, dtype=torch.bool)
    assert torch.equal(shown["masked"], other["masked"])
    assert torch.equal(shown["its prediction, pasted"][inside], other["its prediction, pasted"][inside])
    assert not torch.equal(shown["with TRUE local mean, s.d."][inside], other["with TRUE local mean, s.d."][inside])
    # Restoring a perfect prediction gives the true pixels.
    target = task.reconstruct(images, patch_mask).target
    mean, deviation, center = local_statistics(images, 5)
    torch.testing.assert_close(target * deviation + mean + center, images, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bands", [None, [4, 2, 0], "pca"])
def test_any_number_of_channels(bands):
    task = make_task(channels=6)
    pixels, images, patch_mask = synthetic(task)
    shown = dict(task.panels(images, patch_mask, bands))
    if bands != "pca":
        torch.testing.assert_close(shown["original"], pixels[:, bands or [0, 1, 2]])
    mask = patch_mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand(-1, 3, -1, -1)
    assert (shown["masked"][mask] == 0.5).all()
    assert all(panel.shape == (2, 3, 32, 32) and panel.min() >= 0 for panel in (shown["original"], shown["error"]))
    with pytest.raises(ValueError, match=r"bands \[1, 2, 9\]: expected three of the channels 0 to 5, or pca"):
        drawing.to_rgb(pixels, [1, 2, 9])


def test_principal_colors_follow_the_variance():
    torch.manual_seed(0)
    strong, weak = torch.randn(1, 1, 64, 64), torch.randn(1, 1, 64, 64)
    pixels = torch.cat([0.5 + 0.1 * strong, 0.5 + 0.1 * strong, 0.5 + 0.01 * weak, 0.5 * torch.ones_like(weak)], dim=1)
    colors = drawing.principal_colors(pixels)(pixels)
    for channel, source in ((0, strong), (1, weak)):
        correlation = torch.corrcoef(torch.stack([colors[0, channel].flatten(), source.flatten()]))[0, 1]
        assert correlation > 0.95


def test_panels_and_grids_contain_every_pixel():
    image = torch.rand(3, 128, 128)
    figure = drawing.draw_panels([("a", image[None]), ("b", 1 - image[None])], across=1)
    array = np.asarray(figure)
    expected, inverse = ((x.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy() for x in (image, 1 - image))
    assert (array[22:150, 6:134] == expected).all() and (array[22:150, 140:268] == inverse).all()
    assert figure.info["rows"] == "1"
    grid = drawing.draw_grid([[image, image], [image, 1 - image]], ["8 px", "16 px"], ["60 %", "pasted"])
    right = grid.width - figure.width
    assert (np.asarray(grid)[22 + 134 : 284, right + 140 : right + 268] == inverse).all()


def test_fold_rows_keeps_every_row():
    images = torch.rand(3, 3, 128, 128)
    figure = drawing.draw_panels([("a", images)], across=1)
    array, folded = np.asarray(figure), np.asarray(drawing.fold_rows(figure))
    assert folded.shape[1] == 2 * array.shape[1]
    rows = [array[22 + 134 * k : 22 + 134 * k + 128] for k in range(3)]
    positions = [(22, 0), (22 + 134, 0), (22, array.shape[1])]
    for row, (top, left) in zip(rows, positions, strict=True):
        assert (folded[top : top + 128, left : left + array.shape[1]] == row).all()


def test_objects_are_drawn_in_class_colors_with_the_best_on_top():
    image, masks = torch.full((3, 100, 120), 0.5), torch.zeros(2, 100, 120, dtype=torch.bool)
    masks[0, 40:80, 20:70], masks[1, 40:80, 50:110] = True, True
    boxes, labels = torch.tensor([[20.0, 40, 70, 80], [50.0, 40, 110, 80]]), torch.tensor([1, 2])
    drawn = drawing.draw_objects(image, boxes, labels, ["", ""], masks)
    best, other = drawing.class_colors(3)[1:]
    for (x, y), color in (((30, 60), best), ((60, 60), best), ((100, 60), other)):
        torch.testing.assert_close(drawn[:, y, x], 0.55 * image[:, y, x] + 0.45 * color, rtol=0, atol=0.01)
    for (x, y), color in (((20, 60), best), ((50, 60), other), ((110, 60), other)):
        torch.testing.assert_close(drawn[:, y, x], color, rtol=0, atol=0.01)
    torch.testing.assert_close(drawn[:, 10, 10], image[:, 10, 10], rtol=0, atol=0.01)
    nothing = drawing.draw_objects(image, boxes[:0], labels[:0], [], masks[:0])
    torch.testing.assert_close(nothing, image, rtol=0, atol=0.01)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    stages.run_stage(tiny_recipe(), "pretrain", out)
    return out / "tiny"


def test_reconstructions_of_an_export_equal_those_of_its_run(run):
    """The export contains the head, so it gives the same reconstructions as the run."""
    export = run / "pretrain/export"
    task = reconstructions.load_simmim(export)
    source = Shapes(4, (32, 32), validation=True)
    pixels = torch.stack([source.read(index) for index in range(4)]) / 255
    figure = reconstructions.reconstruct(task, (pixels - task.mean) / task.std)
    drawn = Image.open(run / "pretrain/reconstructions/step_00000010.png")
    assert drawn.info["rows"] == "4"
    difference = np.abs(np.asarray(figure).astype(int) - np.asarray(drawn).astype(int))
    assert difference.max() <= 1


def test_one_image_through_training(run):
    strip = reconstructions.through_training(run / "pretrain", image=2)
    drawn = np.asarray(Image.open(run / "pretrain/reconstructions/step_00000010.png"))
    row = drawn[22 + 2 * 134 : 22 + 2 * 134 + 128]
    array = np.asarray(strip)
    assert (array[22 + 2 * 134 : 22 + 2 * 134 + 128, -drawn.shape[1] :] == row).all()  # the third of three previews
    with pytest.raises(ValueError, match=r"image 4: the previews in .* show images 0 to 3"):
        reconstructions.through_training(run / "pretrain", image=4)
    with pytest.raises(ValueError, match="has no previews yet"):
        reconstructions.through_training(run)


def test_the_reconstruct_command(run, tmp_path, capsys):
    export = str(run / "pretrain/export")
    out = tmp_path / "figure.png"
    assert main(["reconstruct", export, "builtin:shapes", "--images", "2", "--out", str(out)]) == 0
    assert Image.open(out).size == (5 * 134 + 12, 2 * 134 + 28)
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)).save(photos / "a.png")
    gallery = [
        "--mask-patch-sizes",
        "4",
        "8",
        "--ratios",
        "0.3",
        "0.5",
        "0.7",
        "--bands",
        "2",
        "1",
        "0",
        "--out",
        str(out),
    ]
    assert main(["reconstruct", export, str(photos), *gallery]) == 0
    assert Image.open(out).height == 2 * 134 + 28
    for wrong, message in (
        (["--mask-patch-sizes", "4"], "got only one of --mask-patch-sizes and --ratios"),
        (["--mask-patch-size", "5"], "mask_patch_size 5 does not divide"),
        (["--bands", "0", "1", "7"], "expected three of the channels 0 to 2, or pca"),
    ):
        assert main(["reconstruct", export, str(photos), *wrong, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    shutil.copytree(export, tmp_path / "without")
    (tmp_path / "without/decoder.safetensors").unlink()
    assert main(["reconstruct", str(tmp_path / "without"), str(photos)]) == 2
    assert "holds no reconstruction: give the export of a pretraining stage" in capsys.readouterr().err


class Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "action", "srcset")]


def test_report_is_self_contained_and_escaped(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run / "pretrain", other)
    (other / "events.jsonl").write_text(json.dumps({"step": 3, "event": "warning", "text": "<b>odd</b>"}) + "\n")
    (other / "summary.json").write_text(json.dumps({"validation_iou": {"<u>cat</u>": 0.5}}))
    (other / "environment.json").write_text(json.dumps({"machine": "<s>host</s>"}))
    recipe = (other / "recipe.yaml").read_text()
    assert "name: tiny\n" in recipe
    (other / "recipe.yaml").write_text(recipe.replace("name: tiny\n", "name: <i>tiny</i>\n"))
    assert main(["report", str(run), str(other), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    links = Links()
    links.feed(page)
    assert len(links.found) > 8 and all(link.startswith("data:") for link in links.found)
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert "copy the nearest visible pixel" in page
    for tag, text in (("b", "odd"), ("u", "cat"), ("s", "host"), ("i", "tiny")):
        assert f"<{tag}>" not in page and f"&lt;{tag}&gt;{text}&lt;/{tag}&gt;" in page
    assert page.count("through training") >= 2 and "mask:" in page
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err


def test_a_run_writes_its_report(tmp_path, capsys):
    assert main(["run", "demo", "name=tiny", *TINY, "--out", str(tmp_path), "--stage", "pretrain"]) == 0
    recipe = tmp_path / "one.yaml"
    shutil.copy(tmp_path / "tiny/pretrain/recipe.yaml", recipe)
    text = recipe.read_text()
    recipe.write_text(text[: text.index("  finetune_32:")])
    assert main(["run", str(recipe), "--out", str(tmp_path)]) == 0
    assert f"report  {tmp_path}/tiny/report.html" in capsys.readouterr().out
    assert (tmp_path / "tiny/report.html").stat().st_size > 50_000


@pytest.mark.parametrize("width", [1280, 390])
def test_report_in_a_browser(width, run, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no browser is installed")
    page = write_report([run], tmp_path / "page.html")
    # The script reports that every image is decoded and inside the window, and that there is no horizontal scrolling.
    script = (
        "<script>onload = () => { const images = [...document.images]; document.title = JSON.stringify({"
        "images: images.length, shown: images.filter(p => p.naturalWidth > 0 && p.clientWidth > 100).length,"
        "right: Math.max(...images.map(p => p.getBoundingClientRect().right)),"
        "wide: document.documentElement.scrollWidth, window: innerWidth}) }</script>"
    )
    page.write_text(page.read_text() + script)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},2000", "--dump-dom"]
    command += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seen = json.loads(result.stdout.split("<title>")[1].split("</title>")[0])
    assert seen["images"] >= 7 and seen["shown"] == seen["images"]
    assert seen["right"] <= seen["window"] and seen["wide"] <= seen["window"]
    assert "CONSOLE" not in result.stderr


def test_recipe_keys_are_documented():
    assert (ROOT / "recipes/README.md").read_text() == document(), "run python tools/document_recipes.py"
    for line in document().splitlines():
        if line.startswith("| `"):
            assert line.rsplit("|", 2)[1].strip(), f"no description: {line}"


def test_bands_apply_to_a_normalized_target():
    model = make_task(channels=5, window=9)
    images, mask = torch.randn(1, 5, 32, 32), torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, :2] = True
    panels = {}
    for bands in (None, (4, 3, 2), "pca"):
        panels[str(bands)] = dict(model.panels(images, mask, bands))["normalized target"]
    one, other, principal = panels.values()
    assert not torch.equal(one, other) and not torch.equal(other, principal)
