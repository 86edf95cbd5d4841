"""The figures of a report, each drawn from rows, for readers who have not seen the project."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # to files: there may be no screen

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .problems import MODES, Case
from .providers import PROVIDERS
from .results import Row, default_of, is_too_large, memory_ratio, ratio
from .scaling import FIT_FROM_MB, FIT_FROM_N, PowerLaw, Series, memory_law, representative, series_over, time_law

DPI = 150
STYLES = {
    "eager": ("#000000", "o"),
    "compile": ("#E69F00", "s"),
    "metric-learning": ("#CC79A7", "^"),
    "lightly": ("#009E73", "v"),
    "cuda": ("#0072B2", "D"),
    "cpu": ("#0072B2", "D"),
    "triton": ("#D55E00", "P"),
    "tiled": ("#56B4E9", "X"),
}
"""Colours of Okabe and Ito, which the colour-blind can tell apart; cpu and cuda are never on one device."""

LOSSES = {"ntxent": "NT-Xent", "supcon": "SupCon"}
SHADES = {"forward": 0.35, "backward": 0.65, "forward+backward": 1.0}


@dataclass(frozen=True)
class Picture:
    """A figure's file, what it shows in words, and what to look for."""

    name: str
    title: str
    caption: str


def draw_all(rows: Sequence[Row], folder: Path) -> list[Picture]:
    """Every figure that the rows have data for."""
    by_settings: dict[tuple[str, str, float], list[Case]] = {}
    for case in representative(rows):
        by_settings.setdefault((case.problem, case.dtype, case.temperature), []).append(case)
    pictures = [_draw_bars(rows, cases, folder) for cases in by_settings.values()]
    for series in series_over("N", rows):
        pictures += [_draw_time(series, folder), _draw_memory(series, folder)]
    pictures += [_draw_width(series, folder) for series in series_over("D", rows)]
    pictures += [_draw_rate(series, folder) for axis in ("N", "D") for series in series_over(axis, rows)]
    return pictures


# ---- one figure each -------------------------------------------------------------------------------------------------


def _draw_time(series: Series, folder: Path) -> Picture:
    title = f"{_loss(series.common)}: time of one call against the number of rows"
    figure, axes = _canvas(title, _settings(series.common), series.rows)
    _draw_lines(axes, series, lambda row: row.quantile_ms(0.5), time_law, spread=True)
    _log_axes(axes, series, "time of a call, ms")
    caption = (
        f"Medians, with the quartiles as a bar. ∝ N^x: least squares over the sizes from N = {FIT_FROM_N} on. Every one does "
        "work in N², so the lines are parallel; the distance between them is what a user gains."
    )
    return _save(figure, folder, f"time-{_slug(series)}", title, caption)


def _draw_memory(series: Series, folder: Path) -> Picture:
    title = f"{_loss(series.common)}: extra memory of one call against the number of rows"
    figure, axes = _canvas(title, _settings(series.common), series.rows)
    _draw_lines(axes, series, lambda row: row.peak_extra_mb, memory_law, predicted=True)
    _log_axes(axes, series, "peak above the inputs, MB")
    caption = (
        f"The peak while the call runs, above what was in use before. ∝ N^x: least squares over the sizes with {FIT_FROM_MB:g} "
        "MB or more. Hollow, dotted: not run, since the predicted memory would not fit. What holds N x N arrays grows with "
        "N²; clop_kernels grows with N."
    )
    return _save(figure, folder, f"memory-{_slug(series)}", title, caption)


def _draw_width(series: Series, folder: Path) -> Picture:
    title = f"{_loss(series.common)}: time against that of clop_kernels, by width"
    figure, axes = _canvas(title, _settings(series.common), series.rows)
    _draw_lines(axes, series, lambda row: ratio(row, default_of(series.rows, row.case)))
    _log_axes(axes, series, "times the time of the default")
    caption = "The wider the rows, the more of the time is the matrix product, which all have in common."
    return _save(figure, folder, f"width-{_slug(series)}", title, caption)


def _draw_rate(series: Series, folder: Path) -> Picture:
    title = f"{_loss(series.common)}: share of the rate of a matrix product"
    figure, axes = _canvas(title, _settings(series.common), series.rows)
    _draw_lines(axes, series, Row.share_of_matrix_rate)
    _log_axes(axes, series, "share", linear=True)
    axes.axhline(1, color="0.6", linewidth=1, linestyle="--", zorder=0)
    axes.set_ylim(bottom=0)
    caption = (
        "The textbook's products (6 N² D operations forward and backward) in the time of the call, against the rate of torch's "
        "matrix product in the same run, the dashed line. Above it, symmetry of the matrix has saved more than all else costs."
    )
    return _save(figure, folder, f"rate-{_slug(series)}", title, caption)


