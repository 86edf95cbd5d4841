"""What several kernels share on the device: who is compared with whom, whose positives are where, exact products and logs.

Kernels work on *positions*: rows sorted by positive group (:mod:`clop_kernels.groups`), so that the positives of a row
are a run of positions [start, end): around it, less itself, and of rows with two sides on the other one. They lie in tiles
near the diagonal, or what takes its place between two sides. Those *near* tiles pay for masks; all others, the *far* tiles,
have none, not even for the ragged end of the columns, which counts as near.

Who is compared: every kernel over pairs takes its rows and columns from a :class:`Span`. Three arguments say which, under
the same names everywhere::

    n_left    how many rows are on the left side, the first positions: a row meets those of the other side only.
              None: there are no sides, and a row meets all others.
    PAIRS     "all"; "negatives": positives are no pairs, like a row and itself; "none": nothing is compared; "one-way": all
              pairs, of two sides, but only rows on the left have programs.
    groups    (3, n_rows) int32, by position: row, start, end. None: positives are the views of an instance, and arithmetic.

Rows of zhat are WIDTH numbers, and PITCH numbers apart (:func:`clop_kernels.backends.contract.unit_rows`).

Where a temperature is a tensor, ``temperature`` is a pointer to it and the host never reads it; where it is None, a float,
``scale`` and ``scale_rest`` hold log2(e) / tau in two float32 numbers. One alone would be off by its rounding in every
similarity alike, as if the temperature were another.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

LARGEST_UNSHIFTED_LOGIT = tl.constexpr(60.0)
"""exp(60), summed over 2^38 rows, is within float32: while 1/tau is below, exp s needs no shift, and no maximum."""

NO_LOGIT = tl.constexpr(float("-inf"))
LEAST_SHIFT = tl.constexpr(-1.0e38)
"""Where the running maximum begins: finite, so that no two infinities are subtracted."""


class Span(NamedTuple):
    """What one program compares: rows of one side with all columns that they meet, which are positions too.

    Tiles of BLOCK_N columns are numbered from ``column_base``, and so are the columns of :func:`near_columns` and
    :func:`far_columns`: what is loaded for every pair is loaded through :func:`from_position`.
    """

    first: tl.tensor  # the program's first row
    row_end: tl.tensor  # one past the last row of their side
    column_base: tl.tensor
    column_end: tl.tensor
    near: tl.tensor  # the tiles [near, near_end) may hold positives, and the diagonal if it is among the pairs
    near_end: tl.tensor
    n_near: tl.tensor  # how many tiles are masked: those, and a ragged last one that is not among them
    n_far: tl.tensor


@triton.jit
def logit_scale(temperature, scale, scale_rest):
    """log2(e) / tau as the sum of two float32 numbers."""
    if temperature is not None:
        precise = LOG2_E / tl.load(temperature).to(tl.float64)
        scale = precise.to(tl.float32)
        scale_rest = (precise - scale.to(tl.float64)).to(tl.float32)
    return scale, scale_rest


@triton.jit
def as_operand(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x as an operand of tl.dot.

    Units of TF32 cut a float32 off after ten bits of its mantissa. That would make all operands too small; the errors of rounded
    ones cancel.
    """
    if PRECISION == "tf32":
        rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # a NaN of all ones would become a zero
    return x.to(dtype)


@triton.jit
def fits_unshifted(scale):
    return scale <= LARGEST_UNSHIFTED_LOGIT * LOG2_E


@triton.jit
def row_of(position, groups, n_instances, VIEWS: tl.constexpr, mask):
    """The row of the user's tensor at a position. VIEWS rows of an instance are side by side; of two sides none are, it is 1."""
    if groups is not None:
        return tl.load(groups + position, mask=mask, other=0)
    else:
        return position % VIEWS * n_instances + position // VIEWS


@triton.jit
def group_of(position, groups, n_rows, n_left, VIEWS: tl.constexpr, mask):
    """[start, end): the run of positions that holds the positives of a position, and without sides itself."""
    if groups is not None:
        start = tl.load(groups + n_rows + position, mask=mask, other=0)
        end = tl.load(groups + 2 * n_rows + position, mask=mask, other=0)
    elif n_left is not None:
        start = tl.where(position < n_left, position + n_left, position - n_left)
        end = start + 1
    else:
        start = position // VIEWS * VIEWS
        end = start + VIEWS
    return start, end


@triton.jit
def n_positives_of(start, end, n_left):
    """n_i, from the run of its positives; below 1 where there are none."""
    if n_left is None:
        return end - start - 1
    else:
        return end - start


