"""When do embeddings collapse? NT-Xent, SupCon and CLOP over learning rates and batch sizes, on real handwritten digits.

For each method, learning rate, batch size and seed, a small network learns from noisy views of scikit-learn's 8x8 digits, with
SGD, from scratch, with and without BatchNorm. All runs see the same number of digits. Further runs try changes that may keep CLOP
from collapsing: its temperature and weight, warm-ups, clipping. Each run measures its embeddings of the test digits::

    python examples/collapse.py                     # 40 minutes on two cores; writes a folder with CSV, tables and figures
    python examples/collapse.py --short             # the same, small and quick, for CI
    python examples/collapse.py --redraw            # makes tables and figures again from the CSV in the folder
    python examples/collapse.py --learning-rates 1,3 --batch-sizes 256 --changes none    # a closer look at one region

SupCon and CLOP get a tenth of the labels, or all of them. The probes (kNN and a linear classifier) always see all labels. Ctrl-C
keeps the finished runs.
"""

from __future__ import annotations

from script import leave_interrupts_to_parent

# isort: split
import argparse
import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import matplotlib
import pandas as pd
import torch
from arguments import COUNT, number
from collapse_figures import draw, tables, write_markdown
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize
from train_digits import EMBEDDING_DIM, N_CLASSES, N_TRAIN, Digits, load_data, noisy_view

from clop_kernels import CLOPLoss, collapse_report


@dataclass(frozen=True)
class Method:
    positives: str
    labelled_fraction: float
    has_prototypes: bool


METHODS = {
    "NT-Xent": Method("instance", 0.0, False),
    "SupCon, 10% labels": Method("label", 0.1, False),
    "SupCon, 100% labels": Method("label", 1.0, False),
    "CLOP, 10% labels": Method("instance", 0.1, True),
    "CLOP, 100% labels": Method("instance", 1.0, True),
}
CHANGED = "CLOP, 10% labels"
"""The method to which all CHANGES apply. BatchNorm alone applies to every method."""


@dataclass(frozen=True)
class Recipe:
    """How a run trains. A warm-up is the share of all steps during which a rate or weight grows linearly from 0."""

    temperature: float = 0.5
    prototype_weight: float = 1.0
    momentum: float = 0.9
    batch_norm: bool = False
    warmup: float = 0.0
    prototype_warmup: float = 0.0
    clip_norm: float = math.inf


PLAIN, BATCH_NORM = "as is", "BatchNorm"
CHANGES = {
    PLAIN: Recipe(),
    "temperature 0.1": Recipe(temperature=0.1),
    "temperature 0.2": Recipe(temperature=0.2),
    "temperature 1": Recipe(temperature=1.0),
    "lambda 0.1": Recipe(prototype_weight=0.1),
    "lambda 0.3": Recipe(prototype_weight=0.3),
    "lambda 3": Recipe(prototype_weight=3.0),
    "lambda from 0, over half the steps": Recipe(prototype_warmup=0.5),
    "learning rate from 0, over a fifth": Recipe(warmup=0.2),
    "gradient clipped to norm 0.1": Recipe(clip_norm=0.1),
    "no momentum": Recipe(momentum=0.0),
    BATCH_NORM: Recipe(batch_norm=True),
    "BatchNorm, lambda from 0": Recipe(batch_norm=True, prototype_warmup=0.5),
}


@dataclass(frozen=True)
class Settings:
    """One run, and the first columns of its row. A learning rate of 0 means the untrained encoder."""

    method: str
    change: str
    learning_rate: float
    batch_size: int
    epochs: int
    seed: int


# ---- one run --------------------------------------------------------------------------------------------------------


def make_encoder(batch_norm: bool) -> nn.Module:
    def hidden(n_in: int, n_out: int) -> list[nn.Module]:
        return [nn.Linear(n_in, n_out), *([nn.BatchNorm1d(n_out)] if batch_norm else []), nn.ReLU()]

    return nn.Sequential(nn.Flatten(), *hidden(64, 128), *hidden(128, 128), nn.Linear(128, EMBEDDING_DIM))


