"""Probes of frozen features: k-NN, few-shot, linear, effective rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from einops import reduce
from torch import Tensor
from tqdm import tqdm

from simmim.data import CenterCrop, Decoder, LabelledSource, MiddleClip, evaluation_batches, labelled_sources
from simmim.data.loader import Batches
from simmim.data.transforms import Transform
from simmim.evaluation.classification import builtin_kind
from simmim.export.export import Export, open_export
from simmim.metrics.probes import effective_rank, few_shot, knn, linear, require_scikit_learn
from simmim.tasks.classification import Classification
from simmim.training.distributed import make_accelerator
from simmim.training.engine import to_device
from swin import SwinConfig, VideoConfig


def probe(
    source: Export | Path | str,
    data: str,
    *,
    batch_size: int = 64,
    num_workers: int = 2,
    precision: str | None = None,
    **sizes: Any,
) -> list[dict[str, Any]]:
    """Probe the features of every stage of a frozen encoder: k-NN, few-shot ridge, linear probe, effective rank.

    The last stage of a masked autoencoder rarely has the best features.

    Args:
        source: an export, or a checkpoint of another project.
        data: labelled data, or builtin:shapes.
        sizes: ``image_size`` and ``window_size``, as for :func:`swin.load_encoder`.

    Returns:
        One row for each stage of the encoder, ``stage 1`` and so on, with features pooled over the image; and one for
        ``final norm``, the output of :meth:`SwinEncoder.forward`.

    Raises:
        ValueError: data without labels, or an encoder that cannot be read.
    """
    export = open_export(source)
    accelerator = make_accelerator(precision)
    if accelerator.num_processes > 1:
        raise ValueError("probes run in one process: start simmim probe without accelerate launch")
    require_scikit_learn()
    encoder = export.encoder(**sizes)
    config = encoder.config
    training, validation = _labelled_pair(data, config, export.make_decoder(config))
    task = Classification(encoder, list(training.classes), mean=export.mean, std=export.std)
    task.to(accelerator.device).eval()
    crop = CenterCrop(config.image_size, "bicubic")
    view: Transform = crop
    if isinstance(config, VideoConfig):
        view = MiddleClip(crop, config.frames, export.video.get("stride", 1))
    options: dict[str, Any] = {"batch_size": batch_size, "labelled": True, "num_workers": num_workers}
    known, labels = _features(task, evaluation_batches(training, view, **options), accelerator)
    new, new_labels = _features(task, evaluation_batches(validation, view, **options), accelerator)
    rows = []
    for stage, features in known.items():
        split = (features, labels, new[stage], new_labels)
        rows.append(
            {
                "stage": stage,
                "features": features.shape[1],
                "knn": knn(*split),
                "few_shot": few_shot(*split),
                "linear": linear(*split),
                "effective_rank": effective_rank(features),
            }
        )
    return rows


def format_probe(rows: Sequence[dict[str, Any]]) -> str:
    """Format the result of :func:`probe` as a table: accuracies in percent, few-shot as the mean over its seeds."""
    ks, labels_per_class = rows[0]["knn"], rows[0]["few_shot"]
    head = ["stage", "features", *(f"{k}-NN" for k in ks), *(f"{n}-shot" for n in labels_per_class), "linear", "rank"]
    lines = [head]
    for row in rows:
        few = [f"{100 * sum(row['few_shot'][n]) / len(row['few_shot'][n]):.1f}" for n in labels_per_class]
        near = [f"{100 * row['knn'][k]:.1f}" for k in ks]
        lines.append(
            [
                row["stage"],
                str(row["features"]),
                *near,
                *few,
                f"{100 * row['linear']:.1f}",
                f"{row['effective_rank']:.0f}",
            ]
        )
    return "\n".join(f"{line[0]:<12}" + "".join(f"{text:>10}" for text in line[1:]) for line in lines)


def _labelled_pair(data: str, config: SwinConfig, decoder: Decoder) -> tuple[LabelledSource, LabelledSource]:
    size, channels = config.image_size, config.in_chans
    if data == "builtin:shapes":
        make = builtin_kind(config)
        return make(2000, size, channels), make(500, size, channels, validation=True)
    return labelled_sources(data, decoder, 5000)


@torch.no_grad()
def _features(task: Classification, batches: Batches, accelerator: Accelerator) -> tuple[dict[str, Tensor], Tensor]:
    """Compute the features of every stage, pooled over the image, and collect the labels."""
    found: dict[str, list[Tensor]] = {}
    labels = []
    for batch in tqdm(batches, total=len(batches), unit="batch"):
        images = to_device(batch, accelerator.device)
        with accelerator.autocast():
            maps = task.encoder.pyramid(task.normalize(images["image"]))
            final = task.encoder.norm(maps[-1].movedim(1, -1))
        for index, stage in enumerate(maps, start=1):
            found.setdefault(f"stage {index}", []).append(reduce(stage.float(), "b c ... -> b c", "mean"))
        found.setdefault("final norm", []).append(reduce(final.float(), "b ... c -> b c", "mean"))
        labels.append(images["label"])
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(labels)
