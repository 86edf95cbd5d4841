"""The contract, for every backend: values and gradients against the float64 reference, and the edges of the input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import clop_kernels
from clop_kernels.backends import positions, tiled
from clop_kernels.backends.contract import DISTANCES, POSITIVES, REDUCTIONS, LossOptions

from ..support.oracle import (
    GRADIENT_TOLERANCE,
    LOSSES,
    Problem,
    assert_accurate,
    assert_float16_saturates_and_overflow_shows,
    assert_layouts_do_not_matter,
    assert_pairs_accurate,
    near_duplicates,
    negatives_problem,
    random_problem,
    relative_error,
    two_sided_problem,
)

# (n_views, n_instances, width): one to seven views, one row to several tiles, widths that no vector unit likes
SHAPES = [(1, 1, 3), (1, 70, 5), (2, 1, 4), (2, 33, 1), (2, 35, 64), (3, 43, 37), (4, 16, 200), (7, 19, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("positives", "distance", "reduction"), [*itertools.product(POSITIVES, DISTANCES, REDUCTIONS)])
def test_float64_is_exact(
    shape: tuple[int, int, int], positives: str, distance: str, reduction: str, backend: str, tile_rows: int | None
) -> None:
    for temperature in (0.001, 0.1, 1.0):  # both softmax paths
        problem = random_problem(*shape, temperature=temperature, positives=positives, distance=distance, reduction=reduction)
        expected = problem.solve("reference", torch.float64)
        actual = problem.solve(backend, torch.float64)
        for name, value in expected.items():
            # The floor: a gradient of nothing but rounding, 1e-16 times the 1/tau of its terms (and 1/tau^2 for tau itself).
            floor = 1e-3 / temperature ** (2 if name == "temperature" else 1)
            error = relative_error(actual[name], value, floor)
            assert error <= 1e-10, f"{name} at temperature {temperature}: relative error {error:.2e}"


def assert_exact(problem: Problem, backend: str) -> None:
    expected, actual = (problem.solve(name, torch.float64) for name in ("reference", backend))
    for name, value in expected.items():
        assert value.isfinite().all(), name
        error = relative_error(actual[name], value, 1e-3 / problem.temperature ** (2 if name == "temperature" else 1))
        assert error <= 1e-10, f"{name}: relative error {error:.2e}"


# Left rows, right rows, width: sides of unequal length, of one row, and of none.
SIDES = [(1, 1, 3), (33, 33, 24), (70, 70, 5), (50, 17, 5), (3, 130, 37), (64, 1, 16), (0, 5, 3), (5, 0, 3), (0, 0, 3)]


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("reduction", "normalize"), [*itertools.product(REDUCTIONS, (True, False))])
def test_two_sides_in_float64_are_exact(
    sides: tuple[int, int, int], labelled: bool, reduction: str, normalize: bool, backend: str, tile_rows: int | None
) -> None:
    if labelled or sides[0] == sides[1]:
        for temperature in (0.001, 0.1, 1.0):
            problem = two_sided_problem(*sides, labelled=labelled, temperature=temperature)
            assert_exact(problem.with_options(reduction=reduction, normalize=normalize), backend)


# Rows, those on the left, width: one side, and one way from some rows to the others.
PAIRS = [(2, None, 3), (70, None, 24), (131, None, 5), (2, 1, 3), (66, 33, 24), (140, 70, 5), (67, 50, 37), (133, 3, 16)]


@pytest.mark.parametrize("shape", PAIRS, ids=str)
@pytest.mark.parametrize("n_classes", [0, 4])
@pytest.mark.parametrize("normalize", [True, False])
def test_passes_over_pairs_alone(
    shape: tuple[int, int | None, int], n_classes: int, normalize: bool, backend: str, tile_rows: int | None
) -> None:
    for temperature in (0.01, 0.1, 1.0):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            assert_pairs_accurate(backend, dtype, *shape, temperature=temperature, normalize=normalize, n_classes=n_classes)


def test_the_public_functions_are_these_problems(backend: str) -> None:
    for problem in (two_sided_problem(9, 9, 5, labelled=False), two_sided_problem(7, 11, 5, labelled=True)):
        z, n, labels, tau = problem.embeddings, problem.options["n_left"], problem.labels, problem.temperature
        of_sides = () if labels is None else (labels[:n], labels[n:])
        loss = clop_kernels.clip_loss(z[:n], z[n:], *of_sides, temperature=tau, backend=backend)
        torch.testing.assert_close(loss, problem.solve(backend, torch.float64)["loss"])
    problem = negatives_problem(20, 5)
    z, labels, tau = problem.embeddings, problem.labels, problem.temperature
    assert labels is not None
    lse = clop_kernels.negative_logsumexp(z, labels, temperature=tau, backend=backend)
    torch.testing.assert_close(lse, problem.solve(backend, torch.float64)["loss"])
    of_others = clop_kernels.negative_logsumexp(z[:8], labels[:8], z[8:], labels[8:], temperature=tau, backend=backend)
    torch.testing.assert_close(of_others, problem.with_options(n_left=8).solve(backend, torch.float64)["loss"][:8])


@pytest.mark.parametrize("sides", [(77, 77, 64), (150, 40, 129), (1, 200, 32)], ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.1, 1.0])
def test_two_sides_in_float32(sides: tuple[int, int, int], temperature: float, backend: str) -> None:
    clop_kernels.set_tile_rows(48)
    try:
        for reduction in REDUCTIONS:
            for labelled in (True, False) if sides[0] == sides[1] else (True,):
                problem = two_sided_problem(*sides, labelled=labelled, temperature=temperature, reduction=reduction)
                assert_accurate(problem, backend)
    finally:
        clop_kernels.set_tile_rows(None)


@pytest.mark.parametrize("length", [1.0, 30.0])
@pytest.mark.parametrize(
    "problem",
    [
        random_problem(2, 35, 64),
        random_problem(1, 70, 5),
        two_sided_problem(40, 40, 8, labelled=True),
        two_sided_problem(40, 40, 8, labelled=False),
        negatives_problem(70, 8),
    ],
)
def test_rows_as_they_are(problem: Problem, length: float, backend: str, tile_rows: int | None) -> None:
    """Without normalisation: rows of all lengths up to several times ``length``, whose similarities nothing bounds."""
    problem = replace(problem, embeddings=length * problem.embeddings).with_options(normalize=False)
    positives = [{}] if "positives" in problem.options or "n_left" in problem.options else [{"positives": p} for p in POSITIVES]
    for options in positives:
        assert_exact(problem.with_options(**options), backend)
        assert_accurate(problem.with_options(**options), backend, ill_conditioned=True)


def test_unit_rows_have_the_same_loss_and_the_whole_gradient(backend: str) -> None:
    problem = random_problem(2, 35, 64)
    unit = torch.nn.functional.normalize(problem.embeddings, dim=1)
    both = {n: replace(problem, embeddings=unit).with_options(normalize=n).solve(backend, torch.float64) for n in (True, False)}
    torch.testing.assert_close(both[True]["loss"], both[False]["loss"])
    whole = both[False]["embeddings"]
    radial = (unit * whole).sum(1, keepdim=True) * unit
    assert radial.norm() > 0.1 * whole.norm()
    torch.testing.assert_close(whole - radial, both[True]["embeddings"])


@pytest.mark.parametrize("n_rows", [0, 1, 2, 17, 130])
@pytest.mark.parametrize("temperature", [0.001, 0.1])
def test_negatives_alone(n_rows: int, temperature: float, backend: str, tile_rows: int | None) -> None:
    problem = negatives_problem(n_rows, 24, temperature=temperature)
    assert_exact(problem, backend)
    assert_accurate(problem, backend, ill_conditioned=temperature < 0.01)
    assert_exact(replace(problem, labels=torch.zeros(n_rows, dtype=torch.int64)), backend)  # no row has any


def test_a_nan_among_the_negatives_shows(backend: str) -> None:
    z = torch.randn(6, 4)
    z[5, 1] = torch.nan
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    for name in (backend, "reference"):
        lse = clop_kernels.negative_logsumexp(z, labels, backend=name)
        assert lse[[0, 1, 2, 5]].isnan().all(), name


def test_far_negatives_are_not_lost_beside_near_positives(backend: str) -> None:
    """Where a positive's exp(s) is 1e87 times a negative's, which a sum that both are in would lose in float32."""
    z = torch.cat([torch.eye(1, 4), torch.eye(1, 4), -torch.eye(1, 4)])
    lse = clop_kernels.negative_logsumexp(z, torch.tensor([0, 0, 1]), temperature=0.01, backend=backend)
    torch.testing.assert_close(lse, torch.tensor([-100.0, -100.0, -100.0 + math.log(2)]))


@pytest.mark.parametrize("temperature", [0.01, 1 / 60, 0.0167, 0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("shape", [(1, 150, 40), (2, 77, 64), (3, 50, 129), (7, 21, 32)], ids=str)
def test_float32_accuracy(shape: tuple[int, int, int], positives: str, temperature: float, backend: str) -> None:
    clop_kernels.set_tile_rows(48)
    try:
        for distance, reduction in zip(DISTANCES, REDUCTIONS, strict=True):
            assert_accurate(
                random_problem(*shape, temperature=temperature, positives=positives, distance=distance, reduction=reduction),
                backend,
            )
    finally:
        clop_kernels.set_tile_rows(None)


@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.05, 0.1])
@pytest.mark.parametrize("noise", [1e-3, 1e-2, 0.3])
@pytest.mark.parametrize("width", [8, 64])
def test_near_duplicates_keep_their_gradient(temperature: float, noise: float, width: int, backend: str) -> None:
    """Down to the loss that float64 itself resolves; the group-sum formulation misses this by a factor of 10 to 1e17."""
    for n_views, n_instances in ((2, 40), (2, 301), (3, 40)):
        problem = near_duplicates(n_views, n_instances, width, noise, temperature)
        if problem.solve("reference", torch.float64)["loss"] > 1e-12:
            assert_accurate(problem, backend, ill_conditioned=True)


def test_a_single_positive_keeps_its_relative_accuracy(backend: str) -> None:
    """Loss log(1 + e^-x) with x = 60: float64's log-sum-exp has nothing left of it, the sums of the backends do."""
    angle = math.acos(1 - 0.6)  # cosine 0.4, against 1 for the positives: 0.6 / tau = 60 for tau = 0.01
    a = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    loss = clop_kernels.ntxent_loss(torch.cat([a, a]), temperature=0.01, backend=backend)
    torch.testing.assert_close(loss, torch.tensor(2 * math.exp(-60.0), dtype=torch.float64), rtol=1e-10, atol=0.0)


