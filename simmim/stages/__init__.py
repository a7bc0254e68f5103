"""Builds and runs the stages of a recipe; one module per stage type."""

from __future__ import annotations

from simmim.stages import detect, finetune, pretrain, segment
from simmim.stages.runner import run, run_stage, stage_of_kind

__all__ = ["detect", "finetune", "pretrain", "run", "run_stage", "segment", "stage_of_kind"]
