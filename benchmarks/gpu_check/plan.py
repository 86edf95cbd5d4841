"""The plan: the steps in the order of their value, and their time limits.

``expected`` is the duration of a step in seconds, on an H200 with 16 CPU cores. ``limit`` applies to each of its processes. A
budget leaves out steps from the end: a step that the budget does not cover never starts.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from ..problems import Case
from ..sweeps import PRESETS, Sweep
from ..tile_candidates import GROUPS, OF_STAND_IN
from .processes import Job


@dataclass(frozen=True)
class Machine:
    """The machine that a plan is for: one with a GPU, or one where the CPU stands in for it."""

    on_gpu: bool
    cores: int

    @property
    def at_once(self) -> int:
        """How many processes may compile at once."""
        return max(1, min(14, self.cores - 2))

    @property
    def backends(self) -> tuple[str, ...]:
        return ("cuda", "triton") if self.on_gpu else ("cpu", "tiled", "triton")

    def environment_for(self, backend: str) -> dict[str, str]:
        return {} if self.on_gpu or backend != "triton" else {"TRITON_INTERPRET": "1"}


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: Its name for ``--steps``.
        summary: The question it answers, in one line.
        expected: Its duration in seconds. A guess unless ``was_timed``.
        jobs: machine -> its processes.
        runs_apart: Whether its processes run one after another, as timings need it. Otherwise several run at once.
    """

    name: str
    summary: str
    expected: float
    jobs: Callable[[Machine], list[Job]]
    runs_apart: bool = True
    was_timed: bool = True


# ---- versions, canaries ----------------------------------------------------------------------------------------------


def _machine(machine: Machine) -> list[Job]:
    jobs = [
        Job.worker("versions", [""], 60),
        Job("info", (sys.executable, "-m", "clop_kernels", "info"), 60, is_result=True),
    ]
    return [*jobs, Job("nvidia-smi", ("nvidia-smi",), 20, is_result=True)] if machine.on_gpu else jobs


_SHAPES = (
    (66, 64),
    (1030, 128),
    (66, 37),
    (513, 256),
    (258, 300),
    (130, 768),
    (90, 16),
    (13200, 128),
    (13200, 256),
    (16896, 100),
)
"""N and D: few and many blocks, odd widths, and widths below and above the largest one that stays on chip."""

_OPTIONS: tuple[dict[str, Any], ...] = (
    {"n_views": 2, "positives": "instance", "temperature": 0.1},
    {"n_views": 2, "positives": "label", "temperature": 0.1, "reduction": "sum"},
    {"n_views": 2, "positives": "instance", "temperature": 0.02, "distance": "euclidean"},
    {"n_views": 1, "positives": "label", "temperature": 0.02, "distance": "manhattan"},
)


def _canary(machine: Machine) -> list[Job]:
    """A process for each backend and dtype, so that a fault affects only one. A backend that compiles gets several."""
    jobs = []
    for dtype in ("bfloat16", "float32", "float16"):
        for backend in machine.backends:
            is_interpreted = backend == "triton" and not machine.on_gpu
            if is_interpreted and dtype == "bfloat16":
                continue  # Triton's interpreter rounds it towards zero
            items = [
                {"backend": backend, "dtype": dtype, "N": n_rows, "D": width, "options": options}
                for number, (n_rows, width) in enumerate(_SHAPES if machine.on_gpu else _SHAPES[: 1 if is_interpreted else 2])
                for options in (_OPTIONS if number == 0 else _OPTIONS[number % 2 :: 2])
                if n_rows % options["n_views"] == 0
            ]
            parts = 4 if backend == "triton" and machine.on_gpu else 1
            environment = machine.environment_for(backend) | {"CUDA_LAUNCH_BLOCKING": "1"}
            for part in range(parts):
                name = f"{backend} {dtype} {part}"
                jobs.append(Job.worker("canary", items[part::parts], 110, name, **environment))
    return jobs


# ---- timings ---------------------------------------------------------------------------------------------------------


def _cases(machine: Machine, preset: str) -> Iterator[dict[str, Any]]:
    sweeps: Sequence[Sweep] = PRESETS[preset]
    if not machine.on_gpu:
        providers = ("eager", "cpu", "tiled", "lightly", "metric-learning")
        sweeps = (
            Sweep((256,), (32,), repeats=2, providers=providers),
            Sweep((64,), (32,), ("clip",), repeats=2, providers=providers),
        )
    for sweep in sweeps:
        for case in sweep.cases():
            names = sweep.providers or ("eager", "compile", *machine.backends)
            yield {"case": asdict(case), "providers": names, "repeats": sweep.repeats, "seconds": sweep.seconds}


LARGEST_TO_FILL = 65536
"""Larger cases compile the same code, and running several of them side by side would use up all memory."""


def _fill(machine: Machine) -> list[Job]:
    cases = [*_cases(machine, "gpu"), *_cases(machine, "gpu-peers")]
    return _filling(
        machine,
        [
            case | {"providers": [name]}
            for case in cases
            for name in case["providers"]
            if name in ("compile", "triton", "siglip-kernel") and case["case"]["N"] <= LARGEST_TO_FILL
        ],
    )


def _fill_tiles(machine: Machine) -> list[Job]:
    if not machine.on_gpu:
        return []
    command = (sys.executable, "-m", "benchmarks.tile_sweep", "--compile-only", "--processes", str(machine.at_once))
    return [Job("compile", command, 120, is_result=True)]


