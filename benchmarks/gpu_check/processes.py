"""Runs the processes of a step. Each has its own process group, which is killed at its time limit, and its own log file."""

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
"""The exit code with which a worker asks to continue with its next item in a new process."""

SHORTEST = 5.0
"""No process starts with fewer seconds left."""


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        name: Its name in the journal and of its log file.
        command: The command, without ``items``.
        limit: Seconds after which its process group is killed.
        environment: Environment variables in addition to those of this process.
        items: The worker's tasks, one after another. If one kills the worker, another process continues with the next.
        allowed: Exit codes that are not failures. (A failing test is a result of its own.)
        is_result: Whether its exit is itself a result, because the process writes none.
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
        journal: Where results go.
        folder: Where log files go.
        budget: Seconds from now after which nothing starts and everything is killed.
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
        """Runs the jobs of a step, ``at_once`` in parallel. An exception, for example Ctrl-C, ends the running ones."""
        with ThreadPoolExecutor(at_once) as pool:
            try:
                for done in [pool.submit(self.run, step, job) for job in jobs]:
                    done.result()
            except BaseException:
                self.kill_all()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def run(self, step: str, job: Job) -> None:
        """Runs the job until it ends, or until its limit or the budget is used up. Records how it ended unless all went well."""
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
        """The exit code, or None if it reached its limit, and its output."""
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
                _kill_group(process)  # also ends processes that it started and left behind
                process.wait()
                with self._lock:
                    self._running.discard(process)
        return code, log.read_bytes()[start:].decode(errors="replace")

    def kill_all(self) -> None:
        """Ends every running process and starts no other, for an interruption."""
        self._end = time.monotonic()
        with self._lock:
            self._is_killed = True
            for process in self._running:
                _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def end_with_parent() -> None:
    """Makes this process end if its parent disappears, for example because the parent was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