def fits_unshifted(temperature: float, dtype: torch.dtype, norms: Tensor | None = None) -> bool:
    options = LossOptions(temperature, n_views=2, compute_dtype=dtype, normalize=norms is None)
    return tiled.fits_unshifted(torch.full((3,), 1e9, dtype=dtype) if norms is None else norms.to(dtype), options)


def test_where_the_softmax_switches_paths() -> None:
    for temperature, dtype, expected in (
        (1 / 59.9, torch.float32, True),
        (1 / 60.1, torch.float32, False),
        (1 / 599, torch.float64, True),
        (1 / 601, torch.float64, False),
    ):
        assert fits_unshifted(temperature, dtype) == expected
        assert fits_unshifted(100 * temperature, dtype, torch.tensor([0.0, 10.0, 1.0])) == expected  # rows of length 10
    assert not fits_unshifted(1.0, torch.float32, torch.tensor([1.0, math.nan]))


def test_both_sides_of_the_softmax_switch(backend: str) -> None:
    """A hair above and below the switch of paths the loss and gradients agree as closely as the temperatures do."""
    above, below = random_problem(temperature=1 / 59.9999), random_problem(temperature=1 / 60.0001)
    assert fits_unshifted(above.temperature, torch.float32) > fits_unshifted(below.temperature, torch.float32)
    results = above.solve(backend, torch.float32), below.solve(backend, torch.float32)
    for name, value in results[0].items():
        assert relative_error(results[1][name], value) < 1e-4, name  # the derivative with respect to 1/tau, times its change


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_plain_pytorch(dtype: torch.dtype, backend: str) -> None:
    for positives in POSITIVES:
        problem = random_problem(2, 60, 32, positives=positives)
        expected = problem.solve("reference", torch.float64)
        plain, actual = problem.solve("reference", dtype), problem.solve(backend, dtype)
        for name, value in expected.items():
            error, allowed = relative_error(actual[name], value), 2 * relative_error(plain[name], value) + 1e-4
            assert error <= allowed, f"{name}: {error:.2e}, plain PyTorch allows {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_of_results(dtype: torch.dtype, backend: str) -> None:
    z = torch.randn(8, 4, dtype=dtype, requires_grad=True)
    prototypes = clop_kernels.orthonormal_prototypes(3, 4).requires_grad_()
    loss = clop_kernels.clop_loss(z, torch.tensor([0, 1, 2, -1]), prototypes, backend=backend)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert z.grad is not None
    assert z.grad.dtype == dtype
    assert prototypes.grad is not None
    assert prototypes.grad.dtype == torch.float32


