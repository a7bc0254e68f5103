"""Bytes: of the machine, of attention, and of every tensor while it lives, real or planned."""

from __future__ import annotations

import os
import weakref
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swin import SwinConfig
from swin.windows import fit_windows

FRACTION_FOR_LOGITS = 1 / 16


class TrackedMemory(TorchDispatchMode):
    """Bytes of all tensors that are made while it is entered, for as long as they live; not of those made before.

    What a kernel needs for itself, and what an allocator adds, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        """Alive now."""
        self.peak = 0
        """The most that were alive at once."""
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = {tensor.untyped_storage()._cdata for tensor in inputs}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor, given)
        return result

    def _see(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in given or key in self._alive:
            return

        def forget(_: weakref.ref) -> None:
            self.current -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, forget)
        self.current += size
        self.peak = max(self.peak, self.current)


def device_bytes(device: torch.device) -> int:
    """Memory of a GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def choose_chunks(config: SwinConfig, batch_size: int, budget: int) -> list[int]:
    """In how many chunks each stage computes its attention: powers of two, such that the logits of one chunk, in fp32
    and three times (the products, the weights, their gradients), take at most a sixteenth of ``budget`` bytes."""
    chosen = []
    for grid, heads in zip(config.grids(), config.num_heads, strict=True):
        windows = fit_windows(grid, config.window, shifted=True)
        tokens = prod(map(sum, zip(grid, windows.padding, strict=True)))
        needed = 3 * 4 * batch_size * heads * tokens * prod(windows.window)
        chunks = 1
        while needed / chunks > budget * FRACTION_FOR_LOGITS:
            chunks *= 2
        chosen.append(chunks)
    return chosen
