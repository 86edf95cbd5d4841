"""Where the contract is asked: every backend that this machine can run, in each way that it can divide its work.

A setting names the backend, the dtypes, and how many rows it may be given in a test. On a machine with a GPU the settings of the
GPU come on top, marked ``gpu``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import clop_kernels
from clop_kernels import backends

from .. import host
from ..support import interpreter
from ..support.oracle import RUNNABLE, Problem, assert_accurate, assert_accurate_on_gpu, assert_as_good_as_plain, assert_exact

FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
HALF = (FLOAT16, BFLOAT16)
GPU = "cuda"


@dataclass(frozen=True)
class Setting:
    """A backend, and how it divides its work.

    Attributes:
        dtypes: tested in every group of cases; ``half`` only in the groups that SPARING names.
        groups: the groups of cases that it takes; None means all.
        rows: how many rows a problem has if its case does not say; enough for several tiles.
        most_rows, widths: the largest problem, and the widths of rows, that it takes.
        arrangement: what makes the backend work in this way.
    """

    name: str
    backend: str
    dtypes: tuple[torch.dtype, ...]
    half: tuple[torch.dtype, ...] = ()
    groups: tuple[str, ...] | None = None
    rows: int = 66
    most_rows: int = 400
    widths: range = range(1, 5000)
    device: str = "cpu"
    arrangement: dict[str, Any] = field(default_factory=dict, hash=False)

    def takes(self, group: str) -> bool:
        """Whether a group of cases is asked of it."""
        return self.groups is None or group in self.groups

    @property
    def obstacle(self) -> str | None:
        """Why it cannot run here."""
        if self.device == GPU:
            chosen = next(b for b in backends.BACKENDS if b.name == self.backend)
            return chosen.obstacle(torch.device(GPU), FLOAT32)
        if self.backend == "cuda":
            return host.obstacle()
        if self.backend == "triton":
            return interpreter.OBSTACLE
        return None if self.backend in RUNNABLE else "it is not built"

    @property
    def is_of_kernels(self) -> bool:
        """Whether the backend is one of those that launch kernels."""
        return self.backend in ("cuda", "triton")

    @property
    def is_as_shipped(self) -> bool:
        """Whether users get the backend in this arrangement."""
        return self.arrangement in ({}, {"tile_rows": None}, {"n_processors": 1})

    def check(self, problem: Problem, dtype: torch.dtype, record: Callable[[str, object], None], **known: Any) -> None:
        """Holds the loss and its gradients to the reference, as closely as the dtype allows (``known``: assert_accurate's)."""
        if self.device == GPU:
            assert_accurate_on_gpu(problem, self.backend, dtype, record, known.get("ill_conditioned", False))
        elif dtype == FLOAT64:
            assert_exact(problem, self.backend)
        elif dtype == FLOAT32:
            assert_accurate(problem, self.backend, **known)
        else:
            assert_as_good_as_plain(problem, self.backend, dtype, known.get("floor", 0.0))

    @contextmanager
    def arranged(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        """Makes the backend work in this way until the test ends."""
        if self.device == GPU:
            yield
        elif self.backend == "cuda":
            with host.as_backend(monkeypatch, **self.arrangement) as kernels:
                yield kernels
        elif self.backend == "triton":
            interpreter.keep_rows_apart(monkeypatch)
            interpreter.round_products_once(monkeypatch)
            if "is_wide" in self.arrangement:
                interpreter.shrink_tiles(monkeypatch, splits_columns=True, in_panel=32)
                interpreter.set_wide(monkeypatch, **self.arrangement)
            yield
        else:
            clop_kernels.set_tile_rows(self.arrangement["tile_rows"])
            yield
            clop_kernels.set_tile_rows(None)


def _tiles_of(backend: str) -> list[Setting]:
    """Tiles smaller than a test's matrices, so that every edge is met; larger than some; and the backend's own choice."""
    return [
        Setting(f"{backend}-tiles-of-7", backend, (FLOAT64,), arrangement={"tile_rows": 7}),
        Setting(f"{backend}-tiles-of-48", backend, (FLOAT32,), arrangement={"tile_rows": 48}),
        Setting(
            backend, backend, (FLOAT64, FLOAT32), HALF, ("shapes", "options", "forms", "two sides", "edges", "pairs"),
            arrangement={"tile_rows": None},
        ),
    ]  # fmt: skip


SETTINGS = (
    *_tiles_of("tiled"),
    *_tiles_of("cpu"),
    Setting("cuda-on-host", "cuda", (FLOAT32,), HALF, arrangement={"n_processors": 1}),
    Setting(
        "cuda-on-host-sharing-rows", "cuda", (FLOAT32,), (BFLOAT16,),
        ("shapes", "two sides", "long rows", "pairs"),
        arrangement={"n_processors": 1000},
    ),
    Setting(
        "cuda-on-host-in-panels", "cuda", (FLOAT32,), (FLOAT16,),
        ("shapes", "options", "forms", "two sides", "negatives", "prototypes", "duplicates", "edges", "pairs"), most_rows=150,
        widths=range(1, 41), arrangement={"in_panels": True},
    ),
    Setting("triton-interpreted", "triton", (FLOAT32,), (FLOAT16,), ("shapes", "two sides", "pairs"), most_rows=130),
    Setting(
        "triton-interpreted-small-tiles", "triton", (FLOAT32,), (),
        ("forms", "prototypes", "temperatures", "duplicates", "edges", "pairs"), 34, 70, range(1, 41),
        arrangement={"is_wide": False},
    ),
    # In small tiles a block of the wide rows' product takes 16 numbers of the width; wide rows must have more.
    Setting(
        "triton-interpreted-in-panels", "triton", (FLOAT32,), (),
        ("options", "forms", "negatives", "duplicates", "edges", "pairs"), 34, 70, range(17, 41),
        arrangement={"is_wide": True},
    ),
    *(Setting(f"{name}-on-gpu", name, (FLOAT32,), HALF, most_rows=10**6, device=GPU) for name in ("cuda", "triton")),
    Setting("tiled-on-gpu", "tiled", (FLOAT32,), (), ("shapes", "options", "forms", "edges"), most_rows=10**6, device=GPU),
)  # fmt: skip
