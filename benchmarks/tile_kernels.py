"""The kernels of a tile sweep: the launches of a candidate, and how candidates are compiled ahead of time, in parallel."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from . import leave_interrupts_to_parent, resources
from .gpu_check.processes import end_with_parent
from .problems import DTYPES
from .tile_candidates import Group, Tile

KERNELS = {"softmax": "softmax_kernel", "gradient": "gradient_kernel", "pairs": "pair_kernel", "product": "product_kernel"}
"""The functions of tiles.py that choose tiles -> the kernels that use them."""


@dataclass(frozen=True)
class Sizes:
    """The numbers of rows of a sweep.

    Attributes:
        checked: Where results are compared with the shipped tile's.
        first: Where every candidate is timed.
        others: Where the best candidates are timed as well.
    """

    checked: int
    first: tuple[int, ...]
    others: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        return tuple(sorted({self.checked, *self.first, *self.others}))


OF_GPU = Sizes(4096, (8192, 65536), (2048, 16384, 18432, 32768))
"""Few and many rows; whole rounds of programs, and slightly more than one round."""
OF_INTERPRETER = Sizes(48, (64, 96), (80,))


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


# ---- launches --------------------------------------------------------------------------------------------------------


class Recorded(NamedTuple):
    """The launches of a kernel in one loss and its gradient, and their result (without data on the device "meta")."""

    launches: list[Any]
    tile: Tile
    result: Tensor

    def run(self) -> None:
        for launch in self.launches:
            launch.run()


def record(group: Group, tile: Tile | None, n_rows: int, device: torch.device, target: Any = None) -> Recorded:
    """Computes a loss and its gradient with ``tile`` for the group's kernel; None keeps the shipped tile.

    On the device "meta" it computes nothing and records the launches for ``target``.
    """
    from clop_kernels.backends import triton as backend
    from clop_kernels.backends.contract import LossOptions, Needs
    from clop_kernels.backends.triton import launches, tiles

    dtype = DTYPES[group.dtype]
    n_left = n_rows // 2 if group.form == "two-sided" else None
    options = LossOptions(n_views=2, compute_dtype=dtype, n_left=n_left)
    is_real = device.type != "meta"
    if is_real:
        generator = torch.Generator(device).manual_seed(0)
        z = torch.randn(n_rows, group.D, device=device, generator=generator).to(dtype)
    else:
        z = torch.empty(n_rows, group.D, device=device, dtype=dtype)
    found: list[Any] = []
    original = launches.Launch.run

    def run(launch: Any) -> Any:
        if launch.kernel.__name__ == KERNELS[group.kernel]:
            found.append(launch)
        return original(launch) if is_real else None

    with ExitStack() as stack:
        put = stack.enter_context
        put(mock.patch.object(launches.Launch, "run", run))
        if not is_real:
            put(mock.patch.object(tiles, "target_of", return_value=target))
            put(mock.patch.object(tiles, "device_guard", return_value=nullcontext()))
        backend.plan_of.cache_clear()  # drops the plans with other tiles
        stack.callback(backend.plan_of.cache_clear)
        if tile is not None:
            _put_tile(put, group, tile)
        loss, residuals = backend.forward(z, None, None, options)
        result = residuals.negative
        if group.kernel != "softmax":
            needs = Needs(embeddings=True, temperature=False, prototypes=False)
            gradients = backend.backward(torch.ones_like(loss), z, residuals, None, None, options, needs)
            assert gradients.embeddings is not None
            result = gradients.embeddings
    if not found:
        raise LookupError(f"{group.name}: a loss of this width does not launch {KERNELS[group.kernel]}")
    return Recorded(found, tile_of(found[0]), result)


def _put_tile(put: Callable[[Any], Any], group: Group, tile: Tile) -> None:
    """Makes the package use another tile and another split of the columns. Nothing else changes the package."""
    from clop_kernels.backends.triton import launches, tiles

    block_k = tiles.padded(group.D) if tile.block_k is None else tile.block_k
    chosen = tiles.Tile(tile.block_m, tile.block_n, block_k, tile.num_warps, tile.num_stages, tile.max_registers)
    put(mock.patch.object(tiles, group.kernel, return_value=chosen))
    if tile.n_splits is not None:
        name = f"{group.kernel}_splits"
        if not hasattr(launches, name):
            raise LookupError(f"{group.kernel} does not split columns")
        put(mock.patch.object(launches, name, return_value=tile.n_splits))


def tile_of(launch: Any) -> Tile:
    """The tile of a launch. It can differ from that of tiles.py, because the package may adjust it."""
    arguments = launch.arguments
    n_splits = arguments.get("n_splits") if launch.kernel.__name__ in ("softmax_kernel", "gradient_kernel") else None
    return Tile(
        arguments["BLOCK_M"], arguments["BLOCK_N"], arguments["BLOCK_K"] if "BLOCK_K" in arguments else arguments["BLOCK_D"],
        launch.options["num_warps"], launch.options["num_stages"], launch.options.get("maxnreg"), n_splits,
    )  # fmt: skip


def is_same(tile: Tile, other: Tile) -> bool:
    """Whether two launched tiles are the same. No register limit means 255 registers, and no split means one split."""
    own, others = (replace(t, max_registers=t.max_registers or 255, n_splits=t.n_splits or 1) for t in (tile, other))
    return own == others


# ---- compiling -------------------------------------------------------------------------------------------------------


class Compiled(NamedTuple):
    """The resources of a candidate's kernel, or the reason why it is rejected."""

    registers: int | None = None
    spilled_bytes: int | None = None
    shared_kb: float | None = None
    fault: str = ""


