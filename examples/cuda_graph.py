"""A whole training step in one CUDA graph: encoder, CLOPLoss, backward pass and optimizer.

Small batches spend their time on launches, not on arithmetic. A replayed graph needs no launches from Python. The loss never
reads a value back to the host, so it can be captured. This script compares the losses of replayed and eager steps, and times
both in turn::

    python examples/cuda_graph.py                      # needs a GPU; without one it says so
    python examples/cuda_graph.py --batch-size 64 --steps 500

A step can be captured if its inputs keep their memory and are overwritten, its optimizer has ``capturable=True``, and a few steps
ran on another stream before, which allocate everything that is allocated once. The test of this script has passed on an H200.
"""

from __future__ import annotations

import script  # noqa: F401

# isort: split
import argparse
import copy
import statistics
from collections.abc import Callable, Iterator

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
    load_data,
    make_encoder,
    noisy_view,
)

from clop_kernels import CLOPLoss

WARM_UP_STEPS = 3
ROUNDS = 7
"""Rounds of the timing, with eager and replayed steps in turn."""


class Trainer:
    """Encoder, loss, optimizer, and their inputs.

    Attributes:
        images: (2 B, 8, 8), the second view below the first. Overwritten in place.
        labels: (B,). Overwritten in place.
    """

    def __init__(self, encoder: nn.Module, batch_size: int, device: torch.device, seed: int) -> None:
        self.encoder = encoder.to(device)
        prototypes = torch.Generator().manual_seed(seed)
        self.criterion = CLOPLoss(N_CLASSES, EMBEDDING_DIM, 0.5, PROTOTYPE_WEIGHT, generator=prototypes).to(device)
        self.optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=LEARNING_RATE, capturable=device.type == "cuda")
        self.images = torch.zeros(2 * batch_size, 8, 8, device=device)
        self.labels = torch.full((batch_size,), -1, device=device)

    def load(self, images: Tensor, labels: Tensor) -> None:
        self.images.copy_(images, non_blocking=True)
        self.labels.copy_(labels, non_blocking=True)

    def step(self) -> Tensor:
        """Trains one step on the loaded inputs. Returns the loss, of shape ()."""
        self.optimizer.zero_grad(set_to_none=True)
        loss: Tensor = self.criterion(self.encoder(self.images), labels=self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def captured(self) -> Callable[[], Tensor]:
        """``step`` as a graph. Every call returns the same tensor, with the new loss in it."""
        start = copy.deepcopy(self.encoder.state_dict())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.step()
        self._go_back_to(start)

        def replay() -> Tensor:
            graph.replay()
            return loss

        return replay

    @torch.no_grad()
    def _go_back_to(self, start: dict[str, Tensor]) -> None:
        """Undoes the warm-up's training in place, because the graph knows its tensors by their addresses."""
        for name, value in self.encoder.state_dict().items():
            value.copy_(start[name])
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()


def batches(data: Digits, batch_size: int, n_steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        batch = torch.randperm(N_TRAIN, generator=generator)[:batch_size]
        yield torch.cat([noisy_view(data.train_x[batch], generator) for _ in range(2)]), data.labels[batch]


def losses(trainer: Trainer, step: Callable[[], Tensor], data: Digits, options: argparse.Namespace, progress: Progress) -> Tensor:
    """The loss of each step, (steps,). The copies stay on the device, so that no step waits."""
    found = []
    steps = batches(data, options.batch_size, options.steps, options.seed)
    for images, labels in progress.track(steps, total=options.steps, description="training"):
        trainer.load(images, labels)
        found.append(step().clone())
    return torch.stack(found).cpu()


def milliseconds(step: Callable[[], Tensor], n_steps: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(n_steps):
        step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / n_steps


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--steps", type=COUNT, help="training steps of each kind, eager and replayed (default: 200; 20 with --short)")
    add("--batch-size", type=BATCH_SIZE, default=256, help="digits per step, two views of each (default: %(default)s)")
    add("--seed", type=SEED, default=0, help="seed of weights, prototypes, labels, order and views (default: %(default)s)")
    add("--short", action="store_true", help="fewer steps, for CI")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (20 if options.short else 200)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    console = Console()
    if not torch.cuda.is_available():
        console.print("CUDA graphs need an NVIDIA GPU, and torch sees none here. Nothing was run.")
        return
    device = torch.device("cuda")
    data = load_data(labelled_fraction=0.1, seed=options.seed)
    torch.manual_seed(options.seed)
    encoder = make_encoder()
    eager, graphed = (Trainer(copy.deepcopy(encoder), options.batch_size, device, options.seed) for _ in range(2))
    replay = graphed.captured()
    columns = (TextColumn("{task.description:10}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        expected = losses(eager, eager.step, data, options, progress)
        found = losses(graphed, replay, data, options, progress)
    difference = float((found - expected).abs().max())
    rounds = [(milliseconds(eager.step, options.steps), milliseconds(replay, options.steps)) for _ in range(ROUNDS)]
    of_eager, of_graph = (statistics.median(times) for times in zip(*rounds, strict=True))

    table = Table(title=f"A training step, {options.batch_size} digits, on {torch.cuda.get_device_name()}")
    table.add_column("")
    table.add_column("eager", justify="right")
    table.add_column("CUDA graph", justify="right")
    table.add_row("loss of the last step", f"{expected[-1]:.6f}", f"{found[-1]:.6f}")
    table.add_row(f"milliseconds per step, median of {ROUNDS} rounds", f"{of_eager:.3f}", f"{of_graph:.3f}")
    console.print(table)
    console.print(f"The losses of {options.steps} steps differ by at most {difference:.1e}.")
    if not difference <= 1e-3 * float(expected.abs().max()):
        raise SystemExit("The graph does not train like the eager steps.")


if __name__ == "__main__":
    main()
