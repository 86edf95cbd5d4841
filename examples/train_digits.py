"""Train an encoder on real handwritten digits, once with the plain loss and once with the fused loss, and compare.

A small network learns from noisy views of scikit-learn's 8x8 digits. Only one digit in ten keeps its label. Both runs start
from the same weights and see the same views in the same order. They differ only in how CLOPLoss is computed. The result is a
table (accuracy, effective rank, cost of the loss at a large batch) and a figure, train_digits.png::

    make demo                                   # or: python examples/train_digits.py
    python examples/train_digits.py --short     # the same, small and quick, for CI
    python examples/train_digits.py --help

Everything runs on the CPU and takes about a minute on two cores.
"""

from __future__ import annotations

import script  # noqa: F401

# isort: split
import argparse
import copy
import ctypes
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from arguments import COUNT, SEED, number, png
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from clop_kernels import CLOPLoss
from clop_kernels.backends import select
from clop_kernels.diagnostics import effective_rank, nearest_prototype_accuracy

N_TRAIN, N_TEST, N_CLASSES = 1347, 450, 10
EMBEDDING_DIM = 64
LARGE_BATCH_DIM = 128
LEARNING_RATE = 3e-3
PROTOTYPE_WEIGHT = 5.0

BATCH_SIZE = number(int, lambda n: 2 <= n <= N_TRAIN, f"an integer from 2 to {N_TRAIN}, the number of training digits")

REFERENCE, FUSED = "#9ecae1", "#08306b"
"""The light curve is drawn below the dark one, so that both are visible where they coincide."""


@dataclass
class Digits:
    """Images are (N, 8, 8) in [0, 1]. ``labels`` is -1 except for a fraction; ``train_y`` and ``test_y`` are complete."""

    train_x: Tensor
    train_y: Tensor
    labels: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass
class Run:
    """One training run and its measurements."""

    name: str
    encoder: nn.Module
    criterion: CLOPLoss
    losses: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = math.nan
    megabytes: float | None = None


# ---- data and training ----------------------------------------------------------------------------------------------


def load_data(labelled_fraction: float, seed: int) -> Digits:
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, train_size=N_TRAIN, test_size=N_TEST, stratify=y, random_state=0)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32).view(-1, 8, 8) for part in parts[:2])
    train_y, test_y = (torch.tensor(part, dtype=torch.int64) for part in parts[2:])
    labels = torch.full_like(train_y, -1)
    generator = torch.Generator().manual_seed(seed)
    for digit in range(N_CLASSES):  # class by class, so that every class keeps labels
        members = (train_y == digit).nonzero().squeeze(1)
        kept = members[torch.randperm(len(members), generator=generator)[: math.ceil(labelled_fraction * len(members))]]
        labels[kept] = digit
    return Digits(train_x, train_y, labels, test_x, test_y)


