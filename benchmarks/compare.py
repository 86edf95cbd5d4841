"""``python -m benchmarks.compare``: the providers side by side in one run, timed in turn, with ratios and targets.

On a shared machine only ratios within one run mean something, so every ratio is the median over rounds of
(time of the provider / time of our default backend in the same round).
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from clop_kernels import backends

from . import measure
from .measure import MODES, Mode
from .providers import N_VIEWS, PROVIDERS, TEMPERATURE, TOLERANCES, WIDTH, Provider, check_equal, make_embeddings

HERE = Path(__file__).resolve().parent
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCES}


@dataclass(frozen=True)
class Target:
    """A bound for a provider at N rows: so many times as fast as ``baseline``, or without one that many MB at most."""

    provider: str
    n_rows: int
    bound: float
    baseline: str | None = None


CPU_TARGETS = (
    Target("cpu", 8192, 15.0, baseline="eager"),
    Target("cpu", 8192, 5.5, baseline="compile"),
    Target("cpu", 8192, 60.0),
    Target("cpu", 65536, 200.0),
    Target("tiled", 8192, 9.0, baseline="eager"),
    Target("tiled", 8192, 3.0, baseline="compile"),
    Target("tiled", 8192, 60.0),
    Target("tiled", 65536, 200.0),
)
"""For float32, D=128, forward+backward."""


@dataclass(frozen=True)
class Settings:
    """What one run has in common."""

    width: int
    dtype: torch.dtype
    device: torch.device
    mode: Mode
    temperature: float


@dataclass
class Result:
    """One provider at one N. ``seconds`` fills as it is timed; ``note`` says why it is not, or not all of it.

    ``matrix_tflops`` is the rate of torch's matrix product before and after, in 10^12 flops a second.
    """

    provider: str
    n_rows: int
    seconds: list[float] = field(default_factory=list)
    peak_extra_mb: float | None = None
    matrix_tflops: list[float] = field(default_factory=list)
    note: str = ""

    def quantile_ms(self, share: float) -> float | None:
        """Between the two nearest of the sorted times, linearly; None if nothing was timed."""
        if not self.seconds:
            return None
        return 1e3 * float(torch.tensor(self.seconds, dtype=torch.float64).quantile(share))


# ---- measuring -------------------------------------------------------------------------------------------------------


class Comparison:
    """Runs the sizes one after another; what :attr:`results` holds stays valid when a run is interrupted."""

    def __init__(self, settings: Settings, progress: Progress) -> None:
        self.settings = settings
        self.results: list[Result] = []
        self._progress = progress

    def run(self, providers: Iterable[Provider], n_rows: int, repeats: int) -> None:
        """Memory first, before larger calls leave memory with the allocator; then all must agree; then time."""
        s = self.settings
        torch.compiler.reset()  # its code for the sizes before counts towards a limit
        embeddings = make_embeddings(n_rows, s.width, s.dtype, s.device)
        runnable: list[tuple[Provider, Result]] = []
        for provider in providers:
            reason = measure.obstacle(provider, n_rows, s.width, s.dtype, s.device)
            result = Result(provider.name, n_rows, note=f"skipped: {reason}" if reason else "")
            self.results.append(result)
            if reason is None:
                runnable.append((provider, result))

        task = self._progress.add_task(f"N={n_rows}", total=len(runnable) * (1 + repeats) + 1)

        def show(what: str, advance: int = 1) -> None:
            self._progress.update(task, description=f"N={n_rows}: {what}", advance=advance, refresh=True)

        steps = {}
        for index, (provider, result) in enumerate(runnable):
            show(f"memory of {provider.name}", advance=min(index, 1))
            steps[provider.name] = measure.step(provider, embeddings, s.mode, s.temperature)
            result.peak_extra_mb = measure.peak_extra_mb(steps[provider.name])
        show("same losses and gradients?")
        check_equal([provider for provider, _ in runnable], embeddings, s.temperature)
        seconds = {provider.name: result.seconds for provider, result in runnable}
        rates: list[float] = []
        for _, result in runnable:
            result.matrix_tflops = rates
        rates.append(measure.matrix_tflops(s.device, s.dtype))
        measure.alternate(steps, repeats, seconds, before_each=lambda name: show(f"time of {name}"))
        rates.append(measure.matrix_tflops(s.device, s.dtype))
        show("done")

    def find(self, provider: str, n_rows: int) -> Result | None:
        return next((r for r in self.results if (r.provider, r.n_rows) == (provider, n_rows)), None)


def ratio(slow: Result | None, fast: Result | None) -> float | None:
    """The median over rounds of slow / fast; None if no round timed both."""
    if slow is None or fast is None:
        return None
    rounds = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=False)]  # unequal after an interruption
    return statistics.median(rounds) if rounds else None


FLOPS_PER_PAIR = {"forward": 2, "backward": 4, "forward+backward": 6}
"""Times N^2 D: of the textbook's products, whatever a provider does. The symmetry of the matrix saves a third of them."""


