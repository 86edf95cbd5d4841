"""``python -m benchmarks.resources``: compiles every shipped Triton kernel ahead of time, without a GPU.

It makes one table: the registers, spilled bytes, shared memory and matrix instructions of each kernel, tile, GPU, dtype and
width, compiled as :mod:`clop_kernels.backends.triton.launches` would launch it. Kernels that multiply matrices also have the
instructions of their far loop and the clocks predicted from them (:mod:`benchmarks.sass`). The exit code is 1 if a kernel spills,
needs more shared memory than its GPU has, or multiplies matrices without matrix instructions.

One table per Triton version is committed. Its column ``source`` is a hash of everything that the compiled code depends on, so
only kernels whose hash is not in the table are compiled. The exit code is also 1 if the whole selection was requested and the
result differs from the committed table.
"""

from __future__ import annotations

import argparse
import ast
import csv
import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from clop_kernels.backends.contract import LossOptions

from . import leave_interrupts_to_parent, sass

SHARED_MEMORY_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""The most shared memory of one program, by compute capability (CUDA C++ programming guide, technical specifications)."""

TARGETS = (80, 90, 100, 120)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
WIDTHS = (16, 32, 64, 128, 256, 768)
"""768 stands for all wide rows, because their tiles do not depend on the width."""

PROCESSORS, ROWS = 132, 65536
"""The compiled code depends on neither."""

TABLES = Path(__file__).parent / "results" / "resources"
"""The folder of the committed tables, one per Triton version."""

SPILLS_ALLOWED = {"3.6": 8, "3.9": 8}
"""Triton version -> bytes per thread that a kernel may spill. With any other version, kernels may not spill.

On 3.6, the oldest supported version, `gradient_kernel` spills 8 bytes outside its far loops, at D = 256 on sm_90 and below D = 64
on sm_100. At D = 256 two stages would avoid it, but an H200 then took 1.14 times as long. Some kernels that pass over rows use 8
bytes of stack although they need only 40 to 96 registers, so a lack of registers is not the cause. The tables of 3.6 and 3.9
record which kernels.
"""

FORMS: dict[str, dict[str, Any]] = {
    "plain": {"positives": "instance", "temperature": 0.1},
    "general": {"positives": "label", "weighted": True},
    "two-sided": {"positives": "instance", "sides": True},
    "two-sided-raw": {"positives": "label", "sides": True, "normalize": False, "weighted": True},
    "negatives": {"positives": "label", "negatives_only": True, "weighted": True},
    "pairs": {"positives": "label", "alone": True},
    "one-way": {"positives": "label", "alone": True, "sides": True},
}
"""Forms of a loss. A test checks that every form compiles to the same kernels. The temperature is a tensor unless a number is
given. ``weighted`` means reduction "none", one weight per row, and the Euclidean distance to prototypes.

    plain           NT-Xent with a prototype term
    general         SupCon with a prototype term
    two-sided       CLIP's loss
    two-sided-raw   the same with labels and unnormalised rows
    negatives       for each row, the logarithm of the sum over its negatives
    pairs           only the passes over pairs (``alone``), for a loss over a process group: all rows with each other
    one-way         the same, left rows with right rows
