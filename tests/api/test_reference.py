"""The oracle itself, against the definition in scalar loops and against formulas that others have published."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import clop_kernels
from clop_kernels import reference
from clop_kernels.backends.contract import DISTANCES, POSITIVES

from ..support.oracle import random_problem


def by_loops(
    z: list[list[float]], labels: list[int], c: list[list[float]], n_views: int, positives: str, tau: float, distance: str
) -> list[float]:
    """Section 1 of the design, one scalar at a time: each row's contrastive and prototype term, prototype weight 0.7."""
    n, b = len(z), len(z) // n_views
    unit = [[x / max(math.hypot(*row), 1e-12) for x in row] for row in z]
    s = [[sum(x * y for x, y in zip(p, q, strict=True)) / tau for q in unit] for p in unit]
    group: list[tuple[str, int]] = []
    for i in range(n):
        label = labels[i % b]
        group.append(("label", label) if positives == "label" and label >= 0 else ("instance", i % b))
    terms = []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        same = [j for j in others if group[j] == group[i]]
        term = 0.0
        if same:
            term = math.log(sum(math.exp(s[i][j]) for j in others)) - sum(s[i][p] for p in same) / len(same)
        label = labels[i % b]
        if label >= 0:
            difference = [x - y for x, y in zip(unit[i], c[label], strict=True)]
            cosine = 1 - sum(x * y for x, y in zip(unit[i], c[label], strict=True))
            term += (
                0.7 * {"cosine": cosine, "euclidean": math.hypot(*difference), "manhattan": sum(map(abs, difference))}[distance]
            )
        terms.append(term)
    return terms


@pytest.mark.parametrize(("positives", "distance", "n_views"), [*itertools.product(POSITIVES, DISTANCES, (1, 2, 3))])
def test_agrees_with_the_definition_in_scalar_loops(positives: str, distance: str, n_views: int) -> None:
    problem = random_problem(n_views, 7, 5, temperature=0.3, positives=positives, distance=distance)
    assert problem.labels is not None
    assert problem.prototypes is not None
    expected = by_loops(
        problem.embeddings.tolist(), problem.labels.tolist(), problem.prototypes.tolist(), n_views, positives, 0.3, distance
    )

    def loss(reduction: str) -> Tensor:
        options = problem.options | {"reduction": reduction}
        return reference.clop_loss(problem.embeddings, problem.labels, problem.prototypes, temperature=0.3, **options)

    torch.testing.assert_close(loss("none"), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss("sum"), torch.tensor(sum(expected), dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_mean_is_over_each_terms_own_rows() -> None:
    problem = random_problem(1, 9, 5, positives="label")
    problem.labels[:] = torch.tensor([0, 0, 1, 1, 1, 2, -1, -1, -1])  # type: ignore[index]
    options = {k: v for k, v in problem.options.items() if k != "prototype_weight"}
    both = reference.clop_loss(problem.embeddings, problem.labels, problem.prototypes, prototype_weight=0.7, **options)
    rows = reference.clop_loss(problem.embeddings, problem.labels, None, reduction="none", **options)
    with_prototypes = reference.clop_loss(problem.embeddings, problem.labels, problem.prototypes, reduction="none", **options)
    assert torch.equal(rows != 0, torch.tensor([True] * 5 + [False] * 4))
    torch.testing.assert_close(both, rows.sum() / 5 + 0.7 * (with_prototypes - rows).sum() / 6)


def test_ntxent_is_the_cross_entropy_of_the_other_view() -> None:
    z = torch.randn(16, 6, dtype=torch.float64)
    zhat = F.normalize(z, dim=1)
    logits = (zhat @ zhat.T / 0.2).fill_diagonal_(-math.inf)
    target = torch.arange(16).roll(8)
    torch.testing.assert_close(reference.clop_loss(z, temperature=0.2), F.cross_entropy(logits, target))


def test_supcon_is_the_published_formula() -> None:
    """SupContrast's code at temperature = base_temperature: mean over all rows, each of which has a positive here."""
    z, labels, tau = torch.randn(24, 6, dtype=torch.float64), torch.arange(12) % 4, 0.2
    zhat = F.normalize(z, dim=1)
    logits = zhat @ zhat.T / tau
    logits = logits - logits.max(1, keepdim=True).values
    not_self = 1 - torch.eye(24, dtype=torch.float64)
    label = labels.repeat(2)
    mask = (label[:, None] == label[None, :]) * not_self
    log_prob = logits - (logits.exp() * not_self).sum(1, keepdim=True).log()
    expected = -((mask * log_prob).sum(1) / mask.sum(1)).mean()
    torch.testing.assert_close(reference.clop_loss(z, labels, positives="label", temperature=tau), expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_clip_is_the_cross_entropy_of_both_directions(normalize: bool) -> None:
    left, right = torch.randn(2, 9, 6, dtype=torch.float64)
    x, y = (F.normalize(side, dim=1) if normalize else side for side in (left, right))
    logits, target = x @ y.T / 0.2, torch.arange(9)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    actual = clop_kernels.clip_loss(left, right, temperature=0.2, normalize=normalize, backend="reference")
    torch.testing.assert_close(actual, expected)


def test_clip_with_labels_in_scalar_loops() -> None:
    x, y = F.normalize(torch.randn(12, 4, dtype=torch.float64), dim=1).split([5, 7])
    labels = [0, 1, 1, -1, 5], [1, 0, 0, -1, 1, 7, 0]
    s = (x @ y.T / 0.3).tolist()
    terms = []
    for own, other, row in ((labels[0], labels[1], lambda i: s[i]), (labels[1], labels[0], lambda j: [line[j] for line in s])):
        for i, label in enumerate(own):
            logits = row(i)
            same = [logit for logit, name in zip(logits, other, strict=True) if name == label >= 0]
            terms.append(math.log(sum(map(math.exp, logits))) - sum(same) / len(same) if same else 0.0)
    arguments = x, y, torch.tensor(labels[0]), torch.tensor(labels[1])

    def loss(reduction: str) -> Tensor:
        return clop_kernels.clip_loss(*arguments, temperature=0.3, reduction=reduction, backend="reference")

    torch.testing.assert_close(loss("none"), torch.tensor(terms, dtype=torch.float64))
    torch.testing.assert_close(loss("mean"), torch.tensor(sum(terms) / 8, dtype=torch.float64))  # 8 rows have positives


def test_negatives_alone_in_scalar_loops() -> None:
    z, labels = torch.randn(7, 4, dtype=torch.float64), [0, 0, 1, -1, -1, 2, 0]
    s = (F.normalize(z, dim=1) @ F.normalize(z, dim=1).T / 0.3).tolist()
    expected = [
        math.log(sum(math.exp(s[i][j]) for j in range(7) if j != i and not labels[i] == labels[j] >= 0)) for i in range(7)
    ]
    actual = clop_kernels.negative_logsumexp(z, torch.tensor(labels), temperature=0.3, backend="reference")
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_can_be_differentiated_twice() -> None:
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z: reference.clop_loss(z, temperature=0.5), z)
