"""The table of a tile sweep, with a line for each tile, kernel and number of rows, and a summary of it."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from .tile_candidates import Tile

TABLES = Path(__file__).parent / "results" / "tiles"
"""The folder of the committed tables, one per compute capability: sm_NN.csv."""

CLOSE = 1.03
"""A tile counts as equally fast if it takes at most this factor longer. Two runs do not tell smaller differences apart."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        kernel, form, dtype, D: Those of the group.
        N: Rows of both sides together. None if nothing was launched.
        tile: The tile as it was launched.
        is_shipped: Whether the package uses this tile.
        outcome: "measured", or why not: "rejected" (after compiling), "wrong", "failed" or "left out".
        reason: Why it was not measured.
        registers, spilled_bytes, shared_kb: Resources of the compiled kernel, the largest of its variants.
        microseconds: Time of one pass over all pairs.
        tflops: Speed, counting the textbook's products at 2 N^2 D flops each.
        share_of_matrix_rate: That speed as a share of the speed of torch's matrix product in the same run.
        error: Relative difference from the shipped tile's result.
        same_bits: Whether a second call gave the same bits.
    """

    kernel: str
    form: str
    dtype: str
    D: int
    N: int | None
    tile: Tile | None
    is_shipped: bool = False
    outcome: str = "measured"
    reason: str = ""
    registers: int | None = None
    spilled_bytes: int | None = None
    shared_kb: float | None = None
    microseconds: float | None = None
    tflops: float | None = None
    share_of_matrix_rate: float | None = None
    error: float | None = None
    same_bits: bool | None = None

    @property
    def case(self) -> tuple[str, str, str, int, int | None]:
        return self.kernel, self.form, self.dtype, self.D, self.N

    @property
    def name(self) -> str:
        """Its name for a person."""
        rows = "" if self.N is None else f" N={self.N}"
        return f"{self.kernel} {self.form} {self.dtype} D={self.D}{rows} {self.tile or ''}".rstrip()

    def figures(self) -> dict[str, Any]:
        """The columns of the table, without those that say where it was measured."""
        tile = dict.fromkeys(OF_TILE) if self.tile is None else asdict(self.tile)
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tile"}
        return {name: own.get(name, tile.get(name)) for name in FIGURES}

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> Row:
        """Reads :meth:`figures`, or a line of a table."""
        text = {name: "" if columns.get(name) is None else str(columns[name]) for name in FIGURES}

        def number(name: str, kind: Callable[[str], Any] = int) -> Any:
            return kind(text[name]) if text[name] else None

        tile = None
        if text["block_m"]:
            tile = Tile(**{name: number(name) for name in OF_TILE})
        return cls(
            text["kernel"], text["form"], text["dtype"], int(text["D"]), number("N"), tile, text["is_shipped"] == "True",
            text["outcome"], text["reason"], number("registers"), number("spilled_bytes"), number("shared_kb", float),
            number("microseconds", float), number("tflops", float), number("share_of_matrix_rate", float), number("error", float),
            text["same_bits"] == "True" if text["same_bits"] else None,
        )  # fmt: skip


OF_TILE = [f.name for f in fields(Tile)]
FIGURES = [
    "kernel", "form", "dtype", "D", "N", "is_shipped", *OF_TILE, "registers", "spilled_bytes", "shared_kb", "microseconds",
    "tflops", "share_of_matrix_rate", "error", "same_bits", "outcome", "reason",
]  # fmt: skip
WHERE = ["device", "sm", "processors", "torch", "triton", "driver", "commit", "date"]
"""The columns that say where and when it was measured. tiles.py chooses tiles by ``sm`` and ``processors``."""


def columns_of(figures: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    return {name: where.get(name, "") for name in WHERE} | {
        name: "" if figures.get(name) is None else figures[name] for name in FIGURES
    }


def read_table(path: Path) -> list[tuple[Row, dict[str, str]]]:
    """The rows, and where each was measured. If a device measured a case in several runs, the newest run counts."""
    with path.open(newline="") as file:
        found = [(Row.of(line), {name: line[name] for name in WHERE}) for line in csv.DictReader(file)]
    newest: dict[Any, str] = {}
    for row, where in found:
        key = row.case, where["device"]
        newest[key] = max(newest.get(key, ""), where["date"])
    return [(row, where) for row, where in found if where["date"] == newest[row.case, where["device"]]]


class Writer:
    """Appends lines to a table as they come."""

    def __init__(self, path: Path, where: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._where = path, where

    def add(self, row: Row) -> None:
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*WHERE, *FIGURES], lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(columns_of(row.figures(), self._where))


# ---- summary ---------------------------------------------------------------------------------------------------------


def fastest(rows: Iterable[Row]) -> list[dict[str, str]]:
    """For each case the fastest tile beside the shipped one, as a table for a person."""
    cases: dict[Any, list[Row]] = {}
    for row in rows:
        if row.microseconds is not None:
            cases.setdefault(row.case, []).append(row)
    found = []
    for (kernel, form, dtype, width, n_rows), own in cases.items():
        shipped = [row for row in own if row.is_shipped and row.microseconds is not None]
        if not shipped:
            continue
        best = min(own, key=lambda row: row.microseconds or math.inf)
        assert best.microseconds is not None
        times = [row.microseconds for row in shipped if row.microseconds is not None]
        found.append(
            {
                "kernel": kernel, "form": form, "dtype": dtype, "D": str(width), "N": str(n_rows),
                "shipped": str(shipped[0].tile), "us": " and ".join(f"{value:,.1f}" for value in times),
                "fastest": str(best.tile), "its us": f"{best.microseconds:,.1f}",
                "shipped / fastest": f"{min(times) / best.microseconds:.3f}",
                "share of matrix rate": "" if best.share_of_matrix_rate is None else f"{best.share_of_matrix_rate:.2f}",
            }
        )  # fmt: skip
    return found


def printed(rows: Sequence[Row]) -> Iterator[Table]:
    """The tables to print at the end: the fastest tiles, and the candidates that were not measured."""
    if cases := fastest(rows):
        table = Table(title="the fastest tile beside the shipped one; the shipped one was timed first and last")
        for header in cases[0]:
            table.add_column(header, justify="right" if header in ("D", "N", "us", "its us", "shipped / fastest") else "left")
        for case in cases:
            table.add_row(*case.values(), style="yellow" if float(case["shipped / fastest"]) > CLOSE else None)
        yield table
    if others := [row for row in rows if row.outcome != "measured"]:
        table = Table("candidate", "outcome", "reason", title="not measured")
        for row in others:
            table.add_row(row.name, row.outcome, row.reason)
        yield table
