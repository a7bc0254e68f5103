"""Batches in an order that is a pure function of (seed, step).

The training set is one endless line of samples: all of epoch 0 in its order, then epoch 1, and so
on. Step s takes the next ``batch_size`` of them, across the border of epochs too; so the batch size
is always exact, no sample is dropped, and a run continues at any step without replaying anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simmim.data.decode import DecodedImage
from simmim.data.reading import Reader
from simmim.data.sources import LabelledSource, Source
from simmim.data.tables import BLOCKS_TOGETHER
from simmim.data.transforms import Example, Transform, untouched_generators
from simmim.rng import permutation, uniform
from simmim.signals import ignore_signals

Batch = dict[str, Any]
MAX_CORRUPT_IN_A_ROW = 20
HEADERS_TOGETHER = 16
"""Headers are read so many at a time: between two large images the processor has forgotten how."""


class SampleDataset(Dataset):
    """``(epoch, index)`` keys -> a batch: ``image`` uint8 ``(n, c, H, W)``, ``epoch`` and ``index``
    int64 ``(n,)``, ``broken`` a list of ``(name, reason)``; with ``labelled`` also ``label`` int64
    ``(n,)``, for which the source has to be one with labels. Without ``image`` when too many are broken.

    A broken image is replaced by the next one of the source, so that batches keep their size; twenty
    in a row end the run. Without ``replace`` it is left out, so that no image counts twice.

    Args:
        timeout_s: after which an image that cannot be fetched is given up as broken.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        seed: int,
        *,
        labelled: bool = False,
        replace: bool = True,
        timeout_s: float = 60.0,
    ) -> None:
        self.source, self.transform, self.seed, self.labelled = source, transform, seed, labelled
        self.replace = replace
        self._reader = Reader(source.fetch, timeout_s)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        with untouched_generators():
            return self._batch(keys)

    def _batch(self, keys: list[tuple[int, int]]) -> Batch:
        epoch, index = torch.tensor(keys, dtype=torch.int64).unbind(dim=1)
        draws = uniform("crop", self.seed, epoch, index, self.transform.num_draws).tolist()
        numbers = index.tolist()
        corrupt: list[tuple[str, str]] = []
        examples, labels, kept = [], [], []
        contents = self._reader.many(numbers)
        for start in range(0, len(numbers), HEADERS_TOGETHER):
            few = numbers[start : start + HEADERS_TOGETHER]
            opened = [self._open(number, content, corrupt) for number, content in zip(few, contents, strict=False)]
            for place, (number, picture) in enumerate(zip(few, opened, strict=True), start=start):
                found = self._crop(number, picture, draws[place], corrupt)
                if found is not None:
                    kept.append(place)
                    examples.append(found[1])
                    if self.labelled:
                        labels.append(cast(LabelledSource, self.source).label(found[0]))
                elif self.replace:
                    return {"corrupt": corrupt}
        if not examples:
            return {"corrupt": corrupt}
        batch: Batch = {**self.transform.collate(examples), "epoch": epoch[kept]}
        batch |= {"index": index[kept], "corrupt": corrupt}
        return batch | {"label": torch.tensor(labels)} if self.labelled else batch

    def _open(self, number: int, content: Callable[[], Any], corrupt: list[tuple[str, str]]) -> DecodedImage | None:
        try:
            return self.source.decode(content())
        except Exception as error:  # damaged bytes raise almost anything; each is named with its reason
            corrupt.append((self.source.name(number), reason_of(error)))
            return None

    def _crop(
        self, number: int, picture: DecodedImage | None, draws: list[float], corrupt: list[tuple[str, str]]
    ) -> tuple[int, Example] | None:
        """The number and pixels of the image, or of the next good one if it is to be replaced."""
        for _ in range(MAX_CORRUPT_IN_A_ROW):
            if picture is not None:
                try:
                    return number, self.transform(picture, draws)
                except Exception as error:
                    corrupt.append((self.source.name(number), reason_of(error)))
            if not self.replace:
                return None
            number = (number + 1) % len(self.source)
            picture = self._open(number, partial(self._reader.one, number), corrupt)
        return None  # an exception would reach the main process wrapped in the worker's traceback


