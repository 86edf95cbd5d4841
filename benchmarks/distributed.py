"""What the loss over a process group costs a rank: bytes received, peak memory, and time beside another strategy or library.

    python -m benchmarks.distributed measure --output build/distributed    # worlds of gloo processes on this CPU
    python -m benchmarks.distributed plan --output build/distributed       # a model of many GPUs; nothing of it is measured

``measure`` counts what the collectives move, by their own sizes, as rings of ranks move it: of an all-gather a rank receives all
but its own part, of an all-reduce twice that share. On a CPU that all ranks share, times say little: they are given as multiples
of "gather"'s, from runs in turn.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, distributed

import clop_kernels

from . import measure, providers
from .results import commit_name, device_name

LossOfViews = Callable[[Tensor, Tensor], Tensor]
TEMPERATURE = 0.1


# ---- what is measured ------------------------------------------------------------------------------------------------


def strategy(name: str) -> LossOfViews:
    group = distributed.group.WORLD
    return lambda x, y: clop_kernels.ntxent_loss(torch.cat([x, y]), temperature=TEMPERATURE, group=group, strategy=name)


def lightly() -> LossOfViews:
    """Gathers rows with their gradient: an all-gather forward, an all-reduce of all rows' gradients backward."""
    loss: LossOfViews = providers.lightly_loss()(temperature=TEMPERATURE, gather_distributed=True)
    return loss


LOSSES: dict[str, Callable[[], LossOfViews]] = {
    "gather": lambda: strategy("gather"),
    "ring": lambda: strategy("ring"),
    "lightly": lightly,
}


@dataclass(frozen=True)
class Row:
    """One loss in one world: NT-Xent of two views, forward and backward, float32. Bytes and MB are the largest of a rank."""

    loss: str
    world: int
    rows_per_rank: int
    D: int
    forward_bytes: int
    backward_bytes: int
    peak_extra_mb: float | None
    time_over_gather: float
    device: str
    torch: str
    commit: str
    date: str


# ---- bytes -------------------------------------------------------------------------------------------------------------


class Received:
    """Bytes that this rank has received within :func:`counted`."""

    n_bytes = 0

    def add(self, share: float, *tensors: Tensor) -> None:
        self.n_bytes += round(share * sum(tensor.numel() * tensor.element_size() for tensor in tensors))


