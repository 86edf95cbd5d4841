"""The compiled CUDA kernels, csrc/cuda/: the loss fused on tensor cores, with nothing compiled when it is first used.

Launches: 2 forward and 2 backward. Labels as positives take a sort besides, the gradient of prototypes and
``reduction="none"`` a few small operations.

**Not yet run on a GPU**: the kernels' own source runs on a CPU (tests/host/), against the float64 reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..groups import label_groups
from .contract import DISTANCES, REDUCTIONS, Gradients, LossOptions, Needs, Residuals
from .positions import logit_scale, sorted_by_class, upstream_of, used_prototypes

CHECKS_VALUES = True
"""The kernels look at every label anyway, and assert on the device."""

kernels: Any = torch.ops.clop_native
"""Where the operators are; tests put ones that run on a CPU in their place."""


def forward(
    embeddings: Tensor, labels: Tensor | None, prototypes: Tensor | None, options: LossOptions
) -> tuple[Tensor, Residuals]:
    """See :mod:`clop_kernels.backends.contract`."""
    if embeddings.shape[0] == 0:
        return _loss_of_no_rows(embeddings, options)
    if options.positives == "label":
        assert labels is not None
        groups = label_groups(labels, options.n_views).table()
    else:
        groups = embeddings.new_empty((3, 0), dtype=torch.int32)
    loss, normalized, norms, shift, total, negative, counts = kernels.cuda_forward(
        embeddings, *_arguments(groups, labels, prototypes, options)
    )
    return loss, Residuals(normalized, norms, shift, total, negative, groups, counts)


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
    if embeddings.shape[0] == 0:
        zero = embeddings.new_zeros((), dtype=torch.float32)
        return Gradients(torch.zeros_like(embeddings), zero, None if prototypes is None else torch.zeros_like(prototypes))
    arguments = _arguments(residuals.groups, labels, prototypes, options)
    upstream = upstream_of(grad_loss, residuals, options)
    grad_embeddings = grad_temperature = grad_prototypes = None
    if needs.embeddings or needs.temperature:
        grad_embeddings, grad_temperature = kernels.cuda_backward(
            upstream.unit, upstream.weights, embeddings, *_softmax(residuals), needs.temperature, *arguments
        )
    if needs.prototypes and prototypes is not None:
        if labels is None:
            grad_prototypes = torch.zeros_like(prototypes, dtype=torch.float32)
        else:
            by_class, bounds = sorted_by_class(labels, residuals.groups, options, prototypes.shape[0])
            grad_prototypes = kernels.cuda_prototype_gradient(
                upstream.unit, upstream.weights, residuals.normalized, residuals.counts, by_class, bounds, *arguments
            )
    return Gradients(
        grad_embeddings if needs.embeddings else None, grad_temperature if needs.temperature else None, grad_prototypes
    )


def _loss_of_no_rows(embeddings: Tensor, options: LossOptions) -> tuple[Tensor, Residuals]:
    of_rows = embeddings.new_zeros(0, dtype=torch.float32)
    groups = embeddings.new_empty((3, 0), dtype=torch.int32)
    residuals = Residuals(embeddings.to(options.compute_dtype), of_rows, of_rows, of_rows, of_rows, groups, of_rows.new_zeros(2))
    return of_rows if options.reduction == "none" else of_rows.new_zeros(()), residuals


def _softmax(residuals: Residuals) -> tuple[Tensor, ...]:
    r = residuals
    return r.normalized, r.norms, r.shift, r.total, r.negative, r.counts


def _arguments(groups: Tensor, labels: Tensor | None, prototypes: Tensor | None, options: LossOptions) -> tuple[Any, ...]:
    """What describes a loss to every operator."""
    used = used_prototypes(prototypes, labels)
    is_tensor = isinstance(options.temperature, Tensor)
    return (
        groups,
        None if labels is None else labels.contiguous(),
        None if used is None else used.to(torch.float32),
        options.temperature if is_tensor else None,
        *logit_scale(options.temperature),
        options.n_views,
        options.prototype_weight,
        DISTANCES.index(options.distance),
        REDUCTIONS.index(options.reduction),
        options.compute_dtype,
        torch.get_float32_matmul_precision() != "highest",
    )
