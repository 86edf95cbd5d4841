"""results.jsonl: one JSON object per line and result, appended as soon as it is known."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..results import Environment

VARIABLE = "CLOP_GPU_CHECK"
"""The environment variable through which a process finds the journal: its path, the run's environment and the step, as JSON."""

GOOD = ("done", "right", "measured", "passed", "skipped", "left out")
"""The outcomes that need no attention. The others are "wrong", "failed", "crashed" and "out of time"."""


WHOLE = "whole step"
"""The name of the result that ends a step and has its duration."""


@dataclass
class Result:
    """One result of a step.

    Attributes:
        step: The step of the plan.
        name: What was tried.
        outcome: One or two words; see :data:`GOOD`.
        seconds: The duration. None if it means nothing.
        figures: The numbers and words behind the outcome, by name.
        details: The reason, if the outcome is not good.
    """

    step: str
    name: str
    outcome: str
    seconds: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    details: str = ""

    @property
    def is_good(self) -> bool:
        return self.outcome in GOOD


class Journal:
    """Appends results to a file. Several processes may share the file, since each line is a single write."""

    def __init__(self, path: Path, environment: Environment, step: str = "") -> None:
        self.path = path
        self.environment = environment
        self.step = step

    def add(self, result: Result) -> Result:
        line = json.dumps(asdict(result) | asdict(self.environment), default=str)
        with self.path.open("a") as file:
            file.write(line + "\n")
        return result

    def as_variable(self, step: str) -> dict[str, str]:
        """The environment variable that lets a process of a step write to this journal."""
        handed = {"path": str(self.path.resolve()), "environment": asdict(self.environment), "step": step}
        return {VARIABLE: json.dumps(handed)}

    @classmethod
    def of_process(cls) -> Journal:
        """The journal that the parent process passed to this one."""
        given = json.loads(os.environ[VARIABLE])
        return cls(Path(given["path"]), Environment(**given["environment"]), given["step"])


def read(path: Path, start: int = 0) -> Iterator[tuple[Result, Environment]]:
    """All results in the order of the file, from the byte ``start`` on. Skips a line that was cut off."""
    names = [f.name for f in fields(Result)]
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            try:
                columns = json.loads(line)
            except ValueError:
                continue
            result = Result(**{name: columns.pop(name) for name in names})
            yield result, Environment(**columns)