Trial = tuple[Group, Tile | None]
"""A candidate of a group. None stands for the shipped tile."""


def trials_of(group: Group) -> list[Trial]:
    return [(group, None), *((group, tile) for tile in group.candidates)]


def compile_trial(trial: Trial, target: Any, sizes: Sizes, with_stand_in: bool) -> Compiled:
    """Compiles all variants of the kernel that the sweep launches into Triton's cache, in the same way as a launch does.

    ``with_stand_in`` replaces Triton's driver in this process, so that no GPU is needed.
    """
    group, tile = trial
    if with_stand_in:
        _install_driver(target.capability)
    try:
        launches = [one for n in sizes.all for one in record(group, tile, n, torch.device("meta"), target).launches]
        kernels = {}
        for launch in launches:
            kernel = launch.kernel.warmup(**launch.arguments, **launch.options, grid=launch.grid)
            kernels[kernel.hash] = kernel
        usage = [resources.usage_of(kernel.asm["cubin"]) for kernel in kernels.values()]
        shared = max(kernel.metadata.shared for kernel in kernels.values()) / 1024
    except LookupError as error:
        return Compiled(fault=str(error))
    except Exception as error:
        return Compiled(fault=f"does not compile: {said(error)}")
    registers, spilled = max(one.registers for one in usage), max(one.spilled_bytes for one in usage)
    # benchmarks.resources checks the shipped tile. Other tiles may spill as much as it allows.
    release = ".".join(resources.triton_version().split(".")[:2])
    allowed = math.inf if tile is None else resources.SPILLS_ALLOWED.get(release, 0)
    known = resources.SHARED_MEMORY_KB.get(target.capability, math.inf)
    fault = ""
    if spilled > allowed:
        fault = f"spills {spilled} bytes a thread"
    elif shared > known:
        fault = f"needs {shared:.0f} KB of shared memory, and the GPU has {known}"
    return Compiled(registers, spilled, round(shared, 1), fault)


def _install_driver(capability: int) -> None:
    """Makes Triton compile for a GPU that need not exist. It replaces the driver of this process."""
    from triton.runtime import driver

    from clop_kernels.backends.triton.warm_up import Driver, Gpu

    driver.set_active(Driver(Gpu("cuda", capability, 32)))


def _start_compiler() -> None:
    end_with_parent()
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter does not compile
    leave_interrupts_to_parent()


def compile_all(
    trials: Sequence[Trial], target: Any, sizes: Sizes, n_processes: int, until: float
) -> Iterator[tuple[Trial, Compiled]]:
    """Compiles in parallel and yields each result as it comes. Ends at ``until``, on the clock of time.monotonic."""
    found: set[Trial] = set()
    try:
        for trial, compiled in _compile_together(trials, target, sizes, n_processes, until):
            found.add(trial)
            yield trial, compiled
    except BrokenProcessPool:  # a dying compiler takes all pending trials with it: retry them one by one
        for trial in trials:
            if trial not in found:
                try:
                    yield from _compile_together([trial], target, sizes, 1, until)
                except BrokenProcessPool:
                    yield trial, Compiled(fault="the compiler died")


def _compile_together(
    trials: Sequence[Trial], target: Any, sizes: Sizes, n_processes: int, until: float
) -> Iterator[tuple[Trial, Compiled]]:
    if time.monotonic() >= until:
        return
    with ProcessPoolExecutor(n_processes, multiprocessing.get_context("spawn"), _start_compiler) as pool:
        pending = {pool.submit(compile_trial, trial, target, sizes, True): trial for trial in trials}
        try:
            for done in as_completed(pending, None if until == math.inf else until - time.monotonic()):
                yield pending[done], done.result()
        except OutOfTime:
            pass
        finally:
            for future in pending:
                future.cancel()
