"""Evaluation of frozen features without a training loop: k-NN, ridge and linear probes, effective rank.

Features are float ``(n, d)``, labels int64 ``(n,)``, and accuracies are fractions of the test images. All probes
compute in float64. The ridge and linear probes are scikit-learn models and run on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def require_scikit_learn() -> None:
    """Check that scikit-learn is installed, before features are computed.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"the ridge and linear probes need scikit-learn ({error}): pip install 'simmim[probe]'"
        ) from None


def knn(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[int, float]:
    """Return the accuracy of a weighted vote among the k nearest training images by cosine similarity, for each k.

    Votes have the weight ``exp(cosine / temperature)``, as in the DINO papers (arXiv 2104.14294). Values of k above
    the number of training images are left out.
    """
    train, test = F.normalize(train.double(), dim=1), F.normalize(test.double(), dim=1)
    ks = [k for k in ks if k <= len(train)]
    correct = dict.fromkeys(ks, 0)
    if not ks:
        return {}
    one_hot = F.one_hot(train_labels).double()
    for features, labels in zip(test.split(1024), test_labels.split(1024), strict=True):
        nearest = (features @ train.T).topk(max(ks), dim=1)
        votes = one_hot[nearest.indices] * ((nearest.values - 1) / temperature).exp()[..., None]
        for k in ks:
            correct[k] += int((votes[:, :k].sum(dim=1).argmax(dim=1) == labels).sum())
    return {k: count / len(test) for k, count in correct.items()}


def ridge(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, l2: float = 2.0**10, bias: float = 100.0
) -> float:
    """Return the accuracy of a ridge classifier: few-shot evaluation as in Big Vision.

    Features are standardized with the training images and get a constant column ``bias``; targets are 1 for the
    class and -1 for the others; the weights minimize ``|x w - y|^2 + l2 |w|^2``.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    require_scikit_learn()
    from sklearn.linear_model import RidgeClassifier

    x, new = (F.pad(features, (0, 1), value=bias) for features in _standardize(train, test))
    return _accuracy(RidgeClassifier(alpha=l2, fit_intercept=False), x, train_labels, new, test_labels)


def few_shot(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    labels_per_class: Sequence[int] = (1, 5, 10, 25),
    seeds: int = 3,
) -> dict[int, list[float]]:
    """Return the accuracies of :func:`ridge`, one per seed, for several numbers of labels per class.

    Numbers above the size of the smallest class are left out.
    """
    smallest = int(train_labels.bincount().min())
    results: dict[int, list[float]] = {}
    for count in (count for count in labels_per_class if count <= smallest):
        for seed in range(seeds):
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(train_labels.device)
            rank = F.one_hot(train_labels[order]).cumsum(dim=0).gather(1, train_labels[order, None])[:, 0]
            chosen = order[rank <= count]
            accuracy = ridge(train[chosen], train_labels[chosen], test, test_labels)
            results.setdefault(count, []).append(accuracy)
    return results


def linear(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, l2: float = 1e-3) -> float:
    """Return the accuracy of multinomial logistic regression on standardized features, solved to convergence.

    It minimizes the mean cross-entropy plus ``l2 / 2 |w|^2``; the bias is not regularized. The solution is unique
    and needs no learning rate. The standardization corresponds to the BatchNorm without weights in the linear probe
    of MAE (arXiv 2111.06377).

    Raises:
        ValueError: scikit-learn is not installed.
    """
    require_scikit_learn()
    from sklearn.linear_model import LogisticRegression

    x, new = _standardize(train, test)
    # scikit-learn minimizes C times the summed cross-entropy plus |w|^2 / 2. For two classes it has one weight vector,
    # the difference of the two of the multinomial model, whose penalty is half as large.
    scale = 2 if len(train_labels.unique()) == 2 else 1
    model = LogisticRegression(C=scale / (l2 * len(x)), tol=1e-7, max_iter=10_000)
    return _accuracy(model, x, train_labels, new, test_labels)


def effective_rank(features: Tensor) -> float:
    """Compute RankMe (arXiv 2210.02885): the exponential of the entropy of the singular values, without labels."""
    values = torch.linalg.svdvals(features.double())
    fractions = values / values.sum() + 1e-7
    return float((-fractions * fractions.log()).sum().exp())


def _standardize(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    train, test = train.double(), test.double()
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0).clamp(min=1e-8)
    return (train - mean) / std, (test - mean) / std


def _accuracy(model: Any, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Fit a scikit-learn classifier and return its accuracy on the test features."""
    model.fit(train.cpu().numpy(), train_labels.cpu().numpy())
    return float(model.score(test.cpu().numpy(), test_labels.cpu().numpy()))
