"""How large a gradient step can embeddings take? Compares the bound of a simplified model of InfoNCE with the real loss.

The model assumes merged positives and a nearly uniform softmax. The gradient of the sum-reduced loss is then 2 / tau * mean, the
same for all unit embeddings. A step mu multiplies the mean by (1 - 2 mu / tau). The mean contracts if and only if 0 < mu < tau;
that limit is ``clop_kernels.critical_learning_rate``. With larger steps the embeddings align, to rank 1.

The script takes steps with the model, and with the gradient of NT-Xent through its normalisation. Positives are merged, or views
differ. It shows where model and loss disagree:

- The model behaves as predicted: its mean vanishes below tau, and above tau all embeddings have one direction, of rank 1.
- NT-Xent with merged positives has the threshold if its softmax is nearly uniform (at 1.05 tau with tau = 0.5). If it is not
  (tau = 0.1), there is no threshold up to 2 tau. Above the threshold the mean remains, but nothing collapses: the closer the
  embeddings are to one direction, the smaller is the gradient along the sphere, and it points away from that direction. The
  effective rank stays above 29 of 32.
- Positives do not stay merged. The model leaves out their attraction: a step multiplies the difference of two views by about
  1 - 4 mu / tau. Views therefore meet only up to tau / 2 (1.1 tau with tau = 0.1), where the mean contracts fastest. With larger
  steps, the views separate, but the mean does not grow.

It also shows that equal or collinear embeddings are stationary points of the loss, but not minima. The results are two tables, a
figure (learning_rate_bound.png), and a CSV file beside it::

    python examples/learning_rate_bound.py
    python examples/learning_rate_bound.py --short     # the same, small and quick, for CI
    python examples/learning_rate_bound.py --help

Everything runs on one core of a CPU and takes half a minute.
"""

from __future__ import annotations

import script  # noqa: F401

# isort: split
import argparse
import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from arguments import COUNT, SEED, number, png
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from clop_kernels import alignment, critical_learning_rate, effective_rank, mean_resultant_length, ntxent_loss

WIDTH = 32
OFFSET = 0.5
"""Offset of the first embeddings along one direction. It gives them a mean to contract, of length 0.44."""
LEAST_STEP, MOST_STEP = 0.1, 2.0
"""Range of steps, in units of the critical step."""

COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colours of Okabe and Ito, which colour-blind readers can tell apart. Black is the model."""


@dataclass(frozen=True)
class Point:
    """The result of one simulation with one step size."""

    step: float
    """mu / critical_learning_rate."""
    mean: float
    rank: float
    positive_cosine: float


@dataclass
class Simulation:
    """``run(mu)`` returns the embeddings of two views, (2 B, D), after all steps of size mu."""

    name: str
    temperature: float
    views: str
    run: Callable[[float], Tensor]
    style: dict[str, object]
    points: list[Point] = field(default_factory=list)

    def measure(self, step: float) -> None:
        z = self.run(step * critical_learning_rate(self.temperature, reduction="sum"))
        self.points.append(Point(step, mean_resultant_length(z), effective_rank(z), 1 - alignment(z) / 2))

    def last(self, holds: Callable[[Point], bool]) -> float | None:
        """The end of the first range of step sizes for which it holds. The smallest sizes may need more steps than there are."""
        last = None
        for point in self.points:
            if holds(point):
                last = point.step
            elif last is not None:
                break
        return last


# ---- the two dynamics -----------------------------------------------------------------------------------------------


def first_embeddings(n_instances: int, seed: int) -> Tensor:
    """(B, D) unit rows: uniform on the sphere, then moved along the first axis. Everything is computed in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = normalize(torch.randn(n_instances, WIDTH, generator=generator, dtype=torch.float64), dim=1)
    x[:, 0] += OFFSET
    return normalize(x, dim=1)


def two_views(x: Tensor, noise: float, seed: int) -> Tensor:
    """(B, D) -> (2 B, D): each row twice, with added noise. ``noise`` is its length relative to the row's."""
    generator = torch.Generator().manual_seed(seed)
    views = x.repeat(2, 1)
    return normalize(views + noise / WIDTH**0.5 * torch.randn(views.shape, generator=generator, dtype=x.dtype), dim=1)


def model(z: Tensor, temperature: float, n_steps: int, mu: float, *, on_sphere: bool) -> Tensor:
    for _ in range(n_steps):
        z = z - mu * 2 / temperature * z.mean(0)
        if on_sphere:
            z = normalize(z, dim=1)
    return z


