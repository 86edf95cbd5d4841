"""The backward pass for D <= 256 (float32: D <= 32): the pairwise sums of the gradient in one launch. finish.py does the rest.

Let e_ij = 2^(S_ij), w_i the upstream gradient of row i's term, a_i = w_i / total_i, and n_i the number of its positives::

    dL/dzhat_i = 1/tau sum_{j != i} M_ij zhat_j        M_ij = e_ij (a_i + a_j)                      j not a positive
                                                       M_ij = e_ij (b_i + b_j) - (c_i + c_j)        j a positive of i
    n_i > 1:  b_i = a_i,  c_i = w_i / n_i              n_i = 1:  b_i = 0,  c_i = w_i negative_i / total_i

The last line gives the same M for n_i = 1, without a subtraction that would cancel. Pairs that are not compared (device.Pairs)
have M_ij = 0. M is symmetric, so a program that owns rows i computes their whole sum without the sums of other rows: no atomics,
and the same bits from run to run.

coefficients_kernel computes a, b, c and the shift once, beforehand. A far tile then needs only a_i for each row and column; a
division for each column of each tile took 190 of 674 instructions. The separate pass over pairs (pair_gradient) receives the
coefficients, because one rank does not hold all positives of a row. With two sides it computes only the sums of the left rows.

Tile picture. A program owns BLOCK_M rows and walks over all columns, BLOCK_N at a time. This is attention with K = V = zhat: one
column tile k on chip serves both products::

    S = q k^T  (M, N) registers  ->  M, rounded to the compute dtype  ->  gradient += M k  (M, D) registers

Near tiles, which may hold positives, the diagonal or the ragged end, take the masked form. Far tiles use no masks.

``n_splits`` programs share a block of rows, as in softmax.py. Each stores its own sums, and finish.py adds them in the order of
the splits. Each split writes and reads N D floats, for at most a few rounds of programs.

The sums are stored as float32, and the remaining O(N D) work has its own launch. In this kernel that work would need three (M, D)
tiles at once, which at D = 128 and 256 spilled 0.5 and 1.6 KB a thread. The spills would move the same number of bytes as the
detour through memory does.

Flops 4 N^2 D, exponentials N^2 (online: 2 N^2). float32 operations for each pair: scale, a_i + a_j, multiply, round. Bytes: each
block of rows loads zhat once from L2, N^2 D itemsize / BLOCK_M in all; that is 2 BLOCK_M flops a byte in bfloat16. HBM: O(N D).
With two sides, L + R = N, a program's columns are on the other side: replace N^2 by 2 L R.

Units. w_i is 1 for an anchor. With reduction "none" it is the row's upstream gradient, divided by the largest magnitude among all
rows. Hence |M| <= 2, however the loss is scaled. In float16, whose smallest positive number is 6e-8, M is also multiplied by
M_SCALE.

Tiles with small M are not skipped. A bound of half a bfloat16 digit for each row was tried at tau = 0.1. Either it never holds;
or, if ten classes are well separated, it skips all pairs that push the classes apart, which costs 40% of the gradient: these M_ij
are small compared with w_i, but not compared with the gradient. Rounding M to bfloat16 costs 0.03% on the same rows.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .device import (
    NO_LOGIT,
    Pairs,
    as_operand,
    far_column,
    from_position,
    group_of,
    load_far,
    load_rows,
    logit_scale,
    masks,
    n_positives_of,
    near_columns,
    scaled,
    share_of,
    span_of,
)


class Factors(NamedTuple):
    """The coefficients at some positions that multiply the exponentials: a for ordinary pairs, b for positives."""

    factor: tl.tensor  # a or b, times M_SCALE
    shift: tl.tensor  # meaningless without ONLINE


class OfRows(NamedTuple):
    """The data of a program's rows that near tiles need."""

    positions: tl.tensor
    start: tl.tensor  # [start, end): the positive runs
    end: tl.tensor
    a: Factors
    b: Factors
    c: tl.tensor  # times M_SCALE


@triton.jit
def load_of_pairs(positions, coefficients, n_rows, end, ONLINE: tl.constexpr, M_SCALE: tl.constexpr, ALL: tl.constexpr):
    """The a and the shift of some positions; a = 0 from position ``end`` on. ALL: every position is below ``end``."""
    mask = None if ALL else positions < end
    other = None if ALL else 0.0
    a = tl.load(coefficients + positions, mask=mask, other=other) * M_SCALE
    shift = a
    if ONLINE:
        shift = tl.load(coefficients + 3 * n_rows.to(tl.int64) + positions, mask=mask, other=other)
    return Factors(a, shift)


