"""How cost grows: groups rows into series over N or D, and fits a power law to each series."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .problems import Case
from .results import Row

FIT_FROM_N = 2048
"""Times are fitted from this N on: below it, calls and threads cost as much as the loss. Uses the GPU's own time if known."""

FIT_FROM_MB = 20.0
"""Memory is fitted from this size on: below it, buffers of fixed size and noise of a few MB matter as much."""

FEWEST_POINTS = 3

Axis = Literal["N", "D"]


@dataclass(frozen=True)
class PowerLaw:
    """cost = constant * N^exponent, by least squares of log cost against log N over ``sizes``."""

    exponent: float
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"N^{self.exponent:.2f}"

    @classmethod
    def fit(cls, costs: Iterable[tuple[int, float]]) -> PowerLaw | None:
        """Fits (N, cost) pairs. None if there are fewer than FEWEST_POINTS."""
        points = sorted(costs)
        if len(points) < FEWEST_POINTS:
            return None
        sizes = tuple(n for n, _ in points)
        slope = statistics.linear_regression([math.log(n) for n in sizes], [math.log(cost) for _, cost in points]).slope
        return cls(slope, sizes)


def time_law(rows: Iterable[Row]) -> PowerLaw | None:
    """Fits one provider's rows over N."""
    medians = [(row.case.N, row.graph_ms or row.quantile_ms(0.5)) for row in rows if row.case.N >= FIT_FROM_N]
    return PowerLaw.fit((n, ms) for n, ms in medians if ms is not None)


def memory_law(rows: Iterable[Row]) -> PowerLaw | None:
    """Fits one provider's rows over N."""
    peaks = [(row.case.N, row.peak_extra_mb) for row in rows]
    return PowerLaw.fit((n, mb) for n, mb in peaks if mb is not None and mb >= FIT_FROM_MB)


@dataclass(frozen=True)
class Series:
    """Rows that differ only in ``axis`` and provider. ``common`` is their case, with 0 on the axis."""

    axis: Axis
    common: Case
    rows: list[Row]

    def by_provider(self) -> dict[str, list[Row]]:
        """The rows of each provider, sorted along the axis."""
        found: dict[str, list[Row]] = defaultdict(list)
        for row in sorted(self.rows, key=lambda row: int(getattr(row.case, self.axis))):
            found[row.provider].append(row)
        return found


def series_over(axis: Axis, rows: Sequence[Row]) -> list[Series]:
    """All series in which some provider was timed at FEWEST_POINTS or more points."""
    groups: dict[Case, list[Row]] = defaultdict(list)
    for row in rows:
        groups[replace(row.case, N=0) if axis == "N" else replace(row.case, D=0)].append(row)
    found = [Series(axis, common, members) for common, members in groups.items()]
    return [s for s in found if any(sum(bool(r.seconds) for r in rs) >= FEWEST_POINTS for rs in s.by_provider().values())]


def representative(rows: Sequence[Row]) -> list[Case]:
    """Chooses one size for each problem, dtype and temperature, and returns a case for each mode measured there.

    It is the size with the most modes, then with the most providers, then the largest.
    """
    settings: dict[Case, dict[tuple[int, int], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.seconds:
            settings[replace(row.case, N=0, D=0, mode="forward+backward")][row.case.N, row.case.D].append(row)
    cases: list[Case] = []
    for sizes in settings.values():
        best = max(sizes.values(), key=lambda rs: (len({r.case.mode for r in rs}), len(rs), rs[0].case.N, rs[0].case.D))
        cases.extend(dict.fromkeys(row.case for row in best))
    return cases
