"""One page for one run or several: settings, curves, pictures through training, alarms. No network, no server."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from matplotlib.figure import Figure
from PIL import Image

from simmim.training.run_log import read_json_lines
from simmim.visualization.drawing import folded
from simmim.visualization.reconstructions import through_training

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: .5rem; }
figure { margin: .5rem 0; } figcaption { font-size: .85rem; opacity: .75; }
table { border-collapse: collapse; font-size: .9rem; } .wide { overflow-x: auto; }
td, th { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: var(--soft); padding: .75rem; overflow-x: auto; font-size: .8rem; border-radius: 4px; }
summary { cursor: pointer; } .warning { border-left: 4px solid #d80; padding-left: .6rem; }
"""
CURVES = (
    ("loss", "training loss", True),
    ("validation_loss", "held-out loss", False),
    ("validation_top1", "held-out top-1", False),
    ("validation_pixel_accuracy", "held-out share of pixels", False),
    ("grad_norm", "gradient norm", True),
    ("lr", "learning rate", True),
    ("max_attention_logit", "largest attention logit", False),
    ("images_per_s", "images per second", True),
)
MAX_POINTS, MAX_PICTURE_PX, SHOWN_EVENTS = 2000, 1400, 50


class Run(NamedTuple):
    """What a stage has left in its folder."""

    name: str
    folder: Path
    recipe: str
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    summary: dict[str, Any]


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of these folders, each of a stage or of a run with several.

    Args:
        out: default ``report.html`` in the first folder.

    Raises:
        ValueError: a folder in which nothing was trained.
    """
    runs = [run for folder in folders for run in find_runs(folder)]
    names = ", ".join(run.name for run in runs)
    parts = [f"<h1>{html.escape(names)}</h1>", overview(runs), curves(runs)]
    parts += [section(run) for run in runs]
    page = (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(names)}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<link rel='icon' href='data:,'>"
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    out = out or folders[0] / "report.html"
    out.write_text(page, encoding="utf-8")
    return out


def find_runs(folder: Path) -> list[Run]:
    """A stage, or all stages below a folder in the order of their first metrics.

    Raises:
        ValueError: there is none.
    """
    files = [folder / "metrics.jsonl"] if (folder / "metrics.jsonl").exists() else folder.glob("**/metrics.jsonl")
    found = sorted(files, key=lambda file: (file.parent / "recipe.yaml").stat().st_mtime)
    if not found:
        raise ValueError(f"{folder} holds no metrics.jsonl: give the folder of a run, for instance runs/demo")
    return [read_run(file.parent) for file in found]


def read_run(folder: Path) -> Run:
    """Read the files of a stage; those that are not there yet are empty."""

    def read_json(name: str) -> dict[str, Any]:
        file = folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    events = read_json_lines(folder / "events.jsonl") if (folder / "events.jsonl").exists() else []
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    name = f"{yaml.safe_load(recipe).get('name', folder.parent.name)}/{folder.name}"
    return Run(
        name,
        folder,
        recipe,
        read_json("environment.json"),
        read_json_lines(folder / "metrics.jsonl"),
        events,
        read_json("summary.json"),
    )


def overview(runs: Sequence[Run]) -> str:
    """One row for each run: where it stands, what came out."""
    rows = []
    for run in runs:
        last = {key: row[key] for row in run.metrics for key in row}
        speeds = sorted(row["images_per_s"] for row in run.metrics if "loss" in row and "images_per_s" in row)
        cells = [
            f"{last.get('step', 0)}",
            f"{last.get('epoch', 0):.4g}",
            _number(last.get("loss")),
            _number(last.get("validation_loss")),
            f"{last['validation_top1']:.2%}" if "validation_top1" in last else "",
            f"{speeds[len(speeds) // 2]:.0f}" if speeds else "",
            str(sum(event["event"] == "warning" for event in run.events)),
        ]
        rows.append((run.name, *cells))
    heads = ("run", "step", "epoch", "loss", "held-out loss", "held-out top-1", "images/s (median)", "warnings")
    return _table(heads, rows)


def curves(runs: Sequence[Run]) -> str:
    """All runs in the same axes, one picture for each number that any of them has."""
    drawn = []
    for key, title, is_dense in CURVES:
        lines = [[(row["step"], row[key]) for row in run.metrics if key in row] for run in runs]
        if any(lines):
            drawn.append(_image(_curve(title, lines, runs, "-" if is_dense else "o-"), title))
    return f"<h2>Curves over optimizer steps</h2><div class='grid'>{''.join(drawn)}</div>"


def _curve(title: str, lines: Sequence[Sequence[tuple[int, float]]], runs: Sequence[Run], style: str) -> bytes:
    figure = Figure(figsize=(5.5, 3), layout="constrained")
    axis = figure.subplots()
    for number, (points, run) in enumerate(zip(lines, runs, strict=True)):
        some = points[:: max(1, len(points) // MAX_POINTS)]
        if some:
            x, y = zip(*some, strict=True)
            axis.plot(x, y, style, color=f"C{number}", linewidth=1, markersize=3, label=run.name)
    axis.set(title=title)
    axis.grid(alpha=0.3)
    if len(runs) > 1:
        axis.legend(fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def section(run: Run) -> str:
    """What belongs to one run: result, pictures, events, settings, machine."""
    parts = [f"<h2>{html.escape(run.name)}</h2>"]
    if "validation_masked_l1" in run.summary:
        rows = sorted(run.summary["validation_masked_l1"].items(), key=lambda item: item[1])
        parts.append(_table(("held-out masked L1", ""), [(name, f"{value:.4f}") for name, value in rows]))
    elif run.summary:
        parts.append(_table(("held out", ""), _summary_rows(run.summary)))
    parts += pictures(run)
    if run.events:
        shown = run.events[-SHOWN_EVENTS:]
        rows = [(str(event["step"]), event["event"], event.get("text", "")) for event in shown]
        parts.append(f"<h3>Events</h3><div class='warning'>{_table(('step', 'event', ''), rows)}</div>")
    environment = json.dumps(run.environment, indent=2)
    parts.append(f"<details><summary>Recipe</summary><pre>{html.escape(run.recipe)}</pre></details>")
    parts.append(f"<details><summary>Machine</summary><pre>{html.escape(environment)}</pre></details>")
    return "".join(parts)


def _summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Numbers by name; of those with parts (classes), every part."""
    rows = []
    for name, value in summary.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        rows += [(f"{name} {part}".strip(), _number(number)) for part, number in parts]
    return rows


def pictures(run: Run) -> list[str]:
    """The last picture of a run, and one image through training."""
    found = []
    for name in ("reconstructions", "predictions"):
        files = sorted((run.folder / name).glob("step_*.png"))
        if files:
            step = int(files[-1].stem.removeprefix("step_"))
            with Image.open(files[-1]) as picture:
                found.append(_image(_small(folded(picture)), f"{name.capitalize()} of held-out images, step {step}"))
        if name == "reconstructions" and len(files) > 1:
            found.append(_image(_small(through_training(run.folder)), "One held-out image through training"))
    return found


def _small(picture: Image.Image) -> bytes:
    picture = picture.convert("RGB")
    picture.thumbnail((MAX_PICTURE_PX, 4 * MAX_PICTURE_PX))
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()


def _image(content: bytes, caption: str) -> str:
    text = html.escape(caption)
    data = base64.b64encode(content).decode()
    return f"<figure><img alt='{text}' src='data:image/png;base64,{data}'><figcaption>{text}</figcaption></figure>"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join(
        "<tr>" + "".join(f"<td{_kind(cell)}>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"


def _kind(cell: str) -> str:
    return " class='number'" if cell[:1].isdigit() else ""