def loss_and_gradient(z: Tensor, temperature: float) -> tuple[float, Tensor]:
    """NT-Xent summed over rows. Its gradient is tangent to the sphere, because the loss normalises the rows itself."""
    z = z.detach().requires_grad_()
    loss = ntxent_loss(z, temperature=temperature, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.item(), gradient


def descend(z: Tensor, temperature: float, n_steps: int, mu: float) -> Tensor:
    """Takes gradient steps, and normalises rows after each. Otherwise rows would grow, and the same mu would move them less."""
    for _ in range(n_steps):
        z = normalize(z - mu * loss_and_gradient(z, temperature)[1], dim=1)
    return z


def simulations(options: argparse.Namespace) -> list[Simulation]:
    x, n_steps, tau = first_embeddings(options.instances, options.seed), options.steps, options.temperatures[0]
    merged, differing = two_views(x, 0, options.seed), two_views(x, options.view_noise, options.seed)

    def of_model(name: str, on_sphere: bool, **style: object) -> Simulation:
        return Simulation(name, tau, "merged views", lambda mu: model(merged, tau, n_steps, mu, on_sphere=on_sphere), style)

    def of_loss(tau: float, views: str, z: Tensor, **style: object) -> Simulation:
        return Simulation(f"NT-Xent, tau {tau:g}, {views}", tau, views, lambda mu: descend(z, tau, n_steps, mu), style)

    runs = [
        of_model("model", False, color="#bbbbbb", linewidth=6),
        of_model("model, on the sphere", True, color="black", linewidth=1.5, linestyle=(0, (4, 2))),
    ]
    for tau_, color in zip(options.temperatures, COLORS, strict=False):
        runs.append(of_loss(tau_, "merged views", merged, color=color, marker="o", markersize=4))
        runs.append(
            of_loss(
                tau_, "differing views", differing, color=color, marker="s", markersize=4, linestyle=":", markerfacecolor="white"
            )
        )
    return runs


# ---- stationary points ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stationarity:
    """One arrangement of the embeddings: the norm of the gradient, and how the summed loss changes if rows move."""

    name: str
    temperature: float
    gradient: float
    instances_moved: float
    views_moved_apart: float


def stationarity(options: argparse.Namespace, size: float = 0.01) -> Iterator[Stationarity]:
    """Moves have length ``size``, orthogonal to the line. Instances move randomly; their two views move alike or opposite."""
    n_instances = options.instances
    generator = torch.Generator().manual_seed(options.seed)
    line = normalize(torch.randn(1, WIDTH, generator=generator, dtype=torch.float64), dim=1)
    signs = torch.randint(2, (2 * n_instances, 1), generator=generator, dtype=torch.float64) * 2 - 1
    move = torch.randn(n_instances, WIDTH, generator=generator, dtype=torch.float64)
    move = size * normalize(move - move @ line.T * line, dim=1)
    arrangements = {
        "all equal": line.repeat(2 * n_instances, 1),
        "+- by instance": signs[:n_instances].repeat(2, 1) * line,
        "+- by row": signs * line,
        "(random)": two_views(first_embeddings(n_instances, options.seed), options.view_noise, options.seed),
    }
    for name, z in arrangements.items():
        for tau in options.temperatures:
            loss, gradient = loss_and_gradient(z, tau)
            moved = [loss_and_gradient(z + torch.cat([move, sign * move]), tau)[0] - loss for sign in (1, -1)]
            yield Stationarity(name, tau, float(gradient.norm()), *moved)


# ---- output ---------------------------------------------------------------------------------------------------------


def table_of_steps(runs: list[Simulation], n_steps: int) -> Table:
    table = Table(title=f"Embeddings after {n_steps} steps of size mu", caption_justify="left")
    table.caption = (
        f"mu ranges from {LEAST_STEP} to {MOST_STEP} tau; tau is critical. Columns: the largest mu for which the mean vanishes "
        "(|mean| < 0.05), the largest mu for which differing views meet (cosine > 0.99), and the largest |mean| and the smallest "
        "effective rank for any mu."
    )
    for name in ("", "mean vanishes up to", "views meet up to", "largest |mean|", "smallest rank"):
        table.add_column(name, justify="right" if name else "left")
    for run in runs:
        vanishes = in_tau(run.last(lambda point: point.mean < 0.05))
        meet = in_tau(run.last(lambda point: point.positive_cosine > 0.99)) if run.views == "differing views" else ""
        most, least = max(point.mean for point in run.points), min(point.rank for point in run.points)
        table.add_row(run.name, vanishes, meet, f"{most:.3f}", f"{least:.2f} / {WIDTH}")
    return table


def in_tau(step: float | None) -> str:
    return "never" if step is None else f"{step:.2f} tau"


def table_of_stationarity(rows: list[Stationarity]) -> Table:
    table = Table(title="Equal and collinear embeddings are stationary, but not minima", caption_justify="left")
    table.caption = (
        "The summed loss in float64: the norm of its gradient, and its change if each instance moves by 0.01 off the line in its "
        "own direction. Its two views move together, or apart in opposite directions."
    )
    for name in ("embeddings", "tau", "|gradient|", "instances move", "views move apart"):
        table.add_column(name, justify="left" if name == "embeddings" else "right")
    for row in rows:
        moves = f"{row.instances_moved:+.2e}", f"{row.views_moved_apart:+.2e}"
        table.add_row(row.name, f"{row.temperature:g}", f"{row.gradient:.1e}", *moves)
    return table


def draw(runs: list[Simulation], n_steps: int, output: Path) -> None:
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"axes.titleweight": "bold", "axes.titlesize": 12})
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(16, 6), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    )
    for run in runs:
        steps = [point.step for point in run.points]
        style = {"linewidth": 1.5} | run.style
        left.plot(steps, [point.mean for point in run.points], label=run.name, **style)
        middle.plot(steps, [point.rank for point in run.points], **style)
        if run.views == "differing views":
            right.plot(steps, [point.positive_cosine for point in run.points], **style)
    left.set(title="Does the mean vanish?", ylabel=f"|mean of the unit embeddings| after {n_steps} steps", ylim=(-0.03, 1.03))
    middle.set(
        title="Do the embeddings collapse, to rank 1?",
        ylabel=f"effective rank after {n_steps} steps, of {WIDTH}",
        ylim=(0, WIDTH + 1),
    )
    right.set(title="Do the views of an instance meet?", ylabel="cosine of the two views of an instance", ylim=(-0.03, 1.03))
    for axes in (left, middle, right):
        axes.set(xlabel=r"step $\mu$ / $\tau$", xlim=(0, 1.02 * MOST_STEP))
        mark(axes, 1, r"critical: $\mu = \tau$", height=0.65 if axes is left else 0.2)
    mark(right, 0.5, r"$\mu = \tau / 2$", height=0.2)
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(output)
    plt.close(figure)


