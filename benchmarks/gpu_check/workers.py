"""The code of a step's processes: ``python -m benchmarks.gpu_check.workers FUNCTION ITEMS``, where ITEMS is a JSON array.

Each function takes one item and writes results to the journal. An exception is a result too. If it leaves the GPU in an error
state, the process ends, and another process continues with the next item.
"""

from __future__ import annotations

import io
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import clop_kernels
from clop_kernels import backends
from clop_kernels.backends import BackendUnavailableError

from .. import measure, tile_candidates, tile_sweep
from ..compare import NO_GRAPH, Comparison, progress_bar
from ..problems import DTYPES, Case
from ..providers import PROVIDERS
from ..results import environment_of, version
from .journal import Journal, Result
from .processes import RENEW, end_with_parent

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Add = Callable[..., None]


# ---- versions --------------------------------------------------------------------------------------------------------


def describe(item: str, add: Add) -> None:
    """Prints the environment of the run, with ``item`` as its date. If the driver hangs, only this process hangs."""
    print(json.dumps(asdict(environment_of(DEVICE, item))))


def versions(item: str, add: Add) -> None:
    packages = ("numpy", "triton", "pytest", "pytest-xdist", "lightly", "pytorch-metric-learning", "siglip-kernel")
    figures: dict[str, Any] = {name: version(name) or "not installed" for name in packages}
    figures |= {"platform": platform.platform()}
    if DEVICE.type == "cuda":
        gpu = torch.cuda.get_device_properties(DEVICE)
        figures |= {"sm": f"{gpu.major}{gpu.minor}", "processors": gpu.multi_processor_count}
        figures |= {"memory_gb": round(gpu.total_memory / 1e9, 1)}
    for dtype in ("bfloat16", "float32") if DEVICE.type == "cuda" else ("float32",):
        figures[f"{dtype}_tflops"] = round(measure.matrix_tflops(DEVICE, DTYPES[dtype]), 1)
    add("machine", "done", figures=figures)


# ---- canaries: are the results right? --------------------------------------------------------------------------------


def canary(item: dict[str, Any], add: Add) -> None:
    """Compares loss and gradients of one call with float64, and checks that a second call gives the same bits.

    The bounds are the project's. For float32 they are 1e-6 (loss) and 1e-5 (gradients). For half precision they are twice the
    error of the plain loss on the same rounded rows, but at least about a rounding unit, since the plain loss can be right by
    luck. The loss and the temperature's gradient have bounds of their own: each is one number, in which large terms cancel.
    """
    backend, dtype = item["backend"], DTYPES[item["dtype"]]
    n_rows, width, options = item["N"], item["D"], dict(item["options"])
    n_instances = n_rows // options["n_views"]
    generator = torch.Generator().manual_seed(n_rows + width)
    z = torch.randn(n_rows, width, generator=generator).to(DEVICE, dtype)
    labels = torch.randint(-1, 7, (n_instances,), generator=generator).to(DEVICE)
    prototypes = torch.nn.functional.normalize(torch.randn(7, width, generator=generator), dim=1).to(DEVICE)

    def solve(precise: torch.dtype | None, name: str) -> dict[str, Tensor]:
        leaves = {
            "embeddings": z.to(precise or z.dtype), "prototypes": prototypes.to(precise or torch.float32),
            "temperature": torch.tensor(options["temperature"], device=DEVICE, dtype=precise or torch.float32),
        }  # fmt: skip
        leaves = {key: leaf.clone().requires_grad_() for key, leaf in leaves.items()}
        loss = clop_kernels.clop_loss(
            leaves["embeddings"], labels, leaves["prototypes"], backend=name, **{**options, "temperature": leaves["temperature"]}
        )
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return {"loss": loss.detach().double()} | {key: g.double() for key, g in zip(leaves, grads, strict=True)}

    plain_backend = "reference" if n_rows <= 4096 else "tiled"
    expected, plain = solve(torch.float64, plain_backend), solve(None, plain_backend)
    actual, again = solve(None, backend), solve(None, backend)
    unit = torch.finfo(dtype).eps
    figures: dict[str, Any] = {"same_bits": all(torch.equal(actual[key], again[key]) for key in actual)}
    worst = ""
    for key, value in expected.items():
        error, of_plain = (float((x[key] - value).norm() / value.norm()) for x in (actual, plain))
        if dtype == torch.float32:
            bound = {"loss": 1e-6, "temperature": 1e-4}.get(key, 1e-5)
        else:
            bound = max(2 * of_plain, {"loss": unit / 8, "temperature": 2 * unit}.get(key, unit / 4))
        figures |= {key: f"{error:.1e}", f"plain {key}": f"{of_plain:.1e}"}
        if not error <= bound:
            worst = worst or f"{key}: relative error {error:.2g}, expected at most {bound:.2g}"
    if not figures["same_bits"]:
        worst = worst or "a second call gave other bits"
    name = f"{backend} {item['dtype']} N={n_rows} D={width} {options}"
    add(name, "wrong" if worst else "right", figures=figures, details=worst)


# ---- timings ---------------------------------------------------------------------------------------------------------


def speed(item: dict[str, Any], add: Add) -> None:
    """Measures one case of benchmarks.compare. The figures are the columns of its CSV file."""
    case, journal = Case(**item["case"]), Journal.of_process()
    providers = [provider for name, provider in PROVIDERS.items() if name in item["providers"]]
    with progress_bar(Console(file=io.StringIO())) as progress:  # hidden: the check shows its own progress
        comparison = Comparison(DEVICE, journal.environment, progress)
        try:
            comparison.run(case, providers, item["repeats"], item["seconds"])
        finally:
            for row in comparison.rows:
                outcome = "measured" if row.seconds else row.note.partition(":")[0] or "failed"
                add(f"{row.provider}: {case}", "wrong" if row.is_wrong else outcome, figures=row.columns(), details=row.note)
        if any(row.note.startswith(NO_GRAPH) for row in comparison.rows):
            sys.exit(RENEW)  # after a failed capture, torch's state cannot be trusted


