"""``python -m benchmarks.compare``: times the providers side by side in one run, over a sweep of cases.

On a shared machine, only ratios within one run mean anything. Each ratio is therefore the median over rounds of (the
provider's time / the default backend's time in the same round).
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
    legend,
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
"""The fields of a sweep that have an option on the command line."""

NO_GRAPH = "no CUDA graph"
"""The note of a row begins with this if its step cannot be captured."""

LARGEST_IN_A_GRAPH = 65536
"""Up to this N, the host's time and the GPU's own time are also measured separately."""


class Comparison:
    """Runs cases one after another. :attr:`rows` stays valid if a run is interrupted or fails."""

    def __init__(self, device: torch.device, environment: Environment, progress: Progress) -> None:
        self.device = device
        self.environment = environment
        self.rows: list[Row] = []
        self._progress = progress

    def run(self, case: Case, providers: Iterable[Provider], repeats: int, seconds: float = math.inf) -> list[Row]:
        """Measures memory, checks that the providers agree, then times them. Returns the case's rows.

        Each row is added to :attr:`rows` as soon as it exists.
        """
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
                # Redraw only between timings: a thread that redraws the bar would slow down the call being timed.
                self._progress.update(task, description=f"{case}: time of {name}", advance=1, refresh=True)

            measure_rate()
            measure.alternate(steps, repeats, {row.provider: row.seconds for row in timed}, seconds, before_each=show)
            measure_rate()
            if self.device.type == "cuda" and case.N <= LARGEST_IN_A_GRAPH:
                for row in timed:
                    self._separate_host(row, steps[row.provider])
        except BaseException as error:
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {measure.in_one_line(error)}"
            for row in self.rows[first:]:
                row.note = row.note or reason
            raise
        finally:
            self._progress.remove_task(task)
        return self.rows[first:]

    @staticmethod
    def _separate_host(row: Row, step: Step) -> None:
        """Measures the host's time and the GPU's own time. A call on an idle GPU includes both."""
        row.host_ms = 1e3 * measure.host_seconds(step)
        if step.mode == "backward":
            return
        try:
            row.graph_ms = 1e3 * measure.graph_seconds(step)
        except RuntimeError as error:  # for example a library that synchronises
            row.note = row.note or f"{NO_GRAPH}: {str(error).splitlines()[0]}"

    def prepare(self, case: Case, providers: Iterable[Provider]) -> dict[str, Step]:
        """Adds one row per provider, with its peak memory. Returns steps that are ready to be timed, for those that can run.

        Memory is measured before time, since larger calls leave memory with the allocator. Each result is compared with the
        first provider's. A provider that computes something else is still timed, but its row says so, and no ratio uses it.
        """
        torch.compiler.reset()  # code that was compiled for earlier cases counts towards a limit of torch.compile
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
                row.note = f"failed: {measure.in_one_line(error)}"
        return steps


def chosen_providers(
    names: Sequence[str] | None, device: torch.device, dtypes: Iterable[str], console: Console
) -> list[Provider]:
    """The providers that can run in at least one of the dtypes, in the order of PROVIDERS.

    Raises:
        SystemExit: if a provider was asked for by name and cannot run.
    """
    chosen = []
    for name, provider in PROVIDERS.items():
        if names is not None and name not in names:
            continue
        reasons = [provider.obstacle(device, DTYPES[dtype]) for dtype in dtypes]
        if None in reasons:
            chosen.append(provider)
        elif names is not None:
            raise SystemExit(f"--providers {name}: expected a provider that can run on {device}: {reasons[0]}")
        else:
            console.print(f"{name} is left out: {reasons[0]}", style="dim")
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
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of the {n_gpus} GPUs that torch sees")
    return device


def _named(name: str, summary: str) -> str:
    return name if name == summary else f"{name}: {summary}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Compares implementations of a loss (the providers). Checks that all compute the same loss and gradients, "
        "measures the peak memory of each, then times them in turn. If options have several values, every combination is "
        "measured. Prints a table and adds its rows to a CSV file. Ctrl-C keeps the results so far.",
        epilog="Providers: " + "; ".join(_named(p.name, p.summary) for p in PROVIDERS.values()) + ". "
        "Problems: " + "; ".join(_named(p.name, p.summary) for p in PROBLEMS.values()) + ".",
    )  # fmt: skip
    one = Sweep((8192,))
    sweep = parser.add_argument_group("what to measure")
    add = sweep.add_argument
    add("--preset", choices=PRESETS, help="a named set of cases, instead of the options below")
    add("--problem", dest="problems", choices=PROBLEMS, nargs="+", help=f"the loss ({', '.join(one.problems)})")
    add("--rows", dest="N", type=_rows, nargs="+", metavar="N", help="number of embeddings, all views together (8192)")
    add("--dim", dest="D", type=_positive, nargs="+", metavar="D", help="width of the embeddings (128)")
    add("--dtype", dest="dtypes", choices=DTYPES, nargs="+", help="dtype of the embeddings (float32)")
    add(
        "--temperature",
        dest="temperatures",
        type=_positive_number,
        nargs="+",
        metavar="TAU",
        help="temperature of the loss (0.1)",
    )
    add("--mode", dest="modes", choices=MODES, nargs="+", help="which passes to measure (forward+backward)")
    add = parser.add_argument
    add("--repeats", type=_positive, metavar="R", help="rounds per case; each round times every provider once (5)")
    add(
        "--seconds",
        type=_positive_number,
        metavar="S",
        help="time limit for a case: no further round starts that would exceed it (60)",
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=_device, default=default_device, metavar="DEV", help="cpu, cuda or cuda:INDEX (%(default)s)")
    add(
        "--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help="implementations to measure (default: all that can run)"
    )
    add("--output", type=Path, metavar="DIR", help="folder for the CSV file (default: build/bench/cpu, or build/bench/GPU-NAME)")
    add("--report", action="store_true", help="also write report.md with figures there (see python -m benchmarks.report)")
    add("--targets", action="store_true", help="also compare the results with the project's own performance targets")
    return parser


def _sweeps(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Sweep]:
    given = {name: tuple(values) for name in _PRODUCT if (values := getattr(arguments, name)) is not None}
    limits = {name: value for name in ("repeats", "seconds") if (value := getattr(arguments, name)) is not None}
    if arguments.preset is None:
        return [Sweep(**{"N": (8192,)} | given | limits)]
    if given:
        parser.error(f"--preset {arguments.preset}: expected no other option for what to measure beside it")
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
    for line in legend(comparison.rows):
        console.print(line, highlight=False)
    if arguments.targets:
        print_table(console, "the project's targets", verdicts(comparison.rows))
    if comparison.rows:
        console.print(f"Rows were added to {path}")
    if arguments.report and status != 130:
        from . import report  # it draws with matplotlib, which measuring does not need

        console.print(f"Report: {report.write(read_csv([path]), directory, with_targets=arguments.targets)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