def _filling(machine: Machine, items: list[dict[str, Any]]) -> list[Job]:
    """Spreads the items over all processes that may compile at once."""
    n_jobs = machine.at_once
    jobs = [Job.worker("fill", items[part::n_jobs], 100, f"fill {part}") for part in range(n_jobs)]
    return [job for job in jobs if job.items]


def _speed(preset: str) -> Callable[[Machine], list[Job]]:
    return lambda machine: [Job.worker("speed", list(_cases(machine, preset)), 180, preset)]


def _host(machine: Machine) -> list[Job]:
    case = Case(2048, dtype="bfloat16") if machine.on_gpu else Case(16, 16)
    providers = ("eager", "compile", *machine.backends) if machine.on_gpu else ("eager", "tiled")
    return [Job.worker("host", [{"case": asdict(case), "providers": providers}], 60)]


def _tiles(machine: Machine) -> list[Job]:
    names = [group.name for group in (GROUPS if machine.on_gpu else OF_STAND_IN[:2])]
    return [Job.worker("tile", names, 180, **machine.environment_for("triton"))]


# ---- tests -----------------------------------------------------------------------------------------------------------

_TESTS = ("tests/contract", "tests/gpu/test_losses.py", "tests/gpu/test_operators.py", "tests/examples/test_training_recipes.py")
_OF_A_STAND_IN = ("tests/api/test_prototypes.py", "tests/gpu/test_losses.py::test_at_most_six_launches")


def _pytest(name: str, limit: float, *arguments: str) -> Job:
    # torch's own warnings are not errors here. A time limit per test keeps a hanging test from using up the step's time.
    command = (
        sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_check.pytest_rows",
        *(("--timeout", "120") if find_spec("pytest_timeout") else ()), *arguments,
    )  # fmt: skip
    return Job(name, command, limit, allowed=(0, 1, 5))


def _tests(machine: Machine) -> list[Job]:
    """Runs tests in parallel if pytest-xdist is installed. The workers compile in parallel, into one shared cache."""
    workers = ("-n", str(machine.at_once)) if find_spec("xdist") else ()
    chosen = (*_TESTS, "-m", "gpu and not alone") if machine.on_gpu else _OF_A_STAND_IN
    return [_pytest("numbers", 240, *workers, *chosen)]


def _serial(machine: Machine) -> list[Job]:
    return [_pytest("alone", 150, *((*_TESTS, "-m", "gpu and alone and not sanitizer") if machine.on_gpu else _OF_A_STAND_IN))]


def _distributed(machine: Machine) -> list[Job]:
    return [_pytest("one rank a GPU", 120, *(("tests/gpu/test_distributed.py",) if machine.on_gpu else _OF_A_STAND_IN))]


# ---- tools -----------------------------------------------------------------------------------------------------------


def tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


_ONCE = (sys.executable, "-m", "benchmarks.gpu_check.workers", "once")


def _sanitizer(machine: Machine) -> list[Job]:
    sanitizer = tool("compute-sanitizer") if machine.on_gpu else "env"  # `env` only runs the command that follows it
    if sanitizer is None:
        return []
    jobs = []
    for check in ("memcheck", "racecheck"):
        for backend in ("cuda", "triton"):
            item = {"backend": backend if machine.on_gpu else "tiled", "N": 512, "D": 100, "dtype": "bfloat16"}
            options = ("--tool", check, "--error-exitcode", "9") if machine.on_gpu else ()
            command = (sanitizer, *options, *_ONCE)
            jobs.append(Job(f"{check} {backend}", command, 90, items=(item,), is_result=True))
    return jobs


def _profile(machine: Machine) -> list[Job]:
    items = [
        {"backend": backend if machine.on_gpu else "tiled", "N": 32768 if machine.on_gpu else 64, "D": width, "dtype": "bfloat16"}
        for width in (128, 256)
        for backend in ("cuda", "triton")
    ]
    return [Job.worker("profile", [item | {"tool": tool("ncu")} for item in items], 180)]


PLAN = (
    Step("machine", "the GPU, the versions, the available backends, the speed of a matrix product", 11, _machine),
    Step("canary", "are the results right? each backend, dtype and width against float64", 50, _canary, False),
    Step("fill", "compiles the code of later steps, so that no timing waits for a compiler", 40, _fill, False),
    Step("speed", "time and memory beside plain PyTorch and torch.compile", 90, _speed("gpu")),
    Step("tests", "the tests that need a GPU, in parallel: every option against float64", 120, _tests),
    Step("alone", "the tests that need the GPU alone: launches, streams, memory, the largest sizes", 120, _serial),
    Step("fill-tiles", "compiles the candidates for Triton's tiles", 30, _fill_tiles, was_timed=False),
    Step("tiles", "which of Triton's tiles is fastest", 100, _tiles, was_timed=False),
    Step("host", "how long the host needs for a small call", 10, _host, was_timed=False),
    Step(
        "peers", "other libraries, if installed: lightly, metric-learning, siglip-kernel", 40, _speed("gpu-peers"),
        was_timed=False,
    ),
    Step("profile", "Nsight Compute on the two passes over pairs, if ncu is installed", 60, _profile, was_timed=False),
    Step("distributed", "the loss over a process group, one rank per GPU", 40, _distributed, was_timed=False),
    Step("sanitizer", "compute-sanitizer on both backends, if it is installed", 120, _sanitizer, False, was_timed=False),
)  # fmt: skip


def machine_here(on_gpu: bool) -> Machine:
    return Machine(on_gpu, len(os.sched_getaffinity(0)))
