"""``python -m benchmarks.resources``: compiles every shipped Triton kernel ahead of time, for GPUs that need not be there.

One table: registers, bytes spilled, shared memory and matrix instructions of each kernel, tile, GPU, dtype and width, as
:mod:`clop_kernels.backends.triton.launches` would launch it. Ends with 1 if a kernel spills, takes more shared memory than
its GPU has, or lacks matrix instructions where it multiplies matrices.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from clop_kernels.backends.contract import LossOptions, Residuals, unit_rows
from clop_kernels.backends.positions import Upstream

SHARED_MEMORY_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""What one program can have, by compute capability (CUDA C++ programming guide, table of technical specifications)."""

TARGETS = (80, 90, 100, 120)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
WIDTHS = (16, 32, 64, 128, 256, 512)
"""512 stands for all wide rows, whose tiles do not depend on the width."""

PROCESSORS = 132
ROWS = {128: 65536, 64: 8192, 32: 2048}
"""Numbers of rows that get tiles of so many rows on so many processors."""

FORMS: dict[str, dict[str, Any]] = {
    "plain": {"positives": "instance", "temperature": 0.1},
    "general": {"positives": "label", "weighted": True},
    "two-sided": {"positives": "instance", "sides": True},
    "two-sided-raw": {"positives": "label", "sides": True, "normalize": False, "weighted": True},
    "negatives": {"positives": "label", "negatives_only": True, "weighted": True},
    "pairs": {"positives": "label", "alone": True},
    "one-way": {"positives": "label", "alone": True, "sides": True},
}
"""What is asked of a loss in each form that is compiled. Where no temperature is given it is a tensor, so that both softmax
paths are compiled in; ``weighted``: reduction "none", a weight a row, and the Euclidean distance to prototypes.

    plain           NT-Xent with a prototype term: the form with the least code
    general         SupCon with a prototype term: of one side the most
    two-sided       CLIP's loss
    two-sided-raw   the same by labels, of rows that are not normalised, for which there is the online softmax alone
    negatives       of each row the logarithm of the sum over its negatives
    pairs           the passes over pairs ``alone``, of a loss over a process group: rows against each other
    one-way         the same, of rows on the left against those on the right
"""

VARIANTS = ("two-sided", "two-sided-raw", "negatives")
"""The forms that are compiled for the lowest tile too, besides the largest one, which is for all."""

WIDTHS_ALONE = {"bfloat16": (128, 256, 512), "float32": (32, 512)}
"""The widths of those passes: the kernels are the others' but for a few loads and stores, and these take the most registers."""

MATRIX_INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
MATRIX_KERNELS = ("softmax_kernel", "gradient_kernel", "pair_kernel", "product_kernel")


@dataclass(frozen=True)
class Case:
    """A call of the loss: all its launches are compiled. ``form`` is one of :data:`FORMS`."""

    capability: int
    dtype: str
    width: int
    n_rows: int
    form: str


@dataclass(frozen=True)
class Report:
    """What one compiled kernel takes."""

    kernel: str
    sm: int
    dtype: str
    D: int
    tile: str
    form: str
    registers: int
    spilled_bytes: int
    shared_kb: float
    instructions: str

    def faults(self) -> list[str]:
        lacks_matrix_units = self.kernel in MATRIX_KERNELS and not self.instructions
        return faults_of(self.sm, self.spilled_bytes, self.shared_kb, lacks_matrix_units)


def faults_of(sm: int, spilled_bytes: int, shared_kb: float, lacks_matrix_units: bool) -> list[str]:
    """What must not be so of any kernel."""
    found = []
    if spilled_bytes:
        found.append(f"spills {spilled_bytes} bytes a thread")
    if shared_kb > SHARED_MEMORY_KB[sm]:
        found.append(f"needs {shared_kb} KB of shared memory, and sm_{sm} has {SHARED_MEMORY_KB[sm]}")
    if lacks_matrix_units:
        found.append("has no matrix instructions")
    return found


def cases(
    targets: Sequence[int], dtypes: Sequence[str], widths: Sequence[int], heights: Sequence[int], forms: Sequence[str]
) -> list[Case]:
    return [
        Case(target, dtype, width, ROWS[height], form)
        for target in targets
        for dtype in dtypes
        for width in widths
        for height in heights
        for form in forms
        # Lower tiles are for small N: the largest form will do for all, and the lowest tile for its variants.
        if form == "general" or height == max(heights) or (form in VARIANTS and height == min(heights))
        if not FORMS[form].get("alone") or width in WIDTHS_ALONE[dtype]
    ]


