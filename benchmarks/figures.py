"""The figures of a report. Each is drawn from rows, for readers who do not know the project."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # draws to files, since there may be no screen

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .problems import MODES, Case, Mode
from .providers import label
from .results import Row, default_of, is_too_large, memory_ratio, number, ratio
from .scaling import FIT_FROM_MB, FIT_FROM_N, PowerLaw, Series, memory_law, representative, series_over, time_law

DPI = 150
STYLES = {
    "eager": ("#000000", "o"),
    "compile": ("#E69F00", "s"),
    "metric-learning": ("#CC79A7", "^"),
    "lightly": ("#009E73", "v"),
    "siglip-kernel": ("#F0E442", "<"),
    "cuda": ("#0072B2", "D"),
    "cpu": ("#0072B2", "D"),
    "triton": ("#D55E00", "P"),
    "tiled": ("#56B4E9", "X"),
}
"""Colours of Okabe and Ito, which colour-blind readers can tell apart. cpu and cuda share a colour: they never share a device."""

OURS, OTHERS = STYLES["cpu"][0], "#A6A6A6"
"""Colours of the picture for the README, which makes one point."""

LOSSES = {"ntxent": "NT-Xent", "supcon": "SupCon", "clip": "CLIP's loss", "sigmoid": "SigLIP's loss"}
SHADES = {"forward": 0.35, "backward": 0.65, "forward+backward": 1.0}


@dataclass(frozen=True)
class Picture:
    """A figure's file, its title, and a caption that says what to look for."""

    name: str
    title: str
    caption: str


def draw_all(rows: Sequence[Row], folder: Path) -> list[Picture]:
    """Draws every figure that the rows have data for."""
    by_settings: dict[tuple[str, str, float], list[Case]] = {}
    for case in representative(rows):
        by_settings.setdefault((case.problem, case.dtype, case.temperature), []).append(case)
    training = _case_of_training(rows)
    pictures = [_draw_overview(rows, training, folder)] if training is not None else []
    pictures += [_draw_bars(rows, cases, folder) for cases in by_settings.values()]
    for series in series_over("N", rows):
        pictures += [_draw_time(series, folder), _draw_memory(series, folder)]
    pictures += [_draw_width(series, folder) for series in series_over("D", rows)]
    pictures += [_draw_rate(series, folder) for axis in ("N", "D") for series in series_over(axis, rows)]
    return pictures


# ---- one figure each -------------------------------------------------------------------------------------------------


def _case_of_training(rows: Sequence[Row]) -> Case | None:
    """The first case of forward + backward, which is what training costs, on which others can be compared with the default."""
    for case in representative(rows):
        if case.mode == Case.mode and any(ratio(row, default_of(rows, case)) for row in _others(rows, case)):
            return case
    return None


def _others(rows: Sequence[Row], case: Case) -> list[Row]:
    return [row for row in rows if row.case == case and not label(row.provider).startswith("clop_kernels")]


def _draw_overview(rows: Sequence[Row], case: Case, folder: Path) -> Picture:
    """The picture for the README: each implementation's cost on one case, as a multiple of the default's."""
    default = default_of(rows, case)
    assert default is not None
    shown = [default, *sorted(_others(rows, case), key=lambda row: ratio(row, default) or 0.0)]
    shown = [row for row in shown if ratio(row, default) is not None]
    names = ["clop_kernels", *(label(row.provider) for row in shown[1:])]
    colours = [OURS, *[OTHERS] * len(shown[1:])]
    where = {"cpu": "a CPU", "cuda": "a GPU"}[default.environment.device_type]
    title = f"{LOSSES.get(case.problem, case.problem)} {_spelled(case.mode)} on {where}: multiples of clop_kernels' cost"
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06)
    figure, panels = plt.subplots(1, 2, figsize=(9, 1.4 + 0.44 * len(shown)), layout=layout, sharey=True)
    figure.suptitle(title, fontsize=14.5, fontweight="bold")
    figure.supxlabel(f"{_settings(case)}\n{default.environment}", fontsize=9.5, color="0.35")
    costs = (
        (panels[0], "Time", ratio, f"{number(default.quantile_ms(0.5), 0)} ms"),
        (panels[1], "Extra memory", memory_ratio, f"{number(default.peak_extra_mb, 0)} MB"),
    )
    for axes, what, multiple, cost in costs:
        values = [multiple(row, default) or 0.0 for row in shown]
        axes.barh(names, values, 0.72, color=colours)
        axes.text(values[0], 0, f" 1x = {cost}", va="center", fontsize=13, fontweight="bold", color=OURS)
        for y, value in enumerate(values[1:], start=1):
            axes.text(value, y, f" {value:.1f}x" if value < 99.5 else f" {value:,.0f}x", va="center", fontsize=13)
        axes.set_title(f"{what} (shorter is better)", fontsize=13, loc="left")
        axes.set_xticks([])
        axes.margins(x=0.2)
        axes.tick_params(axis="y", length=0, labelsize=13)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    panels[0].invert_yaxis()
    panels[0].get_yticklabels()[0].set(fontweight="bold", color=OURS)
    caption = (
        "Medians over rounds of the ratio within a round. Extra memory: the peak during a call above what was in use before."
    )
    return _save(figure, folder, "readme", title, caption, dpi=200)


