"""Reads recipes: files, overrides, and error messages for invalid values."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from simmim.config import KINDS, Recipe, Settings

MAX_BYTES = 1_000_000


def load_recipe(path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply ``key.path=value`` overrides; values are YAML.

    Args:
        path: a file, or the name of a shipped recipe.

    Raises:
        ValueError: no such file, not a recipe, or invalid values; one line for each problem.
    """
    file = find_recipe(path)
    values = _read_yaml(file)
    return _build({**values, "name": values.get("name") or file.stem}, overrides or [], path)


def override(recipe: Recipe, overrides: list[str]) -> Recipe:
    """Return a copy of a recipe with ``key.path=value`` overrides.

    Raises:
        ValueError: invalid values.
    """
    return _build(recipe.model_dump(mode="json"), overrides, recipe.name)


def _build(values: dict[str, Any], overrides: list[str], where: str) -> Recipe:
    origin = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r}: expected key.path=value")
        _set(values, key, _parse_yaml(text, f"override {override!r}"), override)
        origin[key] = override
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_explain(detail, origin, Path(where).name) for detail in error.errors()]
        raise ValueError(f"{len(lines)} problem(s) in {where}:\n" + "\n".join(lines)) from None


def read_options(model: type[Settings], options: Mapping[str, Any]) -> dict[str, Any]:
    """Validate options of a command against a settings model; return those that are given.

    Raises:
        ValueError: unknown options or invalid values; one line for each problem.
    """
    try:
        given: dict[str, Any] = model.model_validate(dict(options)).model_dump(exclude_unset=True)
        return given
    except ValidationError as error:
        lines = [_explain(detail, {}, "key=value", model) for detail in error.errors()]
        raise ValueError("\n".join([f"{len(lines)} problem(s) with options:", *lines])) from None


def shipped_recipes() -> list[Path]:
    """List the YAML files shipped with the package."""
    return sorted(_recipes_folder().glob("*.yaml"))


def find_recipe(path: str) -> Path:
    """Find a recipe file, or a shipped recipe by name, with or without folder and extension.

    Raises:
        ValueError: neither exists.
    """
    file = Path(path)
    if file.is_file():
        return file
    shipped = {recipe.stem: recipe for recipe in shipped_recipes()}
    if file.stem in shipped and file.parent in (Path("."), Path("recipes")):
        return shipped[file.stem]
    close = difflib.get_close_matches(file.stem, shipped, n=1)
    hint = f"did you mean {close[0]}?" if close else f"shipped recipes: {', '.join(shipped)}"
    raise ValueError(f"no recipe {path!r}: {hint}")


def dump_recipe(recipe: Recipe) -> str:
    """Return a recipe as YAML with every value written out; :func:`load_recipe` reads it again."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _recipes_folder() -> Path:
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        merge = "tag:yaml.org,2002:merge"  # `<<: *name`, whose keys may be given again
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(sorted(twice))} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _read_yaml(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} is larger than {MAX_BYTES:,} bytes: not a recipe")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not a text file") from None
    values = _parse_yaml(text, str(file))
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a recipe: expected keys such as {', '.join(Recipe.model_fields)}")
    return values


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def _set(values: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"override {override!r}: {parent} is a value and has no keys")
        # Stages repeated with YAML anchors share objects: copy before changing.
        values[parent] = dict(child)
        values = values[parent]
    values[last] = value


def _explain(detail: ErrorDetails, origin: dict[str, str], file: str, model: type[Settings] = Recipe) -> str:
    location = ".".join(str(part) for part in _without_kind(detail["loc"]))
    where = f"   [{origin.get(location, file)}]"
    if detail["type"] == "extra_forbidden":
        known = _known_keys(detail["loc"][:-1], model)
        close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        return f"  {location}: unknown key{hint} (known here: {', '.join(known)}){where}"
    message = detail["msg"].removeprefix("Value error, ")
    given = "" if detail["type"] == "value_error" else f" (got {detail['input']!r})"
    return f"  {location}: {message}{given}{where}".replace("  : ", "  ", 1)


def _without_kind(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Remove the stage type, which pydantic inserts between the name of a stage and its keys."""
    return location[:2] + location[3:] if location[:1] == ("stages",) and len(location) > 2 else location


def _known_keys(location: tuple[int | str, ...], model: Any) -> list[str]:
    if location[:1] == ("stages",) and len(location) > 2:
        model, location = KINDS[str(location[2])], location[3:]
    for part in location:
        annotation = model.model_fields[part].annotation
        model = next((kind for kind in get_args(annotation) if hasattr(kind, "model_fields")), annotation)
    return list(model.model_fields)
