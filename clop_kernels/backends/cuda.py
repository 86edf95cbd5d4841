"""The compiled CUDA kernels of csrc/cuda/: the loss fused on tensor cores. Nothing is compiled at first use.

Launches. If a row fits on chip (D <= 256, in float32 D <= 128), the forward pass takes 2 launches and the backward pass 2. Wider
rows use a library's matrix products, with a kernel between them for each panel. Positives by label take one more launch, or a
sort above RANKED_INSTANCES labels. The gradient of the prototypes, and ``reduction="none"``, take a few small operations more.
Two-sided, unnormalised and negatives-only losses use the same launches. With two sides, only pairs of a left and a right row are
visited. If no pairs exist, no kernel visits pairs.

The separate passes over pairs, ``pair_softmax`` and ``pair_gradient``, use the same kernels in 1 and 2 launches. They stop once
they have their sums, and with two sides they visit only the left rows.

Tests without a GPU run the source of these kernels on a CPU (tests/host/) and compare it with the float64 reference.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..groups import label_groups
from . import extension
from .contract import (
    FLOAT16_SCALE,
    RANKED_INSTANCES,
    Gradients,
    LossOptions,
    Needs,
    Residuals,
    Softmax,
    as_unit_rows,
    unit_rows,
)
from .extension import native_options, number_tensors
from .positions import Upstream, allows_tf32, sorted_by_class, upstream_of, used_prototypes

CHECKS_VALUES = True
"""The kernels read every label anyway, and assert on the device."""

kernels: Any = torch.ops.clop_native
"""The namespace of the operators. Tests replace it with operators that run on a CPU."""


@functools.cache  # a loss asks twice a step
def obstacle(device_index: int) -> str | None:
    """The reason why the kernels cannot run on this GPU, or None if they can."""
    info = extension.build_info()
    if info is None:
        return extension.obstacle()
    if info["cuda"] is None:
        return "the compiled extension was built without its CUDA kernels: the log of `pip install -v` says why"
    reason: str | None = torch.ops.clop_native.cuda_obstacle(device_index)
    return reason


def forward(
    embeddings: Tensor, labels: Tensor | None, prototypes: Tensor | None, options: LossOptions
) -> tuple[Tensor, Residuals]:
    """See :mod:`clop_kernels.backends.contract`."""
    if embeddings.shape[0] == 0:
        return _loss_of_no_rows(embeddings, options)
    arguments = arguments_of(options)
    if options.positives == "label":
        assert labels is not None
        if labels.shape[0] <= RANKED_INSTANCES:
            groups = kernels.cuda_groups(labels, *arguments)
        else:
            groups = label_groups(labels, options.n_views, options.n_left).table()
    else:
        groups = embeddings.new_empty((3, 0), dtype=torch.int32)
    zhat = unit_rows(embeddings, options.compute_dtype)
    tensors = groups, labels, used_prototypes(prototypes, labels)
    if is_wide(embeddings.shape[1], options.compute_dtype):
        results = _wide_forward(embeddings, zhat, tensors, options, arguments)
    else:
        results = kernels.cuda_forward(embeddings, zhat, *tensors, *arguments)
    loss, norms, shift, inverse_total, negative, counts = results
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
    if embeddings.shape[0] == 0:
        zero = embeddings.new_zeros((), dtype=torch.float32)
        return Gradients(torch.zeros_like(embeddings), zero, None if prototypes is None else torch.zeros_like(prototypes))
    residuals = residuals._replace(zhat=as_unit_rows(residuals.zhat))
    arguments, upstream = arguments_of(options), upstream_of(grad_loss, residuals, options)
    used = used_prototypes(prototypes, labels)
    grad_embeddings = grad_temperature = grad_prototypes = None
    if needs.embeddings or needs.temperature:
        classes = labels, used, needs.temperature
        if is_wide(embeddings.shape[1], options.compute_dtype):
            grads = _wide_backward(upstream, embeddings, residuals, classes, options, arguments)
        else:
            grads = kernels.cuda_backward(*upstream, embeddings, *residuals, *classes, *arguments)
        grad_embeddings, grad_temperature = grads
    if needs.prototypes and prototypes is not None:
        if labels is None or used is None:
            grad_prototypes = torch.zeros_like(prototypes, dtype=torch.float32)
        else:
            by_class, bounds = sorted_by_class(labels, residuals.groups, options, prototypes.shape[0])
            parts = kernels.cuda_prototype_gradient(
                *upstream, residuals.zhat, residuals.counts, by_class, bounds, used, *arguments
            )
            grad_prototypes = parts.sum(0)
    return Gradients(grad_embeddings if needs.embeddings else None, grad_temperature, grad_prototypes)


_Classes = tuple[Tensor | None, Tensor | None, bool]
"""The labels, the prototypes in float32, and whether the temperature's gradient is needed."""


