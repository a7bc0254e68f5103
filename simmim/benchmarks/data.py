"""Speed of data loading: this project's and other loaders on the same images, on one core, in one run."""

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
"""Iterator that loads a batch and returns the number of its images."""


def data_speed(
    path: Path, *, rounds: int = 30, images: int = 250, files: int = 60_000, echo: Callable[[str], None] = print
) -> dict[str, Speeds]:
    """Print images per second and core, bytes per image, the loss of quality by faster decoding, and start-up times.

    Args:
        path: a folder of photographs.
        rounds: batches per loader; loaders take turns, and medians are reported.
        images: maximum number of photographs; they are used through symbolic links.
        files: number of files in the tree whose start-up is measured.
        echo: called with every line of output.

    Returns:
        Images per CPU second of every loader in every round, for pretraining and for fine-tuning.

    Raises:
        ValueError: there are fewer images than a batch has.
    """
    source = open_files(path)
    if len(source) < BATCH:
        raise ValueError(f"{path} holds {len(source)} images: the benchmark needs at least {BATCH}")
    with TemporaryDirectory() as home, _one_core(), _own_cache(Path(home)):
        folder = Path(home) / "photos" / "all"
        folder.mkdir(parents=True)
        for index in range(min(images, len(source))):
            name = Path(source.name(index))
            (folder / f"{index:06d}{name.suffix}").symlink_to(name.resolve())
        pack(str(folder), Path(home) / "packed", Packing())
        results = {
            "pretraining, 192 px": _compare(_pretraining(folder, Path(home) / "packed"), rounds),
            f"fine-tuning, 224 px, {RAND_AUGMENT}": _compare(_finetuning(folder, Path(home) / "packed"), rounds),
        }
        for task, speeds in results.items():
            echo(format_speeds(task, speeds))
        echo(format_bytes())
        echo(format_losses(folder, Path(home) / "packed"))
        echo(format_start_up(Path(home) / "tree", files))
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
    """Build loaders of fine-tuning.

    timm erases and normalizes in its loader, or on the device in its prefetcher; this project does it on the device.
    """

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


def _compare(loaders: dict[str, Batches], rounds: int) -> Speeds:
    """Measure images per CPU second; loaders take turns batch by batch, so disturbances affect all of them."""
    speeds: Speeds = {name: [] for name in loaders}
    for batches in loaders.values():  # warm up
        next(batches)
    for _ in tqdm(range(rounds), unit="round", disable=None):
        for name, batches in loaders.items():
            begin = time.process_time()
            count = next(batches)
            speeds[name].append(count / (time.process_time() - begin))
    return speeds


def format_speeds(task: str, speeds: Speeds) -> str:
    """Format medians, and the medians and quartiles of the ratios within each round."""
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
    """Format the bytes that are sent to the device per image of pretraining."""
    official = sum(t.nbytes for t in (torch.zeros(3, 192, 192), torch.zeros(48, 48, dtype=torch.int64))) + 8
    ours = torch.zeros(3, 192, 192, dtype=torch.uint8).nbytes + 16
    return f"bytes to the device per image at 192 px: official {official:,}, simmim {ours:,} ({official / ours:.2f}x)"


def format_losses(folder: Path, packed: Path) -> str:
    """Format the PSNR of packed images, and of large JPEGs that are downscaled while decoding, in dB."""
    raw, small, crop = open_images(folder), open_images(packed), RandomCrop((192, 192), SCALE)
    draws = uniform(
        "crop", 0, torch.zeros(len(raw), dtype=torch.int64), torch.arange(len(raw)), crop.num_draws
    ).tolist()
    packed_losses, reduced_losses, ratios = [], [], []
    for index in range(0, len(raw), 5):  # complete images, because crops of resized images start at other positions
        pair = [images.decode(images.fetch(index)) for images in (raw, small)]
        packed_losses.append(psnr(*(image.crop((0, 0, *image.size), (192, 192)) for image in pair)))
    for index in range(0, len(raw), 25):
        content = _enlarged(raw.fetch(index))
        begin = time.process_time()
        reduced = crop(Decoder()(content), draws[index])
        middle = time.process_time()
        full = crop(TensorImage(full_image(Decoder()(content))), draws[index])
        ratios.append((time.process_time() - middle) / (middle - begin))
        reduced_losses.append(psnr(full, reduced))
    return (
        f"packed images against originals, at 192 px: median {statistics.median(packed_losses):.1f} dB, "
        f"minimum {min(packed_losses):.1f}\n"
        f"JPEGs of 12 megapixels downscaled while decoding: median {statistics.median(reduced_losses):.1f} dB, "
        f"minimum {min(reduced_losses):.1f}; {statistics.median(ratios):.1f} x faster than full decoding"
    )


def psnr(a: Tensor, b: Tensor) -> float:
    """Return the peak signal-to-noise ratio of two uint8 images, dB."""
    return 10 * float(np.log10(255**2 / max(1e-9, (a.float() - b.float()).square().mean().item())))


def _enlarged(content: Any) -> bytes:
    """Enlarge a photograph to 12 megapixels."""
    with Image.open(io.BytesIO(content)) as image:
        file = io.BytesIO()
        image.convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
        return file.getvalue()


def format_start_up(tree: Path, files: int) -> str:
    """Measure and format the seconds to open a tree of ``files`` files in folders of 1000."""
    for index in tqdm(range(files), unit="file", desc="start-up: creating files", disable=None):
        if index % 1000 == 0:
            folder = tree / f"n{index // 1000:05d}"
            folder.mkdir(parents=True)
        (folder / f"{index:08d}.jpg").touch()
    for folder in [tree, *tree.iterdir()]:
        os.utime(folder, (1e9, 1e9))  # recently modified folders are always listed again, so make them look old
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
    """Mask 60 % of 6 x 6 patches of 32 px, in tokens of 4 px."""
    mask = np.zeros(36, dtype=int)
    mask[np.random.permutation(36)[:22]] = 1
    return image, mask.reshape(6, 6).repeat(8, axis=0).repeat(8, axis=1)


@contextmanager
def _own_cache(home: Path) -> Iterator[None]:
    """Use a temporary cache instead of the user's."""
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
