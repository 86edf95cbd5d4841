"""The CUDA kernels on the simulator, beyond the contract: orders of threads, blocks that share rows, wrong calls."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import clop_kernels
from clop_kernels import backends
from clop_kernels.backends import cuda
from clop_kernels.backends.contract import LossOptions, unit_rows
from clop_kernels.groups import label_groups

from .. import host
from ..support.oracle import (
    Problem,
    assert_accurate,
    assert_as_good_as_plain,
    assert_pairs_accurate,
    named_options,
    negatives_problem,
    random_problem,
    relative_error,
    solve_below_the_operator,
    two_sided_problem,
)

OBSTACLE = host.obstacle()
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=f"the CUDA kernels cannot be compiled for this CPU: {OBSTACLE}")

FEW, MANY = 1, 1000
"""Processors of the simulated GPU: with few, a block has its rows for itself; with many, blocks share rows where that pays."""


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[host.Kernels]:
    """The backend ``cuda`` on a simulated GPU of one processor."""
    with host.as_backend(monkeypatch, FEW) as kernels:
        yield kernels


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_instances", [1, 2, 127, 128, 300])
@pytest.mark.parametrize("n_views", [1, 3])
def test_groups_are_those_of_the_sort(n_instances: int, n_views: int, kernels: host.Kernels) -> None:
    for order, n_classes in itertools.product(host.ORDERS, (1, 5, 1000)):
        kernels.module.set_order(order, 7)
        labels = torch.randint(-1, n_classes, (n_instances,))
        for n_left in {None, 0, 1, n_instances // 2, n_instances} if n_views == 1 else {None}:
            options = cuda.arguments_of(LossOptions(n_views=n_views, n_left=n_left))
            assert torch.equal(kernels.cuda_groups(labels, *options), label_groups(labels, n_views, n_left).table())


def test_many_instances_are_sorted(kernels: host.Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(3, 40, 16, positives="label", n_classes=5)
    ranked = problem.solve("cuda", torch.float32)
    monkeypatch.setattr(cuda, "RANKED_INSTANCES", 0)
    by_sort = problem.solve("cuda", torch.float32)
    assert all(torch.equal(ranked[name], by_sort[name]) for name in ranked)


@pytest.mark.parametrize("width", [40, 100])
@pytest.mark.usefixtures("kernels", "tf32")
def test_tf32_is_as_good_as_its_ten_bits(width: int) -> None:
    """Between float32's own accuracy, which it has by default, and float16's, which has as many bits."""
    problem = random_problem(2, 65, width)
    expected = problem.solve("reference", torch.float64)
    half = problem.solve("reference", torch.float16)
    actual = problem.solve("cuda", torch.float32)
    error = relative_error(actual["embeddings"], expected["embeddings"])
    assert 1e-6 < error <= relative_error(half["embeddings"], expected["embeddings"])


def test_rows_that_were_saved_side_by_side(kernels: host.Kernels) -> None:
    """As hooks may that move what is saved for the backward pass."""
    problem = random_problem(2, 20, 37)
    expected = problem.solve("cuda", torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.contiguous, lambda x: x):
        actual = problem.solve("cuda", torch.float32)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


RACED = {
    "by label, a term a row": random_problem(2, 70, 16, positives="label", reduction="none", distance="euclidean"),
    "by instance, cold": random_problem(2, 70, 100, temperature=0.01, distance="manhattan"),
    "sides by label": two_sided_problem(70, 90, 24, labelled=True, reduction="none"),
    "sides, cold": two_sided_problem(70, 70, 100, labelled=False, temperature=0.01),
}


@pytest.mark.parametrize("problem", RACED)
@pytest.mark.parametrize(("dtype", "n_processors"), [(torch.float32, MANY), (torch.bfloat16, FEW)], ids=["many", "few"])
def test_any_order_of_the_threads_gives_the_same_bits(
    dtype: torch.dtype, n_processors: int, problem: str, kernels: host.Kernels
) -> None:
    """A race, or a sum in the order of arrival, would show."""
    kernels.n_processors = n_processors
    results = []
    for order in host.ORDERS:
        kernels.module.set_order(order, 3)
        results.append(RACED[problem].solve("cuda", dtype))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize(("positives", "temperature"), [("instance", 0.1), ("label", 0.01)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_agrees_with_triton(positives: str, temperature: float, dtype: torch.dtype, kernels: host.Kernels) -> None:
    """Whose kernels run in Triton's interpreter: closer to each other than the rounding leaves both to the truth."""
    triton = next(b for b in backends.BACKENDS if b.name == "triton")
    if (reason := triton.obstacle(torch.device("cpu"), dtype)) is not None:
        pytest.skip(f"needs Triton's interpreter: {reason}")
    problem = random_problem(2, 40, 24, positives=positives, temperature=temperature)
    ours, theirs = problem.solve("cuda", dtype), problem.solve("triton", dtype)
    for name, value in ours.items():
        assert relative_error(theirs[name], value) <= (1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps), name


