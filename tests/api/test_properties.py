"""What must hold for any input, with hypothesis; and the paper's stationarity result."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import clop_kernels
from clop_kernels.backends.contract import DISTANCES, POSITIVES

from ..support.oracle import Problem, random_problem

PROBLEMS = st.builds(
    random_problem,
    n_views=st.integers(1, 7),
    n_instances=st.integers(1, 12),
    width=st.integers(1, 20),
    temperature=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**31),
    positives=st.sampled_from(POSITIVES),
    distance=st.sampled_from(DISTANCES),
)
for_any_problem = given(problem=PROBLEMS, seed=st.integers(0, 2**31))
few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CLOSE: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-8}


def solve(problem: Problem, backend: str) -> dict[str, torch.Tensor]:
    return problem.solve(backend, torch.float64)


@few
@for_any_problem
def test_row_scale_invariance(problem: Problem, seed: int, backend: str) -> None:
    n_rows = problem.embeddings.shape[0]
    scale = torch.logspace(-3, 3, n_rows, dtype=torch.float64).unsqueeze(1)
    scaled = Problem(problem.embeddings * scale, problem.labels, problem.prototypes, problem.temperature, problem.options)
    a, b = solve(problem, backend), solve(scaled, backend)
    torch.testing.assert_close(a["loss"], b["loss"], **CLOSE)
    torch.testing.assert_close(a["embeddings"], b["embeddings"] * scale, **CLOSE)


@few
@for_any_problem
def test_permutation_equivariance(problem: Problem, seed: int, backend: str) -> None:
    n_views, labels = problem.options["n_views"], problem.labels
    assert labels is not None
    order = torch.randperm(labels.shape[0], generator=torch.Generator().manual_seed(seed))
    rows = torch.cat([order + view * labels.shape[0] for view in range(n_views)])
    none = problem.with_options(reduction="none")
    moved = Problem(none.embeddings[rows], labels[order], none.prototypes, none.temperature, none.options)
    torch.testing.assert_close(solve(none, backend)["loss"][rows], solve(moved, backend)["loss"], **CLOSE)
    mean = Problem(moved.embeddings, moved.labels, moved.prototypes, moved.temperature, problem.options)
    torch.testing.assert_close(solve(problem, backend)["embeddings"][rows], solve(mean, backend)["embeddings"], **CLOSE)


@few
@for_any_problem
def test_gradient_is_orthogonal_to_its_row(problem: Problem, seed: int, backend: str) -> None:
    grad = solve(problem, backend)["embeddings"]
    along = (torch.nn.functional.normalize(problem.embeddings, dim=1) * grad).sum(1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-8)


@few
@for_any_problem
def test_names_of_labels_do_not_matter(problem: Problem, seed: int, backend: str) -> None:
    assert problem.labels is not None
    assert problem.prototypes is not None
    generator = torch.Generator().manual_seed(seed)
    n_classes = problem.prototypes.shape[0]
    new_name = torch.randperm(n_classes, generator=generator)
    labels = torch.where(problem.labels >= 0, new_name[problem.labels.clamp(min=0)], -1)
    prototypes = torch.empty_like(problem.prototypes)
    prototypes[new_name] = problem.prototypes
    renamed = Problem(problem.embeddings, labels, prototypes, problem.temperature, problem.options)
    a, b = solve(problem, backend), solve(renamed, backend)
    torch.testing.assert_close(a["loss"], b["loss"], **CLOSE)
    torch.testing.assert_close(a["embeddings"], b["embeddings"], **CLOSE)


@few
@for_any_problem
def test_agrees_with_the_reference(problem: Problem, seed: int, backend: str) -> None:
    expected, actual = solve(problem, "reference"), solve(problem, backend)
    for name in ("loss", "embeddings", "prototypes"):
        torch.testing.assert_close(actual[name], expected[name], **CLOSE)


@pytest.mark.parametrize("positives", POSITIVES)
def test_equal_or_collinear_embeddings_are_stationary(positives: str, backend: str) -> None:
    """The paper's collapsed states: the contrastive gradient vanishes there, so nothing in it leads out of them."""
    row = torch.randn(1, 16, dtype=torch.float64)
    sign = torch.where(torch.rand(20, 1) < 0.5, -1.0, 1.0).double()
    labels = torch.randint(0, 3, (10,))
    for rows in (row.repeat(20, 1), row * sign, row * sign * torch.rand(20, 1, dtype=torch.float64)):
        z = rows.clone().requires_grad_()
        clop_kernels.clop_loss(z, labels, positives=positives, backend=backend).backward()
        assert z.grad is not None
        assert z.grad.abs().max() < 1e-12
        clop_kernels.clop_loss(z, labels, torch.eye(3, 16, dtype=torch.float64), backend=backend).backward()
        assert z.grad.abs().max() > 1e-3  # the prototypes do lead out


def test_temperature_gradient_is_the_derivative(backend: str) -> None:
    problem = random_problem(temperature=0.25)
    step = 2.0**-14

    def loss(tau: float) -> float:
        return float(replace(problem, temperature=tau).solve(backend, torch.float64)["loss"])

    slope = (loss(0.25 + step) - loss(0.25 - step)) / (2 * step)
    assert math.isclose(float(problem.solve(backend, torch.float64)["temperature"]), slope, rel_tol=1e-6)
