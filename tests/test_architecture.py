"""Rules of the code base: layers, short files, no pickle, packaging."""

from __future__ import annotations

import ast
import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"swin", "simmim", "simmim.rng", "simmim.signals"},
    {"simmim.masking"},
    {"simmim.config"},
    {"simmim.data"},
    {"simmim.metrics", "simmim.export", "simmim.visualization.drawing"},
    {"simmim.tasks"},
    {"simmim.training"},
    {"simmim.visualization"},
    {"simmim.evaluation"},
    {"simmim.stages"},
    {"simmim.planning"},
    {"simmim.experiments", "simmim.benchmarks"},
    {"simmim.cli"},
    {"tools", "simmim.__main__"},
]
SWIN_MAY_USE = {"torch", "einops", "safetensors", "triton", "swin"}
FILES = [file for package in ("swin", "simmim", "tools") for file in sorted((ROOT / package).rglob("*.py"))]


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part_of(module: str) -> str:
    """Return the entry of ``LAYERS`` that a module belongs to: the longest listed prefix."""
    listed = {part for layer in LAYERS for part in layer}
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in listed:
            return ".".join(parts[:length])
    raise AssertionError(f"{module} is in no layer: add it to LAYERS")


def layer_of(part: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if part in layer)


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write absolute imports"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_lower_layers_never_import_higher_ones(file):
    here = part_of(module_of(file))
    for imported in imports_of(file):
        if imported.split(".")[0] not in ("swin", "simmim"):
            continue
        there = part_of(imported)
        if there in (here, "simmim"):
            continue
        assert layer_of(there) < layer_of(here), f"{here} imports {there}"


@pytest.mark.parametrize("file", [f for f in FILES if module_of(f).startswith("swin")], ids=module_of)
def test_the_encoder_needs_little(file):
    standard = {
        "__future__",
        "argparse",
        "collections",
        "contextlib",
        "dataclasses",
        "functools",
        "importlib",
        "json",
        "math",
        "pathlib",
        "re",
        "typing",
    }
    assert {name.split(".")[0] for name in imports_of(file)} <= SWIN_MAY_USE | standard


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_files_and_functions_stay_short(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name not in ("fit", "train"):
            assert node.end_lineno - node.lineno <= 70, node.name


def test_no_module_is_named_for_leftovers():
    assert not [file for file in FILES if file.stem in ("utils", "common", "base", "helpers", "misc")]


def test_nothing_is_unpickled():
    for file in FILES:
        text = file.read_text()
        assert "pickle" not in {name.split(".")[0] for name in imports_of(file)}, file
        assert "yaml.unsafe_load" not in text, file
        for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Attribute) and ast.unparse(call.func) == "torch.load":
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert keywords.get("weights_only") == "True", file


def test_versions_agree():
    import swin
    from simmim import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__ == swin.__version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_is_pinned_in_the_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    wanted = [name for name in wanted if not name.startswith("simmim[")]
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert {re.split(r"[<>=]", name)[0].lower() for name in wanted} <= pinned
    assert "://" not in (ROOT / "constraints.txt").read_text()


def test_all_and_dev_hold_the_other_extras():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    everything, first_of_dev = (set(re.split(r"[\[\],]", extras[name][0])[1:-1]) for name in ("all", "dev"))
    assert everything == set(extras) - {"all", "dev"}
    assert first_of_dev == everything - {"s3", "gcs"}


def test_every_package_is_shipped():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {module_of(file).removesuffix(".__init__") for file in FILES if file.name == "__init__.py"}
    assert set(setuptools["packages"]) == found | {"simmim.recipes"}
    assert setuptools["package-dir"] == {"simmim.recipes": "recipes"}
    assert all(setuptools["package-data"][package] == ["py.typed"] for package in ("simmim", "swin"))
    assert (ROOT / "simmim/py.typed").exists()


def test_the_citation_and_the_workflow_fit_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"] and citation["license"] == project["license"]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert [step["run"] for step in workflow["jobs"]["check"]["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci/run", os.X_OK)