@pytest.mark.parametrize(
    ("labels", "temperature", "weight", "message"),
    [
        ([0, 1, 9], 0.1, 1.0, "labels holds a value below -1 or without a prototype"),
        ([0, -2, 1], 0.1, 1.0, "labels holds a value below -1 or without a prototype"),
        ([0, 1, -1], -1.0, 1.0, "temperature is not a positive finite number"),
        ([0, 1, -1], torch.inf, 1.0, "temperature is not a positive finite number"),
        ([0, 1, -1], 0.1, -1.0, "prototype_weight is not a finite number of at least 0"),
        ([0, 1, -1], 0.1, torch.nan, "prototype_weight is not a finite number of at least 0"),
    ],
)
def test_wrong_values_are_asserted_on_the_device(
    labels: list[int], temperature: float, weight: float, message: str, kernels: host.Kernels
) -> None:
    problem = dataclasses.replace(random_problem(2, 3, 4), labels=torch.tensor(labels))
    with pytest.raises(RuntimeError, match=message):
        solve_below_the_operator(cuda, problem, torch.tensor(temperature), torch.tensor(weight))


# ---- wrong calls -----------------------------------------------------------------------------------------------------


def wrong_calls() -> list[tuple[str, dict[str, Any]]]:
    """What an operator refuses, and what of the right call of cuda_forward makes it do so."""
    n_rows, width = 6, 4
    table = label_groups(torch.zeros(n_rows, dtype=torch.int64), 1).table()
    zhat, by_label = torch.zeros(n_rows, width), {"positives": 1, "n_views": 1}
    return [
        ("embeddings", {"embeddings": torch.zeros(n_rows)}),
        ("embeddings", {"embeddings": torch.zeros(0, width)}),
        ("embeddings", {"embeddings": torch.zeros(n_rows, width, dtype=torch.float64)}),
        ("zhat", {"zhat": zhat.double()}),
        ("zhat", {"zhat": zhat[1:]}),
        ("zhat", {"zhat": torch.zeros(width, n_rows).T}),
        ("zhat", {"zhat": torch.zeros(n_rows * width + 1)[1:].view(n_rows, width)}),
        ("zhat", {"zhat": torch.zeros(n_rows, width + 1)[:, :-1]}),
        ("compute_dtype", {"compute_dtype": torch.float64}),
        ("n_views", {"n_views": 0}),
        ("n_views", {"n_views": 4}),
        ("distance", {"distance": 3}),
        ("reduction", {"reduction": -1}),
        ("positives", {"positives": 2}),
        ("groups", by_label),
        ("groups", {"groups": table}),
        ("groups", by_label | {"groups": table.long()}),
        ("groups", by_label | {"groups": torch.zeros(n_rows, dtype=torch.int32)}),
        ("n_left", {"n_left": 2}),
        ("n_left", {"n_left": 7}),
        ("n_left", {"n_left": -2}),
        ("n_left", by_label | {"n_views": 2, "n_left": 2, "groups": table}),
        ("labels", {"labels": torch.zeros(2, dtype=torch.int64)}),
        ("labels", {"labels": None}),
        ("labels", {"labels": torch.zeros(3, dtype=torch.int32)}),
        ("prototypes", {"prototypes": torch.ones(width, 2).T}),
        ("prototypes", {"prototypes": torch.ones(0, width)}),
        ("temperature", {"temperature_tensor": torch.ones(1)}),
        ("prototype_weight", {"prototype_weight_tensor": torch.ones((), dtype=torch.float64)}),
    ]


