"""Batches in an order that is a pure function of (seed, step).

The training set is an endless sequence of samples: all of epoch 0 in its order, then epoch 1, and so
on. Step s takes the next ``batch_size`` of them, also across epoch boundaries; so the batch size is
always exact, no sample is dropped, and a run resumes at any step without replaying earlier ones.
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
from simmim.data.tables import SHUFFLED_BLOCKS
from simmim.data.transforms import Example, Transform, preserve_global_rng
from simmim.rng import permutation, uniform
from simmim.signals import ignore_signals

Batch = dict[str, Any]
MAX_CORRUPT_IN_A_ROW = 20
HEADERS_PER_GROUP = 16
"""Number of headers read in a row: doing so before decoding pixels keeps code and data in cache."""


class SampleDataset(Dataset):
    """Data set whose items are whole batches, for a list of ``(epoch, index)`` keys.

    A batch holds ``image`` uint8 ``(n, c, H, W)``, ``epoch`` and ``index`` int64 ``(n,)``, ``corrupt``, a list of
    ``(name, reason)``, and with ``labelled`` also ``label`` int64 ``(n,)``. ``image`` is missing if too many images
    are corrupt.

    A corrupt image is replaced by the next one of the source, so that batches keep their size; twenty
    in a row end the run. Without ``replace`` it is left out, so that no image counts twice.

    Args:
        source: images to read; a :class:`LabelledSource` if ``labelled``.
        transform: makes an example of each decoded image.
        seed: of the random crops.
        labelled: add labels to the batch.
        replace: replace corrupt images.
        timeout_s: time after which an image that cannot be fetched counts as corrupt.
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
        with preserve_global_rng():
            return self._batch(keys)

    def _batch(self, keys: list[tuple[int, int]]) -> Batch:
        epoch, index = torch.tensor(keys, dtype=torch.int64).unbind(dim=1)
        draws = uniform("crop", self.seed, epoch, index, self.transform.num_draws).tolist()
        indices = index.tolist()
        corrupt: list[tuple[str, str]] = []
        examples, labels, kept = [], [], []
        contents = self._reader.many(indices)
        for start in range(0, len(indices), HEADERS_PER_GROUP):
            group = indices[start : start + HEADERS_PER_GROUP]
            opened = [self._open(each, content, corrupt) for each, content in zip(group, contents, strict=False)]
            for position, (each, image) in enumerate(zip(group, opened, strict=True), start=start):
                found = self._crop(each, image, draws[position], corrupt)
                if found is not None:
                    kept.append(position)
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

    def _open(self, index: int, content: Callable[[], Any], corrupt: list[tuple[str, str]]) -> DecodedImage | None:
        try:
            return self.source.decode(content())
        except Exception as error:  # damaged bytes may raise any exception
            corrupt.append((self.source.name(index), reason_of(error)))
            return None

    def _crop(
        self, index: int, image: DecodedImage | None, draws: list[float], corrupt: list[tuple[str, str]]
    ) -> tuple[int, Example] | None:
        """Return the index and example of the image, or of the next valid one if corrupt images are replaced."""
        for _ in range(MAX_CORRUPT_IN_A_ROW):
            if image is not None:
                try:
                    return index, self.transform(image, draws)
                except Exception as error:
                    corrupt.append((self.source.name(index), reason_of(error)))
            if not self.replace:
                return None
            index = (index + 1) % len(self.source)
            image = self._open(index, partial(self._reader.one, index), corrupt)
        return None  # an exception would reach the main process wrapped in the worker's traceback


class ResumableBatchSampler:
    """Yields the ``(epoch, index)`` keys of every micro-batch of one process, from ``start_step`` to ``end_step``."""

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
            for sample in range(start, start + self.micro_batch_size):
                epoch, position = divmod(sample, self.size)
                if epoch != order_epoch:
                    order_epoch, order = epoch, epoch_order(self.seed, epoch, self.size, self.blocks)
                keys.append((epoch, int(order[position])))
            yield keys


def epoch_order(seed: int, epoch: int, size: int, blocks: Tensor | None = None) -> Tensor:
    """Return the order of an epoch, int64 ``(size,)``: random; with blocks, within a few random blocks at a time.

    Args:
        blocks: int ``(size,)``, the storage block of each image.
    """
    order = permutation(seed, epoch, size)
    if blocks is None:
        return order
    num_blocks = int(blocks.max()) + 1
    turn = torch.empty(num_blocks, dtype=torch.int64)
    turn[permutation(seed, epoch, num_blocks)] = torch.arange(num_blocks) // SHUFFLED_BLOCKS
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
    """Load the training micro-batches of one process.

    Args:
        **steps: arguments of :class:`ResumableBatchSampler`.

    Raises:
        ValueError: while iterating, if too many images in a row are corrupt.
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
    """Load every valid image once, split over all processes.

    The keys are those of epoch 0 and seed 0, so crops and masks are the same every time.
    """
    keys = [(0, index) for index in range(rank, len(source), world_size)]
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    samples = SampleDataset(source, transform, seed=0, labelled=labelled, replace=False, timeout_s=timeout_s)
    return Batches(samples, batches, num_workers)


class Batches:
    """A DataLoader that names the corrupt images when it stops because of them; can be iterated repeatedly.

    ``corrupt`` maps the names of images that were left out to the reasons.
    """

    def __init__(self, samples: SampleDataset, keys: Any, num_workers: int = 0, pin_memory: bool = False) -> None:
        self.replace = samples.replace
        self.corrupt: dict[str, str] = {}
        self.loader = make_loader(
            samples,
            keys,
            num_workers,
            pin_memory=pin_memory,
            prefetch_factor=4 if num_workers else None,
            worker_init_fn=_init_training_worker,
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
                raise ValueError(f"{MAX_CORRUPT_IN_A_ROW} images in a row could not be read, the last ones: {names}")
            yield batch


def make_loader(data: Dataset, batches: Any, num_workers: int, **options: Any) -> DataLoader:
    """Make a DataLoader that yields ``data.__getitems__(batch)`` in order, from single-threaded workers."""
    return DataLoader(
        data,
        batch_sampler=batches,
        collate_fn=_identity,
        num_workers=num_workers,
        # Without this the DataLoader would draw a seed for its workers from the global generator.
        generator=torch.Generator().manual_seed(0),
        **{"worker_init_fn": _init_worker, **options},
    )


def _identity(batch: Any) -> Any:
    """Return a batch unchanged; spawned workers need a named function."""
    return batch


def _init_worker(_: int) -> None:
    """Use one thread, because the workers share the cores, and hide Pillow's warnings about unusual headers."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _init_training_worker(worker: int) -> None:
    """Initialize a training worker, which ignores stop signals: the step in progress still needs its batches."""
    _init_worker(worker)
    ignore_signals()


def reason_of(error: BaseException) -> str:
    """Describe an exception in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
