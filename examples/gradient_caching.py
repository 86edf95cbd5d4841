"""Train a deep encoder with gradient caching, and compare memory and time with training on whole batches.

Copies of one encoder learn from the same noisy views of scikit-learn's digits, and take their steps in turn. One copy encodes
each batch at once. The others use ``clop_kernels.gradcache.encode`` with sub-batches of several sizes. Their losses agree. A
table at the end, and a CSV file with ``--output``, compares memory and time::

    python examples/gradient_caching.py
    python examples/gradient_caching.py --short --output /tmp/gradient_caching.csv    # a quick check, for CI
    python examples/gradient_caching.py --help

Everything runs on the CPU and takes about a minute on one core.
"""

from __future__ import annotations

import script  # noqa: F401

# isort: split
import argparse
import copy
import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from arguments import COUNT, SEED, number
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from train_digits import BATCH_SIZE, EMBEDDING_DIM, N_CLASSES, N_TRAIN, cost, load_data, noisy_view

from clop_kernels import CLOPLoss, gradcache

N_PIXELS, WIDTH = 64, 128
LEARNING_RATE = 1e-3


class Block(nn.Module):
    """A residual block as in transformers. Unlike BatchNorm, its LayerNorm does not depend on sub-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def make_encoder(n_blocks: int) -> nn.Module:
    blocks = [Block() for _ in range(n_blocks)]
    return nn.Sequential(nn.Flatten(), nn.Linear(N_PIXELS, WIDTH), *blocks, nn.Linear(WIDTH, EMBEDDING_DIM))


@dataclass
class Run:
    """The training of one copy of the encoder. ``sub_batch=None`` means whole batches."""

    sub_batch: int | None
    encoder: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    megabytes: float | None = None

    @property
    def name(self) -> str:
        return "whole" if self.sub_batch is None else str(self.sub_batch)

    def forward_backward(self, criterion: nn.Module, views: list[Tensor], labels: Tensor) -> None:
        """The only code that differs between the two."""
        if self.sub_batch is None:
            z_1, z_2 = (self.encoder(view) for view in views)
        else:
            z_1, z_2 = gradcache.encode(self.encoder, *views, sub_batch=self.sub_batch)
        loss = criterion(z_1, z_2, labels=labels)
        loss.backward()
        self.losses.append(loss.item())

    def ratios(self, whole: Run) -> tuple[float, float, float]:
        """Time relative to whole batches in the same step: the median and the quartiles."""
        ratios = [mine / other for mine, other in zip(self.seconds, whole.seconds, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return median, low, high


def train(runs: list[Run], criterion: nn.Module, batch_size: int, n_steps: int, seed: int, progress: Progress) -> None:
    """Trains the runs in turn, so that other load affects all alike. The first step measures memory, the others time."""
    data = load_data(labelled_fraction=0.1, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    task = progress.add_task("train", total=n_steps * len(runs), note="")
    for step in range(n_steps):
        batch = torch.randperm(N_TRAIN, generator=generator)[:batch_size]
        views = [noisy_view(data.train_x[batch], generator) for _ in range(2)]
        for run in runs:
            run.optimizer.zero_grad()
            forward_backward = partial(run.forward_backward, criterion, views, data.labels[batch])
            if step == 0:
                _, run.megabytes = cost(forward_backward)
            else:
                start = time.perf_counter()
                forward_backward()
                run.seconds.append(time.perf_counter() - start)
            run.optimizer.step()
            progress.update(task, advance=1, note=f"loss {run.losses[-1]:.3f}")


def results(runs: list[Run]) -> list[dict[str, object]]:
    """One row per run."""
    whole = runs[0]
    rows: list[dict[str, object]] = []
    for run in runs:
        median, low, high = run.ratios(whole)
        share = run.megabytes / whole.megabytes if run.megabytes is not None and whole.megabytes else None
        gap = max(abs(a - b) for a, b in zip(run.losses, whole.losses, strict=True))
        rows.append(
            {
                "sub_batch": run.name,
                "peak_mb": None if run.megabytes is None else round(run.megabytes, 1),
                "memory_ratio": None if share is None else round(share, 4),
                "time_ratio": round(median, 3),
                "time_ratio_q1": round(low, 3),
                "time_ratio_q3": round(high, 3),
                "first_loss": round(run.losses[0], 6),
                "last_loss": round(run.losses[-1], 6),
                "most_loss_difference": f"{gap:.1e}",
            }
        )
    return rows


def report(rows: list[dict[str, object]], batch_size: int, n_blocks: int) -> Table:
    table = Table(title=f"2 views of {batch_size} digits, through {n_blocks} residual blocks", caption_justify="left")
    table.caption = (
        "Peak memory and time of encoder and loss, forward and backward. Time is relative to whole batches: median and quartiles "
        "over steps that were taken in turn. Gradient caching adds a forward pass, which makes 4/3 if backward takes twice as "
        "long as forward. The last column is the largest difference of a step's loss from that with whole batches."
    )
    for name in ("sub-batch", "peak memory", "of whole", "time", "quartiles", "loss differs by"):
        table.add_column(name, justify="left" if name == "sub-batch" else "right")
    for row in rows:
        known = row["peak_mb"] is not None and row["memory_ratio"] is not None
        table.add_row(
            str(row["sub_batch"]),
            f"{row['peak_mb']:.0f} MB" if known else "n/a",
            f"{row['memory_ratio']:.1%}" if known else "n/a",
            f"{row['time_ratio']:.2f}x",
            f"{row['time_ratio_q1']:.2f} - {row['time_ratio_q3']:.2f}",
            str(row["most_loss_difference"]),
        )
    return table


def sizes(text: str) -> list[int]:
    parse: Callable[[str], float] = number(int, lambda n: n >= 1, "integers of at least 1, separated by commas")
    return [int(parse(part)) for part in text.split(",")]


def csv_file(text: str) -> Path:
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a file that can be written ({error})") from None
    return path


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    steps = number(int, lambda n: n >= 3, "an integer of at least 3")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--batch-size", type=BATCH_SIZE, help="digits per step, two views of each (default: 1024; 256 with --short)")
    add("--sub-batches", type=sizes, help="sizes of sub-batches to compare (default: 512,128,32; 32 with --short)")
    add("--blocks", type=COUNT, help="depth of the encoder; its memory grows with it (default: 32; 8 with --short)")
    add("--steps", type=steps, help="training steps of each copy (default: 20; 4 with --short)")
    add("--seed", type=SEED, default=0, help="seed of weights, prototypes, batches and views (default: %(default)s)")
    add("--output", type=csv_file, help="CSV file for the table (default: none)")
    add("--short", action="store_true", help="a small and quick run, for CI")
    options = parser.parse_args(arguments)
    short = options.short
    options.batch_size = options.batch_size or (256 if short else 1024)
    options.sub_batches = options.sub_batches or ([32] if short else [512, 128, 32])
    options.blocks = options.blocks or (8 if short else 32)
    options.steps = options.steps or (4 if short else 20)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    torch.set_num_threads(1)  # sub-batches are small: a second thread gains little, and waits if other programs use the cores
    torch.manual_seed(options.seed)
    encoder = make_encoder(options.blocks)
    prototypes = torch.Generator().manual_seed(options.seed)
    criterion = CLOPLoss(N_CLASSES, EMBEDDING_DIM, temperature=0.5, generator=prototypes)
    runs = []
    for sub_batch in (None, *options.sub_batches):
        model = copy.deepcopy(encoder)
        runs.append(Run(sub_batch, model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)))

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]:11}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        train(runs, criterion, options.batch_size, options.steps, options.seed, progress)
    rows = results(runs)
    console.print(report(rows, options.batch_size, options.blocks))
    console.print(
        f"The loss fell from {runs[0].losses[0]:.4f} to {runs[0].losses[-1]:.4f} in {options.steps} steps.", highlight=False
    )
    if options.output is not None:
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
