"""``python -m benchmarks.compare``: the providers side by side in one run, timed in turn, over a sweep of cases.

On a shared machine only ratios within one run mean something, so every ratio is the median over rounds of
(time of the provider / time of our default backend in the same round).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from clop_kernels import backends

from . import measure
from .measure import Outcome, Step
from .problems import DTYPES, MODES, N_VIEWS, PROBLEMS, Case
from .providers import PROVIDERS, Provider
from .results import (
    Environment,
    Row,
    default_directory,
    default_of,
    environment_of,
    number,
    ratio,
    read_csv,
    summary,
    version,
    write_csv,
)
from .sweeps import PRESETS, Sweep
from .targets import verdicts

_PRODUCT = ("N", "D", "problems", "dtypes", "temperatures", "modes")
"""The values of a sweep, which options of the command line give too."""

NO_GRAPH = "no CUDA graph"
"""How the note of a row begins whose step cannot be captured."""

LARGEST_IN_A_GRAPH = 65536
"""Up to here the host's time and the GPU's own are measured apart."""


class Comparison:
    """Runs cases one after another; what :attr:`rows` holds stays valid when a run is interrupted or fails."""

    def __init__(self, device: torch.device, environment: Environment, progress: Progress) -> None:
        self.device = device
        self.environment = environment
        self.rows: list[Row] = []
        self._progress = progress

    def run(self, case: Case, providers: Iterable[Provider], repeats: int, seconds: float = math.inf) -> list[Row]:
        """Memory, equality, then time. Returns the case's rows, which :attr:`rows` gets as they come."""
        first = len(self.rows)
        task = self._progress.add_task(str(case), total=None)
        try:
            steps = self.prepare(case, providers)
            self._progress.update(task, total=repeats * len(steps))
            timed = [row for row in self.rows[first:] if row.provider in steps]
            rates: list[float] = []

            def measure_rate() -> None:
                rates.append(measure.matrix_tflops(self.device, DTYPES[case.dtype]))
                for row in timed:
                    row.matrix_tflops = statistics.mean(rates)

            def show(name: str) -> None:
                # Drawn between the timings only: a thread that redraws the bar would take part of what is timed.
                self._progress.update(task, description=f"{case}: time of {name}", advance=1, refresh=True)

            measure_rate()
            measure.alternate(steps, repeats, {row.provider: row.seconds for row in timed}, seconds, before_each=show)
            measure_rate()
            if self.device.type == "cuda" and case.N <= LARGEST_IN_A_GRAPH:
                for row in timed:
                    self._separate_host(row, steps[row.provider])
        except BaseException as error:
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error}"
            for row in self.rows[first:]:
                row.note = row.note or reason
            raise
        finally:
            self._progress.remove_task(task)
        return self.rows[first:]

    @staticmethod
    def _separate_host(row: Row, step: Step) -> None:
        """A call on an idle GPU waits for the host too: its time, and the GPU's own."""
        row.host_ms = 1e3 * measure.host_seconds(step)
        if step.mode == "backward":
            return
        try:
            row.graph_ms = 1e3 * measure.graph_seconds(step)
        except RuntimeError as error:  # a library that synchronises, say
            row.note = row.note or f"{NO_GRAPH}: {str(error).splitlines()[0]}"

    def prepare(self, case: Case, providers: Iterable[Provider]) -> dict[str, Step]:
        """A row a provider; steps, ready to be timed, of those that can run, with their peak memory in the rows.

        Memory comes before time, since larger calls leave memory with the allocator. The calls whose memory was measured
        are held to the first: a provider that computes something else is timed, but its row says so and counts nowhere.
        """
        torch.compiler.reset()  # its code for the cases before counts towards a limit
        default = backends.select(None, self.device, DTYPES[case.dtype]).name
        inputs = case.make_inputs(self.device)
        steps: dict[str, Step] = {}
        expected: Outcome | None = None
        for provider in providers:
            if case.problem not in provider.functions:
                continue
            row = Row(provider.name, version(provider.package), provider.name == default, case, self.environment)
            self.rows.append(row)
            row.predicted_mb = measure.predicted_mb(provider, case)
            reason = measure.obstacle(provider, case, self.device)
            if reason is not None:
                row.note = f"skipped: {reason}"
                continue
            try:
                step = measure.step(provider, case, inputs)
                row.peak_extra_mb = measure.peak_extra_mb(step)
                outcome = Outcome.of(provider.name, step)
                expected = expected or outcome
                steps[provider.name] = step
                measure.check_equal(outcome, expected, case)
            except AssertionError as error:
                row.note = f"wrong: {error}"
            except Exception as error:
                row.note = f"failed: {type(error).__name__}: {error}"
        return steps


def chosen_providers(
    names: Sequence[str] | None, device: torch.device, dtypes: Iterable[str], console: Console
) -> list[Provider]:
    """In the order of PROVIDERS, those that can run in one of the dtypes at least.

    Raises:
        SystemExit: if one was asked for by name and cannot.
    """
    chosen = []
    for name, provider in PROVIDERS.items():
        if names is not None and name not in names:
            continue
        reasons = [provider.obstacle(device, DTYPES[dtype]) for dtype in dtypes]
        if None in reasons:
            chosen.append(provider)
        elif names is not None:
            raise SystemExit(f"--providers {name}: expected one that can run on {device}: {reasons[0]}")
        else:
            console.print(f"without {name}: {reasons[0]}", style="dim")
    return chosen


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, auto_refresh=False)


