"""Preparation shared by the GPU backends: numbers by position, the temperature as two floats, and the precision of float32.

A position is an index into the rows sorted by positive group (:mod:`clop_kernels.groups`).
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import LOG2_E, LossOptions, Residuals


class Upstream(NamedTuple):
    """The upstream gradient in the form that kernels take: w_i = unit * weights[i]. ``weights`` is None if all are 1."""

    unit: Tensor  # () float32
    weights: Tensor | None  # (N,) float32, by position


def upstream_of(grad_loss: Tensor, residuals: Residuals, options: LossOptions) -> Upstream:
    """Splits the upstream gradient. A scalar is the unit itself. With one gradient for each row, the unit is the largest
    magnitude among them, so that no weight exceeds 1.
    """
    grad_loss = grad_loss.to(torch.float32)
    if options.reduction != "none":
        return Upstream(grad_loss, None)
    of_positions = _by_position(grad_loss, residuals.groups, options)
    unit = of_positions.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    return Upstream(unit, of_positions / unit)


def used_prototypes(prototypes: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """The prototypes in float32; None without prototypes or labels."""
    return None if prototypes is None or labels is None else prototypes.to(torch.float32)


def sorted_by_class(labels: Tensor, groups: Tensor, options: LossOptions, n_classes: int) -> tuple[Tensor, Tensor]:
    """The positions sorted by label, (N,), and the bounds of each class among them, (K + 1,)."""
    key, by_class = torch.sort(_by_position(labels.repeat(options.n_views), groups, options), stable=True)
    return by_class, torch.searchsorted(key, torch.arange(n_classes + 1, device=labels.device))


def logit_scale(temperature: float | Tensor) -> tuple[float, float]:
    """log2(e) / temperature as the sum of two float32 numbers; two zeros for a tensor, which the host does not read.

    With one number, its rounding error would be the same in every similarity, as if the temperature were different.
    """
    if isinstance(temperature, Tensor):
        return 0.0, 0.0
    scale = LOG2_E / temperature
    rounded = ctypes.c_float(scale).value
    return rounded, scale - rounded


def allows_tf32() -> bool:
    """Whether float32 products may use TF32: if torch's own products on a GPU do, whichever of its switches was set.

    torch.get_float32_matmul_precision() knows only the older switches, and raises once a newer one is used.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _by_position(of_rows: Tensor, groups: Tensor, options: LossOptions) -> Tensor:
    """(N,) in the order of the user's rows -> (N,) by position."""
    if options.positives == "label":
        return of_rows.index_select(0, groups[0])
    if options.n_left is not None:  # each side keeps the order of its instances
        return of_rows
    return of_rows.reshape(options.n_views, -1).T.reshape(-1)
