"""Prints the resources of the compiled CUDA kernels: registers, spills, shared memory, blocks per processor, matrix instructions.

Reads the installed extension with cuobjdump, from the CUDA toolkit or from Triton's package. Needs no GPU. The exit code is 1 if
a kernel spills a register, needs more shared memory than its GPU has, or multiplies matrices without matrix instructions.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from clop_kernels.backends import extension

from .resources import SHARED_MEMORY_KB, faults_of

REGISTERS, MOST_THREADS = 65536, {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
"""Limits of a processor. A thread has at most 255 registers, allocated in units of 8 (CUDA C++ programming guide)."""

MATRIX_KERNELS = ("softmax_kernel", "gradient_kernel")

_SHAPE = re.compile(
    r"(softmax_kernel|gradient_kernel)INS0_5ShapeINS0_(?:4Bf16|3F16|4Tf32ILi(\d)EE)E?"
    r"Li(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)E"
)
"""Shape<Product, width, warps, row tiles, columns, stages> of csrc/cuda/pairs.cuh, mangled."""


@dataclass(frozen=True)
class Report:
    """One compiled kernel on one architecture. A kernel without a tile has zeros in the columns of a tile."""

    kernel: str
    sm: int
    product: str
    D: int
    rows: int
    columns: int
    stages: int
    threads: int
    registers: int
    spilled_bytes: int
    shared_kb: float
    blocks_a_processor: int
    mma: int

    def faults(self) -> list[str]:
        return faults_of(self.sm, self.spilled_bytes, self.shared_kb, self.kernel in MATRIX_KERNELS and not self.mma)


def cuobjdump() -> str | None:
    """The path of cuobjdump, from CUDA_HOME, the PATH or Triton's package."""
    places = [str(Path(home) / "bin") for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(places))


def obstacle() -> str | None:
    """Why there is nothing to report, or None."""
    if (reason := extension.obstacle()) is not None:
        return reason
    info = extension.build_info()
    if info is None or info["cuda"] is None:
        return "the extension was built without its CUDA half"
    if cuobjdump() is None:
        return "there is no cuobjdump: neither a CUDA toolkit nor Triton is installed"
    return None


def dump(*options: str) -> str:
    """The output of cuobjdump for the installed extension."""
    program, extension = cuobjdump(), importlib.util.find_spec("clop_kernels._native")
    assert program is not None
    assert extension is not None
    assert extension.origin is not None
    return subprocess.run([program, *options, extension.origin], check=True, capture_output=True, text=True).stdout


def reports() -> list[Report]:
    """Every kernel of the extension on every architecture in it."""
    usage = re.compile(r"arch = sm_(\d+)|Function (\S+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
    n_mma = _matrix_instructions()
    found, sm = [], 0
    for arch, function, registers, stack, shared, local in usage.findall(dump("-res-usage")):
        if arch:
            sm = int(arch)
            continue
        found.append(_report(function, sm, int(registers), int(stack) + int(local), int(shared), n_mma[sm, function]))
    return sorted(found, key=lambda report: (report.sm, report.kernel, report.product, report.D))


def _matrix_instructions() -> Counter[tuple[int, str]]:
    count: Counter[tuple[int, str]] = Counter()
    sm, function = 0, ""
    for line in dump("-sass").splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            sm = int(match[1])
        elif match := re.search(r"Function : (\S+)", line):
            function = match[1]
        elif "HMMA" in line:
            count[sm, function] += 1
    return count


def _report(function: str, sm: int, registers: int, spilled: int, static_shared: int, n_mma: int) -> Report:
    match = _SHAPE.search(function)
    if match is None:
        name = re.search(r"([a-z]\w*?_kernel)", re.sub(r"^_ZN4clop4cuda\d+", "", function))
        return Report(name[1] if name else function, sm, "", 0, 0, 0, 0, 0, registers, spilled, static_shared / 1024, 0, n_mma)
    kernel, parts = match[1], match[2]
    width, warps, row_tiles, columns, stages = (int(number) for number in match.groups()[2:])
    product = f"tf32 x{parts}" if parts else "bf16" if "4Bf16" in function else "f16"
    row_bytes = width * (4 if parts else 2)
    rows, threads = 16 * warps * row_tiles, 32 * warps
    shared = rows * row_bytes + stages * columns * (row_bytes + 8)
    blocks = min(
        REGISTERS // (-(-registers // 8) * 8 * threads),
        (SHARED_MEMORY_KB[sm] + 1) * 1024 // (shared + 1024),  # the system uses 1 KB more per block
        MOST_THREADS[sm] // threads,
    )
    return Report(kernel, sm, product, width, rows, columns, stages, threads, registers, spilled, shared / 1024, blocks, n_mma)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources_cuda", description=__doc__)
    parser.add_argument("--everything", action="store_true", help="also print the O(N D) kernels, which are always checked")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table to this file")
    given = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if (reason := obstacle()) is not None:
        console.print(f"nothing to report: {reason}")
        return 0
    found = reports()
    table = Table(title="CUDA kernels of the compiled extension")
    for field in fields(Report):
        table.add_column(field.name, justify="right" if field.type in ("int", "float") else "left")
    for report in found:
        if given.everything or report.kernel in MATRIX_KERNELS or report.faults():
            table.add_row(*(str(value) for value in asdict(report).values()), style="red" if report.faults() else None)
    console.print(table)
    if given.csv is not None:
        with given.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Report)])
            writer.writeheader()
            writer.writerows(asdict(report) for report in found)
    faults = [f"{r.kernel} sm_{r.sm} {r.product} D={r.D}: {fault}" for r in found for fault in r.faults()]
    for fault in faults:
        console.print(fault, style="red")
    console.print(f"{len(found)} kernels, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
