"""``python -m benchmarks.tile_sweep``: which of Triton's tiles is fastest on this GPU.

The candidates are in :mod:`benchmarks.tile_candidates`. The sweep computes a loss as the package does, but replaces the tile of
one kernel, and then times that kernel's launches alone:

1. All candidates are compiled into Triton's cache, with one process per core (:mod:`benchmarks.tile_kernels`). A candidate is
   rejected if it spills more bytes than benchmarks.resources allows, or needs more shared memory than the GPU has.
2. Each result is compared with the shipped tile's, and a second call must give the same bits.
3. Each candidate is timed at two numbers of rows, and the best of a group at four more. A time is the median of five replays of a
   CUDA graph with up to 20 launches. The shipped tile is timed first and last: if those times differ, the machine has changed.

Each row of the table is written as soon as it is known. A budget leaves out candidates from the end. A test compares tiles.py
with the committed tables, benchmarks/results/tiles/sm_NN.csv.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from rich.console import Console
from rich.table import Table

from . import measure, resources
from .compare import progress_bar
from .problems import DTYPES
from .results import ROOT, Environment, environment_of
from .tile_candidates import GROUPS, OF_STAND_IN, Group, Tile
from .tile_kernels import (
    OF_GPU,
    OF_INTERPRETER,
    Compiled,
    Sizes,
    Trial,
    compile_all,
    compile_trial,
    record,
    said,
    trials_of,
)
from .tile_table import Row, Writer, printed

PRODUCTS = {"softmax": 1, "gradient": 2, "pairs": 0.5, "product": 1}
"""How many N x D by D x N products a kernel computes. `pairs` computes each pair once, for both of its rows."""

MOST_LAUNCHES = 20
PAIRS_OF_A_GRAPH = 5e9
"""A graph has enough launches for this many pairs, which take a few milliseconds: at least one, at most MOST_LAUNCHES."""

N_REPLAYS = 5

N_BEST = 3
"""How many candidates of a group are timed at all numbers of rows."""


def allowed_error(dtype: str) -> float:
    """The largest allowed relative error (in the norm) against the shipped tile's result, which sums in another order."""
    return 1e-5 if dtype == "float32" else 4 * torch.finfo(DTYPES[dtype]).eps


# ---- measuring -------------------------------------------------------------------------------------------------------


class Checked(NamedTuple):
    """How a candidate's result compares with the shipped tile's."""

    error: float
    same_bits: bool


class Timed(NamedTuple):
    """The time of one pass over all pairs, and the tile that was launched."""

    seconds: float
    tile: Tile


class Bench(Protocol):
    """A place to try candidates."""

    sizes: Sizes

    def matrix_tflops(self, dtype: str) -> float | None: ...

    def check(self, group: Group, tile: Tile) -> Checked: ...

    def time(self, group: Group, tile: Tile | None, n_rows: int) -> Timed: ...


class Device:
    """A GPU, or the CPU with Triton's interpreter in its place, whose times mean nothing."""

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
        bench: Where candidates are tried.
        compiled: The results of compiling. The budget left out a candidate that is missing here.
        until: When to start nothing more, on the clock of time.monotonic.
        on_step: Called after each measurement, to show progress.
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
        """A row that says why a candidate is not timed, or None if it can be timed."""
        compiled = self.compiled.get((group, tile))
        if compiled is None or self._is_over():
            return self._row(group, tile, None, outcome="left out", reason=BUDGET_SPENT)
        if compiled.fault:
            return self._row(group, tile, None, outcome="rejected", reason=compiled.fault)
        try:
            checked = self._checked[group, tile] = self.bench.check(group, tile)
        except Exception as error:
            return self._row(group, tile, self.bench.sizes.checked, outcome="failed", reason=said(error))
        self.on_step()
        if not checked.error <= allowed_error(group.dtype):
            reason = f"its result differs from the shipped tile's by a relative {checked.error:.1e}"
        elif not checked.same_bits:
            reason = "a second call gave other bits"
        else:
            return None
        return self._row(group, tile, self.bench.sizes.checked, outcome="wrong", reason=reason)

    def _timed(self, group: Group, tile: Tile | None, n_rows: int, rate: float | None) -> Row:
        if self._is_over():
            return self._row(group, tile, n_rows, outcome="left out", reason=BUDGET_SPENT)
        try:
            seconds, launched = self.bench.time(group, tile, n_rows)
        except Exception as error:
            return self._row(group, tile, n_rows, outcome="failed", reason=said(error))
        self.on_step()
        # A two-sided loss compares rows only with the other side: half of the pairs.
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
        """The most measurements there can be."""
        first, others = len(self.bench.sizes.first), len(self.bench.sizes.others)
        return sum((1 + first) * len(group.candidates) + 2 * first + (N_BEST + 2) * others for group in groups)


