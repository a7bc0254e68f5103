"""Probes against scikit-learn on random features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from simmim.metrics.probes import effective_rank, few_shot, knn, linear, ridge


@pytest.fixture(params=[(60, 40), (300, 12)], ids=["few images", "few features"])
def task(request):
    """Weak class means: accuracies far from 0 and 1, so that a wrong rule shows."""
    images, features = request.param
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % 4
    new_labels = torch.randint(0, 4, (200,), generator=generator)
    means = 0.6 * torch.randn(4, features, generator=generator)
    scale = torch.rand(features, generator=generator) * 3 + 0.1  # standardising matters
    x = (means[labels] + torch.randn(images, features, generator=generator)) * scale + 5
    new = (means[new_labels] + torch.randn(200, features, generator=generator)) * scale + 5
    return x, labels, new, new_labels


def test_knn(task):
    x, labels, new, new_labels = task
    ours = knn(x, labels, new, new_labels, ks=(1, 10, 20, 1000))
    assert set(ours) == {1, 10, 20}  # no more neighbours than images
    for k, accuracy in ours.items():
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        theirs.fit(x.double().numpy(), labels.numpy())
        assert accuracy == pytest.approx(theirs.score(new.double().numpy(), new_labels.numpy()))
    assert 0.3 < ours[10] < 0.98


def test_ridge(task):
    x, labels, new, new_labels = (part.numpy() for part in task)
    scaler = StandardScaler().fit(x.astype(np.float64))
    theirs = Ridge(alpha=2.0**10, fit_intercept=False)
    constant = [
        np.pad(scaler.transform(part.astype(np.float64)), ((0, 0), (0, 1)), constant_values=100) for part in (x, new)
    ]
    theirs.fit(constant[0], 2 * np.eye(4)[labels] - 1)
    expected = (theirs.predict(constant[1]).argmax(axis=1) == new_labels).mean()
    assert ridge(*task) == pytest.approx(expected)
    assert 0.3 < expected < 0.98


def test_linear(task):
    x, labels, new, new_labels = (part.numpy() for part in task)
    scaler = StandardScaler().fit(x.astype(np.float64))
    theirs = LogisticRegression(C=1 / (1e-3 * len(x)), tol=1e-8, max_iter=10_000)
    theirs.fit(scaler.transform(x.astype(np.float64)), labels)
    expected = theirs.score(scaler.transform(new.astype(np.float64)), new_labels)
    assert linear(*task) == pytest.approx(expected, abs=0.006)  # one of 200 images on the border
    assert 0.3 < expected < 0.98


def test_few_shot_takes_that_many_of_every_class(task, monkeypatch):
    x, labels, new, new_labels = task
    seen = []

    def spy(train, train_labels, *rest):
        seen.append((train_labels.bincount(minlength=4).tolist(), train))
        return 0.5

    monkeypatch.setattr("simmim.metrics.probes.ridge", spy)
    results = few_shot(x, labels, new, new_labels, labels_per_class=(1, 5, 1000), seeds=3)
    assert {count: len(accuracies) for count, accuracies in results.items()} == {1: 3, 5: 3}
    assert [counts for counts, _ in seen] == [[1] * 4] * 3 + [[5] * 4] * 3
    assert not torch.equal(seen[3][1], seen[4][1])  # another seed, other images


def test_effective_rank():
    generator = torch.Generator().manual_seed(0)
    orthogonal, _ = torch.linalg.qr(torch.randn(50, 8, generator=generator))
    assert effective_rank(orthogonal) == pytest.approx(8, rel=1e-4)
    assert effective_rank(orthogonal[:, :1].expand(50, 8)) == pytest.approx(1, rel=1e-3)
    shares = torch.tensor([0.5, 0.25, 0.25, 0, 0, 0, 0, 0])
    assert effective_rank(orthogonal * shares) == pytest.approx(math.exp(1.5 * math.log(2)), rel=1e-3)
