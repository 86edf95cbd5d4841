"""The modules: views, labels, prototypes as state, the learned temperature."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from clop_kernels import CLOPLoss, NTXentLoss, SupConLoss, clop_loss, ntxent_loss, supcon_loss

A, B = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, -1, 0, 1])


def test_views_stacked_or_apart() -> None:
    criterion = CLOPLoss(3, 8, temperature=0.2, prototype_weight=0.5, distance="euclidean", dtype=torch.float64)
    options = {"temperature": 0.2, "prototype_weight": 0.5, "distance": "euclidean"}
    expected = clop_loss(torch.cat([A, B]), LABELS, criterion.prototypes, **options)  # type: ignore[arg-type]
    assert criterion(A, B, labels=LABELS) == expected
    assert criterion(A, B, LABELS) == expected  # the published module's order
    assert criterion(torch.cat([A, B]), labels=LABELS) == expected
    assert criterion(torch.cat([A, B]), labels=LABELS, n_views=2) == expected
    three = criterion(A, B, A, labels=LABELS)
    assert three == criterion(torch.cat([A, B, A]), labels=LABELS, n_views=3) != expected
    assert criterion(A, B) == criterion(A, B, labels=torch.full((6,), -1)) == ntxent_loss(torch.cat([A, B]), temperature=0.2)


def test_ntxent_and_supcon() -> None:
    assert NTXentLoss(0.3)(A, B) == ntxent_loss(torch.cat([A, B]), temperature=0.3)
    assert NTXentLoss(reduction="none")(A, B).shape == (12,)
    assert SupConLoss(0.3)(A, labels=LABELS) == supcon_loss(A, LABELS, temperature=0.3)
    assert SupConLoss(0.3)(A, LABELS) == supcon_loss(A, LABELS, temperature=0.3)
    assert SupConLoss(0.3)(A, B, labels=LABELS) == supcon_loss(torch.cat([A, B]), LABELS, n_views=2, temperature=0.3)
    assert NTXentLoss(backend="reference")(A, B) == ntxent_loss(torch.cat([A, B]), backend="reference")


@pytest.mark.parametrize("learnable", [False, True])
def test_state_survives(learnable: bool) -> None:
    criterion = CLOPLoss(3, 8, learnable_temperature=learnable, dtype=torch.float64)
    expected = criterion(A, B, labels=LABELS)
    assert set(criterion.state_dict()) == {"prototypes"} | ({"log_temperature"} if learnable else set())
    other = CLOPLoss(3, 8, learnable_temperature=learnable, dtype=torch.float64)
    assert other(A, B, labels=LABELS) != expected
    other.load_state_dict(criterion.state_dict())
    buffer = io.BytesIO()
    torch.save(criterion, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    for clone in (other, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), saved):
        assert clone(A, B, labels=LABELS) == expected
    moved = copy.deepcopy(criterion).to(torch.float32)
    assert moved.prototypes.dtype == torch.float32
    assert criterion.to("meta").prototypes.device.type == "meta"


def test_prototypes() -> None:
    seeded = [CLOPLoss(3, 8, generator=torch.Generator().manual_seed(5)).prototypes for _ in range(2)]
    assert torch.equal(*seeded)
    torch.testing.assert_close(seeded[0] @ seeded[0].T, torch.eye(3))
    simplex = CLOPLoss(9, 8, prototypes="simplex").prototypes
    assert (simplex @ simplex.T - torch.eye(9)).sum(1).allclose(torch.tensor(-1.0))
    own = torch.randn(3, 8)
    criterion = CLOPLoss(3, 8, prototypes=own)
    own.zero_()
    assert criterion.prototypes.any()  # a copy
    assert list(criterion.parameters()) == []
    assert not criterion.prototypes.requires_grad


def test_learned_temperature() -> None:
    criterion = NTXentLoss(0.2, learnable_temperature=True)
    torch.testing.assert_close(criterion.temperature, torch.tensor(0.2))
    assert [name for name, _ in criterion.named_parameters()] == ["log_temperature"]
    optimiser = torch.optim.SGD(criterion.parameters(), lr=5.0)
    for _ in range(3):
        optimiser.zero_grad()
        criterion(A.float(), B.float()).backward()
        optimiser.step()
    assert criterion.temperature > 0
    assert NTXentLoss(0.2).temperature == 0.2


def test_repr() -> None:
    text = repr(CLOPLoss(3, 8, learnable_temperature=True))
    assert "num_classes=3, embedding_dim=8" in text
    assert "temperature=0.1 (learned)" in text
    assert "NTXentLoss(temperature=0.5, n_views=2" in repr(NTXentLoss(0.5))
