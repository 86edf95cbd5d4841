"""Runs processes of a step: each in a group of its own, which is killed whole at its limit, with what it printed in a file."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .journal import Journal, Result

ROOT = Path(__file__).resolve().parents[2]

RENEW = 4
"""The exit code of a worker that asks for a new process, to go on with its next item in."""

SHORTEST = 5.0
"""Seconds: with fewer left nothing is begun."""


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        name: what the journal calls it, and its log file.
        command: what to run; for a job with ``items``, up to and without them.
        limit: seconds, after which its group is killed.
        environment: variables on top of this process's.
        items: what a worker does one after the other. If it dies of one, another process goes on with the next.
        allowed: exit codes that are no failure; a test that fails is a result of its own.
        is_result: its end is a result itself, for it writes none.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)
    items: tuple[Any, ...] = ()
    allowed: tuple[int, ...] = (0,)
    is_result: bool = False

    @classmethod
    def worker(cls, function: str, items: Sequence[Any], limit: float, name: str = "", **environment: str) -> Job:
        """A process that calls a function of workers.py for each item."""
        command = (sys.executable, "-m", "benchmarks.gpu_check.workers", function)
        return cls(name or function, command, limit, environment, tuple(items))


class Runner:
    """Starts the processes of a run, and ends them.

    Args:
        journal: where results go.
        folder: for the log files.
        budget: seconds from now, after which nothing is begun and everything is killed.
    """

    def __init__(self, journal: Journal, folder: Path, budget: float) -> None:
        self.journal, self.folder = journal, folder
        self._end = time.monotonic() + budget
        self._is_killed = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def left(self) -> float:
        return self._end - time.monotonic()

    def add(self, *arguments: Any, **named: Any) -> None:
        self.journal.add(Result(*arguments, **named))

    def run_all(self, step: str, jobs: Sequence[Job], at_once: int) -> None:
        """The jobs of a step, ``at_once`` side by side. An exception, such as an interruption, ends those that run."""
        with ThreadPoolExecutor(at_once) as pool:
            try:
                for done in [pool.submit(self.run, step, job) for job in jobs]:
                    done.result()
            except BaseException:
                self.kill_all()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def run(self, step: str, job: Job) -> None:
        """Runs the job to its end, its limit, or the end of the budget, and writes how it ended unless that is as it should."""
        limit = time.monotonic() + min(job.limit, self.left())
        log = self.folder / f"{step}-{re.sub('[^A-Za-z0-9._-]+', '-', job.name)}.txt"
        while True:
            began = time.monotonic()
            if limit - began < SHORTEST:
                self.add(
                    step, job.name, "left out", details="no time was left" + (f" for {len(job.items)} items" if job.items else "")
                )
                return
            code, printed = self._run_process(step, job, log, limit)
            if self._is_killed:
                return
            if code in job.allowed:
                if job.is_result:
                    self.add(step, job.name, "passed", time.monotonic() - began)
                return
            outcome = "out of time" if code is None else "crashed" if code < 0 or job.items else "failed"
            at = re.findall(r"^begin (\d+)$", printed, re.MULTILINE)
            name, left = job.name, ()
            if job.items and at:
                name, left = f"{job.name} {job.items[int(at[-1])]}", job.items[int(at[-1]) + 1 :]
            if code == RENEW:
                if not left:
                    return
                job = replace(job, items=left)
                continue
            details = ("" if code is None else f"exit {code}: ") + printed[-2000:]
            self.add(step, name, outcome, time.monotonic() - began, details=details)
            if code is None or not left:
                return
            job = replace(job, items=left)

    def _run_process(self, step: str, job: Job, log: Path, limit: float) -> tuple[int | None, str]:
        """The exit code, None at the limit, and what it printed."""
        command = [*job.command, *([json.dumps(job.items)] if job.items else [])]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **self.journal.as_variable(step), **job.environment}
        with log.open("ab") as file:
            start = file.tell()
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            with self._lock:
                self._running.add(process)
            try:
                code: int | None = process.wait(max(0.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _kill_group(process)  # what it has started and left behind too
                process.wait()
                with self._lock:
                    self._running.discard(process)
        return code, log.read_bytes()[start:].decode(errors="replace")

    def kill_all(self) -> None:
        """Ends every process that still runs, and begins no other; for an interruption."""
        self._end = time.monotonic()
        with self._lock:
            self._is_killed = True
            for process in self._running:
                _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def end_with_parent() -> None:
    """For a process of a step: ends it when the check is gone, killed without a chance to end it itself."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
