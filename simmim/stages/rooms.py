"""Which room makes a stage."""

from __future__ import annotations

from types import ModuleType

from simmim.schema import Detect, Finetune, Pretrain, Segment, Stage
from simmim.stages import detecting, finetuning, pretraining, segmenting

ROOMS: dict[type[Stage], ModuleType] = {
    Pretrain: pretraining,
    Finetune: finetuning,
    Segment: segmenting,
    Detect: detecting,
}


def room_of(stage: Stage) -> ModuleType:
    """The module with ``make_job(recipe, out, name, precision)``, ``judge(trained, accelerator)``, and
    ``plan_objective(recipe, stage, encoder, classes)``, the objective on the meta device.
    """
    return ROOMS[type(stage)]
