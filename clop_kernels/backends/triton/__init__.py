"""Triton kernels: the loss fused, on every GPU that Triton compiles for. Nothing is compiled at install time.

    prologue.py             raw embeddings -> unit rows in the order of the positive groups, prototype distances
    softmax.py              rows against columns: the softmax statistics, the loss
    gradient.py             rows against columns: the gradient's pairwise sums; wide.py for rows that do not fit on chip
    finish.py               the pairwise sums -> the gradient of the raw embeddings
    prototype_gradient.py   the gradient of trained prototypes
    device.py               device functions that kernels share: the columns that a program visits, and where positives are
    launches.py             the launches of a call as data
    tiles.py                the tile of each kernel on each GPU
    warm_up.py              compiling ahead of time

Launches: 3 forward and 3 backward, including the temperature's gradient. Wide rows (D > 256, in float32 D > 32) take 2 launches
for each pair of panels of 4096 rows in place of 1 backward launch. Trained prototypes, ``reduction="none"``, sorting by more than
RANKED_INSTANCES labels, and sorting by the labels of two sides take a few more. TF32 takes 1 more in each pass, which rounds the
operands. If no row can have a positive, only the prototype term is left, and no kernel visits pairs: 2 launches and a memset
forward, 1 and a memset backward.

The separate passes over pairs, for a loss over a process group, use the kernels of softmax.py, and of gradient.py or wide.py,
with other inputs and outputs: 1 launch each, or 2 for each pair of panels. If columns are split, a few small operations add the
summands. float16 takes 1 more, which divides the sums by M_SCALE.

The compiled kernels depend on the width, the dtypes and the GPU. One compiled kernel serves every loss and every number of rows.
(The first one, which reads the embeddings, is compiled again for strides other than those of contiguous embeddings.)
``python -m clop_kernels warm-up`` compiles the kernels ahead of time (warm_up.py).

float64 is left to the other backends, because no matrix unit that Triton uses is exact in float64. This module is imported at
first use, so that importing the package does not need Triton. The kernels have run on an H200. Without a GPU, Triton's
interpreter compares them with the float64 reference, and ahead-of-time compilation checks sm_80, sm_90, sm_100 and sm_120.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...groups import label_groups
from ..contract import Gradients, LossOptions, Needs, Residuals, Softmax, as_unit_rows, unit_rows
from ..positions import sorted_by_class, upstream_of, used_prototypes
from ..rowwise import merged
from . import launches, tiles
from .launches import Problem

CHECKS_VALUES = True
"""The kernels read every label anyway, and assert on the device."""

plan_of = functools.lru_cache(maxsize=256)(lambda make, *problem: make(*problem))
"""``make(*problem)``, cached; ``make`` is a function of launches.py that makes a plan. A training run has one plan for each pass
and batch size."""


def forward(
    embeddings: Tensor, labels: Tensor | None, prototypes: Tensor | None, options: LossOptions
) -> tuple[Tensor, Residuals]:
    """(N, D) embeddings, (B,) int64 labels, (K, D) prototypes -> the loss and the residuals."""
    n_rows, device = embeddings.shape[0], embeddings.device
    zhat, used = unit_rows(embeddings, options.compute_dtype), used_prototypes(prototypes, labels)
    problem = Problem.of(embeddings, zhat, labels, used, options, tiles.target_of(device))
    if options.positives == "instance":
        groups = embeddings.new_empty((3, 0), dtype=torch.int32)
    elif problem.is_ranked:
        groups = embeddings.new_empty((3, n_rows), dtype=torch.int32)
    else:
        assert labels is not None
        groups = label_groups(labels, options.n_views, options.n_left).table()
    # The results of an operator must not share memory, so each has its own.
    norms, shift, inverse_total, negative = (torch.empty(n_rows, dtype=torch.float32, device=device) for _ in range(4))
    counts = torch.empty(2, dtype=torch.float32, device=device)
    residuals = Residuals(zhat, norms, shift, inverse_total, negative, groups, counts)
    of_loss = (n_rows,) if problem.is_per_row else ()
    if n_rows == 0:
        counts.zero_()
        return embeddings.new_zeros(of_loss, dtype=torch.float32), residuals

    loss = embeddings.new_empty(of_loss, dtype=torch.float32)
    values = launches.values_of_loss(residuals, labels, used, options) | {"embeddings": embeddings, "loss": loss}
    with tiles.device_guard(device):
        plan_of(launches.forward, problem).run(values)
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
    """The upstream gradient, () or (N,) -> the gradients of the raw embeddings, the temperature and the prototypes."""
    n_rows = embeddings.shape[0]
    used = used_prototypes(prototypes, labels)
    grad_embeddings = grad_temperature = grad_prototypes = None
    if n_rows == 0:
        grad_embeddings = torch.zeros_like(embeddings)
        grad_temperature = embeddings.new_zeros((), dtype=torch.float32)
    if needs.prototypes and prototypes is not None and (used is None or n_rows == 0):
        grad_prototypes = torch.zeros_like(prototypes, dtype=torch.float32)
    if n_rows == 0:
        return Gradients(grad_embeddings, grad_temperature, grad_prototypes)

    residuals = residuals._replace(zhat=as_unit_rows(residuals.zhat))
    upstream = upstream_of(grad_loss, residuals, options)
    problem = Problem.of(embeddings, residuals.zhat, labels, used, options, tiles.target_of(embeddings.device))
    is_weighted = upstream.weights is not None
    values = launches.values_of_loss(residuals, labels, used, options) | launches.values_of_upstream(upstream, residuals)
    with tiles.device_guard(embeddings.device):
        if needs.embeddings or needs.temperature:
            values["grad_embeddings"] = grad_embeddings = torch.empty_like(embeddings, memory_format=torch.contiguous_format)
            grad_temperature = plan_of(launches.backward, problem, is_weighted).run(values)["grad_temperature"]
        if needs.prototypes and used is not None:
            assert labels is not None
            by_class, bounds = sorted_by_class(labels, residuals.groups, options, problem.n_classes)
            values |= {"by_class": by_class, "bounds": bounds}
            grad_prototypes = plan_of(launches.prototypes_backward, problem, is_weighted).run(values)["partial_gradients"].sum(0)
    return Gradients(
        grad_embeddings if needs.embeddings else None, grad_temperature if needs.temperature else None, grad_prototypes
    )


def pair_softmax(zhat: Tensor, groups: Tensor, n_left: int | None, options: LossOptions) -> Softmax:
    """See :mod:`clop_kernels.backends.contract`."""
    zhat = as_unit_rows(zhat)  # the layout for which the kernels of a loss are compiled
    problem = Problem.of_pairs(zhat, n_left, options, tiles.target_of(zhat.device))
    values = launches.values_of_pairs(zhat, groups, options.temperature)
    with tiles.device_guard(zhat.device):
        statistics = plan_of(launches.pair_softmax, problem).run(values)["statistics"]
    parts = Softmax(*statistics.unbind(1))
    return merged(parts) if len(statistics) > 1 else Softmax(*(of_rows[0] for of_rows in parts))


def pair_gradient(zhat: Tensor, groups: Tensor, n_left: int | None, coefficients: Tensor, options: LossOptions) -> Tensor:
    """See :mod:`clop_kernels.backends.contract`."""
    zhat, scale = as_unit_rows(zhat), launches.m_scale(zhat.dtype)
    problem = Problem.of_pairs(zhat, n_left, options, tiles.target_of(zhat.device))
    values = launches.values_of_pairs(zhat, groups, options.temperature) | {"coefficients": coefficients}
    with tiles.device_guard(zhat.device):
        sums = plan_of(launches.pair_gradient, problem).run(values)["sums"]
    total = sums[0] if len(sums) == 1 else sums.sum(0)
    return total if scale == 1 else total.div_(scale)
