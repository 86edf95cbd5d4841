"""The loss of rows that are spread over the ranks of a process group: exact, without an N x N matrix, and no gradients are sent.

Every rank computes the terms of its own rows against the rows of all ranks. Let M be the pairwise matrix of the gradient
(:class:`clop_kernels.backends.contract.Coefficients`), so that dL/dzhat_i = 1/tau sum_j M_ij zhat_j. Of row j, this sum needs
only zhat_j and the coefficients, four numbers that come from row j's own softmax. A rank that has received the other ranks' rows,
and later their coefficients, can therefore compute the exact gradient of the global loss for its own rows.

Tile picture for rank 1 in a world of 4. o: pairs within the rank, computed as in one process. x: one way, the rank's rows against
the rows of another rank::

            j: rank 0  rank 1  rank 2  rank 3
    i: rank 1 [  x       o       x       x  ]

"gather" holds the rows of all other ranks at once, sorted by group, and computes all x in one pass: O(N D) memory. "ring"
computes one x at a time while the rows of the next rank arrive: O(N_local D) memory. In one forward and one backward pass, a rank
receives the following number of bytes, plus four sums. n = N / world is the number of rows on each rank, and itemsize is that of
zhat::

    forward    (N - n) (D itemsize + k)
    backward   gather: (N - n) c;  ring: (N - n) (D itemsize + c + k)

Without sides and with positives by instance, k = 0 and c = 8: a and the shift. Otherwise k = 8, the key that finds positives, and
c = 16: a, b, c and the shift. (Coefficients of float64 rows take twice as many bytes.)

"gather" pads every rank to the largest: it receives the padded rows and holds them until they are sorted. Flops are those of one
process divided by the world size, except on a CPU: there only the tiles of o serve both their rows and their columns, so the
passes take 2 n N D forward and 4 n N D backward. The backends compute the passes over pairs. :mod:`clop_kernels.backends.rowwise`
does the row-by-row work, and :mod:`clop_kernels.shards` knows which rank has which rows.

With two sides, a row is compared with all rows of the other side, including this rank's own. There are two one-way passes,
and no o.

All ranks must issue their collectives in the same order, and an eager program does so. If one compiled graph contains several
losses, Inductor orders them by the sizes of the tensors they keep. If ranks have different numbers of rows, ranks may therefore
order communication differently. ``torch._inductor.config.reorder_for_peak_memory = False`` keeps the program's order. (Operators
with the effect ORDERED would keep it too, but as of torch 2.13 Inductor fails on such an operator if the sizes of its results are
known only at run time.)
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
    """The tensors that the forward pass keeps: O(N_local D), with "gather" O(N D). A rank has n local rows, by position.

    Attributes:
        zhat: (n, D) in the compute dtype.
        norms: (n,).
        softmax: (3, n): shift, inverse_total and negative, over the rows of all ranks.
        n_positives: (n,) int64, the positives of each row on all ranks.
        groups: (3, n) int32, Groups.table of this rank's rows alone.
        keys: (n,) int64, equal for rows that are positives of each other on different ranks; (0,) if no such rows can exist.
        counts: (2,), the numbers of rows of all ranks in A and in S.
        gathered_0, gathered_1: (rows + columns, D), for the two entries of ``Plan.sides``: the rows, then the columns that they
            are compared with. (0, D) if there is no such entry, or in a ring.
        crossing_0, crossing_1: (3, rows + columns) int32, Groups.table of these rows and columns. The first row of the table
            holds, for each column, its index in the gathered tensor.
        plan: (3, world) int64 on the CPU, the :class:`Plan` as numbers.
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
    """This rank's (n, D) embeddings and (B,) labels -> the loss of all ranks, and the residuals."""
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
    """The upstream gradient of this rank's result, () or (n,) -> the gradients of this rank's inputs."""
    plan = Plan.of_table(residuals.plan, options, sharding)
    order = residuals.groups[0].to(torch.int64)
    precise = residuals.zhat.to(options.accumulate_dtype)
    grad_loss = grad_loss.to(precise.dtype)
    # The row weights are scaled to at most 1, because M may be rounded to half precision. All ranks divide by the same unit.
    if options.reduction == "none":
        grad_loss = grad_loss.index_select(0, order)
        largest = torch.cat([grad_loss.abs(), grad_loss.new_zeros(1)]).amax()
        unit = plan.ranks.largest(largest).clamp(min=torch.finfo(torch.float32).tiny)
        weights, of_prototypes = grad_loss / unit, grad_loss
    else:
        # Every rank returned the loss of all ranks and backpropagates it, so a sum over the
        # ranks counts the loss once for each rank.
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
    """A context around checks: if this rank raises an error before its loss, the other ranks raise one too instead of waiting."""

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