def fill(item: dict[str, Any], add: Add) -> None:
    """Compiles the code of a later step into the disk caches of Triton and torch.compile. Nothing is timed."""
    case = Case(**item["case"])
    inputs = case.make_inputs(DEVICE)
    for name in item["providers"]:
        provider = PROVIDERS[name]
        if case.problem in provider.functions and measure.obstacle(provider, case, DEVICE) is None:
            measure.step(provider, case, inputs)()


# ---- tiles -----------------------------------------------------------------------------------------------------------


OUTCOMES = {"rejected": "skipped"}
"""A sweep's outcome -> the journal's word. A rejected candidate, for example one that spills, needs no attention."""


def tile(item: str, add: Add) -> None:
    """Measures a group of benchmarks.tile_candidates. The figures are the columns of tiles.csv."""
    group = next(group for group in (*tile_candidates.GROUPS, *tile_candidates.OF_STAND_IN) if group.name == item)
    backends.select("triton", DEVICE, DTYPES[group.dtype])
    target = tile_sweep.target_of(DEVICE)
    for row in tile_sweep.sweep_group(group, DEVICE, target):
        outcome = OUTCOMES.get(row.outcome, row.outcome)
        add(row.name, outcome, figures=row.figures() | tile_sweep.of_target(target), details=row.reason)


# ---- one call, for a profiler or a checker ---------------------------------------------------------------------------


def once(item: dict[str, Any], add: Add) -> None:
    """Runs NT-Xent on one shape, forward and backward, twice. The first call compiles."""
    z = torch.randn(item["N"], item["D"], device=DEVICE).to(DTYPES[item["dtype"]]).requires_grad_()
    for _ in range(2):
        clop_kernels.ntxent_loss(z, backend=item["backend"]).backward()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


METRICS = (
    "Duration", "Registers Per Thread", "Achieved Occupancy", "Compute (SM) Throughput", "L1/TEX Cache Throughput",
    "L2 Cache Throughput", "DRAM Throughput", "Executed Ipc Active", "No Eligible", "Local Memory Spilling Requests",
)  # fmt: skip
"""The metrics that go into the journal. The log has the whole profile."""


def profile(item: dict[str, Any], add: Add) -> None:
    """Runs Nsight Compute on the two passes over pairs in the second call of :func:`once`."""
    name = "{backend} N={N} D={D} {dtype}".format(**item)
    if item["tool"] is None:
        add(name, "skipped", details="ncu, Nsight Compute, is not on the PATH")
        return
    options = ("--set", "full", "--clock-control", "none", "-k", "regex:softmax|gradient", "-s", "2", "-c", "2")
    command = [item["tool"], *options, sys.executable, "-m", "benchmarks.gpu_check.workers", "once", json.dumps([item])]
    printed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90).stdout
    print(printed)
    kernels = re.split(r"^  (?=[\w:<>, ]*(?:softmax|gradient)_kernel)", printed, flags=re.MULTILINE)[1:]
    for kernel in kernels:
        figures = {}
        for metric in METRICS:
            found = re.search(rf"^ +{re.escape(metric)} +(\S+)? +([\d.,]+)$", kernel, re.MULTILINE)
            if found is not None:
                figures[f"{metric} ({found[1]})" if found[1] else metric] = found[2]
        add(f"{name} {kernel.split('(')[0][:60]}", "measured" if figures else "failed", figures=figures)
    if not kernels:
        add(name, "failed", details=printed[-1000:])


def host(item: dict[str, Any], add: Add) -> None:
    """Measures the host's time for a small call: forward and backward of each backend and of the plain loss."""
    case = Case(**item["case"])
    figures: dict[str, int] = {}
    for name in item["providers"]:
        step = measure.step(PROVIDERS[name], case, case.make_inputs(DEVICE))
        step.prepare()
        step()
        begins, ends = [], []
        for _ in range(30):
            step.prepare()
            start = time.perf_counter()
            loss = step.function(*step.inputs, step.temperature)
            middle = time.perf_counter()
            loss.backward()
            begins.append(1e6 * (middle - start))
            ends.append(1e6 * (time.perf_counter() - middle))
        figures |= {f"{name} forward us": round(statistics.median(begins)), f"{name} backward us": round(statistics.median(ends))}
    add(f"host time: {case}", "measured", figures=figures)


# ---- the process -----------------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[[Any, Add], None]] = {
    f.__name__: f for f in (versions, canary, speed, fill, tile, once, profile, host)
}


def main(arguments: list[str]) -> int:
    end_with_parent()
    function, items = arguments[0], json.loads(arguments[1])
    if function == "describe":
        describe(items[0], lambda *_, **__: None)
        return 0
    journal = Journal.of_process()
    for index, item in enumerate(items):
        print(f"begin {index}", flush=True)
        began = time.perf_counter()

        def add(name: str, outcome: str, began: float = began, **named: Any) -> None:
            result = journal.add(Result(journal.step, name, outcome, round(time.perf_counter() - began, 3), **named))
            print(result, flush=True)

        try:
            FUNCTIONS[function](item, add)
        except BackendUnavailableError as error:
            add(str(item), "skipped", details=str(error))
        except Exception as error:
            add(str(item), "failed", details=f"{type(error).__name__}: {error}"[:2000])
        if DEVICE.type == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception as error:
                add(str(item), "crashed", details=f"the GPU is in an error: {error}"[:2000])
                return RENEW
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
