"""The Triton backend's passes over pairs alone, which the loss over a process group is made of: in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from benchmarks import resources

from ..support.oracle import assert_pairs_accurate
from .test_kernels import interpreted, is_wide, pytestmark, small_tiles, split_columns

__all__ = ["is_wide", "pytestmark", "small_tiles", "split_columns"]  # fixtures, and the warnings that are no news

# Rows, those on the left, width: one side, and one way from some rows to the others.
SHAPES = [(1, None, 24), (131, None, 24), (140, 70, 40), (67, 50, 136), (150, 3, 16), (70, 69, 264)]


def assert_accurate(
    dtype: torch.dtype, n_rows: int, n_left: int | None, width: int, n_classes: int, cases: Sequence[tuple[float | Tensor, bool]]
) -> None:
    """float16 rounds M."""
    for temperature, normalize in cases:
        assert_pairs_accurate(
            "triton", dtype, n_rows, n_left, width, temperature=temperature, normalize=normalize, n_classes=n_classes,
            gradient_tolerance=2 * torch.finfo(dtype).eps if dtype == torch.float16 else 0.0,
        )  # fmt: skip


@interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "n_classes"), [(torch.float32, 0), (torch.float32, 4), (torch.float16, 4)])
def test_tiles_as_shipped(dtype: torch.dtype, n_classes: int, shape: tuple[int, int | None, int]) -> None:
    """float16 is wide at 264, float32 from 40 on."""
    cases = [(t, True) for of_host in (0.1, 0.01) for t in (of_host, torch.tensor(of_host))] + [(0.3, False)]
    assert_accurate(dtype, *shape, n_classes, cases)


@interpreted
@pytest.mark.parametrize("shape", [(55, None), (98, 49), (97, 30), (64, 32), (50, 1)], ids=str)
@pytest.mark.usefixtures("is_wide", "split_columns")
def test_many_tiles(shape: tuple[int, int | None]) -> None:
    """And panels, ragged ones and whole ones. Every row has positives in other tiles, or, across sides, none has any."""
    for n_classes, tau in ((4, 0.1), (0, torch.tensor(0.01))):
        assert_accurate(torch.float32, *shape, 20, n_classes, [(tau, True)])


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
