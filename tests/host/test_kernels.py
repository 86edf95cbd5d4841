"""The CUDA kernels' own source on this CPU (tests/host/): every kernel against the float64 reference."""

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
from clop_kernels.backends import contract, cuda
from clop_kernels.backends.contract import DISTANCES, POSITIVES, REDUCTIONS, LossOptions, Needs, unit_rows
from clop_kernels.backends.extension import native_options
from clop_kernels.groups import label_groups

from .. import host
from ..contract.test_backends import assert_edge_case, edge_cases
from ..support.oracle import (
    LOSSES,
    Problem,
    assert_accurate,
    assert_as_good_as_plain,
    assert_float16_saturates_and_overflow_shows,
    assert_layouts_do_not_matter,
    assert_pairs_accurate,
    near_duplicates,
    negatives_problem,
    random_problem,
    relative_error,
    shaped_problem,
    two_sided_problem,
)

OBSTACLE = host.obstacle()
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=f"the CUDA kernels cannot be compiled for this CPU: {OBSTACLE}")

FEW, MANY = 1, 1000
"""Processors of the GPU that the host stands for: a block has its rows for itself, or shares them with as many as pay."""


@pytest.fixture(params=[FEW, MANY], ids=["few", "many"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[host.Kernels]:
    """The backend ``cuda`` on the CPU, with zhat as a GPU has it; memory that it allocates begins as NaN."""
    yield from _kernels_of(request.param, monkeypatch)


@pytest.fixture
def any_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[host.Kernels]:
    """The same, for what does not depend on the number of processors."""
    yield from _kernels_of(FEW, monkeypatch)


def _kernels_of(n_processors: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[host.Kernels]:
    kernels = host.Kernels(n_processors)
    here = tuple(
        dataclasses.replace(b, obstacle=lambda device, dtype: None, module=".cuda") if b.name == "cuda" else b
        for b in backends.BACKENDS
    )
    monkeypatch.setattr(contract, "DENSE_DEVICES", ())
    monkeypatch.setattr(cuda, "kernels", kernels)
    monkeypatch.setattr(backends, "BACKENDS", here)
    torch.use_deterministic_algorithms(True)
    yield kernels
    kernels.module.set_order("forward", 0)
    torch.use_deterministic_algorithms(False)


# ---- numbers ---------------------------------------------------------------------------------------------------------

N_ROWS = [(1, 1), (2, 1), (1, 63), (2, 32), (5, 13), (1, 127), (3, 43), (7, 43)]  # 1, 2, 63, 64, 65, 127, 129, 301 rows
WIDTHS = [1, 3, 7, 16, 64, 100, 128, 129, 250, 256, 300]
SHAPES = [*((shape, 37) for shape in N_ROWS), *(((5, 13), width) for width in WIDTHS), ((7, 43), 128)]


@pytest.mark.parametrize(("shape", "width"), [case for case in SHAPES if case[1] > 1], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_shapes_float32(shape: tuple[int, int], width: int, temperature: float, kernels: host.Kernels) -> None:
    assert_accurate(shaped_problem(shape, width, temperature), "cuda")


@pytest.mark.parametrize(("shape", "width"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_shapes_half_precision(shape: tuple[int, int], width: int, dtype: torch.dtype, kernels: host.Kernels) -> None:
    assert_as_good_as_plain(shaped_problem(shape, width), "cuda", dtype)


@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_width_one(temperature: float, any_kernels: host.Kernels) -> None:
    """Every cosine is 1 or -1, and every gradient zero."""
    problem = shaped_problem((5, 13), 1, temperature)
    expected, actual = problem.solve("reference", torch.float64), problem.solve("cuda", torch.float32)
    assert relative_error(actual["loss"], expected["loss"]) < 1e-6
    for name in ("embeddings", "temperature", "prototypes"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize(("distance", "reduction"), [*zip(DISTANCES, REDUCTIONS, strict=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_rows_in_many_panels(
    dtype: torch.dtype,
    distance: str,
    reduction: str,
    positives: str,
    temperature: float,
    any_kernels: host.Kernels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "is_wide", lambda width, compute_dtype: True)
    monkeypatch.setattr(cuda, "panel_rows", lambda compute_dtype: 32)
    problem = random_problem(
        3, 43, 20, n_classes=3, temperature=temperature, positives=positives, distance=distance, reduction=reduction
    )
    if dtype == torch.float32:
        assert_accurate(problem, "cuda")
    elif temperature == 0.1:
        assert_as_good_as_plain(problem, "cuda", dtype)


@pytest.mark.parametrize(("distance", "reduction"), [*itertools.product(DISTANCES, REDUCTIONS)])
@pytest.mark.parametrize("positives", POSITIVES)
def test_every_option(distance: str, reduction: str, positives: str, kernels: host.Kernels) -> None:
    problem = random_problem(3, 50, 20, n_classes=3, distance=distance, reduction=reduction, positives=positives)
    assert_accurate(problem, "cuda")


@pytest.mark.parametrize("n_instances", [1, 2, 127, 128, 300])
@pytest.mark.parametrize("n_views", [1, 3])
def test_groups_are_those_of_the_sort(n_instances: int, n_views: int, any_kernels: host.Kernels) -> None:
    for order, n_classes in itertools.product(host.ORDERS, (1, 5, 1000)):
        any_kernels.module.set_order(order, 7)
        labels = torch.randint(-1, n_classes, (n_instances,))
        for n_left in {None, 0, 1, n_instances // 2, n_instances} if n_views == 1 else {None}:
            options = cuda.arguments_of(LossOptions(n_views=n_views, n_left=n_left))
            assert torch.equal(any_kernels.cuda_groups(labels, *options), label_groups(labels, n_views, n_left).table())


def test_many_instances_are_sorted(any_kernels: host.Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(3, 40, 16, positives="label", n_classes=5)
    ranked = problem.solve("cuda", torch.float32)
    monkeypatch.setattr(cuda, "RANKED_INSTANCES", 0)
    by_sort = problem.solve("cuda", torch.float32)
    assert all(torch.equal(ranked[name], by_sort[name]) for name in ranked)


@pytest.mark.parametrize("width", [40, 100])
@pytest.mark.usefixtures("any_kernels", "tf32")
def test_tf32_is_as_good_as_its_ten_bits(width: int) -> None:
    """Between float32's own accuracy, which it has by default, and float16's, which has as many bits."""
    problem = random_problem(2, 65, width)
    expected = problem.solve("reference", torch.float64)
    half = problem.solve("reference", torch.float16)
    actual = problem.solve("cuda", torch.float32)
    error = relative_error(actual["embeddings"], expected["embeddings"])
    assert 1e-6 < error <= relative_error(half["embeddings"], expected["embeddings"])


@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.1])
@pytest.mark.parametrize("noise", [1e-3, 1e-2, 0.3])
@pytest.mark.parametrize("width", [8, 64])
def test_near_duplicates_keep_their_gradient(temperature: float, noise: float, width: int, kernels: host.Kernels) -> None:
    for n_views, n_instances in ((2, 40), (2, 101), (3, 40)):
        problem = near_duplicates(n_views, n_instances, width, noise, temperature)
        if problem.solve("reference", torch.float64)["loss"] > 1e-12:
            assert_accurate(problem, "cuda", ill_conditioned=True)


@pytest.mark.parametrize("case", edge_cases())
@pytest.mark.parametrize("distance", DISTANCES)
def test_edge_cases_are_finite_and_right(case: str, distance: str, kernels: host.Kernels) -> None:
    assert_edge_case(case, distance, torch.float32, "cuda")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("n_views", [1, 2])
def test_a_row_that_is_not_finite_shows(value: float, n_views: int, kernels: host.Kernels) -> None:
    z = torch.randn(6, 4)
    z[4, 2] = value
    assert clop_kernels.ntxent_loss(z, n_views=n_views, backend="cuda").isnan()


def test_float16_rows_of_zeros_saturate_and_overflow_shows(any_kernels: host.Kernels) -> None:
    assert_float16_saturates_and_overflow_shows("cuda")


@pytest.mark.parametrize("loss", LOSSES)
def test_layouts_do_not_matter(loss: str, kernels: host.Kernels) -> None:
    assert_layouts_do_not_matter(loss, "cuda")


def test_rows_that_were_saved_side_by_side(any_kernels: host.Kernels) -> None:
    """As hooks may that move what is saved for the backward pass."""
    problem = random_problem(2, 20, 37)
    expected = problem.solve("cuda", torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.contiguous, lambda x: x):
        actual = problem.solve("cuda", torch.float32)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_order_of_the_threads_gives_the_same_bits(dtype: torch.dtype, kernels: host.Kernels) -> None:
    """A race, or a sum in the order of arrival, would show."""
    for problem in (
        random_problem(2, 70, 16, positives="label", reduction="none", distance="euclidean"),
        random_problem(2, 70, 100, temperature=0.01, distance="manhattan"),
        two_sided_problem(70, 90, 24, labelled=True, reduction="none"),
        two_sided_problem(70, 70, 100, labelled=False, temperature=0.01),
    ):
        results = []
        for order in host.ORDERS:
            kernels.module.set_order(order, 3)
            results.append(problem.solve("cuda", dtype))
        for other in results[1:]:
            assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize(("positives", "temperature"), [("instance", 0.1), ("label", 0.01)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_agrees_with_triton(positives: str, temperature: float, dtype: torch.dtype, any_kernels: host.Kernels) -> None:
    """Whose kernels run in Triton's interpreter: closer to each other than the rounding leaves both to the truth."""
    triton = next(b for b in backends.BACKENDS if b.name == "triton")
    if (reason := triton.obstacle(torch.device("cpu"), dtype)) is not None:
        pytest.skip(f"needs Triton's interpreter: {reason}")
    problem = random_problem(2, 40, 24, positives=positives, temperature=temperature)
    ours, theirs = problem.solve("cuda", dtype), problem.solve("triton", dtype)
    for name, value in ours.items():
        assert relative_error(theirs[name], value) <= (1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps), name


@pytest.mark.parametrize("temperature", [0.01, 0.0262, 0.0263, 0.1])  # the softmax paths part at log2(e) / 55
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_kernels_read_the_temperature(temperature: float, reduction: str, kernels: host.Kernels) -> None:
    """What a GPU gets: the operator hands a CPU's tensor over as a float."""
    problem = random_problem(2, 17, 20, positives="label", temperature=temperature, reduction=reduction)
    as_float = run(problem, problem.temperature)
    as_tensor = run(problem, torch.tensor(problem.temperature))
    for name, value in as_float.items():
        assert relative_error(as_tensor[name], value) < 1e-6, name


@pytest.mark.parametrize("temperature", [0.01, 0.1, 10.0])
@pytest.mark.parametrize("options", [{"n_left": 13}, {"normalize": False}, {"negatives_only": True}], ids=str)
def test_the_kernels_read_the_temperature_with_every_option(
    temperature: float, options: dict[str, Any], kernels: host.Kernels
) -> None:
    problem = random_problem(1, 34, 20, positives="label", temperature=temperature, **options)
    as_float, as_tensor = (run(problem, t) for t in (problem.temperature, torch.tensor(problem.temperature)))
    for name, value in as_float.items():
        assert relative_error(as_tensor[name], value) < 1e-6, name


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("positives", "width"), [("label", 20), ("instance", 20), ("label", 300)])
def test_the_kernels_read_the_numbers(positives: str, width: int, reduction: str, kernels: host.Kernels) -> None:
    """A weight and a temperature of the device give the bits of the floats that they are."""
    problem = random_problem(2, 17, width, positives=positives, temperature=0.1, reduction=reduction, distance="euclidean")
    weight = torch.tensor(1.3)
    as_floats = run(problem, problem.temperature, float(weight))
    for numbers in ((problem.temperature, weight), (torch.tensor(problem.temperature), weight)):
        as_tensors = run(problem, *numbers)
        assert all(torch.equal(as_tensors[name], value) for name, value in as_floats.items())
    assert not torch.equal(as_floats["loss"], run(problem, problem.temperature, torch.tensor(1.2))["loss"])


def run(problem: Problem, temperature: float | Tensor, weight: float | Tensor = 0.7) -> dict[str, Tensor]:
    """The backend itself, below the operator."""
    assert problem.prototypes is not None
    z, prototypes = problem.embeddings.float(), problem.prototypes.float()
    numbers: dict[str, Any] = {"temperature": temperature, "prototype_weight": weight, "compute_dtype": torch.float32}
    options = LossOptions(**problem.options | numbers)
    loss, residuals = cuda.forward(z, problem.labels, prototypes, options)
    upstream = torch.linspace(-1, 1, loss.numel()) if loss.dim() else torch.ones(())
    grads = cuda.backward(upstream, z, residuals, problem.labels, prototypes, options, Needs(True, True, True))
    return {"loss": loss, **grads._asdict()}


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
    labels: list[int], temperature: float, weight: float, message: str, any_kernels: host.Kernels
) -> None:
    problem = dataclasses.replace(random_problem(2, 3, 4), labels=torch.tensor(labels))
    with pytest.raises(RuntimeError, match=message):
        run(problem, torch.tensor(temperature), torch.tensor(weight))


def test_a_batch_without_rows(kernels: host.Kernels) -> None:
    z, prototypes = torch.empty(0, 8, requires_grad=True), torch.eye(3, 8, requires_grad=True)
    loss = clop_kernels.clop_loss(z, torch.empty(0, dtype=torch.int64), prototypes, backend="cuda")
    loss.backward()
    assert loss == 0
    assert z.grad is not None
    assert prototypes.grad is not None
    assert z.grad.shape == (0, 8)
    assert (prototypes.grad == 0).all()


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
def test_a_wrong_call_of_the_operator_is_an_exception(name: str, wrong: dict[str, Any], any_kernels: host.Kernels) -> None:
    z, labels, groups = torch.randn(6, 4), torch.zeros(3, dtype=torch.int64), torch.empty((3, 0), dtype=torch.int32)
    options = LossOptions(n_views=2)
    right = {
        "embeddings": z, "zhat": torch.zeros(6, 4), "groups": groups, "labels": labels, "prototypes": torch.ones(2, 4),
        **dict(zip(options._fields, native_options(options), strict=True)),
        "temperature_tensor": None, "prototype_weight_tensor": None, "is_tf32": False,
    }  # fmt: skip
    torch.ops.clop_host.cuda_forward(*right.values())
    with pytest.raises(RuntimeError, match=f"clop_native: {name}: expected"):
        torch.ops.clop_host.cuda_forward(*(right | wrong).values())


def test_a_launch_that_is_stubbed_out_leaves_everything_else(any_kernels: host.Kernels) -> None:
    """What a call of the backend costs the host is measured so."""
    problem = random_problem(2, 20, 16, positives="label", n_classes=3)
    expected = problem.solve("cuda", torch.float32)
    any_kernels.module.set_launches(False)
    try:
        actual = problem.solve("cuda", torch.float32)
    finally:
        any_kernels.module.set_launches(True)
    assert {name: value.shape for name, value in actual.items()} == {name: value.shape for name, value in expected.items()}
    assert all(torch.equal(value, expected[name]) for name, value in problem.solve("cuda", torch.float32).items())


# ---- blocks that share rows ------------------------------------------------------------------------------------------


# Processors, problem, dtype, and how many blocks share left and right rows (without sides all rows), forward and backward.
SHARED: list[tuple[int, Problem, torch.dtype, tuple[int, int], tuple[int, int]]] = [
    (1, random_problem(2, 70, 40), torch.float32, (1, 1), (1, 1)),
    (4, random_problem(2, 70, 40), torch.float32, (2, 1), (2, 1)),  # three tiles and two
    (1000, random_problem(2, 70, 40, temperature=0.01), torch.float32, (5, 1), (3, 1)),  # two, two and one
    (1000, random_problem(7, 43, 100, positives="label", reduction="none"), torch.float32, (10, 1), (5, 1)),
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
    any_kernels: host.Kernels,
) -> None:
    """Right, and whichever block ends last the same bits."""
    any_kernels.n_processors = n_processors
    assert_right(problem, dtype, ill_conditioned=not problem.options.get("normalize", True))
    assert any_kernels.shares["softmax"][:2] == forward
    assert any_kernels.shares["gradient"][:2] == backward
    expected = problem.solve("cuda", dtype)
    any_kernels.module.set_order("reverse", 0)
    assert all(torch.equal(value, expected[name]) for name, value in problem.solve("cuda", dtype).items())


@pytest.mark.parametrize("shape", [(310, None, 24), (300, 10, 100), (1100, 3, 32)], ids=str)
@pytest.mark.parametrize("order", host.ORDERS)
def test_pairs_alone_of_shared_rows(shape: tuple[int, int | None, int], order: str, any_kernels: host.Kernels) -> None:
    any_kernels.n_processors = MANY
    any_kernels.module.set_order(order, 5)
    assert_pairs_accurate("cuda", torch.float32, *shape)
    assert all(any_kernels.shares[kernel][0] > 3 for kernel in ("softmax", "gradient"))


@pytest.mark.parametrize("row", [3, 150])
def test_a_row_that_is_not_finite_shows_in_shared_rows(row: int, any_kernels: host.Kernels) -> None:
    any_kernels.n_processors = MANY
    z = torch.randn(160, 24)
    z[row, 2] = torch.nan
    z.requires_grad_()
    loss = clop_kernels.ntxent_loss(z, reduction="none", backend="cuda")
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert any_kernels.shares["gradient"][0] > 1
    assert loss.isnan().all()
    assert grad.isnan().any(1).all()


@pytest.mark.parametrize("width", [64, 128, 256])
def test_sums_of_shared_rows_do_not_grow_with_the_rows(width: int, any_kernels: host.Kernels) -> None:
    """At most three blocks of 128 rows for each that a processor has at once: 384 KB a processor."""
    n_processors, places = 132, 1 if width == 256 else 2
    for n_rows in (1, 2, 200, 512, 2048, 8192, 16384, 17000, 25000, 33000, 50000, 60000, 70000, 2**20):
        (of_left, _, n_blocks), n_floats = any_kernels.module.gradient_plan(n_rows, width, n_processors)
        assert n_blocks == of_left * -(-n_rows // 128)
        assert n_floats == (n_blocks * 128 * width if of_left > 1 else 0)
        assert n_floats <= 3 * places * n_processors * 128 * width <= n_processors * 384 * 256
        assert of_left <= 16
        if n_blocks >= 3 * places * n_processors:
            assert of_left == 1


# ---- two sides, rows as they are, negatives only, no pairs -----------------------------------------------------------


FLOOR = 1e-7
"""Norms below are taken for this: a gradient that is zero, but for rounding, in one formula is a plain zero in another."""


def assert_right(problem: Problem, dtype: torch.dtype = torch.float32, ill_conditioned: bool = False) -> None:
    if dtype == torch.float32:
        assert_accurate(problem, "cuda", ill_conditioned, FLOOR)
    else:
        assert_as_good_as_plain(problem, "cuda", dtype, FLOOR)


ROW_BY_ROW = [(1, 5), (15, 64), (17, 37), (33, 129), (65, 100), (65, 256), (130, 7), (130, 300)]  # rows of a side, width
BY_LABEL = [(1, 40), (40, 1), (0, 7), (6, 0), (1, 1), (17, 130), (65, 33), (130, 3), (63, 64)]  # rows of the two sides
SIDES = [*((n, n, width, False) for n, width in ROW_BY_ROW), *((*rows, 40, True) for rows in BY_LABEL)]


@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize(("n_left", "n_right", "width", "by_label"), SIDES)
def test_clip(n_left: int, n_right: int, width: int, by_label: bool, temperature: float, kernels: host.Kernels) -> None:
    for dtype, reduction in zip(host.DTYPES, REDUCTIONS, strict=True):
        if dtype == torch.float32 or temperature == 0.1:
            problem = two_sided_problem(n_left, n_right, width, labelled=by_label, temperature=temperature, reduction=reduction)
            assert_right(problem, dtype)


OPTIONS: list[dict[str, Any]] = [
    {"positives": positives, "n_left": n_left, "negatives_only": negatives_only, "normalize": normalize}
    for positives, n_left, negatives_only, normalize in [
        *itertools.product(POSITIVES, (None, 45), (False, True), (False, True)),
        ("label", 0, True, True),
        ("label", 90, True, False),
    ]
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("is_wide", [False, True])
def test_every_option_with_every_other(
    is_wide: bool, options: dict[str, Any], kernels: host.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_wide:
        monkeypatch.setattr(cuda, "is_wide", lambda width, compute_dtype: True)
        monkeypatch.setattr(cuda, "panel_rows", lambda compute_dtype: 32)
    n_views = 2 if options["positives"] == "instance" else 1
    for reduction, distance, temperature in zip(REDUCTIONS, DISTANCES, (0.1, 0.01, 0.1), strict=True):
        mixed: dict[str, Any] = {"temperature": temperature, "reduction": reduction, "distance": distance} | options
        assert_right(random_problem(n_views, 90 // n_views, 21, **mixed), ill_conditioned=not options["normalize"])


@pytest.mark.parametrize(("norm", "temperature"), [(1.0, 0.07), (30.0, 1.0), (30.0, 0.1)])
@pytest.mark.parametrize("dtype", host.DTYPES, ids=str)
def test_rows_as_they_are(dtype: torch.dtype, norm: float, temperature: float, kernels: host.Kernels) -> None:
    """No row is scaled down, and no similarity is bounded; long rows and a warm temperature take the maxima too."""
    for n_views, n_instances, positives in ((2, 40, "instance"), (1, 70, "label")):
        for width in (48, 300):
            options: dict[str, Any] = {"positives": positives, "normalize": False, "temperature": temperature}
            problem = random_problem(n_views, n_instances, width, distance="euclidean", **options)
            z = (problem.embeddings * norm / width**0.5).float().double()
            assert_right(dataclasses.replace(problem, embeddings=z), dtype, ill_conditioned=True)


@pytest.mark.parametrize("width", [7, 64, 300, 4100])
@pytest.mark.parametrize("dtype", host.DTYPES, ids=str)
def test_rows_as_they_are_to_the_last_bit(width: int, dtype: torch.dtype, any_kernels: host.Kernels) -> None:
    z = torch.randn(9, width) * torch.logspace(-30, 30, 9)[:, None]
    zhat = unit_rows(z, dtype)
    options = cuda.arguments_of(LossOptions(compute_dtype=dtype, normalize=False))
    norms, _ = any_kernels.cuda_prologue(z, zhat, torch.empty((3, 0), dtype=torch.int32), None, None, *options)
    assert torch.equal(zhat.float().nan_to_num(), z.to(dtype).float().nan_to_num())
    torch.testing.assert_close(norms, z.double().norm(dim=1).float(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("labels", ["some", "one", "none", "a row"])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("dtype", host.DTYPES, ids=str)
def test_negative_logsumexp(labels: str, temperature: float, dtype: torch.dtype, kernels: host.Kernels) -> None:
    n_rows = 1 if labels == "a row" else 130
    problem = negatives_problem(n_rows, 40, temperature=temperature)
    of_rows = {"some": problem.labels, "one": torch.zeros(n_rows), "none": torch.full((n_rows,), -1), "a row": torch.zeros(1)}
    given = of_rows[labels]
    assert given is not None
    problem = dataclasses.replace(problem, labels=given.long())
    if dtype == torch.float32 or temperature == 0.1:
        assert_right(problem, dtype)
    if labels in ("one", "a row"):
        assert all(not value.any() for value in problem.solve("cuda", dtype).values())


def test_positives_far_above_the_negatives_are_no_pairs(kernels: host.Kernels) -> None:
    """By 2^288, at tau = 0.005: a maximum over them would leave nothing of the negatives."""
    problem = negatives_problem(72, 8, temperature=0.005)
    rows = torch.eye(8, dtype=torch.float64).repeat(9, 1) + 1e-3 * problem.embeddings
    assert_right(dataclasses.replace(problem, embeddings=rows.float().double(), labels=torch.arange(8).repeat(9)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("width", [24, 300])
def test_prototypes_alone(width: int, reduction: str, any_kernels: host.Kernels) -> None:
    for distance, dtype in zip(DISTANCES, host.DTYPES, strict=True):
        for normalize in (True, False):
            problem = random_problem(1, 70, width, reduction=reduction, distance=distance, normalize=normalize)
            assert_right(problem, dtype)


def test_without_pairs_rows_do_not_meet(any_kernels: host.Kernels) -> None:
    """What is not finite stays where it is: nothing is computed of two rows."""
    problem = random_problem(1, 70, 24)
    z = problem.embeddings.float()
    z[4, 2] = torch.nan
    z.requires_grad_()
    arguments = (z, torch.zeros(70, dtype=torch.int64), problem.prototypes)
    loss = clop_kernels.clop_loss(*arguments, n_views=1, reduction="none", backend="cuda")
    (grad,) = torch.autograd.grad(loss.sum(), z)
    for x in (loss, grad.sum(1)):
        assert x.isnan().nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_row_that_is_not_finite_shows_with_every_option(value: float, normalize: bool, kernels: host.Kernels) -> None:
    z, labels = torch.randn(6, 4), torch.tensor([0, 0, 0, 0, 1, 1])
    z[4, 2] = value
    for of, shows in ((labels, [0, 1, 2, 3, 4]), (torch.zeros(6, dtype=torch.int64), [4])):  # in its negatives, and without any
        loss = clop_kernels.negative_logsumexp(z, of, normalize=normalize, backend="cuda")
        assert loss.isnan().nonzero().flatten().tolist() == shows
    for of_sides in ((), (labels[:3], labels[3:])):
        assert clop_kernels.clip_loss(z[:3], z[3:], *of_sides, normalize=normalize, backend="cuda").isnan()


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


# Rows, those on the left, width: one side, and one way from some rows to the others; ragged, of every width on chip, and wide.
PAIRS = [
    (2, None, 16), (131, None, 7), (150, None, 128), (2, 1, 3), (140, 70, 37), (67, 50, 129), (150, 3, 16), (150, 147, 256),
    (131, None, 300), (67, 50, 301),
]  # fmt: skip


def assert_pairs(shape: tuple[int, int | None, int], dtype: torch.dtype, normalize: bool) -> None:
    """A gradient of half precision is of an M that is rounded to it: half a unit of each entry, so less in all."""
    tolerance = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for temperature, n_classes in ((0.1, 4), (0.01, 0), (torch.tensor(0.1), 0), (torch.tensor(0.01), 4)):
        options: dict[str, Any] = {"temperature": temperature, "normalize": normalize, "n_classes": n_classes}
        assert_pairs_accurate("cuda", dtype, *shape, **options, gradient_tolerance=tolerance)


@pytest.mark.parametrize("shape", PAIRS, ids=str)
@pytest.mark.parametrize("dtype", host.DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_pairs_alone(shape: tuple[int, int | None, int], dtype: torch.dtype, normalize: bool, kernels: host.Kernels) -> None:
    assert_pairs(shape, dtype, normalize)


@pytest.mark.parametrize("shape", [shape for shape in PAIRS if shape[2] < 100], ids=str)
@pytest.mark.parametrize("dtype", host.DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.usefixtures("any_kernels")
def test_pairs_alone_in_many_panels(
    shape: tuple[int, int | None, int], dtype: torch.dtype, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "is_wide", lambda width, compute_dtype: True)
    monkeypatch.setattr(cuda, "panel_rows", lambda compute_dtype: 32)
    assert_pairs(shape, dtype, normalize)


def test_sums_over_many_columns_do_not_drift(any_kernels: host.Kernels) -> None:
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
