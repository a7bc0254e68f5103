"""One HTML page for one or more runs: settings, curves, previews, events. It needs no network and no server."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment
from matplotlib.figure import Figure
from PIL import Image

from simmim.training.run_log import read_json_lines
from simmim.visualization.drawing import fold_rows
from simmim.visualization.reconstructions import through_training

# Autoescape is on, so names and texts that come from files cannot add markup to the page.
TEMPLATE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
{% macro show_table(table) %}
<div class="wide"><table>
<tr>{% for head in table.heads %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in table.rows %}
<tr>{% for text in row %}<td{% if text[:1].isdigit() %} class="number"{% endif %}>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endmacro %}
{% macro show_figure(figure) %}
<figure><img alt="{{ figure.caption }}" src="data:image/png;base64,{{ figure.png }}">
<figcaption>{{ figure.caption }}</figcaption></figure>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<style>
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
</style>
</head>
<body>
<h1>{{ title }}</h1>
{{ show_table(overview) }}
<h2>Curves over optimizer steps</h2>
<div class="grid">{% for figure in curves %}{{ show_figure(figure) }}{% endfor %}</div>
{% for section in sections %}
<h2>{{ section.name }}</h2>
{% if section.results %}{{ show_table(section.results) }}{% endif %}
{% for figure in section.previews %}{{ show_figure(figure) }}{% endfor %}
{% if section.events %}
<h3>Events</h3>
<div class="warning">{{ show_table(section.events) }}</div>
{% endif %}
<details><summary>Recipe</summary><pre>{{ section.recipe }}</pre></details>
<details><summary>Machine</summary><pre>{{ section.environment }}</pre></details>
{% endfor %}
</body>
</html>
""")
CURVES = (
    ("loss", "training loss", True),
    ("validation_loss", "validation loss", False),
    ("validation_top1", "validation top-1", False),
    ("validation_pixel_accuracy", "validation pixel accuracy", False),
    ("grad_norm", "gradient norm", True),
    ("lr", "learning rate", True),
    ("max_attention_logit", "largest attention logit", False),
    ("images_per_s", "images per second", True),
)
MAX_POINTS, MAX_PREVIEW_PX, MAX_EVENTS = 2000, 1400, 50


class Run(NamedTuple):
    """The contents of a stage folder."""

    name: str
    folder: Path
    recipe: str
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    summary: dict[str, Any]


class Table(NamedTuple):
    """A table of texts; those that begin with a digit are aligned to the right."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


class EmbeddedImage(NamedTuple):
    """A PNG image, encoded as base64, and its caption."""

    png: str
    caption: str


class Section(NamedTuple):
    """The part of the page about one run."""

    name: str
    results: Table | None
    previews: list[EmbeddedImage]
    events: Table | None
    recipe: str
    environment: str


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of the given folders, each of a stage or of a run with several stages.

    Args:
        out: file to write; default ``report.html`` in the first folder.

    Raises:
        ValueError: a folder contains no trained stage.
    """
    runs = [run for folder in folders for run in find_runs(folder)]
    page = TEMPLATE.render(
        title=", ".join(run.name for run in runs),
        overview=overview(runs),
        curves=draw_curves(runs),
        sections=[make_section(run) for run in runs],
    )
    out = out or folders[0] / "report.html"
    out.write_text(page + "\n", encoding="utf-8")
    return out


def find_runs(folder: Path) -> list[Run]:
    """Read a stage folder, or all stage folders below a folder in the order in which they were started.

    Raises:
        ValueError: there is none.
    """
    files = [folder / "metrics.jsonl"] if (folder / "metrics.jsonl").exists() else folder.glob("**/metrics.jsonl")
    found = sorted(files, key=lambda file: (file.parent / "recipe.yaml").stat().st_mtime)
    if not found:
        raise ValueError(f"{folder} has no metrics.jsonl: give the folder of a run, for instance runs/demo")
    return [read_run(file.parent) for file in found]


def read_run(folder: Path) -> Run:
    """Read the files of a stage folder; files that do not exist yet count as empty."""

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


