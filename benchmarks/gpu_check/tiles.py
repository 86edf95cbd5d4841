"""Which of Triton's tiles is fastest: the candidates, and how one is measured.

A kernel is launched alone, as :mod:`clop_kernels.backends.triton.launches` launches it in a loss, with its tile replaced. Its
result is held to that of the shipped tile, and its time is that of a CUDA graph of launches. The shipped tile is measured first
and last in each group: where the two differ, so did the machine, and no smaller difference counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch

from .. import measure
from ..problems import DTYPES

ROWS = (65536, 18432, 16384, 8192, 2048)
"""Numbers of rows that each candidate is timed at: full waves of blocks and not, and too few for all processors."""

MOST_LAUNCHES = 20
PAIRS_OF_A_GRAPH = 5e9
"""A graph has as many launches as make up so many pairs, a few milliseconds, at least one and at most MOST_LAUNCHES."""

OF_A_TILE = ("block_m", "block_n", "num_warps", "num_stages", "max_registers")
"""The columns of tiles.csv that say which tile it is."""

# Rows, columns, warps, stages, registers (None: the compiler's choice). All compile for sm_90 with Triton 3.6 without a spill.
# The last of each are for few rows.
CANDIDATES: dict[tuple[str, int], tuple[tuple[int, int, int, int, int | None], ...]] = {
    ("gradient", 128): (
        (128, 128, 8, 2, None), (128, 128, 8, 3, None), (128, 64, 8, 3, None), (128, 64, 8, 2, None), (64, 128, 4, 2, 255),
        (64, 128, 4, 3, 255), (64, 64, 4, 2, 255), (64, 64, 4, 3, 255), (128, 32, 8, 3, 128), (32, 64, 4, 2, 255),
        (32, 64, 4, 3, 255),
    ),
    ("gradient", 256): (
        (128, 64, 8, 2, None), (128, 64, 8, 3, None), (128, 64, 8, 4, None), (128, 32, 8, 3, None), (64, 64, 8, 2, None),
        (64, 64, 4, 2, 255), (64, 32, 4, 3, 255), (32, 32, 4, 2, 255),
    ),
    ("softmax", 128): (
        (128, 64, 8, 2, None), (128, 64, 8, 3, None), (128, 128, 8, 2, None), (128, 128, 8, 3, None), (128, 256, 8, 2, None),
        (256, 64, 8, 2, None), (256, 128, 8, 2, None), (64, 128, 4, 2, 255), (64, 128, 4, 3, 255), (64, 256, 4, 2, 255),
        (64, 64, 4, 2, 255), (64, 64, 4, 3, 255), (32, 64, 4, 2, 255), (32, 64, 4, 3, 255),
    ),
    ("softmax", 256): (
        (128, 64, 8, 2, None), (128, 64, 8, 3, None), (128, 128, 8, 2, None), (256, 64, 8, 2, None), (64, 128, 4, 2, 255),
        (64, 64, 4, 2, 255), (64, 64, 4, 3, 255), (32, 64, 4, 2, 255),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A kernel with a tile: an item of a worker. ``tile`` is one of :data:`CANDIDATES`, or None for the shipped one."""

    kernel: str
    D: int
    tile: tuple[int, int, int, int, int | None] | None
    dtype: str = "bfloat16"


def trials() -> Iterator[list[Trial]]:
    """The groups: trials of one kernel and width, which are compared."""
    for (kernel, width), candidates in CANDIDATES.items():
        yield [Trial(kernel, width, tile) for tile in (None, *candidates, None)]