def _draw_bars(rows: Sequence[Row], cases: Sequence[Case], folder: Path) -> Picture:
    """Times and memory of every provider over those of the default: a bar a mode."""
    case = cases[0]
    of_cases = [row for row in rows if row.case in cases and row.seconds]
    names = list(dict.fromkeys(row.provider for row in of_cases))
    default = next((PROVIDERS[row.provider].summary for row in of_cases if row.is_default), "the default")
    title = f"{LOSSES.get(case.problem, case.problem)}: how many times more than {default}"
    figure, panels = _canvas(title, f"N = {case.N}, {_settings(case)}", of_cases, n_panels=2, height=1.8 + 0.55 * len(names))
    quantities: tuple[tuple[str, Callable[[Row, Row | None], float | None], Sequence[str]], ...] = (
        ("time", ratio, MODES),
        # The extra memory of a backward pass alone leaves out what the forward pass holds for it.
        ("peak extra memory", memory_ratio, ("forward", "forward+backward")),
    )
    for axes, (what, compare, modes) in zip(panels, quantities, strict=True):
        shown = [mode for mode in modes if any(row.case.mode == mode for row in of_cases)]
        for row in of_cases:
            value = compare(row, default_of(of_cases, row.case))
            if value is None or row.case.mode not in shown:
                continue
            height = 0.8 / len(shown)
            y = names.index(row.provider) + (shown.index(row.case.mode) - (len(shown) - 1) / 2) * height
            colour = STYLES.get(row.provider, ("0.5", "o"))[0]
            axes.barh(y, value, height * 0.92, color=colour, alpha=SHADES[row.case.mode])
            axes.text(value, y, f" {value:.1f}" if value < 9.95 else f" {value:,.0f}", va="center", fontsize=9)
        axes.set_yticks(range(len(names)), [_label(name) for name in names] if axes is panels[0] else [""] * len(names))
        axes.invert_yaxis()
        axes.set_xlabel(f"{what}, times that of {default}")
        axes.margins(x=0.16)
        axes.spines[["top", "right"]].set_visible(False)
    measured = [mode for mode in MODES if any(row.case.mode == mode for row in of_cases)]
    if len(measured) > 1:
        handles = [Patch(color="black", alpha=SHADES[mode], label=mode) for mode in measured]
        panels[0].legend(handles=handles, frameon=False, fontsize=9, loc="lower right")
    caption = "Medians over rounds of the ratio within a round; a shorter bar is better, and 1 is the backend that a user gets."
    return _save(figure, folder, f"ratios-{case.problem}-{case.dtype}{_temperature(case)}", title, caption)


# ---- what they share -------------------------------------------------------------------------------------------------


def _canvas(title: str, subtitle: str, rows: Sequence[Row], n_panels: int = 1, height: float = 4.8) -> tuple[Figure, Any]:
    """A figure with a title that says what it shows, and at the foot where and when it was measured."""
    figure, axes = plt.subplots(1, n_panels, figsize=(9, height), layout="constrained")
    figure.suptitle(f"{title}\n{subtitle}", fontsize=12)
    where = "\n".join(dict.fromkeys(str(row.environment) for row in rows))
    figure.supxlabel(where, fontsize=8, color="0.35")
    return figure, axes


def _draw_lines(
    axes: Axes,
    series: Series,
    cost: Callable[[Row], float | None],
    law: Callable[[list[Row]], PowerLaw | None] = lambda rows: None,
    spread: bool = False,
    predicted: bool = False,
) -> None:
    """A line a provider; the legend has them in the order in which they lie at the last place that all reach."""
    lines = []
    for name, rows in series.by_provider().items():
        colour, marker = STYLES.get(name, ("0.5", "o"))
        points = {_place(row, series): value for row in rows if (value := cost(row)) is not None}
        if not points:
            continue
        label, fitted = _label(name), law(rows)
        if fitted is not None:
            label += f"  ∝ N$^{{{fitted.exponent:.2f}}}$"
        unrun = {_place(row, series): row.predicted_mb for row in rows if is_too_large(row)}
        if unrun:
            label += f"\n{series.axis} = {max(unrun)} would need {unrun[max(unrun)] / 1e3:,.0f} GB"
        (line,) = axes.plot(list(points), list(points.values()), color=colour, marker=marker, markersize=5, label=label)
        lines.append((points, line))
        if spread:
            timed = [row for row in rows if row.seconds]
            low, high = ([row.quantile_ms(share) or 0.0 for row in timed] for share in (0.25, 0.75))
            axes.vlines([_place(row, series) for row in timed], low, high, color=colour, linewidth=4, alpha=0.4)
        if predicted and unrun:
            axes.plot([max(points), *unrun], [points[max(points)], *unrun.values()], color=colour, linestyle=":", linewidth=1)
            axes.plot(list(unrun), list(unrun.values()), color=colour, marker=marker, fillstyle="none", linestyle="")
    common = set.intersection(*(set(points) for points, _ in lines)) if lines else set()
    lines.sort(key=lambda entry: -entry[0][max(common or entry[0])])
    axes.legend(handles=[line for _, line in lines], frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))


def _place(row: Row, series: Series) -> int:
    return row.case.N if series.axis == "N" else row.case.D


def _log_axes(axes: Axes, series: Series, y_label: str, linear: bool = False) -> None:
    ticks = sorted({_place(row, series) for row in series.rows})
    plain = FuncFormatter(lambda value, position: f"{value:,g}")
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel({"N": "N, rows of all views", "D": "D, width of a row"}[series.axis])
    axes.set_ylabel(y_label)
    if not linear:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(plain)
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, folder: Path, name: str, title: str, caption: str) -> Picture:
    figure.savefig(folder / f"{name}.png", dpi=DPI)
    plt.close(figure)
    return Picture(f"{name}.png", title, caption)


def _label(provider: str) -> str:
    return PROVIDERS[provider].summary if provider in PROVIDERS else provider


def _loss(case: Case) -> str:
    return f"{LOSSES.get(case.problem, case.problem)}, {case.mode.replace('+', ' + ')}"


def _settings(case: Case) -> str:
    sizes = (f"{name} = {size}" for name, size in (("N", case.N), ("D", case.D)) if size)
    return ", ".join((*sizes, case.dtype, f"temperature {case.temperature:g}"))


def _slug(series: Series) -> str:
    case = series.common
    size = f"D{case.D}" if series.axis == "N" else f"N{case.N}"
    mode = "" if case.mode == Case.mode else f"-{case.mode}"
    return f"{case.problem}-{case.dtype}-{size}{mode}{_temperature(case)}"


def _temperature(case: Case) -> str:
    return "" if case.temperature == Case.temperature else f"-tau{case.temperature:g}"
