"""The backward pass for D > 256 (float32: D > 32): tiles of M go through memory, in cache, between two matrix products.

A whole row no longer fits on chip. Taking the width in chunks would compute all similarities again for each chunk: at D = 1024,
in chunks of 256, that is 10 N^2 D flops where 4 are needed. Instead a panel of M (gradient.py), PANEL x PANEL in the compute
dtype, is written once to a buffer of constant size, and multiplied from there::

    j: 0    1    2    3
    i: 0     [ M    x    x    x ]    pair_kernel      M_ij on and above the diagonal only, because M is symmetric
       1     [      M    x    x ]    product_kernel   sums_i += M_ij zhat_j,  sums_j += M_ij^T zhat_i
       2     [           M    x ]    finish.py        after the last panel
       3     [                M ]

With two sides, the panels are those of left rows and right columns, each once. They serve both sides in the same way. A panel
never reaches from one side into the other. In a one-way pass, a panel is multiplied once, for the left rows.

Flops: N^2 D + 2 N^2 D, fewer than the 4 N^2 D of the one-launch kernel; with two sides 2 L R D + 4 L R D instead of 8 L R D.
Bytes: a panel of PANEL^2 numbers is written once and read twice, for 6 PANEL^2 D flops. That is D flops a byte in bfloat16, more
than the operands' own 43 to 85 (tiles.py). In bfloat16, a panel of 4096 stays in an L2 of 50 MB. In float32, at 64 MB, it does
not.
Predicted for float32 at N = 32768: the panels move 6.4 GB through device memory in 2 ms. That is little beside the products, each
of which takes three TF32 products. With panels of 2048, an H200 took 42 ms.
Memory: 32 MB in bfloat16, 64 MB in float32; for N below PANEL, N PANEL numbers.
Launches: 2 for each panel, (N / PANEL)^2 / 2 panels; with two sides L / PANEL times R / PANEL.
The order of all sums is fixed: the same bits from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import Pairs, as_operand, from_position, group_of, load_rows, logit_scale, scaled, span_of
from .gradient import far_pairs, load_of_pairs, load_of_rows, near_pairs
from .softmax import similarities


@triton.jit
def is_near_tile(first_row, first_column, span, pairs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a tile may hold positives or the diagonal, or is not full."""
    first = tl.minimum(first_row, span.row_end - 1)
    last = tl.minimum(first_row + BLOCK_M, span.row_end) - 1
    start, _ = group_of(first, pairs, first < span.row_end)
    _, end = group_of(last, pairs, last < span.row_end)
    is_ragged = (first_row + BLOCK_M > span.row_end) | (first_column + BLOCK_N > span.column_end)
    return is_ragged | ((first_column < end) & (first_column + BLOCK_N > start))


@triton.jit
def pair_tile(s, rows, columns, is_near, coefficients, span, pairs, ONLINE: tl.constexpr, M_SCALE: tl.constexpr):
    """An (M, N) tile of M_ij, from S."""
    a_i = load_of_pairs(rows, coefficients, pairs.n_rows, span.row_end, ONLINE, M_SCALE, False)
    a_j = load_of_pairs(columns, coefficients, pairs.n_rows, span.column_end, ONLINE, M_SCALE, False)
    if is_near:
        of_rows = load_of_rows(rows, a_i, coefficients, span, pairs, M_SCALE)
        m = near_pairs(s, of_rows, columns, a_j, coefficients, span, pairs, ONLINE, M_SCALE)
    else:
        m = far_pairs(s, a_i, a_j, ONLINE)
    return m


