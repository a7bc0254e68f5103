"""How fast do images become batches? The loaders of others and ours on the same images, on one core, in one run."""

from __future__ import annotations

import io
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform
from timm.data.loader import fast_collate
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from simmim.data import RandAugmentedCrop, RandomCrop, open_files, open_images, training_batches
from simmim.data.decode import Decoder, TensorImage, full_image
from simmim.data.pack import Packing, pack
from simmim.data.transforms import keep_one_posterize_bit
from simmim.rng import uniform

BATCH = 50
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, FINETUNE_SCALE = (0.67, 1.0), (0.08, 1.0)
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
Speeds = dict[str, list[float]]
Batches = Iterator[int]
"""Makes a batch for each number it gives: of the images in it."""


def data_speed(
    path: Path, *, rounds: int = 30, images: int = 250, files: int = 60_000, say: Callable[[str], None] = print
) -> dict[str, Speeds]:
    """Print images per second and core with ratios, bytes per image, the price of shortcuts, and start-up times.

    Args:
        path: a folder of photographs; at most ``images`` of them are used, through links.
        rounds: contenders take turns so often, with a batch each; medians count.
        files: in the tree whose start-up is measured.

    Returns:
        Images per CPU second of every contender in every round, for pretraining and for fine-tuning.

    Raises:
        ValueError: no images, or fewer than a batch.
    """
    source = open_files(path)
    if len(source) < BATCH:
        raise ValueError(f"{path} holds {len(source)} images: {BATCH} are the least to measure with")
    with TemporaryDirectory() as home, _one_core(), _own_cache(Path(home)):
        folder = Path(home) / "photos" / "all"
        folder.mkdir(parents=True)
        for number in range(min(images, len(source))):
            name = Path(source.name(number))
            (folder / f"{number:06d}{name.suffix}").symlink_to(name.resolve())
        pack(str(folder), Path(home) / "packed", Packing())
        results = {
            "pretraining, 192 px": _race(_pretraining(folder, Path(home) / "packed"), rounds),
            f"fine-tuning, 224 px, {RAND_AUGMENT}": _race(_finetuning(folder, Path(home) / "packed"), rounds),
        }
        for task, speeds in results.items():
            say(format_speeds(task, speeds))
        say(format_bytes())
        say(format_losses(folder, Path(home) / "packed"))
        say(format_start_up(Path(home) / "tree", files))
    return results


