"""The project's own performance targets, and whether measured rows meet them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .problems import Case
from .results import Row, find, memory_ratio, ratio


@dataclass(frozen=True)
class Target:
    """A bound for a provider on a case.

    Attributes:
        device_type: The kind of device it is for; "cuda" means an H200.
        quantity: What ``bound`` limits. "time" and "memory": how many times less than ``baseline``'s. "share": the least
            share of the matrix rate. "MB": the most extra memory.
    """

    device_type: str
    provider: str
    case: Case
    quantity: Literal["time", "memory", "share", "MB"]
    bound: float
    baseline: str = ""

    def value(self, rows: Sequence[Row]) -> float | None:
        ours, baseline = find(rows, self.provider, self.case), find(rows, self.baseline, self.case)
        if self.quantity == "time":
            return ratio(baseline, ours)
        if self.quantity == "memory":
            return memory_ratio(baseline, ours)
        if ours is None:
            return None
        return ours.share_of_matrix_rate() if self.quantity == "share" else ours.peak_extra_mb

    def is_met(self, value: float) -> bool:
        return value <= self.bound if self.quantity == "MB" else value >= self.bound

    def __str__(self) -> str:
        promise = {
            "time": f"{self.bound:g} times as fast as {self.baseline}",
            "memory": f"{self.bound:g} times less extra memory than {self.baseline}",
            "share": f"{self.bound:.0%} of the matrix rate",
            "MB": f"at most {self.bound:g} MB extra",
        }[self.quantity]
        return f"{self.provider} on {self.case}: {promise}"


def _on_cpu() -> Iterator[Target]:
    middle, large = Case(8192), Case(65536)
    for provider, eager, compiled in (("cpu", 15.0, 5.5), ("tiled", 9.0, 3.0)):
        yield Target("cpu", provider, middle, "time", eager, "eager")
        yield Target("cpu", provider, middle, "time", compiled, "compile")
        yield Target("cpu", provider, middle, "MB", 60.0)
        yield Target("cpu", provider, large, "MB", 200.0)


def _on_h200() -> Iterator[Target]:
    small, middle = Case(2048, dtype="bfloat16"), Case(32768, dtype="bfloat16")
    large = [Case(65536, width, dtype="bfloat16") for width in (128, 256)]
    for provider, share in (("cuda", 0.65), ("triton", 0.5)):
        yield Target("cuda", provider, middle, "time", 15.0, "eager")
        yield Target("cuda", provider, middle, "time", 8.0, "compile")
        yield Target("cuda", provider, middle, "memory", 200.0, "eager")
        yield Target("cuda", provider, small, "time", 3.0, "eager")
        yield from (Target("cuda", provider, case, "share", share) for case in large)
    yield from (Target("cuda", "cuda", case, "time", 1.2, "triton") for case in large)


TARGETS = (*_on_cpu(), *_on_h200())


def verdicts(rows: Sequence[Row]) -> list[dict[str, str]]:
    """One line for each target whose case was tried on its kind of device."""
    tried = {(row.environment.device_type, row.case) for row in rows}
    lines = []
    for target in TARGETS:
        if (target.device_type, target.case) in tried:
            value = target.value(rows)
            verdict = "" if value is None else "met" if target.is_met(value) else "MISSED"
            measured = "not measured" if value is None else f"{value:.2f}"
            lines.append({"target": str(target), "measured": measured, "verdict": verdict})
    return lines
