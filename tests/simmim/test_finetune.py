"""Fine-tuning: who learns how fast, what is done to images and labels, where the classifier comes from."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from safetensors.torch import save_file

import swin
from simmim.data import RandAugmentedCrop, Shapes, limit_labels
from simmim.data.transforms import preserve_global_rng
from simmim.export.classifier import (
    ClassifierHead,
    load_classifier_head,
    map_classifier_head,
    save_classifier,
)
from simmim.export.export import open_export
from simmim.tasks.classification import Classification
from simmim.training.optim import make_lr, make_optimizer

STATISTICS = {"mean": [0.5] * 3, "std": [0.25] * 3}


def make_classifier(classes=4, **settings) -> Classification:
    torch.manual_seed(0)
    encoder = swin.make_encoder(
        "swinv2_tiny", embed_dim=8, depths=(2, 2), num_heads=(1, 2), image_size=32, window_size=4
    )
    return Classification(encoder, [f"class {number}" for number in range(classes)], **STATISTICS, **settings)


def official_layer(name: str, depths: tuple[int, ...]) -> int:
    """The rule of the official SimMIM fine-tuning, read off its layers' names."""
    if name.startswith("encoder.patch_embed"):
        return 0
    if name.startswith("encoder.layers"):
        _, _, stage, kind, *rest = name.split(".")
        before = sum(depths[: int(stage)])
        return before + int(rest[0]) + 1 if kind == "blocks" else before + depths[int(stage)]
    return sum(depths) + 1


@pytest.mark.parametrize(("size", "decay"), [("swin_base", 0.9), ("swinv2_base", 0.75)])
def test_every_layer_learns_at_the_official_rate(size, decay):
    with torch.device("meta"):
        model = Classification(swin.make_encoder(size), ["a", "b"], **STATISTICS)
        optimizer = make_optimizer(
            model,
            model.no_decay_parameters(),
            weight_decay=0.05,
            betas=(0.9, 0.999),
            eps=1e-8,
            layer_decay=decay,
            depths=model.depth_of_parameters(),
        )
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    # The official code means to spare position biases and temperatures too; in fine-tuning it does.
    spared = ("cpb_mlp", "logit_scale", "relative_position_bias")
    depths = model.encoder.config.depths
    for name, parameter in model.named_parameters():
        group = found[id(parameter)]
        scale = decay ** (sum(depths) + 1 - official_layer(name, depths))
        assert group["lr_scale"] == pytest.approx(scale, rel=1e-12), name
        is_decayed = parameter.ndim > 1 and not any(word in name for word in spared)
        assert group["weight_decay"] == (0.05 if is_decayed else 0.0), name
    assert len({group["lr_scale"] for group in optimizer.param_groups}) == sum(depths) + 2


def test_no_layer_ends_above_its_own_rate():
    """The official floor is the same for all layers: with a decay of 0.7 the first rise to it, 1e-6 from 6.7e-7."""
    lr_at = make_lr(
        "cosine",
        batch_size=2048,
        steps_per_epoch=10,
        total_steps=1000,
        base_lr=1.25e-3,
        warmup_epochs=20,
        warmup_lr=2.5e-7,
        min_lr=2.5e-7,
    )
    scale = 0.7**25
    assert 5e-3 * scale < 1e-6  # the trap is there
    rates = [lr_at(step) * scale for step in range(200, 1001)]
    assert rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(5e-3 * scale)


def test_mixing_and_erasing_apply_to_training_only():
    batch = {"image": torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), "label": torch.arange(8) % 4}
    plain = make_classifier()
    with torch.no_grad():
        expected = F.cross_entropy(plain.logits(plain.normalize(batch["image"])), batch["label"])
        for settings in ({"mixup": 0.8}, {"cutmix": 1.0}, {"erasing": 1.0}, {"label_smoothing": 0.5}):
            model = make_classifier(**settings)
            model.head.weight.mul_(50)  # or everything is as uncertain as everything else
            plain.head.weight.copy_(model.head.weight)
            expected = F.cross_entropy(plain.logits(plain.normalize(batch["image"])), batch["label"])
            assert not torch.isclose(model.train()(batch), expected), settings
            assert model.eval().eval_step(batch)["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_mixing_is_tied_to_the_seed_of_the_step():
    batch = {"image": torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), "label": torch.arange(8) % 4}
    model = make_classifier(mixup=0.8, cutmix=1.0, erasing=0.5).train()
    with torch.no_grad():
        model.head.weight.mul_(50)
    losses = []
    for seed in (1, 2, 1):
        set_seed(seed)
        losses.append(model(batch).item())
    assert losses[0] == losses[2] != losses[1]


def test_mixed_labels_are_smoothed_once():
    model = make_classifier(mixup=1e-9, label_smoothing=0.2).train()  # lambda 0 or 1: nothing is mixed
    batch = {"image": torch.full((2, 3, 32, 32), 90, dtype=torch.uint8), "label": torch.tensor([1, 1])}
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([0.0, 3.0, 1.0, -1.0]))
        logits = model.logits(model.normalize(batch["image"]))
        assert model(batch).item() == pytest.approx(
            F.cross_entropy(logits, batch["label"], label_smoothing=0.2).item(), rel=1e-5
        )


