"""Measures what a small loss costs the host (Python and PyTorch), forward and backward, without a GPU.

    python -m benchmarks.host_time

The kernels of ``cuda`` and ``triton`` are not launched: tensors are on the CPU, a stub takes Triton's launches, and ``cuda`` uses
the bindings of the tests' simulator, whose launches return at once. Everything else runs as in a training: checks, autograd,
memory, and the arguments of each launch. Missing is the driver's part of a launch, some microseconds each.

``cpu`` runs completely, on 16 rows of 16 numbers, whose arithmetic takes almost no time. Two losses serve for comparison, also on
16 rows: "plain" is the loss as users write it (normalise, product, mask, cross entropy), and "definition" is
clop_kernels.reference, which does more. On a machine with a GPU, use ``python -m benchmarks.gpu_check --steps host``.

Providers take turns, and the table has medians. Trust the ratios, not the microseconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import clop_kernels
from clop_kernels import backends
from clop_kernels.backends import contract

from . import problems

Loss = Callable[[Tensor], Tensor]
TEMPERATURE = 0.1
SMALL, LARGE = (16, 16), (2048, 16)
"""N and D for losses that compute, and for losses that only launch. Sizes stay small: torch caches a GPU's memory, but on a CPU
large blocks would come from the system each time."""


def plain_ntxent(z: Tensor) -> Tensor:
    """NT-Xent as users write it."""
    z = F.normalize(z, dim=1)
    logits = (z @ z.T / TEMPERATURE).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


class _Launched:
    """Takes the place of a kernel compiled by Triton."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: None


def _stub_triton() -> None:
    """Makes ``backend="triton"`` treat the CPU as an H200 and launch nothing."""
    from clop_kernels.backends.triton import launches, tiles

    target = tiles.Target(90, 132)
    tiles.target_of = lambda device: target  # type: ignore[assignment]
    launches.DIRECT_DEVICES = ("cpu",)
    launches.Launch.run = lambda self: _Launched()  # type: ignore[method-assign]


def _stub_cuda() -> str | None:
    """Does the same for ``backend="cuda"``. Returns why it is impossible, or None."""
    from tests import host

    obstacle = host.obstacle()
    if obstacle is None:
        host.stub_launches()
    return obstacle


def providers() -> tuple[dict[str, tuple[Loss, tuple[int, int]]], list[str]]:
    """A loss and the size of its input by name, and the names that are missing, with reasons."""
    found: dict[str, tuple[Loss, tuple[int, int]]] = {
        "plain": (plain_ntxent, SMALL),
        "definition": (lambda z: problems.PROBLEMS["ntxent"].plain(z, TEMPERATURE), SMALL),
    }
    missing = []

    def add(name: str, size: tuple[int, int]) -> None:
        found[name] = lambda z: clop_kernels.ntxent_loss(z, temperature=TEMPERATURE, backend=name), size

    contract.DENSE_DEVICES = ()  # type: ignore[assignment] # lays out zhat's rows as on a GPU
    for name, stub in (("cuda", _stub_cuda), ("triton", _stub_triton)):
        try:
            obstacle = stub()
        except ImportError as error:
            obstacle = str(error)
        if obstacle is not None:
            missing.append(f"{name}: {obstacle}")
            continue
        backend = next(one for one in backends.BACKENDS if one.name == name)
        object.__setattr__(backend, "obstacle", lambda device, dtype: None)
        add(name, LARGE)
    cpu = next(one for one in backends.BACKENDS if one.name == "cpu")
    if (obstacle := cpu.obstacle(torch.device("cpu"), torch.float32)) is None:
        add("cpu", SMALL)
    else:
        missing.append(f"cpu: {obstacle}")
    return found, missing


def measure(found: dict[str, tuple[Loss, tuple[int, int]]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median microseconds of forward and of backward."""
    inputs = {size: torch.randn(size, requires_grad=True) for size in (SMALL, LARGE)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for repeat in range(repeats + 20):  # the first are warm-up
        for name, (function, size) in found.items():
            z = inputs[size]
            z.grad = None
            begin = time.perf_counter()
            loss = function(z)
            middle = time.perf_counter()
            loss.backward()
            if repeat >= 20:
                times[name].append((1e6 * (middle - begin), 1e6 * (time.perf_counter() - middle)))
    return {name: (statistics.median(f for f, _ in each), statistics.median(b for _, b in each)) for name, each in times.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=1000, help="calls per provider (1000)")
    given = parser.parse_args(arguments)
    if given.repeats < 1:
        parser.error(f"--repeats {given.repeats}: expected at least 1")
    torch.set_num_threads(1)
    os.environ.pop("TRITON_INTERPRET", None)
    found, missing = providers()
    result = measure(found, given.repeats)
    plain, definition = (sum(result[name]) for name in ("plain", "definition"))
    print(f"{'':12}{'forward us':>12}{'backward us':>12}{'of plain':>10}{'of definition':>15}")
    for name, (forward, backward) in result.items():
        both = forward + backward
        print(f"{name:12}{forward:12.0f}{backward:12.0f}{both / plain:10.2f}{both / definition:15.2f}")
    for line in missing:
        print(f"left out: {line}")
    print("Medians in microseconds. The last two columns compare forward + backward with the losses 'plain' and 'definition'.")


if __name__ == "__main__":
    main()
