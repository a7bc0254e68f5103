"""Activation checkpointing: recompute activations in the backward pass instead of storing them (arXiv 1604.06174)."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Checkpointing = Literal["none", "selective", "full"]
CHECKPOINTINGS: tuple[Checkpointing, ...] = get_args(Checkpointing)

# Selective checkpointing saves a matrix product if its result is at most this many times as wide as the axis summed
# over. That excludes the attention logits, which are wide and cheap to recompute, and the hidden layer of a position
# bias, which is computed from two coordinates.
MAX_WIDTH_RATIO = {torch.ops.aten.mm.default: 16, torch.ops.aten.addmm.default: 16, torch.ops.aten.bmm.default: 1}


def run_checkpointed(block: nn.Module, x: Tensor, checkpointing: Checkpointing) -> Tensor:
    """Compute ``block(x)``, saving only what a mode of activation checkpointing keeps for the backward pass.

    - ``none``: all activations;
    - ``selective``: x and the matrix products; norms, softmax and GELU are recomputed;
    - ``full``: only x.

    The recomputation restores the random state, so stochastic depth drops the same branches again.
    """
    if checkpointing == "none" or not torch.is_grad_enabled():
        return block(x)
    if checkpointing == "full":
        return checkpoint(block, x, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _save_products)
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


def _save_products(_: Any, operator: Any, *arguments: Any, **__: Any) -> CheckpointPolicy:
    """Save narrow matrix products and recompute all other operations."""
    limit = MAX_WIDTH_RATIO.get(operator)
    if limit is None:
        return CheckpointPolicy.PREFER_RECOMPUTE
    left, right = arguments[-2:]
    is_narrow = right.shape[-1] <= limit * left.shape[-1]
    return CheckpointPolicy.MUST_SAVE if is_narrow else CheckpointPolicy.PREFER_RECOMPUTE
