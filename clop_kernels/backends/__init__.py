"""The registry of backends: which exist, where each can run, and which one a call gets.

To add a backend, write a module with the functions of :mod:`clop_kernels.backends.contract` and enter it in :data:`BACKENDS`,
fastest first; :func:`by_preference` has the exceptions. Backends are imported at first use, so that importing the package needs
only torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

REFERENCE = "reference"
"""The name of the definition. It is not in :data:`BACKENDS`: it needs no operator, and runs only if a caller names it."""


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for by name cannot run here, or does not exist. The message gives the reason."""


@dataclass(frozen=True)
class Backend:
    """One way to compute the loss.

    Attributes:
        name: the value of the argument ``backend=``.
        summary: a description in one line.
        obstacle: (device, dtype) -> the reason why the backend cannot run on these embeddings here, or None if it can.
        module: the name of its module in this package.
        devices: the device types on which ``backend=None`` may choose it; None: any. By name it can run on others too.
    """

    name: str
    summary: str
    obstacle: Callable[[torch.device, torch.dtype], str | None]
    module: str
    devices: tuple[str, ...] | None = None

    def load(self) -> ModuleType:
        return _module(self.module)


@functools.cache  # a loss calls this several times a step
def _module(name: str) -> ModuleType:
    return importlib.import_module(name, __name__)


_OLDEST_TRITON = (3, 6)
_OLDEST_CAPABILITY = (8, 0)  # Triton compiles matrix products for sm_80 and newer


def _obstacle_to_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Imports Triton only if no earlier check has failed."""
    if not _is_installed("triton"):
        return "Triton is not installed: `pip install triton`, or install the Triton build that belongs to your torch"
    if dtype == torch.float64:
        return "it supports float32, float16 and bfloat16 only"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton kernels need a GPU; TRITON_INTERPRET=1 in the environment runs them on a CPU, slowly, for debugging"
        if dtype == torch.bfloat16:
            return "Triton's interpreter rounds bfloat16 towards zero"
        if _version_of("triton") < (3, 7) and _version_of("numpy") >= (2, 4):  # Triton's issue 9171
            return "Triton's interpreter needs Triton 3.7 for NumPy 2.4 or newer: `pip install 'numpy<2.4'`"
    elif device.type not in _GPUS:
        return f"Triton compiles for {' and '.join(_GPUS)} devices"
    elif device.type == "cuda" and torch.version.hip is None:
        capability = _capability(device.index)
        if capability < _OLDEST_CAPABILITY:
            return "Triton needs compute capability 8.0 or higher, and this GPU has {}.{}".format(*capability)
    if _version_of("triton") < _OLDEST_TRITON:
        return "it needs Triton 3.6 or newer, and {}.{} is installed".format(*_version_of("triton"))
    return None


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _capability(index: int | None) -> tuple[int, int]:
    """The compute capability of a GPU. An index of None means the current device, which may change between calls."""
    return _capability_of(torch.cuda.current_device() if index is None else index)


@functools.cache
def _capability_of(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _version_of(package: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", importlib.import_module(package).__version__)[:2]
    return int(major), int(minor)


def _obstacle_to_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return "CUDA kernels need an NVIDIA GPU"
    if dtype == torch.float64:
        return "it supports float32, float16 and bfloat16 only"
    reason: str | None = _module(".cuda").obstacle(device.index or 0)
    return reason


def _obstacle_to_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return "it runs on CPUs only"
    reason: str | None = _module(".extension").obstacle()
    return reason


_GPUS = ("cuda", "xpu")

BACKENDS: tuple[Backend, ...] = (
    Backend("cuda", "compiled CUDA C++ kernels", _obstacle_to_cuda, ".cuda", ("cuda",)),
    Backend("triton", "Triton kernels", _obstacle_to_triton, ".triton", _GPUS),
    Backend("cpu", "compiled SIMD kernels", _obstacle_to_cpu, ".cpu"),
    Backend("tiled", "plain PyTorch, tile by tile; any device", lambda device, dtype: None, ".tiled"),
)

_WARPGROUP_CAPABILITIES = (9, 10)
"""Major compute capabilities with the matrix instructions wgmma and tcgen05. Triton compiles to these instructions. csrc/cuda/
uses mma.sync, which is slower on these GPUs and is the only such instruction on others."""


def by_preference(device: torch.device, dtype: torch.dtype) -> tuple[Backend, ...]:
    """:data:`BACKENDS`, the fastest on ``device`` first; ``dtype`` is that of the products.

    The architecture decides between ``cuda`` and ``triton``, see :data:`_WARPGROUP_CAPABILITIES`. The exception is float32, where
    ``cuda`` comes first, because ``triton`` passes M through memory if D > 32. This was measured on sm_90 only, on an H200 with
    Triton 3.6. In bfloat16 at N = 65536, ``triton`` took 0.72, 0.54 and 0.86 of the time of ``cuda`` at D = 128, 256 and 768. In
    float32 at N = 32768 and D = 128, it took 1.9 times as long.
    """
    if device.type != "cuda" or torch.version.hip is not None or dtype == torch.float32:
        return BACKENDS
    if _capability(device.index)[0] not in _WARPGROUP_CAPABILITIES:
        return BACKENDS
    return tuple(sorted(BACKENDS, key=lambda backend: backend.name != "triton"))  # stable


NAMES = (*(backend.name for backend in BACKENDS), REFERENCE)


def select(name: str | None, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called ``name``. For None, the first in the order of :func:`by_preference` that can run.

    Raises:
        BackendUnavailableError: if ``name`` cannot run on this device and dtype, or does not exist.
    """
    for backend in by_preference(device, dtype):
        if name == backend.name or (name is None and (backend.devices is None or device.type in backend.devices)):
            obstacle = backend.obstacle(device, dtype)
            if obstacle is None:
                return backend
            if name is not None:
                raise BackendUnavailableError(
                    f"backend={name!r} cannot run on {device.type} with {dtype}: {obstacle}. "
                    f"backend=None takes the fastest backend that can"
                )
    raise BackendUnavailableError(f"backend={name!r}: no such backend; expected one of {', '.join(NAMES)}, or None")
