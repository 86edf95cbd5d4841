"""How it is measured: one step of a provider serves for time, for memory and for the check that all compute the same."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .problems import DTYPES, Case, LossFunction, Mode
from .providers import Provider

WARM_UP_ROWS = 64
ROW_ARRAYS = 6
"""(N, D) arrays that a provider may hold beside its N x N ones: the project's own target."""

LARGEST_SHARE = 0.6
"""Of the free memory: what would take more is not run, for others live on the machine too."""

_BYTES_PER_MB = 1e6
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


# ---- one call --------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """A forward pass, a backward pass, or both. Call :meth:`prepare` first, every time: it is not part of the step.

    ``loss`` and the gradients of ``inputs`` are those of the last call; "forward" leaves no gradients.
    """

    function: LossFunction
    inputs: tuple[Tensor, ...]
    mode: Mode
    temperature: float
    loss: Tensor | None = None
    _graph: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    def prepare(self) -> None:
        """Drops the gradients of the last call and, for "backward", runs the forward pass."""
        for x in self.inputs:
            x.grad = None
        self._graph = self._forward() if self.mode == "backward" else None
        synchronize(self.device)

    def __call__(self) -> None:
        self.run()
        synchronize(self.device)

    def run(self) -> None:
        """The step itself; a GPU may still be at work when it returns."""
        loss = self._forward() if self._graph is None else self._graph
        self._graph = None
        if self.mode != "forward":
            loss.backward()
        self.loss = loss.detach()  # without the graph, whose N x N arrays would stay while others are measured

    def _forward(self) -> Tensor:
        return self.function(*self.inputs, self.temperature)


def step(provider: Provider, case: Case, inputs: tuple[Tensor, ...]) -> Step:
    """The step of ``provider``, ready to be measured: libraries are loaded, and code for this shape is compiled.

    The warm-up is tiny where it can be, since memory that an allocator keeps from a full one would hide the peak.
    """
    rows = case.N if provider.compiles_per_shape else WARM_UP_ROWS
    function = provider.functions[case.problem]
    warm_up = Step(function, replace(case, N=rows).make_inputs(inputs[0].device), case.mode, case.temperature)
    warm_up.prepare()
    warm_up()
    return Step(function, inputs, case.mode, case.temperature)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- equality --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tolerance:
    """How far two providers may lie apart: relative errors, the gradients' in the Frobenius norm."""

    loss: float
    gradient: float


TOLERANCES = {
    torch.float64: Tolerance(loss=1e-10, gradient=1e-9),
    torch.float32: Tolerance(loss=1e-5, gradient=1e-4),
    torch.float16: Tolerance(loss=1e-2, gradient=2e-2),
    torch.bfloat16: Tolerance(loss=1e-2, gradient=5e-2),
}


@dataclass(frozen=True)
class Outcome:
    """What a step has computed, in float64."""

    provider: str
    loss: Tensor
    gradients: tuple[Tensor, ...]

    @classmethod
    def of(cls, provider: str, called: Step) -> Outcome:
        assert called.loss is not None
        return cls(provider, called.loss.double(), tuple(x.grad.double() for x in called.inputs if x.grad is not None))


def check_equal(outcome: Outcome, expected: Outcome, case: Case) -> None:
    """Holds a loss, and its gradients where the case has them, to those of another provider.

    Raises:
        AssertionError: naming the provider, its error and the tolerance. A NaN never passes.
    """
    tolerance = TOLERANCES[DTYPES[case.dtype]]
    pairs = [("loss", outcome.loss, expected.loss, tolerance.loss)]
    for gradient, right in zip(outcome.gradients, expected.gradients, strict=True):
        pairs.append(("gradient", gradient, right, tolerance.gradient))
    for what, value, right, limit in pairs:
        error = float((value - right).norm() / right.norm())
        if not error <= limit:
            raise AssertionError(
                f"{what} of {outcome.provider} on {case}: relative error {error:.2g} against {expected.provider}, "
                f"expected at most {limit:.2g}"
            )


# ---- time ------------------------------------------------------------------------------------------------------------


