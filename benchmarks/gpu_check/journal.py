"""results.jsonl: one JSON object a line for each result, appended the moment it is known."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..results import Environment

VARIABLE = "CLOP_GPU_CHECK"
"""How a process that the check starts finds the journal: its path, the environment of the run and the step, as JSON."""

GOOD = ("done", "right", "measured", "passed", "skipped", "left out")
"""The outcomes that are no reason to look; the others are "wrong", "failed", "crashed" and "out of time"."""


WHOLE = "whole step"
"""The name of the result that ends a step, and says what it took."""


@dataclass
class Result:
    """One result of a step.

    Attributes:
        step: of the plan.
        name: what was tried.
        outcome: one word, or two; see :data:`GOOD`.
        seconds: what it took; None if that says nothing.
        figures: numbers and words behind the outcome, by name.
        details: why, where it is not good.
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
    """Appends results to a file. Processes may share the file: a line is one write."""

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
        """For the environment of a process of a step, which shall write here too."""
        handed = {"path": str(self.path.resolve()), "environment": asdict(self.environment), "step": step}
        return {VARIABLE: json.dumps(handed)}

    @classmethod
    def of_process(cls) -> Journal:
        """The journal that the process which started this one has handed on."""
        given = json.loads(os.environ[VARIABLE])
        return cls(Path(given["path"]), Environment(**given["environment"]), given["step"])


def read(path: Path, start: int = 0) -> Iterator[tuple[Result, Environment]]:
    """All results, in the order in which they came, from a place in the file on. A line that was cut off is left out."""
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
