"""examples/collapse.py: what a run is, which runs there are, and how their numbers become tables and figures."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import collapse
import collapse_figures
import matplotlib
import pandas as pd
import pytest
import torch
from collapse import BATCH_NORM, CHANGES, METHODS, PLAIN, Recipe, Settings
from torch import Tensor, nn
from train_digits import N_TRAIN


@pytest.fixture(scope="module", autouse=True)
def _drawn_into_files() -> None:
    matplotlib.use("Agg")


def test_batches_are_full_and_see_every_digit_equally_often() -> None:
    drawn = list(collapse.batches(3 * N_TRAIN // 100, 100, torch.Generator().manual_seed(0)))
    assert all(len(batch) == 100 for batch in drawn)
    seen = torch.cat(drawn).bincount(minlength=N_TRAIN)
    assert set(seen.tolist()) <= {2, 3}
    assert all(len(batch.unique()) == 100 for batch in drawn[: N_TRAIN // 100])


class Recorded(nn.Module):
    """A criterion that only takes down the weight of its prototypes."""

    def __init__(self, prototype_weight: float) -> None:
        super().__init__()
        self.prototype_weight = prototype_weight
        self.weights: list[float] = []

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        self.weights.append(self.prototype_weight)
        return z.sum()


def test_warm_up_and_clipping() -> None:
    data = collapse.digits(0.1, 0)
    settings = Settings("CLOP, 10% labels", PLAIN, 0.5, N_TRAIN // 10, 2, 0)

    def train(recipe: Recipe) -> tuple[list[float], Tensor]:
        linear, criterion = nn.Linear(64, 2), Recorded(3.0)
        nn.init.zeros_(linear.weight)
        collapse.train(nn.Sequential(nn.Flatten(), linear), criterion, data, settings, recipe)  # type: ignore[arg-type]
        return criterion.weights, linear.weight.detach()

    constant, moved = train(Recipe(momentum=0.0))
    assert len(constant) == 20
    assert set(constant) == {3.0}
    warmed, _ = train(Recipe(momentum=0.0, prototype_warmup=0.5))
    assert warmed == pytest.approx([3 * min(1, step / 10) for step in range(1, 21)])
    _, clipped = train(Recipe(momentum=0.0, clip_norm=0.01))
    assert clipped.norm() <= 20 * 0.5 * 0.01 * 1.001 < moved.norm()
    _, slower = train(Recipe(momentum=0.0, warmup=1.0))
    assert slower.norm() == pytest.approx(float(moved.norm()) * 10.5 / 20, rel=0.1)  # mean of 1/20 ... 20/20


@pytest.mark.parametrize(("method", "change"), [("CLOP, 10% labels", BATCH_NORM), ("SupCon, 100% labels", PLAIN)])
def test_a_run_is_its_seed_and_learns(method: str, change: str) -> None:
    settings = Settings(method, change, 0.1, 256, 2, 0)
    row = collapse.run(settings)
    assert row == collapse.run(settings)
    untrained = collapse.run(Settings(method, change, 0.0, 256, 2, 0))
    assert math.isnan(untrained["last_loss"])  # type: ignore[arg-type]
    assert row["mean_cosine"] < untrained["mean_cosine"] - 0.05  # type: ignore[operator]
    assert ("nearest_prototype_accuracy" in row) == METHODS[method].has_prototypes


def test_a_run_that_diverges_is_a_row_that_says_so() -> None:
    row = collapse.run(Settings("NT-Xent", PLAIN, 1e30, 256, 1, 0))
    assert row["finite"] == 0
    assert "effective_rank" not in row


def options(*arguments: str, folder: Path) -> argparse.Namespace:
    return collapse.parse_arguments([*arguments, "--output", str(folder)])


def test_the_plan_has_every_run_once(tmp_path: Path) -> None:
    runs = collapse.plan(options("--seeds", "2", folder=tmp_path))
    assert len(runs) == len(set(runs)) == 2 * (2 + 5 * 2 * 5 * 6 + (len(CHANGES) - 2) * 5)
    assert len({settings.method for settings in runs}) == len(METHODS)
    few = collapse.plan(options("--changes", "none", "--batch-sizes", "64,32", "--seeds", "1", folder=tmp_path))
    assert {settings.change for settings in few} == {PLAIN, BATCH_NORM}
    assert few[0].batch_size == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--learning-rates", "0.1,-1"), "'-1': expected positive finite numbers"),
        (("--batch-sizes", "1"), "'1': expected integers from 2 to 1347"),
        (("--seeds", "0"), "'0': expected an integer of at least 1"),
        (("--redraw",), "there is no .*collapse.csv; run without --redraw first"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(*arguments, folder=tmp_path)
    assert re.search(message, capsys.readouterr().err)


def results() -> pd.DataFrame:
    """Two seeds of everything; where the learning rate is 10, every other run of NT-Xent has diverged."""
    rows = []
    settings = collapse.plan(options("--seeds", "2", "--batch-sizes", "64,256", "--learning-rates", "0.1,1,10", folder=Path()))
    for s in settings:
        numbers = dict.fromkeys(collapse_figures.METRICS, 0.5 + 0.2 * s.seed)
        if not METHODS[s.method].has_prototypes:
            del numbers[collapse_figures.OF_PROTOTYPES]
        is_finite = not (s.method == "NT-Xent" and s.learning_rate == 10 and s.seed == 1)
        rows.append({**vars(s), **(numbers if is_finite else dict.fromkeys(numbers)), "finite": int(is_finite)})
    return collapse.in_order(pd.DataFrame(rows)).astype({"change": str, "method": str})


def test_cells_are_mean_and_spread_and_count_what_diverged() -> None:
    metric = collapse_figures.Metric("accuracy, %", 1, scale=100)
    assert metric.cell(pd.Series([0.5, 0.6, 0.7])) == "60.0 ± 10.0"
    assert metric.cell(pd.Series([0.5])) == "50.0"
    assert metric.cell(pd.Series([0.5, math.nan])) == "50.0 (1 diverged)"
    assert metric.cell(pd.Series([math.nan, math.nan])) == "(2 diverged)"


def test_tables() -> None:
    found = {numbers.title: numbers for numbers in collapse_figures.tables(results())}
    by_rate = found["effective rank, without BatchNorm, batch 256, by learning rate; untrained 0.6 ± 0.1"]
    assert list(by_rate.cells.index) == list(METHODS)
    assert list(by_rate.cells.columns) == ["0.1", "1", "10"]
    assert by_rate.cells.loc["NT-Xent"].tolist() == ["0.6 ± 0.1", "0.6 ± 0.1", "0.5 (1 diverged)"]
    prototypes = found["nearest-prototype accuracy, %, with BatchNorm, batch 256, by learning rate"]
    assert list(prototypes.cells.index) == ["CLOP, 10% labels", "CLOP, 100% labels"]
    changed = found["linear accuracy, %: CLOP, 10% labels, batch 256, changed, by learning rate"]
    assert list(changed.cells.index) == list(CHANGES)
    assert "| NT-Xent | 0.6 ± 0.1 | 0.6 ± 0.1 | 0.5 (1 diverged) |" in by_rate.markdown()


def test_figures(tmp_path: Path) -> None:
    """Without changes there is no figure of them. The docs' command draws all."""
    frame = results()
    without = frame[frame.change.isin([PLAIN, BATCH_NORM]) & (frame.method != "CLOP, 10% labels")]
    names = [path.name for path in collapse_figures.draw(without, tmp_path)]
    assert names == [
        f"collapse-{what}.png" for what in ("overview", "learning-rate", "batch-size", "effective-rank", "linear-accuracy")
    ]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names)