def alternate(
    steps: Mapping[str, Step],
    repeats: int,
    seconds: dict[str, list[float]] | None = None,
    most_seconds: float = float("inf"),
    before_each: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Times the steps in turn, A B A B, so that what else the machine does meanwhile falls on all of them alike.

    Args:
        steps: what to time, by name.
        repeats: how often each is timed, at most.
        seconds: the lists to append to, so that a caller who is interrupted keeps what was timed. None: new ones.
        most_seconds: no round but the first begins if it might end later than this.
        before_each: called with a name before each timing, to show progress.

    Returns:
        Seconds by name; entries of the same index were timed in the same round.
    """
    seconds = {name: [] for name in steps} if seconds is None else seconds
    begin = time.perf_counter()
    for n_done in range(repeats):
        if n_done and (time.perf_counter() - begin) * (n_done + 1) / n_done > most_seconds:
            break
        for name, timed in steps.items():
            before_each(name)
            timed.prepare()
            seconds[name].append(seconds_of(timed.run, timed.device))
    return seconds


def seconds_of(run: Callable[[], None], device: torch.device) -> float:
    """One call, begun on an idle device: by CUDA events, which leave out the synchronisation; elsewhere by the clock."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return 1e-3 * float(begin.elapsed_time(end))
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def host_seconds(measured: Step, repeats: int = 10) -> float:
    """The median time until a call returns, whatever the GPU still does: what the host spends on it."""
    seconds = []
    for _ in range(repeats):
        measured.prepare()
        start = time.perf_counter()
        measured.run()
        seconds.append(time.perf_counter() - start)
    synchronize(measured.device)
    return statistics.median(seconds)


def graph_seconds(measured: Step, repeats: int = 10) -> float:
    """The median time of a replay of the step, captured as a CUDA graph: the GPU's own time, without the host's.

    Not of "backward" alone, whose forward pass would have to be outside the graph.
    """
    leaves = [x for x in measured.inputs if x.requires_grad]

    def call() -> None:
        loss = measured.function(*measured.inputs, measured.temperature)
        if measured.mode != "forward":
            torch.autograd.grad(loss, leaves)  # backward() would add to leaf.grad on the stream where the leaf was made

    replay = captured(call)
    return statistics.median(seconds_of(replay, measured.device) for _ in range(repeats))


def captured(call: Callable[[], None]) -> Callable[[], None]:
    """``call`` as a CUDA graph, ready to be replayed; it has run three times on a stream of its own before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    torch.cuda.synchronize()
    replay: Callable[[], None] = graph.replay
    return replay


def matrix_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of torch's square matrix product in ``dtype``, in 10^12 flops a second: the median of several."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = []
    for _ in range(12):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(5):
            torch.mm(a, b, out=out)
        synchronize(device)
        seconds.append((time.perf_counter() - start) / 5)
    return 2 * side**3 / statistics.median(seconds[2:]) / 1e12


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_extra_mb(measured: Step) -> float | None:
    """The peak of one call above what was in use before, in MB (10^6 bytes): with the gradients, without the inputs.

    On a GPU by torch's allocator; on Linux by the resident memory of the process. None where neither can be had.
    """
    device = measured.device
    measured.prepare()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        measured()
        return (torch.cuda.max_memory_allocated(device) - before) / _BYTES_PER_MB
    if not _reset_resident_peak():
        measured()
        return None
    before = _resident_bytes("VmRSS")
    measured()
    return (_resident_bytes("VmHWM") - before) / _BYTES_PER_MB


def _reset_resident_peak() -> bool:
    """Gives back what is free and sets VmHWM to VmRSS; False where the system cannot."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR_REFS.write_text("5")
    except (AttributeError, OSError, TypeError):  # not glibc; no such file, or not allowed; no handle of the process
        return False
    return True


def _resident_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.removesuffix("kB")) * 1024
    raise LookupError(f"{_STATUS} has no field {field}")


def predicted_mb(provider: Provider, case: Case) -> float:
    """The extra memory to expect, from above. Arrays of less than float32 count as float32: the softmax runs in it."""
    entries = provider.pair_arrays * case.N**2 + ROW_ARRAYS * case.N * case.D
    return entries * max(DTYPES[case.dtype].itemsize, torch.float32.itemsize) / _BYTES_PER_MB


def obstacle(provider: Provider, case: Case, device: torch.device) -> str | None:
    """Why the provider cannot be measured here on this case, or None if it can."""
    reason = provider.obstacle(device, DTYPES[case.dtype])
    available = _available_mb(device)
    if reason is None and available is not None:
        predicted = predicted_mb(provider, case)
        if predicted > LARGEST_SHARE * available:
            reason = f"needs about {predicted:,.0f} MB, more than {LARGEST_SHARE:.0%} of {available:,.0f} MB available"
    return reason


def _available_mb(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / _BYTES_PER_MB
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    return None if kib is None else kib * 1024 / _BYTES_PER_MB
