"""Backward, D <= 256 (float32: 32): the pairwise sums of the gradient in one launch; finish.py makes the gradient.

With e_ij = 2^(S_ij), w_i the upstream gradient of row i's term, a_i = w_i / total_i and n_i its number of positives::

    dL/dzhat_i = 1/tau sum_{j != i} M_ij zhat_j        M_ij = e_ij (a_i + a_j)                      j not a positive
                                                       M_ij = e_ij (b_i + b_j) - (c_i + c_j)        j a positive of i
    n_i > 1:  b_i = a_i,  c_i = w_i / n_i              n_i = 1:  b_i = 0,  c_i = w_i negative_i / total_i

which for n_i = 1 is the same number, found without a subtraction. Pairs that are not compared (PAIRS and n_left, device.py)
have M_ij = 0; the sum over j is over the others. M is symmetric and needs no sum over the other rows, so a program that owns
rows i makes their whole sum: no atomics, the same bits from run to run.

In a pass over pairs alone a, b and c are given, for not all of a row's positives are at hand; one way only rows on the left
have a sum.

Tile picture. A program owns BLOCK_M rows and walks over all columns, BLOCK_N at a time. It is attention with
K = V = zhat: one column tile k on chip serves both products::

    S = q k^T  (M, N) registers  ->  M, rounded to the compute dtype  ->  gradient += M k  (M, D) registers

Near tiles, the ones that may hold positives, the diagonal or the ragged end, take the masked form; far tiles none of it.

The sums leave as float32, and the O(N D) rest has a launch of its own: in this kernel it would hold three (M, D) tiles at
once, which at D = 128 and 256 spilled 0.5 and 1.6 KB a thread, the bytes that the detour through memory costs anyway.

Flops 4 N^2 D, exponentials N^2 (online: 2 N^2); float32 operations per pair: scale, a_i + a_j, multiply, round. Bytes:
zhat once a program from L2, N^2 D itemsize / BLOCK_M in all, 2 BLOCK_M flops a byte in bfloat16; HBM O(N D). Rows of two
sides, L + R = N: a program's columns are the other side's, and for N^2 read 2 L R.

Units. w_i is 1 for an anchor, or the upstream gradient over its largest, so that M <= 2 whatever the loss is scaled by;
float16, whose numbers end at 6e-8, multiplies M by M_SCALE on top.

Tiles of small M are not skipped. At tau = 0.1 a bound of half a bfloat16 digit per row either never holds, or, where ten
classes are well separated, it holds for the sum of all that pushes them apart and costs 40% of the gradient: M_ij is small
against w_i there, and not against the gradient. Rounding M to bfloat16 costs 0.03% on the same rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    NO_LOGIT,
    as_operand,
    far_columns,
    fits_unshifted,
    from_position,
    group_of,
    is_pair,
    is_positive,
    load_rows,
    logit_scale,
    n_positives_of,
    near_columns,
    scaled,
    span_of,
)


@triton.jit
def load_softmax(
    positions, total, shift, weights, coefficients, end, ONLINE: tl.constexpr, M_SCALE: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """a_i * M_SCALE, the shift (anything if not ONLINE) and w_i of some positions; a_i = 0 from position ``end`` on."""
    mask = None if ALL else positions < end
    other = None if ALL else 0.0
    w = tl.full(positions.shape, M_SCALE, tl.float32)
    if coefficients is not None:
        a = tl.load(coefficients + positions, mask=mask, other=other)
    else:
        t = tl.load(total + positions, mask=mask, other=None if ALL else float("inf"))
        if weights is not None:
            w *= tl.load(weights + positions, mask=mask, other=other)
        a = w / t
    m = a
    if ONLINE:
        m = tl.load(shift + positions, mask=mask, other=other)
    return a, m, w


@triton.jit
def load_positive_form(
    positions, a, w, negative, coefficients, groups, n_rows, n_left, side_end, VIEWS: tl.constexpr
):  # fmt: skip
    """b_i and c_i, times M_SCALE, of some positions of a side, and their runs of positives."""
    mask = positions < side_end
    start, end = group_of(positions, groups, n_rows, n_left, VIEWS, mask)
    if coefficients is not None:
        b = tl.load(coefficients + n_rows + positions, mask=mask, other=0.0)
        c = tl.load(coefficients + 2 * n_rows + positions, mask=mask, other=0.0)
    else:
        n_positives = n_positives_of(start, end, n_left)
        b = tl.where(n_positives == 1, 0.0, a)
        remainder = a * tl.load(negative + positions, mask=mask, other=0.0)
        share = tl.where(n_positives > 0, w / tl.maximum(n_positives, 1).to(tl.float32), 0.0)
        c = tl.where(n_positives == 1, remainder, share)
    return b, c, start, end


@triton.jit
def far_pairs(s, a_i, shift_i, a_j, shift_j, ONLINE: tl.constexpr):
    """(M, N) tile of M_ij where no j is a positive of i."""
    if ONLINE:
        return tl.exp2(s - shift_i[:, None]) * a_i[:, None] + tl.exp2(s - shift_j[None, :]) * a_j[None, :]
    else:
        return tl.exp2(s) * (a_i[:, None] + a_j[None, :])


@triton.jit
def near_pairs(
    s, rows, columns, start, end, a_i, b_i, c_i, shift_i, a_j, shift_j, w_j, negative, coefficients, groups, n_rows, n_left,
    column_end, VIEWS: tl.constexpr, PAIRS: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    """(M, N) tile of M_ij: positives, pairs that are not compared, and columns past the end, which are zero."""
    compared = is_pair(rows, columns, start, end, column_end, n_left, PAIRS)
    if PAIRS == "negatives":
        return tl.where(compared, far_pairs(s, a_i, shift_i, a_j, shift_j, ONLINE), 0.0)
    else:
        s = tl.where(compared, s, NO_LOGIT)
        of_others = far_pairs(s, a_i, shift_i, a_j, shift_j, ONLINE)
        b_j, c_j, _, _ = load_positive_form(columns, a_j, w_j, negative, coefficients, groups, n_rows, n_left, column_end, VIEWS)
        of_positives = far_pairs(s, b_i, shift_i, b_j, shift_j, ONLINE) - (c_i[:, None] + c_j[None, :])
        return tl.where(is_positive(rows, columns, start, end, n_left), of_positives, of_others)


@triton.jit
def row_gradient(
    q,
    zhat,
    rows,
    total,
    shift,
    negative,
    weights,
    coefficients,
    groups,
    span,
    scale,
    scale_rest,
    n_rows,
    n_left,
    VIEWS: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONLINE: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT_SCALE: tl.constexpr,
    M_SCALE: tl.constexpr,
):
    """sum_j M_ij zhat_j over the columns of the span, (M, BLOCK_D) float32, times M_SCALE."""
    width = tl.arange(0, BLOCK_D)
    a_i, shift_i, w_i = load_softmax(rows, total, shift, weights, coefficients, span.row_end, ONLINE, M_SCALE, False)
    b_i, c_i, start, end = load_positive_form(rows, a_i, w_i, negative, coefficients, groups, n_rows, n_left, span.row_end, VIEWS)
    gradient = tl.zeros((rows.shape[0], BLOCK_D), tl.float32)
    of_columns, n_columns = from_position(zhat, span.column_base, PITCH), span.column_end - span.column_base
    for index in range(0, span.n_near):
        local = near_columns(index, span, BLOCK_N)
        columns = span.column_base + local
        k = load_rows(of_columns, local, n_columns, width, PITCH, WIDTH, BLOCK_D, False)
        s = tl.dot(q, tl.trans(k), tl.zeros((rows.shape[0], BLOCK_N), tl.float32), input_precision=PRECISION)
        s = scaled(s, scale, scale_rest, EXACT_SCALE)
        a_j, shift_j, w_j = load_softmax(columns, total, shift, weights, coefficients, span.column_end, ONLINE, M_SCALE, False)
        m = near_pairs(
            s, rows, columns, start, end, a_i, b_i, c_i, shift_i, a_j, shift_j, w_j, negative, coefficients, groups, n_rows,
            n_left, span.column_end, VIEWS, PAIRS, ONLINE,
        )  # fmt: skip
        gradient = tl.dot(as_operand(m, k.dtype, PRECISION), k, gradient, input_precision=PRECISION)
    for index in range(0, span.n_far):
        local = far_columns(index, span, BLOCK_N)
        columns = span.column_base + local
        k = load_rows(of_columns, local, n_columns, width, PITCH, WIDTH, BLOCK_D, True)
        s = tl.dot(q, tl.trans(k), tl.zeros((rows.shape[0], BLOCK_N), tl.float32), input_precision=PRECISION)
        s = scaled(s, scale, scale_rest, EXACT_SCALE)
        a_j, shift_j, _ = load_softmax(columns, total, shift, weights, coefficients, span.column_end, ONLINE, M_SCALE, True)
        m = far_pairs(s, a_i, shift_i, a_j, shift_j, ONLINE)
        gradient = tl.dot(as_operand(m, k.dtype, PRECISION), k, gradient, input_precision=PRECISION)
    return gradient


@triton.jit(do_not_specialize=["n_rows", "n_left"])
def gradient_kernel(
    zhat,  # (N, D), by position
    shift,  # (N,), by position; so are all down to weights
    total,
    negative,
    weights,  # (N,) float32: w_i, or None: 1 each
    coefficients,  # (4, N) float32, contract.Coefficients, a, b and c times M_SCALE, in place of the last three; or None
    groups,  # (3, N) int32, or None
    temperature,  # () float32, or None
    scale,
    scale_rest,
    sums,  # (N, D) float32, by position, written: sum_j M_ij zhat_j times M_SCALE
    n_rows,
    n_left,  # or None: no sides
    VIEWS: tl.constexpr,
    PAIRS: tl.constexpr,
    SOFTMAX: tl.constexpr,  # as in softmax_kernel
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT_SCALE: tl.constexpr,
    M_SCALE: tl.constexpr,
):
    span = span_of(tl.program_id(0), groups, n_rows, n_left, VIEWS, PAIRS, BLOCK_M, BLOCK_N)
    rows = span.first + tl.arange(0, BLOCK_M)
    scale, scale_rest = logit_scale(temperature, scale, scale_rest)
    width = tl.arange(0, BLOCK_D)
    q = load_rows(zhat, rows, span.row_end, width, PITCH, WIDTH, BLOCK_D, False)
    if SOFTMAX == "device":
        if fits_unshifted(scale):
            products = row_gradient(
                q, zhat, rows, total, shift, negative, weights, coefficients, groups, span, scale, scale_rest,
                n_rows, n_left, VIEWS, PAIRS, WIDTH, PITCH, BLOCK_N, BLOCK_D, False, PRECISION, EXACT_SCALE, M_SCALE,
            )  # fmt: skip
        else:
            products = row_gradient(
                q, zhat, rows, total, shift, negative, weights, coefficients, groups, span, scale, scale_rest,
                n_rows, n_left, VIEWS, PAIRS, WIDTH, PITCH, BLOCK_N, BLOCK_D, True, PRECISION, EXACT_SCALE, M_SCALE,
            )  # fmt: skip
    else:
        products = row_gradient(
            q, zhat, rows, total, shift, negative, weights, coefficients, groups, span, scale, scale_rest,
            n_rows, n_left, VIEWS, PAIRS, WIDTH, PITCH, BLOCK_N, BLOCK_D, SOFTMAX == "online", PRECISION, EXACT_SCALE, M_SCALE,
        )  # fmt: skip
    pointers = sums + rows.to(tl.int64)[:, None] * WIDTH + width[None, :]
    tl.store(pointers, products, mask=(rows[:, None] < span.row_end) & (width[None, :] < WIDTH))
