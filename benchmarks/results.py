"""The results of a measurement: one row per provider and case, with everything needed to compare it on another day."""

from __future__ import annotations

import csv
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path

import torch

from .problems import Case

ROOT = Path(__file__).resolve().parents[1]

FLOPS_PER_PAIR = {"forward": 2, "backward": 4, "forward+backward": 6}
"""In units of N^2 D: the matrix products of the textbook's formula, whatever a provider does. Using the symmetry of the matrix
saves a third of them."""


@dataclass(frozen=True)
class Environment:
    """Where and when a row was measured. All rows of a run share one environment; ``date`` tells runs apart."""

    device_type: str
    device: str
    torch: str
    python: str
    triton: str
    cuda: str
    driver: str
    commit: str
    date: str

    def __str__(self) -> str:
        parts = {"torch": self.torch, "CUDA": self.cuda, "driver": self.driver, "triton": self.triton, "commit": self.commit}
        return ", ".join([self.device, *(f"{name} {value}" for name, value in parts.items() if value), self.date[:10]])


def environment_of(device: torch.device, date: str) -> Environment:
    return Environment(
        device_type=device.type,
        device=device_name(device),
        torch=torch.__version__,
        python=platform.python_version(),
        triton=version("triton"),
        cuda=torch.version.cuda or "",
        driver=_driver() if device.type == "cuda" else "",
        commit=commit_name(),
        date=date,
    )


@dataclass
class Row:
    """One provider on one case.

    Attributes:
        version: Version of the provider's package.
        is_default: Whether ``backend=None`` selects this backend here.
        seconds: One entry per round. Within a case, entries of the same index were timed one after the other.
        matrix_tflops: Speed of torch's matrix product in the same run, in 10^12 flops per second.
        host_ms: Time until a call returns, on a GPU that is idle before it.
        graph_ms: Time of a replay as a CUDA graph: the GPU's own time.
        note: Why all or part of it was not measured; "wrong: ..." if the provider computes something else.
    """

    provider: str
    version: str
    is_default: bool
    case: Case
    environment: Environment
    seconds: list[float] = field(default_factory=list)
    peak_extra_mb: float | None = None
    predicted_mb: float = 0.0
    matrix_tflops: float | None = None
    host_ms: float | None = None
    graph_ms: float | None = None
    note: str = ""

    @property
    def is_wrong(self) -> bool:
        """A wrong result is still timed, but no ratio and no target uses it."""
        return self.note.startswith("wrong")

    def quantile_ms(self, share: float) -> float | None:
        """Between the two nearest of the sorted times, linearly; None if nothing was timed."""
        if not self.seconds:
            return None
        return 1e3 * float(torch.tensor(self.seconds, dtype=torch.float64).quantile(share))

    def share_of_matrix_rate(self) -> float | None:
        """Uses the GPU's own time if it is known. Above 1 if using the symmetry saves more than the rest of the loss costs."""
        if not self.seconds or not self.matrix_tflops or self.is_wrong:
            return None
        flops = FLOPS_PER_PAIR[self.case.mode] * self.case.N**2 * self.case.D
        seconds = statistics.median(self.seconds) if self.graph_ms is None else 1e-3 * self.graph_ms
        return flops / seconds / 1e12 / self.matrix_tflops

    def columns(self) -> dict[str, object]:
        return {
            "provider": self.provider,
            "version": self.version,
            "is_default": self.is_default,
            **asdict(self.case),
            **{f"{name}_ms": _rounded(self.quantile_ms(q)) for name, q in (("median", 0.5), ("q25", 0.25), ("q75", 0.75))},
            "rounds_ms": " ".join(f"{1e3 * s:.6g}" for s in self.seconds),
            "peak_extra_mb": _rounded(self.peak_extra_mb),
            "predicted_mb": _rounded(self.predicted_mb),
            "matrix_tflops": _rounded(self.matrix_tflops),
            "share_of_matrix_rate": _rounded(self.share_of_matrix_rate()),
            "host_ms": _rounded(self.host_ms),
            "graph_ms": _rounded(self.graph_ms),
            **asdict(self.environment),
            "note": self.note,
        }

    @classmethod
    def of(cls, columns: dict[str, str]) -> Row:
        """Reads a line of a CSV file. The quantiles and the share are computed from the other columns."""
        case = {f.name: columns[f.name] for f in fields(Case)}
        return cls(
            provider=columns["provider"],
            version=columns["version"],
            is_default=columns["is_default"] == "True",
            case=Case(**case | {"N": int(case["N"]), "D": int(case["D"]), "temperature": float(case["temperature"])}),  # type: ignore[arg-type]
            environment=Environment(**{f.name: columns[f.name] for f in fields(Environment)}),
            seconds=[float(ms) / 1e3 for ms in columns["rounds_ms"].split()],
            peak_extra_mb=_number(columns["peak_extra_mb"]),
            predicted_mb=float(columns["predicted_mb"]),
            matrix_tflops=_number(columns["matrix_tflops"]),
            host_ms=_number(columns.get("host_ms", "")),  # files older than November 27, 2026 have neither
            graph_ms=_number(columns.get("graph_ms", "")),
            note=columns["note"],
        )