@triton.jit(
    do_not_specialize=["n_rows", "n_left", "views", "negatives_only", "first_row", "first_column"],
    do_not_specialize_on_alignment=["groups", "temperature"],
)
def pair_kernel(
    zhat,  # (N, D), by position
    coefficients,  # (4, N) float32: contract.Coefficients
    groups,  # from here to negatives_only: the fields of device.Pairs
    n_rows,
    n_left,
    views,
    negatives_only,
    temperature,  # this and the next two: the arguments of device.logit_scale
    scale,
    scale_rest,
    largest_unshifted,  # as in softmax_kernel
    panel,  # (rows, PANEL) compute dtype, written: M of the rows from first_row and the columns from first_column
    first_row,  # with two sides, a left row
    first_column,  # with two sides, a right row
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
    pairs = Pairs(groups, n_rows, n_left, views, 1, negatives_only)
    span = span_of(0, pairs, BLOCK_M, BLOCK_N)  # only for the bounds of left rows and their columns, equal for all blocks
    local_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    local_columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = first_row + local_rows
    columns = first_column + local_columns
    is_near = is_near_tile(
        first_row + tl.program_id(0) * BLOCK_M, first_column + tl.program_id(1) * BLOCK_N, span, pairs, BLOCK_M, BLOCK_N
    )
    scale = logit_scale(temperature, scale, scale_rest)
    s = similarities(
        None, zhat, rows, span.row_end, zhat, columns, span.column_end, WIDTH, PITCH, BLOCK_N, BLOCK_K, False, PRECISION
    )
    s = scaled(s, scale, EXACT_SCALE)
    if scale.value <= largest_unshifted:
        m = pair_tile(s, rows, columns, is_near, coefficients, span, pairs, False, M_SCALE)
    else:
        m = pair_tile(s, rows, columns, is_near, coefficients, span, pairs, True, M_SCALE)
    pointers = panel + local_rows[:, None] * PANEL + local_columns[None, :]
    m = as_operand(m, panel.dtype.element_ty, PRECISION)
    tl.store(pointers, m, mask=rows[:, None] < span.row_end)


@triton.jit
def panel_product(
    panel,
    zhat,
    sums,
    program,
    first_row,
    row_end,
    first_column,
    column_end,
    adds,
    TRANSPOSED: tl.constexpr,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums[first_row:] (+)= M @ zhat[first_column:], or with M^T. BLOCK_N of the width, and BLOCK_K columns of M at a time."""
    local_rows = program * BLOCK_M + tl.arange(0, BLOCK_M)
    width = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    n_columns = column_end - first_column
    inside_rows = first_row + local_rows[:, None] < row_end
    for first in range(0, n_columns, BLOCK_K):
        local_columns = first + tl.arange(0, BLOCK_K)
        if TRANSPOSED:
            pointers = panel + local_rows[:, None] + local_columns[None, :] * PANEL
        else:
            pointers = panel + local_rows[:, None] * PANEL + local_columns[None, :]
        m = tl.load(pointers, mask=inside_rows & (local_columns[None, :] < n_columns), other=0.0)
        k = load_rows(zhat, first_column + local_columns, column_end, width, PITCH, WIDTH, BLOCK_N)
        part = tl.dot(m, k, part, input_precision=PRECISION)
    inside = inside_rows & (width[None, :] < WIDTH)
    pointers = from_position(sums, first_row, WIDTH) + local_rows[:, None] * WIDTH + width[None, :]
    if adds != 0:
        # The memory adds: loading the old sums would double the registers of a tile and spill them. Only one program of a launch
        # adds to a number, and launches run one after the other, so the bits are the same from run to run.
        tl.atomic_add(pointers, part, mask=inside, sem="relaxed")
    else:
        tl.store(pointers, part, mask=inside)


@triton.jit(do_not_specialize=["first_row", "row_end", "first_column", "column_end", "adds", "adds_transposed", "n_straight"])
def product_kernel(
    panel,  # (rows, PANEL): M of the rows [first_row, row_end) and columns [first_column, column_end); the rest is arbitrary
    zhat,  # (N, D), by position
    sums,  # (N, D) float32, by position
    first_row,
    row_end,
    first_column,
    column_end,
    adds,  # 1: add to the sums of the rows; 0: overwrite them
    adds_transposed,  # the same for the sums of the columns
    n_straight,  # the number of programs that compute sums of rows; the others, if any, compute sums of columns
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums_i (+)= M zhat_j and sums_j (+)= M^T zhat_i, each (PANEL, D), in one launch."""
    program = tl.program_id(0)
    if program < n_straight:
        panel_product(
            panel, zhat, sums, program, first_row, row_end, first_column, column_end, adds, False,
            WIDTH, PITCH, PANEL, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
    else:
        panel_product(
            panel, zhat, sums, program - n_straight, first_column, column_end, first_row, row_end, adds_transposed, True,
            WIDTH, PITCH, PANEL, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
