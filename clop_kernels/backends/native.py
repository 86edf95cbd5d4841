"""The compiled extension, csrc/: the backend ``cpu``, and whether the extension could be loaded at all.

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

from ..groups import label_groups
from . import tiled
from .contract import DISTANCES, REDUCTIONS, Gradients, LossOptions, Needs, Residuals, Softmax

CHECKS_VALUES = False

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


def forward(
    embeddings: Tensor, labels: Tensor | None, prototypes: Tensor | None, options: LossOptions
) -> tuple[Tensor, Residuals]:
    """See :mod:`clop_kernels.backends.contract`."""
    if options.positives == "label":
        assert labels is not None
        groups = label_groups(labels, options.n_views, options.n_left).table()
    else:
        groups = embeddings.new_empty((3, 0), dtype=torch.int32)
    loss, normalized, norms, shift, inverse_total, negative, counts = torch.ops.clop_native.cpu_forward(
        embeddings, groups, labels, _precise(prototypes, options), *_options(options)
    )
    return loss, Residuals(normalized, norms, shift, inverse_total, negative, groups, counts)


def backward(
    grad_loss: Tensor,
    embeddings: Tensor,
    residuals: Residuals,
    labels: Tensor | None,
    prototypes: Tensor | None,
    options: LossOptions,
    needs: Needs,
) -> Gradients:
    """See :mod:`clop_kernels.backends.contract`."""
    grads = torch.ops.clop_native.cpu_backward(
        grad_loss.to(options.accumulate_dtype),
        embeddings,
        *residuals,
        labels,
        _precise(prototypes, options),
        *needs,
        *_options(options),
    )
    return Gradients(*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)))


def pair_softmax(zhat: Tensor, groups: Tensor, n_left: int | None, options: LossOptions) -> Softmax:
    """See :mod:`clop_kernels.backends.contract`."""
    return Softmax(*torch.ops.clop_native.cpu_pair_softmax(zhat, groups, *_pair_options(n_left, options)))


def pair_gradient(zhat: Tensor, groups: Tensor, n_left: int | None, coefficients: Tensor, options: LossOptions) -> Tensor:
    """See :mod:`clop_kernels.backends.contract`."""
    grad: Tensor = torch.ops.clop_native.cpu_pair_gradient(zhat, groups, coefficients, *_pair_options(n_left, options))
    return grad


def _precise(prototypes: Tensor | None, options: LossOptions) -> Tensor | None:
    return None if prototypes is None else prototypes.to(options.accumulate_dtype)


def _options(options: LossOptions) -> tuple[Any, ...]:
    return (
        float(options.temperature),
        options.n_views,
        options.prototype_weight,
        DISTANCES.index(options.distance),
        REDUCTIONS.index(options.reduction),
        options.compute_dtype,
        options.normalize,
        -1 if options.n_left is None else options.n_left,
        options.negatives_only,
        *_tiles_and_threads(),
    )


def _pair_options(n_left: int | None, options: LossOptions) -> tuple[Any, ...]:
    return float(options.temperature), options.normalize, -1 if n_left is None else n_left, *_tiles_and_threads()


def _tiles_and_threads() -> tuple[int, int]:
    """The side of a tile, 0 for the kernels' choice, and the number of threads."""
    return tiled.chosen_tile_rows() or 0, torch.get_num_threads()