def _pretraining(folder: Path, packed: Path) -> dict[str, Batches]:
    official = transforms.Compose(
        [
            transforms.Lambda(_to_rgb),
            transforms.RandomResizedCrop(192, scale=SCALE, ratio=(3 / 4, 4 / 3)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
            _with_mask,
        ]
    )
    timm_transform = create_transform(
        192, is_training=True, use_prefetcher=True, scale=SCALE, color_jitter=0, interpolation="bilinear"
    )
    crop = RandomCrop((192, 192), SCALE)
    return {
        "official SimMIM (torchvision, float)": _loader(ImageFolder(str(folder.parent), official)),
        "timm (uint8, fast_collate)": _loader(ImageDataset(str(folder.parent), transform=timm_transform), fast_collate),
        "simmim, raw files": _ours(folder, crop),
        "simmim, packed": _ours(packed, crop),
    }


def _finetuning(folder: Path, packed: Path) -> dict[str, Batches]:
    """Erasing and normalisation: by timm in its loader, or on the device in its prefetcher; ours on the device."""

    def theirs(use_prefetcher: bool) -> Dataset:
        transform: Any = create_transform(
            224,
            is_training=True,
            use_prefetcher=use_prefetcher,
            scale=FINETUNE_SCALE,
            auto_augment=RAND_AUGMENT,
            interpolation="bicubic",
            re_prob=0.25,
        )
        for step in transform.transforms:
            if hasattr(step, "ops"):
                keep_one_posterize_bit(step)
        return ImageDataset(str(folder.parent), transform=transform)

    crop = RandAugmentedCrop(
        (224, 224), rand_augment=RAND_AUGMENT, mean=MEAN, scale=FINETUNE_SCALE, interpolation="bicubic"
    )
    return {
        "timm (float, erased: as official Swin)": _loader(theirs(False)),
        "timm (uint8, fast_collate)": _loader(theirs(True), fast_collate),
        "simmim, raw files, float, erased": _ours(folder, crop, RandomErasing(0.25, mode="pixel", device="cpu")),
        "simmim, raw files": _ours(folder, crop),
        "simmim, packed": _ours(packed, crop),
    }


def _loader(data: Any, collate: Any = None) -> Batches:
    while True:
        for batch in DataLoader(data, BATCH, shuffle=True, drop_last=True, collate_fn=collate):
            yield len(batch[1])


def _ours(path: Path, crop: RandomCrop, erasing: Any = None) -> Batches:
    source = open_images(path)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    for batch in training_batches(
        source, crop, seed=0, batch_size=BATCH, micro_batch_size=BATCH, end_step=1 << 40, num_workers=0
    ):
        if erasing is not None:
            erasing((batch["image"] / 255 - mean) / std)
        yield len(batch["image"])


def _race(contenders: dict[str, Batches], rounds: int) -> Speeds:
    """Images per second of processor time; batch by batch in turns, so that what disturbs one disturbs all."""
    speeds: Speeds = {name: [] for name in contenders}
    for batches in contenders.values():  # warm up
        next(batches)
    for _ in tqdm(range(rounds), unit="round", disable=None):
        for name, batches in contenders.items():
            begin = time.process_time()
            count = next(batches)
            speeds[name].append(count / (time.process_time() - begin))
    return speeds


def format_speeds(task: str, speeds: Speeds) -> str:
    """Medians, and medians of the ratios within each round, with their quartiles."""
    first = next(iter(speeds.values()))
    lines = [
        f"{task}: images per second and core, medians of {len(first)} batches of {BATCH} in turns; "
        "ratio to the first (quartiles)"
    ]
    for name, values in speeds.items():
        low, middle, high = np.quantile(np.array(values) / np.array(first), [0.25, 0.5, 0.75])
        lines.append(f"  {name:<42} {statistics.median(values):>6.0f}  {middle:.2f} ({low:.2f} to {high:.2f})")
    return "\n".join(lines)


def format_bytes() -> str:
    """What travels to the device for one image of pretraining."""
    official = sum(t.nbytes for t in (torch.zeros(3, 192, 192), torch.zeros(48, 48, dtype=torch.int64))) + 8
    ours = torch.zeros(3, 192, 192, dtype=torch.uint8).nbytes + 16
    return f"bytes to the device per image at 192 px: official {official:,}, simmim {ours:,} ({official / ours:.2f}x)"


def format_losses(folder: Path, packed: Path) -> str:
    """What shortcuts cost, dB: crops of packed images, and of large JPEGs that are reduced while decoded."""
    raw, small, crop = open_images(folder), open_images(packed), RandomCrop((192, 192), SCALE)
    draws = uniform(
        "crop", 0, torch.zeros(len(raw), dtype=torch.int64), torch.arange(len(raw)), crop.num_draws
    ).tolist()
    packed_losses, reduced_losses, ratios = [], [], []
    for number in range(0, len(raw), 5):  # the whole image: a crop falls between other pixels once they are fewer
        pictures = [images.decode(images.fetch(number)) for images in (raw, small)]
        packed_losses.append(psnr(*(picture.crop((0, 0, *picture.size), (192, 192)) for picture in pictures)))
    for number in range(0, len(raw), 25):
        content = _enlarged(raw.fetch(number))
        begin = time.process_time()
        reduced = crop(Decoder()(content), draws[number])
        middle = time.process_time()
        full = crop(TensorImage(full_image(Decoder()(content))), draws[number])
        ratios.append((time.process_time() - middle) / (middle - begin))
        reduced_losses.append(psnr(full, reduced))
    return (
        f"packed against original, at 192 px: median {statistics.median(packed_losses):.1f} dB, "
        f"least {min(packed_losses):.1f}\n"
        f"JPEGs of 12 megapixels reduced while decoded: median {statistics.median(reduced_losses):.1f} dB, "
        f"least {min(reduced_losses):.1f}; {statistics.median(ratios):.1f} x faster than decoded completely"
    )


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two uint8 images, dB."""
    return 10 * float(np.log10(255**2 / max(1e-9, (a.float() - b.float()).square().mean().item())))


def _enlarged(content: Any) -> bytes:
    """A photograph of 12 megapixels, made of a smaller one."""
    with Image.open(io.BytesIO(content)) as image:
        file = io.BytesIO()
        image.convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
        return file.getvalue()


def format_start_up(tree: Path, files: int) -> str:
    """Seconds to open a tree of so many files in folders of a thousand."""
    for number in tqdm(range(files), unit="file", desc="start-up: making a tree", disable=None):
        if number % 1000 == 0:
            folder = tree / f"n{number // 1000:05d}"
            folder.mkdir(parents=True)
        (folder / f"{number:08d}.jpg").touch()
    for folder in [tree, *tree.iterdir()]:
        os.utime(folder, (1e9, 1e9))  # what has just changed is not trusted to be complete, and listed again
    openers: dict[str, Callable[[], Any]] = {
        "torchvision ImageFolder": lambda: ImageFolder(str(tree), allow_empty=True),
        "timm ImageDataset": lambda: ImageDataset(str(tree)),
        "simmim, first time": lambda: open_files(tree),
        "simmim, again": lambda: open_files(tree),
    }
    lines = [f"opening {files:,} files"]
    for name, opener in openers.items():
        begin = time.perf_counter()
        opened = opener()
        lines.append(f"  {name:<26} {time.perf_counter() - begin:6.3f} s  ({len(opened):,} found)")
    return "\n".join(lines)


def _to_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _with_mask(image: Tensor) -> tuple[Tensor, np.ndarray]:
    """60 % of 6 x 6 cells of 32 px, as tokens of 4 px."""
    mask = np.zeros(36, dtype=int)
    mask[np.random.permutation(36)[:22]] = 1
    return image, mask.reshape(6, 6).repeat(8, axis=0).repeat(8, axis=1)


@contextmanager
def _own_cache(home: Path) -> Iterator[None]:
    """Nothing of the user's is used or left."""
    before = os.environ.get("SIMMIM_CACHE")
    os.environ["SIMMIM_CACHE"] = str(home / "cache")
    try:
        yield
    finally:
        del os.environ["SIMMIM_CACHE"]
        if before is not None:
            os.environ["SIMMIM_CACHE"] = before


@contextmanager
def _one_core() -> Iterator[None]:
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)
