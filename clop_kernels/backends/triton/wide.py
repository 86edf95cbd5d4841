"""Backward, D > 256 (float32: 32): similarity tiles that stay in cache, between two matrix products.

A whole row no longer fits on chip. Chunks of the width would recompute all similarities for each chunk: at D = 1024 in
chunks of 256 that is 10 N^2 D flops where 4 are needed. Instead a tile of M (gradient.py), PANEL x PANEL in the compute
dtype, is written once to a buffer of constant size that L2 holds, and multiplied from there::

    j: 0    1    2    3
    i: 0     [ M    x    x    x ]    pair_kernel      M_ij on and above the diagonal only, for M is symmetric
       1     [      M    x    x ]    product_kernel   sums_i += M_ij zhat_j,  sums_j += M_ij^T zhat_i
       2     [           M    x ]    finish.py        when all are done
       3     [                M ]

Rows of two sides: panels of left rows and right columns, each once, are all that is compared, and serve both sides just so.
A panel never reaches from one side into the other. One way it is multiplied once, for the left rows.

Flops: N^2 D + 2 N^2 D, fewer than the 4 N^2 D of the one-launch kernel; of two sides 2 L R D + 4 L R D instead of 8 L R D.
Bytes per tile: PANEL^2 itemsize written and read twice, through L2, against 6 PANEL^2 D flops: D flops a byte in bfloat16,
more than the operands' own 43 to 85 (tiles.py).
Memory: the tile, 32 MB at PANEL = 4096 in bfloat16, 16 MB at 2048 in float32; less for a smaller N.
Launches: N <= PANEL takes 2; beyond, 3/2 (N / PANEL)^2 of them. Of two sides 3, one way 2, for each panel, L / PANEL times
R / PANEL.
The order of all sums is fixed: the same bits from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import as_operand, fits_unshifted, from_position, group_of, load_rows, logit_scale, scaled
from .gradient import far_pairs, load_positive_form, load_softmax, near_pairs
from .softmax import similarities


@triton.jit
def is_near_tile(
    first_row, first_column, groups, n_rows, n_left, row_end,
    VIEWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whether a tile may hold positives or the diagonal, or is ragged."""
    first = tl.minimum(first_row, row_end - 1)
    last = tl.minimum(first_row + BLOCK_M, row_end) - 1
    start, _ = group_of(first, groups, n_rows, n_left, VIEWS, first < row_end)
    _, end = group_of(last, groups, n_rows, n_left, VIEWS, last < row_end)
    is_ragged = (first_row + BLOCK_M > row_end) | (first_column + BLOCK_N > n_rows)
    return is_ragged | ((first_column < end) & (first_column + BLOCK_N > start))


@triton.jit
def pair_tile(
    s, rows, columns, is_near, total, shift, negative, weights, coefficients, groups, n_rows, n_left, row_end,
    VIEWS: tl.constexpr, PAIRS: tl.constexpr, ONLINE: tl.constexpr, M_SCALE: tl.constexpr,
):  # fmt: skip
    """(M, N) tile of M_ij from S."""
    a_i, shift_i, w_i = load_softmax(rows, total, shift, weights, coefficients, row_end, ONLINE, M_SCALE, False)
    a_j, shift_j, w_j = load_softmax(columns, total, shift, weights, coefficients, n_rows, ONLINE, M_SCALE, False)
    if is_near:
        b_i, c_i, start, end = load_positive_form(rows, a_i, w_i, negative, coefficients, groups, n_rows, n_left, row_end, VIEWS)
        m = near_pairs(
            s, rows, columns, start, end, a_i, b_i, c_i, shift_i, a_j, shift_j, w_j, negative, coefficients, groups, n_rows,
            n_left, n_rows, VIEWS, PAIRS, ONLINE,
        )  # fmt: skip
    else:
        m = far_pairs(s, a_i, shift_i, a_j, shift_j, ONLINE)
    return tl.where(rows[:, None] < row_end, m, 0.0)


