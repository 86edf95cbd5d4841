"""``python -m benchmarks.tile_sweep``: which of Triton's tiles is fastest on this GPU.

The candidates are in :mod:`benchmarks.tile_candidates`. A loss is computed as the package computes it, with the tile of one
kernel replaced, and that kernel's launches are then timed alone:

1. All candidates are compiled, a process a core, into Triton's cache. What spills more than the few bytes that
   benchmarks.resources allows, or needs more shared memory than the GPU has, is rejected.
2. The result of each is held to that of the shipped tile, and has to have the same bits twice.
3. Each is timed at two numbers of rows, the best of a group at four more: the median of five replays of a CUDA graph of up to
   20 launches. The shipped tile is timed first and last: where the two differ, so did the machine.

A row of the table is written the moment it is known. A budget cuts from the end. tests/test_tile_sweep.py holds tiles.py to the
committed tables, benchmarks/results/tiles/sm_NN.csv.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import measure, resources
from .compare import progress_bar
from .gpu_check.processes import end_with_parent
from .problems import DTYPES
from .results import Environment, environment_of
from .tile_candidates import GROUPS, OF_STAND_IN, Group, Tile
from .tile_table import TABLES, Row, Writer, printed

KERNELS = {"softmax": "softmax_kernel", "gradient": "gradient_kernel", "pairs": "pair_kernel", "product": "product_kernel"}
"""The functions of tiles.py that choose tiles, and the kernels that get them."""

PRODUCTS = {"softmax": 1, "gradient": 2, "pairs": 0.5, "product": 1}
"""Products of N x D with D x N that a kernel makes; `pairs` each pair once, for both rows."""

MOST_LAUNCHES = 20
PAIRS_OF_A_GRAPH = 5e9
"""A graph has as many launches as make up so many pairs, a few milliseconds, at least one and at most MOST_LAUNCHES."""

N_REPLAYS = 5

N_BEST = 3
"""Candidates of a group that are timed at all numbers of rows."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of rows.

    Attributes:
        checked: where the result is held to that of the shipped tile.
        first: where every candidate is timed.
        others: where the best are.
    """

    checked: int
    first: tuple[int, ...]
    others: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        return tuple(sorted({self.checked, *self.first, *self.others}))


OF_GPU = Sizes(4096, (8192, 65536), (2048, 16384, 18432, 32768))
"""Few rows and many, whole rounds of programs and a bit more than one."""
OF_INTERPRETER = Sizes(48, (64, 96), (80,))


def allowed_error(dtype: str) -> float:
    """Of the result against that of the shipped tile, relative in the norm: both are rounded sums, in another order."""
    return 1e-5 if dtype == "float32" else 4 * torch.finfo(DTYPES[dtype]).eps


# ---- launches --------------------------------------------------------------------------------------------------------


class Recorded(NamedTuple):
    """The launches of a kernel in one loss and its gradient, and what came of them; nothing if they only were recorded."""

    launches: list[Any]
    tile: Tile
    result: Tensor

    def run(self) -> None:
        for launch in self.launches:
            launch.run()


def record(group: Group, tile: Tile | None, n_rows: int, device: torch.device, target: Any = None) -> Recorded:
    """Computes a loss and its gradient with ``tile`` in place of the group's, or None: with the shipped one.

    On the device "meta" nothing is computed, and the launches are those for ``target``.
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
        backend.plan_of.cache_clear()  # those of other tiles
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
    """The one place where the package is made to take another tile, and to split columns otherwise."""
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
    """What a launch has: the package may change what tiles.py says."""
    arguments = launch.arguments
    n_splits = arguments.get("n_splits") if launch.kernel.__name__ in ("softmax_kernel", "gradient_kernel") else None
    return Tile(
        arguments["BLOCK_M"], arguments["BLOCK_N"], arguments["BLOCK_K"] if "BLOCK_K" in arguments else arguments["BLOCK_D"],
        launch.options["num_warps"], launch.options["num_stages"], launch.options.get("maxnreg"), n_splits,
    )  # fmt: skip


