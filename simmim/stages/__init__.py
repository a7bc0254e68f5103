"""The only floor where a recipe becomes objects: one room for each kind of stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simmim.config import Recipe
from simmim.stages.datasets import check_stages
from simmim.stages.runner import carry_out
from simmim.stages.stage_type import room_of

__all__ = ["run", "run_stage", "stage_of_kind"]


def run_stage(
    recipe: Recipe, name: str, out: Path, *, precision: str | None = None, allow_changes: bool = False
) -> Path:
    """Run one stage of a recipe, or continue it; nothing is done again.

    Returns:
        The folder of its export.

    Raises:
        ValueError: no such stage, or settings, data, start or launch that cannot work.
    """
    if name not in recipe.stages:
        raise ValueError(f"{recipe.name} has no stage {name!r}: it has {', '.join(recipe.stages)}")
    room = room_of(recipe.stages[name])
    return carry_out(
        recipe, out, name, room.make_job, room.evaluate_trained, precision=precision, allow_changes=allow_changes
    )


def run(recipe: Recipe, out: Path, *, precision: str | None = None, allow_changes: bool = False) -> Path:
    """Run all stages in their order, from where they stand; the export of the last.

    Raises:
        ValueError: as of :func:`run_stage`; what is missing of any stage is missed before the first is trained.
    """
    check_stages(recipe, (name for name in recipe.stages if not (out / recipe.name / name / "export").exists()))
    for name in recipe.stages:
        last = run_stage(recipe, name, out, precision=precision, allow_changes=allow_changes)
    return last


def stage_of_kind(recipe: Recipe, kinds: Sequence[str]) -> str:
    """The first stage of one of these kinds.

    Raises:
        ValueError: there is none.
    """
    for name, stage in recipe.stages.items():
        if stage.kind in kinds:
            return name
    raise ValueError(f"{recipe.name} has no stage of kind {' or '.join(kinds)}: it has {', '.join(recipe.stages)}")
