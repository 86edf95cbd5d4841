"""What only a GPU can show. Not yet run on one: each test skips, with that reason, where there is none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import clop_kernels

from .oracle import GRADIENT_TOLERANCE, random_problem, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("temperature", [0.01, 0.1])
@pytest.mark.parametrize("positives", ["instance", "label"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tiled_against_the_reference(temperature: float, positives: str, reduction: str) -> None:
    """The temperature as a tensor, which takes the online maximum, with all gradients; then as a float, which need not."""
    problem = random_problem(3, 43, 37, temperature=temperature, positives=positives, reduction=reduction)
    expected = problem.solve("reference", torch.float64)
    actual = problem.solve("tiled", torch.float32, "cuda")
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= GRADIENT_TOLERANCE, name
    assert problem.labels is not None
    assert problem.prototypes is not None
    inputs = problem.embeddings.float().cuda(), problem.labels.cuda(), problem.prototypes.float().cuda()
    loss = clop_kernels.clop_loss(*inputs, temperature=problem.temperature, backend="tiled", **problem.options)
    assert relative_error(loss.cpu(), expected["loss"]) <= GRADIENT_TOLERANCE


def test_no_host_synchronisation(no_synchronisation: None) -> None:
    z = torch.randn(64, 16, device="cuda", requires_grad=True)
    labels = torch.zeros(32, dtype=torch.int64, device="cuda")
    tau = torch.full((), 0.1, device="cuda", requires_grad=True)
    c = torch.ones(3, 16, device="cuda")
    for positives in ("instance", "label"):
        clop_kernels.clop_loss(z, labels, c, temperature=tau, positives=positives).backward()
        clop_kernels.clop_loss(z, labels, c, positives=positives).backward()
