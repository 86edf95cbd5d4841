"""benchmarks.tile_sweep: what is tried, in which order, what becomes of it; and tiles.py against every committed table."""

from __future__ import annotations

import csv
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure, tile_candidates, tile_kernels, tile_sweep, tile_table
from benchmarks.tile_candidates import Group, Tile
from benchmarks.tile_kernels import Compiled, Sizes
from benchmarks.tile_sweep import Checked, Sweep, Timed
from benchmarks.tile_table import TABLES, Row, Writer, read_table

from ..support import ROOT

META = torch.device("meta")

# NumPy, which Triton's interpreter runs on, warns of what stands past the end of a tile.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

SHIPPED = Tile(128, 64, None, 8, 2)
TILES = tuple(Tile(rows, 64, None, 4, 2) for rows in (16, 32, 64, 128, 256))
GROUP = Group("gradient", "plain", "bfloat16", 128, TILES)


class FakeBench:
    """Every candidate takes a time by its rows, in order of :data:`TILES`; ``calls`` are what was asked for."""

    def __init__(self) -> None:
        self.sizes = Sizes(checked=40, first=(80, 100), others=(20, 50))
        self.calls: list[tuple[str, Tile | None, int]] = []
        self.checked = dict.fromkeys(TILES, Checked(1e-4, True))
        self.fails: set[tuple[Tile | None, int]] = set()

    def matrix_tflops(self, dtype: str) -> float | None:
        return 2e-7

    def check(self, group: Group, tile: Tile) -> Checked:
        self.calls.append(("check", tile, self.sizes.checked))
        return self.checked[tile]

    def time(self, group: Group, tile: Tile | None, n_rows: int) -> Timed:
        self.calls.append(("time", tile, n_rows))
        if (tile, n_rows) in self.fails:
            raise RuntimeError("out of resources")
        rows = 100 if tile is None else 50 + tile.block_m  # milliseconds: two candidates are faster than the shipped tile
        return Timed(1e-3 * rows * n_rows / 100, tile or SHIPPED)


COMPILED = {(GROUP, tile): Compiled(200, 0, 64.0) for tile in (None, *TILES)}


def run(bench: FakeBench, compiled: Any = COMPILED, **named: Any) -> list[Row]:
    return list(Sweep(bench, compiled, **named).run([GROUP]))


# ---- the order -------------------------------------------------------------------------------------------------------


def test_the_shipped_tile_is_timed_first_and_last() -> None:
    bench = FakeBench()
    rows = run(bench)
    timed = [(tile, n_rows) for what, tile, n_rows in bench.calls if what == "time"]
    every = list(itertools.product((None, *TILES, None), (80, 100)))
    # The three that take the least time; of 256 rows, and the shipped one's like, nobody asks again.
    best = [(tile, n_rows) for n_rows in (20, 50) for tile in (None, *TILES[:3], None)]
    assert timed == every + best
    assert [call for call in bench.calls if call[0] == "check"] == [("check", tile, 40) for tile in TILES]
    assert len(rows) == len(timed)
    assert all(row.outcome == "measured" for row in rows)
    assert sum(row.is_shipped for row in rows) == 4 + 4
    assert len(bench.calls) <= Sweep(bench, COMPILED).n_steps([GROUP])


def test_a_row_says_what_was_measured() -> None:
    first, *_, last = run(FakeBench())
    assert (first.N, first.microseconds, first.case[:4]) == (80, 80000.0, last.case[:4])
    assert (first.tile, first.registers, first.spilled_bytes, first.shared_kb) == (SHIPPED, 200, 0, 64.0)
    (row,) = (row for row in run(FakeBench()) if row.tile == TILES[0] and row.N == 100)
    assert row.microseconds == 66000.0
    assert row.share_of_matrix_rate == round(4 * 100**2 * 128 / 0.066 / 1e12 / 2e-7, 4)
    assert (row.error, row.same_bits) == (1e-4, True)
    assert row.name == "gradient plain bfloat16 D=128 N=100 16x64, 4 warps, 2 stages"


