"""What the loss over a process group costs a rank: bytes received, peak memory, and time.

    python -m benchmarks.distributed measure --output build/distributed    # gloo processes on this CPU
    python -m benchmarks.distributed plan --output build/distributed       # a model of many GPUs; it measures nothing

``measure`` counts the bytes that collectives move, as a ring of ranks moves them: in an all-gather, a rank receives everything
but its own part; in an all-reduce, twice that share. Since all ranks share one CPU, times say little. The table has them as
multiples of the time of "gather", from runs in turn.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import statistics
import sys
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

from . import leave_interrupts_to_parent, measure, providers
from .results import commit_name, device_name

LossOfViews = Callable[[Tensor, Tensor], Tensor]
TEMPERATURE = 0.1


# ---- losses ----------------------------------------------------------------------------------------------------------


def strategy(name: str) -> LossOfViews:
    group = distributed.group.WORLD
    return lambda x, y: clop_kernels.ntxent_loss(torch.cat([x, y]), temperature=TEMPERATURE, group=group, strategy=name)


def lightly() -> LossOfViews:
    """lightly's loss: an all-gather of the rows forward, and an all-reduce of all rows' gradients backward."""
    loss: LossOfViews = providers.lightly_loss()(temperature=TEMPERATURE, gather_distributed=True)
    return loss


LOSSES: dict[str, Callable[[], LossOfViews]] = {
    "gather": lambda: strategy("gather"),
    "ring": lambda: strategy("ring"),
    "lightly": lightly,
}


@dataclass(frozen=True)
class Row:
    """One loss with one number of ranks: NT-Xent of two views, float32. Bytes and MB are those of the rank with the most."""

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
    """The bytes that this rank received within :func:`counted`."""

    n_bytes = 0

    def add(self, share: float, *tensors: Tensor) -> None:
        self.n_bytes += round(share * sum(tensor.numel() * tensor.element_size() for tensor in tensors))


@contextmanager
def counted(group: distributed.ProcessGroup | None = None) -> Iterator[Received]:
    """Counts the bytes that a group's collectives move, from the sizes of their tensors. None is the default group."""
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
    """Bytes of NT-Xent in float32, forward and backward, without the few bytes of the header and of sums."""
    others = (world - 1) * rows_per_rank
    forward = 4 * others * width
    return forward, {"gather": 8 * others, "ring": others * (4 * width + 8), "lightly": 2 * forward}[name]


# ---- worlds ------------------------------------------------------------------------------------------------------------


def that_fit(world: int, rows_per_rank: int) -> list[str]:
    """The losses that fit into memory. lightly's needs about 17 bytes per pair of rows, for all ranks on one machine."""
    available = measure._available_mb(torch.device("cpu"))
    takes = 17e-6 * (world * rows_per_rank) ** 2
    fits = available is None or takes < measure.LARGEST_SHARE * available
    return [name for name in LOSSES if name != "lightly" or fits]