"""

MATRIX_INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
MATRIX_KERNELS = ("softmax_kernel", "gradient_kernel", "pair_kernel", "product_kernel")


@dataclass(frozen=True)
class Selection:
    """What to compile: every combination of these."""

    targets: Sequence[int] = TARGETS
    dtypes: Sequence[str] = tuple(DTYPES)
    widths: Sequence[int] = WIDTHS


@dataclass(frozen=True)
class Case:
    """A call of the loss, all of whose launches are compiled. ``form`` is one of :data:`FORMS`."""

    capability: int
    dtype: str
    width: int
    n_rows: int = ROWS
    form: str = "plain"


@dataclass(frozen=True)
class Report:
    """The resources of one compiled kernel. ``loop`` is None if it has no matrix products."""

    kernel: str
    sm: int
    dtype: str
    D: int
    tile: str
    registers: int
    spilled_bytes: int
    shared_kb: float
    instructions: str
    source: str
    loop: sass.Loop | None = None

    @property
    def is_counted(self) -> bool:
        """Whether its loop was counted. Tables older than November 28, 2026 have no figures of loops."""
        return self.loop is not None or self.kernel not in MATRIX_KERNELS

    def columns(self) -> dict[str, Any]:
        """A line of a table: its resources, then the figures of its loop, which are empty if it has none."""
        own = {name: getattr(self, name) for name in OF_KERNEL}
        return own | (dict.fromkeys(OF_LOOP, "") if self.loop is None else asdict(self.loop))

    @classmethod
    def of(cls, columns: dict[str, str]) -> Report:
        """Reads a line of a table."""
        loop = _parsed(sass.Loop, columns, OF_LOOP) if columns.get("limit") else None
        return _parsed(cls, columns, OF_KERNEL, loop=loop)

    def faults(self, spills_allowed: int) -> list[str]:
        lacks_matrix_units = self.kernel in MATRIX_KERNELS and not self.instructions
        return faults_of(self.sm, self.spilled_bytes, self.shared_kb, lacks_matrix_units, spills_allowed)


OF_KERNEL = [field.name for field in fields(Report) if field.name != "loop"]
OF_LOOP = [field.name for field in fields(sass.Loop)]
"""The columns of a table."""


def _parsed(kind: Any, columns: dict[str, str], names: Sequence[str], **others: Any) -> Any:
    """An instance of a dataclass, whose fields of these names are parsed from a line of a table."""
    types: dict[Any, Any] = {"int": int, "float": float, "str": str}
    type_of = {field.name: field.type for field in fields(kind)}
    return kind(**{name: types[type_of[name]](columns[name]) for name in names}, **others)


def faults_of(sm: int, spilled_bytes: int, shared_kb: float, lacks_matrix_units: bool, spills_allowed: int = 0) -> list[str]:
    """The faults that no kernel may have."""
    found = []
    if spilled_bytes > spills_allowed:
        found.append(f"spills {spilled_bytes} bytes a thread")
    if shared_kb > SHARED_MEMORY_KB[sm]:
        found.append(f"needs {shared_kb} KB of shared memory, and sm_{sm} has {SHARED_MEMORY_KB[sm]}")
    if lacks_matrix_units:
        found.append("has no matrix instructions")
    return found


def cases(selection: Selection) -> list[Case]:
    return [Case(*of) for of in itertools.product(selection.targets, selection.dtypes, selection.widths)]


@dataclass(frozen=True)
class Compilation:
    """One kernel to compile: launch ``number`` of a case. ``source`` hashes everything that the compiled code depends on."""

    case: Case
    number: int
    source: str
    kernel: str
    tile: str

    def report(
        self, registers: int, spilled_bytes: int, shared_kb: float, instructions: str, loop: sass.Loop | None = None
    ) -> Report:
        case = self.case
        return Report(
            self.kernel, case.capability, case.dtype, case.width, self.tile,
            registers, spilled_bytes, shared_kb, instructions, self.source, loop,
        )  # fmt: skip

    def report_as(self, known: Report) -> Report:
        """The report of an earlier compilation of the same source, under its present names."""
        return self.report(known.registers, known.spilled_bytes, known.shared_kb, known.instructions, known.loop)


def compilations(selected: Iterable[Case]) -> list[Compilation]:
    """All launches of these cases, without those that would compile to the same code."""
    found: dict[str, Compilation] = {}
    for case in selected:
        for number, launch in enumerate(launches(case)):
            source = source_of(launch, case.capability)
            found.setdefault(source, Compilation(case, number, source, launch.kernel.__name__, tile_of(launch)))
    return list(found.values())


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
    from clop_kernels.backends.triton import tiles, warm_up  # imported late, after the environment is set

    return warm_up.launches_of(options, n, width, options.compute_dtype, tiles.Target(capability, PROCESSORS))


def launches_of_pairs(case: Case, n_left: int | None) -> Iterator[Any]:
    """The launches of only the passes over pairs. The temperature is a tensor."""
    from clop_kernels.backends.triton import launches as plan
    from clop_kernels.backends.triton import tiles

    dtype, n, width, target = DTYPES[case.dtype], case.n_rows, case.width, tiles.Target(case.capability, PROCESSORS)
    options = LossOptions(_empty(), positives="label", compute_dtype=dtype)
    zhat, groups = _empty(n, width, dtype=dtype), _empty(3, n, dtype=torch.int32)
    problem = plan.Problem.of_pairs(zhat, n_left, options, target)
    values = plan.values_of_pairs(zhat, groups, options.temperature) | {"coefficients": _empty(4, n)}
    yield from plan.pair_softmax(problem).launches(values)
    yield from plan.pair_gradient(problem).launches(values)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def tile_of(launch: Any) -> str:
    blocks = [str(launch.arguments[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_D") if name in launch.arguments]
    return f"{'x'.join(blocks)}, {launch.options['num_warps']} warps, {launch.options['num_stages']} stages"


def compile_one(compilation: Compilation) -> Report:
    """Compiles one kernel, in a worker process."""
    import triton
    from triton.backends.compiler import GPUTarget

    launch = next(itertools.islice(launches(compilation.case), compilation.number, None))
    target = GPUTarget("cuda", compilation.case.capability, 32)
    compiled = triton.compile(_source(launch), target=target, options=launch.options)
    cubin, loop = compiled.asm["cubin"], None
    usage = usage_of(cubin)
    if compilation.kernel in MATRIX_KERNELS:
        loop = sass.loop_of(_dumped("-sass", cubin), compilation.case.capability, work_of(launch))
    found = [name for name, pattern in MATRIX_INSTRUCTIONS.items() if pattern in compiled.asm["ptx"]]
    # A kernel with assertions keeps the arguments of their messages on its stack; these bytes are not spills.
    spilled = 0 if launch.options["debug"] else usage.spilled_bytes
    return compilation.report(usage.registers, spilled, round(compiled.metadata.shared / 1024, 1), " ".join(found), loop)


class Usage(NamedTuple):
    """The resources of one thread of a compiled kernel."""

    registers: int
    spilled_bytes: int


def usage_of(cubin: bytes) -> Usage:
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _dumped("-res-usage", cubin)))
    return Usage(int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"]))


def _dumped(option: str, cubin: bytes) -> str:
    """The output of cuobjdump, which Triton's package contains, for a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def work_of(launch: Any) -> sass.Work:
    """The work of one tile of a launch with matrix products. For the kernels of wide rows, of one step of BLOCK_K."""
    arguments, name = launch.arguments, launch.kernel.__name__
    rows, columns, zhat = arguments["BLOCK_M"], arguments["BLOCK_N"], arguments["zhat"]
    itemsize, passes = zhat.dtype.itemsize, 3 if arguments["PRECISION"] == "tf32x3" else 1
    depth = arguments["BLOCK_D"] if name == "gradient_kernel" else arguments["BLOCK_K"]
    products = [(rows, columns, depth)]
    n_copied = columns * depth
    if name == "gradient_kernel":
        products.append((rows, depth, columns))
    elif depth < arguments["WIDTH"] or name == "product_kernel":
        n_copied += rows * depth  # the rows are copied as well
    return sass.Work(tuple(products), n_copied * itemsize, itemsize, passes, launch.options["num_warps"])


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
        is_specialized = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (is_specialized and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        names = {float: "fp32", int: "i32"}
        signature[parameter.name] = pointers[value.dtype] if isinstance(value, Tensor) else names[type(value)]
        is_aligned = isinstance(value, Tensor) or (is_specialized and value % 16 == 0)
        if is_aligned and not parameter.do_not_specialize_on_alignment:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


@functools.cache
def triton_version() -> str:
    return importlib.metadata.version("triton")


def source_of(launch: Any, capability: int) -> str:
    """A hash of everything that the compiled code depends on. It does not depend on Python's version or the package's path."""
    source = _source(launch)
    parts = (
        triton_version(),
        capability,
        code_of(launch.kernel.fn),
        list(source.signature.items()),
        list(source.constants.items()),
        list(source.attrs.items()),
        sorted(launch.options.items()),
    )
    return _digest(parts)


@functools.cache
def code_of(kernel: Any) -> str:
    """A hash of a kernel, of all functions of this package that it calls, and of the constants that they read.

    Triton's own ``cache_key`` of a function changes with every comment and with every line added above the function.
    """
    found: dict[str, str] = {}
    pending = [kernel]
    while pending:
        item = pending.pop()
        module = sys.modules[item.__module__]
        if (name := f"{module.__name__}.{item.__qualname__}") in found:
            continue
        tree = ast.parse(inspect.getsource(item))
        found[name] = repr(_canonical(tree))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Name) or not hasattr(module, node.id):
                continue
            value = getattr(module, node.id)
            value = getattr(value, "fn", value)  # the Python function behind triton.jit
            if inspect.isfunction(value) or inspect.isclass(value):
                if value.__module__.startswith("clop_kernels."):  # other functions are Triton's, whose version is in the hash
                    pending.append(value)
            elif not inspect.ismodule(value):
                found[f"{module.__name__}.{node.id}"] = repr(value)
    return _digest(sorted(found.items()))


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _canonical(node: Any) -> Any:
    """A syntax tree without docstrings and positions. Empty fields are dropped, since not every Python version has them."""
    if isinstance(node, ast.AST):
        named = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
        return type(node).__name__, [(name, _canonical(value)) for name, value in named]
    if isinstance(node, list):
        return [_canonical(item) for item in node if not _is_docstring(item)]
    return node


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def compile_all(wanted: Sequence[Compilation], console: Console) -> Iterator[Report]:
    """Compiles in parallel, and yields each report as it comes."""
    n_processes = len(os.sched_getaffinity(0))
    pool = ProcessPoolExecutor(n_processes, initializer=leave_interrupts_to_parent)
    with Progress(console=console, transient=True) as progress, pool:
        yield from progress.track(pool.map(compile_one, wanted), len(wanted), description="compiling")


