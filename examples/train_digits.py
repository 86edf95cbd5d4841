"""Train an encoder on real handwritten digits, once with the plain loss and once with the fused loss, and compare.

A small network learns from noisy views of scikit-learn's 8x8 digits, of which only one in ten keeps its label. Both runs
start from the same weights and see the same views in the same order; they differ only in how CLOPLoss is computed. At
the end comes a table (accuracy, effective rank, and what the loss costs at a large batch) and a figure, train_digits.png::

    make demo                                   # or: python examples/train_digits.py
    python examples/train_digits.py --short     # a quick check of the same, for CI
    python examples/train_digits.py --help

Everything runs on the CPU and takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
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
LEARNING_RATE = 1e-3

REFERENCE, FUSED = "#9ecae1", "#08306b"
"""Light under dark: where the curves coincide, both are seen."""


@dataclass
class Digits:
    """Images are (N, 8, 8) in [0, 1]; of ``labels`` all but a fraction are -1, ``train_y`` and ``test_y`` are whole."""

    train_x: Tensor
    train_y: Tensor
    labels: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass
class Run:
    """One training run and what was measured of it."""

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
    for digit in range(N_CLASSES):  # class by class, so that no digit is left without a label
        members = (train_y == digit).nonzero().squeeze(1)
        kept = members[torch.randperm(len(members), generator=generator)[: math.ceil(labelled_fraction * len(members))]]
        labels[kept] = digit
    return Digits(train_x, train_y, labels, test_x, test_y)


def noisy_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 8, 8) -> (B, 8, 8), each shifted by up to a pixel, with noise, and with a tenth of its pixels blanked."""
    n = len(images)
    windows = nn.functional.pad(images, (1, 1, 1, 1)).unfold(1, 8, 1).unfold(2, 8, 1)  # (B, 3, 3, 8, 8)
    dy, dx = torch.randint(3, (2, n), generator=generator)
    shifted = windows[torch.arange(n), dy, dx]
    noise = 0.15 * torch.randn(images.shape, generator=generator)
    return (shifted + noise) * (torch.rand(images.shape, generator=generator) > 0.1)


def make_encoder() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, EMBEDDING_DIM)
    )


def train(run: Run, data: Digits, epochs: int, batch_size: int, seed: int, progress: Progress) -> None:
    """Fills ``run.losses``, one a step. All randomness comes from ``seed``: two runs see the same views."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(run.encoder.parameters(), lr=LEARNING_RATE)
    task = progress.add_task(f"train with {run.name}", total=epochs, loss=math.nan)
    for _ in range(epochs):
        order = torch.randperm(N_TRAIN, generator=generator)
        for batch in order[: N_TRAIN // batch_size * batch_size].split(batch_size):
            images = data.train_x[batch]
            views = (run.encoder(noisy_view(images, generator)) for _ in range(2))
            loss = run.criterion(*views, labels=data.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.losses.append(loss.item())
        progress.update(task, advance=1, loss=run.losses[-1])


@torch.no_grad()
def embed(run: Run, images: Tensor) -> Tensor:
    return nn.functional.normalize(run.encoder(images), dim=1)


def evaluate(run: Run, data: Digits, steps_per_epoch: int) -> None:
    """Fills ``run.metrics``. The probes see every training label: they ask what the embedding holds, not what it was told."""
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
    """What the labelled digits alone teach a linear classifier; None if there are none."""
    known = data.labels >= 0
    if not known.any():
        return None
    classifier = LogisticRegression(max_iter=2000).fit(data.train_x[known].flatten(1).numpy(), data.labels[known].numpy())
    return float(classifier.score(data.test_x.flatten(1).numpy(), data.test_y.numpy()))


# ---- what the loss costs --------------------------------------------------------------------------------------------


def resident_megabytes(entry: str) -> float:
    """VmRSS (now) or VmHWM (the peak since it was last reset) of this process, from Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) / 1024


def cost(step: Callable[[], object]) -> tuple[float, float | None]:
    """Seconds, and the peak of the memory beyond what was resident before, in MB; None where Linux does not tell."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or memory freed earlier is used again and not seen
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident_megabytes("VmRSS")
    except (OSError, AttributeError, StopIteration):
        before = None
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    return seconds, None if before is None else max(resident_megabytes("VmHWM") - before, 0.0)


def measure_large_batch(runs: list[Run], n_rows: int, repeats: int, seed: int, progress: Progress) -> None:
    """Fills ``seconds`` and ``megabytes``: forward and backward of the loss alone on random rows, the runs taking turns."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_rows, LARGE_BATCH_DIM, generator=generator).requires_grad_()
    labels = torch.randint(-1, N_CLASSES, (n_rows // 2,), generator=generator)
    costs: dict[str, list[tuple[float, float | None]]] = {run.name: [] for run in runs}
    task = progress.add_task(f"loss of {n_rows} rows", total=repeats * len(runs), loss=math.nan)
    for _ in range(repeats):
        for run in runs:
            criterion = CLOPLoss(N_CLASSES, LARGE_BATCH_DIM, run.criterion.temperature, backend=run.criterion.backend)
            costs[run.name].append(cost(lambda criterion=criterion: criterion(rows, labels=labels).backward()))
            rows.grad = None
            progress.advance(task)
    for run in runs:
        seconds, megabytes = zip(*costs[run.name], strict=True)
        run.seconds = statistics.median(seconds)
        run.megabytes = None if None in megabytes else max(megabytes)
