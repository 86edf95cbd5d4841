"""Makes report.md, CSV files and one archive from a journal. The run may be in progress, finished or interrupted."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import report, tile_table
from ..results import Row, markdown_table, write_csv
from .journal import WHOLE, Result, read
from .plan import PLAN

JOURNAL = "results.jsonl"
CSV_FILES = ("checks.csv", "speed.csv", "tiles.csv")
CUT_OFF = "did not end"


def write(folder: Path) -> Path:
    """Makes the report and the CSV files of ``folder`` from its journal, and an archive beside it. Returns the report's path.

    Raises:
        FileNotFoundError: if there is no journal.
    """
    path = folder / JOURNAL
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected the journal of a run, which a run with --output DIR leaves in DIR")
    found = list(read(path))
    results = [result for result, _ in found]
    for name in CSV_FILES:
        (folder / name).unlink(missing_ok=True)
    rows = [Row.of(as_text(result.figures)) for result in results if "rounds_ms" in result.figures]
    write_csv([row.columns() for row in rows], folder / "speed.csv")
    tiles = [
        tile_table.columns_of(result.figures, vars(environment) | result.figures)
        for result, environment in found
        if "block_m" in result.figures
    ]
    write_csv(tiles, folder / "tiles.csv")
    checks = [
        vars(r) | {"figures": _words(r.figures)} | _where(environment)
        for r, environment in found
        if "rounds_ms" not in r.figures and "block_m" not in r.figures
    ]
    write_csv(checks, folder / "checks.csv")
    environments = list(dict.fromkeys(str(environment) for _, environment in found))
    written = report.write(rows, folder, "\n\n".join(_first(results, environments)), "\n\n".join(_sections(results)))
    archive(folder)
    return written


def archive(folder: Path) -> Path:
    """Packs the folder with its logs into one file beside it."""
    path = folder.with_name(folder.name + ".tar.gz")
    with tarfile.open(path, "w:gz") as file:
        file.add(folder, arcname=folder.name)
    return path


def as_text(figures: dict[str, Any]) -> dict[str, str]:
    """The figures as a CSV file has them."""
    return {name: "" if value is None else str(value) for name, value in figures.items()}


def _where(environment: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(environment).items() if name not in ("device_type",)}


def _words(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in figures.items())


# ---- sections of the report ------------------------------------------------------------------------------------------


def _first(results: Sequence[Result], environments: Sequence[str]) -> Iterator[str]:
    """The first questions of a reader: where did it run, what is wrong, and how far did it get?"""
    yield "# Results of python -m benchmarks.gpu_check"
    yield "\n".join(f"- {environment}" for environment in environments)
    names = dict.fromkeys([*(step.name for step in PLAN), *(r.step for r in results)])
    steps = [_of_step(name, results) for name in names]
    bad = [{"step": r.step, "what": r.name, "outcome": r.outcome, "why": _end(r.details)} for r in results if not r.is_good]
    bad += [
        {
            "step": step["step"],
            "what": WHOLE,
            "outcome": CUT_OFF,
            "why": "interrupted or killed before the end of the step",
        }
        for step in steps
        if step["results"].endswith(CUT_OFF)
    ]
    yield "## Problems"
    yield markdown_table(bad) if bad else "No problems in the steps that ran."
    yield "## Steps"
    yield markdown_table(steps)


def _sections(results: Sequence[Result]) -> Iterator[str]:
    """The sections after the report of the speed."""
    machine = [result for result in results if result.step in ("machine", "host") and result.figures]
    if machine:
        yield "## The machine"
        yield markdown_table([{"what": r.name, "figures": _words(r.figures)} for r in machine])
    if canaries := [result for result in results if result.step == "canary" and result.figures]:
        yield "## Canaries: the largest relative error against float64, for each backend and dtype"
        yield markdown_table(list(_largest_errors(canaries)))
    if tiles := [result for result in results if "block_m" in result.figures]:
        yield "## Tiles: the fastest one beside the shipped one"
        yield markdown_table(tile_table.fastest(tile_table.Row.of(result.figures) for result in tiles))


def _of_step(name: str, results: Sequence[Result]) -> dict[str, str]:
    own = [result for result in results if result.step == name]
    outcomes = Counter(result.outcome for result in own if result.name != WHOLE)
    told = [f"{n} {outcome}" for outcome, n in outcomes.items()]
    end = own[-1] if own and own[-1].name == WHOLE else None
    if end is None:
        told.append(CUT_OFF if own else "not run")
    elif end.outcome == "left out" or not told:
        told.append(end.outcome + (f": {end.details}" if end.details else ""))
    took = "" if end is None or end.seconds is None else f"{end.seconds:.0f}"
    return {"step": name, "results": ", ".join(told), "seconds": took}


def _end(text: str, most: int = 300) -> str:
    """The end of a message, because a traceback has its error there."""
    return text if len(text) <= most else "... " + text[-most:]


def _largest_errors(canaries: Sequence[Result]) -> Iterator[dict[str, str]]:
    for group in dict.fromkeys(" ".join(result.name.split()[:2]) for result in canaries):
        own = [result for result in canaries if result.name.startswith(group + " ")]
        names = [name for name in own[0].figures if name != "same_bits"]
        largest = {name: f"{max(float(result.figures[name]) for result in own):.1e}" for name in names}
        yield {"backend and dtype": group, "calls": str(len(own)), **largest}
