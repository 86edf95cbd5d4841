"""Mixed precision as usual: autocast, a gradient scaler and torch.compile around an encoder and CLOPLoss, on real digits.

Two runs start from the same weights and see the same views. The first is float32 and eager. The second is mixed precision, with
encoder and loss in one graph (``torch.compile(fullgraph=True)``) and, for float16, a scaled loss. The scaler starts with a scale
that overflows, so it must skip the first steps, and no NaN may reach the weights::

    python examples/mixed_precision.py                      # float16
    python examples/mixed_precision.py --dtype bfloat16     # has float32's range and needs no scaler
    python examples/mixed_precision.py --short              # the same, small and quick, for CI

The loss behaves like any other: its value is float32 for every dtype of the embeddings, and an overflow in its backward pass
stays infinite, so the scaler notices it. It takes about a minute on two cores, mostly for compiling. The short mode has run on an
H200, where the scaler skipped steps 0 to 4 and step 20.
"""

from __future__ import annotations

import script  # noqa: F401

# isort: split
import argparse
import copy
import math
from dataclasses import dataclass, field

import torch
from arguments import COUNT, SEED
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from train_digits import (
    BATCH_SIZE,
    EMBEDDING_DIM,
    LEARNING_RATE,
    N_CLASSES,
    N_TRAIN,
    PROTOTYPE_WEIGHT,
    Digits,
    Run,
    evaluate,
    load_data,
    make_encoder,
    noisy_view,
)

from clop_kernels import CLOPLoss

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
OVERFLOWING_SCALE = 2.0**24
"""With this scale, gradients of activations exceed float16's largest number, 65504. The scaler's own default is 2^16."""


class TrainingStep(nn.Module):
    """Encoder and loss in one module, so that torch.compile makes one graph of them."""

    def __init__(self, encoder: nn.Module, criterion: CLOPLoss) -> None:
        super().__init__()
        self.encoder = encoder
        self.criterion = criterion

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """images (2 B, 8, 8), with the second view below the first; labels (B,). Returns the loss, ()."""
        loss: Tensor = self.criterion(self.encoder(images), labels=labels)
        return loss


@dataclass
class Scaling:
    """The scaler's scale after each step, and the steps that it skipped."""

    scales: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)


def train(
    run: Run, data: Digits, options: argparse.Namespace, device: torch.device, dtype: torch.dtype | None, progress: Progress
) -> Scaling:
    """Trains one run. ``dtype=None`` means float32 without compiling. A disabled scaler does nothing."""
    is_mixed = dtype is not None
    step = TrainingStep(run.encoder, run.criterion)
    if is_mixed:
        step.compile(fullgraph=True)
    optimizer = torch.optim.AdamW(run.encoder.parameters(), lr=LEARNING_RATE)
    scaler = torch.amp.GradScaler(device.type, init_scale=OVERFLOWING_SCALE, enabled=dtype == torch.float16)
    generator = torch.Generator().manual_seed(options.seed)  # both runs see the same views
    scaling = Scaling()
    task = progress.add_task(run.name, total=options.epochs, note="")
    for _ in range(options.epochs):
        order = torch.randperm(N_TRAIN, generator=generator)
        for start in range(0, N_TRAIN - options.batch_size + 1, options.batch_size):
            batch = order[start : start + options.batch_size]
            views = torch.cat([noisy_view(data.train_x[batch], generator) for _ in range(2)]).to(device)
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype, enabled=is_mixed):
                loss = step(views, data.labels[batch].to(device))
            scaler.scale(loss).backward()
            scaler.step(optimizer)  # skips the step if a gradient is infinite or NaN
            before = scaler.get_scale()
            scaler.update()
            if scaler.get_scale() < before:
                scaling.skipped.append(len(run.losses))
            scaling.scales.append(scaler.get_scale())
            run.losses.append(loss.item())
        progress.update(task, advance=1, note=f"loss {run.losses[-1]:.3f}")
    return scaling


def weights_are_finite(encoder: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in encoder.parameters())


def report(runs: list[Run], scalings: list[Scaling]) -> Table:
    table = Table(title="CLOPLoss on handwritten digits, mixed precision", caption_justify="left")
    table.caption = "The float16 scaler starts with too large a scale on purpose. A skipped step leaves the weights unchanged."
    table.add_column("")
    for run in runs:
        table.add_column(run.name, justify="right")
    for name in runs[0].metrics:
        form = ".1%" if "accuracy" in name else ".4f" if "loss" in name else ".2f"
        table.add_row(name, *(format(run.metrics[name], form) for run in runs))
    table.add_section()
    table.add_row("steps", *(str(len(run.losses)) for run in runs))
    table.add_row("steps skipped by the scaler", *(str(len(scaling.skipped)) for scaling in scalings))
    last = (scaling.scales[-1] for scaling in scalings)
    table.add_row("last scale", *("no scaler" if scale == 1 else f"2^{math.log2(scale):g}" for scale in last))
    table.add_row("weights are finite", *("yes" if weights_are_finite(run.encoder) else "no" for run in runs))
    return table


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--dtype", choices=tuple(DTYPES), default="float16", help="dtype of autocast (default: %(default)s)")
    add("--epochs", type=COUNT, help="passes over the training digits, in each run (default: 40; 12 with --short)")
    add("--batch-size", type=BATCH_SIZE, default=256, help="digits per step, two views of each (default: %(default)s)")
    add("--seed", type=SEED, default=0, help="seed of weights, prototypes, labels, order and views (default: %(default)s)")
    add("--short", action="store_true", help="fewer epochs, for CI")
    options = parser.parse_args(arguments)
    options.epochs = options.epochs or (12 if options.short else 40)
    return options


def main(arguments: list[str] | None = None) -> tuple[list[Run], list[Scaling]]:
    """Returns the two runs, float32 first, and the records of their scalers."""
    options = parse_arguments(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()
    data = load_data(labelled_fraction=0.1, seed=options.seed)
    torch.manual_seed(options.seed)
    encoder = make_encoder().to(device)
    runs, scalings = [], []
    columns = (TextColumn("{task.description:24}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]:11}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for name, dtype in (("float32, eager", None), (f"{options.dtype}, compiled", DTYPES[options.dtype])):
            prototypes = torch.Generator().manual_seed(options.seed)
            criterion = CLOPLoss(N_CLASSES, EMBEDDING_DIM, 0.5, PROTOTYPE_WEIGHT, generator=prototypes).to(device)
            run = Run(name, copy.deepcopy(encoder), criterion)
            scalings.append(train(run, data, options, device, dtype, progress))
            runs.append(run)
    for run in runs:
        run.encoder.cpu()
        run.criterion.cpu()
        evaluate(run, data, steps_per_epoch=N_TRAIN // options.batch_size)
    console.print(report(runs, scalings))
    return runs, scalings


if __name__ == "__main__":
    main()
