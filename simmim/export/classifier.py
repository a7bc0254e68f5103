"""Classifier heads: their file in an export, those of other projects, and starting from one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file
from torch import Tensor, nn

from swin.weights.import_weights import read_tensors

CLASSIFIER = "classifier.safetensors"
FOREIGN_NAMES = ("head", "head.fc", "classifier")
"""Name of the linear layer in the official code, timm and transformers."""


class ClassifierHead(NamedTuple):
    """The linear layer of a classifier."""

    weight: Tensor
    """``(classes, features)``"""
    bias: Tensor
    """``(classes,)``"""
    classes: list[str] | None
    """Class names; None if the source does not record them."""


def save_classifier(folder: Path, head: dict[str, Tensor]) -> None:
    """Write the weights of a linear head into an export, whose ``encoder.json`` has the names under ``classes``."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in head.items()}, folder / CLASSIFIER)


def read_foreign_classifier(path: Path) -> ClassifierHead:
    """Read the classifier head from a checkpoint of another project.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    tensors, _ = read_tensors(path)
    for name in FOREIGN_NAMES:
        if f"{name}.weight" in tensors:
            return ClassifierHead(tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float(), None)
    raise ValueError(f"{path} holds no classifier: expected {' or '.join(f'{name}.weight' for name in FOREIGN_NAMES)}")


def load_classifier_head(head: nn.Linear, old: ClassifierHead, classes: list[str], source: str) -> None:
    """Initialize ``head`` from a classifier of the same classes.

    Args:
        source: path of the old classifier, for error messages.

    Raises:
        ValueError: the classes differ.
    """
    if len(old.weight) != len(classes):
        raise ValueError(
            f"the classifier of {source} has {len(old.weight)} classes, but the labels have {len(classes)}: "
            "set head to fresh, or to a file with the old index of every new class"
        )
    if old.classes is not None and old.classes != classes:
        first = next((a, b) for a, b in zip(old.classes, classes, strict=True) if a != b)
        raise ValueError(
            f"the classifier of {source} calls a class {first[0]!r} that the labels call {first[1]!r}: "
            "set head to fresh, or to a file with the old index of every new class"
        )
    head.load_state_dict({"weight": old.weight, "bias": old.bias})


def map_classifier_head(head: nn.Linear, old: ClassifierHead, mapping: Path) -> None:
    """Initialize ``head`` from selected rows of a larger classifier.

    Args:
        mapping: a text file; line i holds the old index of new class i (``map22kto1k.txt`` of the official code).

    Raises:
        ValueError: the file is unreadable, or its indices do not fit.
    """
    try:
        rows = [int(line) for line in mapping.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise ValueError(f"head {str(mapping)!r}: expected fresh, keep or a file of class indices ({error})") from None
    if len(rows) != head.out_features:
        raise ValueError(f"{mapping} has {len(rows)} indices for {head.out_features} classes: give one for each class")
    if wrong := [row for row in rows if not 0 <= row < len(old.weight)]:
        raise ValueError(f"{mapping} names class {wrong[0]}, but the old classifier has 0 to {len(old.weight) - 1}")
    head.load_state_dict({"weight": old.weight[rows], "bias": old.bias[rows]})