class ResumableBatchSampler:
    """Keys of every micro-batch of one process, from ``start_step`` to ``end_step``."""

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        batch_size: int,
        micro_batch_size: int,
        blocks: Tensor | None = None,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        end_step: int,
    ) -> None:
        assert batch_size % (micro_batch_size * world_size) == 0
        self.size, self.seed, self.blocks = size, seed, blocks
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.start_step, self.end_step = start_step, end_step

    def __len__(self) -> int:
        per_step = self.batch_size // (self.micro_batch_size * self.world_size)
        return (self.end_step - self.start_step) * per_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order_epoch, order = -1, torch.empty(0)
        stride = self.micro_batch_size * self.world_size
        first = self.start_step * self.batch_size + self.rank * self.micro_batch_size
        for start in range(first, self.end_step * self.batch_size, stride):
            keys = []
            for position in range(start, start + self.micro_batch_size):
                epoch, place = divmod(position, self.size)
                if epoch != order_epoch:
                    order_epoch, order = epoch, epoch_order(self.seed, epoch, self.size, self.blocks)
                keys.append((epoch, int(order[place])))
            yield keys


def epoch_order(seed: int, epoch: int, size: int, blocks: Tensor | None = None) -> Tensor:
    """The order of an epoch, int64 ``(size,)``: random; with blocks, a few random blocks at a time.

    Args:
        blocks: int ``(size,)``, the block of each image.
    """
    order = permutation(seed, epoch, size)
    if blocks is None:
        return order
    num_blocks = int(blocks.max()) + 1
    turn = torch.empty(num_blocks, dtype=torch.int64)
    turn[permutation(seed, epoch, num_blocks)] = torch.arange(num_blocks) // BLOCKS_TOGETHER
    return order[turn[blocks.long()][order].argsort(stable=True)]


def training_batches(
    source: Source,
    transform: Transform,
    *,
    seed: int,
    labelled: bool = False,
    num_workers: int = 0,
    pin_memory: bool = False,
    timeout_s: float = 60.0,
    **steps: int,
) -> Batches:
    """Micro-batches of one process; ``steps`` are the arguments of :class:`ResumableBatchSampler`.

    Raises:
        ValueError: while iterating, when too many images in a row are broken.
    """
    keys = ResumableBatchSampler(len(source), seed=seed, blocks=source.blocks, **steps)
    samples = SampleDataset(source, transform, seed, labelled=labelled, timeout_s=timeout_s)
    return Batches(samples, keys, num_workers, pin_memory)


def evaluation_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    labelled: bool = False,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    timeout_s: float = 60.0,
) -> Batches:
    """Every good image once, over all processes, as epoch 0 of seed 0: the same crops and masks every time."""
    keys = [(0, number) for number in range(rank, len(source), world_size)]
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    samples = SampleDataset(source, transform, seed=0, labelled=labelled, replace=False, timeout_s=timeout_s)
    return Batches(samples, batches, num_workers)


class Batches:
    """A DataLoader that names the broken images when it has to give up; can be iterated again.

    ``broken`` holds the images that were left out, names and reasons.
    """

    def __init__(self, samples: SampleDataset, keys: Any, num_workers: int = 0, pin_memory: bool = False) -> None:
        self.replace = samples.replace
        self.corrupt: dict[str, str] = {}
        self.loader = in_workers(
            samples,
            keys,
            num_workers,
            pin_memory=pin_memory,
            prefetch_factor=4 if num_workers else None,
            worker_init_fn=_to_the_end,
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            if not self.replace:
                self.corrupt.update(batch["corrupt"])
                if "image" not in batch:
                    continue
            if "image" not in batch:
                names = "; ".join(f"{name}: {reason}" for name, reason in batch["corrupt"][-3:])
                raise ValueError(f"{MAX_CORRUPT_IN_A_ROW} images in a row could not be read, the last: {names}")
            yield batch


def in_workers(data: Dataset, batches: Any, num_workers: int, **options: Any) -> DataLoader:
    """``data.__getitems__`` of every one of ``batches``, in order, by so many processes of one thread each."""
    return DataLoader(
        data,
        batch_sampler=batches,
        collate_fn=_identity,
        num_workers=num_workers,
        # The base seed of workers would be drawn from the global generator; nothing here uses it.
        generator=torch.Generator().manual_seed(0),
        **{"worker_init_fn": _one_thread, **options},
    )


def _identity(batch: Any) -> Any:
    """Of what comes as a batch already; workers that are started afresh need a name for it."""
    return batch


def _one_thread(_: int) -> None:
    """Workers share the cores among themselves, and do not repeat what Pillow thinks of odd headers."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _to_the_end(worker: int) -> None:
    """Signals reach the workers of a training process too, which needs them until its step is done."""
    _one_thread(worker)
    ignore_signals()


def reason_of(error: BaseException) -> str:
    """One line for people."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