SHOWN = {name: name for name in OF_KERNEL if name != "source"} | {
    "total": "far loop", "reciprocals": "rcp", "predicted_clocks": "clocks", "limit": "limit",
}  # fmt: skip
"""The columns to print, and their titles."""


def report_table(reports: Sequence[Report], everything: bool, spills_allowed: int) -> Table:
    table = Table(
        title="Triton kernels compiled ahead of time",
        caption="far loop: instructions per thread for one tile. rcp: how many of them are reciprocals. clocks: predicted clocks "
        "per tile. limit: the unit that determines them",
    )
    left = ("kernel", "dtype", "tile", "instructions", "limit")
    for name, title in SHOWN.items():
        table.add_column(title, no_wrap=True, justify="left" if name in left else "right")
    for report in reports:
        style = "red" if report.faults(spills_allowed) else "yellow" if report.spilled_bytes else None
        if everything or style or report.kernel in MATRIX_KERNELS:
            columns = report.columns()
            table.add_row(*(str(columns[name]) for name in SHOWN), style=style)
    return table


def read_table(path: Path) -> list[Report]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [Report.of(row) for row in csv.DictReader(file)]


def write_table(reports: Iterable[Report], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*OF_KERNEL, *OF_LOOP], lineterminator="\n")
        writer.writeheader()
        writer.writerows(report.columns() for report in reports)


