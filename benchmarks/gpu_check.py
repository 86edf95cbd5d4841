"""``python -m benchmarks.gpu_check``: all that a machine with a GPU should show, in one command.

Planned for under 8 minutes, and not yet timed on a GPU.

1. The tests that need a GPU, as pytest runs them: every backend against the float64 reference, determinism, CUDA graphs,
   streams, no host synchronisation, memory, compute-sanitizer.
2. Speed and peak memory beside the plain loss, torch.compile of it and other libraries, timed in turn.
3. The rate of a plain matrix product, measured before and after each size, and each loss's share of it, by 6 N^2 D.

2 and 3 are a sweep of benchmarks.compare. Leaves checks.csv, speed.csv, report.md and its figures in a folder; each row
carries device, versions, commit and date. On a CPU it runs a small version of all of it, to be tested itself.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console

from . import report
from .compare import Comparison, progress_bar
from .providers import PROVIDERS
from .results import default_directory, environment_of, markdown_table, write_csv
from .sweeps import PRESETS, Sweep

ROOT = Path(__file__).resolve().parents[1]
SECONDS_FOR_TESTS = 240
SECONDS_FOR_SPEED = 150
"""After which no further size is begun: the one that runs then takes up to a minute, for torch.compile compiles each."""

CPU_SWEEPS = (Sweep((512,), (64,), repeats=3),)

GPU_TESTS = ("tests/test_gpu.py", "tests/test_native_cuda.py", "tests/test_distributed_gpu.py", "tests/test_training_recipes.py")
CPU_TESTS = ("tests/test_backends.py", "-k", "test_half_precision or test_a_single_positive")


@dataclass
class Check:
    """One test: passed, failed, skipped or "out of time", with the figures behind the verdict or the reason."""

    test: str
    outcome: str
    seconds: float = 0.0
    details: str = ""


# ---- tests -----------------------------------------------------------------------------------------------------------


def run_tests(selection: Sequence[str], seconds: float) -> list[Check]:
    """pytest in a process of its own, since a device assertion or a crash there must not end this one."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", *selection]
        timed_out = False
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False, env=dict(os.environ)
            )
            output = done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            timed_out, output = True, _text(error.stdout) + _text(error.stderr)
        checks = parse_junit(junit.read_text()) if junit.exists() else []
    if timed_out:
        checks.append(Check(" ".join(selection), "out of time", seconds, output[-2000:]))
    elif not checks:
        checks.append(Check(" ".join(selection), "failed", 0.0, f"no test ran: {output[-2000:]}"))
    return checks


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def parse_junit(xml: str) -> list[Check]:
    """The test cases of pytest's --junitxml."""
    checks = []
    for case in ElementTree.fromstring(xml).iter("testcase"):
        outcome, details = "passed", [f"{p.get('name')} {p.get('value')}" for p in case.iter("property")]
        for tag, verdict in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            for element in case.findall(tag):
                outcome = verdict
                details.append((element.get("message") or "").splitlines()[0] if element.get("message") else "")
        checks.append(Check(case.get("name") or "", outcome, float(case.get("time") or 0), "; ".join(details)))
    return checks


# ---- speed -----------------------------------------------------------------------------------------------------------


def measure_speed(comparison: Comparison, sweeps: Sequence[Sweep]) -> list[str]:
    """Returns what went wrong: a failure is a finding, and the other cases are still worth their time."""
    start = time.perf_counter()
    notes = []
    for sweep in sweeps:
        providers = [p for p in PROVIDERS.values() if sweep.providers is None or p.name in sweep.providers]
        for case in sweep.cases():
            if time.perf_counter() - start > SECONDS_FOR_SPEED:
                notes.append(f"out of time: {case} not measured")
                continue
            try:
                comparison.run(case, providers, sweep.repeats, sweep.seconds)
            except Exception as error:
                notes.append(f"failed: {case}: {type(error).__name__}: {error}")
    return notes


# ---- report ----------------------------------------------------------------------------------------------------------


def section(checks: Sequence[Check], notes: Sequence[str]) -> str:
    """What the report of the speed does not say."""
    outcomes = [check.outcome for check in checks]
    counted = ", ".join(f"{outcomes.count(o)} {o}" for o in ("passed", "failed", "skipped", "out of time") if o in outcomes)
    told = [
        {"test": check.test, "outcome": check.outcome, "details": check.details[:300]}
        for check in checks
        if check.outcome != "passed" or check.details
    ]
    return "\n\n".join([f"## Tests: {counted or 'not run'}", markdown_table(told), *(f"- {note}" for note in notes)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where the folder's files go; by default under benchmarks/results"
    )
    parser.add_argument("--no-tests", action="store_true", help="speed and memory only")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    environment = environment_of(device, datetime.now(timezone.utc).isoformat(timespec="seconds"))
    folder = given.output or default_directory(device) / f"{environment.date[:10]}-{environment.commit}-gpu-check"
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(str(environment))
    if not on_gpu:
        console.print("no GPU: a small run on the CPU, which shows that this command works and nothing about GPUs")

    checks: list[Check] = []
    if not given.no_tests:
        with console.status("tests"):
            checks = run_tests(GPU_TESTS if on_gpu else CPU_TESTS, SECONDS_FOR_TESTS)
        write_csv([{**vars(check), **asdict(environment)} for check in checks], folder / "checks.csv")
    with progress_bar(console) as progress:
        comparison = Comparison(device, environment, progress)
        notes = measure_speed(comparison, PRESETS["gpu"] if on_gpu else CPU_SWEEPS)
    write_csv([row.columns() for row in comparison.rows], folder / "speed.csv")
    path = report.write(comparison.rows, folder, section(checks, notes))
    console.print(path.read_text(), markup=False)
    console.print(f"written to {folder}")
    has_failed = any(check.outcome in ("failed", "out of time") for check in checks)
    return 1 if has_failed or any(text.startswith("failed") for text in [*notes, *(row.note for row in comparison.rows)]) else 0


if __name__ == "__main__":
    sys.exit(main())