def ratio(slow: Row | None, fast: Row | None) -> float | None:
    """The median over rounds of slow / fast. None if no round timed both, or if the rows are from different runs.

    On a shared machine only ratios within one run mean anything, and ratios within one round are the most reliable.
    """
    if slow is None or fast is None or slow.environment != fast.environment or slow.is_wrong or fast.is_wrong:
        return None
    rounds = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=False)]  # unequal after an interruption
    return statistics.median(rounds) if rounds else None


def memory_ratio(large: Row | None, small: Row | None) -> float | None:
    """None for the backward pass alone: its extra memory does not include what the forward pass keeps for it."""
    if large is None or small is None or large.peak_extra_mb is None or not small.peak_extra_mb or large.case.mode == "backward":
        return None
    return large.peak_extra_mb / small.peak_extra_mb


def find(rows: Iterable[Row], provider: str, case: Case) -> Row | None:
    return next((r for r in rows if (r.provider, r.case) == (provider, case)), None)


def default_of(rows: Iterable[Row], case: Case) -> Row | None:
    """The row of the backend that ``backend=None`` selects."""
    return next((r for r in rows if r.is_default and r.case == case), None)


def is_too_large(row: Row) -> bool:
    """Whether it was not run because the predicted memory exceeds what the machine can spare."""
    return row.note.startswith("skipped: needs")


# ---- files -----------------------------------------------------------------------------------------------------------


def write_csv(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Appends the rows to the file, so a second run with the same date and commit keeps the first one's rows."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def read_csv(paths: Iterable[Path]) -> list[Row]:
    """The rows of all files. If several runs measured a case, the newest run that timed anything counts.

    Raises:
        ValueError: if a file was not written by :func:`write_csv`.
    """
    rows: list[Row] = []
    for path in paths:
        with path.open(newline="") as file:
            try:
                rows.extend(Row.of(columns) for columns in csv.DictReader(file))
            except KeyError as error:
                raise ValueError(f"{path}: expected the columns of benchmarks.compare; there is no {error}") from None
    newest: dict[Case, str] = {}
    for row in rows:
        if row.seconds or row.case not in newest:
            newest[row.case] = max(row.environment.date, newest.get(row.case, ""))
    return [row for row in rows if row.environment.date == newest[row.case]]


def default_directory(device: torch.device) -> Path:
    """Where results go unless the user names a folder. Git ignores it, so the next run's commit is not labelled "dirty"."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") if device.type == "cuda" else "cpu"
    return ROOT / "build" / "bench" / name


# ---- tables ----------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The rows as a table for a person. Every row has the same columns."""
    of_gpus = any(row.host_ms is not None or row.graph_ms is not None for row in rows)
    return [
        {
            "case": str(row.case),
            "provider": row.provider,
            "median ms": number(row.quantile_ms(0.5), 2 if of_gpus else 1),
            "quartiles ms": " – ".join(number(row.quantile_ms(q), 2 if of_gpus else 1) for q in (0.25, 0.75))
            if row.seconds
            else "",
            "rounds": str(len(row.seconds) or ""),
            **({"host ms": number(row.host_ms, 2), "graph ms": number(row.graph_ms, 3)} if of_gpus else {}),
            "time / default": number(ratio(row, default_of(rows, row.case)), 2),
            "share of matrix rate": number(row.share_of_matrix_rate(), 2),
            "extra MB": number(row.peak_extra_mb, 1),
            "MB / default": number(memory_ratio(row, default_of(rows, row.case)), 1),
            "note": row.note,
        }
        for row in rows
    ]


def legend(rows: Sequence[Row]) -> list[str]:
    """One plain line for each term of :func:`summary` that a newcomer may not know."""
    if not rows:
        return []
    names = " or ".join(dict.fromkeys(row.provider for row in rows if row.is_default))
    lines = []
    if names:
        lines += [
            f"default: the backend of clop_kernels that you get if you do not name one, here {names}.",
            "time / default: a paired ratio. Each round divides a provider's time by the default's time in the same round. "
            "This is the median over rounds; above 1 means slower than the default.",
        ]
    lines += [
        "share of matrix rate: the speed of the loss as a share of the speed of torch's own matrix product in the same run. "
        "It can exceed 1, because a symmetric matrix needs fewer products than the formula counts.",
        "extra MB: the peak memory during a call, above what was in use before it.",
    ]
    if any(row.host_ms is not None or row.graph_ms is not None for row in rows):
        lines.append("host ms: the time until a call returns. graph ms: the GPU's own time, from a replay as a CUDA graph.")
    return lines


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    if not rows:
        return "none"
    cells = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in cells)


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _rounded(value: float | None) -> float | str:
    return "" if value is None else round(value, 3)


def _number(text: str) -> float | None:
    return float(text) if text else None


# ---- where ----------------------------------------------------------------------------------------------------------


def version(package: str) -> str:
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


def _driver() -> str:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit_name() -> str:
    """The short commit of this checkout, with "-dirty" if files differ from it.

    The environment variable CLOP_COMMIT overrides it, for a copy without a git repository or inside another one.
    """
    if given := os.environ.get("CLOP_COMMIT"):
        return given

    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