def share_of_matrix_rate(comparison: Comparison, result: Result) -> float | None:
    """The rate of a provider over that of torch's matrix product; above 1 where symmetry saves more than all else costs."""
    if not result.seconds or not result.matrix_tflops:
        return None
    s = comparison.settings
    flops = FLOPS_PER_PAIR[s.mode] * result.n_rows**2 * s.width
    return flops / statistics.median(result.seconds) / 1e12 / statistics.mean(result.matrix_tflops)


# ---- reporting -------------------------------------------------------------------------------------------------------


def results_table(comparison: Comparison, default: str) -> Table:
    s = comparison.settings
    table = Table(title=f"{s.mode}, D={s.width}, {s.dtype}, temperature {s.temperature}, {device_name(s.device)}")
    for header in ("N", "provider", "median ms", "q25", "q75", f"x {default}", "share of matrix rate", "peak extra MB", "note"):
        table.add_column(header, justify="left" if header in ("provider", "note") else "right")
    for r in comparison.results:
        times = (r.quantile_ms(share) for share in (0.5, 0.25, 0.75))
        numbers = (*times, ratio(r, comparison.find(default, r.n_rows)), share_of_matrix_rate(comparison, r), r.peak_extra_mb)
        cells = ("" if x is None else f"{x:,.{digits}f}" for x, digits in zip(numbers, (1, 1, 1, 2, 2, 1), strict=True))
        table.add_row(str(r.n_rows), r.provider, *cells, r.note)
    return table


def target_lines(comparison: Comparison) -> list[str]:
    """One line a target that this run has measured under the target's conditions."""
    s = comparison.settings
    if (s.device.type, s.dtype, s.width, s.mode) != ("cpu", torch.float32, 128, "forward+backward"):
        return []
    return [line for target in CPU_TARGETS if (line := _target_line(target, comparison)) is not None]


def _target_line(target: Target, comparison: Comparison) -> str | None:
    result = comparison.find(target.provider, target.n_rows)
    where = f"N={target.n_rows}: {target.provider}"
    if target.baseline is None:
        value = None if result is None else result.peak_extra_mb
        met = value is not None and value <= target.bound
        text = f"{where} takes {value or 0:.1f} MB extra (target {target.bound:g} MB)"
    else:
        value = ratio(comparison.find(target.baseline, target.n_rows), result)
        met = value is not None and value >= target.bound
        text = f"{where} is {value or 0:.1f}x {target.baseline} (target {target.bound:g}x)"
    return None if value is None else f"{text}: {'met' if met else 'MISSED'}"


def csv_rows(comparison: Comparison, commit: str, date: str) -> list[dict[str, object]]:
    s = comparison.settings
    return [
        {
            "provider": r.provider,
            "N": r.n_rows,
            "D": s.width,
            "dtype": str(s.dtype).removeprefix("torch."),
            "mode": s.mode,
            "temperature": s.temperature,
            **{f"{name}_ms": _rounded(r.quantile_ms(q)) for name, q in (("median", 0.5), ("q25", 0.25), ("q75", 0.75))},
            "n_repeats": len(r.seconds),
            "share_of_matrix_rate": _rounded(share_of_matrix_rate(comparison, r)),
            "matrix_tflops": _rounded(statistics.mean(r.matrix_tflops) if r.matrix_tflops else None),
            "peak_extra_mb": _rounded(r.peak_extra_mb),
            **environment(s.device, commit, date),
            "note": r.note,
        }
        for r in comparison.results
    ]


def environment(device: torch.device, commit: str, date: str) -> dict[str, str]:
    """What a row must say to be compared with rows of other machines and days."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "",
        "commit": commit,
        "date": date,
    }


def write_csv(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Adds the rows to the file: a second run of one day and commit does not replace the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def _rounded(value: float | None) -> float | str:
    return "" if value is None else round(value, 3)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {torch.get_num_threads()} threads"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def commit_name() -> str:
    """The short commit of this checkout, with "-dirty" if files differ from it; "unknown" outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=HERE, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def default_directory(device: torch.device) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") if device.type == "cuda" else "cpu"
    return HERE / "results" / name


