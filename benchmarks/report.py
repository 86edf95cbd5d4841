"""``python -m benchmarks.report CSV [CSV ...] --output DIR``: writes report.md and figures from the results of compare."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from .problems import Case
from .providers import PROVIDERS, label
from .results import Row, default_of, find, markdown_table, memory_ratio, ratio, read_csv, summary
from .scaling import FIT_FROM_MB, FIT_FROM_N, memory_law, representative, series_over, time_law
from .targets import verdicts

HOW = """\
A contrastive loss compares each of N embeddings with every other. The usual implementations hold the N x N similarities in
memory; clop_kernels computes the same loss and the same gradients tile by tile, in memory that grows with N. This report
compares the two.

- All implementations get the same inputs. If a loss or gradient differs, the row says so, and no ratio uses it.
- Implementations are timed in turn, A B A B, so that other load on the machine affects all alike. Times are medians over rounds.
- Ratios are paired: each round divides one time by another of the same round, and the report shows the median over rounds.
- Memory is the peak during a call, above what was in use before it.
- *Default* is the backend of clop_kernels that you get if you do not name one.
- Absolute times depend on the machine and its load. Trust the ratios."""


ON_A_GPU = """

Each call is timed on a GPU that was idle before. A small call therefore waits for the host (Python and PyTorch) as much as for
the GPU. *host ms* is the time until the call returns. *graph ms* is the GPU's own time, from a replay as a CUDA graph. Shares of
the matrix rate use the GPU's own time if it was measured."""


def write(rows: Sequence[Row], folder: Path, before: str = "", more: str = "", with_targets: bool = False) -> Path:
    """Writes report.md, with figures beside it if matplotlib is installed.

    Args:
        rows: The results. Without any, the report has only ``before`` and ``more``.
        folder: Where to write.
        before: Markdown for the beginning of the report.
        more: Markdown for the place before the tables of all rows.
        with_targets: Whether to compare the results with the project's own targets.

    Raises:
        ValueError: if the rows are from several devices, because no figure may mix their times.
    """
    devices = sorted({row.environment.device for row in rows})
    if len(devices) > 1:
        raise ValueError(f"rows of {', '.join(devices)}: expected those of one device; write a report for each")
    folder.mkdir(parents=True, exist_ok=True)
    environments = dict.fromkeys([*(str(row.environment) for row in rows), *_versions(rows)])
    speed = [
        f"{'##' if before else '#'} clop_kernels beside other implementations: {', '.join(devices)}",
        HOW + (ON_A_GPU if any(row.environment.device_type == "cuda" for row in rows) else ""),
        "Measured on:\n\n" + "\n".join(f"- {line}" for line in environments if line),
        *_findings(rows),
        *_growth(rows),
        *_figures(rows, folder),
        *(["## Targets of the project", markdown_table(verdicts(rows))] if with_targets else []),
    ]
    sections = [before, *(speed if rows else []), more, *_tables(rows)]
    path = folder / "report.md"
    path.write_text("\n\n".join(section for section in sections if section) + "\n")
    return path


def _versions(rows: Sequence[Row]) -> list[str]:
    """The versions of packages that the environment does not name."""
    named = {(PROVIDERS[row.provider].package, row.version) for row in rows if row.provider in PROVIDERS}
    return [", ".join(f"{package} {version}" for package, version in sorted(named) if package != "torch" and version)]


def _findings(rows: Sequence[Row]) -> list[str]:
    """The most important ratios: a line per case, a column per provider."""
    table = []
    cases = representative(rows)
    others = dict.fromkeys(row.provider for row in rows if row.case in cases and row.seconds and not row.is_default)
    for case in cases:
        default = default_of(rows, case)
        if default is not None:
            found = {name: find(rows, name, case) for name in others}
            multiples = {name: (ratio(row, default), memory_ratio(row, default)) for name, row in found.items()}
            cells = {label(name): ", ".join(f"{x:.1f}x" for x in (t, m) if x is not None) for name, (t, m) in multiples.items()}
            table.append({"case": _title(case), "default": label(default.provider), **cells})
    text = "Each cell has the time and then the peak extra memory, as multiples of the default's: 2.0x means twice as much."
    return ["## In short", text, markdown_table(table)] if table else []


def _growth(rows: Sequence[Row]) -> list[str]:
    table = []
    for series in series_over("N", rows):
        for provider, of_provider in series.by_provider().items():
            time, memory = time_law(of_provider), memory_law(of_provider)
            if time is not None or memory is not None:
                table.append(
                    {
                        "case": _title(series.common),
                        "provider": label(provider),
                        "time grows as": str(time or ""),
                        "fitted on N": " ".join(map(str, time.sizes)) if time else "",
                        "memory grows as": str(memory or ""),
                        "on N": " ".join(map(str, memory.sizes)) if memory else "",
                    }
                )
    text = (
        "A power law, fitted by least squares of log cost against log N. Times are fitted from "
        f"N = {FIT_FROM_N} on, memory from {FIT_FROM_MB:g} MB on: below that, costs that do not depend on N matter too much."
    )
    return ["## How the cost grows", text, markdown_table(table)] if table else []


def _figures(rows: Sequence[Row], folder: Path) -> list[str]:
    if find_spec("matplotlib") is None:
        return ["No figures: matplotlib is not installed. `python -m benchmarks.report CSV --output DIR` draws them where it is."]
    from . import figures

    return [f"![{p.title}]({p.name})\n\n*{p.title}.* {p.caption}" for p in figures.draw_all(rows, folder)]


def _tables(rows: Sequence[Row]) -> list[str]:
    """All rows, with a table for each setting."""
    settings = dict.fromkeys(replace(row.case, N=0, D=0) for row in rows)
    sections = ["## All rows"] if rows else []
    for setting in settings:
        chosen = [row for row in rows if replace(row.case, N=0, D=0) == setting]
        chosen.sort(key=lambda row: (row.case.D, row.case.N))
        cells = [
            {"N": str(row.case.N), "D": str(row.case.D), **{k: v for k, v in line.items() if k != "case"}}
            for row, line in zip(chosen, summary(chosen), strict=True)
        ]
        sections += [f"### {_title(setting)}", markdown_table(cells)]
    return sections


def _title(case: Case) -> str:
    sizes = "".join(f", {name}={size}" for name, size in (("N", case.N), ("D", case.D)) if size)
    return f"{case.problem}, {case.mode}{sizes}, {case.dtype}, temperature {case.temperature:g}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Writes report.md and figures from CSV files that python -m benchmarks.compare has written on one device. "
        "If several runs measured a case, the newest run counts.",
    )
    parser.add_argument("csv", type=Path, nargs="+", metavar="CSV")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for report.md and the figures")
    add = parser.add_argument
    add("--targets", action="store_true", help="also compare the results with the project's own performance targets")
    arguments = parser.parse_args(argv)
    try:
        print(write(read_csv(arguments.csv), arguments.output, with_targets=arguments.targets))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
