"""Speed and memory of the losses, side by side.

- ``python -m benchmarks.compare`` times the providers in turn over a sweep and adds rows to a CSV file.
- ``python -m benchmarks.report`` turns CSV files into a page with figures.
- ``python -m benchmarks.gpu_check`` does both on a machine with a GPU, and runs the tests that need one.
- ``pytest benchmarks`` runs the pytest-benchmark suite.

All of them share :mod:`benchmarks.problems` (the losses), :mod:`benchmarks.providers` (the implementations) and
:mod:`benchmarks.measure` (time, memory, and the check that all agree). To measure another implementation, add it to
``providers.PROVIDERS``.
"""

from __future__ import annotations

import signal
import sys
from types import TracebackType

_EXTRAS = {"triton": "triton"}
"""Package -> the extra of this project that installs it; "bench" installs the others."""


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Replaces the traceback of Ctrl-C and of a missing package with one line. Installed for every command of this package."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        raise SystemExit(130)
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    if name is None or "." in name:  # a module of an installed package is missing: that is a bug, which a traceback helps to find
        sys.__excepthook__(kind, error, trace)
    else:
        command = f"pip install '.[{_EXTRAS.get(name, 'bench')}]'"
        print(f"The package {name!r} is not installed. Run this in the folder of the repository: {command}", file=sys.stderr)


def leave_interrupts_to_parent() -> None:
    """For a worker process: Ctrl-C reaches every process of the terminal, and the parent alone should answer it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


sys.excepthook = _end