GIGAHERTZ = 1.8
"""The clock rate of predicted times: about that of an H100 or H200 under load."""


def plan_table(reports: Sequence[Report], capability: int, dtype: str) -> Table:
    """How many launches a loss needs by number of rows, how columns are split, and the time predicted from the far loops."""
    from clop_kernels.backends.triton import tiles

    table = Table(
        title=f"Predicted, not measured: sm_{capability}, {dtype}, {PROCESSORS} processors at {GIGAHERTZ} GHz",
        caption="us: rounds of programs x (tiles per program + a program's overhead) x clocks per tile. whole: us without splits",
    )
    for title in ("D", "N", "launches", "softmax splits", "us", "whole", "gradient splits", "us", "whole"):
        table.add_column(title, justify="right", no_wrap=True)
    clocks = {(r.kernel, r.D): r.loop.predicted_clocks for r in reports if (r.sm, r.dtype) == (capability, dtype) and r.loop}
    target = tiles.Target(capability, PROCESSORS)
    for width, n_rows in itertools.product((64, 128, 256), (512 * 2**k for k in range(8))):
        found = list(launches(Case(capability, dtype, width, n_rows)))
        cells = [str(sum(launch.kernel.__name__ != "prototype_kernel" for launch in found))]
        for kernel in ("softmax", "gradient"):
            if (f"{kernel}_kernel", width) not in clocks:
                cells += ["", "", ""]
                continue
            launch = next(launch for launch in found if launch.kernel.__name__ == f"{kernel}_kernel")
            n_blocks, n_splits = launch.grid
            n_tiles = tiles.cdiv(n_rows, launch.arguments["BLOCK_N"])
            tile = getattr(tiles, kernel)(width, DTYPES[dtype], target)
            at_once = tile.at_once(DTYPES[dtype].itemsize, target)
            of_tile = clocks[f"{kernel}_kernel", width] * (at_once // PROCESSORS) / (1000 * GIGAHERTZ)
            times = [of_tile * tiles.time_of(n_blocks, n_tiles, at_once, PROCESSORS, n) for n in (n_splits, 1)]
            cells += [str(n_splits), *(f"{time:.0f}" for time in times)]
        table.add_row(str(width), str(n_rows), *cells)
    return table


HELP = """Compiles Triton kernels as a loss would launch them, without a GPU, and prints the resources of each: registers, spills,
shared memory, instructions of the far loop, and the clocks per tile predicted from them. The exit code is 1 if a kernel spills,
needs more shared memory than its GPU has, or lacks matrix instructions. Kernels that have not changed are read from the committed
table of this Triton version; each other kernel takes about five seconds of one core. For the CUDA kernels, use
python -m benchmarks.resources_cuda."""


def main(arguments: Sequence[str] | None = None) -> int:
    version = triton_version()
    release = ".".join(version.split(".")[:2])
    whole, spills_allowed = Selection(), SPILLS_ALLOWED.get(release, 0)
    path = TABLES / f"triton-{version}.csv"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=HELP)
    add = parser.add_argument
    add(
        "--targets",
        nargs="+",
        type=int,
        choices=SHARED_MEMORY_KB,
        default=whole.targets,
        metavar="SM",
        help="compute capabilities (80 90 100 120)",
    )
    add("--dtypes", nargs="+", choices=DTYPES, default=whole.dtypes, help="dtypes of the embeddings (all)")
    add("--dims", nargs="+", type=int, default=whole.widths, metavar="D", help="widths of the embeddings (16 32 64 128 256 768)")
    add("--all", action="store_true", help="compile everything anew, even unchanged kernels")
    add("--update", action="store_true", help="write the result to the committed table; can resume after an interruption")
    add("--everything", action="store_true", help="also print the kernels without matrix products, which are always checked")
    add(
        "--plan",
        action="store_true",
        help="only print how many launches a loss needs by N, and the time predicted from the committed table",
    )
    add("--csv", type=Path, metavar="FILE", help="also write the table to this file")
    given = parser.parse_args(arguments)
    selection = Selection(given.targets, given.dtypes, given.dims)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set, and Triton's interpreter does not compile: unset it")
    if given.update and selection != whole:
        parser.error("--update writes the whole table: expected no --targets, --dtypes or --dims")

    console = Console(width=None if sys.stdout.isatty() else 180)
    committed = read_table(path)
    known = {} if given.all else {report.source: report for report in committed if report.is_counted}
    if given.plan:
        for target, dtype in itertools.product(selection.targets, selection.dtypes):
            console.print(plan_table(committed, target, dtype))
        return 0
    wanted = compilations(cases(selection))
    missing = [one for one in wanted if one.source not in known]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # a cache for this run only; the user's is neither read nor written
        for report in compile_all(missing, console):
            known[report.source] = report
            if given.update:  # written each time, so that an interrupted run can resume
                write_table(known.values(), path)
    reports = [one.report_as(known[one.source]) for one in wanted]
    if given.update:
        write_table(reports, path)
    if given.csv is not None:
        write_table(reports, given.csv)

    console.print(report_table(reports, given.everything, spills_allowed))
    found = [(report, fault) for report in reports for fault in report.faults(spills_allowed)]
    for r, fault in found:
        console.print(f"{r.kernel} sm_{r.sm} {r.dtype} D={r.D} {r.tile}: {fault}", style="red")
    n_spilling = sum(0 < report.spilled_bytes <= spills_allowed for report in reports)
    if n_spilling:
        console.print(f"{n_spilling} kernels spill, up to the {spills_allowed} bytes allowed on Triton {release}", style="yellow")
    is_stale = selection == whole and not given.update and reports != committed
    if is_stale:
        told = "differs from the result: `python -m benchmarks.resources --update` writes it; then commit it"
        console.print(f"{path.name} {told}", style="red")
    console.print(f"{len(reports)} kernels, {len(missing)} of them compiled now, {len(found)} faults")
    return 1 if found or is_stale else 0


if __name__ == "__main__":
    sys.exit(main())
