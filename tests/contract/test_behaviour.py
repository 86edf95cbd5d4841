"""The contract beyond values: dtypes, memory layouts, numbers that are not finite, overflow, determinism."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import clop_kernels

from ..support.interpreter import without_numpy_warnings
from ..support.oracle import (
    LOSSES,
    Problem,
    assert_float16_saturates_and_overflow_shows,
    assert_layouts_do_not_matter,
    random_problem,
    two_sided_problem,
)
from .settings import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, GPU, Setting

pytestmark = without_numpy_warnings


def assert_dtypes_of_results(setting: Setting, dtype: torch.dtype) -> None:
    z = torch.randn(8, 4, dtype=dtype, device=setting.device, requires_grad=True)
    prototypes = clop_kernels.orthonormal_prototypes(3, 4).to(setting.device).requires_grad_()
    labels = torch.tensor([0, 1, 2, -1], device=setting.device)
    loss = clop_kernels.clop_loss(z, labels, prototypes, backend=setting.backend)
    loss.backward()
    assert loss.dtype == (FLOAT64 if dtype == FLOAT64 else FLOAT32)
    assert z.grad is not None
    assert z.grad.dtype == dtype
    assert prototypes.grad is not None
    assert prototypes.grad.dtype == FLOAT32


@pytest.mark.takes(as_shipped=True, dtype=FLOAT64)
def test_float64_gives_float64(setting: Setting) -> None:
    assert_dtypes_of_results(setting, FLOAT64)


@pytest.mark.takes(as_shipped=True)
def test_float32_gives_float32(setting: Setting) -> None:
    assert_dtypes_of_results(setting, FLOAT32)


@pytest.mark.takes(as_shipped=True, dtype=FLOAT16)
def test_float16_gives_a_loss_in_float32(setting: Setting) -> None:
    assert_dtypes_of_results(setting, FLOAT16)


@pytest.mark.takes(as_shipped=True, dtype=BFLOAT16)
def test_bfloat16_gives_a_loss_in_float32(setting: Setting) -> None:
    assert_dtypes_of_results(setting, BFLOAT16)


@pytest.mark.takes(as_shipped=True)
@pytest.mark.parametrize("loss", LOSSES)
def test_layouts_do_not_matter(loss: str, setting: Setting) -> None:
    rounding = 1e-6 if setting.device == GPU and setting.backend == "triton" else 0.0
    assert_layouts_do_not_matter(loss, setting.backend, setting.device, rounding)


@pytest.mark.takes(as_shipped=True, dtype=FLOAT16)
def test_float16_rows_of_zeros_saturate_and_overflow_shows(setting: Setting) -> None:
    assert_float16_saturates_and_overflow_shows(setting.backend)


NOT_FINITE: list[tuple[float, dict[str, Any], float]] = [
    (math.nan, {"n_views": 2}, 0.1),
    (math.inf, {"n_views": 2, "positives": "label"}, 0.01),
    (-math.inf, {"n_views": 1, "positives": "label"}, 0.1),  # no row has a positive
    (math.nan, {"n_views": 1, "positives": "label"}, 0.01),
    (math.inf, {"n_views": 2, "reduction": "none"}, 0.1),
    (math.nan, {"n_views": 2, "normalize": False}, 0.01),
]


@pytest.mark.parametrize(("bad", "options", "temperature"), NOT_FINITE, ids=str)
def test_a_row_that_is_not_finite_shows(bad: float, options: dict[str, Any], temperature: float, setting: Setting) -> None:
    z = random_problem(2, 12, 6).embeddings.float().to(setting.device)
    z[5, 2] = bad
    z.requires_grad_()
    labels = torch.arange(24 // options["n_views"], device=setting.device)
    loss = clop_kernels.clop_loss(z, labels, temperature=temperature, backend=setting.backend, **options)
    assert loss[5].isnan() if loss.dim() else loss.isnan()


@pytest.mark.takes(width=20)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_row_that_is_not_finite_shows_in_negatives_and_sides(bad: float, normalize: bool, setting: Setting) -> None:
    """A row that is not finite shows in its own term, and in the terms of the rows whose negative it is."""
    z = torch.randn(40, 20, device=setting.device)
    z[3, 2] = bad
    known: dict[str, Any] = {"normalize": normalize, "backend": setting.backend}
    labels = (torch.arange(40, device=setting.device) < 20).long()
    shows = clop_kernels.negative_logsumexp(z, labels, **known).isnan()
    assert torch.equal(shows, (labels == 0) | (torch.arange(40, device=setting.device) == 3))
    for of_sides in ((), (labels[:20], labels[20:])):
        assert clop_kernels.clip_loss(z[:20], z[20:], *of_sides, **known).isnan()


@pytest.mark.takes(width=20)
def test_without_pairs_rows_do_not_meet(setting: Setting) -> None:
    """What is not finite stays where it is: nothing is computed of two rows."""
    problem = random_problem(1, 40, 24)
    assert problem.prototypes is not None
    z, prototypes = problem.embeddings.float().to(setting.device), problem.prototypes.float().to(setting.device)
    z[4, 2] = torch.nan
    z.requires_grad_()
    labels = torch.zeros(40, dtype=torch.int64, device=setting.device)
    loss = clop_kernels.clop_loss(z, labels, prototypes, n_views=1, reduction="none", backend=setting.backend)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    for x in (loss, grad.sum(1)):
        assert x.isnan().nonzero().flatten().tolist() == [4]


@pytest.mark.takes(width=20)
def test_rows_without_negatives_have_zeros(setting: Setting) -> None:
    z = torch.randn(40, 20, device=setting.device, requires_grad=True)
    loss = clop_kernels.negative_logsumexp(z, torch.zeros(40, dtype=torch.int64, device=setting.device), backend=setting.backend)
    assert not loss.any()
    assert not torch.autograd.grad(loss.sum(), z)[0].any()


def assert_same_bits(problem: Problem, setting: Setting) -> None:
    first, second = (problem.solve(setting.backend, FLOAT32, setting.device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.takes(width=20)
@pytest.mark.parametrize(("positives", "temperature", "reduction"), [("label", 0.1, "none"), ("instance", 0.01, "mean")])
def test_the_same_call_gives_the_same_bits(positives: str, temperature: float, reduction: str, setting: Setting) -> None:
    options: dict[str, Any] = {"positives": positives, "reduction": reduction, "distance": "euclidean"}
    assert_same_bits(random_problem(2, setting.rows // 2, 20, temperature=temperature, **options), setting)


@pytest.mark.takes(width=20)
@pytest.mark.parametrize(("labelled", "temperature"), [(True, 0.1), (False, 0.01)])
def test_the_same_call_of_two_sides_gives_the_same_bits(labelled: bool, temperature: float, setting: Setting) -> None:
    n = setting.rows // 2
    assert_same_bits(two_sided_problem(n, n, 20, labelled=labelled, temperature=temperature), setting)


def test_gradients_scale_with_the_upstream_gradient_and_reductions_are_sums(setting: Setting) -> None:
    problem = random_problem(2, 20, 8, positives="label")
    none = problem.with_options(reduction="none").solve(setting.backend, FLOAT32, setting.device)["loss"]
    total = problem.with_options(reduction="sum").solve(setting.backend, FLOAT32, setting.device)["loss"]
    torch.testing.assert_close(total, none.sum(), rtol=1e-6, atol=0)
    z = problem.embeddings.float().to(setting.device).requires_grad_()
    loss = clop_kernels.ntxent_loss(z, backend=setting.backend)
    once, scaled = torch.autograd.grad(loss, z, retain_graph=True)[0], torch.autograd.grad(-3 * loss, z)[0]
    torch.testing.assert_close(scaled, -3 * once)
