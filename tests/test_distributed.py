"""The loss over a process group, against one process that has all rows: worlds of 1 to 4 gloo processes on this CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

import clop_kernels
from clop_kernels.backends.contract import POSITIVES, REDUCTIONS

from . import world
from .oracle import (
    RUNNABLE,
    Problem,
    assert_close_to_reference,
    near_duplicates,
    random_problem,
    relative_error,
    two_sided_problem,
)
from .world import World

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(), reason="this torch has no gloo"
)

Parts = tuple[int, ...]
"""How many instances each rank has; of two sides without labels pairs, else rows of the left side and of the right one in turn."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[World]:
    yield from world.running(4)


# ---- a problem in parts ------------------------------------------------------------------------------------------------


def rows_of_parts(problem: Problem, parts: Parts) -> list[Tensor]:
    """Of each rank the rows of the whole that it has, in its own order."""
    n_left = problem.options.get("n_left")
    n_rows = problem.embeddings.shape[0]
    if n_left is None:
        n_views = problem.options["n_views"]
        rows = torch.arange(n_rows).view(n_views, n_rows // n_views)
        return [part.reshape(-1) for part in rows.split(parts, dim=1)]
    left, right = torch.arange(n_left).split(parts), torch.arange(n_left, n_rows)
    if problem.labels is None:
        return [torch.cat(sides) for sides in zip(left, right.split(parts), strict=True)]
    # Left rows as the parts say, right ones the other way round: sides of one rank are of unequal length.
    backwards = [len(right) - sum(parts[1:]), *parts[1:]] if len(right) >= sum(parts[1:]) else None
    assert backwards is not None
    return [torch.cat(sides) for sides in zip(left, right.split(backwards[::-1]), strict=True)]


def solve_part(
    group: distributed.ProcessGroup,
    problem: Problem,
    all_rows: list[Tensor],
    backend: str,
    dtype: torch.dtype,
    sharding: dict[str, Any],
) -> dict[str, Tensor]:
    """On one rank: the loss, and the gradients of what the rank has."""
    rows = all_rows[distributed.get_rank(group)]
    z = problem.embeddings[rows].to(dtype).requires_grad_()
    precise = torch.promote_types(dtype, torch.float32)
    tau = torch.tensor(problem.temperature, dtype=precise, requires_grad=True)
    inputs = {"embeddings": z, "temperature": tau}
    prototypes = problem.prototypes
    if prototypes is not None:
        prototypes = inputs["prototypes"] = prototypes.to(precise).requires_grad_()
    options = dict(problem.options)
    n_left = options.pop("n_left", None)
    n_instances = problem.embeddings.shape[0] // options["n_views"]
    labels = None if problem.labels is None else problem.labels[rows[: len(rows) // options["n_views"]] % n_instances]
    if n_left is None:
        loss = clop_kernels.clop_loss(z, labels, prototypes, temperature=tau, backend=backend, group=group, **options, **sharding)
    else:
        n = int((rows < n_left).sum())
        of_sides = () if labels is None else (labels[:n], labels[n:])
        options = {name: options[name] for name in ("reduction", "normalize") if name in options}
        loss = clop_kernels.clip_loss(
            z[:n], z[n:], *of_sides, temperature=tau, backend=backend, group=group, **options, **sharding
        )
    upstream = torch.ones(())
    if loss.dim():
        upstream = torch.randn(problem.embeddings.shape[0], generator=torch.Generator().manual_seed(7))[rows]
    grads = torch.autograd.grad(loss, list(inputs.values()), upstream.to(loss))
    return {"loss": loss.detach()} | dict(zip(inputs, grads, strict=True))


def solve(ranks: World, problem: Problem, parts: Parts, backend: str, dtype: torch.dtype, **sharding: Any) -> dict[str, Tensor]:
    """The problem on as many ranks as there are parts, put together as the solution of one process; in float64.

    Each rank's gradients are divided by what grad_scale says they are multiplied by.
    """
    rows = rows_of_parts(problem, parts)
    solutions = ranks.run(len(parts), solve_part, problem, rows, backend, dtype, sharding)
    is_scalar = problem.options.get("reduction", "mean") != "none"
    scale = len(parts) if is_scalar and sharding.get("grad_scale", "ddp") == "ddp" else 1
    everyone = torch.cat(rows)
    assert torch.equal(everyone.sort().values, torch.arange(problem.embeddings.shape[0]))

    def whole(name: str) -> Tensor:
        of_rows = torch.cat([solution[name] for solution in solutions]).double()
        return torch.empty_like(of_rows).index_copy_(0, everyone, of_rows)

    result = {"loss": solutions[0]["loss"].double() if is_scalar else whole("loss"), "embeddings": whole("embeddings") / scale}
    for solution in solutions:
        assert not is_scalar or torch.equal(solution["loss"], solutions[0]["loss"]), "every rank returns the same number"
    for name in ("temperature", "prototypes"):
        if name in solutions[0]:
            result[name] = torch.stack([solution[name].double() for solution in solutions]).sum(0) / scale
    return result


def assert_exact(ranks: World, problem: Problem, parts: Parts, backend: str, **sharding: Any) -> None:
    expected = problem.solve("reference", torch.float64)
    actual = solve(ranks, problem, parts, backend, torch.float64, **sharding)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        floor = 1e-3 / problem.temperature ** (2 if name == "temperature" else 1)
        error = relative_error(actual[name], value, floor)
        assert error <= 1e-10, f"{name}: relative error {error:.2e}"


# ---- against one process -------------------------------------------------------------------------------------------------

# Even; uneven; one rank with no rows, first, last and in the middle; most of them empty.
WORLDS: list[Parts] = [
    (11,),
    (8, 8),
    (13, 5),
    (0, 9),
    (9, 0),
    (6, 6, 6),
    (1, 17, 4),
    (5, 0, 8),
    (7, 7, 7, 7),
    (3, 12, 1, 9),
    (0, 0, 2, 0),
]
BACKENDS = [name for name in RUNNABLE if name != "triton"]


@pytest.mark.parametrize("parts", WORLDS, ids=str)
@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_exact(parts: Parts, strategy: str, backend: str, ranks: World) -> None:
    n = sum(parts)
    for case, (positives, reduction) in enumerate(itertools.product(POSITIVES, REDUCTIONS)):
        temperature = (0.001, 0.1, 1.0)[(case + n) % 3]  # both softmax paths
        problem = random_problem(1 + case % 3, n, 5 + case, temperature=temperature, positives=positives, reduction=reduction)
        if case % 2:
            problem = problem.with_options(normalize=False, distance="euclidean")
        assert_exact(ranks, problem, parts, backend, strategy=strategy, grad_scale=("ddp", "none")[case % 2])


@pytest.mark.parametrize("parts", WORLDS, ids=str)
@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_sides_in_float64_are_exact(parts: Parts, strategy: str, backend: str, ranks: World) -> None:
    n = sum(parts)
    for case, (labelled, reduction) in enumerate(itertools.product((False, True), REDUCTIONS)):
        n_right = n + 3 if labelled else n
        problem = two_sided_problem(n, n_right, 6, labelled=labelled, temperature=(0.1, 0.001)[case % 2], reduction=reduction)
        assert_exact(ranks, problem.with_options(normalize=case % 3 > 0), parts, backend, strategy=strategy)
