"""Memory in bytes: of the device, of attention logits, and of all live tensors (real or fake)."""

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
    """Context manager that counts the bytes of all live tensors created inside it.

    The workspace of kernels and the overhead of the allocator are not included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        """Bytes alive now."""
        self.peak = 0
        """Largest number of bytes alive at the same time."""
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = {tensor.untyped_storage()._cdata for tensor in inputs}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._track(tensor, given)
        return result

    def _track(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in given or key in self._alive:
            return

        def release(_: weakref.ref) -> None:
            self.current -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, release)
        self.current += size
        self.peak = max(self.peak, self.current)


def device_bytes(device: torch.device) -> int:
    """Return the memory of a GPU, or of the machine for other devices."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def choose_chunks(config: SwinConfig, batch_size: int, budget: int) -> list[int]:
    """Choose the number of attention chunks of each encoder stage, a power of two.

    The logits of one chunk take at most a sixteenth of ``budget`` bytes, counted in fp32 and three times
    (logits, attention weights, gradients).
    """
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