def test_what_is_no_good_is_not_timed_and_says_why() -> None:
    bench = FakeBench()
    bench.checked[TILES[0]] = Checked(0.5, True)
    bench.checked[TILES[1]] = Checked(math.nan, True)
    bench.checked[TILES[2]] = Checked(0.0, False)
    bench.fails = {(TILES[3], 100)}
    rows = run(bench, COMPILED | {(GROUP, TILES[4]): Compiled(255, 64, 100.0, "spills 64 bytes a thread")})
    found = {(row.tile, row.N): (row.outcome, row.reason) for row in rows if not row.is_shipped}
    assert found[TILES[0], 40] == ("wrong", "its result differs from the shipped tile's by a relative 5.0e-01")
    assert found[TILES[1], 40][0] == "wrong"
    assert found[TILES[2], 40] == ("wrong", "a second call gave other bits")
    assert found[TILES[3], 80] == ("measured", "")
    assert found[TILES[3], 100] == ("failed", "RuntimeError: out of resources")
    assert found[TILES[4], None] == ("rejected", "spills 64 bytes a thread")
    assert len(found) == 6
    assert not any(what == "check" and tile == TILES[4] for what, tile, _ in bench.calls)


def test_a_budget_cuts_from_the_end() -> None:
    bench = FakeBench()
    clock = iter(range(1000))

    def on_step() -> None:
        if next(clock) == 4:
            sweep.until = 0.0

    sweep = Sweep(bench, COMPILED, on_step=on_step)
    other = replace(GROUP, D=64)
    rows = list(sweep.run([GROUP, other]))
    assert [row.outcome for row in rows].index("left out") == 4  # the shipped tile and a candidate, twice each
    assert {row.outcome for row in rows[4:]} == {"left out"}
    assert {row.tile for row in rows[4:]} >= set(TILES[1:])
    assert (rows[-1].D, rows[-1].tile, rows[-1].reason) == (64, None, "the budget was spent: 5 candidates")
    assert {row.outcome for row in run(FakeBench(), {(GROUP, None): Compiled()}) if row.tile in TILES} == {"left out"}


# ---- the table -------------------------------------------------------------------------------------------------------


WHERE = {"device": "a GPU", "sm": 90, "processors": 132, "triton": "3.6.0", "commit": "abc", "date": "2026-11-28"}


def test_rows_are_in_the_file_as_they_come(tmp_path: Path) -> None:
    """A run that is killed loses nothing."""
    path = tmp_path / "tiles" / "sm_90.csv"
    writer, rows = Writer(path, WHERE), []
    for row in itertools.islice(Sweep(FakeBench(), COMPILED).run([GROUP]), 5):
        writer.add(row)
        rows.append(row)
        assert [row for row, _ in read_table(path)] == rows
    assert all(where["processors"] == "132" for _, where in read_table(path))
    again = Writer(path, WHERE | {"date": "2026-11-29"})
    again.add(rows[0])
    newest = read_table(path)
    assert [where["date"] for row, where in newest if row.case == rows[0].case] == ["2026-11-29"]
    assert len(newest) == len([row for row in rows if row.case != rows[0].case]) + 1


@pytest.mark.parametrize(
    "row", [run(FakeBench())[0], Row("softmax", "plain", "float32", 32, None, None, reason="a, b", outcome="left out")]
)
def test_rows_survive_the_text(row: Row) -> None:
    assert Row.of(row.figures()) == row
    assert Row.of({name: "" if value is None else str(value) for name, value in row.figures().items()}) == row


def test_the_end_says_which_tile_is_faster() -> None:
    rows = run(FakeBench())
    found = {case["N"]: case for case in tile_table.fastest(rows)}
    assert found["80"]["fastest"] == str(TILES[0])
    assert found["80"]["us"] == "80,000.0 and 80,000.0"
    assert found["80"]["shipped / fastest"] == f"{100 / 66:.3f}"
    titles = [table.title for table in tile_table.printed(rows)]
    assert len(titles) == 1
    assert len(list(tile_table.printed([*rows, replace(rows[0], outcome="left out", microseconds=None)]))) == 2


# ---- launches --------------------------------------------------------------------------------------------------------


