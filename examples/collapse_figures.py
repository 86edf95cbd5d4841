"""Tables and figures of the results of examples/collapse.py. Each number has its spread over seeds.

Methods and changes keep the order of the CSV file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.table import Table

ENCODERS = {"as is": "without BatchNorm", "BatchNorm": "with BatchNorm"}
"""The changes that all methods were run with, which are two kinds of encoder."""
COLORS = ("#000000", "#56B4E9", "#0072B2", "#E69F00", "#D55E00")
"""Colours of the methods, by Okabe and Ito, which colour-blind readers can tell apart."""
MARKERS = "sv^oD"
WIDTH, DPI = 9, 150
"""Of a figure, in inches: narrow enough to be readable in the column of a page."""


@dataclass(frozen=True)
class Metric:
    name: str
    digits: int
    most: float | None = None
    """The end of its axis. None fits the axis to the data."""
    scale: float = 1

    def cell(self, values: pd.Series) -> str:
        """Mean and standard deviation over seeds. Diverged seeds are counted, but not in mean and deviation."""
        known = values.dropna() * self.scale
        diverged = f" ({len(values) - len(known)} diverged)" if len(known) < len(values) else ""
        if known.empty:
            return diverged.strip()
        spread = f" ± {known.std():.{self.digits}f}" if len(known) > 1 else ""
        return f"{known.mean():.{self.digits}f}{spread}{diverged}"


METRICS = {
    "effective_rank": Metric("effective rank", 1),
    "mean_cosine": Metric("mean pairwise cosine", 2, 1.02),
    "knn_accuracy": Metric("kNN accuracy, %", 1, 100, 100),
    "linear_accuracy": Metric("linear accuracy, %", 1, 100, 100),
    "nearest_prototype_accuracy": Metric("nearest-prototype accuracy, %", 1, 100, 100),
}
OF_PROTOTYPES = "nearest_prototype_accuracy"
MAIN = ("effective_rank", "linear_accuracy")


@dataclass(frozen=True)
class Numbers:
    """A table, whose ``cells`` have named rows and columns. All tables are written; the main ones are also printed."""

    title: str
    corner: str
    cells: pd.DataFrame
    is_main: bool = False

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        table.add_column(self.corner)
        for name in self.cells.columns:
            table.add_column(str(name), justify="right")
        for name, row in self.cells.iterrows():
            table.add_row(str(name), *row)
        return table

    def markdown(self) -> str:
        columns = "".join(f" {name} |" for name in self.cells.columns)
        lines = [f"| {name} |" + "".join(f" {cell} |" for cell in row) for name, row in self.cells.iterrows()]
        rule = "|---|" + "--:|" * len(self.cells.columns)
        return "\n".join([f"**{self.title}**", "", f"| {self.corner} |{columns}", rule, *lines])


def spread(frame: pd.DataFrame, rows: str, columns: str, metric: str) -> pd.DataFrame:
    """One cell per row and column, which summarises its runs over all seeds."""
    cells = frame.groupby([rows, columns])[metric].agg(METRICS[metric].cell).unstack(columns).fillna("")
    return cells.reindex(frame[rows].unique()).rename(columns="{:g}".format)


def middle(values: pd.Series, wanted: float) -> float:
    """``wanted`` if it was run, otherwise the middle one of the values."""
    known = sorted(values.unique())
    return wanted if wanted in known else known[len(known) // 2]


def parts(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The untrained encoders, the grid of all methods, and the runs with changes, which have one batch size."""
    trained = frame[frame.learning_rate > 0]
    grid = trained[trained.change.isin(ENCODERS)]
    changed_batch = trained[~trained.change.isin(ENCODERS)][["method", "batch_size"]].drop_duplicates()
    changed = trained.merge(changed_batch, on=["method", "batch_size"])
    return frame[frame.learning_rate == 0], grid, changed


