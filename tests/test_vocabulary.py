"""Names and docstrings use the field's words; no docstring opens with a question word."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from simmim.cli import main as command_line

ROOT = Path(__file__).parents[1]
FILES = [file for package in ("swin", "simmim", "tools") for file in sorted((ROOT / package).rglob("*.py"))]
STANDARD = {
    "judge": "evaluate",
    "judged": "evaluated",
    "judges": "evaluators",
    "judging": "evaluation",
    "room": "module",
    "rooms": "modules",
    "floor": "layer",
    "floors": "layers",
    "house": "architecture",
    "look": "view",
    "looks": "views",
    "looked": "viewed",
    "place": "path, device or index",
    "places": "paths, devices or indices",
    "number": "index",
    "cell": "mask patch",
    "cells": "mask patches",
    "objective": "task",
    "objectives": "tasks",
    "picture": "image",
    "pictures": "images",
    "planned": "fake",
    "holdout": "validation",
    "held": "validation",
    "broken": "corrupt",
    "share": "fraction",
    "shares": "fractions",
    "shots": "labels per class",
    "moments": "optimizer state",
    "saver": "memory option",
    "savers": "memory options",
    "rival": "baseline",
    "rivals": "baselines",
    "arm": "variant",
    "arms": "variants",
    "passing": "mutable on resume",
    "decisive": "resume fingerprint",
    "takeover": "load_classifier_head",
    "blackbox": "non-finite dump",
    "zoom": "scale",
    "zooms": "scales",
}
PHRASES = {
    "take_over": "load_classifier_head",
    "black_box": "non-finite dump",
    "gather_cells": "merge_2x2",
    "at_once": "reference_attention",
    "StepKeys": "ResumableBatchSampler",
    "ClosedNorm": "ZeroInitNorm",
    "average_of": "make_ema",
}
OF_LIBRARIES = {"floor", "share_memory_", "get_flat_number", "cell_anchors"}
"""Names that PyTorch, einops and other libraries give; ours are not among them."""


def words(name: str) -> list[str]:
    """Split an identifier into its lower-case words."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def names_defined(tree: ast.AST) -> set[str]:
    """Return all names that a module gives: functions, classes, arguments, variables and attributes."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
    return found


def nonstandard(names: set[str]) -> dict[str, str]:
    """Return those names that hold a word of the left column, with what to say instead."""
    found = {}
    for name in names - OF_LIBRARIES:
        wrong = [STANDARD[word] for word in words(name) if word in STANDARD]
        wrong += [standard for phrase, standard in PHRASES.items() if phrase in name]
        if wrong:
            found[name] = wrong[0]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_names_are_those_of_the_field(file):
    assert not nonstandard(names_defined(ast.parse(file.read_text())) | {file.stem})


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings_say_what_a_thing_is_or_does(file):
    tree = ast.parse(file.read_text())
    opened = []
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():  # attribute docstrings as well
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                opened.append(str(statement.value.value).strip())
    assert not [text[:60] for text in opened if re.match(r"(Of|What|How|Where|Whether|Which|Who|Whose)\b", text)]


def keys(values: object) -> set[str]:
    """Return all keys of nested mappings."""
    if isinstance(values, dict):
        return {str(key) for key in values} | {key for value in values.values() for key in keys(value)}
    return {key for value in values for key in keys(value)} if isinstance(values, list) else set()


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_recipe_keys_are_those_of_the_field(recipe):
    assert not nonstandard(keys(yaml.safe_load(recipe.read_text())))


def test_options_of_the_command_line_are_those_of_the_field():
    options: set[str] = set()
    waiting = [command_line._parser()]
    while waiting:
        parser = waiting.pop()
        for action in parser._actions:
            options |= {option.strip("-").replace("-", "_") for option in action.option_strings} | {action.dest}
            if isinstance(action.choices, dict):
                options |= {name.replace("-", "_") for name in action.choices}
                waiting.extend(action.choices.values())
    assert len(options) > 60 and not nonstandard(options)
