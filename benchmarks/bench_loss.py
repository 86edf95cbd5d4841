"""The pytest-benchmark suite: forward and backward of every provider, in groups by N.

``pytest benchmarks`` runs it; CLOP_BENCH_ROWS="256" (several: "256,1024") takes other N. The rounds of one provider
follow each other, so on a busy machine take ratios from ``python -m benchmarks.compare`` instead, which alternates.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .measure import Step, obstacle, peak_extra_mb, step
from .providers import N_VIEWS, PROVIDERS, TEMPERATURE, WIDTH, Provider, check_equal, make_embeddings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float32
SECONDS_PER_BENCHMARK = 3.0
FEWEST_ROUNDS, MOST_ROUNDS = 3, 50


def _rows() -> tuple[int, ...]:
    value = os.environ.get("CLOP_BENCH_ROWS", "1024,4096,8192")
    try:
        rows = tuple(int(part) for part in value.split(","))
    except ValueError:
        rows = ()
    if not rows or any(n < N_VIEWS or n % N_VIEWS for n in rows):
        raise ValueError(f"CLOP_BENCH_ROWS={value!r}: expected multiples of {N_VIEWS} with commas between them")
    return rows


@dataclass(frozen=True)
class Setup:
    """One N: the steps of the providers that can run, their peak memory, and why the others cannot."""

    n_rows: int
    steps: dict[str, Step]
    peaks: dict[str, float | None]
    obstacles: dict[str, str]


@pytest.fixture(scope="session", params=_rows(), ids=lambda n_rows: f"N={n_rows}")
def setup(request: pytest.FixtureRequest) -> Setup:
    """Measures memory first, before larger calls leave memory with the allocator, then checks that all agree."""
    n_rows: int = request.param
    embeddings = make_embeddings(n_rows, WIDTH, DTYPE, DEVICE)
    reasons = {name: obstacle(provider, n_rows, WIDTH, DTYPE, DEVICE) for name, provider in PROVIDERS.items()}
    runnable = [PROVIDERS[name] for name, reason in reasons.items() if reason is None]
    steps, peaks = {}, {}
    for provider in runnable:
        steps[provider.name] = step(provider, embeddings, "forward+backward", TEMPERATURE)
        peaks[provider.name] = peak_extra_mb(steps[provider.name])
    check_equal(runnable, embeddings, TEMPERATURE)
    return Setup(n_rows, steps, peaks, {name: reason for name, reason in reasons.items() if reason is not None})


@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=PROVIDERS.keys())
def test_forward_backward(setup: Setup, provider: Provider, benchmark: BenchmarkFixture) -> None:
    if provider.name in setup.obstacles:
        pytest.skip(setup.obstacles[provider.name])
    measured = setup.steps[provider.name]
    benchmark.group = f"N={setup.n_rows}"
    benchmark.extra_info |= {
        "peak_extra_mb": setup.peaks[provider.name],
        "device": str(DEVICE),
        "torch": torch.__version__,
    }
    benchmark.pedantic(measured, setup=measured.prepare, rounds=_rounds(measured))  # type: ignore[no-untyped-call]


def _rounds(measured: Step) -> int:
    """As many as fit the time of a benchmark, by one call that also warms it up."""
    measured.prepare()
    start = time.perf_counter()
    measured()
    seconds = time.perf_counter() - start
    return min(max(round(SECONDS_PER_BENCHMARK / seconds), FEWEST_ROUNDS), MOST_ROUNDS)