def test_measures():
    model = make_classifier(classes=7)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([9.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]))
    batch = {"image": torch.zeros(4, 3, 32, 32, dtype=torch.uint8), "label": torch.tensor([0, 4, 5, 6])}
    numbers = {name: float(value) for name, value in model.eval_step(batch).items()}
    assert (numbers["top1"], numbers["top5"]) == (0.25, 0.5)
    assert numbers["certain_of_another"] == 0.75


def test_rand_augment_is_a_function_of_its_draws():
    transform = RandAugmentedCrop((32, 32), rand_augment="rand-m9-mstd0.5-inc1", mean=[0.5] * 3, scale=(0.5, 1.0))
    image = Shapes(1, (48, 48)).decode(0)
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(12, transform.num_draws, generator=generator, dtype=torch.float64)
    random.seed(3)
    np.random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist()
    with preserve_global_rng():
        first = [transform(image, u) for u in draws.tolist()]
    assert before == (random.getstate(), np.random.get_state()[1].tolist())  # the step's own draws are untouched
    random.seed(4)
    assert all(torch.equal(a, transform(image, u)) for a, u in zip(first, draws.tolist(), strict=True))
    assert all(a.shape == (3, 32, 32) and a.dtype == torch.uint8 for a in first)
    other = draws.clone()
    other[:, -1] = 1 - other[:, -1]  # the same crops
    assert sum(not torch.equal(a, transform(image, u)) for a, u in zip(first, other.tolist(), strict=True)) > 6


def test_few_labels():
    source = Shapes(400, (8, 8))
    chosen = limit_labels(source, 5, seed=1)
    labels = [chosen.label(number) for number in range(len(chosen))]
    assert sorted(labels) == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    names = {chosen.name(number) for number in range(len(chosen))}
    assert len(names) == 20
    again, other = limit_labels(source, 5, seed=1), limit_labels(source, 5, seed=2)
    assert names == {again.name(number) for number in range(20)} != {other.name(number) for number in range(20)}
    with pytest.raises(ValueError, match=r"has \d+ images, but labels_per_class is 300: lower it"):
        limit_labels(source, 300, seed=0)


def wide(classes: int) -> ClassifierHead:
    return ClassifierHead(
        torch.randn(classes, 16), torch.randn(classes), [f"class {number}" for number in range(classes)]
    )


def test_the_classifier_is_taken_over(tmp_path):
    model, old = make_classifier(), wide(4)
    load_classifier_head(model.head, old, model.classes, "there")
    assert torch.equal(model.head.weight, old.weight) and torch.equal(model.head.bias, old.bias)
    with pytest.raises(ValueError, match="classifier of there has 9 classes, but the labels have 4: set head"):
        load_classifier_head(model.head, wide(9), model.classes, "there")
    with pytest.raises(ValueError, match="calls a class 'class 1' that the labels call 'bee'"):
        load_classifier_head(model.head, old, ["class 0", "bee", "class 2", "class 3"], "there")


def test_rows_of_a_wider_classifier(tmp_path):
    model, old = make_classifier(), wide(9)
    mapping = tmp_path / "map.txt"
    mapping.write_text("7\n0\n7\n3\n")
    map_classifier_head(model.head, old, mapping)
    assert torch.equal(model.head.weight, old.weight[[7, 0, 7, 3]])
    assert torch.equal(model.head.bias, old.bias[[7, 0, 7, 3]])
    for text, message in (
        ("1\n2\n", "has 2 indices for 4 classes"),
        ("1\n2\n3\n9\n", "names class 9, but the old classifier has 0 to 8"),
        ("a\n", "expected fresh, keep or a file of class indices"),
    ):
        mapping.write_text(text)
        with pytest.raises(ValueError, match=message):
            map_classifier_head(model.head, old, mapping)
    with pytest.raises(ValueError, match="expected fresh, keep or a file"):
        map_classifier_head(model.head, old, tmp_path / "nothing.txt")


@pytest.mark.parametrize("name", ["head", "head.fc", "classifier"])
def test_classifiers_of_other_projects(name, tmp_path):
    old = wide(9)
    save_file({f"{name}.weight": old.weight, f"{name}.bias": old.bias}, tmp_path / "model.safetensors")
    found = open_export(tmp_path / "model.safetensors").classifier_head()
    assert torch.equal(found.weight, old.weight) and torch.equal(found.bias, old.bias) and found.classes is None


def test_a_missing_or_damaged_classifier(tmp_path):
    model = make_classifier()
    swin.save_encoder(model.encoder, tmp_path, about={})
    with pytest.raises(ValueError, match="holds no classifier: give the export of a fine-tuned encoder"):
        open_export(tmp_path).classifier_head()
    save_classifier(tmp_path, model.head.state_dict())
    assert open_export(tmp_path).classifier_head().weight.shape == (4, 16)
    file = tmp_path / "classifier.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"cannot read .*classifier.safetensors"):
        open_export(tmp_path).classifier_head()
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"holds no classifier: expected head\.weight or"):
        open_export(tmp_path / "other.safetensors").classifier_head()
