"""``python -m benchmarks.gpu_check``: all that a machine with a GPU should show, in one command.

Planned for under 8 minutes, and not yet timed on a GPU.

1. The tests that need a GPU, as pytest runs them: every backend against the float64 reference, determinism, CUDA graphs,
   streams, no host synchronisation, memory, compute-sanitizer.
2. Speed and peak memory beside the plain loss and torch.compile of it, timed in turn.
3. The rate of a plain matrix product, measured before and after each size, and each loss's share of it, by 6 N^2 D.

Leaves checks.csv, speed.csv and report.md in a folder; each row carries device, versions, commit and date. On a CPU it runs
a small version of all of it, to be tested itself.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from .compare import (
    DTYPES,
    Comparison,
    Settings,
    commit_name,
    csv_rows,
    default_directory,
    device_name,
    environment,
    ratio,
    share_of_matrix_rate,
)  # fmt: skip
from .providers import PROVIDERS, TEMPERATURE

ROOT = Path(__file__).resolve().parents[1]
SECONDS_FOR_TESTS = 240
SECONDS_FOR_SPEED = 150
"""After which no further size is begun: the one that runs then takes up to a minute, for torch.compile compiles each."""


@dataclass(frozen=True)
class Size:
    """One comparison of all providers that fit."""

    n_rows: int
    width: int
    dtype: str = "bfloat16"
    repeats: int = 10


GPU_SIZES = (
    Size(32768, 128),
    Size(65536, 128),
    Size(65536, 256),
    Size(2048, 128),
    Size(1048576, 128, repeats=1),
    Size(8192, 128),
    Size(8192, 128, "float32"),
    Size(8192, 1024),
)
"""Those with a target first."""

CPU_SIZES = (Size(512, 64, "float32", 3),)

GPU_TESTS = ("tests/test_gpu.py", "tests/test_native_cuda.py")
CPU_TESTS = ("tests/test_backends.py", "-k", "test_half_precision or test_a_single_positive")


@dataclass(frozen=True)
class Target:
    """What the project promises of a backend at a size: a bound for a ratio, or for the share of the matrix rate."""

    backend: str
    size: Size
    what: str  # a provider: times faster than it; "memory": times less than eager's; "share": of the matrix rate
    bound: float


GPU_TARGETS = (
    *(
        Target(backend, size, what, bound)
        for backend in ("cuda", "triton")
        for size, what, bound in (
            (Size(32768, 128), "eager", 15.0),
            (Size(32768, 128), "compile", 8.0),
            (Size(32768, 128), "memory", 200.0),
            (Size(2048, 128), "eager", 3.0),
        )
    ),
    *(Target("cuda", Size(65536, width), "share", 0.65) for width in (128, 256)),
    *(Target("cuda", Size(65536, width), "triton", 1.2) for width in (128, 256)),
    *(Target("triton", Size(65536, width), "share", 0.5) for width in (128, 256)),
)
"""For an H200."""


@dataclass
class Check:
    """One test: passed, failed, skipped or "out of time", with the figures behind the verdict or the reason."""

    test: str
    outcome: str
    seconds: float = 0.0
    details: str = ""


@dataclass
class Findings:
    checks: list[Check] = field(default_factory=list)
    comparisons: list[tuple[Size, Comparison]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# ---- tests -----------------------------------------------------------------------------------------------------------


def run_tests(selection: Sequence[str], seconds: float) -> list[Check]:
    """pytest in a process of its own, since a device assertion or a crash there must not end this one."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *selection]
        timed_out = False
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False, env=dict(os.environ)
            )
            output = done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            timed_out, output = True, _text(error.stdout) + _text(error.stderr)
        checks = parse_junit(report.read_text()) if report.exists() else []
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


def measure_speed(sizes: Sequence[Size], device: torch.device, findings: Findings, progress: Progress) -> None:
    start = time.perf_counter()
    for size in sizes:
        if time.perf_counter() - start > SECONDS_FOR_SPEED:
            findings.notes.append(f"out of time: N={size.n_rows}, D={size.width}, {size.dtype} not measured")
            continue
        comparison = Comparison(Settings(size.width, DTYPES[size.dtype], device, "forward+backward", TEMPERATURE), progress)
        findings.comparisons.append((size, comparison))
        try:
            comparison.run(
                [p for p in PROVIDERS.values() if size.n_rows < 2**20 or p.name in ("cuda", "triton")], size.n_rows, size.repeats
            )
        except Exception as error:  # a failure is a finding, and the other sizes are still worth their time
            findings.notes.append(f"failed: N={size.n_rows}, D={size.width}, {size.dtype}: {type(error).__name__}: {error}")