@pytest.mark.parametrize(("name", "wrong"), wrong_calls())
def test_a_wrong_call_of_the_operator_is_an_exception(name: str, wrong: dict[str, Any], kernels: host.Kernels) -> None:
    z, labels, groups = torch.randn(6, 4), torch.zeros(3, dtype=torch.int64), torch.empty((3, 0), dtype=torch.int32)
    right = {
        "embeddings": z, "zhat": torch.zeros(6, 4), "groups": groups, "labels": labels, "prototypes": torch.ones(2, 4),
        **named_options(LossOptions(n_views=2)),
        "temperature_tensor": None, "prototype_weight_tensor": None, "is_tf32": False,
    }  # fmt: skip
    torch.ops.clop_host.cuda_forward(*right.values())
    with pytest.raises(RuntimeError, match=f"clop_native: {name}: expected"):
        torch.ops.clop_host.cuda_forward(*(right | wrong).values())


def test_a_launch_that_is_stubbed_out_leaves_everything_else(kernels: host.Kernels) -> None:
    """What a call of the backend costs the host is measured so."""
    problem = random_problem(2, 20, 16, positives="label", n_classes=3)
    expected = problem.solve("cuda", torch.float32)
    kernels.module.set_launches(False)
    try:
        actual = problem.solve("cuda", torch.float32)
    finally:
        kernels.module.set_launches(True)
    assert {name: value.shape for name, value in actual.items()} == {name: value.shape for name, value in expected.items()}
    assert all(torch.equal(value, expected[name]) for name, value in problem.solve("cuda", torch.float32).items())


# ---- blocks that share rows ------------------------------------------------------------------------------------------