def print_table(console: Console, title: str, rows: Sequence[dict[str, str]]) -> None:
    if not rows:
        return
    table = Table(title=title)
    for header in rows[0]:
        table.add_column(header, justify="left" if header in ("case", "provider", "note", "target", "verdict") else "right")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def _one_line(case: Case, rows: Sequence[Row]) -> str:
    default = default_of(rows, case)
    parts = []
    for row in rows:
        times, median = ratio(row, default), row.quantile_ms(0.5)
        value = row.note.partition(":")[0] if median is None else f"{median:,.1f} ms" if times is None else f"{times:.1f}x"
        parts.append(f"{row.provider} {value}" if row is not default else f"{row.provider} {number(median, 1)} ms")
    return f"{case}: {', '.join(parts)}"


# ---- command line ----------------------------------------------------------------------------------------------------


def _rows(text: str) -> int:
    rows = _integer(text, f"a multiple of {N_VIEWS}, the number of views")
    if rows < N_VIEWS or rows % N_VIEWS:
        raise argparse.ArgumentTypeError(f"{text}: expected a multiple of {N_VIEWS}, the number of views")
    return rows


def _positive(text: str) -> int:
    value = _integer(text, "a whole number of at least 1")
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least 1")
    return value


def _integer(text: str, expected: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}") from None


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive finite number")
    return value


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected cpu, cuda or cuda:INDEX") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected cpu, cuda or cuda:INDEX")
    n_gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a GPU that torch sees, which are {n_gpus}")
    return device


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Times the providers of a loss in turn, in one run, and measures the peak memory of each, after a check "
        "that all compute the same. Several values of an option are a sweep: the product of all. Prints a table and the "
        "project's targets, and adds the rows of each case to a CSV file. Ctrl-C keeps what was measured so far.",
        epilog="providers: " + "; ".join(f"{p.name}, {p.summary}" for p in PROVIDERS.values()) + ". "
        "problems: " + "; ".join(f"{p.name}, {p.summary}" for p in PROBLEMS.values()) + ".",
    )  # fmt: skip
    one = Sweep((8192,))
    sweep = parser.add_argument_group("the sweep")
    add = sweep.add_argument
    add("--preset", choices=PRESETS, help="a sweep with a name, in place of the values below")
    add("--problem", dest="problems", choices=PROBLEMS, nargs="+", help=f"({', '.join(one.problems)})")
    add("--rows", dest="N", type=_rows, nargs="+", metavar="N", help="rows of the embeddings, all views together (8192)")
    add("--dim", dest="D", type=_positive, nargs="+", metavar="D", help="width of the embeddings (128)")
    add("--dtype", dest="dtypes", choices=DTYPES, nargs="+", help="of the embeddings (float32)")
    add("--temperature", dest="temperatures", type=_positive_number, nargs="+", metavar="TAU", help="(0.1)")
    add("--mode", dest="modes", choices=MODES, nargs="+", help="the passes that are measured (forward+backward)")
    add = parser.add_argument
    add("--repeats", type=_positive, metavar="R", help="rounds of a case, each with all providers in turn (5)")
    add("--seconds", type=_positive_number, metavar="S", help="no further round of a case that would end later (60)")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=_device, default=default_device, metavar="DEV", help="cpu, cuda or cuda:INDEX (%(default)s)")
    add("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help="which to measure; by default all that can run")
    add("--output", type=Path, metavar="DIR", help="for the CSV file; by default results/cpu or results/GPU beside this file")
    add("--report", action="store_true", help="write report.md and its figures there too: see python -m benchmarks.report")
    return parser


def _sweeps(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Sweep]:
    given = {name: tuple(values) for name in _PRODUCT if (values := getattr(arguments, name)) is not None}
    limits = {name: value for name in ("repeats", "seconds") if (value := getattr(arguments, name)) is not None}
    if arguments.preset is None:
        return [Sweep(**{"N": (8192,)} | given | limits)]
    if given:
        parser.error(f"--preset {arguments.preset} beside values of its sweep: expected one or the other")
    return [replace(sweep, **limits) for sweep in PRESETS[arguments.preset]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    sweeps = _sweeps(arguments, parser)
    console = Console(width=None if sys.stdout.isatty() else 220)
    device = arguments.device
    providers = chosen_providers(arguments.providers, device, {d for sweep in sweeps for d in sweep.dtypes}, console)
    environment = environment_of(device, datetime.now(timezone.utc).isoformat(timespec="seconds"))
    directory = arguments.output or default_directory(device)
    path = directory / f"{environment.date[:10]}-{environment.commit.removesuffix('-dirty')}-compare.csv"

    status = 0
    with progress_bar(console) as progress:
        comparison = Comparison(device, environment, progress)
        task = progress.add_task("cases", total=sum(len(list(sweep.cases())) for sweep in sweeps))
        try:
            for sweep in sweeps:
                those = [p for p in providers if sweep.providers is None or p.name in sweep.providers]
                for case in sweep.cases():
                    first = len(comparison.rows)
                    try:
                        comparison.run(case, those, sweep.repeats, sweep.seconds)
                    finally:
                        rows = comparison.rows[first:]
                        write_csv([row.columns() for row in rows], path)
                        console.print(_one_line(case, rows), highlight=False)
                    progress.update(task, advance=1, refresh=True)
        except KeyboardInterrupt:
            status = 130
    for row in comparison.rows:
        if row.note.startswith("failed") or row.is_wrong:
            console.print(f"{row.provider}: {row.note}", style="red", highlight=False)
            status = status or 1
    print_table(console, str(environment), summary(comparison.rows))
    print_table(console, "targets", verdicts(comparison.rows))
    if comparison.rows:
        console.print(f"rows added to {path}")
    if arguments.report and status != 130:
        from . import report  # draws, which takes a package that measuring does not

        console.print(f"report in {report.write(read_csv([path]), directory)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