def _draw_time(series: Series, folder: Path) -> Picture:
    title = f"{_loss(series.common)}: time of one call by number of rows"
    figure, axes = _canvas(title, _settings(series.common), series.rows)
    _draw_lines(axes, series, lambda row: row.quantile_ms(0.5), time_law, spread=True)
    _log_axes(axes, series, "time of a call, ms")
    caption = (
        f"Medians; the bars are quartiles. ∝ N^x is a fit over the sizes from N = {FIT_FROM_N} on. Every implementation does "
        "O(N²) work, so the slopes are similar. The vertical distance between two lines is the speedup."
    )
    return _save(figure, folder, f"time-{_slug(series)}", title, caption)


def _draw_memory(series: Series, folder: Path) -> Picture:
    title = f"{_loss(series.common)}: extra memory of one call by number of rows"
    figure, axes = _canvas(title, _settings(series.common), series.rows)
    _draw_lines(axes, series, lambda row: row.peak_extra_mb, memory_law, predicted=True)
    _log_axes(axes, series, "peak above the inputs, MB")
    caption = (
        f"The peak during the call, above what was in use before. ∝ N^x is a fit over the sizes with {FIT_FROM_MB:g} MB or more. "
        "Hollow markers on dotted lines are predictions: those cases were not run, because they would not fit into memory. "
        "Implementations with N x N arrays grow with N²; clop_kernels grows with N."
    )
    return _save(figure, folder, f"memory-{_slug(series)}", title, caption)


def _draw_width(series: Series, folder: Path) -> Picture:
    default = next((label(row.provider) for row in series.rows if row.is_default), "the default")
    title = f"{_loss(series.common)}: time relative to {default} (= 1), by width"
    figure, axes = _canvas(title, _settings(series.common), series.rows)
    _draw_lines(axes, series, lambda row: ratio(row, default_of(series.rows, row.case)))
    _log_axes(axes, series, f"time / time of {default}")
    caption = "Wider rows spend more of their time in the matrix product, which all implementations share, so the ratios shrink."
    return _save(figure, folder, f"width-{_slug(series)}", title, caption)


def _draw_rate(series: Series, folder: Path) -> Picture:
    title = f"{_loss(series.common)}: speed as a share of a matrix product's speed"
    figure, axes = _canvas(title, _settings(series.common), series.rows)
    _draw_lines(axes, series, Row.share_of_matrix_rate)
    _log_axes(axes, series, "speed / speed of torch's matrix product", linear=True)
    axes.axhline(1, color="0.6", linewidth=1, linestyle="--", zorder=0)
    axes.set_ylim(bottom=0)
    caption = (
        "The operations of the textbook's formula (6 N² D, forward and backward) per second of the call, divided by the speed "
        "of torch's matrix product in the same run. Above the dashed line at 1, using the symmetry of the matrix saves more than "
        "the rest of the loss costs."
    )
    return _save(figure, folder, f"rate-{_slug(series)}", title, caption)