# Processors, problem, dtype, and how many blocks share left and right rows (without sides all rows), forward and backward.
SHARED: list[tuple[int, Problem, torch.dtype, tuple[int, int], tuple[int, int]]] = [
    (1, random_problem(2, 70, 40), torch.float32, (1, 1), (1, 1)),
    (4, random_problem(2, 70, 40), torch.float32, (2, 1), (2, 1)),  # three tiles and two
    (1000, random_problem(2, 70, 40, temperature=0.01), torch.float32, (5, 1), (3, 1)),  # two, two and one
    (1000, random_problem(7, 43, 40, positives="label", reduction="none"), torch.float32, (10, 1), (5, 1)),
    (1000, random_problem(7, 43, 200, distance="euclidean"), torch.bfloat16, (10, 1), (5, 1)),  # parts without near tiles
    (1000, random_problem(2, 90, 24, normalize=False, temperature=1.0), torch.float32, (6, 1), (3, 1)),
    (1000, two_sided_problem(10, 290, 40, labelled=True), torch.float32, (10, 1), (5, 1)),
    (1000, two_sided_problem(290, 11, 40, labelled=True, temperature=0.01), torch.float32, (1, 10), (1, 5)),
    (1000, two_sided_problem(150, 150, 24, labelled=False, reduction="none"), torch.float16, (3, 3), (3, 3)),
    (1000, negatives_problem(300, 40), torch.float32, (10, 1), (5, 1)),
    (1000, negatives_problem(300, 40, temperature=0.01), torch.float32, (10, 1), (5, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("n_processors", "problem", "dtype", "forward", "backward"), SHARED)
def test_blocks_that_share_rows(
    n_processors: int,
    problem: Problem,
    dtype: torch.dtype,
    forward: tuple[int, int],
    backward: tuple[int, int],
    kernels: host.Kernels,
) -> None:
    """Right, and whichever block ends last the same bits."""
    kernels.n_processors = n_processors
    assert_right(problem, dtype, ill_conditioned=not problem.options.get("normalize", True))
    assert kernels.shares["softmax"][:2] == forward
    assert kernels.shares["gradient"][:2] == backward
    expected = problem.solve("cuda", dtype)
    kernels.module.set_order("reverse", 0)
    assert all(torch.equal(value, expected[name]) for name, value in problem.solve("cuda", dtype).items())


@pytest.mark.parametrize(
    ("shape", "order"), [((310, None, 24), "shuffled"), ((300, 10, 100), "forward"), ((1100, 3, 32), "reverse")], ids=str
)
def test_pairs_alone_of_shared_rows(shape: tuple[int, int | None, int], order: str, kernels: host.Kernels) -> None:
    kernels.n_processors = MANY
    kernels.module.set_order(order, 5)
    assert_pairs_accurate("cuda", torch.float32, *shape)
    assert all(kernels.shares[kernel][0] > 3 for kernel in ("softmax", "gradient"))


@pytest.mark.parametrize("row", [3, 150])
def test_a_row_that_is_not_finite_shows_in_shared_rows(row: int, kernels: host.Kernels) -> None:
    kernels.n_processors = MANY
    z = torch.randn(160, 24)
    z[row, 2] = torch.nan
    z.requires_grad_()
    loss = clop_kernels.ntxent_loss(z, reduction="none", backend="cuda")
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert kernels.shares["gradient"][0] > 1
    assert loss.isnan().all()
    assert grad.isnan().any(1).all()


@pytest.mark.parametrize("width", [64, 128, 256])
def test_sums_of_shared_rows_do_not_grow_with_the_rows(width: int, kernels: host.Kernels) -> None:
    """At most three blocks of 128 rows for each that a processor has at once: 384 KB a processor."""
    n_processors, places = 132, 1 if width == 256 else 2
    for n_rows in (1, 2, 200, 512, 2048, 8192, 16384, 17000, 25000, 33000, 50000, 60000, 70000, 2**20):
        (of_left, _, n_blocks), n_floats = kernels.module.gradient_plan(n_rows, width, n_processors)
        assert n_blocks == of_left * -(-n_rows // 128)
        assert n_floats == (n_blocks * 128 * width if of_left > 1 else 0)
        assert n_floats <= 3 * places * n_processors * 128 * width <= n_processors * 384 * 256
        assert of_left <= 16
        if n_blocks >= 3 * places * n_processors:
            assert of_left == 1


# ---- extremes ----------------------------------------------------------------------------------------------------------


FLOOR = 1e-7
"""Norms below are taken for this: a gradient that is zero, but for rounding, in one formula is a plain zero in another."""


def assert_right(problem: Problem, dtype: torch.dtype = torch.float32, ill_conditioned: bool = False) -> None:
    if dtype == torch.float32:
        assert_accurate(problem, "cuda", ill_conditioned, FLOOR)
    else:
        assert_as_good_as_plain(problem, "cuda", dtype, FLOOR)


@pytest.mark.parametrize("width", [7, 64, 300, 4100])
@pytest.mark.parametrize("dtype", host.DTYPES, ids=str)
def test_rows_as_they_are_to_the_last_bit(width: int, dtype: torch.dtype, kernels: host.Kernels) -> None:
    z = torch.randn(9, width) * torch.logspace(-30, 30, 9)[:, None]
    zhat = unit_rows(z, dtype)
    options = cuda.arguments_of(LossOptions(compute_dtype=dtype, normalize=False))
    norms, _ = kernels.cuda_prologue(z, zhat, torch.empty((3, 0), dtype=torch.int32), None, None, *options)
    assert torch.equal(zhat.float().nan_to_num(), z.to(dtype).float().nan_to_num())
    torch.testing.assert_close(norms, z.double().norm(dim=1).float(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("n_processors", [FEW, MANY], ids=["few", "many"])
def test_positives_far_above_the_negatives_are_no_pairs(n_processors: int, kernels: host.Kernels) -> None:
    """By 2^288, at tau = 0.005: a maximum over them would leave nothing of the negatives."""
    kernels.n_processors = n_processors
    problem = negatives_problem(72, 8, temperature=0.005)
    rows = torch.eye(8, dtype=torch.float64).repeat(9, 1) + 1e-3 * problem.embeddings
    assert_right(dataclasses.replace(problem, embeddings=rows.float().double(), labels=torch.arange(8).repeat(9)))


@pytest.mark.parametrize(("n_left", "n_rows"), [(None, 90), (0, 90), (33, 90), (64, 90), (90, 90)])
def test_panels_have_every_pair_once(n_left: int | None, n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "panel_rows", lambda compute_dtype: 32)
    options = LossOptions(0.1, positives="label", compute_dtype=torch.float32, n_left=n_left)
    side = torch.arange(n_rows) < (n_rows if n_left is None else n_left)
    expected = torch.ones(n_rows, n_rows) if n_left is None else (side[:, None] != side).float()
    visits, once = torch.zeros(n_rows, n_rows), torch.zeros(n_rows, n_rows)
    for rows, columns in cuda._panels(n_rows, options, once=False):
        visits[rows, columns] += 1
    for rows, columns in cuda._panels(n_rows, options, once=True):
        once[rows, columns] += 1
        if rows != columns:
            once[columns, rows] += 1
    assert torch.equal(visits, expected)
    assert torch.equal(once, expected)


# ---- the passes over pairs alone -------------------------------------------------------------------------------------


def test_sums_over_many_columns_do_not_drift(kernels: host.Kernels) -> None:
    """Matrix units cut their sums off: kept from tile to tile, a gradient's would be 3e-5 off."""
    assert_pairs_accurate("cuda", torch.float32, 4112, 16, 32)


@pytest.mark.parametrize("width", [24, 300])
def test_pairs_of_rows_that_begin_anywhere_in_memory(width: int, kernels: host.Kernels) -> None:
    options = LossOptions(0.1, positives="label", compute_dtype=torch.float32)
    zhat = torch.nn.functional.normalize(torch.randn(20, width), dim=1)
    groups = label_groups(torch.arange(20) % 3, 1, 8).table()
    shifted = torch.cat([zhat.new_zeros(1), zhat.flatten()])[1:].view(20, width)
    for x, y in zip(cuda.pair_softmax(zhat, groups, 8, options), cuda.pair_softmax(shifted, groups, 8, options), strict=True):
        assert torch.equal(x, y)
    coefficients = torch.rand(4, 20)
    expected, actual = (cuda.pair_gradient(rows, groups, 8, coefficients, options) for rows in (zhat, shifted))
    assert torch.equal(actual, expected)


def test_runs_of_rows_without_a_result_are_not_read(kernels: host.Kernels) -> None:
    options = LossOptions(0.1, positives="label", compute_dtype=torch.float32)
    zhat = torch.nn.functional.normalize(torch.randn(200, 24), dim=1)
    groups = label_groups(torch.arange(200) % 3, 1, 70).table()
    coefficients = torch.rand(4, 200)
    results = []
    for _ in range(2):
        results.append(
            [*cuda.pair_softmax(zhat, groups, 70, options), cuda.pair_gradient(zhat, groups, 70, coefficients, options)]
        )
        groups[0], groups[1:, 70:] = -1, 2**31 - 1
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
