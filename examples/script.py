"""Every example imports this first: Ctrl-C and a missing package then end it with one line instead of a traceback."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import TracebackType

_EXTRAS = {"lightning_module.py": "recipes", "sentence_pairs.py": "recipes"}
"""Example -> the extra of this project that installs what it needs; "demo" does for the others."""


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        raise SystemExit(130)
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    if name is None or "." in name:  # a module of an installed package is missing: that is a bug, which a traceback helps to find
        sys.__excepthook__(kind, error, trace)
    else:
        command = f"pip install '.[{_EXTRAS.get(Path(sys.argv[0]).name, 'demo')}]'"
        print(f"The package {name!r} is not installed. Run this in the folder of the repository: {command}", file=sys.stderr)


def leave_interrupts_to_parent() -> None:
    """For a worker process: Ctrl-C reaches every process of the terminal, and the parent alone should answer it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


sys.excepthook = _end
