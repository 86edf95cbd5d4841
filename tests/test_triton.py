"""The Triton backend on a CPU: every kernel in Triton's interpreter against the float64 reference, and compiled ahead of time.

conftest.py switches the interpreter on where there is no GPU; tests/test_gpu.py holds what only a GPU can show.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import clop_kernels
from benchmarks import resources
from clop_kernels import backends
from clop_kernels.backends import contract
from clop_kernels.backends.contract import DISTANCES, POSITIVES, REDUCTIONS, LossOptions, Needs, Residuals

from .oracle import (
    LOSSES,
    OPTIONS,
    Problem,
    assert_accurate,
    assert_as_good_as_plain,
    assert_float16_saturates_and_overflow_shows,
    assert_layouts_do_not_matter,
    assert_negations_are_seen,
    near_duplicates,
    op_call,
    random_problem,
    relative_error,
    shaped_problem,
    with_nan_between_rows,
)
from .test_backends import assert_edge_case, edge_cases

ROOT = Path(__file__).parents[1]
TRITON = next(b for b in backends.BACKENDS if b.name == "triton")
OBSTACLE = TRITON.obstacle(torch.device("cpu"), torch.float32)

interpreted = pytest.mark.skipif(OBSTACLE is not None, reason=f"needs Triton's interpreter: {OBSTACLE}")
# What stands past the end of a tile may be infinite on the way; NumPy, which the interpreter runs on, warns of each.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.* encountered in:RuntimeWarning", "ignore:All-NaN slice encountered:RuntimeWarning"
)


@pytest.fixture(autouse=True)
def rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """zhat as a GPU has it, and NaN between its rows: no kernel reads there."""
    monkeypatch.setattr(contract, "DENSE_DEVICES", ())
    if OBSTACLE is None:
        triton = TRITON.load()
        monkeypatch.setattr(triton, "unit_rows", lambda z, dtype: with_nan_between_rows(contract.unit_rows(z, dtype)))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 x 16 and panels of 32: a small problem has many of each, ragged ones and far ones too. No columns are split."""
    from clop_kernels.backends.triton import tiles

    def tile(width: int, dtype: torch.dtype) -> tiles.Tile:
        return tiles.Tile(16, 16, 16 if tiles.is_wide(width, dtype) else tiles.padded(width), 4, 1)

    monkeypatch.setattr(tiles, "softmax", lambda width, dtype, target: tile(width, dtype))
    monkeypatch.setattr(tiles, "gradient", lambda width, dtype, target: tile(width, dtype))
    monkeypatch.setattr(tiles, "splits", lambda *_: 1)
    monkeypatch.setattr(tiles, "pairs", lambda dtype: tiles.Tile(16, 16, 16, 4, 1))
    monkeypatch.setattr(tiles, "product", lambda dtype, target: tiles.Tile(16, 16, 16, 4, 1))
    monkeypatch.setattr(tiles, "PANEL", 32)