def compile_case(case: Case) -> list[Report]:
    """Compiles the launches of one call; runs in a process of its own."""
    reports: dict[str, Report] = {}
    for launch in launches(case):
        name = launch.kernel.__name__
        if name not in MATRIX_KERNELS and not _is_pass_over_rows(name, case):
            continue
        if name == "product_kernel" and case.form not in ("plain", "general"):
            continue  # it multiplies what pair_kernel made of any form
        key = f"{name} {launch.arguments.get('ADD')} {launch.arguments.get('stride_row') == 1}"
        if key not in reports:
            reports[key] = _compile(launch, case)
    return list(reports.values())


def _is_pass_over_rows(name: str, case: Case) -> bool:
    """Whether to compile a kernel without matrix products: once a form that differs, and a way to order the rows."""
    if case.form == "two-sided-raw":
        return case.n_rows == ROWS[128] and name in ("prologue_kernel", "finish_kernel")
    return case.form == "general" and case.n_rows in (
        ROWS[128],
        ROWS[32],
    )  # few rows are ordered by the prologue, many by a table


def launches(case: Case) -> Iterator[Any]:
    """The launches of the case."""
    form = FORMS[case.form]
    if form.get("alone"):
        return launches_of_pairs(case, case.n_rows // 2 if form.get("sides") else None)
    by_label, is_weighted, has_sides = form["positives"] == "label", form.get("weighted", False), form.get("sides", False)
    options = LossOptions(
        n_views=1 if has_sides and by_label else 2,
        positives=form["positives"],
        temperature=form.get("temperature", _empty()),
        prototype_weight=1.0,
        distance="euclidean" if is_weighted else "cosine",
        reduction="none" if is_weighted else "mean",
        compute_dtype=DTYPES[case.dtype],
        normalize=form.get("normalize", True),
        n_left=case.n_rows // 2 if has_sides else None,
        negatives_only=form.get("negatives_only", False),
    )
    return launches_of(options, case.n_rows, case.width, case.capability)


def launches_of(options: LossOptions, n: int, width: int, capability: int) -> Iterator[Any]:
    """The launches of a loss of n labelled rows and its gradients, on tensors without memory."""
    from clop_kernels.backends.triton import launches as plan  # after the environment is set
    from clop_kernels.backends.triton import tiles

    dtype, n_classes, is_per_row = options.compute_dtype, 10, options.reduction == "none"
    z, grad_z = (_empty(n, width, dtype=dtype) for _ in range(2))
    zhat = unit_rows(z, dtype)
    labels, prototypes = _empty(n // options.n_views, dtype=torch.int64), _empty(n_classes, width)
    groups = _empty(3, n if options.positives == "label" else 0, dtype=torch.int32)
    residuals = Residuals(zhat, _empty(n), _empty(n), _empty(n), _empty(n), groups, _empty(2))
    target = tiles.Target(capability, PROCESSORS)
    loss = _empty(n) if is_per_row else _empty()
    forward_scratch, scratch = plan.ForwardScratch.like(zhat, options, target), plan.BackwardScratch.like(zhat, options)
    yield from plan.forward(z, labels, prototypes, options, loss, residuals, forward_scratch, target)
    upstream = Upstream(_empty(), _empty(n) if is_per_row else None)
    yield from plan.backward(upstream, residuals, labels, prototypes, options, scratch, grad_z, target)
    by_class, bounds = _empty(n, dtype=torch.int64), _empty(n_classes + 1, dtype=torch.int64)
    parts = _empty(4, n_classes, width)
    yield plan.prototypes_backward(upstream, residuals, by_class, bounds, prototypes, options, parts, target)


def launches_of_pairs(case: Case, n_left: int | None) -> Iterator[Any]:
    """The launches of the passes over pairs alone. The temperature is a tensor."""
    from clop_kernels.backends.triton import launches as plan
    from clop_kernels.backends.triton import tiles

    dtype, n, width, target = DTYPES[case.dtype], case.n_rows, case.width, tiles.Target(case.capability, PROCESSORS)
    options = LossOptions(1, "label", _empty(), 0.0, "cosine", "mean", dtype)
    zhat, groups, n_results = _empty(n, width, dtype=dtype), _empty(3, n, dtype=torch.int32), n if n_left is None else n_left
    yield plan.pair_softmax(zhat, groups, n_left, options, _empty(4, n_results), target)
    yield from plan.pair_gradient(zhat, groups, n_left, _empty(4, n), options, _empty(n_results, width), target)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _compile(launch: Any, case: Case) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(_source(launch), target=GPUTarget("cuda", case.capability, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    found = [name for name, pattern in MATRIX_INSTRUCTIONS.items() if pattern in compiled.asm["ptx"]]
    blocks = [str(launch.arguments[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_D") if name in launch.arguments]
    tile = f"{'x'.join(blocks)}, {launch.options['num_warps']} warps, {launch.options['num_stages']} stages"
    name = launch.kernel.__name__
    # The stack of a kernel that asserts holds the arguments of the message.
    spilled = 0 if launch.options["debug"] else int(numbers["STACK"]) + int(numbers["LOCAL"])
    return Report(
        name,
        case.capability,
        case.dtype,
        case.width,
        tile,
        case.form,
        int(numbers["REG"]),
        spilled,
        round(compiled.metadata.shared / 1024, 1),
        " ".join(found),
    )


def _source(launch: Any) -> Any:
    """The kernel with its argument types, as a launch on real tensors would specialise it."""
    from triton.compiler import ASTSource

    pointers = {
        torch.float32: "*fp32",
        torch.float16: "*fp16",
        torch.bfloat16: "*bf16",
        torch.int32: "*i32",
        torch.int64: "*i64",
    }
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = pointers[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_all(selected: Sequence[Case], console: Console) -> list[Report]:
    """All reports, each kernel and tile once, in the order of the cases."""
    reports: dict[tuple[Any, ...], Report] = {}
    with Progress(console=console, transient=True) as progress, ProcessPoolExecutor() as pool:
        task = progress.add_task("compiling", total=len(selected))
        for found in pool.map(compile_case, selected):
            progress.advance(task)
            for report in found:
                reports.setdefault((report.kernel, report.sm, report.dtype, report.D, report.tile, report.form), report)
    return list(reports.values())


def report_table(reports: Sequence[Report], everything: bool) -> Table:
    table = Table(title="Triton kernels compiled ahead of time")
    for field in fields(Report):
        table.add_column(field.name, no_wrap=True, justify="right" if field.type in ("int", "float") else "left")
    for report in reports:
        if everything or report.kernel in MATRIX_KERNELS or report.faults():
            table.add_row(*(str(value) for value in asdict(report).values()), style="red" if report.faults() else None)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__)
    add = parser.add_argument
    add("--targets", nargs="+", type=int, choices=SHARED_MEMORY_KB, default=TARGETS, metavar="SM", help="%(default)s")
    add("--dtypes", nargs="+", choices=DTYPES, default=tuple(DTYPES), help="%(default)s")
    add("--dims", nargs="+", type=int, default=WIDTHS, metavar="D", help="widths of the embeddings (%(default)s)")
    add("--heights", nargs="+", type=int, choices=ROWS, default=tuple(ROWS), help="rows of a program's tile (%(default)s)")
    add("--forms", nargs="+", choices=FORMS, default=tuple(FORMS), help="what is asked of the loss (%(default)s)")
    add("--everything", action="store_true", help="print the O(N D) kernels too; they are checked in any case")
    add("--csv", type=Path, metavar="FILE", help="write the table there too")
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is in the environment: the interpreter compiles nothing; unset it")

    console = Console(width=None if sys.stdout.isatty() else 180)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # of this run alone: nothing is taken from, or left in, the user's
        reports = compile_all(cases(given.targets, given.dtypes, given.dims, given.heights, given.forms), console)
    console.print(report_table(reports, given.everything))
    if given.csv is not None:
        with given.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Report)])
            writer.writeheader()
            writer.writerows(asdict(report) for report in reports)
    faults = [f"{r.kernel} sm_{r.sm} {r.dtype} D={r.D} {r.tile}: {fault}" for r in reports for fault in r.faults()]
    for fault in faults:
        console.print(fault, style="red")
    console.print(f"{len(reports)} kernels compiled, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
