"""Plans of the Triton backend, which are kept from call to call: whom they serve, and what they launch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import clop_kernels

from ..support.oracle import random_problem
from .test_kernels import TRITON, interpreted, pytestmark

__all__ = ["pytestmark"]  # the warnings that are no news


@interpreted
def test_a_kept_plan_serves_its_own_problem_only() -> None:
    """Calls that differ in one thing each, in turns, twice: each has the bits that it has alone."""
    base = random_problem(2, 8, 16, positives="label")
    assert base.prototypes is not None
    wide = torch.zeros(16, 40, dtype=torch.float64)
    wide[:, 3:35:2] = base.embeddings
    problems = [
        base,
        replace(base, embeddings=wide[:, 3:35:2]),
        replace(base, embeddings=base.embeddings.T.contiguous().T),
        replace(base, labels=None, options=base.options | {"positives": "instance"}),
        replace(base, prototypes=None),
        replace(base, temperature=0.3),
        *(
            base.with_options(**{name: value})
            for name, value in (
                ("n_views", 1), ("positives", "instance"), ("distance", "manhattan"), ("reduction", "none"), ("normalize", False),
                ("negatives_only", True), ("prototype_weight", 0.2),
            )
        ),
    ]  # fmt: skip
    problems[6] = replace(problems[6], labels=base.labels.repeat(2) if base.labels is not None else None)
    alone = []
    for problem in problems:
        TRITON.load().plan_of.cache_clear()
        alone.append(problem.solve("triton", torch.float32))
    TRITON.load().plan_of.cache_clear()
    for _ in range(2):
        for problem, expected in zip(problems, alone, strict=True):
            actual = problem.solve("triton", torch.float32)
            assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert TRITON.load().plan_of.cache_info().hits > len(problems)


@interpreted
def test_compiled_kernels_are_launched_with_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second call on: the same arguments, tensors by where they are."""
    from clop_kernels.backends.triton import launches

    first: list[tuple[str, dict[str, Any]]] = []
    second: list[tuple[str, dict[str, Any]]] = []

    class Compiled:
        def __init__(self, launch: Any) -> None:
            self.launch = launch

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            assert grid == (*self.launch.grid, 1, 1)[:3]
            kernel = self.launch.kernel
            return lambda *values: second.append((kernel.__name__, dict(zip(kernel.arg_names, values, strict=True))))

    def run(launch: Any) -> Compiled:
        first.append((launch.kernel.__name__, launch.arguments))
        return Compiled(launch)

    monkeypatch.setattr(launches, "DIRECT_DEVICES", ("cpu",))
    monkeypatch.setattr(launches.Launch, "run", run)
    z, labels, prototypes = torch.randn(64, 16, requires_grad=True), torch.arange(32) % 3, torch.eye(3, 16)
    for _ in range(2):
        clop_kernels.clop_loss(z, labels, prototypes, positives="label", backend="triton").backward()
    assert [name for name, _ in first] == [name for name, _ in second]
    assert len(first) == 6
    addresses: dict[str, set[int]] = {}
    for (_, of_first), (_, of_second) in zip(first, second, strict=True):
        for name, value in of_first.items():
            if isinstance(value, torch.Tensor):
                assert of_second[name] % 16 == 0 or name == "labels"
                addresses.setdefault(name, set()).add(of_second[name])
            else:
                assert of_second[name] == value, name
    given = {"embeddings": z, "labels": labels, "prototypes": prototypes}
    assert all(addresses[name] == {x.data_ptr()} for name, x in given.items())
    of_one_pass = ("statistics", "distances", "coefficients", "sums", "groups", "counts")
    assert all(len(addresses[name]) == 1 for name in of_one_pass)
    assert len(set.union(*(addresses[name] for name in of_one_pass))) == len(of_one_pass)
