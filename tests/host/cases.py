"""Losses beyond clop_loss, and the comparison of the backend ``cuda`` on them with the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import clop_kernels
from clop_kernels import functional

from ..oracle import GRADIENT_TOLERANCE, LOSS_TOLERANCE, PLAIN_FACTOR, random_problem, relative_error

FLOOR = 1e-7
"""Norms below are taken for this: a gradient that is zero, but for rounding, in one formula is a plain zero in another."""


@dataclass(frozen=True)
class Case:
    """A loss, its float64 inputs that require grad, each of which float32 holds exactly, and its other arguments."""

    loss: Callable[..., Tensor]
    inputs: dict[str, Tensor]
    temperature: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)

    def solve(self, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """As of Problem in tests/oracle.py. Prototypes stay in the dtype of sums."""
        precise = torch.promote_types(dtype, torch.float32)
        rounded = float(torch.tensor(self.temperature, dtype=torch.float32))
        leaves = {
            name: value.to(precise if name == "prototypes" else dtype, copy=True).requires_grad_()
            for name, value in self.inputs.items()
        }
        leaves["temperature"] = torch.tensor(rounded, dtype=precise, requires_grad=True)
        loss = self.loss(**leaves, backend=backend, **self.options)
        upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(7)) if loss.dim() else torch.ones(())
        grads = torch.autograd.grad(loss, list(leaves.values()), upstream.to(loss))
        return {"loss": loss.detach().double()} | {name: g.double() for name, g in zip(leaves, grads, strict=True)}

    def with_columns(self, order: Tensor) -> Case:
        return replace(self, inputs={name: value[:, order] for name, value in self.inputs.items()})


def assert_right(case: Case, dtype: torch.dtype = torch.float32, ill_conditioned: bool = False) -> None:
    """float32: the tolerances of tests/oracle.py, or PLAIN_FACTOR times the plain loss's own error where it says so there.

    Half precision: no more than twice the error of the plain loss in the same dtype.
    """
    expected, actual = case.solve("reference", torch.float64), case.solve("cuda", dtype)
    for name, value in expected.items():
        error = relative_error(actual[name], value, FLOOR)
        allowed = LOSS_TOLERANCE if name == "loss" else GRADIENT_TOLERANCE
        if dtype != torch.float32:
            slack = torch.finfo(dtype).eps / 2 if name == "temperature" else 1e-4
            allowed = 2 * _plain_error(case, name, value, dtype) + slack
        elif not error <= allowed and (ill_conditioned or name == "temperature"):
            allowed = max(allowed, PLAIN_FACTOR * _plain_error(case, name, value, dtype))
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


def _plain_error(case: Case, name: str, expected: Tensor, dtype: torch.dtype) -> float:
    """Of the plain loss: the root mean square over orders of the columns, which change its rounding alone."""
    width = next(iter(case.inputs.values())).shape[1]
    squares = []
    for seed in range(4):
        order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
        actual = case.with_columns(order).solve("reference", dtype)[name]
        squares.append(relative_error(actual, expected[:, order] if name in case.inputs else expected, FLOOR) ** 2)
    return float((sum(squares) / len(squares)) ** 0.5)


def clip_case(n_left: int, n_right: int, width: int, *, by_label: bool, temperature: float = 0.1, **options: Any) -> Case:
    """Rows of two sides, of norms from 0.2 to 1.2 times their width's root; by label: of four, a third of the rows without."""
    problem = random_problem(1, n_left + n_right, width, seed=n_left)
    left, right = problem.embeddings[:n_left], problem.embeddings[n_left:]
    if by_label:
        assert problem.labels is not None
        options |= {"left_labels": problem.labels[:n_left], "right_labels": problem.labels[n_left:]}
    return Case(clop_kernels.clip_loss, {"left": left, "right": right}, temperature, options)


def any_case(n_views: int, n_instances: int, width: int, *, scale: float = 1.0, temperature: float = 0.1, **options: Any) -> Case:
    """Every option there is, also those that no function of the package asks for together."""
    problem = random_problem(n_views, n_instances, width)
    assert problem.prototypes is not None
    inputs = {"embeddings": (problem.embeddings * scale).float().double(), "prototypes": problem.prototypes}
    defaults = {
        "labels": problem.labels,
        "n_views": n_views,
        "positives": "instance",
        "prototype_weight": 0.7,
        "distance": "euclidean",
        "reduction": "mean",
        "normalize": True,
    }
    return Case(functional._loss, inputs, temperature, defaults | options)
