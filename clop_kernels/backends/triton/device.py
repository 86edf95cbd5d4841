"""Device functions that several kernels share: which rows are compared, where positives are, exact products and logarithms.

Kernels work on *positions*: rows sorted by positive group (:mod:`clop_kernels.groups`). A row's positives are therefore a run of
positions [start, end). Without sides, the run surrounds the row and includes it. With two sides, it is on the other side.
Positives lie in tiles near the diagonal, or near the corresponding line between two sides. These *near* tiles use masks. All
other tiles, the *far* tiles, use no masks at all. A ragged last tile, which is not full of columns, counts as near.

Every kernel over pairs receives :class:`Pairs`, the numbers that say which rows are compared. From these it computes a
:class:`Span`, its own rows and columns. These are run-time numbers, not compile-time constants, and far tiles read none of them.
One compiled kernel therefore serves every loss.

A missing tensor is passed as an empty tensor, and a number says that it is missing. A row of zhat has WIDTH numbers, and rows are
PITCH numbers apart (:func:`clop_kernels.backends.contract.unit_rows`).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..contract import LOG2_E as _LOG2_E

LOG2_E = tl.constexpr(_LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)

NO_LOGIT = tl.constexpr(float("-inf"))
LEAST_SHIFT = tl.constexpr(-1.0e38)
"""The start of the running maximum. It is finite, so that infinities are never subtracted from each other."""


class Pairs(NamedTuple):
    """Which rows are compared. Every kernel over pairs has arguments with these names."""

    groups: tl.tensor  # (3, n_rows) int32, by position: row, start, end; read if ``views`` is 0
    n_rows: tl.tensor
    n_left: tl.tensor  # the number of rows on the left side, which come first; -1: no sides, a row meets all others
    views: tl.tensor  # positives by instance: the number of adjacent views, with two sides 1; positives by label: 0
    is_one_way: tl.tensor  # with two sides: only left rows have programs
    negatives_only: tl.tensor  # positives are excluded from the pairs, as the diagonal is


class Span(NamedTuple):
    """The rows and columns that one program compares, as positions. All rows are on one side.

    Tiles of BLOCK_N columns are counted from ``column_base``, and so are the columns of :func:`near_columns` and
    :func:`far_column`. Loads in the loops go through :func:`from_position`, which explains why.
    """

    first: tl.tensor  # the program's first row
    row_end: tl.tensor  # one past the last row of that side
    column_base: tl.tensor  # the first column
    column_end: tl.tensor  # one past the last column
    near: tl.tensor  # the tiles [near, near_end) may hold positives, and hold the diagonal if there is one
    near_end: tl.tensor
    n_near: tl.tensor  # the number of masked tiles: [near, near_end), and a ragged last tile outside it
    n_far: tl.tensor


class Scale(NamedTuple):
    """log2(e) / tau as the sum of two float32 numbers. With one, its rounding error would be the same in every similarity."""

    value: tl.tensor
    rest: tl.tensor


@triton.jit
def logit_scale(temperature, scale, scale_rest):
    """The scale from the host. If it is 0, computes it from the () float32 ``temperature``, which the host never reads."""
    if scale == 0.0:
        precise = LOG2_E / tl.load(temperature).to(tl.float64)
        scale = precise.to(tl.float32)
        scale_rest = (precise - scale.to(tl.float64)).to(tl.float32)
    return Scale(scale, scale_rest)


@triton.jit
def known_weight(weight, prototype_weight):
    """The prototype weight from the host. If it is below 0, loads the () float32 ``weight``, which the host never reads."""
    if prototype_weight < 0.0:
        prototype_weight = tl.load(weight)
    return prototype_weight


@triton.jit
def as_operand(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x as an operand of tl.dot, rounded if the matrix unit uses TF32.

    A TF32 unit truncates a float32 after ten bits of its mantissa, which makes all operands too small. Rounding errors cancel.
    """
    if PRECISION == "tf32":
        rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # keeps NaN: a NaN whose bits are all ones would be rounded to zero
    return x.to(dtype)


@triton.jit
def row_of(position, groups, n_instances, views, mask):
    """The row of the user's tensor at a position. By instance, views are adjacent; with two sides ``views`` is 1."""
    if views == 0:  # noqa: SIM108
        row = tl.load(groups + position, mask=mask, other=0)
    else:
        row = position % views * n_instances + position // views
    return row


@triton.jit
def group_of(position, pairs, mask):
    """[start, end): the positive run of a position. Without sides it includes the position itself."""
    if pairs.views == 0:
        start = tl.load(pairs.groups + pairs.n_rows + position, mask=mask, other=0)
        end = tl.load(pairs.groups + 2 * pairs.n_rows + position, mask=mask, other=0)
    elif pairs.n_left >= 0:
        start = tl.where(position < pairs.n_left, position + pairs.n_left, position - pairs.n_left)
        end = start + 1
    else:
        start = position // pairs.views * pairs.views
        end = start + pairs.views
    return start, end


@triton.jit
def n_positives_of(start, end, pairs):
    """n_i, from the bounds of the positive run; below 1 without positives."""
    n_positives = end - start - tl.where(pairs.n_left < 0, 1, 0)
    return tl.where(pairs.negatives_only != 0, 0, n_positives)