def overview(runs: Sequence[Run]) -> Table:
    """Summarize the progress and the last numbers of every run in one row."""
    rows = []
    for run in runs:
        last = {key: row[key] for row in run.metrics for key in row}
        speeds = sorted(row["images_per_s"] for row in run.metrics if "loss" in row and "images_per_s" in row)
        texts = [
            f"{last.get('step', 0)}",
            f"{last.get('epoch', 0):.4g}",
            _format(last.get("loss")),
            _format(last.get("validation_loss")),
            f"{last['validation_top1']:.2%}" if "validation_top1" in last else "",
            f"{speeds[len(speeds) // 2]:.0f}" if speeds else "",
            str(sum(event["event"] == "warning" for event in run.events)),
        ]
        rows.append((run.name, *texts))
    heads = ("run", "step", "epoch", "loss", "validation loss", "validation top-1", "images/s (median)", "warnings")
    return Table(heads, rows)


def draw_curves(runs: Sequence[Run]) -> list[EmbeddedImage]:
    """Plot every metric that any run has, with all runs in the same axes."""
    curves = []
    for key, title, is_dense in CURVES:
        lines = [[(row["step"], row[key]) for row in run.metrics if key in row] for run in runs]
        if any(lines):
            curves.append(_embed(_curve(title, lines, runs, "-" if is_dense else "o-"), title))
    return curves


def _curve(title: str, lines: Sequence[Sequence[tuple[int, float]]], runs: Sequence[Run], style: str) -> bytes:
    figure = Figure(figsize=(5.5, 3), layout="constrained")
    axis = figure.subplots()
    for index, (points, run) in enumerate(zip(lines, runs, strict=True)):
        some = points[:: max(1, len(points) // MAX_POINTS)]
        if some:
            x, y = zip(*some, strict=True)
            axis.plot(x, y, style, color=f"C{index}", linewidth=1, markersize=3, label=run.name)
    axis.set(title=title)
    axis.grid(alpha=0.3)
    if len(runs) > 1:
        axis.legend(fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def make_section(run: Run) -> Section:
    """Collect the results, previews, events, settings and machine of one run."""
    results = events = None
    if "validation_masked_l1" in run.summary:
        rows = sorted(run.summary["validation_masked_l1"].items(), key=lambda item: item[1])
        results = Table(("validation masked L1", ""), [(name, f"{value:.4f}") for name, value in rows])
    elif run.summary:
        results = Table(("validation", ""), _summary_rows(run.summary))
    if run.events:
        recent = run.events[-MAX_EVENTS:]
        events = Table(
            ("step", "event", ""), [(str(event["step"]), event["event"], event.get("text", "")) for event in recent]
        )
    return Section(run.name, results, load_previews(run), events, run.recipe, json.dumps(run.environment, indent=2))


def _summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """List the numbers of a summary by name; a number per class becomes one row per class."""
    rows = []
    for name, value in summary.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        rows += [(f"{name} {part}".strip(), _format(score)) for part, score in parts]
    return rows


def load_previews(run: Run) -> list[EmbeddedImage]:
    """Load the last preview of a run, and one validation image through training."""
    found = []
    for name in ("reconstructions", "predictions"):
        files = sorted((run.folder / name).glob("step_*.png"))
        if files:
            step = int(files[-1].stem.removeprefix("step_"))
            with Image.open(files[-1]) as preview:
                caption = f"{name.capitalize()} of validation images, step {step}"
                found.append(_embed(_shrink(fold_rows(preview)), caption))
        if name == "reconstructions" and len(files) > 1:
            found.append(_embed(_shrink(through_training(run.folder)), "One validation image through training"))
    return found


def _shrink(image: Image.Image) -> bytes:
    image = image.convert("RGB")
    image.thumbnail((MAX_PREVIEW_PX, 4 * MAX_PREVIEW_PX))
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return content.getvalue()


def _embed(content: bytes, caption: str) -> EmbeddedImage:
    return EmbeddedImage(base64.b64encode(content).decode(), caption)


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""
