"""What several kernels share on the device: which rows are whose positives, which tiles hold them, exact products and logs.

Kernels work on *positions*: rows sorted by positive group (:mod:`clop_kernels.groups`), so that the positives of a row
are the positions [start, end) around it, less itself, and lie in tiles near the diagonal. Those *near* tiles pay for
masks; all others, the *far* tiles, have none, not even for the ragged end of the matrix, which counts as near.

Where a temperature is a tensor, ``temperature`` is a pointer to it and the host never reads it; where it is a float,
``scale`` and ``scale_rest`` hold log2(e) / tau in two float32 numbers. One alone would be off by its rounding in every
similarity alike, as if the temperature were another.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

LARGEST_UNSHIFTED_LOGIT = tl.constexpr(60.0)
"""exp(60), summed over 2^38 rows, is within float32: while 1/tau is below, exp s needs no shift, and no maximum."""

NO_LOGIT = tl.constexpr(float("-inf"))
LEAST_SHIFT = tl.constexpr(-1.0e38)
"""Where the running maximum begins: finite, so that no two infinities are subtracted."""


@triton.jit
def logit_scale(temperature, scale, scale_rest, ON_DEVICE: tl.constexpr):
    """log2(e) / tau as the sum of two float32 numbers."""
    if ON_DEVICE:
        precise = LOG2_E / tl.load(temperature).to(tl.float64)
        scale = precise.to(tl.float32)
        scale_rest = (precise - scale.to(tl.float64)).to(tl.float32)
    return scale, scale_rest


@triton.jit
def fits_unshifted(scale):
    return scale <= LARGEST_UNSHIFTED_LOGIT * LOG2_E


@triton.jit
def row_of(position, groups, n_instances, VIEWS: tl.constexpr, BY_LABEL: tl.constexpr, mask):
    """The row of the user's tensor at a position; groups is (3, n_rows) int32: row, start, end of each position."""
    if BY_LABEL:
        return tl.load(groups + position, mask=mask, other=0)
    else:
        return position % VIEWS * n_instances + position // VIEWS


@triton.jit
def group_of(position, groups, n_rows, VIEWS: tl.constexpr, BY_LABEL: tl.constexpr, mask):
    """[start, end) of the group of a position."""
    if BY_LABEL:
        start = tl.load(groups + n_rows + position, mask=mask, other=0)
        end = tl.load(groups + 2 * n_rows + position, mask=mask, other=0)
    else:
        start = position // VIEWS * VIEWS
        end = start + VIEWS
    return start, end


@triton.jit
def near_tiles(first, last, groups, n_rows, VIEWS: tl.constexpr, BY_LABEL: tl.constexpr, BLOCK_N: tl.constexpr):
    """For the rows at positions first to last: the near tiles [near, near_end), and how many near and far ones there are.

    A ragged last tile that holds no positives is one more near tile; :func:`near_tile` and :func:`far_tile` number them.
    """
    start, _ = group_of(first, groups, n_rows, VIEWS, BY_LABEL, first < n_rows)
    _, end = group_of(last, groups, n_rows, VIEWS, BY_LABEL, last < n_rows)
    n_tiles = tl.cdiv(n_rows, BLOCK_N)
    near = start // BLOCK_N
    near_end = tl.minimum(tl.cdiv(end, BLOCK_N), n_tiles)
    n_ragged = ((n_rows % BLOCK_N != 0) & (near_end < n_tiles)).to(tl.int32)
    return near, near_end, near_end - near + n_ragged, n_tiles - (near_end - near) - n_ragged


@triton.jit
def near_tile(index, near, near_end, n_rows, BLOCK_N: tl.constexpr):
    return tl.where(near + index < near_end, near + index, tl.cdiv(n_rows, BLOCK_N) - 1)


@triton.jit
def far_tile(index, near, near_end):
    return tl.where(index < near, index, index + near_end - near)


@triton.jit
def load_rows(zhat, positions, n_rows, columns, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ALL_ROWS: tl.constexpr):
    """zhat at positions (M,) and columns (BLOCK_D,), zero outside; a row index times the width may pass 2^31."""
    pointers = zhat + positions.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    if ALL_ROWS and WIDTH % BLOCK_D == 0:
        return tl.load(pointers)
    elif ALL_ROWS:
        return tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0)
    elif WIDTH % BLOCK_D == 0:
        return tl.load(pointers, mask=positions[:, None] < n_rows, other=0.0)
    else:
        return tl.load(pointers, mask=(positions[:, None] < n_rows) & (columns[None, :] < WIDTH), other=0.0)


@triton.jit
def scaled(products, scale, scale_rest, EXACT_SCALE: tl.constexpr):
    """S = zhat_i . zhat_j * log2(e) / tau. In half precision the rest of the scale is far below the operands' rounding."""
    if EXACT_SCALE:
        return products * scale + products * scale_rest
    else:
        return products * scale


@triton.jit
def is_positive(rows, columns, start, end):
    """(M, N) mask: a column in the group [start, end) of the row, and not the row itself."""
    return (columns[None, :] >= start[:, None]) & (columns[None, :] < end[:, None]) & (columns[None, :] != rows[:, None])


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
