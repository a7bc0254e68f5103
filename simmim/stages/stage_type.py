"""Which room makes a stage."""

from __future__ import annotations

from types import ModuleType

from simmim.config import DetectStage, FinetuneStage, PretrainStage, SegmentStage, Stage
from simmim.stages import detect, finetune, pretrain, segment

ROOMS: dict[type[Stage], ModuleType] = {
    PretrainStage: pretrain,
    FinetuneStage: finetune,
    SegmentStage: segment,
    DetectStage: detect,
}


def room_of(stage: Stage) -> ModuleType:
    """The module with ``make_job(recipe, out, name, precision)``, ``judge(trained, accelerator)``, and
    ``make_fake_task(recipe, stage, encoder, classes)``, the objective on the meta device.
    """
    return ROOMS[type(stage)]