@pytest.fixture
def split_columns(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, and columns split by 1, 2 or 3, as the number of blocks has it."""
    from clop_kernels.backends.triton import tiles

    monkeypatch.setattr(tiles, "splits", lambda n_blocks, *_: 1 + n_blocks % 3)


@pytest.fixture(params=[False, True], ids=["narrow", "wide"])
def is_wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both paths at any width."""
    from clop_kernels.backends.triton import tiles

    monkeypatch.setattr(tiles, "is_wide", lambda width, dtype: request.param)
    return bool(request.param)


# ---- numbers -------------------------------------------------------------------------------------------------------

N_ROWS = [(1, 1), (2, 1), (1, 63), (2, 32), (5, 13), (7, 43)]  # 1, 2, 63, 64, 65, 301 rows
WIDTHS = [7, 16, 64, 128, 250, 256, 512, 1024]


SHAPES = [*((shape, 37) for shape in N_ROWS), *(((5, 13), width) for width in WIDTHS), ((7, 43), 200)]


@interpreted
@pytest.mark.parametrize(("shape", "width"), SHAPES, ids=str)
def test_shapes_float32(shape: tuple[int, int], width: int) -> None:
    """Both softmax paths for every number of rows, and for one width of each path through the width."""
    for temperature in (0.1, 0.01) if width in (37, 16, 512) else (0.1,):
        assert_accurate(shaped_problem(shape, width, temperature), "triton")


@interpreted
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_width_one(temperature: float) -> None:
    """Every cosine is 1 or -1, and every gradient zero."""
    problem = shaped_problem((5, 13), 1, temperature)
    expected, actual = problem.solve("reference", torch.float64), problem.solve("triton", torch.float32)
    assert relative_error(actual["loss"], expected["loss"]) < 1e-6
    for name in ("embeddings", "temperature", "prototypes"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize(("shape", "width"), SHAPES[:-1], ids=str)
def test_shapes_float16(shape: tuple[int, int], width: int) -> None:
    assert_as_good_as_plain(shaped_problem(shape, width, 0.1), "triton", torch.float16)


@interpreted
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize(("distance", "reduction"), [*zip(DISTANCES, REDUCTIONS, strict=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_many_tiles(
    dtype: torch.dtype, distance: str, reduction: str, positives: str, temperature: float, is_wide: bool, small_tiles: None
) -> None:
    problem = random_problem(
        3, 21, 20, n_classes=3, temperature=temperature, positives=positives, distance=distance, reduction=reduction
    )
    if dtype == torch.float32:
        assert_accurate(problem, "triton")
    elif temperature == 0.1:
        assert_as_good_as_plain(problem, "triton", dtype)


@interpreted
@pytest.mark.parametrize(("distance", "reduction"), [*itertools.product(DISTANCES, REDUCTIONS)])
def test_every_distance_with_every_reduction(distance: str, reduction: str) -> None:
    assert_accurate(random_problem(2, 9, 8, distance=distance, reduction=reduction), "triton")


@interpreted
@pytest.mark.parametrize("temperature", [0.02, 0.1])
@pytest.mark.parametrize("noise", [1e-3, 0.3])
def test_near_duplicates_keep_their_gradient(noise: float, temperature: float, is_wide: bool, split_columns: None) -> None:
    for n_views in (2, 3):
        assert_accurate(near_duplicates(n_views, 20, 20, noise, temperature), "triton", ill_conditioned=True)


@interpreted
@pytest.mark.parametrize("case", edge_cases())
@pytest.mark.usefixtures("small_tiles")
def test_edge_cases_are_finite_and_right(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from clop_kernels.backends.triton import tiles

    for distance, wide in zip(DISTANCES, (False, True, False), strict=True):
        monkeypatch.setattr(tiles, "is_wide", lambda width, dtype, wide=wide: wide)
        if distance == "cosine" or case in ("on the prototypes", "zero rows", "one row", "near-duplicates, tau 0.01"):
            assert_edge_case(case, distance, torch.float32, "triton")


@interpreted
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("n_views", [1, 2])
def test_a_row_that_is_not_finite_shows(value: float, n_views: int) -> None:
    z = torch.randn(6, 4)
    z[4, 2] = value
    assert clop_kernels.ntxent_loss(z, n_views=n_views, backend="triton").isnan()


@interpreted
def test_float16_rows_of_zeros_saturate_and_overflow_shows() -> None:
    assert_float16_saturates_and_overflow_shows("triton")


@interpreted
@pytest.mark.parametrize("loss", LOSSES)
def test_layouts_do_not_matter(loss: str) -> None:
    assert_layouts_do_not_matter(loss, "triton")


@interpreted
def test_the_same_call_gives_the_same_bits(split_columns: None) -> None:
    problem = random_problem(2, 40, 16, positives="label", reduction="none")
    first, second = problem.solve("triton", torch.float32), problem.solve("triton", torch.float32)
    assert all(torch.equal(first[name], second[name]) for name in first)


@interpreted
def test_ranking_and_sorting_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from clop_kernels.backends.triton import launches

    problem = random_problem(3, 40, 16, positives="label", n_classes=5)
    ranked = problem.solve("triton", torch.float32)
    monkeypatch.setattr(launches, "RANKED_INSTANCES", 0)
    TRITON.load().plan_of.cache_clear()
    by_sort = problem.solve("triton", torch.float32)
    assert all(torch.equal(ranked[name], by_sort[name]) for name in ranked)


@interpreted
def test_parts_of_the_prototypes_gradient_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from clop_kernels.backends.triton import launches

    problem = random_problem(3, 40, 16, n_classes=2, distance="euclidean")
    monkeypatch.setattr(launches, "prototype_parts", lambda n_classes, target: 5)
    assert_accurate(problem, "triton")


# ---- two sides, rows as they are, negatives only ---------------------------------------------------------------------


def options_problem(
    n_left: int | None, n_rows: int, width: int = 20, temperature: float = 0.1, norm: float | None = None, **options: Any
) -> Problem:
    """Rows of about the length ``norm`` as they are, or normalised; labels, a few of them -1, where positives are by label."""
    options |= {"n_left": n_left, "normalize": norm is None, "reduction": options.get("reduction", REDUCTIONS[n_rows % 3])}
    by_label = options.get("positives") == "label"
    generator = torch.Generator().manual_seed(n_rows)
    z = torch.randn(n_rows, width, generator=generator) * (1 if norm is None else norm / width**0.5)
    with_prototypes = options.pop("with_prototypes", False)
    options["n_views"] = options.get("n_views", 1 if by_label else 2)
    labels = torch.randint(-1, 4, (n_rows // options["n_views"],), generator=generator)
    prototypes = torch.randn(4, width, generator=generator) / width**0.5
    return Problem(
        z.double(),
        labels if by_label or with_prototypes else None,
        prototypes.double() if with_prototypes else None,
        temperature,
        options,
    )


def forms() -> dict[str, Problem]:
    """Each option alone and with the others: ragged numbers of rows, several tiles of 16 and panels of 32 of them a side."""
    label: dict[str, Any] = {"positives": "label"}
    return {
        "clip": options_problem(49, 98),
        "clip, online": options_problem(49, 98, temperature=0.01, reduction="none"),
        "clip by label": options_problem(65, 98, **label),
        "clip by label, online": options_problem(33, 98, temperature=0.01, **label),
        "clip by label, raw": options_problem(20, 97, norm=3.0, **label),
        "clip, raw, prototypes": options_problem(33, 66, norm=3.0, with_prototypes=True, distance="euclidean"),
        "raw, prototypes": options_problem(None, 66, norm=3.0, with_prototypes=True, distance="manhattan"),
        "supcon, raw": options_problem(None, 67, norm=3.0, **label),
        "negatives": options_problem(None, 67, negatives_only=True, **label),
        "negatives, online": options_problem(None, 68, temperature=0.01, negatives_only=True, **label),
        "negatives of instances": options_problem(None, 66, negatives_only=True, n_views=3),
        "negatives of two sides, raw": options_problem(33, 66, norm=3.0, negatives_only=True),
        "negatives of two sides by label": options_problem(17, 67, negatives_only=True, **label),
    }


@interpreted
@pytest.mark.parametrize("form", forms())
def test_forms_in_many_tiles(form: str, is_wide: bool, split_columns: None) -> None:
    assert_accurate(forms()[form], "triton", ill_conditioned="raw" in form)


def rows_so_long_that_logits_are_in_thousands() -> Problem:
    problem = options_problem(None, 67, norm=30.0, positives="label")
    assert (problem.embeddings @ problem.embeddings.T).abs().max() > 10_000 * problem.temperature
    return problem


@interpreted
def test_long_rows(is_wide: bool, small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accurate as any others, where s_ij and s_ji are the same bits: in float64, and rounded once, they are."""
    from triton.runtime import interpreter

    def product(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(dtype)

    monkeypatch.setattr(interpreter, "np", SimpleNamespace(**vars(np) | {"matmul": product}))
    assert_accurate(rows_so_long_that_logits_are_in_thousands(), "triton", ill_conditioned=True)


@interpreted
def test_long_rows_and_a_product_that_is_not_symmetric(is_wide: bool, small_tiles: None) -> None:
    """Row j's softmax is of s_ji, and row i's gradient takes its share by s_ij: what these differ by is a relative error of it.

    The interpreter's own product sums in another order for them on CPUs without AVX-512: an error of a rounding of the logit.
    """
    problem = rows_so_long_that_logits_are_in_thousands()
    largest = float((problem.embeddings @ problem.embeddings.T).abs().max() / problem.temperature)
    expected, actual = problem.solve("reference", torch.float64), problem.solve("triton", torch.float32)
    for name, value in expected.items():
        assert relative_error(actual[name], value) < largest * torch.finfo(torch.float32).eps, name


SIDES = [(1, 1), (1, 33), (130, 1), (31, 31), (33, 130), (65, 64), (0, 31), (65, 0), (0, 0)]


@interpreted
@pytest.mark.parametrize(("m", "n"), SIDES)
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("positives", POSITIVES)
def test_clip_loss(positives: str, temperature: float, m: int, n: int) -> None:
    """The public function, tiles as shipped; float32 of this width takes the path of wide rows."""
    if positives == "instance":
        m = n
    rows, labels = torch.randn(m + n, 40), torch.randint(-1, 3, (m + n,))
    of_sides = (labels[:m], labels[m:]) if positives == "label" else ()

    def solve(dtype: torch.dtype, backend: str, reduction: str) -> list[torch.Tensor]:
        x, y, tau = (v.to(dtype).requires_grad_() for v in (rows[:m], rows[m:], torch.tensor(temperature)))
        loss = clop_kernels.clip_loss(x, y, *of_sides, temperature=tau, reduction=reduction, backend=backend)
        upstream = torch.linspace(0.1, 1, m + n).to(loss) if loss.dim() else None
        return [loss.detach(), *torch.autograd.grad(loss, (x, y, tau), upstream)]

    for reduction in REDUCTIONS:
        results = solve(torch.float32, "triton", reduction), solve(torch.float64, "reference", reduction)
        for actual, expected in zip(*results, strict=True):
            assert actual.shape == expected.shape
            # The floor: a row compared with one other has a gradient of nothing but rounding.
            assert relative_error(actual, expected, floor=1e-3 / temperature) < 1e-5


@interpreted
@pytest.mark.parametrize("width", [64, 264])
@pytest.mark.parametrize("form", ["clip", "clip by label", "negatives", "raw"])
def test_forms_in_float16(form: str, width: int) -> None:
    problem = {
        "clip": options_problem(33, 66, width, reduction="none"),
        "clip by label": options_problem(40, 65, width, positives="label"),
        "negatives": options_problem(None, 65, width, positives="label", negatives_only=True),
        "raw": options_problem(None, 66, width, norm=2.0, with_prototypes=True, distance="euclidean"),
    }[form]
    assert_as_good_as_plain(problem, "triton", torch.float16)


@interpreted
def test_negative_logsumexp_of_rows_without_negatives_and_of_nan(is_wide: bool, split_columns: None) -> None:
    """A row without negatives has zeros; a NaN among the negatives of a row, or in it, shows in its number."""
    z, labels = torch.randn(40, 20), torch.zeros(40, dtype=torch.int64)
    leaf = z.clone().requires_grad_()
    loss = clop_kernels.negative_logsumexp(leaf, labels, backend="triton")
    assert torch.equal(loss, torch.zeros(40))
    assert torch.equal(torch.autograd.grad(loss.sum(), leaf)[0], torch.zeros_like(z))
    labels[:20] = 1
    z[3, 2] = float("nan")
    shows = clop_kernels.negative_logsumexp(z, labels, backend="triton").isnan()
    assert torch.equal(shows, (labels == 0) | (torch.arange(40) == 3))
    others = torch.randn(40, 20)
    assert clop_kernels.clip_loss(z, others, backend="triton").isnan()
    assert clop_kernels.clip_loss(others, z, normalize=False, backend="triton").isnan()


@interpreted
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_prototype_term_alone(reduction: str, is_wide: bool, small_tiles: None) -> None:
    """No row can have a positive: no pairs, no launch for them, and no sums that they would leave."""
    problem = random_problem(1, 40, 20, reduction=reduction, distance="euclidean")
    assert_accurate(problem, "triton")
    assert_accurate(problem.with_options(normalize=False), "triton")
    as_tensor = run(problem, torch.tensor(problem.temperature))
    assert as_tensor["temperature"] == 0.0
    options = LossOptions(temperature=0.1, compute_dtype=torch.bfloat16, **OPTIONS | {"n_views": 1})
    names = [launch.kernel.__name__ for launch in resources.launches_of(options, 4096, 128, 90)]
    assert names == ["prologue_kernel", "loss_kernel", "finish_kernel", "prototype_kernel"]


@interpreted
def test_two_sides_give_the_same_bits(is_wide: bool, small_tiles: None) -> None:
    problem = forms()["clip by label"]
    first, second = problem.solve("triton", torch.float32), problem.solve("triton", torch.float32)
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- the temperature in a tensor that the host does not read ----------------------------------------------------------


@interpreted
@pytest.mark.parametrize("temperature", [0.01, 1 / 60.0001, 1 / 59.9999, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_kernels_read_the_temperature(temperature: float, reduction: str, is_wide: bool, small_tiles: None) -> None:
    """What a GPU gets: the operator hands a CPU's tensor over as a float."""
    problem = random_problem(2, 17, 20, positives="label", temperature=temperature, reduction=reduction)
    as_float = run(problem, problem.temperature)
    as_tensor = run(problem, torch.tensor(problem.temperature))
    for name, value in as_float.items():
        assert relative_error(as_tensor[name], value) < 1e-6, name


@interpreted
@pytest.mark.parametrize("form", ["clip", "supcon, raw"])
def test_the_kernels_read_the_temperature_in_other_forms(form: str, is_wide: bool, small_tiles: None) -> None:
    """Of unit rows and of others, whose softmax has one path; the kernels are the same for all forms."""
    problem = forms()[form]
    as_float, as_tensor = run(problem, problem.temperature), run(problem, torch.tensor(problem.temperature))
    for name, value in as_float.items():
        if value is not None:
            assert relative_error(as_tensor[name], value) < 1e-6, name


@interpreted
@pytest.mark.parametrize("temperature", [1e30, 1e46, 1e300])
def test_a_temperature_whose_inverse_float32_does_not_hold(temperature: float) -> None:
    """A float is not taken for a tensor."""
    z = torch.randn(12, 4, requires_grad=True)
    loss = clop_kernels.ntxent_loss(z, temperature=temperature, backend="triton")
    torch.testing.assert_close(loss.detach(), torch.tensor(11.0).log())
    assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-29
    groups = torch.stack([torch.arange(12), torch.arange(12) // 2 * 2, torch.arange(12) // 2 * 2 + 2]).int()
    options = LossOptions(temperature, positives="label", compute_dtype=torch.float32)
    zhat = torch.nn.functional.normalize(z.detach(), dim=1)
    assert (TRITON.load().pair_softmax(zhat, groups, None, options).total == 11).all()


@interpreted
def test_a_batch_without_rows() -> None:
    z, prototypes = torch.empty(0, 8, requires_grad=True), torch.eye(3, 8, requires_grad=True)
    loss = clop_kernels.clop_loss(z, torch.empty(0, dtype=torch.int64), prototypes, backend="triton")
    loss.backward()
    assert loss == 0
    assert z.grad is not None
    assert prototypes.grad is not None
    assert z.grad.shape == (0, 8)
    assert (prototypes.grad == 0).all()


@interpreted
def test_negations_that_are_put_off() -> None:
    """Kernels are given memory, of which only the dispatcher knows that it holds the opposite."""
    assert_negations_are_seen("triton")


@interpreted
@pytest.mark.parametrize("distance", ["cosine", "manhattan"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_kernels_read_the_weight(distance: str, reduction: str) -> None:
    problem = random_problem(2, 9, 16, distance=distance, reduction=reduction)
    expected, actual = run(problem, 0.1, weight=0.75), run(problem, 0.1, weight=torch.tensor(0.75))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert not torch.equal(run(problem, 0.1, weight=torch.tensor(0.5))["loss"], expected["loss"])


def run(
    problem: Problem, temperature: float | torch.Tensor, weight: float | torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The backend itself, below the operator."""
    module = TRITON.load()
    z, prototypes = problem.embeddings.float(), problem.prototypes.float() if problem.prototypes is not None else None
    numbers = {"temperature": temperature} | ({} if weight is None else {"prototype_weight": weight})
    options = LossOptions(**OPTIONS | problem.options | numbers, compute_dtype=torch.float32)
    loss, residuals = module.forward(z, problem.labels, prototypes, options)
    assert isinstance(residuals, Residuals)
    upstream = torch.linspace(-1, 1, loss.numel()) if loss.dim() else torch.ones(())
    grads = module.backward(upstream, z, residuals, problem.labels, prototypes, options, Needs(True, True, True))
    return {"loss": loss, **grads._asdict()}


# ---- as a user and torch.compile meet it -------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction: str) -> None:
    """Backends make the results, so of each the operator is looked at."""
    call = op_call("triton", reduction, torch.float32)
    if reduction == "none":  # and rows as they are, of two sides
        options = call.options._replace(n_views=1, normalize=False, n_left=4)
        call = call._replace(labels=torch.arange(10) % 3, options=options)
    arguments = call.packed()
    torch.library.opcheck(torch.ops.clop.loss.default, arguments)
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    loss, *residuals = torch.ops.clop.loss(*detached)
    needs = [True, True, True]
    torch.library.opcheck(torch.ops.clop.loss_backward.default, (torch.ones_like(loss), *residuals, *detached, needs))


@interpreted
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's default backend needs g++")
def test_compiles_without_a_graph_break() -> None:
    problem = random_problem(2, 9, 6)

    def loss(z: torch.Tensor) -> torch.Tensor:
        return clop_kernels.ntxent_loss(2 * z, backend="triton")

    z = problem.embeddings.float().requires_grad_()
    (expected,) = torch.autograd.grad(loss(z), z)
    (actual,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(z), z)
    torch.testing.assert_close(actual, expected)


@interpreted
def test_autocast_rounds_the_operands_alone() -> None:
    problem = random_problem(2, 9, 6)
    z = problem.embeddings.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = clop_kernels.ntxent_loss(z, backend="triton")
    (grad,) = torch.autograd.grad(loss, z)
    assert (loss.dtype, grad.dtype) == (torch.float32, torch.float32)
    exact = clop_kernels.ntxent_loss(z, backend="triton")
    assert 0 < (loss - exact).abs().item() < 1e-2


@interpreted
def test_labels_are_checked() -> None:
    z, prototypes = torch.randn(6, 4), torch.randn(2, 4)
    for bad in (-2, 2):
        with pytest.raises(ValueError, match=f"labels contains {bad}"):
            clop_kernels.clop_loss(z, torch.tensor([0, 1, bad]), prototypes, backend="triton")


# ---- launches, memory, resources: nothing runs -------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("form", resources.FORMS)
@pytest.mark.parametrize(("width", "dtype", "most"), [(128, "bfloat16", 6), (128, "float32", 7), (1024, "bfloat16", 7)])
def test_few_launches(width: int, dtype: str, most: int, form: str) -> None:
    """With the gradient of the temperature."""
    launches = list(resources.launches(resources.Case(90, dtype, width, 2048, form)))
    assert len([launch for launch in launches if launch.kernel.__name__ != "prototype_kernel"]) <= most


@interpreted
@pytest.mark.parametrize("n_left", [1, 100, 4096, 6000])
def test_two_sides_cost_their_own_pairs_only(n_left: int) -> None:
    options = LossOptions(temperature=0.1, compute_dtype=torch.bfloat16, **OPTIONS | {"n_left": n_left, "positives": "label"})
    heights = [-(-side // 128) for side in (n_left, 8192 - n_left)]
    found = [launch for width in (128, 1024) for launch in resources.launches_of(options, 8192, width, 90)]
    on_chip = [launch for launch in found if launch.kernel.__name__ in ("softmax_kernel", "gradient_kernel")]
    assert len(on_chip) == 3
    for launch in on_chip:
        assert launch.grid[0] == sum(-(-side // launch.arguments["BLOCK_M"]) for side in (n_left, 8192 - n_left))
    panels = [launch.grid for launch in found if launch.kernel.__name__ == "pair_kernel"]
    assert sum(rows * columns for rows, columns in panels) <= heights[0] * heights[1] * 2 + 2  # tiles of 128 x 64


@interpreted
@pytest.mark.parametrize("width", [64, 128, 1024])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_launch_takes_a_tensor_that_grows_with_n_squared(width: int, dtype: str) -> None:
    for n_rows, form in itertools.product((2**16, 2**18), ("general", "two-sided")):
        for launch in itertools.islice(resources.launches(resources.Case(90, dtype, width, n_rows, form)), 1000):
            for name, value in launch.arguments.items():
                if isinstance(value, torch.Tensor):
                    assert value.numel() <= max(n_rows * width, 4096**2), name


@interpreted
def test_columns_are_split_where_blocks_are_few() -> None:
    from clop_kernels.backends.triton import tiles

    at_once = 264
    found = [tiles.splits(n_blocks, 512, at_once, 132) for n_blocks in (1, 32, 128, 264, 300, 396, 1024, 2**14)]
    assert found == [128, 8, 2, 1, 3, 2, 1, 1]
    for n_blocks, n_tiles in itertools.product(range(1, 600, 7), (1, 2, 3, 16, 500)):
        n_splits = tiles.splits(n_blocks, n_tiles, at_once, 132)
        assert 1 <= n_splits <= n_tiles
        assert n_splits == 1 or n_splits * n_blocks <= tiles.MOST_ROUNDS * at_once


@interpreted
def test_float32_takes_one_product_for_three_where_torch_would(request: pytest.FixtureRequest) -> None:
    from clop_kernels.backends.triton import launches, tiles

    target = tiles.Target(90, 132)
    assert launches.precision(torch.float32, target) == "tf32x3"
    request.getfixturevalue("tf32")
    assert launches.precision(torch.float32, target) == "tf32"


@pytest.fixture
def units_that_cut_off(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """TF32 with operands cut off after ten bits of the mantissa, as matrix units do. The last of the list is the precision."""
    from triton.runtime import interpreter

    from clop_kernels.backends.triton import launches

    multiply = interpreter.InterpreterBuilder.create_dot
    precisions = ["tf32"]

    def cut_off(x: Any) -> Any:
        return interpreter.TensorHandle((x.data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32), x.dtype)

    def create_dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        if precisions[-1] == "tf32":
            a, b = cut_off(a), cut_off(b)
        return multiply(builder, a, b, *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(launches, "precision", lambda dtype, target: precisions[-1])
    return precisions


@interpreted
@pytest.mark.parametrize("of_forward", ["tf32", "tf32x3"])
def test_tf32_is_unbiased(of_forward: str, is_wide: bool, small_tiles: None, units_that_cut_off: list[str]) -> None:
    """Operands that are cut off, not rounded, are all too small: the loss was 2e-4 off on a GPU. A pass has its own precision."""
    problem = random_problem(2, 60, 24)
    assert problem.prototypes is not None
    expected = problem.solve("reference", torch.float64)
    tensors = (problem.embeddings, problem.prototypes, torch.tensor(problem.temperature))
    z, prototypes, tau = (x.float().requires_grad_() for x in tensors)
    units_that_cut_off.append(of_forward)
    loss = problem.loss(z, problem.labels, prototypes, tau, "triton")
    units_that_cut_off.append("tf32")
    gradients = torch.autograd.grad(loss, (z, prototypes, tau))
    actual = dict(zip(("loss", "embeddings", "prototypes", "temperature"), (loss.detach(), *gradients), strict=True))
    for name, allowed in (("loss", 1e-5), ("temperature", 1e-4), ("embeddings", 5e-4), ("prototypes", 1e-6)):
        assert relative_error(actual[name], expected[name]) < allowed, name


@interpreted
def test_tf32_is_unbiased_in_passes_over_pairs_alone(is_wide: bool, small_tiles: None, units_that_cut_off: list[str]) -> None:
    zhat = torch.nn.functional.normalize(torch.randn(80, 24), dim=1)
    groups = torch.stack([torch.arange(80), torch.arange(80) // 2 * 2, torch.arange(80) // 2 * 2 + 2]).int()
    options = LossOptions(0.1, positives="label", compute_dtype=torch.float32)
    triton, tiled = TRITON.load(), next(b for b in backends.BACKENDS if b.name == "tiled").load()
    expected, actual = (b.pair_softmax(zhat, groups, None, options) for b in (tiled, triton))
    bias = (actual.negative.log() + actual.shift - expected.negative.log() - expected.shift).mean()
    assert abs(bias) < 3e-4  # of operands cut off 2.4e-3
    coefficients = torch.stack([1 / (expected.negative + expected.positive), *torch.zeros(2, 80), expected.shift])
    gradients = [b.pair_gradient(zhat, groups, None, coefficients, options) for b in (tiled, triton)]
    assert relative_error(gradients[1], gradients[0].double()) < 8e-4


@interpreted
def test_operands_of_tf32_are_rounded(units_that_cut_off: list[str]) -> None:
    """To the nearest of ten bits; what is not a number stays none."""
    from clop_kernels.backends.triton import launches, tiles

    zhat = contract.unit_rows(torch.empty(2, 5), torch.float32)
    zhat.copy_(torch.tensor([1 + 2.0**-11, -1 - 2.0**-12, 2.0**-130, float("inf"), float("nan")]))
    zhat.view(torch.int32)[1, 4] = 0x7FFFFFFF  # a GPU's NaN
    options = LossOptions(0.1, positives="label", compute_dtype=torch.float32)
    groups = torch.zeros(3, 2, dtype=torch.int32)
    problem = launches.Problem.of_pairs(zhat, None, options, tiles.Target(0, 1))
    values = launches.values_of_pairs(zhat, groups, options.temperature)
    launch = next(launches.pair_softmax(problem).launches(values))
    launch.run()
    expected = torch.tensor([1 + 2.0**-10, -1, 2.0**-130, float("inf"), float("nan")]).expand(2, 5)
    torch.testing.assert_close(launch.arguments["operands"], expected, rtol=0, atol=0, equal_nan=True)


@interpreted
def test_kernels_compile_without_spilling(tmp_path: Path) -> None:
    """A few, to what the committed table says of them: .ci/run holds the whole table to be up to date.

    These are two kinds of matrix units; tests/test_sass.py has a third.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    options = ("--targets", "80", "100", "--dtypes", "bfloat16", "--dims", "16", "--all", "--csv", str(tmp_path / "found.csv"))
    command = [sys.executable, "-m", "benchmarks.resources", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 faults" in done.stdout
    found = resources.read_table(tmp_path / "found.csv")
    kinds = {(row.sm, row.instructions) for row in found if row.kernel in resources.MATRIX_KERNELS}
    assert kinds == {(80, "mma"), (100, "tcgen05")}
    committed = {row.source: row for row in resources.read_table(resources.TABLES / f"triton-{resources.triton_version()}.csv")}
    for row in found:
        known = committed.get(row.source, row)  # named after the first case that launches it; some serve all widths
        assert replace(known, D=row.D, dtype=row.dtype) == row


# ---- why it cannot run ---------------------------------------------------------------------------------------------------


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    reason = TRITON.obstacle(cpu, torch.float32)
    assert reason is not None
    with pytest.raises(clop_kernels.BackendUnavailableError, match="backend='triton' cannot run on cpu"):
        clop_kernels.ntxent_loss(torch.randn(4, 3), backend="triton")
    monkeypatch.setattr(backends, "_is_installed", lambda package: False)
    assert "pip install triton" in str(TRITON.obstacle(gpu, torch.float32))
    monkeypatch.setattr(backends, "_is_installed", lambda package: True)
    assert "supports float32, float16 and bfloat16" in str(TRITON.obstacle(gpu, torch.float64))
    assert "TRITON_INTERPRET=1" in str(TRITON.obstacle(cpu, torch.float32))
    assert "cuda and xpu" in str(TRITON.obstacle(torch.device("mps"), torch.float32))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "rounds bfloat16" in str(TRITON.obstacle(cpu, torch.bfloat16))
    monkeypatch.setattr(backends, "_capability", lambda index: (7, 5))
    assert "8.0 or higher, and this GPU has 7.5" in str(TRITON.obstacle(gpu, torch.float32))
    monkeypatch.setattr(backends, "_capability", lambda index: (9, 0))
    versions: dict[str, str] = {}
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(__version__=versions[name]))
    for triton, numpy, device, expected in (
        ("3.5.1", "2.3.5", gpu, "it needs Triton 3.6 or newer, and 3.5 is installed"),
        ("3.6.0", "2.5.2", gpu, None),
        ("3.10.0+git1", "2.5.2", gpu, None),
        ("3.6.0", "2.3.5", cpu, None),
        ("3.6.0", "2.4.0", cpu, "Triton's interpreter needs Triton 3.7 for NumPy 2.4 or newer: `pip install 'numpy<2.4'`"),
        ("3.7.0", "2.4.0", cpu, None),
    ):
        versions |= {"triton": triton, "numpy": numpy}
        backends._version_of.cache_clear()
        assert TRITON.obstacle(device, torch.float32) == expected
    backends._version_of.cache_clear()


@interpreted
def test_the_interpreter_runs_by_name_only() -> None:
    assert backends.select(None, torch.device("cpu"), torch.float32).name != "triton"
    z = torch.randn(6, 4)
    torch.testing.assert_close(clop_kernels.ntxent_loss(z), clop_kernels.ntxent_loss(z, backend="triton"))