def target() -> Any:
    tiles = pytest.importorskip("clop_kernels.backends.triton.tiles")
    return tiles.Target(90, 132)


@pytest.mark.parametrize("group", tile_candidates.GROUPS, ids=lambda group: group.name)
def test_every_group_is_launched_with_its_tiles(group: Group) -> None:
    shipped = tile_kernels.record(group, None, 4096, META, target())
    assert shipped.tile.num_warps in (4, 8)
    for tile in group.candidates:
        if tile.n_splits is not None and "n_splits" not in shipped.launches[0].arguments:
            continue  # a package whose columns are not split
        launched = tile_kernels.record(group, tile, 4096, META, target()).tile
        assert (launched.block_m, launched.block_n, launched.num_warps) == (tile.block_m, tile.block_n, tile.num_warps)
        assert (launched.num_stages, launched.max_registers) == (tile.num_stages, tile.max_registers)
        assert tile.block_k in (None, launched.block_k)
        assert tile.n_splits in (None, launched.n_splits)


def test_names_of_groups_tell_them_apart() -> None:
    names = [group.name for group in (*tile_candidates.GROUPS, *tile_candidates.OF_STAND_IN)]
    assert len(set(names)) == len(names)
    for group in tile_candidates.GROUPS:
        assert len(set(group.candidates)) == len(group.candidates)


def test_a_kernel_that_a_loss_does_not_launch_is_refused() -> None:
    with pytest.raises(LookupError, match="does not launch pair_kernel"):
        tile_kernels.record(replace(GROUP, kernel="pairs", D=64), None, 4096, META, target())