@triton.jit
def span_of(
    program, groups, n_rows, n_left,
    VIEWS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What a program compares. Of two sides it owns rows of one; those of the shorter side, whose walk is longer, go first."""
    if PAIRS == "none":
        return Span(program * BLOCK_M, n_rows, 0, 0, 0, 0, 0, 0)
    else:
        if n_left is None:
            first = program * BLOCK_M
            row_end = n_rows
            column_base = 0
            column_end = n_rows
        elif PAIRS == "one-way":
            first = program * BLOCK_M
            row_end = n_left
            column_base = n_left
            column_end = n_rows
        else:
            n_right = n_rows - n_left
            n_early = tl.cdiv(tl.minimum(n_left, n_right), BLOCK_M)
            is_left = (program < n_early) == (n_left <= n_right)
            first = tl.where(program < n_early, program, program - n_early) * BLOCK_M + tl.where(is_left, 0, n_left)
            row_end = tl.where(is_left, n_left, n_rows)
            column_base = tl.where(is_left, n_left, 0)
            column_end = tl.where(is_left, n_rows, n_left)
        # Runs of positives are in the order of their rows: those of the first and the last row enclose all others.
        last = tl.minimum(first + BLOCK_M, row_end) - 1
        start, _ = group_of(first, groups, n_rows, n_left, VIEWS, first < row_end)
        _, end = group_of(last, groups, n_rows, n_left, VIEWS, last < row_end)
        n_columns = column_end - column_base
        n_tiles = tl.cdiv(n_columns, BLOCK_N)
        near = (start - column_base) // BLOCK_N
        near_end = tl.minimum(tl.cdiv(end - column_base, BLOCK_N), n_tiles)
        n_ragged = ((n_columns % BLOCK_N != 0) & (near_end < n_tiles)).to(tl.int32)
        n_near = near_end - near + n_ragged
        return Span(first, row_end, column_base, column_end, near, near_end, n_near, n_tiles - n_near)


@triton.jit
def near_columns(index, span, BLOCK_N: tl.constexpr):
    """The columns in the near tile of that index, counted from ``column_base``."""
    last = tl.cdiv(span.column_end - span.column_base, BLOCK_N) - 1
    tile = tl.where(span.near + index < span.near_end, span.near + index, last)
    return tile * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def far_columns(index, span, BLOCK_N: tl.constexpr):
    tile = tl.where(index < span.near, index, index + span.near_end - span.near)
    return tile * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def from_position(zhat, position, PITCH: tl.constexpr):
    """zhat from a position on, for rows counted from there.

    The compiler knows how such a count is made, and that the rows of a tile share an address but for constants. A position that
    it knows nothing of, such as where a side begins, would cost it 64 bits a row: wide rows' softmax spilled them on sm_90.
    """
    return zhat + tl.cast(position, tl.int64) * PITCH


@triton.jit
def own_rows(zhat, rows, span, n_left, PITCH: tl.constexpr):
    """The program's rows for loads in a loop: zhat from where they are counted, their count, and its end."""
    if n_left is None:
        return zhat, rows, span.row_end
    else:
        return from_position(zhat, span.first, PITCH), tl.arange(0, rows.shape[0]), span.row_end - span.first


@triton.jit
def load_rows(
    zhat, positions, end, columns, PITCH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ALL_ROWS: tl.constexpr
):  # fmt: skip
    """zhat at positions (M,) and columns (BLOCK_D,), zero from position ``end`` on; a position times the pitch may pass 2^31."""
    pointers = zhat + positions.to(tl.int64)[:, None] * PITCH + columns[None, :]
    if ALL_ROWS and WIDTH % BLOCK_D == 0:
        return tl.load(pointers)
    elif ALL_ROWS:
        return tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0)
    elif WIDTH % BLOCK_D == 0:
        return tl.load(pointers, mask=positions[:, None] < end, other=0.0)
    else:
        return tl.load(pointers, mask=(positions[:, None] < end) & (columns[None, :] < WIDTH), other=0.0)


@triton.jit
def scaled(products, scale, scale_rest, EXACT_SCALE: tl.constexpr):
    """S = zhat_i . zhat_j * log2(e) / tau. In half precision the rest of the scale is far below the operands' rounding."""
    if EXACT_SCALE:
        return products * scale + products * scale_rest
    else:
        return products * scale


@triton.jit
def is_positive(rows, columns, start, end, n_left):
    """(M, N) mask: a column in the run [start, end) of the row, and not the row itself."""
    in_run = (columns[None, :] >= start[:, None]) & (columns[None, :] < end[:, None])
    if n_left is None:
        return in_run & (columns[None, :] != rows[:, None])
    else:
        return in_run


@triton.jit
def is_pair(rows, columns, start, end, column_end, n_left, PAIRS: tl.constexpr):
    """(M, N) mask, or (1, N): a column that the row is compared with. Without sides the run [start, end) holds the row itself."""
    inside = columns[None, :] < column_end
    if PAIRS == "negatives":
        return inside & ((columns[None, :] < start[:, None]) | (columns[None, :] >= end[:, None]))
    elif n_left is None:
        return inside & (columns[None, :] != rows[:, None])
    else:
        return inside


@triton.jit
def log1p(x):
    """log(1 + x) for -1/2 <= x <= 1 to the last digits of float32, near 0 too, where the hardware's log has none.

    2 artanh(r), r = x / (2 + x), |r| <= 1/3: the first term left out is below r^18 / 19 = 1.4e-10 of the sum.
    """
    r = x / (2.0 + x)
    square = r * r
    series = square * (1.0 / 17) + 1.0 / 15
    series = series * square + 1.0 / 13
    series = series * square + 1.0 / 11
    series = series * square + 1.0 / 9
    series = series * square + 1.0 / 7
    series = series * square + 1.0 / 5
    series = series * square + 1.0 / 3
    return 2.0 * (r + r * square * series)
