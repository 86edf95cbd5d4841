"""The backend ``cpu``: the compiled SIMD kernels in csrc/cpu/."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..groups import label_groups
from . import tiled
from .contract import Gradients, LossOptions, Needs, Residuals, Softmax
from .extension import native_options

CHECKS_VALUES = False


def forward(
    embeddings: Tensor, labels: Tensor | None, prototypes: Tensor | None, options: LossOptions
) -> tuple[Tensor, Residuals]:
    """See :mod:`clop_kernels.backends.contract`."""
    if options.positives == "label":
        assert labels is not None
        groups = label_groups(labels, options.n_views, options.n_left).table()
    else:
        groups = embeddings.new_empty((3, 0), dtype=torch.int32)
    loss, zhat, norms, shift, inverse_total, negative, counts = torch.ops.clop_native.cpu_forward(
        embeddings, groups, labels, _precise(prototypes, options), *_arguments(options)
    )
    return loss, Residuals(zhat, norms, shift, inverse_total, negative, groups, counts)


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
    return Gradients(
        *torch.ops.clop_native.cpu_backward(
            grad_loss.to(options.accumulate_dtype),
            embeddings,
            *residuals,
            labels,
            _precise(prototypes, options),
            *needs,
            *_arguments(options),
        )
    )


def pair_softmax(zhat: Tensor, groups: Tensor, n_left: int | None, options: LossOptions) -> Softmax:
    """See :mod:`clop_kernels.backends.contract`."""
    return Softmax(*torch.ops.clop_native.cpu_pair_softmax(zhat, groups, *_arguments(options.of_pairs(n_left))))


def pair_gradient(zhat: Tensor, groups: Tensor, n_left: int | None, coefficients: Tensor, options: LossOptions) -> Tensor:
    """See :mod:`clop_kernels.backends.contract`."""
    grad: Tensor = torch.ops.clop_native.cpu_pair_gradient(zhat, groups, coefficients, *_arguments(options.of_pairs(n_left)))
    return grad


def _precise(prototypes: Tensor | None, options: LossOptions) -> Tensor | None:
    return None if prototypes is None else prototypes.to(options.accumulate_dtype)


def _arguments(options: LossOptions) -> tuple[Any, ...]:
    """The arguments that every operator takes after its tensors. A tile side of 0 lets the kernels choose."""
    return *native_options(options), tiled.chosen_tile_rows() or 0, torch.get_num_threads()