def arguments_of(options: LossOptions) -> tuple[Any, ...]:
    """The arguments that every operator takes after its tensors."""
    is_tf32 = options.compute_dtype == torch.float32 and allows_tf32()
    return *native_options(options), *number_tensors(options), is_tf32


# ---- separate passes over pairs, for a loss whose rows are spread over processes --------------------------------------


def pair_softmax(zhat: Tensor, groups: Tensor, n_left: int | None, options: LossOptions) -> Softmax:
    """See :mod:`clop_kernels.backends.contract`."""
    zhat, options = as_unit_rows(zhat), options.of_pairs(n_left)
    arguments = arguments_of(options)
    if is_wide(zhat.shape[1], options.compute_dtype):
        statistics = _panel_statistics(zhat, groups, options, arguments, pairs_alone=True)
    else:
        statistics = kernels.cuda_pair_softmax(zhat, groups, *arguments)
    return Softmax(*statistics[:, :n_left])


def pair_gradient(zhat: Tensor, groups: Tensor, n_left: int | None, coefficients: Tensor, options: LossOptions) -> Tensor:
    """See :mod:`clop_kernels.backends.contract`. M is rounded to the dtype of the rows; float16 holds it if w_i <= 1."""
    zhat, options = as_unit_rows(zhat), options.of_pairs(n_left)
    arguments = arguments_of(options)
    if is_wide(zhat.shape[1], options.compute_dtype):
        laid_out = kernels.cuda_pair_coefficients(zhat, groups, coefficients, *arguments)
        sums = _panel_sums(laid_out, zhat, groups, options, arguments, pairs_alone=True)
        return sums.div_(FLOAT16_SCALE) if options.compute_dtype == torch.float16 else sums
    gradient: Tensor = kernels.cuda_pair_gradient(zhat, groups, coefficients, *arguments)
    return gradient


# ---- wide rows, csrc/cuda/wide.cuh -------------------------------------------------------------------------------------


def is_wide(width: int, compute_dtype: torch.dtype) -> bool:
    """Whether rows are too wide to fit on chip as operands of both products; equal to is_wide in csrc/cuda/loss.h."""
    return width > (128 if compute_dtype == torch.float32 else 256)


def panel_rows(compute_dtype: torch.dtype) -> int:
    """The side of a panel of float32 numbers. 4096 gives 64 MB, most of which fits in an L2 of 50 MB. With float32 rows, whose
    products are slower, 2048 gives 16 MB.
    """
    return 2048 if compute_dtype == torch.float32 else 4096


def _panels(n_rows: int, options: LossOptions, *, once: bool) -> Iterable[tuple[slice, slice]]:
    """The rows and columns of every panel: for each block of rows, all its columns in order.

    ``once`` leaves out the panels that are transposes of others.
    """
    if not options.has_pairs:
        return ()
    side = panel_rows(options.compute_dtype)

    def cut(start: int, end: int) -> list[slice]:
        return [slice(first, min(first + side, end)) for first in range(start, end, side)]

    if options.n_left is None:
        everything = cut(0, n_rows)
        return itertools.combinations_with_replacement(everything, 2) if once else itertools.product(everything, everything)
    left, right = cut(0, options.n_left), cut(options.n_left, n_rows)
    return itertools.chain(itertools.product(left, right), () if once else itertools.product(right, left))