def noisy_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 8, 8) -> (B, 8, 8): rotates, scales and shifts each image a little, adds noise, and blanks a tenth of its pixels."""
    n = len(images)
    most = torch.tensor([[0.26], [0.15], [0.25], [0.25]])  # radians, share of the size, halves of the width
    angle, scale, dy, dx = most * (2 * torch.rand(4, n, generator=generator) - 1)
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    maps = torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(n, 2, 3)
    grid = nn.functional.affine_grid(maps, [n, 1, 8, 8], align_corners=False)
    moved = nn.functional.grid_sample(images.unsqueeze(1), grid, align_corners=False).squeeze(1)
    noise = 0.1 * torch.randn(images.shape, generator=generator)
    return (moved + noise) * (torch.rand(images.shape, generator=generator) > 0.1)


def make_encoder() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),  # (B, 8, 8) -> (B, 1, 8, 8)
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(512, 128),
        nn.GELU(),
        nn.Linear(128, EMBEDDING_DIM),
    )


def train(run: Run, data: Digits, epochs: int, batch_size: int, seed: int, progress: Progress) -> None:
    """Trains, and adds each step's loss to ``run.losses``. ``seed`` determines the views, so two runs see the same ones."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(run.encoder.parameters(), lr=LEARNING_RATE)
    task = progress.add_task(f"train with {run.name}", total=epochs, note="")
    for _ in range(epochs):
        order = torch.randperm(N_TRAIN, generator=generator)
        for start in range(0, N_TRAIN - batch_size + 1, batch_size):
            batch = order[start : start + batch_size]
            images = data.train_x[batch]
            views = (run.encoder(noisy_view(images, generator)) for _ in range(2))
            loss = run.criterion(*views, labels=data.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.losses.append(loss.item())
        progress.update(task, advance=1, note=f"loss {run.losses[-1]:.3f}")


@torch.no_grad()
def embed(run: Run, images: Tensor) -> Tensor:
    return nn.functional.normalize(run.encoder(images), dim=1)


def evaluate(run: Run, data: Digits, steps_per_epoch: int) -> None:
    """Fills ``run.metrics``. The probes use every training label, because they test what the embedding contains."""
    train_z, test_z = embed(run, data.train_x), embed(run, data.test_x)
    knn = KNeighborsClassifier(5, metric="cosine").fit(train_z.numpy(), data.train_y.numpy())
    linear = LogisticRegression(C=10, max_iter=2000).fit(train_z.numpy(), data.train_y.numpy())
    run.metrics = {
        "loss, mean of the last epoch": statistics.fmean(run.losses[-steps_per_epoch:]),
        "kNN accuracy": knn.score(test_z.numpy(), data.test_y.numpy()),
        "linear accuracy": linear.score(test_z.numpy(), data.test_y.numpy()),
        "nearest-prototype accuracy": nearest_prototype_accuracy(test_z, data.test_y, run.criterion.prototypes),
        "effective rank": effective_rank(test_z),
    }


def accuracy_from_pixels(data: Digits) -> float | None:
    """Accuracy of a linear classifier on the pixels of the labelled digits. None if no digit has a label."""
    known = (data.labels >= 0).numpy()
    if not known.any():
        return None
    pixels, test_pixels = data.train_x.flatten(1).numpy(), data.test_x.flatten(1).numpy()
    classifier = LogisticRegression(max_iter=2000).fit(pixels[known], data.labels[known].numpy())
    return float(classifier.score(test_pixels, data.test_y.numpy()))


# ---- cost of the loss -----------------------------------------------------------------------------------------------


def resident_megabytes(entry: str) -> float:
    """This process's memory according to Linux: VmRSS (now) or VmHWM (the peak since the last reset)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) * 1024 / 1e6


def cost(step: Callable[[], object]) -> tuple[float, float | None]:
    """Seconds, and the peak memory above what was in use before, in MB. None if the system does not report it."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # otherwise memory that was freed earlier is reused, and not counted
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident_megabytes("VmRSS")
    except (OSError, AttributeError, StopIteration):
        before = None
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    return seconds, None if before is None else max(resident_megabytes("VmHWM") - before, 0.0)


def forward_backward(criterion: CLOPLoss, rows: Tensor, labels: Tensor) -> None:
    criterion(rows, labels=labels).backward()


def measure_large_batch(runs: list[Run], n_rows: int, repeats: int, seed: int, progress: Progress) -> None:
    """Fills ``seconds`` and ``megabytes``: forward and backward of only the loss on random rows, with the runs in turn."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_rows, LARGE_BATCH_DIM, generator=generator).requires_grad_()
    labels = torch.randint(-1, N_CLASSES, (n_rows // 2,), generator=generator)
    costs: dict[str, list[tuple[float, float | None]]] = {run.name: [] for run in runs}
    task = progress.add_task(f"loss of {n_rows} rows", total=repeats * len(runs), note="")
    for _ in range(repeats):
        for run in runs:
            tau = float(run.criterion.temperature)
            criterion = CLOPLoss(N_CLASSES, LARGE_BATCH_DIM, tau, backend=run.criterion.backend)
            costs[run.name].append(cost(partial(forward_backward, criterion, rows, labels)))
            rows.grad = None
            progress.advance(task)
    for run in runs:
        seconds, megabytes = zip(*costs[run.name], strict=True)
        run.seconds = statistics.median(seconds)
        run.megabytes = None if None in megabytes else max(megabytes)


# ---- output ---------------------------------------------------------------------------------------------------------


def report(runs: list[Run], data: Digits, n_rows: int) -> list[Table | str]:
    """The table, and a few lines that say what it means."""
    plain, fused = runs
    table = Table(title="CLOPLoss on handwritten digits", caption_justify="left")
    table.caption = (
        f"Measured on {N_TEST} test digits. kNN (k=5, cosine) and linear are probes, fitted with all {N_TRAIN} training labels; "
        f"nearest-prototype uses only the {int((data.labels >= 0).sum())} labels seen in training. Seconds and extra peak memory "
        f"are for the loss alone, forward and backward, on {n_rows} x {LARGE_BATCH_DIM} float32 numbers."
    )
    table.add_column("")
    for run in runs:
        table.add_column(run.name, justify="right")
    for name in plain.metrics:
        form = ".1%" if "accuracy" in name else ".4f" if "loss" in name else ".2f"
        table.add_row(name, *(format(run.metrics[name], form) for run in runs))
    table.add_section()
    table.add_row(f"seconds, {n_rows} rows", *(f"{run.seconds:.3f}" for run in runs))
    table.add_row(f"peak memory, {n_rows} rows", *(megabytes(run.megabytes) for run in runs))

    speedup = f"1/{plain.seconds / fused.seconds:.1f} of the time"
    if plain.megabytes is not None and fused.megabytes:
        speedup += f" and 1/{plain.megabytes / fused.megabytes:.0f} of the memory of the plain loss"
    gap = differences(plain, fused)
    lines = [
        f"At {n_rows} rows, the fused loss takes {speedup}.",
        f"The losses of the two runs differ by at most {gap.max():.1e} in any of the {len(gap)} steps.",
    ]
    baseline = accuracy_from_pixels(data)
    if baseline is not None:
        lines.append(f"For comparison: a linear classifier on the pixels of the labelled digits reaches {baseline:.1%}.")
    return [table, *lines]


def megabytes(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.0f} MB"


def differences(plain: Run, fused: Run) -> np.ndarray:
    gap: np.ndarray = np.abs(np.subtract(plain.losses, fused.losses))
    return gap


def draw(runs: list[Run], data: Digits, n_rows: int, output: Path) -> None:
    """Draws the losses and their difference (left), the embedding (middle), and the cost of the loss (right)."""
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"axes.titleweight": "bold", "axes.titlesize": 12})
    figure = plt.figure(figsize=(16, 7), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    grid = figure.add_gridspec(6, 3, width_ratios=[5, 6, 3])
    draw_losses(figure.add_subplot(grid[:4, 0]), figure.add_subplot(grid[4:, 0]), runs)
    draw_embedding(figure.add_subplot(grid[:, 1]), runs[1], data)
    in_megabytes = [math.nan if run.megabytes is None else run.megabytes for run in runs]
    draw_bars(figure.add_subplot(grid[:3, 2]), runs, [run.seconds for run in runs], "s", f"Seconds at {n_rows} rows")
    draw_bars(figure.add_subplot(grid[3:, 2]), runs, in_megabytes, "MB", f"Peak memory at {n_rows} rows")
    figure.savefig(output)
    plt.close(figure)


def draw_losses(top: Axes, bottom: Axes, runs: list[Run]) -> None:
    plain, fused = runs
    top.plot(plain.losses, color=REFERENCE, linewidth=6, label=plain.name)
    top.plot(fused.losses, color=FUSED, linewidth=1.2, linestyle=(0, (4, 2)), label=fused.name)
    top.set(title="Both runs have the same losses", ylabel="CLOP loss")
    top.tick_params(labelbottom=False)
    top.legend(frameon=False)
    # A difference of 0 has no logarithm and is left out. The other dots show float32 rounding.
    gap = differences(plain, fused)
    bottom.semilogy(np.where(gap > 0, gap, np.nan), ".", color=FUSED, markersize=3)
    bottom.set(xlabel="training step", ylabel="|difference|", xlim=top.get_xlim(), ylim=(1e-8, max(1e-3, gap.max())))


def draw_embedding(axes: Axes, run: Run, data: Digits) -> None:
    z, digits = embed(run, data.test_x).numpy(), data.test_y.numpy()
    pca = PCA(2).fit(z)
    points, stars = pca.transform(z), pca.transform(run.criterion.prototypes.numpy())
    halo = withStroke(linewidth=3, foreground="white")
    for digit in range(N_CLASSES):
        color = plt.get_cmap("tab10")(digit)
        x, y = points[digits == digit].T
        axes.scatter(x, y, s=22, color=color, alpha=0.65, linewidth=0)
        x, y = stars[digit]
        axes.scatter(x, y, s=420, marker="*", color=color, edgecolor="black", linewidth=1, zorder=3)
        label = axes.annotate(str(digit), (x, y), (9, 7), textcoords="offset points", fontsize=13, weight="bold")
        label.set_path_effects([halo])
    shares = pca.explained_variance_ratio_
    axes.scatter([], [], s=22, color="gray", label="test digit, coloured by class")
    axes.scatter([], [], s=160, marker="*", color="white", edgecolor="black", label="prototype of a class")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2)
    axes.set(title=f"Embedding ({EMBEDDING_DIM}-dimensional) of {len(z)} unseen digits, by PCA", aspect="equal")
    axes.set(xlabel=f"first component ({shares[0]:.0%} of the variance)", ylabel=f"second component ({shares[1]:.0%})")


def draw_bars(axes: Axes, runs: list[Run], values: list[float], unit: str, title: str) -> None:
    texts = ["n/a" if math.isnan(v) else f"{v:.0f} {unit}" if v >= 100 else f"{v:.3g} {unit}" for v in values]
    bars = axes.bar([run.name for run in runs], np.nan_to_num(values), color=[REFERENCE, FUSED], width=0.6)
    axes.bar_label(bars, texts, padding=3)
    axes.set(title=title, ylabel=unit)
    axes.margins(y=0.12)


# ---- command line ---------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    temperature = number(float, lambda t: 0 < t < math.inf, "a positive finite number")
    fraction = number(float, lambda f: 0 <= f <= 1, "a number from 0 to 1")
    large_batch = number(int, lambda n: n >= 2 and n % 2 == 0, "an even integer of at least 2")

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--epochs", type=COUNT, help="passes over the training digits, in each run (default: 100; 6 with --short)")
    add("--batch-size", type=BATCH_SIZE, default=256, help="digits per step, two views of each (default: %(default)s)")
    add("--seed", type=SEED, default=0, help="seed of weights, prototypes, labels, order and views (default: %(default)s)")
    add("--temperature", type=temperature, default=0.5, help="tau of the loss (default: %(default)s)")
    add("--labelled-fraction", type=fraction, default=0.1, help="share of digits that keep their label (default: %(default)s)")
    add("--output", type=png, default="train_digits.png", help="path of the figure (default: %(default)s)")
    large_batch_help = "rows N for comparing time and memory; the plain loss needs 20 to 35 N^2 bytes"
    add("--large-batch", type=large_batch, help=f"{large_batch_help} (default: 8192; 2048 with --short)")
    add("--short", action="store_true", help="fewer epochs and a smaller large batch, for CI")
    options = parser.parse_args(arguments)
    options.epochs = options.epochs or (6 if options.short else 100)
    options.large_batch = options.large_batch or (2048 if options.short else 8192)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    matplotlib.use("Agg")  # draws to a file, never to a window
    console = Console()
    data = load_data(options.labelled_fraction, options.seed)

    torch.manual_seed(options.seed)
    encoder = make_encoder()
    fused = select(None, torch.device("cpu"), torch.float32).name
    runs = []
    for name, backend in (("plain (reference)", "reference"), (f"fused ({fused})", None)):
        prototypes = torch.Generator().manual_seed(options.seed)
        criterion = CLOPLoss(
            N_CLASSES, EMBEDDING_DIM, options.temperature, PROTOTYPE_WEIGHT, generator=prototypes, backend=backend
        )
        runs.append(Run(name, copy.deepcopy(encoder), criterion))

    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]:11}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        # On tensors this small, a second thread gains little, and waits if other programs use the cores.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for run in runs:
            train(run, data, options.epochs, options.batch_size, options.seed, progress)
        torch.set_num_threads(threads)
        measure_large_batch(runs, options.large_batch, repeats=2, seed=options.seed, progress=progress)
    for run in runs:
        evaluate(run, data, steps_per_epoch=N_TRAIN // options.batch_size)

    draw(runs, data, options.large_batch, options.output)
    for part in (*report(runs, data, options.large_batch), f"Figure: {options.output}"):
        console.print(part, highlight=False, soft_wrap=isinstance(part, str))


if __name__ == "__main__":
    main()
