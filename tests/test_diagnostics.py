"""Diagnostics on configurations whose figures are known, and the learning-rate model on both sides of its threshold."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

import clop_kernels
from clop_kernels import collapse_report, critical_learning_rate, diagnostics, reference


def test_effective_rank() -> None:
    assert diagnostics.effective_rank(torch.eye(7)) == pytest.approx(7)
    assert diagnostics.effective_rank(torch.eye(3).repeat(10, 1) * 5) == pytest.approx(3)
    assert diagnostics.effective_rank(torch.ones(9, 4)) == pytest.approx(1)
    assert diagnostics.effective_rank(torch.zeros(2, 2)) == 0


def test_mean_resultant_length() -> None:
    row = torch.randn(1, 5)
    assert diagnostics.mean_resultant_length(row.repeat(4, 1)) == pytest.approx(1)
    assert diagnostics.mean_resultant_length(torch.cat([row, -3 * row])) == pytest.approx(0, abs=1e-7)


def test_prototypes() -> None:
    c = torch.eye(3, 5)
    z = torch.stack([c[0], 2 * c[1], c[0] + c[2], c[1] + 2 * c[0], torch.eye(5)[4]])
    labels = torch.tensor([0, 1, 2, 1, -1])
    assert diagnostics.prototype_alignment(z, labels, c) == pytest.approx((1 + 1 + 0.5**0.5 + 0.2**0.5) / 4)
    assert diagnostics.nearest_prototype_accuracy(z[:2], labels[:2], c) == 1
    assert diagnostics.nearest_prototype_accuracy(z[[0, 1, 3]], labels[[0, 1, 3]], c) == pytest.approx(2 / 3)


def test_report() -> None:
    z, labels, c = torch.randn(20, 6), torch.randint(-1, 3, (20,)), torch.eye(3, 6)
    report = collapse_report(z.bfloat16(), labels, c)
    numbers = json.loads(json.dumps(report.as_dict()))
    assert numbers["n_rows"] == 20
    assert 1 <= numbers["effective_rank"] <= 6
    assert "nearest-prototype accuracy" in str(report)
    assert collapse_report(z).prototype_alignment is None
    assert "prototype" not in str(collapse_report(z))


@pytest.mark.parametrize("norm", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9, 1.1, 1.5])
def test_critical_learning_rate_is_where_the_mean_stops_contracting(share: float, reduction: str, norm: float) -> None:
    """A step of the real loss on nearly uniform embeddings with merged positives, below and above the threshold."""
    tau, n_instances, width = 4.0, 400, 800
    u = F.normalize(torch.randn(n_instances, width, dtype=torch.float64) + 0.1 / width**0.5, dim=1) * norm
    z = u.repeat(2, 1).requires_grad_()
    reference.clop_loss(z, temperature=tau, reduction=reduction).backward()
    assert z.grad is not None
    mu = share * critical_learning_rate(tau, 2 * n_instances, reduction, norm)
    before, after = z.detach().mean(0), (z.detach() - mu * z.grad).mean(0)
    assert float(after.norm() / before.norm()) == pytest.approx(abs(1 - 2 * share), abs=0.05)
    assert (after.norm() < before.norm()) == (share < 1)


def test_critical_learning_rate_values() -> None:
    assert critical_learning_rate(0.1, reduction="sum") == pytest.approx(0.1)
    assert critical_learning_rate(0.1, 256) == pytest.approx(25.6)
    assert clop_kernels.critical_learning_rate(0.5, 10, "mean", 2.0) == pytest.approx(20.0)
