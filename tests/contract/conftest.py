"""Gives each test of the contract its settings and cases."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from . import cases
from .settings import FLOAT64, GPU, HALF, SETTINGS, Setting

SPARING = ("shapes", "forms", "two sides")
"""The groups that half precision is tested in."""


@cache
def _cases(group: str, n_rows: int, on_gpu: bool) -> cases.Cases:
    return (cases.GPU_GROUPS if on_gpu else cases.GROUPS)[group](n_rows)


@cache
def _reason(setting: Setting) -> str | None:
    return setting.obstacle


def _param(setting: Setting, *values: Any, name: str = "") -> Any:
    marks = [pytest.mark.gpu] if setting.device == GPU else []
    if setting.is_of_kernels:
        marks.append(pytest.mark.slow)
    if (why := _reason(setting)) is not None:
        marks.append(pytest.mark.skip(reason=f"{setting.name} cannot run here: {why}"))
    return pytest.param(setting, *values, id=f"{setting.name}{', ' * bool(name)}{name}", marks=marks)


def _settings() -> list[Setting]:
    """The settings; without those of a GPU if there is none."""
    return [setting for setting in SETTINGS if setting.device != GPU or torch.cuda.is_available()]


def _of_cases(setting: Setting) -> Iterator[Any]:
    for group in filter(setting.takes, cases.GROUPS):
        dtypes = setting.dtypes + (setting.half if group in SPARING else ())
        for name, case in _cases(group, setting.rows, setting.device == GPU).items():
            if case.n_rows <= setting.most_rows and case.width in setting.widths:
                for dtype in dtypes:
                    if dtype not in HALF or case.suits_half_precision:
                        yield _param(setting, dtype, case, name=f"{group}, {name}, {str(dtype)[6:]}")


def _of_edges(setting: Setting) -> Iterator[Any]:
    for dtype in setting.dtypes if setting.takes("edges") else ():
        for edge in cases.EDGES:
            yield _param(setting, dtype, edge, name=f"{', '.join(edge)}, {str(dtype)[6:]}")


def _of_pairs(setting: Setting) -> Iterator[Any]:
    """Each shape with two of the four PASSES, alternately."""
    for at, shape in enumerate(cases.GPU_PAIRS if setting.device == GPU else cases.PAIRS):
        if setting.takes("pairs") and shape[0] <= setting.most_rows and shape[2] in setting.widths:
            for dtype in (*setting.dtypes, *setting.half):
                for passes in cases.PASSES[(at + (dtype == FLOAT64)) % 2 :: 2]:
                    yield _param(setting, dtype, shape, passes, name=f"{shape}, {passes}, {str(dtype)[6:]}")


TABLES = {"case": _of_cases, "edge": _of_edges, "pairs": _of_pairs}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test for every setting, and where it takes a ``case``, ``edge`` or ``pairs``, for each that the setting takes.

    The mark ``takes`` keeps those that take rows of its ``width`` (by default 4) and its ``dtype``; with ``kernels``, those that
    launch kernels; with ``as_shipped``, those that divide their work as users get it.
    """
    names = metafunc.fixturenames
    if "setting" not in names:
        return
    for table, of_setting in TABLES.items():
        if table in names:
            found = [param for setting in _settings() for param in of_setting(setting)]
            passes = ("passes",) if table == "pairs" else ()
            metafunc.parametrize(("setting", "dtype", table, *passes), found, indirect=["setting"])
            return
    mark = metafunc.definition.get_closest_marker("takes")
    wanted: dict[str, Any] = {"width": 4, "dtype": torch.float32, "kernels": False, "as_shipped": False} | (
        dict(mark.kwargs) if mark else {}
    )
    found = [
        _param(setting)
        for setting in _settings()
        if wanted["width"] in setting.widths
        and (setting.is_of_kernels or not wanted["kernels"])
        and (setting.is_as_shipped or not wanted["as_shipped"])
        and wanted["dtype"] in (*setting.dtypes, *setting.half, torch.float32)
    ]
    metafunc.parametrize("setting", found, indirect=True)


@pytest.fixture
def setting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    """A backend, arranged as the setting says."""
    with request.param.arranged(monkeypatch):
        yield request.param