def target_lines(findings: Findings) -> list[str]:
    lines = []
    for target in GPU_TARGETS:
        key = (target.size.n_rows, target.size.width, target.size.dtype)
        for size, comparison in findings.comparisons:
            if (size.n_rows, size.width, size.dtype) == key:
                value = _target_value(target, size, comparison)
                where = f"N={size.n_rows}, D={size.width}, {size.dtype}: {target.backend}, {target.what}"
                if value is None:
                    lines.append(f"{where}: not measured (target {target.bound:g})")
                else:
                    verdict = "met" if value >= target.bound else "MISSED"
                    lines.append(f"{where}: {value:.2f} (target {target.bound:g}): {verdict}")
    return lines


def _target_value(target: Target, size: Size, comparison: Comparison) -> float | None:
    ours, eager = (comparison.find(name, size.n_rows) for name in (target.backend, "eager"))
    if ours is None or not ours.seconds:
        return None
    if target.what == "share":
        return share_of_matrix_rate(comparison, ours)
    if target.what == "memory":
        peaks = (ours.peak_extra_mb, None if eager is None else eager.peak_extra_mb)
        return None if peaks[0] is None or peaks[1] is None else peaks[1] / peaks[0]
    return ratio(comparison.find(target.what, size.n_rows), ours)


# ---- report ----------------------------------------------------------------------------------------------------------


def speed_rows(findings: Findings, commit: str, date: str) -> list[dict[str, object]]:
    rows = []
    for size, comparison in findings.comparisons:
        for row, result in zip(csv_rows(comparison, commit, date), comparison.results, strict=True):
            eager = ratio(comparison.find("eager", size.n_rows), result)
            rows.append({**row, "times_faster_than_eager": "" if eager is None else round(eager, 3)})
    return rows


def markdown(findings: Findings, rows: Sequence[dict[str, object]], device: torch.device, commit: str, date: str) -> str:
    outcomes = [check.outcome for check in findings.checks]
    counted = ", ".join(f"{outcomes.count(o)} {o}" for o in ("passed", "failed", "skipped", "out of time") if o in outcomes)
    lines = [
        f"# GPU check: {device_name(device)}",
        "",
        "; ".join(f"{name} {value}" for name, value in environment(device, commit, date).items()),
        "",
        f"## Tests: {counted}",
        "",
        *_table(
            [
                {"test": check.test, "outcome": check.outcome, "details": check.details[:300]}
                for check in findings.checks
                if check.outcome != "passed" or check.details
            ]
        ),
        "",
        "## Speed and memory, forward + backward",
        "",
        *_table(
            [
                {
                    name: row[name]
                    for name in (
                        "provider", "N", "D", "dtype", "median_ms", "times_faster_than_eager", "share_of_matrix_rate",
                        "peak_extra_mb", "note",
                    )
                }
                for row in rows
            ]
        ),
        "",
        *(f"- {line}" for line in [*target_lines(findings), *findings.notes]),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, object]]) -> list[str]:
    if not rows:
        return ["none"]
    cells = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in cells]


def write_rows(rows: Sequence[dict[str, object]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where the folder's files go; by default under benchmarks/results"
    )
    parser.add_argument("--no-tests", action="store_true", help="speed and memory only")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    now, commit = datetime.now(timezone.utc), commit_name()
    date = now.isoformat(timespec="seconds")
    folder = given.output or default_directory(device) / f"{now:%Y-%m-%d}-{commit}-gpu-check"
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(f"{device_name(device)}, torch {torch.__version__}, Python {platform.python_version()}, commit {commit}")
    if not on_gpu:
        console.print("no GPU: a small run on the CPU, which shows that this command works and nothing about GPUs")

    findings = Findings()
    if not given.no_tests:
        with console.status("tests"):
            findings.checks = run_tests(GPU_TESTS if on_gpu else CPU_TESTS, SECONDS_FOR_TESTS)
        common = {name: str(value) for name, value in environment(device, commit, date).items()}
        write_rows([{**vars(check), **common} for check in findings.checks], folder / "checks.csv")
    with Progress(console=console, auto_refresh=False) as progress:
        measure_speed(GPU_SIZES if on_gpu else CPU_SIZES, device, findings, progress)
    rows = speed_rows(findings, commit, date)
    if rows:
        write_rows(rows, folder / "speed.csv")
    text = markdown(findings, rows, device, commit, date)
    (folder / "report.md").write_text(text)
    console.print(text, markup=False)
    console.print(f"written to {folder}")
    has_failed = any(check.outcome in ("failed", "out of time") for check in findings.checks)
    return 1 if has_failed or any(note.startswith("failed") for note in findings.notes) else 0


if __name__ == "__main__":
    sys.exit(main())