def tables(frame: pd.DataFrame) -> list[Numbers]:
    """Cells are mean ± standard deviation over seeds."""
    untrained, grid, changed = parts(frame)
    batch, rate = middle(grid.batch_size, 256), middle(grid.learning_rate, 1)
    found = []
    for change, encoder in ENCODERS.items():
        of_encoder = grid[grid.change == change]
        for metric, about in METRICS.items():
            shown = of_encoder.dropna(subset=metric) if metric == OF_PROTOTYPES else of_encoder
            cells = spread(shown[shown.batch_size == batch], "method", "learning_rate", metric)
            title = f"{about.name}, {encoder}, batch {batch:g}, by learning rate"
            if metric != OF_PROTOTYPES:
                title += f"; untrained {about.cell(untrained[untrained.change == change][metric])}"
            found.append(Numbers(title, "method", cells, metric in MAIN))
        for metric in MAIN:
            cells = spread(of_encoder[of_encoder.learning_rate == rate], "method", "batch_size", metric)
            title = f"{METRICS[metric].name}, {encoder}, learning rate {rate:g}, by batch size"
            found.append(Numbers(title, "method", cells))
    for metric in MAIN if len(changed) else ():
        what = f"{changed.method.iloc[0]}, batch {changed.batch_size.iloc[0]}"
        cells = spread(changed, "change", "learning_rate", metric)
        found.append(Numbers(f"{METRICS[metric].name}: {what}, changed, by learning rate", "change", cells, True))
    return found


def write_markdown(found: list[Numbers], frame: pd.DataFrame, folder: Path) -> Path:
    path = folder / "collapse-tables.md"
    head = f"From examples/collapse.py: mean ± standard deviation over {seeds(frame)}, {frame.epochs.max()} epochs."
    path.write_text("\n\n".join(["# All tables of collapse", head, *(numbers.markdown() for numbers in found)]) + "\n")
    return path


# ---- figures --------------------------------------------------------------------------------------------------------


def draw(frame: pd.DataFrame, folder: Path) -> Iterator[Path]:
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"axes.titleweight": "bold", "axes.titlesize": 12})
    untrained, grid, changed = parts(frame)
    figures = {
        "collapse-overview": draw_lines(grid, untrained, "learning_rate", "batch_size", middle(grid.batch_size, 256), MAIN),
        "collapse-learning-rate": draw_lines(grid, untrained, "learning_rate", "batch_size", middle(grid.batch_size, 256)),
        "collapse-batch-size": draw_lines(grid, untrained, "batch_size", "learning_rate", middle(grid.learning_rate, 1)),
        "collapse-effective-rank": draw_grid(grid, "effective_rank"),
        "collapse-linear-accuracy": draw_grid(grid, "linear_accuracy"),
    }
    if not changed.empty:
        figures["collapse-changes"] = draw_changes(changed)
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        figure.savefig(path)
        plt.close(figure)
        yield path