def is_same(tile: Tile, other: Tile) -> bool:
    """Whether two launched tiles are one. Left to choose, the compiler has 255 registers too; unsplit columns are one split."""
    own, others = (replace(t, max_registers=t.max_registers or 255, n_splits=t.n_splits or 1) for t in (tile, other))
    return own == others


# ---- compiling -------------------------------------------------------------------------------------------------------


class Compiled(NamedTuple):
    """What a candidate's kernel takes, or why there is none."""

    registers: int | None = None
    spilled_bytes: int | None = None
    shared_kb: float | None = None
    fault: str = ""


Trial = tuple[Group, Tile | None]
"""A candidate of a group; None is the shipped tile."""


def trials_of(group: Group) -> list[Trial]:
    return [(group, None), *((group, tile) for tile in group.candidates)]


def compile_trial(trial: Trial, target: Any, sizes: Sizes, with_stand_in: bool) -> Compiled:
    """Compiles all variants of the kernel that the sweep launches, by the very way of a launch, into Triton's cache.

    ``with_stand_in``: the driver is one, so that no GPU is needed; it takes the place of the real one in this process.
    """
    group, tile = trial
    if with_stand_in:
        _use_stand_in_driver(target.capability)
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
        return Compiled(fault=f"does not compile: {_said(error)}")
    registers, spilled = max(one.registers for one in usage), max(one.spilled_bytes for one in usage)
    # The shipped tile is judged by benchmarks.resources; others may spill what that allows of any.
    release = ".".join(resources.triton_version().split(".")[:2])
    allowed = math.inf if tile is None else resources.SPILLS_ALLOWED.get(release, 0)
    known = resources.SHARED_MEMORY_KB.get(target.capability, math.inf)
    fault = ""
    if spilled > allowed:
        fault = f"spills {spilled} bytes a thread"
    elif shared > known:
        fault = f"needs {shared:.0f} KB of shared memory, and there are {known}"
    return Compiled(registers, spilled, round(shared, 1), fault)


