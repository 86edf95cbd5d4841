"""What ``tiled`` and ``cpu`` alone have: float64's digits, the choice of tiles, the softmax's switch, torch's TF32 switches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import clop_kernels
from clop_kernels.backends import positions, tiled
from clop_kernels.backends.contract import LossOptions

from ..support.oracle import random_problem


def test_a_single_positive_keeps_its_relative_accuracy(backend: str) -> None:
    """Loss log(1 + e^-x) with x = 60: float64's log-sum-exp has nothing left of it, the sums of the backends do."""
    angle = math.acos(1 - 0.6)  # cosine 0.4, against 1 for the positives: 0.6 / tau = 60 for tau = 0.01
    a = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    loss = clop_kernels.ntxent_loss(torch.cat([a, a]), temperature=0.01, backend=backend)
    torch.testing.assert_close(loss, torch.tensor(2 * math.exp(-60.0), dtype=torch.float64), rtol=1e-10, atol=0.0)


def test_unit_rows_have_the_same_loss_and_the_whole_gradient(backend: str) -> None:
    problem = random_problem(2, 35, 64)
    unit = torch.nn.functional.normalize(problem.embeddings, dim=1)
    both = {n: replace(problem, embeddings=unit).with_options(normalize=n).solve(backend, torch.float64) for n in (True, False)}
    torch.testing.assert_close(both[True]["loss"], both[False]["loss"])
    whole = both[False]["embeddings"]
    radial = (unit * whole).sum(1, keepdim=True) * unit
    assert radial.norm() > 0.1 * whole.norm()
    torch.testing.assert_close(whole - radial, both[True]["embeddings"])


def fits_unshifted(temperature: float, dtype: torch.dtype, norms: Tensor | None = None) -> bool:
    options = LossOptions(temperature, n_views=2, compute_dtype=dtype, normalize=norms is None)
    return tiled.fits_unshifted(torch.full((3,), 1e9, dtype=dtype) if norms is None else norms.to(dtype), options)


def test_where_the_softmax_switches_paths() -> None:
    for temperature, dtype, expected in (
        (1 / 59.9, torch.float32, True),
        (1 / 60.1, torch.float32, False),
        (1 / 599, torch.float64, True),
        (1 / 601, torch.float64, False),
    ):
        assert fits_unshifted(temperature, dtype) == expected
        assert fits_unshifted(100 * temperature, dtype, torch.tensor([0.0, 10.0, 1.0])) == expected  # rows of length 10
    assert not fits_unshifted(1.0, torch.float32, torch.tensor([1.0, math.nan]))


def test_tiles_are_chosen_and_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert tiled.tile_rows(100, torch.float32, cpu) == 100
    assert tiled.tile_rows(10**6, torch.float32, cpu) == 576
    assert tiled.tile_rows(0, torch.float32, cpu) == 1
    clop_kernels.set_tile_rows(3)
    try:
        assert tiled.tile_rows(100, torch.float32, cpu) == 3
    finally:
        clop_kernels.set_tile_rows(None)
    monkeypatch.setenv("CLOP_TILE_ROWS", "77")
    assert tiled._rows_of_environment() == 77
    monkeypatch.setenv("CLOP_TILE_ROWS", "many")
    with pytest.raises(ValueError, match="CLOP_TILE_ROWS='many' in the environment: expected an integer"):
        tiled._rows_of_environment()
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=r"rows=.*expected an int of at least 1"):
            clop_kernels.set_tile_rows(bad)  # type: ignore[arg-type]


SWITCHES: dict[str, Callable[[Any], None]] = {
    "old": torch.set_float32_matmul_precision,
    "allow_tf32": lambda value: setattr(torch.backends.cuda.matmul, "allow_tf32", value),
    "matmul": lambda value: setattr(torch.backends.cuda.matmul, "fp32_precision", value),
    "all": lambda value: setattr(torch.backends, "fp32_precision", value),
}


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ([], False),
        ([("old", "high")], True),
        ([("old", "medium")], True),
        ([("allow_tf32", True)], True),
        ([("matmul", "tf32")], True),
        ([("matmul", "none"), ("all", "tf32")], True),
        ([("old", "high"), ("matmul", "ieee")], False),
        ([("all", "tf32"), ("matmul", "ieee")], False),
        ([("all", "ieee"), ("old", "high")], True),
        ([("matmul", "tf32"), ("old", "highest")], False),
    ],
    ids=str,
)
def test_tf32_is_allowed_where_torch_allows_it(switches: list[tuple[str, Any]], expected: bool) -> None:
    try:
        for name, value in switches:
            SWITCHES[name](value)
        assert positions.allows_tf32() == expected
    finally:
        SWITCHES["old"]("highest")
        SWITCHES["matmul"]("none")
        SWITCHES["all"]("none")
