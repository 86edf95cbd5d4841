"""How a provider is measured. One step serves for its time, its memory, and the check that all providers agree."""

from __future__ import annotations

import ctypes
import gc
import re
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
"""(N, D) arrays that a provider is assumed to hold besides its N x N arrays. It is the project's own target."""

LARGEST_SHARE = 0.6
"""A case that needs more than this share of the free memory is not run, since other programs use the machine too."""

_BYTES_PER_MB = 1e6
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


# ---- one call --------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """A forward pass, a backward pass, or both. Call :meth:`prepare` before every call; it is not part of the step.

    After a call, ``loss`` and the gradients of ``inputs`` hold its results. "forward" leaves no gradients.
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
        """The step itself. A GPU may still be working when it returns."""
        loss = self._forward() if self._graph is None else self._graph
        self._graph = None
        if self.mode != "forward":
            loss.backward()
        self.loss = loss.detach()  # drops the graph, whose N x N arrays would stay while other providers are measured

    def _forward(self) -> Tensor:
        return self.function(*self.inputs, self.temperature)


def step(provider: Provider, case: Case, inputs: tuple[Tensor, ...]) -> Step:
    """The step of ``provider``, ready to be measured: libraries are loaded, and code for this shape is compiled.

    The warm-up is tiny if possible. A full-size one would leave memory with the allocator, which would hide the peak.
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
    """How far two providers may differ, as relative errors. Gradients are compared in the Frobenius norm."""

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
    """The loss and gradients that a step computed, in float64."""

    provider: str
    loss: Tensor
    gradients: tuple[Tensor, ...]

    @classmethod
    def of(cls, provider: str, called: Step) -> Outcome:
        assert called.loss is not None
        return cls(provider, called.loss.double(), tuple(x.grad.double() for x in called.inputs if x.grad is not None))


def check_equal(outcome: Outcome, expected: Outcome, case: Case) -> None:
    """Compares a loss, and its gradients if the case has them, with another provider's.

    Raises:
        AssertionError: if they differ; it names the provider, its error and the tolerance. A NaN never passes.
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
    """Times the steps in turn, A B A B, so that other load on the machine affects all of them alike.

    Args:
        steps: What to time, by name.
        repeats: The most rounds.
        seconds: Lists to append to, so that an interrupted caller keeps the timings so far. None makes new lists.
        most_seconds: After the first round, no round begins that might end later than this.
        before_each: Called with a name before each timing, to show progress.

    Returns:
        Seconds by name. Entries of the same index were timed in the same round.
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
    """The time of one call that begins on an idle device. On a GPU, CUDA events leave out the synchronisation."""
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
    """The median time until a call returns, even if the GPU is still working. This is what the host spends on a call."""
    seconds = []
    for _ in range(repeats):
        measured.prepare()
        start = time.perf_counter()
        measured.run()
        seconds.append(time.perf_counter() - start)
    synchronize(measured.device)
    return statistics.median(seconds)


def graph_seconds(measured: Step, repeats: int = 10) -> float:
    """The median time of the step as a CUDA graph. This is the GPU's own time, without the host's.

    Not for "backward" alone: its forward pass would have to be outside the graph.
    """
    leaves = [x for x in measured.inputs if x.requires_grad]

    def call() -> None:
        loss = measured.function(*measured.inputs, measured.temperature)
        if measured.mode != "forward":
            torch.autograd.grad(loss, leaves)  # backward() would add to leaf.grad, on the stream that made the leaf

    replay = captured(call)
    return statistics.median(seconds_of(replay, measured.device) for _ in range(repeats))


def captured(call: Callable[[], None]) -> Callable[[], None]:
    """``call`` as a CUDA graph, ready to be replayed. The call first runs three times on a separate stream."""
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
    """The speed of torch's square matrix product in ``dtype``, in 10^12 flops per second. The median of several."""
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
    """The peak memory of one call above what was in use before, in MB (10^6 bytes): with gradients, without inputs.

    On a GPU it comes from torch's allocator, on Linux from the resident memory of the process. None elsewhere.
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
    """Returns free memory to the system and resets the peak (VmHWM) to VmRSS. False if the system does not support it."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR_REFS.write_text("5")
    except (AttributeError, OSError, TypeError):  # not glibc; no such file, or no permission; no library handle
        return False
    return True


def _resident_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.removesuffix("kB")) * 1024
    raise LookupError(f"{_STATUS} has no field {field}")


def predicted_mb(provider: Provider, case: Case) -> float:
    """An upper bound of the extra memory. Half-precision arrays count as float32, because the softmax runs in float32."""
    entries = provider.pair_arrays * case.N**2 + ROW_ARRAYS * case.N * case.D
    return entries * max(DTYPES[case.dtype].itemsize, torch.float32.itemsize) / _BYTES_PER_MB


def obstacle(provider: Provider, case: Case, device: torch.device) -> str | None:
    """Why the provider cannot be measured on this case here, or None if it can."""
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


# ---- failures --------------------------------------------------------------------------------------------------------


def in_one_line(error: BaseException) -> str:
    """An error for a row's note. Of a compiler's log, which can fill pages, it keeps the first line that names the fault."""
    log = str(error).partition("\nOutput:\n")[2]  # torch.compile puts the compiler's command first
    lines = (log or str(error)).split("\n")
    faults = (line for line in lines if re.search(r"error|cannot find|undefined", line))
    text = f"{type(error).__name__}: {next(faults, lines[0]) if log else lines[0]}"[:300]
    folder = str(Path(torch.__file__).parent)
    if log and " " in folder:
        text += f" (torch.compile cannot link if the path of torch has a space, and this one does: {folder})"
    return text