def edge_cases() -> dict[str, Problem]:
    z = random_problem().embeddings
    labels = torch.randint(0, 4, (33,))
    c = clop_kernels.orthonormal_prototypes(4, 24, dtype=torch.float64)
    identity = torch.eye(4, 24, dtype=torch.float64)  # unit rows without rounding: a distance of exactly zero
    scales = torch.logspace(-4, 4, 66, dtype=torch.float64)[torch.randperm(66)].unsqueeze(1)
    zeros = z.clone()
    zeros[[0, 5, 40]] = 0.0
    duplicates = torch.cat([z[:33], z[:33] * (1 + 1e-4)])
    antipodes = torch.cat([z[:33], -z[:33]])
    return {
        "zero rows": Problem(zeros, labels, c),
        "all zero": Problem(torch.zeros_like(z), labels, c),
        "one row": Problem(z[:1], labels[:1], c, options={"n_views": 1}),
        "one instance": Problem(z[:2], labels[:1], c),
        "no rows": Problem(z[:0], labels[:0], c),
        "no rows, no labels": Problem(z[:0]),
        "no positives": Problem(z, torch.arange(66), None, options={"n_views": 1, "positives": "label"}),
        "all unlabelled": Problem(z, torch.full((33,), -1), c, options={"positives": "label"}),
        "all unlabelled, one view": Problem(z, torch.full((66,), -1), c, options={"positives": "label", "n_views": 1}),
        "all rows equal": Problem(z[:1].repeat(66, 1), labels, c),
        "one class": Problem(z, torch.zeros(33, dtype=torch.int64), c, options={"positives": "label"}),
        "norms 1e-4 to 1e4": Problem(z * scales, labels, c),
        "norms 1e18": Problem(z * 1e18, labels, c),
        "near-duplicates, tau 0.01": Problem(duplicates, labels, c, 0.01),
        "antipodes, tau 0.01": Problem(antipodes, labels, c, 0.01),
        "antipodes only, tau 0.01": Problem(torch.cat([z[:1], -z[:1]]), labels[:1], c, 0.01),
        "on the prototypes": Problem(3 * identity[labels.repeat(2)], labels, identity),
        "int32 labels": Problem(z, labels.int(), c),
    }


