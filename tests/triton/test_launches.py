"""What the backend ``triton`` launches, and how often it plans and compiles it; no result matters here."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

import clop_kernels
from benchmarks import resources
from clop_kernels.backends.contract import LossOptions

from ..support.interpreter import TRITON, interpreted, without_numpy_warnings
from ..support.oracle import OPTIONS, random_problem

pytestmark = without_numpy_warnings


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
@pytest.mark.parametrize("n_left", [1, 100, 4096, 6000])
def test_one_way_costs_its_own_pairs_only(n_left: int) -> None:
    """No program of a row on the right, and of wide rows no product for them."""
    for width in (128, 1024):
        case = resources.Case(90, "bfloat16", width, 8192, "one-way")
        for launch in resources.launches_of_pairs(case, n_left):
            name, arguments = launch.kernel.__name__, launch.arguments
            if name in ("softmax_kernel", "gradient_kernel"):
                assert launch.grid == (-(-n_left // arguments["BLOCK_M"]), arguments["n_splits"])
            if name == "product_kernel":
                assert arguments["row_end"] <= n_left <= arguments["first_column"]
                assert launch.grid[0] == arguments["n_straight"]
            if name == "pair_kernel":
                assert launch.grid[0] * arguments["BLOCK_M"] < n_left + 128


@interpreted
def test_without_pairs_no_kernel_visits_them() -> None:
    options = LossOptions(temperature=0.1, compute_dtype=torch.bfloat16, **OPTIONS | {"n_views": 1})
    names = [launch.kernel.__name__ for launch in resources.launches_of(options, 4096, 128, 90)]
    assert names == ["prologue_kernel", "loss_kernel", "finish_kernel", "prototype_kernel"]


# ---- plans, which are kept from call to call ----------------------------------------------------------------------------


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
