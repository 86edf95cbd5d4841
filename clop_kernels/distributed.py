"""The loss of rows that are spread over the ranks of a process group: exact, without a matrix of all, and no gradient is sent.

Every rank computes the terms of its own rows, against the rows of all. With M_ij the pairwise matrix of the gradient
(:class:`clop_kernels.backends.contract.Coefficients`), dL/dzhat_i = 1/tau sum_j M_ij zhat_j needs of row j no more than zhat_j
and its coefficients, four numbers that come of its own softmax: so each rank has the exact gradient of the global loss for its
own rows when it has seen the rows, and later the coefficients, of the others.

Tile picture, of rank 1 in a world of 4; o: within the rank, the pass of one process; x: one way, its rows against others'::

            j: rank 0  rank 1  rank 2  rank 3
    i: rank 1 [  x       o       x       x  ]

"gather" holds all others' rows at once, sorted by group, and takes all x in one pass: O(N D) memory. "ring" takes one x at a
time, while the rows of the next rank arrive: O(N_local D). With n = N / world rows a rank, itemsize that of zhat, both receive

    forward    (N - n) (D itemsize + 8 if positives are found by label)
    backward   gather: (N - n) (8, or by label 16);  ring: (N - n) (D itemsize + 8, or by label 24)

bytes a rank and step, and four sums; "gather" moves and, until they are sorted, holds the rows of all ranks as if each had as
many as the largest. Flops: as of one process over the world, but that only o's tiles can serve both of their sides on a CPU,
2 n N D forward and 4 n N D backward. The passes over pairs are the backends' own; what is done row by row is
:mod:`clop_kernels.backends.rowwise`; who has which rows is :mod:`clop_kernels.shards`.

Rows of two sides meet all rows of the other side, this rank's too: two passes one way, and no o.

All ranks must issue their collectives in one order, and an eager program does. Of several losses in one compiled graph Inductor
chooses the order, by the sizes of what they keep: where ranks have different numbers of rows that may be another one on each, and
only ``torch._inductor.config.reorder_for_peak_memory = False`` keeps the program's. (Operators with the effect ORDERED would, but
as of torch 2.13 Inductor fails on one whose results have sizes that only running it shows.)
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, ops
from .backends import Backend, rowwise
from .backends.contract import Gradients, LossOptions, Needs, Sharding, Softmax
from .collectives import Ranks
from .ops import Call
from .shards import N_FIELDS, Plan, Rows


class _Residuals(NamedTuple):
    """What the forward pass leaves: O(N_local D), and where rows are gathered O(N D). n local rows, by position.

    Attributes:
        zhat: (n, D) in the compute dtype.
        norms: (n,).
        softmax: (3, n): shift, inverse_total, negative; over the rows of all ranks.
        n_positives: (n,) int64, on all ranks.
        groups: (3, n) int32, Groups.table of this rank's rows alone.
        keys: (n,) int64, what positives on other ranks are found by; (0,) where there can be none.
        counts: (2,), how many rows of all ranks are in A and in S.
        gathered_0, gathered_1: for each side (its rows and, behind them, its columns, D); (0, D) without one, and in a ring.
        crossing_0, crossing_1: (3, rows and columns) int32, Groups.table of those; a column's order is its place in a gather.
        plan: (3, world) int64 on the CPU, :class:`Plan` as numbers.
    """

    zhat: Tensor
    norms: Tensor
    softmax: Tensor
    n_positives: Tensor
    groups: Tensor
    keys: Tensor
    counts: Tensor
    gathered_0: Tensor
    gathered_1: Tensor
    crossing_0: Tensor
    crossing_1: Tensor
    plan: Tensor


# ---- the two passes --------------------------------------------------------------------------------------------------


def forward(
    embeddings: Tensor,
    labels: Tensor | None,
    prototypes: Tensor | None,
    options: LossOptions,
    sharding: Sharding,
    backend: Backend,
) -> tuple[Tensor, _Residuals]:
    """This rank's (n, D) embeddings and (B,) labels -> the loss of all ranks, and what the backward pass needs."""
    plan = Plan.agreed(embeddings, prototypes, options, sharding, backend)
    groups = rowwise.groups_of(embeddings.shape[0], labels, options, embeddings.device)
    zhat, norms = rowwise.normalized_rows(embeddings, groups.order, options)
    precise = zhat.to(options.accumulate_dtype)
    rows = Rows(plan, zhat, groups.table(), plan.keys(labels, groups.order))

    softmax = Softmax(*(precise.new_zeros(len(zhat)) for _ in Softmax._fields))
    n_positives = groups.n_positives if options.n_left is None else torch.zeros_like(groups.order)
    gathered = [rows.nothing(), rows.nothing()]
    pair_softmax = backend.load().pair_softmax
    for index, side in enumerate(plan.sides):
        parts: list[Softmax] = []
        for block in rows.ring(side) if plan.is_ring else rows.gather(side):
            parts.append(pair_softmax(block.zhat, block.groups, block.n_left, options.of_pairs()))
            if block.n_left is not None:
                n_positives[side.rows] += (block.groups[2] - block.groups[1])[: block.n_left]
                gathered[index] = gathered[index] if plan.is_ring else block
        if parts:
            merged: Softmax = rowwise.merged(Softmax(*map(torch.stack, zip(*parts, strict=True))))
            for of_rows, of_side in zip(softmax, merged, strict=True):
                of_rows[side.rows] = of_side

    is_anchor = n_positives > 0
    contrastive = rowwise.contrastive_terms(softmax, n_positives, is_anchor, precise)
    pull = rowwise.Pull.of(labels, prototypes, groups.order, options)
    prototype = torch.zeros_like(contrastive) if pull is None else pull.distances(precise)
    is_labelled = torch.zeros_like(is_anchor) if pull is None else pull.is_labelled
    sums = torch.stack([x.sum().to(precise.dtype) for x in (is_anchor, is_labelled, contrastive, prototype)])
    if options.reduction == "none":
        loss = torch.empty_like(contrastive).index_copy_(0, groups.order, contrastive + options.prototype_weight * prototype)
    else:
        plan.ranks.sum(sums)
        divisors = sums[:2].clamp(min=1) if options.reduction == "mean" else torch.ones_like(sums[:2])
        loss = sums[2] / divisors[0] + options.prototype_weight * (sums[3] / divisors[1])
    statistics = torch.stack([softmax.shift, rowwise.inverse_totals(softmax, is_anchor), softmax.negative])
    kept = (gathered[0].zhat, gathered[1].zhat, gathered[0].groups, gathered[1].groups)
    return loss, _Residuals(zhat, norms, statistics, n_positives, rows.groups, rows.keys, sums[:2].clone(), *kept, plan.table())


