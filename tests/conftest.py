"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import distributed

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before any test can import one

import clop_kernels

from .support import world
from .support.oracle import RUNNABLE
from .support.world import World

SLOW = ("benchmarks", "distributed", "examples", "gpu", "host", "project", "triton")
"""The folders of tests that `make test-fast` leaves out, beside the simulated and interpreted kernels of the contract."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the folders above as slow."""
    for item in items:
        if item.path.parent.name in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Matrices here are small: teams of threads cost more than they bring, and spin against whatever else runs."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _plans_of_this_test() -> Iterator[None]:
    """Launches that the backend triton keeps are of the tiles that a test has put in place."""
    yield
    if (triton := sys.modules.get("clop_kernels.backends.triton")) is not None:
        triton.plan_of.cache_clear()


@pytest.fixture(params=RUNNABLE)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can run here but the reference and Triton's interpreter, for which test_triton.py has sizes."""
    return str(request.param)


@pytest.fixture(params=[7, 64, None], ids=["tile7", "tile64", "tile-auto"])
def tile_rows(request: pytest.FixtureRequest) -> Iterator[int | None]:
    """Tiles smaller than, and larger than, the test's matrices: both sides of every edge."""
    clop_kernels.set_tile_rows(request.param)
    yield request.param
    clop_kernels.set_tile_rows(None)


@pytest.fixture
def tf32() -> Iterator[None]:
    """Products of float32 may be rounded to TF32, by one of the switches after which torch's older ones cannot be read."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.fixture(scope="session")
def ranks() -> Iterator[World]:
    """Up to four ranks of process groups on this CPU."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    yield from world.running(4)