@triton.jit(do_not_specialize=["n_rows", "n_left", "first_row", "first_column"])
def pair_kernel(
    zhat,  # (N, D), by position
    shift,  # (N,), by position; so are all down to weights
    total,
    negative,
    weights,
    coefficients,  # as in gradient_kernel
    groups,
    temperature,
    scale,
    scale_rest,
    pairs,  # (PANEL, PANEL) compute dtype: M of the rows from first_row and the columns from first_column
    first_row,  # of two sides on the left,
    first_column,  # and on the right
    n_rows,
    n_left,  # or None: no sides
    VIEWS: tl.constexpr,
    PAIRS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT_SCALE: tl.constexpr,
    M_SCALE: tl.constexpr,
):
    local_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    local_columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = first_row + local_rows
    columns = first_column + local_columns
    row_end = n_rows
    if n_left is not None:
        row_end = n_left
    is_near = is_near_tile(
        first_row + tl.program_id(0) * BLOCK_M, first_column + tl.program_id(1) * BLOCK_N, groups, n_rows, n_left, row_end,
        VIEWS, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    scale, scale_rest = logit_scale(temperature, scale, scale_rest)
    s = similarities(None, zhat, zhat, rows, columns, row_end, n_rows, WIDTH, PITCH, BLOCK_K, False, PRECISION)
    s = scaled(s, scale, scale_rest, EXACT_SCALE)
    if SOFTMAX == "device":
        if fits_unshifted(scale):
            m = pair_tile(
                s, rows, columns, is_near, total, shift, negative, weights, coefficients, groups, n_rows, n_left, row_end,
                VIEWS, PAIRS, False, M_SCALE,
            )  # fmt: skip
        else:
            m = pair_tile(
                s, rows, columns, is_near, total, shift, negative, weights, coefficients, groups, n_rows, n_left, row_end,
                VIEWS, PAIRS, True, M_SCALE,
            )  # fmt: skip
    else:
        m = pair_tile(
            s, rows, columns, is_near, total, shift, negative, weights, coefficients, groups, n_rows, n_left, row_end,
            VIEWS, PAIRS, SOFTMAX == "online", M_SCALE,
        )  # fmt: skip
    pointers = pairs + local_rows[:, None] * PANEL + local_columns[None, :]
    m = as_operand(m, pairs.dtype.element_ty, PRECISION)
    tl.store(pointers, m, mask=(local_rows[:, None] < PANEL) & (local_columns[None, :] < PANEL))


@triton.jit(do_not_specialize=["first_row", "row_end", "first_column", "column_end"])
def product_kernel(
    pairs,  # (PANEL, PANEL)
    stride_row,  # (PANEL, 1) to multiply by M, (1, PANEL) by its transpose
    stride_column,
    zhat,  # (N, D), by position
    sums,  # (N, D) float32, by position
    first_row,  # of the sums
    row_end,  # past the last of them; what M holds there, and past column_end, is anything
    first_column,  # of zhat
    column_end,
    ADD: tl.constexpr,  # to what the sums hold, or in its place
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums[first_row:] (+)= M @ zhat[first_column:], (PANEL, D); BLOCK_N of the width, BLOCK_K columns of M at a time."""
    local_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    width = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = first_row + local_rows
    part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    n_columns = column_end - first_column
    for first in range(0, n_columns, BLOCK_K):
        local_columns = first + tl.arange(0, BLOCK_K)
        m = tl.load(
            pairs + local_rows[:, None] * stride_row + local_columns[None, :] * stride_column,
            mask=(local_rows[:, None] < PANEL) & (local_columns[None, :] < n_columns),
            other=0.0,
        )
        k = load_rows(zhat, first_column + local_columns, column_end, width, PITCH, WIDTH, BLOCK_N, False)
        part = tl.dot(m, k, part, input_precision=PRECISION)
    inside = (rows[:, None] < row_end) & (width[None, :] < WIDTH)
    pointers = from_position(sums, first_row, WIDTH) + local_rows[:, None] * WIDTH + width[None, :]
    if ADD:
        # By the memory itself: a load of what is there would double the registers of a tile, and spill them. One program adds
        # to a number, and launches come one after the other, so the bits are the same from run to run.
        tl.atomic_add(pointers, part, mask=inside, sem="relaxed")
    else:
        tl.store(pointers, part, mask=inside)
