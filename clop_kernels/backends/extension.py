"""The compiled extension (csrc/): whether it loads, how it was built, and how its operators receive the options of a loss.

The extension uses only torch's stable ABI, of torch 2.11 or newer, so one build fits all these versions. If the extension is
missing or does not load, the package works without it, and :func:`obstacle` says why.
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
    """The reason why the compiled extension cannot be used, or None. Warns once if the extension exists but does not load."""
    if importlib.util.find_spec(_EXTENSION) is None:
        return (
            "this installation has no compiled extension: it is the pure Python wheel, or a source build that lacked torch, "
            "ninja or a C++ compiler; `pip install --no-build-isolation .` in a checkout builds it"
        )
    try:
        importlib.import_module(_EXTENSION)
    except (ImportError, OSError, RuntimeError) as error:  # another glibc or CPU, an old torch, a missing symbol
        reason = f"the compiled extension does not load with torch {torch.__version__}: {error}"
        warnings.warn(f"clop_kernels continues without its compiled kernels: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    return None


def build_info() -> dict[str, Any] | None:
    """How the extension was built, and which SIMD level it uses on this CPU. None without the extension."""
    return None if obstacle() is not None else json.loads(torch.ops.clop_native.build_info())


def native_options(options: LossOptions) -> tuple[Any, ...]:
    """The options in the form of csrc/common/options.h, which every operator takes after its tensors.

    A choice is its index, and ``n_left`` of None is -1. A number that is a tensor is passed as 0 here;
    :func:`number_tensors` passes the tensor.
    """
    numbers = (0.0 if isinstance(x, Tensor) else x for x in options.numbers)
    return *numbers, *_encoded(options[len(NUMBERS) :])


@functools.lru_cache(maxsize=256)  # one training uses few combinations
def _encoded(constants: tuple[Any, ...]) -> tuple[Any, ...]:
    """The options that do not change during training, encoded for the extension."""
    names = LossOptions._fields[len(NUMBERS) :]
    return tuple(_encode(name, value) for name, value in zip(names, constants, strict=True))


def number_tensors(options: LossOptions) -> tuple[Tensor | None, ...]:
    """The numbers that are tensors, None for the others. Some operators read them on the device."""
    return tuple(value if isinstance(value, Tensor) else None for value in options.numbers)


def _encode(name: str, value: Any) -> Any:
    if name in CHOICES:
        return CHOICES[name].index(value)
    return -1 if name == "n_left" and value is None else value
