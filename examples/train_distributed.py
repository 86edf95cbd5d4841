"""Train an encoder on real handwritten digits with several processes, each with its share of every batch.

The loss is that of the whole batch, for any number of processes: ``CLOPLoss(..., group=...)`` compares each process's rows with
the rows of all processes, and DistributedDataParallel averages the gradients, which gives those of a single process. The first
step is compared with a single process that has the whole batch, and the table shows the difference::

    torchrun --nproc-per-node 2 examples/train_distributed.py             # on CPUs with gloo, on GPUs with NCCL
    torchrun --nproc-per-node 2 examples/train_distributed.py --strategy ring --sub-batch 64    # with gradient caching
    torchrun --nproc-per-node 2 examples/train_distributed.py --short     # the same, small and quick, for CI
    python examples/train_distributed.py                                  # one process

It takes about half a minute on two cores. It has not yet been run on GPUs.
"""

from __future__ import annotations

import script  # noqa: F401

# isort: split
import argparse
import copy
import os
import statistics
from contextlib import nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from train_digits import (
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

from clop_kernels import CLOPLoss, gradcache


def start() -> torch.device:
    """Makes the default process group, of torchrun's processes or of this process alone. Returns this process's device."""
    is_one_of_several = distributed.is_torchelastic_launched()
    alone: dict[str, Any] = {}
    if not is_one_of_several:
        alone = {"store": distributed.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    if not torch.cuda.is_available():
        distributed.init_process_group("gloo", **alone)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    # With gloo beside NCCL, the loss compares sizes and options of ranks without waiting for the GPU.
    distributed.init_process_group("cpu:gloo,cuda:nccl", **alone)
    return device


def share_of(rows: Tensor) -> Tensor:
    """This process's part of a batch. The sizes of the parts differ by one row at most."""
    return rows.tensor_split(distributed.get_world_size())[distributed.get_rank()]


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def distance_from_one_process(
    encoder: nn.Module, criterion: CLOPLoss, views: list[Tensor], labels: Tensor, of_group: Tensor
) -> float:
    """Relative difference between the averaged gradients and those of one process with the whole batch."""
    encoder, alone = copy.deepcopy(encoder), copy.deepcopy(criterion)
    alone.group = None
    encoder.zero_grad()
    alone(*map(encoder, views), labels=labels).backward()
    expected = gradients(encoder)
    return float((of_group - expected).norm() / expected.norm())


def train(
    encoder: nn.Module, criterion: CLOPLoss, data: Digits, options: argparse.Namespace, device: torch.device, progress: Progress
) -> tuple[list[float], float]:
    """Returns the loss of each step, and the first step's distance from one process."""
    is_first = distributed.get_rank() == 0
    model = DistributedDataParallel(encoder, device_ids=None if device.type == "cpu" else [device.index])
    # A learnable temperature also needs its gradient averaged. DDP refuses a module without parameters.
    learned = DistributedDataParallel(criterion) if criterion.log_temperature is not None else criterion
    optimizer = torch.optim.AdamW([*encoder.parameters(), *criterion.parameters()], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(options.seed)  # every process draws the same batches and views
    losses: list[float] = []
    distance = 0.0
    task = progress.add_task("training", total=options.epochs, note="", visible=is_first)
    for _ in range(options.epochs):
        order = torch.randperm(N_TRAIN, generator=generator)
        for begin in range(0, N_TRAIN - options.batch_size + 1, options.batch_size):
            batch = order[begin : begin + options.batch_size]
            views = [noisy_view(data.train_x[batch], generator).to(device) for _ in range(2)]
            labels = data.labels[batch].to(device)
            optimizer.zero_grad()
            images = torch.cat([share_of(view) for view in views])
            z = model(images) if options.sub_batch is None else gradcache.encode(model, images, sub_batch=options.sub_batch)
            loss = learned(z, labels=share_of(labels), n_views=2)
            loss.backward()
            if not losses:
                distance = distance_from_one_process(encoder, criterion, views, labels, gradients(encoder))
            optimizer.step()
            losses.append(loss.item())
        progress.update(task, advance=1, note=f"loss {losses[-1]:.3f}")
    return losses, distance


def report(run: Run, losses: list[float], distance: float, steps_per_epoch: int) -> Table:
    world = distributed.get_world_size()
    processes = "1 process" if world == 1 else f"{world} processes"
    table = Table(title=f"CLOPLoss on handwritten digits, {processes}, {run.name}")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("first step: relative difference of the gradients from one process", f"{distance:.1e}")
    table.add_row("loss, mean of the first epoch", f"{statistics.fmean(losses[:steps_per_epoch]):.4f}")
    for name, value in run.metrics.items():
        table.add_row(name, f"{value:.1%}" if "accuracy" in name else f"{value:.4f}" if "loss" in name else f"{value:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training digits (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=256, help="digits per step of all processes together (default: %(default)s)"
    )
    parser.add_argument("--strategy", choices=("auto", "gather", "ring"), default="auto", help="how processes exchange rows")
    parser.add_argument("--sub-batch", type=int, help="encode this many images at a time, with gradient caching (default: all)")
    parser.add_argument("--labelled", type=float, default=0.1, help="share of digits that keep their label (0.1)")
    parser.add_argument("--temperature", type=float, default=0.2, help="temperature of the loss (%(default)s)")
    parser.add_argument("--learnable-temperature", action="store_true", help="learn the temperature, starting at --temperature")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, labels, order and views (%(default)s)")
    parser.add_argument("--short", action="store_true", help="train two epochs, for CI")
    options = parser.parse_args()
    if options.short:
        options.epochs = 2
    if not 1 <= options.batch_size <= N_TRAIN:
        parser.error(f"--batch-size {options.batch_size}: expected 1 to {N_TRAIN}, the number of training digits")

    device = start()
    torch.manual_seed(options.seed)
    data = load_data(options.labelled, options.seed)
    encoder = make_encoder().to(device)
    criterion = CLOPLoss(
        N_CLASSES,
        EMBEDDING_DIM,
        options.temperature,
        PROTOTYPE_WEIGHT,
        learnable_temperature=options.learnable_temperature,
        group=distributed.group.WORLD,
        strategy=options.strategy,
        device=device,
    )
    is_first = distributed.get_rank() == 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console()
    with Progress(*columns, console=console) if is_first else nullcontext(Progress(disable=True)) as progress:
        losses, distance = train(encoder, criterion, data, options, device, progress)
    if is_first:
        steps_per_epoch = N_TRAIN // options.batch_size
        run = Run(f"strategy {options.strategy!r}", encoder.cpu(), criterion.cpu(), losses)
        evaluate(run, data, steps_per_epoch)
        console.print(report(run, losses, distance, steps_per_epoch))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