def _use_stand_in_driver(capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        """What Triton asks of a driver before it launches."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(Driver())


def _start_compiler() -> None:
    end_with_parent()
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing


def compile_all(
    trials: Sequence[Trial], target: Any, sizes: Sizes, n_processes: int, until: float
) -> Iterator[tuple[Trial, Compiled]]:
    """As they are compiled, side by side; ends at ``until``, on the clock of time.monotonic."""
    found: set[Trial] = set()
    try:
        for trial, compiled in _compile_together(trials, target, sizes, n_processes, until):
            found.add(trial)
            yield trial, compiled
    except BrokenProcessPool:  # one has taken all that were on the way with it
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


# ---- measuring -------------------------------------------------------------------------------------------------------


class Checked(NamedTuple):
    """A candidate's result against that of the shipped tile."""

    error: float
    same_bits: bool


class Timed(NamedTuple):
    """How long one pass over all pairs takes, and with which tile."""

    seconds: float
    tile: Tile


class Bench(Protocol):
    """Where candidates are tried."""

    sizes: Sizes

    def matrix_tflops(self, dtype: str) -> float | None: ...

    def check(self, group: Group, tile: Tile) -> Checked: ...

    def time(self, group: Group, tile: Tile | None, n_rows: int) -> Timed: ...


class Device:
    """A GPU; or the CPU as its stand-in, with Triton's interpreter, which says nothing about times."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        self.sizes = OF_GPU if self.is_gpu else OF_INTERPRETER

    def matrix_tflops(self, dtype: str) -> float | None:
        return measure.matrix_tflops(self.device, DTYPES[dtype]) if self.is_gpu else None

    def check(self, group: Group, tile: Tile) -> Checked:
        expected, actual, again = (
            record(group, chosen, self.sizes.checked, self.device).result.double() for chosen in (None, tile, tile)
        )
        return Checked(float((actual - expected).norm() / expected.norm()), torch.equal(actual, again))

    def time(self, group: Group, tile: Tile | None, n_rows: int) -> Timed:
        recorded = record(group, tile, n_rows, self.device)
        n = max(1, min(MOST_LAUNCHES, int(PAIRS_OF_A_GRAPH / n_rows**2))) if self.is_gpu else 1

        def launches() -> None:
            for _ in range(n):
                recorded.run()

        replay = measure.captured(launches) if self.is_gpu else launches
        n_replays = N_REPLAYS if self.is_gpu else 1
        seconds = statistics.median(measure.seconds_of(replay, self.device) for _ in range(n_replays))
        return Timed(seconds / n, recorded.tile)


@dataclass
class Sweep:
    """The sweep over some groups.

    Attributes:
        bench: where candidates are tried.
        compiled: what is known of them before; a candidate that is not here was left out by the budget.
        until: on the clock of time.monotonic, when nothing more is begun.
        on_step: called after each measurement, to show progress.
    """

    bench: Bench
    compiled: Mapping[Trial, Compiled]
    until: float = math.inf
    on_step: Callable[[], None] = lambda: None
    _checked: dict[Trial, Checked] = field(default_factory=dict)

    def run(self, groups: Iterable[Group]) -> Iterator[Row]:
        for group in groups:
            if self._is_over():
                yield self._row(
                    group, None, None, outcome="left out", reason=f"{BUDGET_SPENT}: {len(group.candidates)} candidates"
                )
            else:
                yield from self._run_group(group)

    def _run_group(self, group: Group) -> Iterator[Row]:
        rate = self.bench.matrix_tflops(group.dtype)
        accepted: list[Tile] = []
        times: dict[Tile | None, dict[int, float]] = {}

        def timed(tile: Tile | None, n_rows: int) -> Row:
            row = self._timed(group, tile, n_rows, rate)
            if row.microseconds is not None:
                of_tile = times.setdefault(tile, {})
                of_tile[n_rows] = min(row.microseconds, of_tile.get(n_rows, math.inf))
            return row

        first, others = self.bench.sizes.first, self.bench.sizes.others
        yield from (timed(None, n) for n in first)
        for tile in group.candidates:
            row = self._obstacle(group, tile)
            if row is not None:
                yield row
                continue
            accepted.append(tile)
            yield from (timed(tile, n) for n in first)
        yield from (timed(None, n) for n in first)
        shipped = times.get(None, {})
        known = [tile for tile in accepted if times.get(tile, {}).keys() == shipped.keys() == set(first)]
        best = sorted(known, key=lambda tile: math.prod(times[tile][n] / shipped[n] for n in first))[:N_BEST]
        for n_rows in others:
            yield from (timed(tile, n_rows) for tile in (None, *best, None))

    def _obstacle(self, group: Group, tile: Tile) -> Row | None:
        """Why a candidate is not timed, if it is not."""
        compiled = self.compiled.get((group, tile))
        if compiled is None or self._is_over():
            return self._row(group, tile, None, outcome="left out", reason=BUDGET_SPENT)
        if compiled.fault:
            return self._row(group, tile, None, outcome="rejected", reason=compiled.fault)
        try:
            checked = self._checked[group, tile] = self.bench.check(group, tile)
        except Exception as error:
            return self._row(group, tile, self.bench.sizes.checked, outcome="failed", reason=_said(error))
        self.on_step()
        if not checked.error <= allowed_error(group.dtype):
            reason = f"its result is off by {checked.error:.1e}, of the shipped tile's"
        elif not checked.same_bits:
            reason = "the same call gave other bits the second time"
        else:
            return None
        return self._row(group, tile, self.bench.sizes.checked, outcome="wrong", reason=reason)

    def _timed(self, group: Group, tile: Tile | None, n_rows: int, rate: float | None) -> Row:
        if self._is_over():
            return self._row(group, tile, n_rows, outcome="left out", reason=BUDGET_SPENT)
        try:
            seconds, launched = self.bench.time(group, tile, n_rows)
        except Exception as error:
            return self._row(group, tile, n_rows, outcome="failed", reason=_said(error))
        self.on_step()
        # Rows of two sides are compared with those of the other side alone: half of the pairs.
        flops = 2 * PRODUCTS[group.kernel] * n_rows**2 * group.D * (0.5 if group.form == "two-sided" else 1)
        tflops = flops / seconds / 1e12
        return replace(
            self._row(group, tile, n_rows),
            tile=launched,
            microseconds=round(1e6 * seconds, 2),
            tflops=round(tflops, 1),
            share_of_matrix_rate=None if rate is None else round(tflops / rate, 4),
        )

    def _row(self, group: Group, tile: Tile | None, n_rows: int | None, outcome: str = "measured", reason: str = "") -> Row:
        row = Row(group.kernel, group.form, group.dtype, group.D, n_rows, tile, tile is None, outcome, reason)
        compiled, checked = self.compiled.get((group, tile)), self._checked.get((group, tile))
        if compiled is not None:
            row = replace(row, registers=compiled.registers, spilled_bytes=compiled.spilled_bytes, shared_kb=compiled.shared_kb)
        if checked is not None:
            row = replace(row, error=float(f"{checked.error:.2g}"), same_bits=checked.same_bits)
        return row

    def _is_over(self) -> bool:
        return time.monotonic() >= self.until

    def n_steps(self, groups: Iterable[Group]) -> int:
        """How many measurements there are at most."""
        first, others = len(self.bench.sizes.first), len(self.bench.sizes.others)
        return sum((1 + first) * len(group.candidates) + 2 * first + (N_BEST + 2) * others for group in groups)


def sweep_group(group: Group, device: torch.device, target: Any) -> Iterator[Row]:
    """The sweep over one group, in this process alone: what is compiled already, it takes from Triton's cache."""
    bench = Device(device)
    compiled = {
        trial: compile_trial(trial, target, bench.sizes, with_stand_in=False) if bench.is_gpu else Compiled()
        for trial in trials_of(group)
    }
    yield from Sweep(bench, compiled).run([group])


BUDGET_SPENT = "the budget was spent"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


# ---- the command -----------------------------------------------------------------------------------------------------


def here() -> tuple[torch.device, Any, dict[str, Any]]:
    """The device, its target for tiles.py, and the columns :data:`WHERE`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = target_of(device)
    environment = environment_of(device, datetime.now(timezone.utc).isoformat(timespec="seconds"))
    return device, target, where_of(environment, target)


def target_of(device: torch.device) -> Any:
    """What tiles.py goes by."""
    from clop_kernels.backends.triton import tiles  # after the environment is set

    return tiles.target_of(device)


def where_of(environment: Environment, target: Any) -> dict[str, Any]:
    return asdict(environment) | of_target(target)


def of_target(target: Any) -> dict[str, Any]:
    return {"sm": target.capability or "", "processors": target.n_processors}


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 180)
    if given.list:
        console.print(_listed(GROUPS))
        return 0
    has_gpu = torch.cuda.is_available()
    if given.compile_only and not has_gpu:
        os.environ.pop("TRITON_INTERPRET", None)
    elif not has_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        _parser().error("there is no GPU: TRITON_INTERPRET=1 runs it small on the CPU, --compile-only compiles for --sm")
    from clop_kernels.backends.triton import tiles

    until = time.monotonic() + given.seconds
    device, target, where = here()
    is_small = not has_gpu and not given.compile_only
    if not has_gpu and given.compile_only:
        target = tiles.Target(given.sm, resources.PROCESSORS)
    of = OF_STAND_IN if is_small else GROUPS
    if unknown := set(given.groups or ()) - {group.name for group in of}:
        _parser().error(f"no such group: {', '.join(sorted(unknown))}; --list prints them")
    groups = [group for group in of if not given.groups or group.name in given.groups]
    trials = [trial for group in groups for trial in trials_of(group)]
    bench = Device(device)

    compiled: dict[Trial, Compiled] = {}
    with progress_bar(console) as progress:
        if is_small:
            compiled = dict.fromkeys(trials, Compiled())
        else:
            task = progress.add_task("compiling", total=len(trials))
            for trial, result in compile_all(trials, target, OF_GPU, given.processes, until):
                compiled[trial] = result
                progress.update(task, advance=1, description=f"compiling: {trial[0].name}")
        if given.compile_only:
            progress.stop()
            console.print(_compiled_table(compiled, trials))
            return 0

        path = given.output or TABLES / f"sm_{target.capability}.csv"
        if is_small and given.output is None:
            path = Path("build") / "tile_sweep" / "cpu.csv"
        writer, rows = Writer(path, where), []
        task = progress.add_task("measuring")
        sweep = Sweep(bench, compiled, until, lambda: progress.advance(task))
        progress.update(task, total=sweep.n_steps(groups))
        try:
            for row in sweep.run(groups):
                writer.add(row)
                rows.append(row)
                progress.update(task, description=f"measuring: {row.kernel} {row.dtype} D={row.D}")
                if row.outcome == "failed" and _is_broken(device):
                    console.print(
                        f"the GPU is in an error after {row.name}: --groups with those that are left goes on", style="red"
                    )
                    break
        except KeyboardInterrupt:
            console.print("interrupted; what there is so far is kept")
    for table in printed(rows):
        console.print(table)
    console.print(f"{sum(row.outcome == 'measured' for row in rows)} times, added to {path}")
    return int(any(row.outcome in ("wrong", "failed") for row in rows))


def _is_broken(device: torch.device) -> bool:
    try:
        measure.synchronize(device)
    except Exception:
        return True
    return False


def _listed(groups: Sequence[Group]) -> Table:
    table = Table("group", "candidates", title="most valuable first")
    for group in groups:
        table.add_row(group.name, "; ".join(map(str, group.candidates)))
    return table


def _compiled_table(compiled: Mapping[Trial, Compiled], trials: Sequence[Trial]) -> Table:
    table = Table("group", "tile", "registers", "spilled bytes", "shared KB", "rejected, for it")
    for group, tile in trials:
        if found := compiled.get((group, tile)):
            columns = ("" if value is None else str(value) for value in found)
            table.add_row(group.name, "shipped" if tile is None else str(tile), *columns, style="red" if found.fault else None)
    return table


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a positive number of seconds")
    return value


def _processes(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 process or more")
    return value


@functools.cache
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tile_sweep",
        description="Compiles candidates for Triton's tiles, times the kernels alone, and appends to the table of this GPU, in "
        "which the newest run of a case counts. Prints the fastest tile of each case beside the shipped one. Each row is in the "
        "file the moment it is known. Predicted to take 2 to 3 minutes on an H200 with 16 cores.",
        epilog="Without a GPU, TRITON_INTERPRET=1 in the environment runs it small on the CPU, to be tested itself, and "
        "--compile-only shows which candidates spill. tests/test_tile_sweep.py holds clop_kernels/backends/triton/tiles.py to "
        "the tables that are committed.",
    )  # fmt: skip
    add = parser.add_argument
    add("--groups", nargs="+", metavar="GROUP", help="only these (--list)")
    add("--seconds", type=_seconds, default=math.inf, help="ends by then, leaves out the end, and says so in rows (no limit)")
    add("--output", type=Path, metavar="FILE", help="the table; by default benchmarks/results/tiles/sm_NN.csv")
    add("--processes", type=_processes, default=len(os.sched_getaffinity(0)), metavar="N", help="that compile (%(default)s)")
    add("--compile-only", action="store_true", help="compile, print what each candidate takes, and end")
    add(
        "--sm",
        type=int,
        default=90,
        choices=resources.TARGETS,
        help="what --compile-only compiles for without a GPU (%(default)s)",
    )
    add("--list", action="store_true", help="print the groups and their candidates")
    return parser


if __name__ == "__main__":
    sys.exit(main())