@contextmanager
def counted(group: distributed.ProcessGroup | None = None) -> Iterator[Received]:
    """Counts what the collectives of a group, None: the default one, move, by the sizes of the tensors that they are given."""
    received = Received()
    world = distributed.get_world_size(group)
    others = (world - 1) / world

    def counting(function: Callable[..., Any], count: Callable[..., None]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count(*args, **kwargs)
            return function(*args, **kwargs)

        return call

    def gathered(output: Tensor, *_: Any, **__: Any) -> None:
        received.add(others, output)

    def reduced(tensor: Tensor, *_: Any, **__: Any) -> None:
        received.add(2 * others, tensor)

    def listed(outputs: list[Tensor], *_: Any, **__: Any) -> None:
        received.add(others, *outputs)

    def passed_on(operations: list[distributed.P2POp]) -> None:
        received.add(1, *(each.tensor for each in operations if each.op is distributed.irecv))

    counts: dict[tuple[Any, str], Callable[..., None]] = {
        (clop_kernels.collectives, "_all_gather_single"): gathered,
        (distributed, "all_reduce"): reduced,
        (distributed, "all_gather"): listed,
        (distributed, "batch_isend_irecv"): passed_on,
    }
    originals = {place: getattr(*place) for place in counts}
    for (module, name), count in counts.items():
        setattr(module, name, counting(originals[module, name], count))
    try:
        yield received
    finally:
        for (module, name), original in originals.items():
            setattr(module, name, original)


def received_by_formula(name: str, world: int, rows_per_rank: int, width: int) -> tuple[int, int]:
    """Forward and backward, of NT-Xent in float32: clop_kernels/distributed.py, less the header and sums of a few bytes."""
    others = (world - 1) * rows_per_rank
    forward = 4 * others * width
    return forward, {"gather": 8 * others, "ring": others * (4 * width + 8), "lightly": 2 * forward}[name]


# ---- worlds ------------------------------------------------------------------------------------------------------------


def that_fit(world: int, rows_per_rank: int) -> list[str]:
    """Losses to measure: lightly's takes about 17 bytes a pair of rows, here of all ranks on one machine."""
    available = measure._available_mb(torch.device("cpu"))
    takes = 17e-6 * (world * rows_per_rank) ** 2
    fits = available is None or takes < measure.LARGEST_SHARE * available
    return [name for name in LOSSES if name != "lightly" or fits]


def serve(
    rank: int, world: int, losses: list[str], store: str, rows_per_rank: int, width: int, repeats: int, answers: Connection
) -> None:
    """One rank: sends (bytes forward, bytes backward, peak in MB, times) of each loss."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    generator = torch.Generator().manual_seed(rank)
    views = tuple(torch.randn(rows_per_rank // 2, width, generator=generator).requires_grad_() for _ in range(2))
    steps = {}
    for name in losses:
        loss = LOSSES[name]()
        loss(*(torch.randn(8, width) for _ in range(2)))  # libraries are loaded, connections made
        steps[name] = measure.Step(lambda x, y, _, loss=loss: loss(x, y), views, "forward+backward", TEMPERATURE)
    results = {}
    for name, step in steps.items():
        with counted() as forward:
            value = step.function(*views, TEMPERATURE)
        with counted() as backward:
            value.backward()
        del value
        step.prepare()
        distributed.barrier()
        results[name] = [forward.n_bytes, backward.n_bytes, measure.peak_extra_mb(step)]
    seconds = measure.alternate(steps, repeats, before_each=lambda name: distributed.barrier())
    answers.send({name: (*result, seconds[name]) for name, result in results.items()})
    distributed.destroy_process_group()


def measured(world: int, rows_per_rank: int, width: int, repeats: int) -> list[Row]:
    context = multiprocessing.get_context("spawn")
    losses = that_fit(world, rows_per_rank)
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=serve, args=(rank, world, losses, f"{folder}/store", rows_per_rank, width, repeats, pipe), daemon=True
            )
            for rank, (_, pipe) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()  # so that a rank that dies is an end of its pipe here
        answers = [ours.recv() for ours, _ in pipes]
        for process in processes:
            process.join()
    rows = []
    of_gather = [statistics.median(answer["gather"][3]) for answer in answers]
    for name in losses:
        forward, backward, peaks, seconds = zip(*(answer[name] for answer in answers), strict=True)
        ratios = [statistics.median(own) / gather for own, gather in zip(seconds, of_gather, strict=True)]
        rows.append(
            Row(
                name, world, rows_per_rank, width, max(forward), max(backward), None if None in peaks else max(peaks),
                round(statistics.median(ratios), 3), device_name(torch.device("cpu")), torch.__version__, commit_name(),
                datetime.now(UTC).isoformat(timespec="seconds"),
            )
        )  # fmt: skip
    return rows


def table_of(rows: list[Row]) -> Table:
    table = Table(
        title=f"NT-Xent over a process group, forward and backward, float32, D = {rows[0].D}",
        caption="rows: of a rank. forward, backward: MB that it receives; formulas: the same as predicted. peak: its memory "
        "above the inputs, MB. time: as a multiple of gather's",
    )
    for name in ("loss", "world", "rows", "forward", "backward", "formulas", "peak", "time"):
        table.add_column(name, justify="left" if name == "loss" else "right", no_wrap=True)
    for row in rows:
        formula = received_by_formula(row.loss, row.world, row.rows_per_rank, row.D)
        cells = [row.loss, str(row.world), str(row.rows_per_rank)]
        cells += [f"{n_bytes / 1e6:.2f}" for n_bytes in (row.forward_bytes, row.backward_bytes)]
        cells += [" ".join(f"{n_bytes / 1e6:.2f}" for n_bytes in formula)]
        peak = "" if row.peak_extra_mb is None else f"{row.peak_extra_mb:.0f}"
        table.add_row(*cells, peak, f"{row.time_over_gather:.2f}")
    return table


COLOURS = {"gather": "#0072B2", "ring": "#D55E00", "lightly": "#009E73"}
"""Of Okabe and Ito, as in figures.py."""

LABELS = {"gather": 'here, "gather"', "ring": 'here, "ring"', "lightly": "lightly, gather_distributed"}
MARKERS = ("o", "s", "^", "D", "v")


def draw_memory(rows: list[Row], path: Path) -> None:
    """Peak memory of a rank against its rows, a line a loss and world."""
    matplotlib.use("agg")  # to a file: there may be no screen
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for marker, world in zip(itertools.cycle(MARKERS), sorted({row.world for row in rows}), strict=False):
        for loss, colour in COLOURS.items():
            points = sorted((row.rows_per_rank, row.peak_extra_mb) for row in rows if (row.loss, row.world) == (loss, world))
            known = [(n, mb) for n, mb in points if mb is not None]
            if known:
                label = f"{LABELS[loss]}, {world} rank{'s' if world > 1 else ''}"
                axes.plot(*zip(*known, strict=True), color=colour, marker=marker, linewidth=1, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("rows of a rank")
    axes.set_ylabel("peak above the inputs, a rank, MB")
    figure.suptitle(
        f"NT-Xent over a process group: memory of a rank, forward and backward, float32, D = {rows[0].D}", fontsize=10
    )
    axes.set_xticks(sorted({row.rows_per_rank for row in rows}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- a model -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """What the model assumes. None of it was measured here.

    Attributes:
        tflops: what a GPU reaches in the passes over pairs, by 6 n N D flops.
        node: GPUs that share the fast links.
        gb_within, gb_between: bytes a second and GPU, each way, within a node and between nodes, in 10^9.
    """

    tflops: float
    node: int
    gb_within: float
    gb_between: float

    def bandwidth(self, n_gpus: int) -> float:
        return 1e9 * (self.gb_within if n_gpus <= self.node else self.gb_between)


@dataclass(frozen=True)
class Plan:
    """A batch on a cluster: of each GPU memory in GB and milliseconds."""

    n_rows: int
    n_gpus: int
    gather_gb: float
    ring_gb: float
    compute_ms: float
    gather_ms: float
    ring_ms: float

    @property
    def gather_step_ms(self) -> float:
        """Nothing overlapped but the pass of the rank's own rows, a share of 1 / n_gpus, which is left out."""
        return self.compute_ms + self.gather_ms

    @property
    def ring_step_ms(self) -> float:
        """All overlapped."""
        return max(self.compute_ms, self.ring_ms)


def planned(n_rows: int, n_gpus: int, width: int, itemsize: int, cluster: Cluster) -> Plan:
    n = n_rows / n_gpus
    others, bandwidth = n_rows - n, cluster.bandwidth(n_gpus)
    rows = n * width * itemsize
    sums = n * width * (4 + itemsize)  # the gradient in float32, and as it leaves
    return Plan(
        n_rows,
        n_gpus,
        gather_gb=(2 * n_rows * width * itemsize + rows + sums) / 1e9,
        ring_gb=(5 * rows + sums) / 1e9,
        compute_ms=6 * n * n_rows * width / (cluster.tflops * 1e12) * 1e3,
        gather_ms=others * (width * itemsize + 8) / bandwidth * 1e3,
        ring_ms=others * (2 * width * itemsize + 8) / bandwidth * 1e3,
    )


def plans(width: int, itemsize: int, cluster: Cluster) -> list[Plan]:
    return [planned(n, gpus, width, itemsize, cluster) for n in (2**20, 2**23) for gpus in (8, 16, 32, 64, 128, 256, 512)]


def plan_table(rows: list[Plan], width: int, itemsize: int, cluster: Cluster) -> Table:
    table = Table(
        title=f"MODEL, not measured: {cluster.tflops:g} Tflop/s a GPU assumed, links of {cluster.gb_within:g} GB/s among "
        f"{cluster.node} GPUs and {cluster.gb_between:g} GB/s beyond; D = {width}, {itemsize} bytes a number"
    )
    columns = ["rows", "GPUs", "rows a GPU", "GB, gather", "GB, ring"]
    columns += ["ms: products", "links, gather", "links, ring", "step, gather", "step, ring"]
    for name in columns:
        table.add_column(name, justify="right")
    for plan in rows:
        cells = [f"{plan.n_rows // 2**20} M", str(plan.n_gpus), str(plan.n_rows // plan.n_gpus), f"{plan.gather_gb:.2f}"]
        cells += [f"{plan.ring_gb:.2f}", f"{plan.compute_ms:.0f}", f"{plan.gather_ms:.1f}", f"{plan.ring_ms:.1f}"]
        table.add_row(*cells, f"{plan.gather_step_ms:.0f}", f"{plan.ring_step_ms:.0f}")
    return table


# ---- commands --------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="bytes, memory and time of worlds on this CPU")
    measuring.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4, 8])
    measuring.add_argument("--rows", type=int, nargs="+", default=[1024, 2048, 4096], help="rows a rank, two views together")
    measuring.add_argument("--width", type=int, default=128, help="D (default: %(default)s)")
    measuring.add_argument("--repeats", type=int, default=5, help="timed runs of each, in turn (default: %(default)s)")
    measuring.add_argument("--output", type=Path, help="a folder for cpu.csv and memory.png")
    planning = commands.add_parser("plan", help="a model of 1 M and 8 M rows on 8 to 512 GPUs")
    planning.add_argument("--tflops", type=float, default=400.0, help="assumed of a GPU (default: %(default)s; not measured)")
    planning.add_argument("--node", type=int, default=8, help="GPUs that share the fast links (default: %(default)s)")
    planning.add_argument("--gb-within", type=float, default=450.0, help="GB/s a GPU within a node (default: %(default)s)")
    planning.add_argument("--gb-between", type=float, default=50.0, help="GB/s a GPU between nodes (default: %(default)s)")
    planning.add_argument("--width", type=int, default=512, help="D (default: %(default)s)")
    planning.add_argument("--itemsize", type=int, default=2, help="bytes a number: 2 for bfloat16 (default: %(default)s)")
    planning.add_argument("--output", type=Path, help="a folder for model.csv")
    options = parser.parse_args()
    console = Console()
    if options.command == "plan":
        cluster = Cluster(options.tflops, options.node, options.gb_within, options.gb_between)
        model = plans(options.width, options.itemsize, cluster)
        console.print(plan_table(model, options.width, options.itemsize, cluster))
        if options.output is not None:
            assumed = {f"assumed_{name}": value for name, value in asdict(cluster).items()}
            assumed |= {"D": options.width, "itemsize": options.itemsize}
            steps = (asdict(plan) | {"gather_step_ms": plan.gather_step_ms, "ring_step_ms": plan.ring_step_ms} for plan in model)
            write_csv([step | assumed for step in steps], options.output / "model.csv")
        return
    cases = [(world, n) for n in options.rows for world in options.worlds]
    rows = [row for world, n in track(cases, "worlds") for row in measured(world, n, options.width, options.repeats)]
    console.print(table_of(rows))
    if options.output is not None:
        write_csv([asdict(row) for row in rows], options.output / "cpu.csv")
        draw_memory(rows, options.output / "memory.png")


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