@pytest.mark.parametrize("case", edge_cases())
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_edge_cases_are_finite_and_right(
    case: str, distance: str, dtype: torch.dtype, backend: str, tile_rows: int | None
) -> None:
    assert_edge_case(case, distance, dtype, backend)


def assert_edge_case(case: str, distance: str, dtype: torch.dtype, backend: str) -> None:
    problem = edge_cases()[case].with_options(distance=distance)
    expected = problem.solve("reference", torch.float64)
    actual = problem.solve(backend, dtype)
    for name, value in actual.items():
        assert value.isfinite().all(), name
        if case != "all zero" or name == "loss":  # there the gradient is 1e12 times a sum that cancels
            tolerance = 1e-9 if dtype == torch.float64 else 2e-5
            scale = 1e12 if case == "zero rows" and name == "embeddings" else 1.0 / problem.temperature
            torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance * scale)


def test_float16_rows_of_zeros_saturate_and_overflow_shows(backend: str) -> None:
    assert_float16_saturates_and_overflow_shows(backend)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "options", [{}, {"positives": "label"}, {"positives": "label", "n_views": 1}, {"reduction": "none"}], ids=str
)
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_nan_and_inf_come_out_as_nan(bad: float, options: dict[str, object], temperature: float, backend: str) -> None:
    problem = random_problem(2, 12, 6).with_options(**options)
    z = problem.embeddings.clone()
    z[5, 2] = bad
    labels = torch.arange(24) if options.get("n_views") == 1 else problem.labels  # no row has a positive: A is empty
    for name in (backend, "reference"):
        loss = clop_kernels.clop_loss(z, labels, temperature=temperature, backend=name, **{"n_views": 2, **options})  # type: ignore[arg-type]
        assert loss[5].isnan() if loss.dim() else loss.isnan(), name