# ---- command line ----------------------------------------------------------------------------------------------------


def _rows(text: str) -> int:
    rows = _integer(text, f"a multiple of {N_VIEWS}, the number of views")
    if rows < N_VIEWS or rows % N_VIEWS:
        raise argparse.ArgumentTypeError(f"{text}: expected a multiple of {N_VIEWS}, the number of views")
    return rows


def _large_rows(text: str) -> int:
    return 0 if text == "0" else _rows(text)


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


def _temperature(text: str) -> float:
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
        description="Times the providers of the loss in turn, in one run, and measures the peak memory of each. Prints "
        "a table and the project's targets, and adds the rows to a CSV file. Ctrl-C keeps what was measured so far.",
        epilog="providers: " + "; ".join(f"{p.name}, {p.summary}" for p in PROVIDERS.values()),
    )
    add = parser.add_argument
    add(
        "--rows",
        type=_rows,
        nargs="+",
        default=[8192],
        metavar="N",
        help="rows of the embeddings, of all views together; several are measured one after the other (8192)",
    )
    add(
        "--large-rows",
        type=_large_rows,
        default=65536,
        metavar="N",
        help="then one timing at this size of the providers that hold no N x N array; 0 leaves it out (%(default)s)",
    )
    add("--dim", type=_positive, nargs="+", default=[WIDTH], metavar="D", help=f"width of the embeddings, or several ({WIDTH})")
    add("--repeats", type=_positive, default=5, metavar="R", help="how often each provider is timed (%(default)s)")
    add(
        "--temperature",
        type=_temperature,
        default=TEMPERATURE,
        metavar="TAU",
        help="temperature of the loss (%(default)s)",
    )
    add(
        "--mode",
        choices=MODES,
        default="forward+backward",
        help="the passes whose time and memory are measured (%(default)s)",
    )
    add("--dtype", choices=DTYPES, default="float32", help="dtype of the embeddings (%(default)s)")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=_device, default=default_device, metavar="DEV", help="cpu, cuda or cuda:INDEX (%(default)s)")
    add(
        "--providers",
        nargs="+",
        choices=PROVIDERS,
        metavar="NAME",
        help="which to measure; by default all that can run",
    )
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the CSV file goes; by default results/cpu or results/GPU beside this file",
    )
    return parser


def _chosen_providers(
    arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype, console: Console
) -> list[Provider]:
    """In the order of PROVIDERS; raises SystemExit if one was asked for by name and cannot run."""
    chosen = []
    for name, provider in PROVIDERS.items():
        reason = provider.obstacle(device, dtype)
        if arguments.providers is not None and name not in arguments.providers:
            continue
        if reason is None:
            chosen.append(provider)
        elif arguments.providers is not None:
            raise SystemExit(f"--providers {name}: expected one that can run on {device}: {reason}")
        else:
            console.print(f"without {name}: {reason}", style="dim")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    console = Console()
    dtype, device = DTYPES[arguments.dtype], arguments.device
    providers = _chosen_providers(arguments, device, dtype, console)
    default = backends.select(None, device, dtype).name
    commit, now = commit_name(), datetime.now(timezone.utc)

    directory = arguments.output or default_directory(device)
    path = directory / f"{now:%Y-%m-%d}-{commit.removesuffix('-dirty')}-compare.csv"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for width in arguments.dim:
        interrupted = False
        # Drawn between the timings only: a thread that redraws the bar would take part of what is timed.
        with Progress(*columns, console=console, auto_refresh=False) as progress:
            comparison = Comparison(Settings(width, dtype, device, arguments.mode, arguments.temperature), progress)
            try:
                for n_rows in arguments.rows:
                    comparison.run(providers, n_rows, arguments.repeats)
                if arguments.large_rows:
                    comparison.run([p for p in providers if p.pair_arrays == 0], arguments.large_rows, repeats=1)
            except KeyboardInterrupt:
                interrupted = True
                for result in comparison.results:
                    result.note = result.note or "interrupted"
        console.print(results_table(comparison, default))
        for line in target_lines(comparison):
            console.print(line)
        if comparison.results:
            write_csv(csv_rows(comparison, commit, now.isoformat(timespec="seconds")), path)
            console.print(f"rows added to {path}")
        if interrupted:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
