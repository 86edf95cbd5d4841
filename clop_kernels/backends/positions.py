"""What GPU backends find out before their kernels run: numbers by position, a temperature as two floats, how float32 multiplies.

A position is an index into the rows as sorted by positive group (:mod:`clop_kernels.groups`).
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import LOG2_E, LossOptions, Residuals


class Upstream(NamedTuple):
    """The upstream gradient as kernels take it: w_i = unit * weights[i], weights None where they are all 1."""

    unit: Tensor  # () float32
    weights: Tensor | None  # (N,) float32, by position


def upstream_of(grad_loss: Tensor, residuals: Residuals, options: LossOptions) -> Upstream:
    """A scalar is the unit itself; of one gradient a row the largest is, so that no weight is beyond 1."""
    grad_loss = grad_loss.to(torch.float32)
    if options.reduction != "none":
        return Upstream(grad_loss, None)
    of_positions = _by_position(grad_loss, residuals.groups, options)
    unit = of_positions.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    return Upstream(unit, of_positions / unit)


def used_prototypes(prototypes: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """The prototypes in float32, None where no row has a label."""
    return None if prototypes is None or labels is None else prototypes.to(torch.float32)


def sorted_by_class(labels: Tensor, groups: Tensor, options: LossOptions, n_classes: int) -> tuple[Tensor, Tensor]:
    """Positions sorted by label, (N,), and where each class begins and ends among them, (K + 1,)."""
    key, by_class = torch.sort(_by_position(labels.repeat(options.n_views), groups, options), stable=True)
    return by_class, torch.searchsorted(key, torch.arange(n_classes + 1, device=labels.device))


def logit_scale(temperature: float | Tensor) -> tuple[float, float]:
    """log2(e) / temperature as the sum of two float32 numbers; zeros for a tensor, which the host does not read.

    One alone would be off by its rounding in every similarity alike, as if the temperature were another.
    """
    if isinstance(temperature, Tensor):
        return 0.0, 0.0
    scale = LOG2_E / temperature
    rounded = ctypes.c_float(scale).value
    return rounded, scale - rounded


def allows_tf32() -> bool:
    """Whether products of float32 may be rounded to TF32: where torch's own on a GPU are, whichever of its switches says so.

    torch.get_float32_matmul_precision() knows the older switches alone, and raises once one of the newer is used.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _by_position(of_rows: Tensor, groups: Tensor, options: LossOptions) -> Tensor:
    """(N,) by row of the user's tensor -> (N,) in the order of the groups."""
    if options.positives == "label":
        return of_rows.index_select(0, groups[0])
    if options.n_left is not None:  # each side is in the order of its instances as it is
        return of_rows
    return of_rows.reshape(options.n_views, -1).T.reshape(-1)