def backward(
    grad_loss: Tensor,
    embeddings: Tensor,
    residuals: _Residuals,
    labels: Tensor | None,
    prototypes: Tensor | None,
    options: LossOptions,
    sharding: Sharding,
    backend: Backend,
    needs: Needs,
) -> Gradients:
    """The upstream gradient of what this rank returned, () or (n,), to the gradients of what it was given."""
    plan = Plan.of_table(residuals.plan, options, sharding)
    order = residuals.groups[0].to(torch.int64)
    precise = residuals.zhat.to(options.accumulate_dtype)
    grad_loss = grad_loss.to(precise.dtype)
    # Weights of at most 1, as matrices of half precision want them, in a unit that all ranks share.
    if options.reduction == "none":
        grad_loss = grad_loss.index_select(0, order)
        largest = torch.cat([grad_loss.abs(), grad_loss.new_zeros(1)]).amax()
        unit = plan.ranks.largest(largest).clamp(min=torch.finfo(torch.float32).tiny)
        weights, of_prototypes = grad_loss / unit, grad_loss
    else:
        # Every rank returned the loss of all, and backpropagates it: in the sum over ranks it is as often as there are ranks.
        upstream = grad_loss * (plan.ranks.size if sharding.grad_scale == "ddp" else 1)
        divisors = residuals.counts.clamp(min=1) if options.reduction == "mean" else torch.ones_like(residuals.counts)
        unit, of_prototypes = upstream / divisors
        weights = torch.ones_like(residuals.norms)
    shift, inverse_total, negative = residuals.softmax
    weights = torch.where(residuals.n_positives > 0, weights, 0.0)
    coefficients = rowwise.coefficients(weights, residuals.n_positives, inverse_total, negative, shift)

    rows = Rows(plan, residuals.zhat, residuals.groups, residuals.keys, coefficients)
    kept = ((residuals.gathered_0, residuals.crossing_0), (residuals.gathered_1, residuals.crossing_1))
    grad = torch.zeros_like(precise)
    pair_gradient = backend.load().pair_gradient
    for side, (gathered, crossing) in zip(plan.sides, kept, strict=False):
        for block in rows.ring(side) if plan.is_ring else rows.gather_coefficients(side, gathered, crossing):
            grad[side.rows] += pair_gradient(block.zhat, block.groups, block.n_left, block.coefficients, options.of_pairs())
    grad *= unit / options.temperature

    return rowwise.finish(
        grad, precise, residuals.norms, labels, prototypes, of_prototypes, order, options, needs, embeddings.dtype
    )