def _wide_forward(
    embeddings: Tensor,
    zhat: Tensor,
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    options: LossOptions,
    arguments: tuple[Any, ...],
) -> tuple[Tensor, ...]:
    """Returns loss, norms, shift, inverse_total, negative and counts, and writes ``zhat``.

    ``tensors`` are the groups, the labels and the prototypes.
    """
    norms, distances = kernels.cuda_prologue(embeddings, zhat, *tensors, *arguments)
    statistics = _panel_statistics(zhat, tensors[0], options, arguments)
    value, *softmax, counts = kernels.cuda_panel_loss(statistics, distances, zhat, *tensors, *arguments)
    return value, norms, *softmax, counts


def _wide_backward(
    upstream: Upstream,
    embeddings: Tensor,
    residuals: Residuals,
    classes: _Classes,
    options: LossOptions,
    arguments: tuple[Any, ...],
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the embeddings and of the temperature."""
    zhat, norms, shift, inverse_total, negative, groups, counts = residuals
    coefficients, n_finished = kernels.cuda_coefficients(
        upstream.weights, zhat, shift, inverse_total, negative, groups, *arguments
    )
    sums = _panel_sums(coefficients, zhat, groups, options, arguments)
    result: tuple[Tensor, Tensor | None] = kernels.cuda_panel_finish(
        sums, n_finished, *upstream, embeddings, zhat, norms, groups, counts, *classes, *arguments
    )
    return result


def _panel_statistics(
    zhat: Tensor, groups: Tensor, options: LossOptions, arguments: tuple[Any, ...], pairs_alone: bool = False
) -> Tensor:
    """(N, D) -> (4, N), the fields of Softmax in the contract. With ``pairs_alone`` and two sides, right rows get no sums.

    Without ``pairs_alone``, positive_logits are sums of S_ip - log2(e) / tau.
    """
    statistics = zhat.new_empty((4, zhat.shape[0]), dtype=torch.float32)
    for rows, columns in _panels(zhat.shape[0], options, once=pairs_alone and options.n_left is not None):
        products = _product(zhat[rows], zhat[columns].T)
        kernels.cuda_panel_softmax(products, rows.start, columns.start, statistics, zhat, groups, pairs_alone, *arguments)
    return statistics


def _panel_sums(
    coefficients: Tensor,
    zhat: Tensor,
    groups: Tensor,
    options: LossOptions,
    arguments: tuple[Any, ...],
    pairs_alone: bool = False,
) -> Tensor:
    """sum_j M_ij zhat_j, (N, D). With ``pairs_alone`` and two sides: one way, (n_left, D)."""
    n_results = zhat.shape[0] if options.n_left is None or not pairs_alone else options.n_left
    sums = zhat.new_zeros((n_results, zhat.shape[1]), dtype=torch.float32)
    for rows, columns in _panels(zhat.shape[0], options, once=True):
        products = _product(zhat[rows], zhat[columns].T)
        pairs = kernels.cuda_panel_pairs(products, rows.start, columns.start, coefficients, zhat, groups, *arguments)
        sums[rows] += _product(pairs, zhat[columns])
        if rows != columns and columns.start < n_results:
            sums[columns] += _product(pairs.T, zhat[rows])
    return sums


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a float32 result. A GPU multiplies half-precision operands directly; a CPU needs them as float32."""
    if a.dtype != torch.float32 and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _loss_of_no_rows(embeddings: Tensor, options: LossOptions) -> tuple[Tensor, Residuals]:
    of_rows = embeddings.new_zeros(0, dtype=torch.float32)
    groups = embeddings.new_empty((3, 0), dtype=torch.int32)
    residuals = Residuals(
        unit_rows(embeddings, options.compute_dtype), of_rows, of_rows, of_rows, of_rows, groups, of_rows.new_zeros(2)
    )
    return of_rows if options.reduction == "none" else of_rows.new_zeros(()), residuals