def batches(n_steps: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of digits: one permutation after another, cut into batches. Batches may span two epochs: no digit is dropped."""
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(n_steps):
        if len(left) < batch_size:
            left = torch.cat([left, torch.randperm(N_TRAIN, generator=generator)])
        yield left[:batch_size]
        left = left[batch_size:]


def train(encoder: nn.Module, criterion: CLOPLoss, data: Digits, settings: Settings, recipe: Recipe) -> float:
    """Trains the encoder. Returns the loss of the last step."""
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=settings.learning_rate, momentum=recipe.momentum)
    final_weight = criterion.prototype_weight
    n_steps = max(1, round(settings.epochs * N_TRAIN / settings.batch_size))
    for step, batch in enumerate(batches(n_steps, settings.batch_size, generator)):
        done = (step + 1) / n_steps
        optimizer.param_groups[0]["lr"] = settings.learning_rate * min(1, done / max(recipe.warmup, 1e-9))
        criterion.prototype_weight = final_weight * min(1, done / max(recipe.prototype_warmup, 1e-9))
        views = torch.cat([noisy_view(data.train_x[batch], generator) for _ in range(2)])
        loss = criterion(encoder(views), labels=data.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), recipe.clip_norm)
        optimizer.step()
    return loss.item()


@torch.no_grad()
def evaluate(encoder: nn.Module, data: Digits, prototypes: Tensor | None) -> dict[str, float]:
    """Measures the embeddings of the test digits. Probes are fitted on unit embeddings of the training digits."""
    encoder.eval()
    train_z, test_z = encoder(data.train_x), encoder(data.test_x)
    if not (train_z.isfinite().all() and test_z.isfinite().all()):
        return {"finite": 0}
    report = collapse_report(test_z, data.test_y, prototypes)
    norm = float(test_z.norm(dim=1).median())
    train_z, test_z = normalize(train_z), normalize(test_z)
    knn = KNeighborsClassifier(5, metric="cosine").fit(train_z, data.train_y)
    linear = LogisticRegression(C=10, solver="newton-cholesky").fit(train_z, data.train_y)
    metrics = {
        "finite": 1,
        "knn_accuracy": knn.score(test_z, data.test_y),
        "linear_accuracy": linear.score(test_z, data.test_y),
        "effective_rank": report.effective_rank,
        "centered_effective_rank": report.centered_effective_rank,
        "mean_cosine": report.mean_pairwise_cosine,
        "median_norm": norm,
    }
    if prototypes is not None:
        metrics["nearest_prototype_accuracy"] = report.nearest_prototype_accuracy or 0.0
        metrics["cosine_of_means"] = float(cosine_similarity(test_z.mean(0), prototypes.mean(0), dim=0))
    return metrics


@cache
def digits(labelled_fraction: float, seed: int) -> Digits:
    return load_data(labelled_fraction, seed)


def run(settings: Settings) -> dict[str, object]:
    """The row of one run. The seed determines weights, prototypes, the labels that are kept, the order, and the views."""
    method, recipe = METHODS[settings.method], CHANGES[settings.change]
    data = digits(method.labelled_fraction, settings.seed)
    torch.manual_seed(settings.seed)
    encoder = make_encoder(recipe.batch_norm)
    criterion = CLOPLoss(
        N_CLASSES,
        EMBEDDING_DIM,
        recipe.temperature,
        recipe.prototype_weight if method.has_prototypes else 0.0,
        positives=method.positives,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    loss = train(encoder, criterion, data, settings, recipe) if settings.learning_rate else math.nan
    metrics = evaluate(encoder, data, criterion.prototypes if method.has_prototypes else None)
    return asdict(settings) | {"last_loss": loss} | metrics


# ---- all runs -------------------------------------------------------------------------------------------------------


def plan(options: argparse.Namespace) -> list[Settings]:
    """All runs, the longest first, so that at the end no process works alone on a long one."""
    seeds = range(options.seeds)
    sizes = options.batch_sizes
    usual = 256 if 256 in sizes else sizes[len(sizes) // 2]
    untrained = Settings("NT-Xent", PLAIN, 0.0, usual, options.epochs, 0)
    runs = [replace(untrained, seed=seed, change=change) for seed, change in product(seeds, (PLAIN, BATCH_NORM))]
    for method, change, rate, size, seed in product(METHODS, (PLAIN, BATCH_NORM), options.learning_rates, sizes, seeds):
        runs.append(Settings(method, change, rate, size, options.epochs, seed))
    for change, rate, seed in product(options.changes, options.learning_rates, seeds):
        runs.append(Settings(CHANGED, change, rate, usual, options.epochs, seed))
    return sorted(dict.fromkeys(runs), key=lambda settings: (settings.learning_rate == 0, settings.batch_size))


def alone_on_a_core() -> None:
    """Sets up a worker process. Matrices this small gain nothing from a second thread."""
    leave_interrupts_to_parent()
    torch.set_num_threads(1)
    threadpool_limits(1)


def measure(runs: list[Settings], workers: int, table: Path, console: Console) -> None:
    """Writes one row per run to ``table``. After an error or Ctrl-C, it writes the runs that were finished."""
    rows = []
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("runs, last {task.fields[last]}"))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=alone_on_a_core)
    try:
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
            task = progress.add_task("", total=len(runs), last="...")
            for future in as_completed([pool.submit(run, settings) for settings in runs]):
                rows.append(future.result())
                last = "{method}, {change}, learning rate {learning_rate:g}, batch {batch_size}".format_map(rows[-1])
                progress.update(task, advance=1, last=last)
    finally:
        pool.shutdown(cancel_futures=True)
        if rows:
            if len(rows) < len(runs):
                console.print(f"{len(rows)} of {len(runs)} runs were finished and are in {table}; --redraw makes their figures.")
            in_order(pd.DataFrame(rows)).to_csv(table, index=False, float_format="%.5g")


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Sorts rows by change and method, in the order of their definitions here. Tables and figures keep this order."""
    kinds = {"change": pd.Categorical(frame["change"], CHANGES), "method": pd.Categorical(frame["method"], METHODS)}
    return frame.assign(**kinds).sort_values(["change", "method", "batch_size", "learning_rate", "seed"])


# ---- command line ---------------------------------------------------------------------------------------------------


def learning_rates(text: str) -> list[float]:
    parse = number(float, lambda rate: 0 < rate < math.inf, "positive finite numbers, separated by commas")
    return sorted({parse(part) for part in text.split(",")})


def batch_sizes(text: str) -> list[int]:
    parse = number(int, lambda n: 2 <= n <= N_TRAIN, f"integers from 2 to {N_TRAIN} (the training digits), separated by commas")
    return sorted({int(parse(part)) for part in text.split(",")})


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--learning-rates", type=learning_rates, help="learning rates of SGD (default: 0.01,0.1,1,10,100; 0.1,10 with --short)")
    add(
        "--batch-sizes",
        type=batch_sizes,
        help="digits per step, two views of each (default: 32,64,...,1024; 256,512 with --short)",
    )
    add("--epochs", type=COUNT, help=f"passes over the {N_TRAIN} training digits in each run (default: 30; 1 with --short)")
    add("--seeds", type=COUNT, help="runs of each kind, with seeds 0, 1, ... (default: 5; 1 with --short)")
    changes_help = f"whether to also run '{CHANGED.replace('%', '%%')}' with each change, at batch 256 (default: %(default)s)"
    add("--changes", choices=("all", "none"), default="all", help=changes_help)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--workers", type=COUNT, default=cores, help="processes (default: one per core, %(default)s)")
    add("--output", type=Path, default=Path("collapse"), help="folder for all files (default: %(default)s)")
    add("--redraw", action="store_true", help="run nothing; make tables and figures from the folder's collapse.csv")
    add("--short", action="store_true", help="few and short runs for CI, which only show that everything works")
    options = parser.parse_args(arguments)
    short = options.short
    options.learning_rates = options.learning_rates or ([0.1, 10.0] if short else [0.01, 0.1, 1.0, 10.0, 100.0])
    options.batch_sizes = options.batch_sizes or ([256, 512] if short else [32, 64, 128, 256, 512, 1024])
    options.epochs = options.epochs or (1 if short else 30)
    options.seeds = options.seeds or (1 if short else 5)
    options.changes = list(CHANGES) if options.changes == "all" else []
    options.table = options.output / "collapse.csv"
    if options.redraw and not options.table.is_file():
        parser.error(
            f"argument --redraw: there is no {options.table}; run without --redraw first, or name the folder with --output"
        )
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: {str(options.output)!r}: expected a folder that can be made ({error})")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    matplotlib.use("Agg")  # draws to files, never to a window
    console = Console()
    if not options.redraw:
        measure(plan(options), options.workers, options.table, console)
    frame = pd.read_csv(options.table)
    for numbers in (found := tables(frame)):
        if numbers.is_main:
            console.print(numbers.rich())
    written = [options.table, write_markdown(found, frame, options.output), *draw(frame, options.output)]
    console.print("Written: " + ", ".join(map(str, written)), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
