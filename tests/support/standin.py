"""Triton with a stand-in for its driver: kernels are specialised as for an H200, and neither compiled nor run.

What Triton would compile is found out so without a GPU: by its own binder, from the arguments of real calls. The process must be
one without Triton's interpreter, which is why tests run this in another::

    python -m tests.support.standin training            what a training run compiles, step by step
    python -m tests.support.standin cached              what it compiles after a warm-up into TRITON_CACHE_DIR
    python -m pytest -p tests.support.standin -m gpu tests/contract tests/gpu/test_losses.py
                                                        what the GPU tests compile; CLOP_VARIANTS=FILE keeps it

For those tests "cuda" is the CPU, and every result is right: only their launches count.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class Variants:
    """What has been asked for so far: kernel -> keys, under which Triton keeps what it compiles."""

    def __init__(self) -> None:
        self.keys: dict[str, set[str]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.keys.values()))

    def hook(self, *, key: str, fn: Any, **_: Any) -> bool:
        """Triton's, for a kernel that it has not compiled yet; it goes no further where this is true."""
        self.keys.setdefault(fn.name, set()).add(key)
        return True


def install(compiles: bool = False) -> Variants:
    """From now on ``backend="triton"`` takes the CPU for an H200. What it returns is whatever was in memory.

    ``compiles``: kernels are compiled all the same, or taken from Triton's cache.
    """
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    from triton import knobs
    from triton.runtime import driver

    from clop_kernels import backends
    from clop_kernels.backends import contract
    from clop_kernels.backends.triton import launches, tiles
    from clop_kernels.backends.triton.warm_up import Driver, Gpu

    variants, run = Variants(), launches.Launch.run

    def run_nothing(launch: launches.Launch) -> None:
        if launch.arguments.get("is_ranked"):  # what torch reads of what a kernel would have written
            launch.arguments["groups"].zero_()
        if compiles:
            launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments, **launch.options)
        else:
            run(launch)

    driver.set_active(Driver(Gpu("cuda", 90, 32)))
    knobs.runtime.jit_cache_hook = None if compiles else variants.hook
    chosen = next(backend for backend in backends.BACKENDS if backend.name == "triton")
    object.__setattr__(chosen, "obstacle", lambda device, dtype: None)
    tiles.target_of = lambda device: tiles.Target(90, 132)  # type: ignore[assignment]
    launches.Launch.run = run_nothing  # type: ignore[assignment, method-assign]
    contract.DENSE_DEVICES = ()  # type: ignore[assignment]
    return variants


# ---- a training run --------------------------------------------------------------------------------------------------


def training_step(number: int, dtype: torch.dtype, width: int) -> None:
    """Every loss, batches of several sizes, labels that are views, and schedules of all that a training changes."""
    import clop_kernels
    from clop_kernels import backends
    from clop_kernels.backends.contract import LossOptions, unit_rows
    from clop_kernels.groups import label_groups

    n_instances = (512, 256, 16384, 131)[number % 4] + 4096 * (number % 7 == 5)  # for which columns are split by 16, and by 1
    z = torch.randn(2 * n_instances, width, dtype=dtype, requires_grad=True)
    labels = torch.randint(-1, 10, (n_instances + number % 5,))[number % 5 :]
    prototypes = torch.randn(10, width, dtype=dtype, requires_grad=number % 2 == 0)
    options: dict[str, Any] = {"backend": "triton", "temperature": 0.1 * 0.93**number}  # past the switch of the softmax
    kind = number % 7
    if kind == 0:
        weight = min(1, number / 10)  # an int at last
        loss = clop_kernels.clop_loss(z, labels, prototypes, positives="label", prototype_weight=weight, **options)
    elif kind == 1:
        options["temperature"] = torch.tensor(options["temperature"], requires_grad=True)
        per_row = clop_kernels.clop_loss(z, labels, prototypes, positives="label", reduction="none", **options)
        loss = per_row * torch.rand(z.shape[0])
    elif kind == 2:
        loss = clop_kernels.ntxent_loss(z, **options)
    elif kind == 3:
        left, right = (side.requires_grad_() for side in z.detach().chunk(2))
        loss = clop_kernels.clip_loss(left, right, normalize=number < 25, **options)
    elif kind == 4:
        loss = clop_kernels.supcon_loss(z, labels.repeat(2), **options)
    elif kind == 5:
        loss = clop_kernels.negative_logsumexp(z, labels.repeat(2), **options)
    else:  # what a process group takes of a backend
        triton = backends.select("triton", z.device, z.dtype).load()
        zhat, groups = unit_rows(z.detach(), z.dtype), label_groups(labels, 2, None).table()
        n_left = None if number % 2 else n_instances
        alone = LossOptions(options["temperature"], positives="label", compute_dtype=z.dtype)
        triton.pair_softmax(zhat, groups, n_left, alone)
        triton.pair_gradient(zhat, groups, n_left, torch.zeros(4, z.shape[0]), alone)
        return
    loss.sum().backward()


def training() -> dict[str, Any]:
    """How many kernels were compiled after each of 50 steps, and which, for a width on chip and a wide one."""
    found = {}
    for width, dtype in ((128, torch.bfloat16), (768, torch.float32)):
        variants = install()
        counts = []
        for number in range(50):
            training_step(number, dtype, width)
            counts.append(len(variants))
        found[f"{width} {dtype}"] = {"counts": counts, "kernels": {name: len(keys) for name, keys in variants.keys.items()}}
    return found


def cached() -> int:
    """How many kernels of a training are not in Triton's cache: all are, after a warm-up."""
    install(compiles=True)
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    n_before = len(list(cache.iterdir()))
    for number in range(7):
        training_step(number, torch.bfloat16, 16)
    return len(list(cache.iterdir())) - n_before


# ---- a plugin of pytest, for the tests that need a GPU ---------------------------------------------------------------------


class CudaIsTheCpu(TorchFunctionMode):
    """Where torch is told "cuda", it hears "cpu"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_on_cpu, args), **kwargs)


def _on_cpu(value: Any) -> Any:
    is_cuda = isinstance(value, (str, torch.device)) and str(value).split(":")[0] == "cuda"
    return CPU if is_cuda else value


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported."""
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, lambda *_: None)
    config.variants = install()  # type: ignore[attr-defined]
    CudaIsTheCpu().__enter__()  # type: ignore[no-untyped-call]

    from . import oracle

    solve = oracle.Problem.solve
    oracle.Problem.solve = lambda self, backend, dtype, device="cpu": solve(self, "triton", dtype)  # type: ignore[method-assign]
    oracle.relative_error = lambda *_, **__: 0.0


def pytest_sessionfinish(session: pytest.Session) -> None:
    keys = session.config.variants.keys  # type: ignore[attr-defined]
    if "CLOP_VARIANTS" in os.environ:
        Path(os.environ["CLOP_VARIANTS"]).write_text(json.dumps({name: sorted(of_kernel) for name, of_kernel in keys.items()}))


if __name__ == "__main__":
    print(json.dumps({"training": training, "cached": cached}[sys.argv[1]]()))
