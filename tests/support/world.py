"""A few processes that stay, so that many small tests of process groups need not start their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed

TIMEOUT = 60.0
"""Seconds until a collective, or a test, is taken to hang."""


class RankError(AssertionError):
    """What went wrong on a rank, with its traceback."""


def _serve(rank: int, size: int, backend: str, store: str, calls: Connection) -> None:
    """The life of a rank: a process group of each number of ranks, then calls of (function, number of ranks, arguments)."""
    torch.set_num_threads(1)
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    timeout = timedelta(seconds=TIMEOUT)
    distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    groups = {n: distributed.new_group(range(n), timeout=timeout) for n in range(1, size + 1)}  # a group's own, not its parent's
    while True:
        call = calls.recv()
        if call is None:
            break
        function, n_ranks, arguments = call
        torch.manual_seed(0)
        answer: tuple[Any, Any]
        try:
            answer = function(groups[n_ranks], *arguments), None
        except Exception as error:
            answer = None, (error, traceback.format_exc())
        calls.send(answer)
    distributed.destroy_process_group()


class World:
    """Up to ``size`` ranks. Functions are sent by name: they are those of modules, and take the group first."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        context = multiprocessing.get_context("spawn")
        self._store = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(size)]
        self._calls = [ours for ours, _ in pipes]
        store = str(Path(self._store.name) / "store")
        self._processes = [
            context.Process(target=_serve, args=(rank, size, backend, store, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def run(self, n_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(group, *arguments)`` gives on each of the first ranks.

        Raises:
            RankError: if it raises on any.
        """
        results, errors = self.try_to_run(n_ranks, function, *arguments)
        for rank, error in enumerate(errors):
            if error is not None:
                raise RankError(f"on rank {rank} of {n_ranks}:\n{error[1]}")
        return results

    def errors_of(self, n_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Exception | None]:
        """What it raises on each rank."""
        return [error and error[0] for error in self.try_to_run(n_ranks, function, *arguments)[1]]

    def try_to_run(self, n_ranks: int, function: Callable[..., Any], *arguments: Any) -> tuple[list[Any], list[Any]]:
        calls = self._calls[:n_ranks]
        for call in calls:
            call.send((function, n_ranks, arguments))
        answers = []
        for rank, call in enumerate(calls):
            if not call.poll(2 * TIMEOUT):
                raise RankError(f"rank {rank} of {n_ranks} does not answer")
            answers.append(call.recv())
        return [result for result, _ in answers], [error for _, error in answers]

    def close(self) -> None:
        for call in self._calls:
            with contextlib.suppress(OSError):
                call.send(None)
        for process in self._processes:
            process.join(5)
            process.kill()
        self._store.cleanup()


def running(size: int, backend: str = "gloo") -> Iterator[World]:
    """For a fixture."""
    world = World(size, backend)
    yield world
    world.close()
