"""First launch of the forward pass: turns the raw embeddings into unit rows, sorted by positive group.

Each row gives zhat = z / max(|z|, EPS) (unnormalised: z itself) rounded to the compute dtype, the norm |z|, and the distance of
zhat to the prototype of its label. The distance uses the rounded zhat, because all later products use it too.

Tile picture: a program takes BLOCK_M whole rows, with BLOCK_D >= D of the width. There is no loop over D, so each row is read
once.
Bytes: N D of input and N D of zhat; the prototypes come from cache. Flops: O(N D).

Order. By instance, position k is view k % V of instance k // V, or with two sides row k; this needs no table. By label, the table
``groups`` gives the order. Up to RANKED_INSTANCES labels, this kernel makes the table itself: each row counts the labels that
sort before its own. These B^2 integer comparisons take a negligible time. For more labels they would take too long, and the table
comes sorted from :func:`clop_kernels.groups.label_groups`. Both ways give the same order, and so the same bits. With two sides,
the table is always sorted there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..contract import EPS as _EPS
from .device import as_operand, row_of

EPS = tl.constexpr(_EPS)


@triton.jit
def sort_key(label, instance):
    """The sort key: the label, or for an unlabelled instance a negative key that no other instance has."""
    return tl.where(label >= 0, label, -1 - instance.to(tl.int64))


@triton.jit
def ranked_position(row, is_row, labels, groups, n_rows, n_instances, n_views, BLOCK_B: tl.constexpr):
    """The position of each row, found by counting. Also writes the table ``groups``. Lanes count separately; sums come last."""
    instance = row % n_instances
    key = sort_key(tl.load(labels + instance, mask=is_row, other=0), instance)
    before = tl.zeros((row.shape[0], BLOCK_B), tl.int32)
    equal = before
    equal_before = before
    for first in range(0, n_instances, BLOCK_B):
        other = first + tl.arange(0, BLOCK_B)
        is_instance = other < n_instances
        other_key = sort_key(tl.load(labels + other, mask=is_instance, other=0), other)
        is_equal = (other_key[None, :] == key[:, None]) & is_instance[None, :]
        before += ((other_key[None, :] < key[:, None]) & is_instance[None, :]).to(tl.int32)
        equal += is_equal.to(tl.int32)
        equal_before += (is_equal & (other[None, :] < instance[:, None])).to(tl.int32)
    n_before = tl.sum(before, 1)
    n_equal = tl.sum(equal, 1)
    position = n_views * (n_before + tl.sum(equal_before, 1)) + row // n_instances
    tl.store(groups + position, row, mask=is_row)
    tl.store(groups + n_rows + position, n_views * n_before, mask=is_row)
    tl.store(groups + 2 * n_rows + position, n_views * (n_before + n_equal), mask=is_row)
    return position


@triton.jit
def load_targets(prototypes, label, columns, n_classes, WIDTH: tl.constexpr):
    """The prototype of each label, (M, BLOCK_D) float32. A label without a prototype gets another one, which is not used."""
    nearest = tl.minimum(tl.maximum(label, 0), n_classes - 1)
    return tl.load(prototypes + nearest[:, None] * WIDTH + columns[None, :], mask=columns[None, :] < WIDTH, other=0.0)


@triton.jit(
    do_not_specialize=["n_rows", "n_instances", "n_classes", "n_views", "views", "is_ranked", "normalize", "distance"],
    do_not_specialize_on_alignment=["labels", "prototypes", "groups"],
)
def prologue_kernel(
    embeddings,  # (N, D), any strides
    row_stride,
    column_stride,
    labels,  # (B,) int64, read if there are prototypes or is_ranked
    prototypes,  # (K, D) float32 contiguous; empty if n_classes is 0
    groups,  # (3, N) int32: written if is_ranked; else read if ``views`` is 0
    zhat,  # (N, D) compute dtype, by position, written
    norms,  # (N,) float32, by position, written
    distances,  # (N,) float32, by position, written: 0 without a label or prototypes, NaN for a row that is not finite
    n_finished,  # () int32, set to 0 for loss_kernel
    n_rows,
    n_instances,
    n_classes,
    n_views,  # the views of an instance
    views,  # as in device.Pairs
    is_ranked,
    normalize,
    distance,  # index into contract.DISTANCES
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = position < n_rows
    if is_ranked != 0:
        row = position
        position = ranked_position(row, is_row, labels, groups, n_rows, n_instances, n_views, BLOCK_B)
    else:
        row = row_of(position, groups, n_instances, views, is_row)

    columns = tl.arange(0, BLOCK_D)
    inside = is_row[:, None] & (columns[None, :] < WIDTH)
    offsets = row.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    raw = tl.load(embeddings + offsets, mask=inside, other=0.0).to(tl.float32)

    # Each row is first scaled by its largest entry, so that no square overflows. Any finite row then has a finite direction
    # and norm.
    largest = tl.maximum(tl.max(tl.abs(raw), 1), EPS)
    unit = tl.div_rn(raw, largest[:, None])
    norm = tl.sqrt_rn(tl.sum(unit * unit, 1))
    if normalize != 0:  # noqa: SIM108
        unit = tl.div_rn(unit, tl.maximum(norm, tl.div_rn(EPS, largest))[:, None])
    else:
        unit = raw
    rounded = unit.to(zhat.dtype.element_ty)
    tl.store(zhat + position.to(tl.int64)[:, None] * PITCH + columns[None, :], rounded, mask=inside)
    tl.store(norms + position, norm * largest, mask=is_row)
    if tl.program_id(0) == 0:
        tl.store(n_finished, 0)

    unit = rounded.to(tl.float32)
    to_prototype = 0.0 * tl.sum(unit, 1)
    if n_classes > 0:
        label = tl.load(labels + row % n_instances, mask=is_row, other=-1)
        target = load_targets(prototypes, label, columns, n_classes, WIDTH)
        offset = unit - target
        if distance == 0:
            to_target = 1.0 - tl.sum(unit * target, 1)
        elif distance == 1:
            to_target = tl.sqrt_rn(tl.sum(offset * offset, 1))
        else:
            to_target = tl.sum(tl.abs(offset), 1)
        to_prototype += tl.where(label >= 0, to_target, 0.0)
    tl.store(distances + position, to_prototype, mask=is_row)


@triton.jit(do_not_specialize=["n_rows"])
def operands_kernel(
    zhat,  # (N, D)
    operands,  # (N, D), written, in the layout of zhat
    n_rows,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rounds the unit rows for the matrix units, if these need another form than the stored one: float32 rows for TF32."""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < n_rows) & (columns[None, :] < WIDTH)
    offsets = rows[:, None] * PITCH + columns[None, :]
    x = tl.load(zhat + offsets, mask=inside, other=0.0)
    tl.store(operands + offsets, as_operand(x, operands.dtype.element_ty, PRECISION), mask=inside)
