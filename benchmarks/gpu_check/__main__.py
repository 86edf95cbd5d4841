"""The command: ``python -m benchmarks.gpu_check --help``."""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

from ..results import Environment
from . import summary
from .journal import WHOLE, Journal, read
from .plan import PLAN, Step, machine_here
from .processes import ROOT, Runner


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if given.report is not None:
        try:
            console.print(f"Written: {summary.write(given.report)}. An archive of the folder: {given.report.resolve()}.tar.gz")
        except FileNotFoundError as error:
            parser.error(str(error))
        return 0
    steps = [step for step in PLAN if given.steps is None or step.name in given.steps]
    if given.list:
        console.print(_table(steps))
        return 0

    environment = _environment()
    on_gpu = environment.device_type == "cuda"
    folder = (given.output or ROOT / "build" / "gpu_check" / f"{environment.date[:10]}-{environment.commit}").resolve()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    console.print(str(environment))
    if not on_gpu:
        console.print(
            "No GPU was found. The check runs small on the CPU, which tests the check itself and says nothing about GPUs."
        )

    journal = Journal(folder / summary.JOURNAL, environment)
    if journal.path.exists():
        console.print(f"{journal.path}: adding to the results of an earlier run")
    runner = Runner(journal, folder / "logs", given.budget)
    with Follower(journal.path, console):
        status = _run(runner, steps, on_gpu, console)
    console.print(f"Written: {summary.write(folder)}. An archive of the folder: {folder}.tar.gz")
    results = [result for result, _ in read(folder / summary.JOURNAL)]
    return status or int(not all(result.is_good for result in results))


def _run(runner: Runner, steps: Sequence[Step], on_gpu: bool, console: Console) -> int:
    """Runs the steps in turn. Returns 130 if Ctrl-C or SIGTERM interrupted it."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    machine = machine_here(on_gpu)
    try:
        for step in steps:
            began = time.monotonic()
            left = runner.left()
            console.print(f"{step.name}: {step.summary}" + (f" ({left:.0f} s left)" if math.isfinite(left) else ""), style="bold")
            if left < 5:
                runner.add(step.name, WHOLE, "left out", details="the budget is spent")
                continue
            runner.run_all(step.name, step.jobs(machine), 1 if step.runs_apart else machine.at_once)
            runner.add(step.name, WHOLE, "done", time.monotonic() - began)
    except KeyboardInterrupt:
        console.print("interrupted; the results so far are kept")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _environment() -> Environment:
    """Asks in a separate process, since the question can hang if the driver hangs."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    command = [sys.executable, "-m", "benchmarks.gpu_check.workers", "describe", json.dumps([date])]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    except subprocess.TimeoutExpired:
        raise SystemExit("The GPU's driver did not answer within 120 seconds. Check whether nvidia-smi works.") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"Asking for the GPU's name failed: {error.stderr[-2000:]}") from None
    return Environment(**json.loads(done.stdout.splitlines()[-1]))


class Follower:
    """Shows the journal as it grows: bad results in full, and the number of the others."""

    def __init__(self, path: Path, console: Console) -> None:
        self._path, self._console = path, console
        self._end_of_shown = _size(path)  # does not show the results of an earlier run again
        self._counts: Counter[str] = Counter()
        self._status = console.status("")
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Follower:
        self._status.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._status.stop()

    def _follow(self) -> None:
        while not self._end.wait(0.5):
            self._show_new()
        self._show_new()

    def _show_new(self) -> None:
        end = _size(self._path)
        if end == self._end_of_shown:
            return
        for result, _ in read(self._path, self._end_of_shown):
            if not result.is_good:
                text = f"{result.step}: {result.name}: {result.outcome}: {result.details[-300:]}"
                self._console.print(text, style="red", markup=False, highlight=False)
            if result.name == WHOLE:
                took = "" if result.seconds is None else f" in {result.seconds:.0f} s"
                counted = ", ".join(f"{n} {outcome}" for outcome, n in self._counts.items())
                self._console.print(f"{result.step}: {counted or result.outcome}{took}", markup=False, highlight=False)
                self._counts.clear()
            else:
                self._counts[result.outcome] += 1
                self._status.update(f"{result.step}: " + ", ".join(f"{n} {outcome}" for outcome, n in self._counts.items()))
        self._end_of_shown = end


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _table(steps: Sequence[Step]) -> Table:
    table = Table(title="The plan, most valuable steps first. Seconds on an H200 with 16 CPU cores; ~ marks a guess")
    for header in ("step", "what it answers", "seconds", "total"):
        table.add_column(header, justify="right" if header in ("seconds", "total") else "left")
    total = 0.0
    for step in steps:
        total += step.expected
        table.add_row(step.name, step.summary, f"{'' if step.was_timed else '~'}{step.expected:.0f}", f"{total:.0f}")
    return table


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a positive number of seconds")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description="Checks and measures everything that needs a GPU, the most valuable results first. Writes each result to "
        "DIR/results.jsonl as soon as it is known, and makes report.md, CSV files and an archive from that file. The exit code "
        "is 1 if a result is wrong, failed or out of time. Without a GPU it runs small on the CPU, which only tests the check.",
        epilog="A budget leaves out steps from the end of the plan. If this folder has no .git, set the environment variable "
        "CLOP_COMMIT to its commit.",
    )  # fmt: skip
    names = [step.name for step in PLAN]
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for all files (default: build/gpu_check/DATE-COMMIT)",
    )
    add("--steps", nargs="+", choices=names, metavar="STEP", help=f"run only these steps, of {', '.join(names)}")
    add(
        "--budget",
        type=_seconds,
        default=math.inf,
        metavar="SECONDS",
        help="stop after this time and keep the results so far (no limit)",
    )
    add("--list", action="store_true", help="print the plan and how long each step takes")
    add("--report", type=Path, metavar="DIR", help="make the report of an earlier run, even of an interrupted one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