def test_a_time_is_of_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU of graphs with several, the median of their replays; here a stand-in captures them."""
    pytest.importorskip("triton")
    bench = tile_sweep.Device(torch.device("cpu"))
    bench.is_gpu = True
    monkeypatch.setattr(tile_sweep, "MOST_LAUNCHES", 4)
    seconds = iter([0.2, 0.4, 0.1, 0.3, 9.0])
    n_launched: list[int] = []
    original = tile_kernels.Recorded.run
    monkeypatch.setattr(tile_kernels.Recorded, "run", lambda recorded: n_launched.append(1) or original(recorded))  # type: ignore[func-returns-value]

    def captured(call: Any) -> Any:
        call()
        return call

    monkeypatch.setattr(measure, "captured", captured)
    monkeypatch.setattr(measure, "seconds_of", lambda replay, device: next(seconds))
    group = tile_candidates.OF_STAND_IN[0]
    timed = bench.time(group, group.candidates[0], 32)
    assert timed.seconds == 0.3 / 4
    assert len(n_launched) == 4
    assert (timed.tile.block_m, timed.tile.block_n) == (32, 32)


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.compiles
def test_candidates_are_compiled_and_rejected_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    group = replace(GROUP, D=32)
    trials = [(group, Tile(64, 64, None, 4, 2)), (group, Tile(64, 64, None, 4, 2, 64)), (replace(group, kernel="pairs"), None)]
    sizes = Sizes(4096, (8192,), ())
    found = dict(tile_kernels.compile_all(trials, target(), sizes, 2, math.inf))
    good, bad, missing = (found[trial] for trial in trials)
    assert (good.fault, good.spilled_bytes) == ("", 0)
    assert good.registers is not None
    assert good.registers > 64
    assert bad.fault == f"spills {bad.spilled_bytes} bytes a thread"
    assert missing.fault == f"{trials[2][0].name}: a loss of this width does not launch pair_kernel"
    assert any(tmp_path.iterdir())  # where a launch finds it
    assert not list(tile_kernels.compile_all(trials, target(), sizes, 2, time.monotonic()))  # the budget is spent


def die(*arguments: Any) -> None:
    os._exit(1)


def test_a_compiler_that_dies_costs_one_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_kernels, "compile_trial", die)
    trials = [(GROUP, tile) for tile in TILES[:2]]
    found = dict(tile_kernels.compile_all(trials, target(), Sizes(4096, (), ()), 2, math.inf))
    assert found == dict.fromkeys(trials, Compiled(fault="the compiler died"))


def test_the_command_runs_on_a_stand_in(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    name, path = tile_candidates.OF_STAND_IN[0].name, tmp_path / "cpu.csv"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.tile_sweep", "--groups", name, "--output", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for row, _ in read_table(path)]
    assert {row.outcome for row in rows} == {"measured"}
    assert {row.N for row in rows} == {64, 80, 96}
    assert "the fastest tile beside the shipped one" in done.stdout
    with path.open(newline="") as file:
        assert next(csv.reader(file)) == [*tile_table.WHERE, *tile_table.FIGURES]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "-1"], "expected a positive number of seconds"),
        ([], "there is no GPU: TRITON_INTERPRET=1 runs it small on the CPU"),
        (["--compile-only", "--groups", "nobody"], "no such group: nobody"),
    ],
)
def test_the_command_refuses(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tile_sweep.main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_groups_can_be_read_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert tile_sweep.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(group.name in printed for group in tile_candidates.GROUPS)


# ---- tiles.py against what was measured ------------------------------------------------------------------------------


NEAR = 1.06
"""A chosen tile takes at most this times the time of the fastest: one serves all numbers of rows, and two runs differ by 3%."""

AWAITED: dict[tuple[str, str, str, int, int], str] = {
    ("softmax", "plain", "bfloat16", 128, 65536): "two programs a processor, of 128 registers each, have not been measured yet",
}
"""Cases whose tile was chosen by something else than a table, and why: until the next sweep measures it. Each has to fail."""


def measured_cases() -> Iterator[Any]:
    """Of each committed table, device, kernel, form, dtype, width and number of rows the accepted rows, and the target."""
    for path in sorted(TABLES.glob("sm_*.csv")):
        cases: dict[Any, list[Row]] = {}
        for row, where in read_table(path):
            if row.outcome == "measured":
                cases.setdefault((*row.case, where["device"], int(where["sm"]), int(where["processors"])), []).append(row)
        for (*case, device, sm, processors), rows in cases.items():
            name, reason = "-".join(map(str, (f"sm_{sm}", device, *case))), AWAITED.get(tuple(case))
            marks = () if reason is None else (pytest.mark.xfail(strict=True, reason=reason),)
            yield pytest.param(rows, sm, processors, id=name, marks=marks)


@pytest.mark.parametrize(("rows", "sm", "processors"), list(measured_cases()))
def test_the_chosen_tile_is_as_good_as_the_fastest(rows: list[Row], sm: int, processors: int) -> None:
    """Of each case by itself: other numbers of rows may have other fastest tiles."""
    tiles = pytest.importorskip("clop_kernels.backends.triton.tiles")
    kernel, form, dtype, width, n_rows = rows[0].case
    group = Group(kernel, form, dtype, width, ())
    chosen = tile_kernels.record(group, None, int(n_rows or 0), META, tiles.Target(sm, processors)).tile
    if (chosen.n_splits or 1) > 1 and all(row.tile is not None and row.tile.n_splits is None for row in rows):
        pytest.skip("measured before columns were split: of this number of rows the table does not know what is chosen now")
    times: list[tuple[bool, float]] = []
    for row in rows:
        assert row.tile is not None
        assert row.microseconds is not None
        times.append((tile_kernels.is_same(row.tile, chosen), row.microseconds))
    own = [microseconds for is_chosen, microseconds in times if is_chosen]
    assert own, f"{chosen} was not measured"
    assert min(own) <= NEAR * min(microseconds for _, microseconds in times)


def test_the_table_of_the_h200_is_what_was_measured() -> None:
    """It was converted from the table of that run, value by value."""
    source = ROOT / "benchmarks/results/nvidia-h200/2026-11-27-884de6d/tiles.csv"
    with source.open(newline="") as old, (TABLES / "sm_90.csv").open(newline="") as new:
        measured, kept = list(csv.DictReader(old)), [line for line in csv.DictReader(new) if line["commit"] == "884de6d"]
    assert len(kept) == len(measured) == 135
    for name in measured[0].keys() & kept[0].keys():
        assert [line[name] for line in kept] == [line[name] for line in measured], name
