"""The registry of backends: which exist, which can run on what, and which one a call gets.

To add a backend, write a module with the two functions of :mod:`clop_kernels.backends.contract` and enter it in
:data:`BACKENDS`, fastest first. Modules are imported when first used, so that nothing but torch is needed to import the package.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

REFERENCE = "reference"
"""The definition itself: not in :data:`BACKENDS`, since it needs no operator and is only ever taken by name."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run; the message says why."""


@dataclass(frozen=True)
class Backend:
    """One way to compute the loss.

    Attributes:
        name: what ``backend=`` takes.
        summary: one line for a person.
        obstacle: (device, dtype) -> why it cannot run on such embeddings here, or None if it can.
        module: its module within this package.
    """

    name: str
    summary: str
    obstacle: Callable[[torch.device, torch.dtype], str | None]
    module: str

    def load(self) -> ModuleType:
        return importlib.import_module(self.module, __name__)


def _not_in_this_version(what: str) -> Callable[[torch.device, torch.dtype], str | None]:
    return lambda device, dtype: f"this version of clop_kernels has no {what} yet"


BACKENDS: tuple[Backend, ...] = (
    Backend("cuda", "compiled CUDA C++ kernels", _not_in_this_version("CUDA C++ kernels"), ".native"),
    Backend("triton", "Triton kernels", _not_in_this_version("Triton kernels"), ".triton"),
    Backend("cpu", "compiled SIMD kernels", _not_in_this_version("compiled CPU kernels"), ".native"),
    Backend("tiled", "plain PyTorch, tile by tile; any device", lambda device, dtype: None, ".tiled"),
)

NAMES = (*(backend.name for backend in BACKENDS), REFERENCE)


def select(name: str | None, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called ``name``, or for None the first of :data:`BACKENDS` that can run.

    Raises:
        BackendUnavailableError: if ``name`` cannot run on this device and dtype.
    """
    for backend in BACKENDS:
        if name is None or name == backend.name:
            obstacle = backend.obstacle(device, dtype)
            if obstacle is None:
                return backend
            if name is not None:
                raise BackendUnavailableError(
                    f"backend={name!r} cannot run on {device.type} with {dtype}: {obstacle}. "
                    f"backend=None takes the fastest that can"
                )
    raise BackendUnavailableError(f"backend={name!r}: no such backend; expected one of {', '.join(NAMES)}, or None")
