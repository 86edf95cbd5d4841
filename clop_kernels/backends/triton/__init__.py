"""Triton kernels: the loss fused, on every GPU that Triton compiles for, with nothing compiled at install.

    prologue.py             raw embeddings -> unit rows in the order of the positive groups, prototype distances
    softmax.py              rows against columns: the softmax statistics, the loss
    gradient.py             rows against columns: the gradient's pairwise sums; wide.py where whole rows do not fit on chip
    finish.py               the pairwise sums -> the gradient of the raw embeddings
    prototype_gradient.py   the gradient of trained prototypes
    device.py               what kernels share: which columns a program's rows are compared with, whose positives are where
    launches.py             the launches of a call as data;  tiles.py  which tile is used where;  warm_up.py

Launches: 3 forward and 3 backward, the temperature's gradient included. float32 of D > 32, and D > 256, take 2 backward for each
pair of panels of 4096 rows in place of 1. Trained prototypes, ``reduction="none"`` and sorting by more than RANKED_INSTANCES
labels, or by the labels of two sides, take a few more, and TF32 takes 1 more a pass, which rounds the operands. Where no row can
have a positive, and only the prototype term is left, no kernel looks at a pair: 2 and a memset forward, 1 and a memset backward.

The passes over pairs alone, for a loss over a process group, are the launches of softmax.py, and of gradient.py or wide.py, with
other inputs and outputs: 1 and 1, or 2 for each pair of panels. Where columns are split, a few small ones add the summands up;
float16 takes 1 more, that takes M_SCALE off the sums.

What a kernel is compiled for are the width, the dtypes and the GPU: one serves every loss and every number of rows. (The first,
which reads the embeddings, is compiled anew for other strides than those of contiguous ones.)
``python -m clop_kernels warm-up`` compiles them ahead (warm_up.py).

float64 stays with the other backends: no matrix unit that Triton drives is exact in it. This module is imported when the
backend is first used, so that importing the package does not need Triton. Run on an H200;
without a GPU proved by Triton's interpreter against the float64 reference, and by ahead-of-time compilation for sm_80, sm_90,
sm_100 and sm_120.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...groups import label_groups
from ..contract import Gradients, LossOptions, Needs, Residuals, Softmax, as_unit_rows, unit_rows
from ..positions import sorted_by_class, upstream_of, used_prototypes
from ..rowwise import merged
from . import launches, tiles

CHECKS_VALUES = True
"""The kernels look at every label anyway, and assert on the device."""


def forward(
    embeddings: Tensor, labels: Tensor | None, prototypes: Tensor | None, options: LossOptions
) -> tuple[Tensor, Residuals]:
    """(N, D) embeddings, (B,) int64 labels, (K, D) prototypes -> the loss, and what the backward pass needs."""
    n_rows = embeddings.shape[0]

    def per_row() -> Tensor:
        return embeddings.new_empty(n_rows, dtype=torch.float32)

    if options.positives == "instance":
        groups = embeddings.new_empty((3, 0), dtype=torch.int32)
    elif launches.is_ranked(labels, options):
        groups = embeddings.new_empty((3, n_rows), dtype=torch.int32)
    else:
        assert labels is not None
        groups = label_groups(labels, options.n_views, options.n_left).table()
    zhat = unit_rows(embeddings, options.compute_dtype)
    counts = embeddings.new_zeros(2, dtype=torch.float32) if n_rows == 0 else embeddings.new_empty(2, dtype=torch.float32)
    residuals = Residuals(zhat, per_row(), per_row(), per_row(), per_row(), groups, counts)
    if n_rows == 0:
        return embeddings.new_zeros((0,) if options.reduction == "none" else (), dtype=torch.float32), residuals

    loss = per_row() if options.reduction == "none" else embeddings.new_empty((), dtype=torch.float32)
    target = tiles.target_of(embeddings.device)
    scratch = launches.ForwardScratch.like(zhat, options, target)
    with tiles.device_guard(embeddings.device):
        for launch in launches.forward(
            embeddings, labels, used_prototypes(prototypes, labels), options, loss, residuals, scratch, target
        ):
            launch.run()
    return loss, residuals


def backward(
    grad_loss: Tensor,
    embeddings: Tensor,
    residuals: Residuals,
    labels: Tensor | None,
    prototypes: Tensor | None,
    options: LossOptions,
    needs: Needs,
) -> Gradients:
    """The upstream gradient, () or (N,), to the gradients of the raw embeddings, the temperature and the prototypes."""
    n_rows = embeddings.shape[0]
    target = tiles.target_of(embeddings.device)
    used = used_prototypes(prototypes, labels)
    grad_embeddings = grad_temperature = grad_prototypes = None
    if n_rows == 0:
        grad_embeddings = torch.zeros_like(embeddings)
        grad_temperature = embeddings.new_zeros((), dtype=torch.float32)
    if needs.prototypes and prototypes is not None and (used is None or n_rows == 0):
        grad_prototypes = torch.zeros_like(prototypes, dtype=torch.float32)
    if n_rows == 0:
        return Gradients(grad_embeddings, grad_temperature, grad_prototypes)

    upstream = upstream_of(grad_loss, residuals, options)
    with tiles.device_guard(embeddings.device):
        if needs.embeddings or needs.temperature:
            grad_embeddings = torch.empty_like(embeddings, memory_format=torch.contiguous_format)
            scratch = launches.BackwardScratch.like(residuals.zhat, options, target)
            for launch in launches.backward(upstream, residuals, labels, used, options, scratch, grad_embeddings, target):
                launch.run()
            grad_temperature = scratch.grad_temperature if needs.temperature else None
        if needs.prototypes and used is not None:
            assert labels is not None
            n_classes, width = used.shape
            by_class, bounds = sorted_by_class(labels, residuals.groups, options, n_classes)
            parts = embeddings.new_empty((launches.prototype_parts(n_classes, target), n_classes, width), dtype=torch.float32)
            launches.prototypes_backward(upstream, residuals, by_class, bounds, used, options, parts, target).run()
            grad_prototypes = parts.sum(0)
    return Gradients(grad_embeddings if needs.embeddings else None, grad_temperature, grad_prototypes)


def pair_softmax(zhat: Tensor, groups: Tensor, n_left: int | None, options: LossOptions) -> Softmax:
    """See :mod:`clop_kernels.backends.contract`."""
    zhat = as_unit_rows(zhat)  # for which the kernels of a loss are compiled
    n_rows = zhat.shape[0] if n_left is None else n_left
    target = tiles.target_of(zhat.device)
    n_splits = launches.softmax_splits(zhat, -1 if n_left is None else n_left, n_left is not None, target)
    statistics = zhat.new_empty((n_splits, 4, n_rows), dtype=torch.float32)
    with tiles.device_guard(zhat.device):
        for launch in launches.pair_softmax(zhat, groups, n_left, options, statistics, target):
            launch.run()
    parts = Softmax(*statistics.unbind(1))
    return merged(parts) if n_splits > 1 else Softmax(*(of_rows[0] for of_rows in parts))


def pair_gradient(zhat: Tensor, groups: Tensor, n_left: int | None, coefficients: Tensor, options: LossOptions) -> Tensor:
    """See :mod:`clop_kernels.backends.contract`."""
    zhat = as_unit_rows(zhat)
    n_rows, scale = zhat.shape[0] if n_left is None else n_left, launches.m_scale(zhat.dtype)
    target = tiles.target_of(zhat.device)
    n_splits = launches.gradient_splits(zhat, -1 if n_left is None else n_left, n_left is not None, target)
    sums = zhat.new_empty((n_splits, n_rows, zhat.shape[1]), dtype=torch.float32)
    with tiles.device_guard(zhat.device):
        for launch in launches.pair_gradient(zhat, groups, n_left, coefficients, options, sums, target):
            launch.run()
    total = sums[0] if n_splits == 1 else sums.sum(0)
    return total if scale == 1 else total.div_(scale)