@pytest.mark.parametrize("loss", LOSSES)
def test_layouts_do_not_matter(loss: str, backend: str) -> None:
    assert_layouts_do_not_matter(loss, backend)


def test_upstream_gradient_and_row_weights(backend: str) -> None:
    """A weighted sum of "none" is the loss of weighted rows; "sum" and "mean" are sums of "none"."""
    problem = random_problem(2, 20, 8, positives="label")
    none = problem.with_options(reduction="none").solve(backend, torch.float64)["loss"]
    torch.testing.assert_close(problem.with_options(reduction="sum").solve(backend, torch.float64)["loss"], none.sum())
    z = problem.embeddings.clone().requires_grad_()
    loss = clop_kernels.ntxent_loss(z, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(-3 * loss, z, retain_graph=True)[0], -3 * torch.autograd.grad(loss, z)[0])


def test_tiles_are_chosen_and_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert tiled.tile_rows(100, torch.float32, cpu) == 100
    assert tiled.tile_rows(10**6, torch.float32, cpu) == 576
    assert tiled.tile_rows(0, torch.float32, cpu) == 1
    clop_kernels.set_tile_rows(3)
    try:
        assert tiled.tile_rows(100, torch.float32, cpu) == 3
    finally:
        clop_kernels.set_tile_rows(None)
    monkeypatch.setenv("CLOP_TILE_ROWS", "77")
    assert tiled._rows_of_environment() == 77
    monkeypatch.setenv("CLOP_TILE_ROWS", "many")
    with pytest.raises(ValueError, match="CLOP_TILE_ROWS='many' in the environment: expected an integer"):
        tiled._rows_of_environment()
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=r"rows=.*expected an int of at least 1"):
            clop_kernels.set_tile_rows(bad)  # type: ignore[arg-type]


SWITCHES: dict[str, Callable[[Any], None]] = {
    "old": torch.set_float32_matmul_precision,
    "allow_tf32": lambda value: setattr(torch.backends.cuda.matmul, "allow_tf32", value),
    "matmul": lambda value: setattr(torch.backends.cuda.matmul, "fp32_precision", value),
    "all": lambda value: setattr(torch.backends, "fp32_precision", value),
}


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ([], False),
        ([("old", "high")], True),
        ([("old", "medium")], True),
        ([("allow_tf32", True)], True),
        ([("matmul", "tf32")], True),
        ([("matmul", "none"), ("all", "tf32")], True),
        ([("old", "high"), ("matmul", "ieee")], False),
        ([("all", "tf32"), ("matmul", "ieee")], False),
        ([("all", "ieee"), ("old", "high")], True),
        ([("matmul", "tf32"), ("old", "highest")], False),
    ],
    ids=str,
)
def test_tf32_is_allowed_where_torch_allows_it(switches: list[tuple[str, Any]], expected: bool) -> None:
    try:
        for name, value in switches:
            SWITCHES[name](value)
        assert positions.allows_tf32() == expected
    finally:
        SWITCHES["old"]("highest")
        SWITCHES["matmul"]("none")
        SWITCHES["all"]("none")


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_same_call_gives_the_same_bits(threads: int, backend: str) -> None:
    problem = random_problem(2, 700, 32, positives="label")
    torch.set_num_threads(threads)
    try:
        first, second = problem.solve(backend, torch.float32), problem.solve(backend, torch.float32)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = problem.solve(backend, torch.float32)
    assert all(relative_error(first[name], alone[name]) < 1e-6 for name in first)


@pytest.mark.parametrize("width", [512, 1024, 4096])
def test_wide_embeddings(width: int, backend: str) -> None:
    problem = random_problem(2, 30, width)
    expected, actual = problem.solve("reference", torch.float64), problem.solve(backend, torch.float32)
    assert relative_error(actual["embeddings"], expected["embeddings"]) < GRADIENT_TOLERANCE


def test_extreme_temperature_without_overflow(backend: str) -> None:
    for temperature in (1e-6, 1e-4, 1e-3, 1e3, 1e6):
        problem = random_problem(temperature=temperature)
        for value in problem.solve(backend, torch.float32).values():
            assert value.isfinite().all()
        if temperature >= 1e-3:  # below, a similarity of 1/tau has no digits left behind the point
            assert_accurate(problem, backend, ill_conditioned=temperature < 0.01)
