"""Activation checkpointing: what a block does not keep for its gradient it computes again (arXiv 1604.06174)."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Checkpointing = Literal["none", "selective", "full"]
CHECKPOINTINGS: tuple[Checkpointing, ...] = get_args(Checkpointing)

# Products that are kept where the result is at most so many times as wide as the axis that is summed over: not the
# logits, which are wide and cheap, nor the hidden layer of a position bias, which comes from two coordinates.
KEPT = {torch.ops.aten.mm.default: 16, torch.ops.aten.addmm.default: 16, torch.ops.aten.bmm.default: 1}


def run_saving(block: nn.Module, x: Tensor, checkpointing: Checkpointing) -> Tensor:
    """``block(x)``, of which the gradient remembers

    - ``none``: everything it needs;
    - ``selective``: x and the matrix products; norms, softmax and GELU are computed again;
    - ``full``: x alone.

    Stochastic depth draws the same again.
    """
    if checkpointing == "none" or not torch.is_grad_enabled():
        return block(x)
    if checkpointing == "full":
        return checkpoint(block, x, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _keep_products)
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


def _keep_products(_: Any, operator: Any, *arguments: Any, **__: Any) -> CheckpointPolicy:
    limit = KEPT.get(operator)
    if limit is None:
        return CheckpointPolicy.PREFER_RECOMPUTE
    left, right = arguments[-2:]
    kept = right.shape[-1] <= limit * left.shape[-1]
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
