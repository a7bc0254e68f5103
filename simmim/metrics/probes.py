"""How good are frozen features? Judges that need no training loop; all take float features ``(n, d)``.

Labels are int64 ``(n,)``; accuracies are shares of the test images. Everything is computed in float64
on the device of the features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def knn(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[int, float]:
    """Accuracy of a vote among the k nearest training images by cosine, weighted by ``exp(cosine / temperature)``.

    The protocol of the DINO papers (arXiv 2104.14294). A k above the number of training images is left out.
    """
    train, test = F.normalize(train.double(), dim=1), F.normalize(test.double(), dim=1)
    ks = [k for k in ks if k <= len(train)]
    right = dict.fromkeys(ks, 0)
    if not ks:
        return {}
    votes_of = F.one_hot(train_labels).double()
    for features, labels in zip(test.split(1024), test_labels.split(1024), strict=True):
        nearest = (features @ train.T).topk(max(ks), dim=1)
        votes = votes_of[nearest.indices] * ((nearest.values - 1) / temperature).exp()[..., None]
        for k in ks:
            right[k] += int((votes[:, :k].sum(dim=1).argmax(dim=1) == labels).sum())
    return {k: count / len(test) for k, count in right.items()}


def ridge(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, l2: float = 2.0**10, bias: float = 100.0
) -> float:
    """Accuracy of least squares in closed form: few-shot evaluation as in Big Vision.

    Features are standardised by the training images and get a constant column ``bias``; targets are
    1 for the class and -1 for the others; weights minimise ``|x w - y|^2 + l2 |w|^2``.
    """
    x, new = _standardise(train, test)
    x, new = F.pad(x, (0, 1), value=bias), F.pad(new, (0, 1), value=bias)
    targets = 2 * F.one_hot(train_labels).double() - 1
    if len(x) < x.shape[1]:  # the same weights from the smaller system
        weights = x.T @ torch.linalg.solve(x @ x.T + l2 * torch.eye(len(x)).to(x), targets)
    else:
        weights = torch.linalg.solve(x.T @ x + l2 * torch.eye(x.shape[1]).to(x), x.T @ targets)
    return _accuracy(new @ weights, test_labels)


def few_shot(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    labels_per_class: Sequence[int] = (1, 5, 10, 25),
    seeds: int = 3,
) -> dict[int, list[float]]:
    """:func:`ridge` on some images of every class, one accuracy per seed; shots that a class lacks are left out."""
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
    """Accuracy of multinomial logistic regression on standardised features, solved to convergence.

    It minimises the mean cross-entropy plus ``l2 / 2 |w|^2``; the bias is free. One answer, no learning
    rate: the standardisation is the BatchNorm without weights of the MAE protocol (arXiv 2111.06377).
    """
    x, new = _standardise(train, test)
    classes = int(train_labels.max()) + 1
    weights = torch.zeros(x.shape[1], classes, dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights, bias], max_iter=500, history_size=20, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weights + bias, train_labels) + l2 / 2 * weights.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return _accuracy(new @ weights.detach() + bias.detach(), test_labels)


def effective_rank(features: Tensor) -> float:
    """RankMe (arXiv 2210.02885): the exponential of the entropy of the singular values; needs no labels."""
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum() + 1e-7
    return float((-shares * shares.log()).sum().exp())


def _standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    train, test = train.double(), test.double()
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0).clamp(min=1e-8)
    return (train - mean) / std, (test - mean) / std


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(dim=1) == labels).double().mean())
