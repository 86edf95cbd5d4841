"""The harness that runs CUDA kernels on this CPU (tests/host/): a planted bug shows, in the result, as an error or as a race."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from .. import host
from ..support.oracle import CUT_OFF

OBSTACLE = host.obstacle()
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=f"the CUDA kernels cannot be compiled for this CPU: {OBSTACLE}")


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return host.load()


@pytest.fixture(params=host.ORDERS)
def order(request: pytest.FixtureRequest, module: ModuleType) -> Iterator[str]:
    module.set_order(request.param, 7)
    yield request.param
    module.set_order("forward", 0)


@pytest.mark.parametrize(("kind", "depth"), [("bf16", 16), ("f16", 16), ("tf32", 8)])
def test_mma_is_a_product(kind: str, depth: int, order: str, module: ModuleType) -> None:
    """On numbers that all three formats hold exactly."""
    a, b = (torch.randn(*shape).bfloat16().float() for shape in ((16, depth), (depth, 8)))
    c = torch.randn(16, 8)
    actual = torch.from_numpy(module.mma(kind, a.numpy(), b.numpy(), c.clone().numpy()))
    torch.testing.assert_close(actual, (a.double() @ b.double() + c.double()).float(), rtol=1e-6, atol=1e-6)


def test_mma_rounds_as_the_unit_does(module: ModuleType) -> None:
    """TF32 reads 10 bits behind the point and drops the rest; the others round when they are packed."""
    a, b, c = torch.full((16, 8), 1 + 2.0**-10 + 2.0**-11), torch.eye(8), torch.zeros(16, 8)
    assert (torch.from_numpy(module.mma("tf32", a.numpy(), b.numpy(), c.numpy())) == 1 + 2.0**-10).all()


@pytest.mark.parametrize(("kind", "depth"), [("bf16", 16), ("f16", 16), ("tf32", 8)])
def test_mma_cuts_its_sums_off(kind: str, depth: int, module: ModuleType) -> None:
    """Toward zero, as an A100 does: also where the float32 bounds of test_host.py are proved."""
    a, c = torch.ones(16, depth), torch.full((16, 8), 2.0**24)
    for product, n_products, expected in CUT_OFF:
        b = torch.zeros(depth, 8)
        b[:n_products] = product
        for sign in (1, -1):
            sums = torch.from_numpy(module.mma(kind, a.numpy(), (sign * b).numpy(), (sign * c).numpy()))
            assert torch.equal(sums, sign * (c + expected))


def test_shuffles_reach_every_lane(order: str, module: ModuleType) -> None:
    assert module.sum_by_shuffles(torch.arange(32.0).numpy()) == 496


def reversed_in_blocks(x: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(x, (0, -len(x) % 64))
    return padded.view(-1, 64).flip(1).flatten()[: len(x)]


def test_a_right_kernel_is_right(order: str, module: ModuleType) -> None:
    x = torch.randn(150)
    assert torch.equal(torch.from_numpy(module.reverse("none", x.numpy())), reversed_in_blocks(x))


@pytest.mark.parametrize("bug", ["no wait", "no barrier", "mask off by one"])
def test_a_planted_bug_changes_the_result(bug: str, order: str, module: ModuleType) -> None:
    x = torch.randn(150)
    assert not torch.equal(torch.from_numpy(module.reverse(bug, x.numpy())), reversed_in_blocks(x))


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("misaligned copy", "cp.async of 16 bytes at an address that is not a multiple of 16"),
        ("a lane that leaves", "threads wait at a barrier that others have passed by"),
        ("a barrier that some pass by", "threads wait at a barrier that others have passed by"),
        ("lanes apart", "lanes of a warp meet in different instructions"),
    ],
)
def test_a_planted_bug_is_an_error(bug: str, message: str, order: str, module: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=message):
        module.reverse(bug, torch.randn(150).numpy())
    assert module.sum_by_shuffles(torch.arange(32.0).numpy()) == 496  # and the harness goes on


@pytest.mark.skipif("address" not in host.SANITIZE, reason="needs AddressSanitizer: make sanitize")
@pytest.mark.parametrize("bug", ["past the end of shared memory", "past the end of memory"])
def test_a_planted_bug_is_seen_by_the_sanitizer(bug: str, module: ModuleType) -> None:
    call = f"import torch; from tests import host; host.load().reverse({bug!r}, torch.randn(60).numpy())"
    run = subprocess.run([sys.executable, "-c", call], cwd=host.ROOT, env=os.environ, capture_output=True, text=True)
    assert run.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in run.stderr


def run_races(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([host.races(), *arguments], env=environment, capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this ThreadSanitizer does not run on this kernel's address layout")
    return done


@pytest.mark.races
def test_a_planted_bug_is_a_race() -> None:
    assert run_races("none").returncode == 0
    assert "ThreadSanitizer: data race" in run_races("no barrier").stderr


@pytest.mark.races
def test_no_kernel_has_a_race() -> None:
    """By ThreadSanitizer, for which fibers are threads that only barriers order."""
    done = run_races()
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "no races"