# ---- the operators ---------------------------------------------------------------------------------------------------


class FailuresAnnounced(AbstractContextManager["FailuresAnnounced"]):
    """Where this rank may raise an error before its loss: the other ranks raise too, and do not wait for it in vain."""

    def __init__(self, sharding: Sharding) -> None:
        self.sharding = sharding

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if isinstance(error, Exception) and self.sharding.check_ranks:
            Ranks(self.sharding.group_name).announce_failure(N_FIELDS)


def _forward(call: Call) -> tuple[Tensor, _Residuals]:
    assert call.sharding is not None
    with FailuresAnnounced(call.sharding):
        backend = backends.select(call.backend, call.embeddings.device, call.options.compute_dtype)
        ops.check_values(call.labels, call.prototypes, call.options)
    options = ops.known_numbers(call.options)
    return forward(call.embeddings, call.labels, call.prototypes, options, call.sharding, backend)


def _backward(grad_loss: Tensor, residuals: _Residuals, call: Call, needs: Needs) -> Gradients:
    assert call.sharding is not None
    backend = backends.select(call.backend, call.embeddings.device, call.options.compute_dtype)
    options = ops.known_numbers(call.options)
    inputs = call.embeddings, residuals, call.labels, call.prototypes
    return backward(grad_loss, *inputs, options, call.sharding, backend, needs)


def _fake(call: Call) -> tuple[Tensor, _Residuals]:
    assert call.sharding is not None
    embeddings, options = call.embeddings, call.options
    n_rows, width = embeddings.shape
    precise, has_sides = options.accumulate_dtype, options.n_left is not None
    n_keys = n_rows if options.positives == "label" or has_sides else 0
    context = torch.library.get_ctx()
    gathered, crossing = [], []
    for index in range(2):
        n_gathered = context.new_dynamic_size() if index == 0 or has_sides else 0
        gathered.append(embeddings.new_empty((n_gathered, width), dtype=options.compute_dtype))
        crossing.append(embeddings.new_empty((3, n_gathered), dtype=torch.int32))
    residuals = _Residuals(
        zhat=embeddings.new_empty((n_rows, width), dtype=options.compute_dtype),
        norms=embeddings.new_empty(n_rows, dtype=precise),
        softmax=embeddings.new_empty((3, n_rows), dtype=precise),
        n_positives=embeddings.new_empty(n_rows, dtype=torch.int64),
        groups=embeddings.new_empty((3, n_rows), dtype=torch.int32),
        keys=embeddings.new_empty(n_keys, dtype=torch.int64),
        counts=embeddings.new_empty(2, dtype=precise),
        gathered_0=gathered[0],
        gathered_1=gathered[1],
        crossing_0=crossing[0],
        crossing_1=crossing[1],
        plan=torch.empty((3, Ranks(call.sharding.group_name).size), dtype=torch.int64, device="cpu"),
    )
    return embeddings.new_empty((n_rows,) if options.reduction == "none" else (), dtype=precise), residuals


SHARDED_LOSS = ops.Operator("sharded_loss", _Residuals, _forward, _backward, _fake, is_sharded=True)
