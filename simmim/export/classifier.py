"""The classifier that an export may carry beside its encoder: ``classifier.safetensors`` and the class names."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swin import load_description
from swin.weights.import_weights import read_tensors
from swin.weights.serialization import DESCRIPTION

WEIGHTS = "classifier.safetensors"
HEADS = ("head", "head.fc", "classifier")  # the official code, timm, transformers


class Classifier(NamedTuple):
    """``weight (classes, features)``, ``bias (classes,)``; names only where the source knows them."""

    weight: Tensor
    bias: Tensor
    classes: list[str] | None


def save_classifier(folder: Path, head: dict[str, Tensor]) -> None:
    """Write the weights of a linear head into an export; its ``encoder.json`` holds the names under ``classes``."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in head.items()}, folder / WEIGHTS)


def load_classifier(path: Path) -> Classifier:
    """From an export with a classifier, or the file of another project.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if (path / DESCRIPTION).exists():
        if not (path / WEIGHTS).exists():
            raise ValueError(f"{path} holds no classifier: give the export of a fine-tuned encoder")
        try:
            state = load_file(path / WEIGHTS)
        except SafetensorError as error:
            raise ValueError(f"cannot read {path / WEIGHTS}: {error}") from None
        return Classifier(state["weight"], state["bias"], load_description(path).get("classes"))
    state, _ = read_tensors(path)
    for name in HEADS:
        if f"{name}.weight" in state:
            return Classifier(state[f"{name}.weight"].float(), state[f"{name}.bias"].float(), None)
    raise ValueError(f"{path} holds no classifier: expected {' or '.join(f'{name}.weight' for name in HEADS)}")


def load_classifier_head(head: nn.Linear, old: Classifier, classes: list[str], where: str) -> None:
    """Start ``head`` from a classifier of the same classes.

    Raises:
        ValueError: other classes.
    """
    if len(old.weight) != len(classes):
        raise ValueError(
            f"the classifier of {where} tells {len(old.weight)} classes, but the labels have {len(classes)}: "
            "set head to fresh, or to a file with the old number of every new class"
        )
    if old.classes is not None and old.classes != classes:
        first = next((a, b) for a, b in zip(old.classes, classes, strict=True) if a != b)
        raise ValueError(
            f"the classifier of {where} calls a class {first[0]!r} that the labels call {first[1]!r}: "
            "set head to fresh, or to a file with the old number of every new class"
        )
    head.load_state_dict({"weight": old.weight, "bias": old.bias})


def map_classifier_head(head: nn.Linear, old: Classifier, mapping: Path) -> None:
    """Start ``head`` from some rows of a wider classifier.

    Args:
        mapping: a text file; line i holds the old number of new class i (``map22kto1k.txt`` of the official code).

    Raises:
        ValueError: an unreadable file, or numbers that do not fit.
    """
    try:
        rows = [int(line) for line in mapping.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise ValueError(f"head {str(mapping)!r}: expected fresh, keep or a file of class numbers ({error})") from None
    if len(rows) != head.out_features:
        raise ValueError(f"{mapping} has {len(rows)} numbers for {head.out_features} classes: one for each is needed")
    if wrong := [row for row in rows if not 0 <= row < len(old.weight)]:
        raise ValueError(f"{mapping} names class {wrong[0]}, but the old classifier has 0 to {len(old.weight) - 1}")
    head.load_state_dict({"weight": old.weight[rows], "bias": old.bias[rows]})