@triton.jit
def load_of_positives(positions, coefficients, n_rows, end, M_SCALE: tl.constexpr):
    """The b and c of some positions, times M_SCALE; 0 from position ``end`` on."""
    mask = positions < end
    b = tl.load(coefficients + n_rows + positions, mask=mask, other=0.0) * M_SCALE
    c = tl.load(coefficients + 2 * n_rows.to(tl.int64) + positions, mask=mask, other=0.0) * M_SCALE
    return b, c


@triton.jit
def load_of_rows(rows, a, coefficients, span, pairs, M_SCALE: tl.constexpr):
    """The :class:`OfRows` of some rows, whose ``a`` is loaded already."""
    b, c = load_of_positives(rows, coefficients, pairs.n_rows, span.row_end, M_SCALE)
    start, end = group_of(rows, pairs, rows < span.row_end)
    return OfRows(rows, start, end, a, Factors(b, a.shift), c)


@triton.jit
def far_pairs(s, of_rows, of_columns, ONLINE: tl.constexpr):
    """An (M, N) tile of M_ij without positives, from the :class:`Factors` of its rows and columns."""
    if ONLINE:
        of_row = tl.exp2(s - of_rows.shift[:, None]) * of_rows.factor[:, None]
        return of_row + tl.exp2(s - of_columns.shift[None, :]) * of_columns.factor[None, :]
    else:
        return tl.exp2(s) * (of_rows.factor[:, None] + of_columns.factor[None, :])


@triton.jit
def near_pairs(s, of_rows, columns, a_j, coefficients, span, pairs, ONLINE: tl.constexpr, M_SCALE: tl.constexpr):
    """An (M, N) tile of M_ij with positives. Pairs that are not compared, and columns past the end, are zero."""
    compared, among_positives = masks(of_rows.positions, columns, of_rows.start, of_rows.end, span, pairs)
    s = tl.where(compared, s, NO_LOGIT)
    b_j, c_j = load_of_positives(columns, coefficients, pairs.n_rows, span.column_end, M_SCALE)
    of_positives = far_pairs(s, of_rows.b, Factors(b_j, a_j.shift), ONLINE) - (of_rows.c[:, None] + c_j[None, :])
    return tl.where(among_positives, of_positives, far_pairs(s, of_rows.a, a_j, ONLINE))


@triton.jit
def row_gradient(
    q,
    zhat,
    rows,
    span,
    split,
    n_splits,
    scale,
    coefficients,
    pairs,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONLINE: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT_SCALE: tl.constexpr,
    M_SCALE: tl.constexpr,
):
    """sum_j M_ij zhat_j over a split's columns, (M, BLOCK_D) float32, times M_SCALE."""
    width = tl.arange(0, BLOCK_D)
    a_i = load_of_pairs(rows, coefficients, pairs.n_rows, span.row_end, ONLINE, M_SCALE, False)
    of_rows = load_of_rows(rows, a_i, coefficients, span, pairs, M_SCALE)
    gradient = tl.zeros((rows.shape[0], BLOCK_D), tl.float32)
    of_columns, n_columns = from_position(zhat, span.column_base, PITCH), span.column_end - span.column_base
    first_tile, end_tile = share_of(span.n_near, split, n_splits)
    for index in range(first_tile, end_tile):
        local = near_columns(index, span, BLOCK_N)
        columns = span.column_base + local
        k = load_rows(of_columns, local, n_columns, width, PITCH, WIDTH, BLOCK_D)
        s = tl.dot(q, tl.trans(k), tl.zeros((rows.shape[0], BLOCK_N), tl.float32), input_precision=PRECISION)
        s = scaled(s, scale, EXACT_SCALE)
        a_j = load_of_pairs(columns, coefficients, pairs.n_rows, span.column_end, ONLINE, M_SCALE, False)
        m = near_pairs(s, of_rows, columns, a_j, coefficients, span, pairs, ONLINE, M_SCALE)
        gradient = tl.dot(as_operand(m, k.dtype, PRECISION), k, gradient, input_precision=PRECISION)
    first_tile, end_tile = share_of(span.n_far, split, n_splits)
    for index in range(first_tile, end_tile):
        first = far_column(index, span, BLOCK_N)
        k = load_far(of_columns, first, width, PITCH, WIDTH, BLOCK_N, BLOCK_D)
        s = tl.dot(q, tl.trans(k), tl.zeros((rows.shape[0], BLOCK_N), tl.float32), input_precision=PRECISION)
        s = scaled(s, scale, EXACT_SCALE)
        columns = span.column_base + first + tl.arange(0, BLOCK_N)
        a_j = load_of_pairs(columns, coefficients, pairs.n_rows, span.column_end, ONLINE, M_SCALE, True)
        m = far_pairs(s, a_i, a_j, ONLINE)
        gradient = tl.dot(as_operand(m, k.dtype, PRECISION), k, gradient, input_precision=PRECISION)
    return gradient