def mark(axes: Axes, step: float, text: str, height: float) -> None:
    axes.axvline(step, color="gray", linewidth=1, zorder=0)
    low, high = axes.get_ylim()
    label = axes.annotate(text, (step, low + height * (high - low)), (-5, 0), textcoords="offset points", rotation=90, ha="right")
    label.set(va="center", color="#555555")
    label.set_path_effects([withStroke(linewidth=3, foreground="white")])


def write(runs: list[Simulation], n_steps: int, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "simulation",
                "temperature",
                "views",
                "steps",
                "mu_over_tau",
                "mean_resultant_length",
                "effective_rank",
                "positive_cosine",
            ]
        )
        for run in runs:
            for point in run.points:
                numbers = (f"{value:.6g}" for value in (point.step, point.mean, point.rank, point.positive_cosine))
                writer.writerow([run.name, run.temperature, run.views, n_steps, *numbers])


# ---- command line ---------------------------------------------------------------------------------------------------


def temperatures(text: str) -> list[float]:
    parse = number(float, lambda t: 0 < t < math.inf, "positive finite numbers, separated by commas")
    values = [parse(part) for part in text.split(",")]
    if len(values) > len(COLORS):
        raise argparse.ArgumentTypeError(f"{text!r}: expected at most {len(COLORS)} temperatures")
    return values


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    instances = number(int, lambda n: n >= 2, "an integer of at least 2")
    points = number(int, lambda n: n >= 2, "an integer of at least 2")
    noise = number(float, lambda f: 0 <= f < math.inf, "a finite number of at least 0")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--temperatures", type=temperatures, default="0.5,0.1", help="temperatures tau of NT-Xent (default: %(default)s)")
    add("--instances", type=instances, help=f"instances, with two views of width {WIDTH} each (default: 256; 64 with --short)")
    add("--steps", type=COUNT, help="gradient steps of each simulation (default: 100; 50 with --short)")
    add("--points", type=points, help=f"number of step sizes, from {LEAST_STEP} to {MOST_STEP} tau (default: 39; 6 with --short)")
    add(
        "--view-noise",
        type=noise,
        default=0.5,
        help="length of the noise of differing views, relative to a row (default: %(default)s)",
    )
    add("--seed", type=SEED, default=0, help="seed of embeddings and views (default: %(default)s)")
    add(
        "--output",
        type=png,
        default="learning_rate_bound.png",
        help="path of the figure; the CSV file goes beside it (default: %(default)s)",
    )
    add("--short", action="store_true", help="a small and quick run, for CI")
    options = parser.parse_args(arguments)
    short = options.short
    options.instances = options.instances or (64 if short else 256)
    options.steps = options.steps or (50 if short else 100)
    options.points = options.points or (6 if short else 39)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    matplotlib.use("Agg")  # draws to a file, never to a window
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    console = Console()
    runs = simulations(options)
    columns = (TextColumn("{task.description:42}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for run in runs:
            steps = torch.linspace(LEAST_STEP, MOST_STEP, options.points).tolist()
            for step in progress.track(steps, description=run.name):
                run.measure(step)

    table = options.output.with_suffix(".csv")
    write(runs, options.steps, table)
    draw(runs, options.steps, options.output)
    for part in (table_of_steps(runs, options.steps), table_of_stationarity(list(stationarity(options)))):
        console.print(part)
    console.print(f"Figure: {options.output}   Numbers: {table}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
