"""The loss over a process group of GPUs, one a rank, with NCCL. Not yet run on one: it skips where torch sees none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed

import clop_kernels
from clop_kernels import backends
from clop_kernels.backends.contract import POSITIVES

from ..distributed.test_loss import Parts, solve
from ..support import world
from ..support.oracle import Problem, assert_close_to_reference, random_problem, relative_error, two_sided_problem
from ..support.world import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]

PARTS: dict[int, Parts] = {1: (600,), 2: (500, 100), 3: (0, 0, 600), 4: (100, 500, 0, 0)}


@pytest.fixture(scope="module")
def gpus() -> Iterator[World]:
    """A rank a GPU, and a CPU backend beside NCCL, as docs/distributed.md has it."""
    yield from world.running(min(torch.cuda.device_count(), 4), "cpu:gloo,cuda:nccl")


@pytest.fixture
def parts() -> Parts:
    return PARTS[min(torch.cuda.device_count(), 4)]


@pytest.fixture(params=["cuda", "triton", "tiled"])
def backend(request: pytest.FixtureRequest) -> str:
    chosen = next(b for b in backends.BACKENDS if b.name == request.param)
    reason = chosen.obstacle(torch.device("cuda"), torch.float32)
    if reason is not None:
        pytest.skip(f"{chosen.name} cannot run on this GPU: {reason}")
    return chosen.name


def problems(n: int, width: int) -> list[Problem]:
    return [
        *(random_problem(2, n, width, positives=positives) for positives in POSITIVES),
        two_sided_problem(n, n, width, labelled=False),
    ]


@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("width", [96, 300])
def test_float32(width: int, strategy: str, backend: str, parts: Parts, gpus: World) -> None:
    for problem in problems(sum(parts), width):
        actual = solve(gpus, problem, parts, backend, torch.float32, "cuda", strategy=strategy)
        assert_close_to_reference(problem, actual)


@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, strategy: str, backend: str, parts: Parts, gpus: World) -> None:
    for problem in problems(sum(parts), 128):
        expected, plain = problem.solve("reference", torch.float64), problem.solve("reference", dtype, "cuda")
        actual = solve(gpus, problem, parts, backend, dtype, "cuda", strategy=strategy)
        for name, value in expected.items():
            assert relative_error(actual[name], value) <= 2 * relative_error(plain[name], value) + 1e-4, name


def step_without_synchronisation(group: distributed.ProcessGroup, strategy: str, backend: str) -> None:
    z = torch.randn(512, 64, device="cuda", requires_grad=True)
    labels = torch.arange(256, device="cuda") % 7

    def step() -> Tensor:
        loss = clop_kernels.clop_loss(
            z, labels, positives="label", group=group, strategy=strategy, backend=backend, check_ranks=False
        )
        loss.backward()
        return loss

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_equal_ranks_do_not_synchronise_with_the_host(strategy: str, backend: str, gpus: World, parts: Parts) -> None:
    gpus.run(len(parts), step_without_synchronisation, strategy, backend)


def memory_of_step(group: distributed.ProcessGroup, n_rows: int, strategy: str) -> int:
    z = torch.randn(n_rows, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        clop_kernels.ntxent_loss(z, group=group, strategy=strategy).backward()
    return torch.cuda.max_memory_allocated() - before


def test_memory_grows_with_rows(gpus: World, parts: Parts) -> None:
    """Twice the rows, at most 2.2 times the memory; a matrix of all pairs would take four times."""
    for strategy in ("gather", "ring"):
        once, twice = (max(gpus.run(len(parts), memory_of_step, n, strategy)) for n in (16384, 32768))
        assert twice < 2.2 * once
