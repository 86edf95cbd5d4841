"""Compiles the kernels of a training run ahead of time, in parallel, into Triton's cache.

The compiled kernels depend on the width of the rows, their dtype, the dtype of the products, the GPU, and whether the embeddings
are contiguous. They depend on nothing else of a loss. The launches of one loss, on tensors without memory, are therefore all the
kernels that a training run needs.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contract import LossOptions, Residuals, unit_rows
from ..positions import Upstream
from . import launches
from .launches import Launch
from .tiles import Target


@dataclass(frozen=True)
class Gpu:
    """A GPU that need not be present, as Triton's GPUTarget describes it.

    Attributes:
        backend: "cuda", or another backend of Triton.
        arch: for an NVIDIA GPU the compute capability, 90 for sm_90.
        warp_size: the number of threads in a warp.
    """

    backend: str
    arch: int | str
    warp_size: int

    @classmethod
    def here(cls) -> Gpu:
        """The current GPU.

        Raises:
            RuntimeError: if there is no GPU.
        """
        from triton.runtime import driver

        target = driver.active.get_current_target()
        return cls(target.backend, target.arch, target.warp_size)

    @property
    def target(self) -> Target:
        """The target of the tiles. The number of processors is unknown here, but no tile depends on it."""
        return Target(self.arch if self.backend == "cuda" and isinstance(self.arch, int) else 0, 1)


class Driver:
    """Takes the place of Triton's driver for a GPU that need not be present. A launch asks it before its kernel is compiled."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self._gpu.backend, self._gpu.arch, self._gpu.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Training:
    """The properties of a training run on which its kernels depend, besides the GPU.

    Attributes:
        width: D, the numbers in a row.
        dtype: the dtype of the embeddings.
        compute_dtype: the dtype of the products: that of autocast, or of the embeddings.
        allows_tf32: whether float32 products may use TF32.
    """

    width: int
    dtype: torch.dtype
    compute_dtype: torch.dtype
    allows_tf32: bool = False


def kernels_of(training: Training, gpu: Gpu) -> list[Launch]:
    """One launch of each kernel that a training run needs."""
    options = LossOptions(_empty(), 1.0, n_views=2, positives="label", compute_dtype=training.compute_dtype)
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if training.allows_tf32 else "ieee"
    try:
        found: dict[str, Launch] = {}
        for launch in launches_of(options, 256, training.width, training.dtype, gpu.target):
            found.setdefault(launch.kernel.fn.__name__, launch)
        return list(found.values())
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision


def warm_up(trainings: list[Training], gpu: Gpu, n_jobs: int) -> Iterator[tuple[Training, str, float]]:
    """Compiles all kernels of some training runs, ``n_jobs`` at a time.

    Yields the training run, the kernel's name and the seconds of each kernel, as soon as it is compiled.
    """
    # Spawned processes share no state with this one, which may hold a GPU.
    with ProcessPoolExecutor(n_jobs, multiprocessing.get_context("spawn")) as pool:
        tasks = {
            pool.submit(_compile, training, gpu, number): training
            for training in trainings
            for number in range(len(kernels_of(training, gpu)))
        }
        for task in as_completed(tasks):
            yield tasks[task], *task.result()


def _compile(training: Training, gpu: Gpu, number: int) -> tuple[str, float]:
    from triton.runtime import driver

    driver.set_active(Driver(gpu))
    kernels = kernels_of(training, gpu)
    for launch in kernels:
        launch.kernel.cache_key  # noqa: B018 In Triton 3.6 a key depends on the keys computed before: use a training's order
    launch = kernels[number]
    begin = time.perf_counter()
    launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments, **launch.options)
    return launch.kernel.fn.__name__, time.perf_counter() - begin


def launches_of(options: LossOptions, n_rows: int, width: int, dtype: torch.dtype, target: Target) -> Iterator[Launch]:
    """The launches of a loss of (n_rows, width) labelled rows with prototypes, and of its gradients, on the device "meta"."""
    n_classes, is_per_row = 10, options.reduction == "none"
    z, grad_embeddings = (_empty(n_rows, width, dtype=dtype) for _ in range(2))
    zhat = unit_rows(z, options.compute_dtype)
    labels, prototypes = _empty(n_rows // options.n_views, dtype=torch.int64), _empty(n_classes, width)
    groups = _empty(3, n_rows if options.positives == "label" else 0, dtype=torch.int32)
    residuals = Residuals(zhat, _empty(n_rows), _empty(n_rows), _empty(n_rows), _empty(n_rows), groups, _empty(2))
    upstream = Upstream(_empty(), _empty(n_rows) if is_per_row else None)
    problem = launches.Problem.of(z, zhat, labels, prototypes, options, target)
    values = {
        **launches.values_of_loss(residuals, labels, prototypes, options),
        **launches.values_of_upstream(upstream, residuals),
        "embeddings": z,
        "loss": _empty(n_rows) if is_per_row else _empty(),
        "grad_embeddings": grad_embeddings,
        "by_class": _empty(n_rows, dtype=torch.int64),
        "bounds": _empty(n_classes + 1, dtype=torch.int64),
    }
    plans = launches.forward(problem), *(make(problem, is_per_row) for make in (launches.backward, launches.prototypes_backward))
    for plan in plans:
        yield from plan.launches(values)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
