"""Probes against independent implementations on random features."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from simmim.metrics.probes import effective_rank, few_shot, knn, linear, ridge


@pytest.fixture(params=[(60, 40), (300, 12)], ids=["few images", "few features"])
def task(request):
    """Features with weak class means, so that accuracies are far from 0 and 1 and a wrong rule shows."""
    images, features = request.param
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % 4
    new_labels = torch.randint(0, 4, (200,), generator=generator)
    means = 0.6 * torch.randn(4, features, generator=generator)
    scale = torch.rand(features, generator=generator) * 3 + 0.1  # so that standardization matters
    x = (means[labels] + torch.randn(images, features, generator=generator)) * scale + 5
    new = (means[new_labels] + torch.randn(200, features, generator=generator)) * scale + 5
    return x, labels, new, new_labels


def test_knn_equals_scikit_learn(task):
    x, labels, new, new_labels = task
    ours = knn(x, labels, new, new_labels, ks=(1, 10, 20, 1000))
    assert set(ours) == {1, 10, 20}  # k is at most the number of images
    for k, accuracy in ours.items():
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        theirs.fit(x.double().numpy(), labels.numpy())
        assert accuracy == pytest.approx(theirs.score(new.double().numpy(), new_labels.numpy()))
    assert 0.3 < ours[10] < 0.98


def standardized(x: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, new = x.double(), new.double()
    return tuple((part - x.mean(dim=0)) / x.std(dim=0, correction=0) for part in (x, new))


def test_ridge_equals_the_closed_form(task):
    x, labels, new, new_labels = task
    x, new = (F.pad(part, (0, 1), value=100.0) for part in standardized(x, new))
    targets = 2 * F.one_hot(labels).double() - 1
    weights = torch.linalg.solve(x.T @ x + 2.0**10 * torch.eye(x.shape[1]).double(), x.T @ targets)
    expected = ((new @ weights).argmax(dim=1) == new_labels).double().mean().item()
    assert ridge(*task) == pytest.approx(expected)
    assert 0.3 < expected < 0.98


@pytest.mark.parametrize("classes", [2, 4])
def test_linear_equals_the_minimum_found_by_lbfgs(task, classes):
    x, labels, new, new_labels = task
    labels, new_labels = labels % classes, new_labels % classes
    scaled, scaled_new = standardized(x, new)
    weights = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights, bias], max_iter=500, history_size=20, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(scaled @ weights + bias, labels) + 1e-3 / 2 * weights.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    expected = ((scaled_new @ weights + bias).argmax(dim=1) == new_labels).double().mean().item()
    assert linear(x, labels, new, new_labels) == pytest.approx(expected, abs=0.006)  # one of 200 images may differ
    assert 0.3 < expected < 0.98


def test_missing_scikit_learn_raises_with_install_command(task, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    for probe in (ridge, linear):
        with pytest.raises(ValueError, match=r"pip install 'simmim\[probe\]'"):
            probe(*task)
    assert knn(*task, ks=(1,)) and effective_rank(task[0]) > 1  # these need no scikit-learn


def test_few_shot_uses_the_given_number_of_labels_per_class(task, monkeypatch):
    x, labels, new, new_labels = task
    seen = []

    def spy(train, train_labels, *rest):
        seen.append((train_labels.bincount(minlength=4).tolist(), train))
        return 0.5

    monkeypatch.setattr("simmim.metrics.probes.ridge", spy)
    results = few_shot(x, labels, new, new_labels, labels_per_class=(1, 5, 1000), seeds=3)
    assert {count: len(accuracies) for count, accuracies in results.items()} == {1: 3, 5: 3}
    assert [counts for counts, _ in seen] == [[1] * 4] * 3 + [[5] * 4] * 3
    assert not torch.equal(seen[3][1], seen[4][1])  # another seed selects other images


def test_effective_rank():
    generator = torch.Generator().manual_seed(0)
    orthogonal, _ = torch.linalg.qr(torch.randn(50, 8, generator=generator))
    assert effective_rank(orthogonal) == pytest.approx(8, rel=1e-4)
    assert effective_rank(orthogonal[:, :1].expand(50, 8)) == pytest.approx(1, rel=1e-3)
    fractions = torch.tensor([0.5, 0.25, 0.25, 0, 0, 0, 0, 0])
    assert effective_rank(orthogonal * fractions) == pytest.approx(math.exp(1.5 * math.log(2)), rel=1e-3)
