"""What several kernels share on the device: who is compared with whom, whose positives are where, exact products and logs.

Kernels work on *positions*: rows sorted by positive group (:mod:`clop_kernels.groups`), so that the positives of a row
are a run of positions [start, end): around it, less itself, and of rows with two sides on the other one. They lie in tiles
near the diagonal, or what takes its place between two sides. Those *near* tiles pay for masks; all others, the *far* tiles,
have none, not even for the ragged end of the columns, which counts as near.

Every kernel over pairs takes :class:`Pairs`, numbers that say who is compared, and from it a :class:`Span`, its own rows and
columns. They are numbers and not forms of the kernel: far tiles look at none of them, so that one compiled kernel serves
every loss.

An empty tensor stands for one that is not there, and a number says so. Rows of zhat are WIDTH numbers, and PITCH numbers apart
(:func:`clop_kernels.backends.contract.unit_rows`).
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
"""Where the running maximum begins: finite, so that no two infinities are subtracted."""


class Pairs(NamedTuple):
    """Who is compared with whom, as every kernel over pairs is told by arguments of these names."""

    groups: tl.tensor  # (3, n_rows) int32, by position: row, start, end; read where ``views`` is 0
    n_rows: tl.tensor
    n_left: tl.tensor  # rows on the left side, the first positions; -1: there are no sides, and a row meets all others
    views: tl.tensor  # positives are the views of an instance, so many side by side; of two sides 1; 0: ``groups`` has them
    is_one_way: tl.tensor  # of two sides only rows on the left have programs
    negatives_only: tl.tensor  # positives are no pairs, like a row and itself


class Span(NamedTuple):
    """What one program compares: rows of one side with columns that they meet, which are positions too.

    Tiles of BLOCK_N columns are numbered from ``column_base``, and so are the columns of :func:`near_columns` and
    :func:`far_column`: what is loaded for every pair is loaded through :func:`from_position`.
    """

    first: tl.tensor  # the program's first row
    row_end: tl.tensor  # one past the last row of their side
    column_base: tl.tensor
    column_end: tl.tensor
    near: tl.tensor  # the tiles [near, near_end) may hold positives, and the diagonal if it is among the pairs
    near_end: tl.tensor
    n_near: tl.tensor  # how many tiles are masked: those, and a ragged last one that is not among them
    n_far: tl.tensor


class Scale(NamedTuple):
    """log2(e) / tau as the sum of two float32 numbers. One alone would be off by its rounding in every similarity alike."""

    value: tl.tensor
    rest: tl.tensor


@triton.jit
def logit_scale(temperature, scale, scale_rest):
    """The scale that the host has made, or, where that is 0, of the () float32 ``temperature``, which the host never reads."""
    if scale == 0.0:
        precise = LOG2_E / tl.load(temperature).to(tl.float64)
        scale = precise.to(tl.float32)
        scale_rest = (precise - scale.to(tl.float64)).to(tl.float32)
    return Scale(scale, scale_rest)


@triton.jit
def known_weight(weight, prototype_weight):
    """The prototype weight that the host knows, or, where that is below 0, the () float32 ``weight``, which it never reads."""
    if prototype_weight < 0.0:
        prototype_weight = tl.load(weight)
    return prototype_weight


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
def row_of(position, groups, n_instances, views, mask):
    """The row of the user's tensor at a position. Views of an instance are side by side; of two sides ``views`` is 1."""
    if views == 0:  # noqa: SIM108
        row = tl.load(groups + position, mask=mask, other=0)
    else:
        row = position % views * n_instances + position // views
    return row


@triton.jit
def group_of(position, pairs, mask):
    """[start, end): the run of positions that holds the positives of a position, and without sides itself."""
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
    """n_i, from the run of its positives; below 1 where there are none."""
    n_positives = end - start - tl.where(pairs.n_left < 0, 1, 0)
    return tl.where(pairs.negatives_only != 0, 0, n_positives)


@triton.jit
def span_of(block, pairs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What a block of rows is compared with. Of two sides those of the shorter one, whose walk is longer, go first."""
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
    # Runs of positives are in the order of their rows: those of the first and the last row enclose all others.
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
    """[first, end): the tiles, of near or of far ones, that are a split's."""
    return split * n_tiles // n_splits, (split + 1) * n_tiles // n_splits


@triton.jit
def near_columns(index, span, BLOCK_N: tl.constexpr):
    """The columns in the near tile of that index, counted from ``column_base``."""
    last = tl.cdiv(span.column_end - span.column_base, BLOCK_N) - 1
    tile = tl.where(span.near + index < span.near_end, span.near + index, last)
    return tile * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def far_column(index, span, BLOCK_N: tl.constexpr):
    """The first column in the far tile of that index, counted from ``column_base``; all that follow in the tile are there."""
    return tl.where(index < span.near, index, index + span.near_end - span.near) * BLOCK_N


@triton.jit
def from_position(zhat, position, PITCH: tl.constexpr):
    """zhat from a position on, for rows counted from there.

    The compiler knows how such a count is made, and that the rows of a tile share an address but for constants. A position that
    it knows nothing of, such as where a side begins, would cost it 64 bits a row: wide rows' softmax spilled them on sm_90.
    """
    return zhat + tl.cast(position, tl.int64) * PITCH


@triton.jit
def own_rows(zhat, rows, span, PITCH: tl.constexpr):
    """The program's rows for loads in a loop: zhat from where they are counted, their count, and its end."""
    return from_position(zhat, span.first, PITCH), tl.arange(0, rows.shape[0]), span.row_end - span.first


@triton.jit
def load_rows(zhat, positions, end, columns, PITCH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """zhat at positions (M,) and columns (BLOCK_D,), zero from position ``end`` on; a position times the pitch may pass 2^31."""
    pointers = zhat + positions.to(tl.int64)[:, None] * PITCH + columns[None, :]
    if WIDTH % BLOCK_D == 0:
        return tl.load(pointers, mask=positions[:, None] < end, other=0.0)
    else:
        return tl.load(pointers, mask=(positions[:, None] < end) & (columns[None, :] < WIDTH), other=0.0)


@triton.jit
def load_far(zhat, first, columns, PITCH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """zhat at BLOCK_N positions from ``first`` on, all of which are there, and columns (BLOCK_D,).

    The addresses of the first tile stay in registers, and one number is added to all, which takes the fewest instructions. Rows
    beyond 128 numbers leave no registers for them: offsets, half as large, stay there.
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
    """S = zhat_i . zhat_j * log2(e) / tau. In half precision the rest of the scale is far below the operands' rounding."""
    if EXACT_SCALE:
        return products * scale.value + products * scale.rest
    else:
        return products * scale.value


@triton.jit
def masks(rows, columns, start, end, span, pairs):
    """(M, N) masks: columns that the rows are compared with, and those of them that are positives, in their runs [start, end).

    Without sides a run holds the row itself; with sides it cannot.
    """
    in_run = (columns[None, :] >= start[:, None]) & (columns[None, :] < end[:, None])
    no_pairs_end = tl.where(pairs.negatives_only != 0, end, start)
    is_left_out = (columns[None, :] >= start[:, None]) & (columns[None, :] < no_pairs_end[:, None])
    compared = (columns[None, :] < span.column_end) & (columns[None, :] != rows[:, None]) & ~is_left_out
    return compared, compared & in_run


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
