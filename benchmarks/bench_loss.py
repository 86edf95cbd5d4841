"""The pytest-benchmark suite: forward and backward of every provider, grouped by problem and N.

``pytest benchmarks`` runs it. The environment variable CLOP_BENCH_ROWS="256" (or "256,1024") chooses other N. All rounds
of one provider run in a row. On a busy machine, take ratios from ``python -m benchmarks.compare`` instead, which
alternates between providers. Inputs and the check that all providers agree are the same as in that command.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import datetime, timezone

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rich.progress import Progress

from .compare import Comparison
from .measure import Step
from .problems import N_VIEWS, PROBLEMS, Case
from .providers import PROVIDERS
from .results import Row, environment_of, find

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS_PER_BENCHMARK = 3.0
FEWEST_ROUNDS, MOST_ROUNDS = 3, 50


def _rows() -> tuple[int, ...]:
    value = os.environ.get("CLOP_BENCH_ROWS", "1024,4096")
    try:
        rows = tuple(int(part) for part in value.split(","))
    except ValueError:
        rows = ()
    if not rows or any(n < N_VIEWS or n % N_VIEWS for n in rows):
        raise ValueError(f"CLOP_BENCH_ROWS={value!r}: expected multiples of {N_VIEWS} with commas between them")
    return rows


@dataclass(frozen=True)
class Setup:
    """One case: the steps of the providers that can run, and a row for every provider with its peak memory or an obstacle."""

    case: Case
    steps: dict[str, Step]
    rows: list[Row]


CASES = [Case(n_rows, problem=problem) for problem in PROBLEMS for n_rows in _rows()]


@pytest.fixture(scope="session", params=CASES, ids=lambda case: f"{case.problem}-N={case.N}")
def setup(request: pytest.FixtureRequest) -> Setup:
    case: Case = request.param
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    comparison = Comparison(DEVICE, environment_of(DEVICE, now), Progress(disable=True))
    return Setup(case, comparison.prepare(case, PROVIDERS.values()), comparison.rows)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward_backward(setup: Setup, provider: str, benchmark: BenchmarkFixture) -> None:
    row = find(setup.rows, provider, setup.case)
    if row is None:
        pytest.skip(f"{provider} does not offer {setup.case.problem}")
    if provider not in setup.steps:
        (pytest.fail if row.note.startswith("failed") else pytest.skip)(row.note)
    measured = setup.steps[provider]
    benchmark.group = str(setup.case)
    benchmark.extra_info |= row.columns()
    benchmark.pedantic(measured, setup=measured.prepare, rounds=_rounds(measured))  # type: ignore[no-untyped-call]


def _rounds(measured: Step) -> int:
    """How many rounds fit into the time of a benchmark. Measures one call, which is also the warm-up."""
    measured.prepare()
    start = time.perf_counter()
    measured()
    seconds = time.perf_counter() - start
    return min(max(round(SECONDS_PER_BENCHMARK / seconds), FEWEST_ROUNDS), MOST_ROUNDS)
