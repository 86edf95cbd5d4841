"""Second and third forward launch: the softmax statistics of each row of S = zhat zhat^T log2(e) / tau, then the loss.

Tile picture. A program owns BLOCK_M rows and walks over columns, BLOCK_N at a time, near tiles first. S never leaves registers::

                  far   near  near   far     ragged (near)
    rows i  [ q ] | S |  | P | | P |  | S |   | P |        negative_i += sum_j 2^S_ij     over pairs that are not positives
                                                           positive_i, sum of S_ip        over positives, in near tiles only

If a whole row fits on chip (see tiles.py), the program's rows q stay there, and a column tile costs one load. Wider rows load
both operands in chunks of BLOCK_K of the width.

``n_splits`` programs share a block of rows, and each walks over its part of the columns. If there are few blocks of rows, all
processors get work this way, and tiles stay as tall as matrix units need. Each program stores its statistics, 16 bytes a row, and
loss_kernel adds them in the order of the splits.

Flops 2 N^2 D, exponentials N^2, and two float32 operations for each pair: scale and add. Bytes: each block of
rows loads zhat once from L2, N^2 D itemsize / BLOCK_M in all for any number of splits; that is BLOCK_M flops a
byte in bfloat16. Wide rows: see tiles.py.

With two sides, L + R = N: a program owns rows of one side and walks over the columns of the other, so no tile holds rows that are
not compared. The picture is the same, with the positive runs in place of the diagonal. 4 L R D flops, 2 L R exponentials and
2 L R D itemsize / BLOCK_M bytes; for L = R this is half of the above.

Unnormalised rows have unbounded similarities, and take the online maximum at any temperature.

Negatives only: positives are left out of the sums, as the diagonal is, and a row's term is the logarithm of its sum.

The separate pass over pairs (pair_softmax) stores the sums themselves. With two sides it computes only the left rows, with half
the programs, flops and bytes.

Positives are summed apart from the rest, because near-duplicate views need log(1 + negative / positive) to the
last digit. They are taken from these tiles and not from sums of zhat over a group, whose gradient cancels in
float32 (backends/tiled.py has the figures).
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
    """zhat_i . zhat_j for (M,) rows and BLOCK_N columns. Both are rows of zhat, counted from ``of_rows`` and ``of_columns``.

    For a far tile, ``columns`` is the first column; else it is all of them. q is the tile of the rows if a whole row fits on
    chip, and is unused otherwise.
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
    """S minus the new running maximum of each row, that maximum, and the sums so far, rescaled to it."""
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
    """The statistics of each row over one split's columns: the fields of contract.Softmax.

    Without ONLINE the shift stays zero. With ONLINE it is the running maximum.
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
        # This changes nothing, since shift is never below LEAST_SHIFT. But if both paths ended in the same way, the compiler
        # would merge their ends, and keep the column tiles of both paths in shared memory: at D = 128, 128 KB instead of 80.
        shift = tl.maximum(shift, LEAST_SHIFT)
    return shift, negative, positive, positive_logits


@triton.jit(
    do_not_specialize=["n_rows", "n_left", "views", "is_one_way", "negatives_only", "n_splits"],
    do_not_specialize_on_alignment=["groups", "temperature", "statistics"],
)
def softmax_kernel(
    zhat,  # (N, D), by position
    groups,  # from here to negatives_only: the fields of device.Pairs
    n_rows,
    n_left,
    views,
    is_one_way,
    negatives_only,
    temperature,  # this and the next two: the arguments of device.logit_scale
    scale,
    scale_rest,
    largest_unshifted,  # up to this scale no similarity needs a shift; 0 for unnormalised rows, which always take one
    statistics,  # (splits, 4, rows) float32, written: contract.Softmax over each split's columns, by position
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

    # Unused for wide rows; the compiler then removes the load.
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
    """lse_i - mean_p s_ip, or lse_i for n_i = 0. Cancellation loses no more digits than the rounding of the statistics has."""
    total = negative + positive
    # log2(total) = exponent + log2(mantissa), with the mantissa in [1/2, 1). The large parts are subtracted first.
    bits = total.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 126).to(tl.float32)
    mantissa = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    mean_positive = positive_logits / tl.maximum(n_positives, 1).to(tl.float32)
    term = ((shift - mean_positive) + exponent) * LN_2 + log1p(mantissa - 1.0)
    # Exponent and mantissa of a NaN or an infinity have no meaning.
    term = tl.where(total < float("inf"), term, total)
    is_dominated = (n_positives == 1) & (negative < positive)
    return tl.where(is_dominated, log1p(negative / tl.where(is_dominated, positive, 1.0)), term)


@triton.jit
def merged(statistics, rows, is_row, n_rows, n_splits):
    """The statistics of some rows over the columns of all splits, added in the order of the splits."""
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
    """The sum of all programs' partial sums, in a fixed order. They are read from L2, since other programs have written them."""
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
    statistics,  # (splits, 4, N) float32, from softmax_kernel
    distances,  # (N,), by position
    labels,  # (B,) int64
    groups,  # from here to negatives_only: the fields of device.Pairs
    n_rows,
    n_left,
    views,
    negatives_only,
    temperature,  # checked if ``scale`` is 0; see device.logit_scale
    scale,
    weight,  # this and the next one: the arguments of device.known_weight
    prototype_weight,
    shift_out,  # (N,), by position, written; so are the next two
    inverse_total_out,  # 0 for a row that is no anchor, which makes its part of every gradient zero
    negative_out,
    loss,  # written: () float32; with is_per_row (N,), in the order of rows
    counts,  # (2,) float32, written: the numbers of anchors and of labelled rows
    partial_sums,  # (5, programs), written: contrastive terms, distances, anchors, labelled rows, labels out of range
    n_finished,  # () int32, 0 at the start: the number of programs that have finished
    n_instances,
    n_classes,  # labels below n_classes are in range; 0: no prototypes, and all labels are in range
    n_splits,
    is_labelled,
    is_mean,
    is_per_row,
    BLOCK_M: tl.constexpr,
):
    """Third launch: merges the statistics of all splits, stores the residuals, and computes each row's term and the loss.

    The last program to finish adds the partial sums of all programs in a fixed order: the same bits from run to run.
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
    # Negatives only: a row with negatives is an anchor. The test is total != 0, not total > 0, so that a NaN reaches the loss.
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

    tl.debug_barrier()  # all threads must have stored their partial sums before one thread announces them
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