def sweep_group(group: Group, device: torch.device, target: Any) -> Iterator[Row]:
    """The sweep over one group, in this process alone. Kernels that are already compiled come from Triton's cache."""
    bench = Device(device)
    compiled = {
        trial: compile_trial(trial, target, bench.sizes, with_stand_in=False) if bench.is_gpu else Compiled()
        for trial in trials_of(group)
    }
    yield from Sweep(bench, compiled).run([group])


BUDGET_SPENT = "the budget was spent"


# ---- the command -----------------------------------------------------------------------------------------------------


def here() -> tuple[torch.device, Any, dict[str, Any]]:
    """The device, its target for tiles.py, and the columns of the table that say where and when it is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = target_of(device)
    environment = environment_of(device, datetime.now(timezone.utc).isoformat(timespec="seconds"))
    return device, target, where_of(environment, target)


def target_of(device: torch.device) -> Any:
    """The description of the device by which tiles.py chooses tiles."""
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
        _parser().error("there is no GPU: TRITON_INTERPRET=1 runs it small on the CPU, and --compile-only compiles for --sm")
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

        name = "cpu.csv" if is_small else f"sm_{target.capability}.csv"
        path = given.output or ROOT / "build" / "tile_sweep" / name
        writer, rows = Writer(path, where), []
        status, task = 0, progress.add_task("measuring")
        sweep = Sweep(bench, compiled, until, lambda: progress.advance(task))
        progress.update(task, total=sweep.n_steps(groups))
        try:
            for row in sweep.run(groups):
                writer.add(row)
                rows.append(row)
                progress.update(task, description=f"measuring: {row.kernel} {row.dtype} D={row.D}")
                if row.outcome == "failed" and _is_broken(device):
                    console.print(
                        f"The GPU is in an error state after {row.name}. Continue with --groups and the remaining groups.",
                        style="red",
                    )
                    break
        except KeyboardInterrupt:
            console.print("interrupted; the results so far are kept")
            status = 130
    for table in printed(rows):
        console.print(table)
    console.print(f"{sum(row.outcome == 'measured' for row in rows)} times were added to {path}")
    return status or int(any(row.outcome in ("wrong", "failed") for row in rows))


def _is_broken(device: torch.device) -> bool:
    try:
        measure.synchronize(device)
    except Exception:
        return True
    return False


def _listed(groups: Sequence[Group]) -> Table:
    table = Table("group", "candidates", title="Groups of candidates, the most valuable first")
    for group in groups:
        table.add_row(group.name, "; ".join(map(str, group.candidates)))
    return table


def _compiled_table(compiled: Mapping[Trial, Compiled], trials: Sequence[Trial]) -> Table:
    table = Table("group", "tile", "registers", "spilled bytes", "shared KB", "rejected because it")
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
        description="Compiles the candidates for Triton's tiles, times their kernels alone, and prints the fastest tile of each "
        "case beside the shipped one. Each row is appended to a table as soon as it is known; the newest run of a case counts. "
        "Predicted to take 2 to 3 minutes on an H200 with 16 cores.",
        epilog="Without a GPU, --compile-only shows which candidates spill, and the environment variable TRITON_INTERPRET=1 runs "
        "the sweep small on the CPU, which only tests it. A test compares clop_kernels/backends/triton/tiles.py with the "
        "committed tables in benchmarks/results/tiles; copy a new table there to commit it.",
    )  # fmt: skip
    add = parser.add_argument
    add("--groups", nargs="+", metavar="GROUP", help="measure only these groups (see --list)")
    add("--seconds", type=_seconds, default=math.inf, help="stop after this time; rows name what was left out (no limit)")
    add("--output", type=Path, metavar="FILE", help="the table to append to (default: build/tile_sweep/sm_NN.csv)")
    add(
        "--processes",
        type=_processes,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that compile (%(default)s)",
    )
    add("--compile-only", action="store_true", help="only compile, and print the resources of each candidate")
    add(
        "--sm",
        type=int,
        default=90,
        choices=resources.TARGETS,
        help="compute capability for --compile-only without a GPU (%(default)s)",
    )
    add("--list", action="store_true", help="print the groups and their candidates")
    return parser


if __name__ == "__main__":
    sys.exit(main())