def run(trial: Trial, n_rows: int, device: torch.device, time_it: bool) -> dict[str, Any]:
    """Launches the trial's kernel in a loss of ``n_rows`` rows; the figures of the journal.

    Raises:
        RuntimeError: if the kernel does not compile, or cannot be launched.
    """
    from clop_kernels.backends.triton import tiles

    shipped = getattr(tiles, trial.kernel)(trial.D, DTYPES[trial.dtype], tiles.target_of(device))
    chosen = shipped
    if trial.tile is not None:
        rows, columns, warps, stages, registers = trial.tile
        chosen = tiles.Tile(rows, columns, tiles.padded(trial.D), warps, stages, registers if device.type == "cuda" else None)
    launch, result = _launch(trial, chosen, n_rows, device)
    compiled = launch.run()
    first = result.clone()
    launch.run()
    is_same = torch.equal(first, result)
    expected_launch, expected = _launch(trial, shipped, n_rows, device)
    expected_launch.run()
    figures: dict[str, Any] = {
        "kernel": trial.kernel, "form": "plain", "dtype": trial.dtype, "D": trial.D, "N": n_rows, "is_shipped": chosen == shipped,
        **{name: asdict(chosen)[name] for name in OF_A_TILE},
        "error": float((result - expected).norm() / expected.norm()), "same_bits": is_same,
    }  # fmt: skip
    for name, attribute in (("registers", "n_regs"), ("spills", "n_spills")):
        figures[name] = getattr(compiled, attribute, None)
    metadata = getattr(compiled, "metadata", None)
    figures["shared_kb"] = None if metadata is None else round(metadata.shared / 1024, 1)
    if time_it:
        seconds = _seconds(launch.run, n_rows, device)
        flops = {"softmax": 2, "gradient": 4}[trial.kernel] * n_rows**2 * trial.D
        figures |= {"microseconds": round(1e6 * seconds, 2), "tflops": round(flops / seconds / 1e12, 1)}
    return figures


def _launch(trial: Trial, tile: Any, n_rows: int, device: torch.device) -> tuple[Any, torch.Tensor]:
    """The launch of the trial's kernel with a tile, and the tensor of its results: row sums, or the gradient's sums."""
    from clop_kernels.backends.contract import LossOptions, Residuals
    from clop_kernels.backends.positions import Upstream
    from clop_kernels.backends.triton import launches, tiles

    dtype = DTYPES[trial.dtype]
    options = LossOptions(2, "instance", 0.1, 0.0, "cosine", "mean", dtype)
    generator = torch.Generator(device).manual_seed(0)
    z = torch.randn(n_rows, trial.D, device=device, generator=generator).to(dtype)
    zhat = torch.nn.functional.normalize(z.float(), dim=1).to(dtype)

    def floats(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device)

    groups = torch.empty((3, 0), dtype=torch.int32, device=device)
    residuals = Residuals(
        zhat, floats(n_rows), floats(n_rows), floats(n_rows) + 1 / n_rows, floats(n_rows), groups, floats(2) + n_rows
    )
    target = tiles.target_of(device)
    with mock.patch.object(tiles, trial.kernel, return_value=tile):
        if trial.kernel == "softmax":
            scratch = launches.ForwardScratch.like(zhat, options, target)
            chosen = launches.forward(z, None, None, options, floats(), residuals, scratch, target)
            result = residuals.inverse_total
        else:
            of_backward = launches.BackwardScratch.like(zhat, options, target)
            upstream = Upstream(torch.ones((), device=device), None)
            chosen = launches.backward(upstream, residuals, None, None, options, of_backward, torch.empty_like(z), target)
            assert of_backward.sums is not None
            result = of_backward.sums
        return next(c for c in chosen if c.kernel.__name__ == f"{trial.kernel}_kernel"), result


def _seconds(run: Callable[[], object], n_rows: int, device: torch.device) -> float:
    """Of one launch: the median of several replays of a graph of launches."""
    n_launches = max(1, min(MOST_LAUNCHES, int(PAIRS_OF_A_GRAPH / n_rows**2))) if device.type == "cuda" else 1

    def launches() -> None:
        for _ in range(n_launches):
            run()

    replay = measure.captured(launches) if device.type == "cuda" else launches
    return statistics.median(measure.seconds_of(replay, device) for _ in range(5)) / n_launches
