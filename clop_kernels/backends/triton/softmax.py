"""Second and third launch: the softmax statistics of every row of S = zhat zhat^T log2(e) / tau, its term, and the loss.

Tile picture. A program owns BLOCK_M rows and walks over columns, BLOCK_N at a time; nothing of S leaves registers::

                  far   near  near   far     ragged (near)
    rows i  [ q ] | S |  | P | | P |  | S |   | S |        negative_i += sum_j 2^S_ij     over pairs that are not positives
                                                           positive_i, sum of S_ip        over positives, in near tiles only

Where a whole row fits (see tiles.py), its tile q stays on chip and a column tile costs one load; beyond, both operands pass
by in chunks of BLOCK_K of the width.

The columns are those of one of ``n_splits`` programs that share the rows: where there are few blocks of rows, that is how all
processors get work, and tiles stay as tall as matrix units ask for. Each leaves its statistics, 16 bytes a row, and loss_kernel
adds them in the order of the splits.

Flops 2 N^2 D, exponentials N^2, and per pair two float32 operations: scale and add. Bytes: zhat once a block of rows from L2,
N^2 D itemsize / BLOCK_M in all, whatever the number of splits; BLOCK_M flops a byte in bfloat16. Wide rows: see tiles.py.

Rows of two sides, L + R = N: a program owns rows of one and walks over the columns of the other, so no tile is of rows that
are not compared. The picture is the same with the run of positives in place of the diagonal. 4 L R D flops, 2 L R
exponentials and 2 L R D itemsize / BLOCK_M bytes: for L = R half of the above.

Rows that are not normalised have similarities of any size, and take the online maximum whatever the temperature.

Negatives only: positives are left out as a row itself is, and a row's term is the logarithm of its sum.

A pass over pairs alone leaves the sums themselves, one way of the rows on the left only: half the programs, flops and bytes.

The positives are summed apart from the rest because near-duplicate views need log(1 + negative / positive) to the last
digit, and they are taken from these very tiles, not from sums of zhat over a group, whose gradient cancels in float32
(backends/tiled.py has the figures).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    LEAST_SHIFT,
    LN_2,
    NO_LOGIT,
    Pairs,
    far_column,
    from_position,
    group_of,
    known_weight,
    load_far,
    load_rows,
    log1p,
    logit_scale,
    masks,
    n_positives_of,
    near_columns,
    own_rows,
    row_of,
    scaled,
    share_of,
    span_of,
)


@triton.jit
def similarities(
    q,
    of_rows,
    rows,
    row_end,
    of_columns,
    columns,
    column_end,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """zhat_i . zhat_j for rows (M,) of one matrix and BLOCK_N columns, which are rows of another: of a far tile the first one.

    q is the rows' tile where a whole row fits, and unused where not.
    """
    products = tl.zeros((rows.shape[0], BLOCK_N), tl.float32)
    if BLOCK_K >= WIDTH:
        width = tl.arange(0, BLOCK_K)
        if IS_FAR:
            k = load_far(of_columns, columns, width, PITCH, WIDTH, BLOCK_N, BLOCK_K)
        else:
            k = load_rows(of_columns, columns, column_end, width, PITCH, WIDTH, BLOCK_K)
        products = tl.dot(q, tl.trans(k), products, input_precision=PRECISION)
    else:
        for first in range(0, WIDTH, BLOCK_K):
            chunk = first + tl.arange(0, BLOCK_K)
            a = load_rows(of_rows, rows, row_end, chunk, PITCH, WIDTH, BLOCK_K)
            if IS_FAR:
                b = load_far(of_columns, columns, chunk, PITCH, WIDTH, BLOCK_N, BLOCK_K)
            else:
                b = load_rows(of_columns, columns, column_end, chunk, PITCH, WIDTH, BLOCK_K)
            products = tl.dot(a, tl.trans(b), products, input_precision=PRECISION)
    return products


@triton.jit
def shifted(s, shift, negative, positive):
    """S less the running maximum of its rows, that maximum, and the sums so far in units of it."""
    larger = tl.maximum(shift, tl.max(s, 1))
    rescale = tl.exp2(shift - larger)
    return s - larger[:, None], larger, negative * rescale, positive * rescale


@triton.jit
def row_sums(
    q,
    zhat,
    rows,
    span,
    split,
    n_splits,
    scale,
    pairs,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONLINE: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT_SCALE: tl.constexpr,
):
    """Of each row and a split's columns: shift, sums of 2^(S_ij - shift) over negatives and positives, and the positives' S_ip.

    Without ONLINE the shift is zero and stays so, else it is the running maximum.
    """
    zero = tl.zeros_like(rows).to(tl.float32)
    shift = zero + LEAST_SHIFT if ONLINE else zero
    negative, positive, positive_logits = zero, zero, zero
    of_columns, n_columns = from_position(zhat, span.column_base, PITCH), span.column_end - span.column_base
    of_rows, local_rows, n_own = own_rows(zhat, rows, span, PITCH)
    start, end = group_of(rows, pairs, rows < span.row_end)
    first_tile, end_tile = share_of(span.n_near, split, n_splits)
    for index in range(first_tile, end_tile):
        local = near_columns(index, span, BLOCK_N)
        s = similarities(
            q, of_rows, local_rows, n_own, of_columns, local, n_columns, WIDTH, PITCH, BLOCK_N, BLOCK_K, False, PRECISION
        )
        s = scaled(s, scale, EXACT_SCALE)
        compared, among_positives = masks(rows, span.column_base + local, start, end, span, pairs)
        positive_logits += tl.sum(tl.where(among_positives, s, 0.0), 1)
        s = tl.where(compared, s, NO_LOGIT)
        if ONLINE:
            s, shift, negative, positive = shifted(s, shift, negative, positive)
        powers = tl.exp2(s)
        positive += tl.sum(tl.where(among_positives, powers, 0.0), 1)
        negative += tl.sum(tl.where(among_positives, 0.0, powers), 1)
    first_tile, end_tile = share_of(span.n_far, split, n_splits)
    for index in range(first_tile, end_tile):
        first = far_column(index, span, BLOCK_N)
        s = similarities(
            q, of_rows, local_rows, n_own, of_columns, first, n_columns, WIDTH, PITCH, BLOCK_N, BLOCK_K, True, PRECISION
        )
        s = scaled(s, scale, EXACT_SCALE)
        if ONLINE:
            s, shift, negative, positive = shifted(s, shift, negative, positive)
        negative += tl.sum(tl.exp2(s), 1)
    if ONLINE:
        # It is no less anyway. But of two paths that end alike the compiler would make one end, and keep the tiles of both.
        shift = tl.maximum(shift, LEAST_SHIFT)
    return shift, negative, positive, positive_logits


@triton.jit(
    do_not_specialize=["n_rows", "n_left", "views", "is_one_way", "negatives_only", "n_splits"],
    do_not_specialize_on_alignment=["groups", "temperature", "statistics"],
)
def softmax_kernel(
    zhat,  # (N, D), by position
    groups,  # down to negatives_only: device.Pairs
    n_rows,
    n_left,
    views,
    is_one_way,
    negatives_only,
    temperature,  # device.logit_scale
    scale,
    scale_rest,
    largest_unshifted,  # up to this scale no similarity needs a shift; of rows of any length none is so small: 0
    statistics,  # (splits, 4, rows) float32, written: contract.Softmax of each split's columns, by position
    n_splits,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT_SCALE: tl.constexpr,
):
    pairs = Pairs(groups, n_rows, n_left, views, is_one_way, negatives_only)
    span = span_of(tl.program_id(0), pairs, BLOCK_M, BLOCK_N)
    split = tl.program_id(1)
    rows = span.first + tl.arange(0, BLOCK_M)
    scale = logit_scale(temperature, scale, scale_rest)

    # Unused, and so left out, if wide.
    q = load_rows(zhat, rows, span.row_end, tl.arange(0, BLOCK_K), PITCH, WIDTH, BLOCK_K)
    if scale.value <= largest_unshifted:
        shift, negative, positive, positive_logits = row_sums(
            q, zhat, rows, span, split, n_splits, scale, pairs,
            WIDTH, PITCH, BLOCK_N, BLOCK_K, False, PRECISION, EXACT_SCALE,
        )  # fmt: skip
    else:
        shift, negative, positive, positive_logits = row_sums(
            q, zhat, rows, span, split, n_splits, scale, pairs,
            WIDTH, PITCH, BLOCK_N, BLOCK_K, True, PRECISION, EXACT_SCALE,
        )  # fmt: skip

    is_row = rows < span.row_end
    n_results = tl.where(is_one_way != 0, n_left, n_rows)
    to = statistics + split.to(tl.int64) * 4 * n_results
    tl.store(to + rows, shift, mask=is_row)
    tl.store(to + n_results + rows, negative, mask=is_row)
    tl.store(to + 2 * n_results.to(tl.int64) + rows, positive, mask=is_row)
    tl.store(to + 3 * n_results.to(tl.int64) + rows, positive_logits, mask=is_row)


@triton.jit
def contrastive_term(shift, negative, positive, positive_logits, n_positives):
    """lse_i - mean_p s_ip in a form that cancels only what the rounding of the inputs has left, lse_i alone for n_i = 0."""
    total = negative + positive
    # log2(total) = exponent + log2(mantissa), mantissa in [1/2, 1): the large parts are subtracted first.
    bits = total.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 126).to(tl.float32)
    mantissa = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    mean_positive = positive_logits / tl.maximum(n_positives, 1).to(tl.float32)
    term = ((shift - mean_positive) + exponent) * LN_2 + log1p(mantissa - 1.0)
    # The bits of a NaN or an infinity are not a number's.
    term = tl.where(total < float("inf"), term, total)
    is_dominated = (n_positives == 1) & (negative < positive)
    return tl.where(is_dominated, log1p(negative / tl.where(is_dominated, positive, 1.0)), term)


@triton.jit
def merged(statistics, rows, is_row, n_rows, n_splits):
    """shift, negative, positive and positive_logits of some rows over the columns of all splits, added in their order."""
    shift = tl.load(statistics + rows, mask=is_row, other=0.0)
    negative = tl.load(statistics + n_rows + rows, mask=is_row, other=0.0)
    positive = tl.load(statistics + 2 * n_rows + rows, mask=is_row, other=0.0)
    positive_logits = tl.load(statistics + 3 * n_rows + rows, mask=is_row, other=0.0)
    for split in range(1, n_splits):
        of_split = statistics + split * 4 * n_rows
        next_shift = tl.load(of_split + rows, mask=is_row, other=0.0)
        larger = tl.maximum(shift, next_shift)
        so_far, to_come = tl.exp2(shift - larger), tl.exp2(next_shift - larger)
        negative = negative * so_far + tl.load(of_split + n_rows + rows, mask=is_row, other=0.0) * to_come
        positive = positive * so_far + tl.load(of_split + 2 * n_rows + rows, mask=is_row, other=0.0) * to_come
        positive_logits += tl.load(of_split + 3 * n_rows + rows, mask=is_row, other=0.0)
        shift = larger
    return shift, negative, positive, positive_logits


@triton.jit
def sum_of(partial_sums, which, n_programs, BLOCK: tl.constexpr):
    """Of all programs' partial sums, in their order. Other programs have written them: they are read from L2."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n_programs, BLOCK):
        index = first + tl.arange(0, BLOCK)
        total += tl.load(partial_sums + which * n_programs + index, mask=index < n_programs, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit(
    do_not_specialize=[
        "n_rows", "n_left", "views", "negatives_only", "n_instances", "n_classes", "n_splits", "is_labelled", "is_mean",
        "is_per_row",
    ],
    do_not_specialize_on_alignment=["groups", "labels", "temperature", "weight"],
)  # fmt: skip
def loss_kernel(
    statistics,  # (splits, 4, N), as softmax_kernel leaves them
    distances,  # (N,), by position
    labels,  # (B,) int64
    groups,  # down to negatives_only: device.Pairs
    n_rows,
    n_left,
    views,
    negatives_only,
    temperature,  # device.logit_scale
    scale,
    weight,  # device.known_weight
    prototype_weight,
    shift_out,  # (N,), by position; so are the next two
    inverse_total_out,  # 0 for a row that is no anchor, whose share of every gradient is then zero
    negative_out,
    loss,  # () float32, or with is_per_row (N,), by row
    counts,  # (2,) float32: anchors, labelled rows
    partial_sums,  # (5, programs): of the contrastive terms, distances, anchors, labelled rows, labels out of range
    n_finished,  # () int32, 0: how many programs are done
    n_instances,
    n_classes,  # labels below it are in range; 0: no prototypes, all are
    n_splits,
    is_labelled,
    is_mean,
    is_per_row,
    BLOCK_M: tl.constexpr,
):
    """Third launch: of each row the softmax of all splits, what the backward pass needs of it, its term, and the loss.

    The last program to finish adds the partial sums of all, in their order: the same bits from run to run.
    """
    program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    pairs = Pairs(groups, n_rows, n_left, views, 0, negatives_only)
    rows = program * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < n_rows
    start, end = group_of(rows, pairs, is_row)
    n_positives = n_positives_of(start, end, pairs)
    shift, negative, positive, positive_logits = merged(statistics, rows, is_row, n_rows.to(tl.int64), n_splits)
    total = negative + positive
    # Where positives are no pairs, a row with negatives is an anchor: not total > 0, so that a NaN among them shows in its term.
    is_anchor = tl.where(negatives_only != 0, total != 0.0, n_positives > 0) & is_row
    tl.store(shift_out + rows, shift, mask=is_row)
    inverse_total = 1.0 / tl.where(is_anchor, total, 1.0)
    tl.store(inverse_total_out + rows, tl.where(is_anchor, inverse_total, 0.0), mask=is_row)
    tl.store(negative_out + rows, negative, mask=is_row)

    term = tl.where(is_anchor, contrastive_term(shift, negative, positive, positive_logits, n_positives), 0.0)
    distance = tl.load(distances + rows, mask=is_row, other=0.0)
    row = row_of(rows, groups, n_instances, views, is_row)
    label = tl.load(labels + row % n_instances, mask=rows < n_rows * is_labelled, other=-1)
    is_misfit = (label < -1) | ((n_classes > 0) & (label >= n_classes))
    prototype_weight = known_weight(weight, prototype_weight)
    tl.store(loss + row, term + prototype_weight * distance, mask=rows < n_rows * is_per_row)
    tl.store(partial_sums + program, tl.sum(term, 0))
    tl.store(partial_sums + n_programs + program, tl.sum(distance, 0))
    tl.store(partial_sums + 2 * n_programs + program, tl.sum(is_anchor.to(tl.float32), 0))
    tl.store(partial_sums + 3 * n_programs + program, tl.sum((label >= 0).to(tl.float32), 0))
    tl.store(partial_sums + 4 * n_programs + program, tl.sum(is_misfit.to(tl.float32), 0))

    tl.debug_barrier()  # the stores of all threads come before one of them says that they have been made
    if tl.atomic_add(n_finished, 1, sem="acq_rel") == n_programs - 1:
        contrastive = sum_of(partial_sums, 0, n_programs, BLOCK_M)
        distance_sum = sum_of(partial_sums, 1, n_programs, BLOCK_M)
        anchors = sum_of(partial_sums, 2, n_programs, BLOCK_M)
        labelled = sum_of(partial_sums, 3, n_programs, BLOCK_M)
        misfits = sum_of(partial_sums, 4, n_programs, BLOCK_M)
        tl.store(counts, anchors)
        tl.store(counts + 1, labelled)
        tl.device_assert(misfits == 0.0, "clop_kernels: labels holds a value below -1 or without a prototype")
        if scale == 0.0:
            tau = tl.load(temperature)
            tl.device_assert((tau > 0.0) & (tau < float("inf")), "clop_kernels: temperature is not a positive finite number")
        is_weight = (prototype_weight >= 0.0) & (prototype_weight < float("inf"))
        tl.device_assert(is_weight, "clop_kernels: prototype_weight is not a finite number of at least 0")
        if is_mean != 0:
            contrastive /= tl.maximum(anchors, 1.0)
            distance_sum /= tl.maximum(labelled, 1.0)
        if is_per_row == 0:
            tl.store(loss, contrastive + prototype_weight * distance_sum)