@triton.jit(
    do_not_specialize=["n_rows", "n_left", "views", "is_one_way", "negatives_only", "n_splits"],
    do_not_specialize_on_alignment=["groups", "temperature"],
)
def gradient_kernel(
    zhat,  # (N, D), by position
    coefficients,  # (4, N) float32: contract.Coefficients
    groups,  # from here to negatives_only: the fields of device.Pairs
    n_rows,
    n_left,
    views,
    is_one_way,
    negatives_only,
    temperature,  # this and the next two: the arguments of device.logit_scale
    scale,
    scale_rest,
    largest_unshifted,  # as in softmax_kernel
    sums,  # (splits, rows, D) float32, by position, written: sum_j M_ij zhat_j over a split's columns, times M_SCALE
    n_splits,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT_SCALE: tl.constexpr,
    M_SCALE: tl.constexpr,
):
    pairs = Pairs(groups, n_rows, n_left, views, is_one_way, negatives_only)
    span = span_of(tl.program_id(0), pairs, BLOCK_M, BLOCK_N)
    split = tl.program_id(1)
    rows = span.first + tl.arange(0, BLOCK_M)
    scale = logit_scale(temperature, scale, scale_rest)
    width = tl.arange(0, BLOCK_D)
    q = load_rows(zhat, rows, span.row_end, width, PITCH, WIDTH, BLOCK_D)
    if scale.value <= largest_unshifted:
        products = row_gradient(
            q, zhat, rows, span, split, n_splits, scale, coefficients, pairs,
            WIDTH, PITCH, BLOCK_N, BLOCK_D, False, PRECISION, EXACT_SCALE, M_SCALE,
        )  # fmt: skip
    else:
        products = row_gradient(
            q, zhat, rows, span, split, n_splits, scale, coefficients, pairs,
            WIDTH, PITCH, BLOCK_N, BLOCK_D, True, PRECISION, EXACT_SCALE, M_SCALE,
        )  # fmt: skip
    n_results = tl.where(is_one_way != 0, n_left, n_rows)
    place = split.to(tl.int64) * n_results + rows.to(tl.int64)
    pointers = sums + place[:, None] * WIDTH + width[None, :]
    tl.store(pointers, products, mask=(rows[:, None] < span.row_end) & (width[None, :] < WIDTH))


@triton.jit(
    do_not_specialize=["n_rows", "n_left", "views", "negatives_only", "is_weighted"],
    do_not_specialize_on_alignment=["groups", "row_weights"],
)
def coefficients_kernel(
    shift,  # (N,), by position; so are the next three
    inverse_total,
    negative,
    row_weights,  # w_i, read if is_weighted; else all weights are 1
    groups,  # from here to negatives_only: the fields of device.Pairs
    n_rows,
    n_left,
    views,
    negatives_only,
    is_weighted,
    coefficients,  # (4, N) float32, written: contract.Coefficients
    n_finished,  # () int32, set to 0 for finish_kernel
    BLOCK_M: tl.constexpr,
):
    """First launch of the backward pass of a loss: computes the coefficients of M, in O(N)."""
    pairs = Pairs(groups, n_rows, n_left, views, 0, negatives_only)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < n_rows
    start, end = group_of(rows, pairs, is_row)
    n_positives = n_positives_of(start, end, pairs)
    w = tl.load(row_weights + rows, mask=rows < n_rows * is_weighted, other=1.0)
    a = w * tl.load(inverse_total + rows, mask=is_row, other=0.0)
    remainder = a * tl.load(negative + rows, mask=is_row, other=0.0)
    share = tl.where(n_positives > 0, w / tl.maximum(n_positives, 1).to(tl.float32), 0.0)
    n_rows = n_rows.to(tl.int64)
    tl.store(coefficients + rows, a, mask=is_row)
    tl.store(coefficients + n_rows + rows, tl.where(n_positives == 1, 0.0, a), mask=is_row)
    tl.store(coefficients + 2 * n_rows + rows, tl.where(n_positives == 1, remainder, share), mask=is_row)
    tl.store(coefficients + 3 * n_rows + rows, tl.load(shift + rows, mask=is_row, other=0.0), mask=is_row)
    if tl.program_id(0) == 0:
        tl.store(n_finished, 0)
