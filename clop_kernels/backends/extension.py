"""The compiled extension, csrc/: whether it could be loaded, how it was built, and how its operators are given a loss's options.

The extension needs the stable ABI of torch 2.11 or newer and nothing else of torch, so one build fits all of them. Where it is
not there, or does not load, the package works without it; :func:`obstacle` says why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import warnings
from typing import Any

import torch
from torch import Tensor

from .contract import CHOICES, NUMBERS, LossOptions

_EXTENSION = "clop_kernels._native"


@functools.cache
def obstacle() -> str | None:
    """Why the compiled extension cannot be used, or None if it can. Warns, once, if it is there and does not load."""
    if importlib.util.find_spec(_EXTENSION) is None:
        return (
            "this installation has no compiled extension: it was installed from source without torch or a C++ compiler at hand; "
            "`pip install --no-build-isolation .` builds it"
        )
    try:
        importlib.import_module(_EXTENSION)
    except (ImportError, OSError, RuntimeError) as error:  # another glibc or CPU, torch older than 2.11, a symbol that is missing
        reason = f"the compiled extension does not load with torch {torch.__version__}: {error}"
        warnings.warn(f"clop_kernels goes on without its compiled kernels: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    return None


def build_info() -> dict[str, Any] | None:
    """How the extension was built and which SIMD level it takes here; None without it."""
    return None if obstacle() is not None else json.loads(torch.ops.clop_native.build_info())


def native_options(options: LossOptions) -> tuple[Any, ...]:
    """The options as every operator takes them after its tensors, csrc/common/options.h: choices by their index, no sides as -1.

    A number that is a tensor is 0 there: see :func:`number_tensors`.
    """
    numbers = (0.0 if isinstance(x, Tensor) else x for x in options.numbers)
    return *numbers, *_encoded(options[len(NUMBERS) :])


@functools.lru_cache(maxsize=256)  # a training has few
def _encoded(constants: tuple[Any, ...]) -> tuple[Any, ...]:
    """What stays the same while a training changes its numbers, as the extension takes it."""
    names = LossOptions._fields[len(NUMBERS) :]
    return tuple(_encode(name, value) for name, value in zip(names, constants, strict=True))


def number_tensors(options: LossOptions) -> tuple[Tensor | None, ...]:
    """The numbers that are tensors, as operators that read them on the device take them."""
    return tuple(value if isinstance(value, Tensor) else None for value in options.numbers)


def _encode(name: str, value: Any) -> Any:
    if name in CHOICES:
        return CHOICES[name].index(value)
    return -1 if name == "n_left" and value is None else value