@triton.jit
def span_of(block, pairs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The :class:`Span` of a block of rows. With two sides, the shorter side's blocks come first: they walk over more columns."""
    has_sides = pairs.n_left >= 0
    n_left = tl.where(has_sides, pairs.n_left, pairs.n_rows)
    n_right = pairs.n_rows - n_left
    is_left_only = (not has_sides) | (pairs.is_one_way != 0)
    n_early = tl.cdiv(tl.minimum(n_left, n_right), BLOCK_M)
    is_left = is_left_only | ((block < n_early) == (n_left <= n_right))
    of_side = tl.where(is_left_only | (block < n_early), block, block - n_early)
    first = of_side * BLOCK_M + tl.where(is_left, 0, n_left)
    row_end = tl.where(is_left, n_left, pairs.n_rows)
    column_base = tl.where(has_sides & is_left, n_left, 0)
    column_end = tl.where(has_sides & (not is_left), n_left, pairs.n_rows)
    # Starts and ends are non-decreasing, so the runs of the first and the last row enclose the runs of all rows between.
    last = tl.minimum(first + BLOCK_M, row_end) - 1
    start, _ = group_of(first, pairs, first < row_end)
    _, end = group_of(last, pairs, last < row_end)
    n_columns = column_end - column_base
    n_tiles = tl.cdiv(n_columns, BLOCK_N)
    near = (start - column_base) // BLOCK_N
    near_end = tl.minimum(tl.cdiv(end - column_base, BLOCK_N), n_tiles)
    n_ragged = ((n_columns % BLOCK_N != 0) & (near_end < n_tiles)).to(tl.int32)
    n_near = near_end - near + n_ragged
    return Span(first, row_end, column_base, column_end, near, near_end, n_near, n_tiles - n_near)


@triton.jit
def share_of(n_tiles, split, n_splits):
    """[first, end): the share of one split among ``n_tiles`` near or far tiles."""
    return split * n_tiles // n_splits, (split + 1) * n_tiles // n_splits


@triton.jit
def near_columns(index, span, BLOCK_N: tl.constexpr):
    """The columns of a near tile, counted from ``column_base``. The last index may be the ragged last tile."""
    last = tl.cdiv(span.column_end - span.column_base, BLOCK_N) - 1
    tile = tl.where(span.near + index < span.near_end, span.near + index, last)
    return tile * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def far_column(index, span, BLOCK_N: tl.constexpr):
    """The first column of a far tile, counted from ``column_base``. All BLOCK_N columns of a far tile exist."""
    return tl.where(index < span.near, index, index + span.near_end - span.near) * BLOCK_N


@triton.jit
def from_position(zhat, position, PITCH: tl.constexpr):
    """A pointer to zhat at a position, for rows that are then counted from there.

    Counted rows let the compiler see that the addresses in a tile differ only by constants. If an unknown position, such as the
    start of a side, were added to each row, the compiler would keep 64 bits for each row. On sm_90 the softmax of wide rows
    spilled these registers.
    """
    return zhat + tl.cast(position, tl.int64) * PITCH


@triton.jit
def own_rows(zhat, rows, span, PITCH: tl.constexpr):
    """The program's rows, for loads in a loop: a pointer to the first, their numbers from there, and the end of the count."""
    return from_position(zhat, span.first, PITCH), tl.arange(0, rows.shape[0]), span.row_end - span.first


@triton.jit
def load_rows(zhat, positions, end, columns, PITCH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """zhat at positions (M,) and columns (BLOCK_D,); zero from position ``end`` on. Position times pitch may exceed 2^31."""
    pointers = zhat + positions.to(tl.int64)[:, None] * PITCH + columns[None, :]
    if WIDTH % BLOCK_D == 0:
        return tl.load(pointers, mask=positions[:, None] < end, other=0.0)
    else:
        return tl.load(pointers, mask=(positions[:, None] < end) & (columns[None, :] < WIDTH), other=0.0)


@triton.jit
def load_far(zhat, first, columns, PITCH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """zhat at BLOCK_N positions from ``first`` on, all of which exist, and columns (BLOCK_D,).

    The addresses of the first tile stay in registers, and one number is added to all of them; this takes the fewest instructions.
    Rows wider than 128 leave too few registers for addresses. For them, offsets stay in registers, which are half as large.
    """
    offsets = tl.arange(0, BLOCK_N)[:, None] * PITCH
    if WIDTH <= 128:
        pointers = zhat + offsets + columns[None, :] + tl.cast(first, tl.int64) * PITCH
    else:
        pointers = from_position(zhat, first, PITCH) + (offsets + columns[None, :])
    if WIDTH % BLOCK_D == 0:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0)


@triton.jit
def scaled(products, scale, EXACT_SCALE: tl.constexpr):
    """S = zhat_i . zhat_j * log2(e) / tau. In half precision, ``scale.rest`` is far below the rounding of the operands."""
    if EXACT_SCALE:
        return products * scale.value + products * scale.rest
    else:
        return products * scale.value


@triton.jit
def masks(rows, columns, start, end, span, pairs):
    """Two (M, N) masks: the columns that the rows are compared with, and the positives among these columns.

    Positives are the columns in the run [start, end), without the row itself.
    """
    in_run = (columns[None, :] >= start[:, None]) & (columns[None, :] < end[:, None])
    no_pairs_end = tl.where(pairs.negatives_only != 0, end, start)
    is_left_out = (columns[None, :] >= start[:, None]) & (columns[None, :] < no_pairs_end[:, None])
    compared = (columns[None, :] < span.column_end) & (columns[None, :] != rows[:, None]) & ~is_left_out
    return compared, compared & in_run


@triton.jit
def log1p(x):
    """log(1 + x) for -1/2 <= x <= 1, accurate to the last digits of float32. The hardware's log has no correct digits near 0.

    The series is 2 artanh(r) with r = x / (2 + x), |r| <= 1/3. The first term left out is below r^18 / 19 = 1.4e-10 of the sum.
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
