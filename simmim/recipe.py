"""Reading recipes: files, overrides, and what is said of mistakes. What they may hold is in ``schema/``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from simmim.schema import KINDS, Data, Encoder, Recipe, Settings

MAX_BYTES = 1_000_000


def load_recipe(path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply ``key.path=value`` overrides; values are YAML.

    Args:
        path: a file, or the name of a shipped recipe.

    Raises:
        ValueError: no such file, not a recipe, or values that are refused; every problem on a line.
    """
    file = find_recipe(path)
    values = _read_yaml(file)
    return _build({**values, "name": values.get("name") or file.stem}, overrides or [], path)


def override(recipe: Recipe, overrides: list[str]) -> Recipe:
    """The same recipe with other values, as :func:`load_recipe` does it.

    Raises:
        ValueError: values that are refused.
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
    """The options that are given, checked as those of a recipe are.

    Raises:
        ValueError: options that are not of the model, or values that are refused; every problem on a line.
    """
    try:
        given: dict[str, Any] = model.model_validate(dict(options)).model_dump(exclude_unset=True)
        return given
    except ValidationError as error:
        lines = [_explain(detail, {}, "key=value", model) for detail in error.errors()]
        raise ValueError("\n".join([f"{len(lines)} problem(s) with options:", *lines])) from None


def shipped_recipes() -> list[Path]:
    """The YAML files that come with the package."""
    return sorted(_recipes_folder().glob("*.yaml"))


def find_recipe(path: str) -> Path:
    """A file of the user, else a shipped recipe of that name with or without folder and ending.

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
    """The recipe with every value written out, as YAML that :func:`load_recipe` reads again."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _recipes_folder() -> Path:
    installed = Path(__file__).parent / "recipes"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "recipes"


class _Loader(yaml.SafeLoader):
    """Refuses what plain YAML passes over in silence: a key that is given twice."""

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
        raise ValueError(f"{file} is larger than {MAX_BYTES:,} bytes: this is no recipe")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not a text file") from None
    values = _parse_yaml(text, str(file))
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no recipe: expected keys such as {', '.join(Recipe.model_fields)}")
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
            raise ValueError(f"override {override!r}: {parent} holds a value, not further keys")
        # Stages that repeat another share its parts: this one gets its own.
        values[parent] = dict(child)
        values = values[parent]
    values[last] = value


def _explain(detail: ErrorDetails, origin: dict[str, str], file: str, model: type[Settings] = Recipe) -> str:
    location = ".".join(str(part) for part in _without_kind(detail["loc"]))
    where = f"   [{origin.get(location, file)}]"
    if detail["type"] == "extra_forbidden":
        known = _known_keys(detail["loc"][:-1], model)
        close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"  {location}: unknown key, {hint}(known here: {', '.join(known)}){where}"
    message = detail["msg"].removeprefix("Value error, ")
    given = "" if detail["type"] == "value_error" else f" (got {detail['input']!r})"
    return f"  {location}: {message}{given}{where}".replace("  : ", "  ", 1)


def _without_kind(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """pydantic puts the kind of a stage between its name and its keys."""
    return location[:2] + location[3:] if location[:1] == ("stages",) and len(location) > 2 else location


def _known_keys(location: tuple[int | str, ...], model: Any) -> list[str]:
    if location[:1] == ("stages",) and len(location) > 2:
        model, location = KINDS[str(location[2])], location[3:]
    for part in location:
        annotation = model.model_fields[part].annotation
        model = next((kind for kind in get_args(annotation) if hasattr(kind, "model_fields")), annotation)
    return list(model.model_fields)


INTRODUCTION = """# Every key of a recipe

Written by `python tools/document_recipes.py`. A recipe is one YAML file; what it leaves out has the value given here,
and `simmim show RECIPE` prints all of them. Each key can be replaced on the command line:
`stages.pretrain.mask.ratio=0.75`. Unknown keys are errors. The shipped recipes open with their command, what they need
and what to expect. `accelerate/` holds configurations of machines, `slurm.sh` a job.
"""


def document() -> str:
    """Markdown: a table for each part of a recipe, from the schema."""
    parts: list[tuple[str, Any]] = [("", Recipe), ("data", Data), ("encoder", Encoder)]
    for model in dict.fromkeys(KINDS.values()):
        name = model.__name__.lower()
        parts.append((f"stages.{name}", model))
        for key, field in model.model_fields.items():
            for part in (field.annotation, *get_args(field.annotation)):
                if isinstance(part, type) and issubclass(part, Settings):
                    parts.append((f"stages.{name}.{key}", part))
    sections = [INTRODUCTION]
    for prefix, model in parts:
        about = " ".join((model.__doc__ or "").split())
        sections.append(f"## {prefix or 'The file'}\n\n{about}\n\n| key | type | default | |\n|---|---|---|---|")
        for key, field in model.model_fields.items():
            cells = (f"`{key}`", _type_of(field.annotation), _default_of(field), field.description or "")
            sections[-1] += f"\n| {' | '.join(cell.replace('|', ' or ') for cell in cells)} |"
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _type_of(annotation: Any) -> str:
    """In words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_of(arguments[0])
    if origin is Literal:
        return ", ".join(str(value) for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type_of(part) for part in arguments)
    if origin in (list, tuple):
        return f"list of {_type_of(arguments[0])}"
    if annotation is NoneType:
        return "null"
    names = {int: "integer", float: "number", str: "text", bool: "yes or no", dict: "keys"}
    return names.get(annotation, "keys, below")


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, (Settings, dict)):
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(f'{v:.4g}' if isinstance(v, float) else str(v) for v in value)}]"
    return "null" if value is None else str(value) or "empty"
