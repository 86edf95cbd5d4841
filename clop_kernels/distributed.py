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
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import backends, ops
from .backends import Backend, rowwise
from .backends.contract import Gradients, LossOptions, Needs, Softmax, accumulate_dtype
from .collectives import Ranks
from .shards import N_FIELDS, Plan, Rows, Sharding

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Residuals(NamedTuple):
    """What the forward pass leaves: O(N_local D), and where rows are gathered O(N D). n local rows, by position.

    Attributes:
        normalized: (n, D) in the compute dtype.
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

    normalized: Tensor
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
    normalized, norms = rowwise.normalized_rows(embeddings, groups.order, options)
    zhat = normalized.to(options.accumulate_dtype)
    label = None if labels is None else rowwise.labels_of_rows(labels, groups.order, options)
    rows = Rows(plan, normalized, groups.table(), plan.keys(label, groups.order))

    softmax = Softmax(*(zhat.new_zeros(len(zhat)) for _ in Softmax._fields))
    n_positives = groups.n_positives if options.n_left is None else torch.zeros_like(groups.order)
    gathered = [rows.nothing(), rows.nothing()]
    pair_softmax = backend.load().pair_softmax
    for index, side in enumerate(plan.sides):
        parts: list[Softmax] = []
        for block in rows.ring(side) if plan.is_ring else rows.gather(side):
            parts.append(pair_softmax(block.zhat, block.groups, block.n_left, _of_pairs(options)))
            if block.n_left is not None:
                n_positives[side.rows] += (block.groups[2] - block.groups[1])[: block.n_left]
                gathered[index] = gathered[index] if plan.is_ring else block
        if parts:
            merged: Softmax = rowwise.merged(Softmax(*map(torch.stack, zip(*parts, strict=True))))
            for of_rows, of_side in zip(softmax, merged, strict=True):
                of_rows[side.rows] = of_side

    is_anchor = n_positives > 0
    # A row that is no anchor has a plain zero, unless it holds a NaN or an Inf, which must stay visible.
    contrastive = torch.where(is_anchor, rowwise.contrastive_terms(softmax, n_positives), 0.0 * zhat.sum(1))
    pull = _pull(label, prototypes, options)
    prototype = torch.zeros_like(contrastive) if pull is None else pull.distances(zhat)
    is_labelled = torch.zeros_like(is_anchor) if pull is None else pull.label >= 0
    sums = torch.stack([x.sum().to(zhat.dtype) for x in (is_anchor, is_labelled, contrastive, prototype)])
    if options.reduction == "none":
        loss = torch.empty_like(contrastive).index_copy_(0, groups.order, contrastive + options.prototype_weight * prototype)
    else:
        plan.ranks.sum(sums)
        divisors = sums[:2].clamp(min=1) if options.reduction == "mean" else torch.ones_like(sums[:2])
        loss = sums[2] / divisors[0] + options.prototype_weight * (sums[3] / divisors[1])
    statistics = torch.stack([softmax.shift, rowwise.inverse_totals(softmax, is_anchor), softmax.negative])
    kept = (gathered[0].zhat, gathered[1].zhat, gathered[0].groups, gathered[1].groups)
    return loss, _Residuals(
        normalized, norms, statistics, n_positives, rows.groups, rows.keys, sums[:2].clone(), *kept, plan.table()
    )


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
    zhat = residuals.normalized.to(options.accumulate_dtype)
    grad_loss = grad_loss.to(zhat.dtype)
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

    rows = Rows(plan, residuals.normalized, residuals.groups, residuals.keys, coefficients)
    kept = ((residuals.gathered_0, residuals.crossing_0), (residuals.gathered_1, residuals.crossing_1))
    grad = torch.zeros_like(zhat)
    pair_gradient = backend.load().pair_gradient
    for side, (gathered, crossing) in zip(plan.sides, kept, strict=False):
        for block in rows.ring(side) if plan.is_ring else rows.gather_coefficients(side, gathered, crossing):
            grad[side.rows] += pair_gradient(block.zhat, block.groups, block.n_left, block.coefficients, _of_pairs(options))
    grad *= unit / options.temperature

    label = None if labels is None else rowwise.labels_of_rows(labels, order, options)
    pull = _pull(label, prototypes, options)
    grads = rowwise.finish(grad, zhat, residuals.norms, pull, of_prototypes, options, needs, embeddings.dtype)
    if needs.prototypes and grads.prototypes is None:
        assert prototypes is not None
        grads = grads._replace(prototypes=torch.zeros_like(prototypes, dtype=zhat.dtype))
    if grads.embeddings is None:
        return grads
    return grads._replace(embeddings=torch.empty_like(grads.embeddings).index_copy_(0, order, grads.embeddings))


def _pull(label: Tensor | None, prototypes: Tensor | None, options: LossOptions) -> rowwise.Pull | None:
    return None if label is None or prototypes is None else rowwise.Pull(label, prototypes, options.distance)


def _of_pairs(options: LossOptions) -> LossOptions:
    """The options of a pass over pairs."""
    return replace(options, n_views=1, positives="label", n_left=None)


# ---- the operators ---------------------------------------------------------------------------------------------------

_library = torch.library.Library("clop", "FRAGMENT")
_SCHEMA = f"{ops.OPTIONS_SCHEMA}, str group_name, str strategy, str grad_scale, bool check_ranks, bool has_backward"
_RESIDUALS = ", ".join(f"Tensor {name}" for name in _Residuals._fields)
_library.define(f"sharded_loss(Tensor embeddings, Tensor? labels, Tensor? prototypes, {_SCHEMA}) -> (Tensor loss, {_RESIDUALS})")
_library.define(
    f"sharded_loss_backward(Tensor grad_loss, Tensor embeddings, {_RESIDUALS}, Tensor? labels, Tensor? prototypes, "
    f"bool[3] needs, {_SCHEMA}) -> (Tensor grad_embeddings, Tensor grad_temperature, Tensor grad_prototypes)"
)


def loss(
    embeddings: Tensor,
    labels: Tensor | None,
    prototypes: Tensor | None,
    sharding: Sharding,
    backend: str | None,
    **options: Unpack[ops.OptionArguments],
) -> Tensor:
    """As :func:`clop_kernels.ops.loss`, over the rows of all ranks."""
    arguments = ops.option_arguments(embeddings, **options)
    inputs = (embeddings, prototypes, options["temperature"])
    wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    arguments = (*arguments, backend, *sharding._replace(has_backward=wanted))
    result: tuple[Tensor, ...] = torch.ops.clop.sharded_loss(embeddings, labels, prototypes, *arguments)
    return result[0]


class FailuresAnnounced(AbstractContextManager["FailuresAnnounced"]):
    """Where this rank may raise an error before its loss: the other ranks raise too, and do not wait for it in vain."""

    def __init__(self, sharding: Sharding) -> None:
        self.sharding = sharding

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if isinstance(error, Exception) and self.sharding.check_ranks:
            Ranks(self.sharding.group_name).announce_failure(N_FIELDS)


def _arguments(args: tuple[Any, ...]) -> tuple[LossOptions, Tensor | None, str | None, Sharding]:
    """The options, the temperature as a tensor, the backend and the sharding, from what follows the tensors."""
    n_options = len(args) - len(Sharding._fields)
    *option_args, backend = args[:n_options]
    return ops.options_of(*option_args), option_args[1], backend, Sharding(*args[n_options:])


def _forward(embeddings: Tensor, labels: Tensor | None, prototypes: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    options, temperature, backend, sharding = _arguments(args)
    with FailuresAnnounced(sharding):
        chosen = backends.select(backend, embeddings.device, options.compute_dtype)
        ops.check_values(labels, prototypes, temperature)
    with ops.without_autocast(embeddings.device.type):
        value, residuals = forward(embeddings, labels, prototypes, options, sharding, chosen)
    return value, *residuals


def _backward(grad_loss: Tensor, embeddings: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    n_residuals = len(_Residuals._fields)
    labels, prototypes, needs, *args = rest[n_residuals:]
    options, temperature, backend, sharding = _arguments(tuple(args))
    chosen = backends.select(backend, embeddings.device, options.compute_dtype)
    residuals = _Residuals(*rest[:n_residuals])
    with ops.without_autocast(embeddings.device.type):
        grads = backward(grad_loss, embeddings, residuals, labels, prototypes, options, sharding, chosen, Needs(*needs))
    return ops.filled_gradients(grads, embeddings, temperature, prototypes, needs)


def _forward_fake(embeddings: Tensor, labels: Tensor | None, prototypes: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    # Not _arguments, which reads a temperature.
    _temperature, _tensor, _n_views, positives, _weight, _distance, reduction, compute_dtype, _normalize, n_left, *_ = args
    group_name = args[-len(Sharding._fields)]
    n_rows, width = embeddings.shape
    precise = accumulate_dtype(compute_dtype)
    n_keys = n_rows if positives == "label" or n_left is not None else 0
    context = torch.library.get_ctx()
    n_gathered = [context.new_dynamic_size() if index == 0 or n_left is not None else 0 for index in range(2)]
    return (
        embeddings.new_empty((n_rows,) if reduction == "none" else (), dtype=precise),
        embeddings.new_empty((n_rows, width), dtype=compute_dtype),
        embeddings.new_empty(n_rows, dtype=precise),
        embeddings.new_empty((3, n_rows), dtype=precise),
        embeddings.new_empty(n_rows, dtype=torch.int64),
        embeddings.new_empty((3, n_rows), dtype=torch.int32),
        embeddings.new_empty(n_keys, dtype=torch.int64),
        embeddings.new_empty(2, dtype=precise),
        *(embeddings.new_empty((n, width), dtype=compute_dtype) for n in n_gathered),
        *(embeddings.new_empty((3, n), dtype=torch.int32) for n in n_gathered),
        torch.empty((3, Ranks(group_name).size), dtype=torch.int64, device="cpu"),
    )


def _backward_fake(grad_loss: Tensor, embeddings: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _labels, prototypes, needs, _temperature, temperature_tensor, *_ = rest[len(_Residuals._fields) :]
    return ops.unfilled_gradients(embeddings, temperature_tensor, prototypes, needs)


_library.impl("sharded_loss", _forward, "CompositeExplicitAutograd")
_library.impl("sharded_loss_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("clop::sharded_loss", _forward_fake, lib=_library)
torch.library.register_fake("clop::sharded_loss_backward", _backward_fake, lib=_library)
torch.library.register_autograd(
    "clop::sharded_loss",
    ops.autograd_formula(lambda: torch.ops.clop.sharded_loss_backward),
    setup_context=ops.setup_context,
    lib=_library,
)
torch.library.register_autograd("clop::sharded_loss_backward", ops.no_second_derivative, lib=_library)
