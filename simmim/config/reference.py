"""Generate the reference of all recipe keys."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from simmim.config import KINDS, Data, Encoder, Recipe, Settings

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