def _draw_bars(rows: Sequence[Row], cases: Sequence[Case], folder: Path) -> Picture:
    """Time and memory of every provider as multiples of the default's. One bar per mode; the slowest provider is on top."""
    measured = [row for row in rows if row.case in cases and row.seconds]
    modes = [mode for mode in MODES if any(row.case.mode == mode for row in measured)]
    last = {row.provider: row.quantile_ms(0.5) or 0.0 for row in measured if row.case.mode == modes[-1]}
    names = sorted(last, key=lambda name: last[name])
    default = next((label(row.provider) for row in measured if row.is_default), "the default")
    title = f"{LOSSES.get(cases[0].problem, cases[0].problem)}: time and memory relative to {default} (= 1)"
    figure, panels = _canvas(title, _settings(cases[0]), measured, n_panels=2, height=1.8 + 0.55 * len(names))
    for axes, what, multiple in ((panels[0], "time", ratio), (panels[1], "peak extra memory", memory_ratio)):
        bars = {(row.provider, row.case.mode): multiple(row, default_of(measured, row.case)) for row in measured}
        shown = [mode for mode in modes if any(bars.get((name, mode)) is not None for name in names)]
        height = 0.8 / max(len(shown), 1)
        for (name, mode), value in bars.items():
            if value is not None and name in names:
                y = names.index(name) - (shown.index(mode) - (len(shown) - 1) / 2) * height
                axes.barh(y, value, height * 0.92, color=_style(name)[0], alpha=SHADES[mode])
                axes.text(value, y, f" {value:.1f}" if value < 9.95 else f" {value:,.0f}", va="center", fontsize=9)
        axes.set_yticks(range(len(names)), [label(name) for name in names] if axes is panels[0] else [""] * len(names))
        axes.set_xlabel(f"{what} (shorter is better)")
        axes.margins(x=0.16)
        axes.spines[["top", "right"]].set_visible(False)
    if len(modes) > 1:
        handles = [Patch(color="black", alpha=SHADES[mode], label=_spelled(mode)) for mode in modes]
        panels[0].legend(handles=handles, frameon=False, fontsize=9, loc="lower right")
    caption = "Medians over rounds of the ratio within a round. 1 is the default backend."
    return _save(figure, folder, f"ratios-{cases[0].problem}-{cases[0].dtype}{_temperature(cases[0])}", title, caption)


# ---- what they share -------------------------------------------------------------------------------------------------


def _canvas(title: str, subtitle: str, rows: Sequence[Row], n_panels: int = 1, height: float = 4.8) -> tuple[Figure, Any]:
    """A figure whose title says what it shows, and whose foot says where and when it was measured."""
    figure, axes = plt.subplots(1, n_panels, figsize=(9, height), layout="constrained")
    figure.suptitle(f"{title}\n{subtitle}", fontsize=12)
    where = "\n".join(dict.fromkeys(str(row.environment) for row in rows))
    figure.supxlabel(where, fontsize=8, color="0.35")
    return figure, axes


def _draw_lines(
    axes: Axes,
    series: Series,
    cost: Callable[[Row], float | None],
    law: Callable[[list[Row]], PowerLaw | None] | None = None,
    spread: bool = False,
    predicted: bool = False,
) -> None:
    """Draws a line per provider. The legend lists them in the order of their values at the last point that all have."""
    lines = []
    for name, rows in series.by_provider().items():
        colour, marker = _style(name)
        points = {_place(row, series): value for row in rows if (value := cost(row)) is not None}
        if not points:
            continue
        text = label(name)
        unrun = {_place(row, series): row.predicted_mb for row in rows if is_too_large(row)}
        if law is not None:
            fitted = law(rows)
            text += f"  ∝ N$^{{{fitted.exponent:.2f}}}$" if fitted is not None else ""
            text += f"\n{series.axis} = {max(unrun)} would need {unrun[max(unrun)] / 1e3:,.0f} GB" if unrun else ""
        (line,) = axes.plot(list(points), list(points.values()), color=colour, marker=marker, markersize=5, label=text)
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
    axes.set_xlabel({"N": "N, number of rows", "D": "D, width of a row"}[series.axis])
    axes.set_ylabel(y_label)
    if not linear:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 1000 else (1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(plain)
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, folder: Path, name: str, title: str, caption: str, dpi: int = DPI) -> Picture:
    figure.savefig(folder / f"{name}.png", dpi=dpi)
    plt.close(figure)
    return Picture(f"{name}.png", title, caption)


def _style(provider: str) -> tuple[str, str]:
    """Colour and marker."""
    return STYLES.get(provider, ("0.5", "o"))


def _loss(case: Case) -> str:
    return f"{LOSSES.get(case.problem, case.problem)}, {_spelled(case.mode)}"


def _spelled(mode: Mode) -> str:
    return mode.replace("+", " + ")


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