def serve(
    rank: int, world: int, losses: list[str], store: str, rows_per_rank: int, width: int, repeats: int, answers: Connection
) -> None:
    """Runs one rank. Sends (bytes forward, bytes backward, peak in MB, times) for each loss."""
    leave_interrupts_to_parent()
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    generator = torch.Generator().manual_seed(rank)
    views = tuple(torch.randn(rows_per_rank // 2, width, generator=generator).requires_grad_() for _ in range(2))
    steps = {}
    for name in losses:
        loss = LOSSES[name]()
        loss(*(torch.randn(8, width) for _ in range(2)))  # loads libraries and makes connections
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
            theirs.close()  # a rank that dies then closes its pipe, which ends recv
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
        caption="ranks: number of processes. rows: per rank. forward, backward: MB that a rank receives. formulas: the predicted "
        "MB, forward and backward. peak: a rank's memory above the inputs, in MB. time: as a multiple of the time of gather",
    )
    for name in ("loss", "ranks", "rows", "forward", "backward", "formulas", "peak", "time"):
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

LABELS = {"gather": 'clop_kernels, "gather"', "ring": 'clop_kernels, "ring"', "lightly": "lightly, gather_distributed"}
MARKERS = {"gather": "D", "ring": "P", "lightly": "v"}


def draw_memory(rows: list[Row], path: Path) -> None:
    """Peak memory of a rank against its number of rows: a panel per number of ranks, a line per loss."""
    matplotlib.use("agg")  # draws to a file, since there may be no screen
    worlds = sorted({row.world for row in rows})
    figure, panels = plt.subplots(
        1, len(worlds), figsize=(2 + 2.4 * len(worlds), 4.4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, world in zip(panels[0], worlds, strict=True):
        for loss, colour in COLOURS.items():
            points = sorted((row.rows_per_rank, row.peak_extra_mb) for row in rows if (row.loss, row.world) == (loss, world))
            known = [(n, mb) for n, mb in points if mb is not None]
            if known:
                axes.plot(*zip(*known, strict=True), color=colour, marker=MARKERS[loss], label=LABELS[loss])
        axes.set_title("1 rank" if world == 1 else f"{world} ranks", fontsize=11)
        axes.set_xlabel("rows per rank")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted({row.rows_per_rank for row in rows}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.margins(x=0.15)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("peak above the inputs, MB per rank")
    figure.suptitle(
        f"Memory of one rank: NT-Xent over a process group, forward + backward, float32, D = {rows[0].D}\n"
        "(a missing point did not fit into memory)",
        fontsize=12,
    )
    found = {label: line for axes in panels[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    by_height = sorted(LABELS, key=lambda loss: -max((r.peak_extra_mb or 0.0 for r in rows if r.loss == loss), default=0.0))
    labels = [LABELS[loss] for loss in by_height if LABELS[loss] in found]
    figure.legend([found[label] for label in labels], labels, frameon=False, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- a model -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """The assumptions of the model. Nothing of it was measured here.

    Attributes:
        tflops: Speed of a GPU in the passes over pairs, which count as 6 n N D flops.
        node: Number of GPUs that share the fast links.
        gb_within, gb_between: 10^9 bytes per second, GPU and direction, within a node and between nodes.
    """

    tflops: float
    node: int
    gb_within: float
    gb_between: float

    def bandwidth(self, n_gpus: int) -> float:
        return 1e9 * (self.gb_within if n_gpus <= self.node else self.gb_between)


@dataclass(frozen=True)
class Plan:
    """A batch on a cluster, with the memory (GB) and the time (milliseconds) of each GPU."""

    n_rows: int
    n_gpus: int
    gather_gb: float
    ring_gb: float
    compute_ms: float
    gather_ms: float
    ring_ms: float

    @property
    def gather_step_ms(self) -> float:
        """Assumes no overlap. The real step overlaps the pass over the rank's own rows, a share of 1 / n_gpus."""
        return self.compute_ms + self.gather_ms

    @property
    def ring_step_ms(self) -> float:
        """Assumes full overlap of computing and communication."""
        return max(self.compute_ms, self.ring_ms)


def planned(n_rows: int, n_gpus: int, width: int, itemsize: int, cluster: Cluster) -> Plan:
    n = n_rows / n_gpus
    others, bandwidth = n_rows - n, cluster.bandwidth(n_gpus)
    rows = n * width * itemsize
    sums = n * width * (4 + itemsize)  # the gradient in float32, and in the dtype of the rows
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
        title=f"A MODEL, not measured. Assumes {cluster.tflops:g} Tflop/s per GPU, and links of {cluster.gb_within:g} GB/s among "
        f"{cluster.node} GPUs and {cluster.gb_between:g} GB/s beyond. D = {width}, {itemsize} bytes per number"
    )
    columns = ["rows", "GPUs", "rows per GPU", "GB, gather", "GB, ring"]
    columns += ["ms: products", "links, gather", "links, ring", "step, gather", "step, ring"]
    for name in columns:
        table.add_column(name, justify="right")
    for plan in rows:
        cells = [f"{plan.n_rows // 2**20} M", str(plan.n_gpus), str(plan.n_rows // plan.n_gpus), f"{plan.gather_gb:.2f}"]
        cells += [f"{plan.ring_gb:.2f}", f"{plan.compute_ms:.0f}", f"{plan.gather_ms:.1f}", f"{plan.ring_ms:.1f}"]
        table.add_row(*cells, f"{plan.gather_step_ms:.0f}", f"{plan.ring_step_ms:.0f}")
    table.caption = (
        "Times in ms. products: computing. links: communication. step, gather: their sum. step, ring: the larger of the two"
    )
    return table


# ---- commands --------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distributed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="measures bytes, memory and time with processes on this CPU")
    measuring.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of ranks (1 2 4 8)")
    measuring.add_argument(
        "--rows", type=int, nargs="+", default=[1024, 2048, 4096], help="rows per rank, both views (1024 2048 4096)"
    )
    measuring.add_argument("--width", type=int, default=128, help="width of the embeddings (default: %(default)s)")
    measuring.add_argument("--repeats", type=int, default=5, help="timed runs of each loss (default: %(default)s)")
    measuring.add_argument("--output", type=Path, help="folder for cpu.csv and memory.png (default: none)")
    planning = commands.add_parser("plan", help="models 1 M and 8 M rows on 8 to 512 GPUs")
    planning.add_argument("--tflops", type=float, default=400.0, help="assumed speed of a GPU (default: %(default)s)")
    planning.add_argument("--node", type=int, default=8, help="GPUs that share the fast links (default: %(default)s)")
    planning.add_argument("--gb-within", type=float, default=450.0, help="GB/s per GPU within a node (default: %(default)s)")
    planning.add_argument("--gb-between", type=float, default=50.0, help="GB/s per GPU between nodes (default: %(default)s)")
    planning.add_argument("--width", type=int, default=512, help="width of the embeddings (default: %(default)s)")
    planning.add_argument("--itemsize", type=int, default=2, help="bytes per number, 2 for bfloat16 (default: %(default)s)")
    planning.add_argument("--output", type=Path, help="folder for model.csv (default: none)")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
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
    rows: list[Row] = []
    try:
        for world, n in track(cases, "measuring"):
            rows += measured(world, n, options.width, options.repeats)
    finally:  # an interruption keeps the cases that were finished
        if rows:
            console.print(table_of(rows))
        if rows and options.output is not None:
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
