"""What only a GPU can show. Not yet run on one: each test skips, with that reason, where there is none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import clop_kernels

from .oracle import Problem, random_problem, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(problem: Problem) -> Problem:
    move = {name: None if x is None else x.cuda() for name, x in (("l", problem.labels), ("p", problem.prototypes))}
    return Problem(problem.embeddings.cuda(), move["l"], move["p"], problem.temperature, problem.options)


@pytest.mark.parametrize("temperature", [0.01, 0.1])
@pytest.mark.parametrize("positives", ["instance", "label"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tiled_against_the_reference(temperature: float, positives: str, reduction: str) -> None:
    problem = random_problem(3, 43, 37, temperature=temperature, positives=positives, reduction=reduction)
    expected = problem.solve("reference", torch.float64)
    gpu = on_gpu(problem)
    z = gpu.embeddings.float().requires_grad_()
    loss = clop_kernels.clop_loss(
        z, gpu.labels, gpu.prototypes, temperature=problem.temperature, backend="tiled", **problem.options
    )
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(7)) if loss.dim() else torch.ones(())
    loss.backward(upstream.cuda())
    assert z.grad is not None
    assert relative_error(loss.cpu(), expected["loss"]) <= 1e-5
    assert relative_error(z.grad.cpu(), expected["embeddings"]) <= 1e-5


def test_no_host_synchronisation(no_synchronisation: None) -> None:
    z = torch.randn(64, 16, device="cuda", requires_grad=True)
    labels = torch.zeros(32, dtype=torch.int64, device="cuda")
    tau = torch.full((), 0.1, device="cuda", requires_grad=True)
    c = torch.ones(3, 16, device="cuda")
    for positives in ("instance", "label"):
        clop_kernels.clop_loss(z, labels, c, temperature=tau, positives=positives).backward()
        clop_kernels.clop_loss(z, labels, c, positives=positives).backward()