def draw_lines(
    grid: pd.DataFrame, untrained: pd.DataFrame, x: str, fixed: str, value: float, metrics: Sequence[str] = tuple(METRICS)
) -> Figure:
    """A panel per metric and encoder: the mean over seeds against ``x``, with a band from the smallest to the largest value."""
    shown = grid[grid[fixed] == value]
    size = WIDTH, 1.6 + 2.6 * len(metrics)
    figure, axes = plt.subplots(
        len(metrics), len(ENCODERS), figsize=size, dpi=DPI, sharex=True, sharey="row", squeeze=False, layout=tight()
    )
    for row, metric in zip(axes, metrics, strict=True):
        about = METRICS[metric]
        for panel, (change, encoder) in zip(row, ENCODERS.items(), strict=True):
            for name, color, marker in zip(grid.method.unique(), COLORS, MARKERS, strict=False):
                runs = shown[(shown.method == name) & (shown.change == change)].groupby(x)[metric]
                low, mean, high = (about.scale * getattr(runs, which)() for which in ("min", "mean", "max"))
                if mean.notna().any():
                    panel.plot(mean.index, mean, color=color, marker=marker, markersize=5, label=name)
                    panel.fill_between(mean.index, low, high, color=color, alpha=0.15, linewidth=0)
            start = about.scale * untrained[untrained.change == change][metric].mean()
            if metric != OF_PROTOTYPES:
                panel.axhline(start, color="gray", linestyle=":", linewidth=1.5, label="untrained encoder")
            panel.set(xscale="log", title=f"{about.name}\n{encoder}")
            if x == "batch_size":
                panel.set_xticks(sorted(grid[x].unique()), labels=map(str, sorted(grid[x].unique())))
                panel.minorticks_off()
    for panel, metric in zip(axes[:, 0], metrics, strict=True):
        panel.set_ylim(min(0, panel.get_ylim()[0]), METRICS[metric].most)
    for panel in axes[-1]:
        panel.set_xlabel(x.replace("_", " "))
    at = f"{fixed.replace('_', ' ')} {value:g}"
    figure.suptitle(f"By {x.replace('_', ' ')}, at {at}: mean, and range over {seeds(grid)}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    return figure


def draw_grid(grid: pd.DataFrame, metric: str) -> Figure:
    """A heatmap per method and encoder, of batch sizes and learning rates."""
    names = grid.method.unique()
    size = WIDTH, 1 + 2.6 * len(names)
    figure, axes = plt.subplots(
        len(names), len(ENCODERS), figsize=size, dpi=DPI, sharex=True, sharey=True, squeeze=False, layout=tight()
    )
    most = grid.groupby(["method", "change", "learning_rate", "batch_size"])[metric].mean().max()
    for row, name in zip(axes, names, strict=True):
        for panel, (change, encoder) in zip(row, ENCODERS.items(), strict=True):
            heatmap(panel, grid[(grid.method == name) & (grid.change == change)], "batch_size", metric, most)
            panel.set_title(f"{name}\n{encoder}")
    for panel in axes[-1]:
        panel.set_xlabel("learning rate")
    for panel in axes[:, 0]:
        panel.set_ylabel("batch size")
    figure.suptitle(f"{METRICS[metric].name}: mean ± standard deviation over {seeds(grid)}")
    return figure


def draw_changes(changed: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(11, 6.5), dpi=DPI, sharey=True, layout=tight())
    for panel, metric in zip(axes, ("effective_rank", "linear_accuracy"), strict=True):
        heatmap(panel, changed, "change", metric, changed.groupby(["change", "learning_rate"])[metric].mean().max())
        panel.set(title=METRICS[metric].name, xlabel="learning rate")
    what = f"{changed.method.iloc[0]}, batch {changed.batch_size.iloc[0]}"
    figure.suptitle(f"{what}, changed: mean ± standard deviation over {seeds(changed)}")
    return figure


def heatmap(axes: Axes, runs: pd.DataFrame, rows: str, metric: str, most: float) -> None:
    """Colours show the mean, from 0 to ``most``. Each cell has mean and spread."""
    cells = spread(runs, rows, "learning_rate", metric)
    mean = runs.groupby([rows, "learning_rate"])[metric].mean().unstack("learning_rate").reindex(cells.index)
    axes.imshow(mean.to_numpy(), cmap="viridis", vmin=0, vmax=most, aspect="auto")
    axes.set_xticks(range(len(mean.columns)), labels=[f"{rate:g}" for rate in mean.columns])
    axes.set_yticks(range(len(mean)), labels=[str(name) for name in mean.index])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for (y, x), value in np.ndenumerate(mean.to_numpy()):
        color = "black" if value > 0.6 * most else "white"
        axes.text(x, y, cells.iat[y, x].replace(" ± ", "\n± "), ha="center", va="center", fontsize=8, color=color)


def seeds(runs: pd.DataFrame) -> str:
    n_seeds = runs.seed.nunique()
    return f"{n_seeds} seeds" if n_seeds > 1 else "one seed"


def tight() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
