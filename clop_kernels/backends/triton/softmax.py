"""Second launch: the softmax statistics of every row of S = zhat zhat^T log2(e) / tau, and its term of the loss.

Tile picture. A program owns BLOCK_M rows and walks over all columns, BLOCK_N at a time; nothing of S leaves registers::

                  far   near  near   far     ragged (near)
    rows i  [ q ] | S |  | P | | P |  | S |   | S |        negative_i += sum_j 2^S_ij     over pairs that are not positives
                                                           positive_i, sum of S_ip        over positives, in near tiles only

Where a whole row fits (see tiles.py), its tile q stays on chip and a column tile costs one load; beyond, both operands pass
by in chunks of BLOCK_K of the width.

Flops 2 N^2 D, exponentials N^2, and per pair two float32 operations: scale and add. Bytes: zhat once a program from L2,
N^2 D itemsize / BLOCK_M in all; BLOCK_M flops a byte in bfloat16. Wide rows: see tiles.py.

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
    far_columns,
    fits_unshifted,
    from_position,
    group_of,
    is_pair,
    is_positive,
    load_rows,
    log1p,
    logit_scale,
    n_positives_of,
    near_columns,
    own_rows,
    row_of,
    scaled,
    span_of,
)


@triton.jit
def similarities(
    q,
    of_rows,
    of_columns,
    rows,
    columns,
    row_end,
    column_end,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALL_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """zhat_i . zhat_j for rows (M,) of one matrix and columns (N,), which are rows of another.

    q is the rows' tile where a whole row fits, and unused where not.
    """
    products = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    if BLOCK_K >= WIDTH:
        k = load_rows(of_columns, columns, column_end, tl.arange(0, BLOCK_K), PITCH, WIDTH, BLOCK_K, ALL_COLUMNS)
        products = tl.dot(q, tl.trans(k), products, input_precision=PRECISION)
    else:
        for first in range(0, WIDTH, BLOCK_K):
            chunk = first + tl.arange(0, BLOCK_K)
            a = load_rows(of_rows, rows, row_end, chunk, PITCH, WIDTH, BLOCK_K, False)
            b = load_rows(of_columns, columns, column_end, chunk, PITCH, WIDTH, BLOCK_K, ALL_COLUMNS)
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
    start,
    end,
    span,
    scale,
    scale_rest,
    n_left,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONLINE: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT_SCALE: tl.constexpr,
):
    """Of each row: shift, sums of 2^(S_ij - shift) over negatives and positives, and the sum of the positives' S_ip.

    Without ONLINE the shift is zero and stays so, else it is the running maximum.
    """
    zero = tl.zeros_like(rows).to(tl.float32)
    shift = zero + LEAST_SHIFT if ONLINE else zero
    negative, positive, positive_logits = zero, zero, zero
    of_columns, n_columns = from_position(zhat, span.column_base, PITCH), span.column_end - span.column_base
    of_rows, local_rows, n_own = own_rows(zhat, rows, span, n_left, PITCH)
    for index in range(0, span.n_near):
        local = near_columns(index, span, BLOCK_N)
        s = similarities(q, of_rows, of_columns, local_rows, local, n_own, n_columns, WIDTH, PITCH, BLOCK_K, False, PRECISION)
        columns = span.column_base + local
        s = scaled(s, scale, scale_rest, EXACT_SCALE)
        among_positives = is_positive(rows, columns, start, end, n_left)
        compared = is_pair(rows, columns, start, end, span.column_end, n_left, PAIRS)
        if PAIRS != "negatives":
            positive_logits += tl.sum(tl.where(among_positives, s, 0.0), 1)
        s = tl.where(compared, s, NO_LOGIT)
        if ONLINE:
            s, shift, negative, positive = shifted(s, shift, negative, positive)
        powers = tl.exp2(s)
        if PAIRS == "negatives":
            negative += tl.sum(powers, 1)
        else:
            positive += tl.sum(tl.where(among_positives, powers, 0.0), 1)
            negative += tl.sum(tl.where(among_positives, 0.0, powers), 1)
    for index in range(0, span.n_far):
        local = far_columns(index, span, BLOCK_N)
        s = similarities(q, of_rows, of_columns, local_rows, local, n_own, n_columns, WIDTH, PITCH, BLOCK_K, True, PRECISION)
        s = scaled(s, scale, scale_rest, EXACT_SCALE)
        if ONLINE:
            s, shift, negative, positive = shifted(s, shift, negative, positive)
        negative += tl.sum(tl.exp2(s), 1)
    return shift, negative, positive, positive_logits


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


@triton.jit(do_not_specialize=["n_rows", "n_left", "n_instances", "n_classes"])
def softmax_kernel(
    zhat,  # (N, D), by position
    distances,  # (N,), by position
    labels,  # (B,) int64, or None
    groups,  # (3, N) int32, or None
    temperature,  # () float32, or None
    scale,
    scale_rest,
    prototype_weight,
    shift_out,  # (N,), by position
    total_out,  # (N,), by position; infinite for a row that is no anchor, whose share of every gradient is then zero
    negative_out,  # (N,), by position
    terms,  # (N,), by row: the row's loss, if PER_ROW
    partial_sums,  # (5, programs): of the contrastive terms, distances, anchors, labelled rows, labels out of range
    statistics,  # (4, rows), contract.Softmax by position, written in place of all of these; or None
    n_rows,
    n_left,  # or None: no sides
    n_instances,
    n_classes,  # labels below it are in range; 0: no prototypes, all are
    VIEWS: tl.constexpr,
    PAIRS: tl.constexpr,
    SOFTMAX: tl.constexpr,  # "unshifted", "online", or "device": the kernel reads the temperature and chooses
    PER_ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT_SCALE: tl.constexpr,
):
    program = tl.program_id(0)
    span = span_of(program, groups, n_rows, n_left, VIEWS, PAIRS, BLOCK_M, BLOCK_N)
    rows = span.first + tl.arange(0, BLOCK_M)
    is_row = rows < span.row_end
    start, end = group_of(rows, groups, n_rows, n_left, VIEWS, is_row)
    scale, scale_rest = logit_scale(temperature, scale, scale_rest)

    # Unused, and so left out, if wide.
    q = load_rows(zhat, rows, span.row_end, tl.arange(0, BLOCK_K), PITCH, WIDTH, BLOCK_K, False)
    if SOFTMAX == "device":
        if fits_unshifted(scale):
            shift, negative, positive, positive_logits = row_sums(
                q, zhat, rows, start, end, span, scale, scale_rest, n_left,
                PAIRS, WIDTH, PITCH, BLOCK_N, BLOCK_K, False, PRECISION, EXACT_SCALE,
            )  # fmt: skip
        else:
            shift, negative, positive, positive_logits = row_sums(
                q, zhat, rows, start, end, span, scale, scale_rest, n_left,
                PAIRS, WIDTH, PITCH, BLOCK_N, BLOCK_K, True, PRECISION, EXACT_SCALE,
            )  # fmt: skip
    else:
        shift, negative, positive, positive_logits = row_sums(
            q, zhat, rows, start, end, span, scale, scale_rest, n_left,
            PAIRS, WIDTH, PITCH, BLOCK_N, BLOCK_K, SOFTMAX == "online", PRECISION, EXACT_SCALE,
        )  # fmt: skip

    if statistics is not None:
        tl.store(statistics + rows, shift, mask=is_row)
        tl.store(statistics + span.row_end + rows, negative, mask=is_row)
        tl.store(statistics + 2 * span.row_end + rows, positive, mask=is_row)
        tl.store(statistics + 3 * span.row_end + rows, positive_logits, mask=is_row)
    else:
        n_positives = n_positives_of(start, end, n_left)
        total = negative + positive
        is_anchor = n_positives > 0
        if PAIRS == "negatives":
            n_positives = tl.zeros_like(start)
            is_anchor = total != 0.0  # and not > 0, so that a NaN among its negatives shows in its term
        tl.store(shift_out + rows, shift, mask=is_row)
        tl.store(total_out + rows, tl.where(is_anchor, total, float("inf")), mask=is_row)
        tl.store(negative_out + rows, negative, mask=is_row)

        is_anchor = is_row & is_anchor
        term = tl.where(is_anchor, contrastive_term(shift, negative, positive, positive_logits, n_positives), 0.0)
        distance = tl.load(distances + rows, mask=is_row, other=0.0)
        row = row_of(rows, groups, n_instances, VIEWS, is_row)
        is_labelled = rows < 0
        is_misfit = rows < 0
        if labels is not None:
            label = tl.load(labels + row % n_instances, mask=is_row, other=-1)
            is_labelled = label >= 0
            is_misfit = (label < -1) | ((n_classes > 0) & (label >= n_classes))
        if PER_ROW:
            tl.store(terms + row, term + prototype_weight * distance, mask=is_row)
        n_programs = tl.num_programs(0)
        tl.store(partial_sums + program, tl.sum(term, 0))
        tl.store(partial_sums + n_programs + program, tl.sum(distance, 0))
        tl.store(partial_sums + 2 * n_programs + program, tl.sum(is_anchor.to(tl.float32), 0))
        tl.store(partial_sums + 3 * n_programs + program, tl.sum(is_labelled.to(tl.float32), 0))
        tl.store(partial_sums + 4 * n_programs + program, tl.sum(is_misfit.to(tl.float32), 0))


@triton.jit(do_not_specialize=["n_partial"])
def loss_kernel(
    partial_sums,  # (5, n_partial), as softmax_kernel leaves them
    temperature,  # () float32, or None
    loss,  # () float32, written unless PER_ROW
    counts,  # (2,) float32: anchors, labelled rows
    prototype_weight,
    n_partial,
    MEAN: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Third launch, one program: the partial sums, always in the same order, to the loss. Asserts that the input is valid."""
    lane = tl.arange(0, BLOCK)
    contrastive = tl.zeros((BLOCK,), tl.float32)
    distance = contrastive
    n_anchors = contrastive
    n_labelled = contrastive
    n_misfits = contrastive
    for first in range(0, n_partial, BLOCK):
        index = first + lane
        mask = index < n_partial
        contrastive += tl.load(partial_sums + index, mask=mask, other=0.0)
        distance += tl.load(partial_sums + n_partial + index, mask=mask, other=0.0)
        n_anchors += tl.load(partial_sums + 2 * n_partial + index, mask=mask, other=0.0)
        n_labelled += tl.load(partial_sums + 3 * n_partial + index, mask=mask, other=0.0)
        n_misfits += tl.load(partial_sums + 4 * n_partial + index, mask=mask, other=0.0)
    anchors = tl.sum(n_anchors, 0)
    labelled = tl.sum(n_labelled, 0)
    tl.store(counts, anchors)
    tl.store(counts + 1, labelled)
    tl.device_assert(tl.sum(n_misfits, 0) == 0.0, "clop_kernels: labels holds a value below -1 or without a prototype")
    if temperature is not None:
        tau = tl.load(temperature)
        tl.device_assert((tau > 0.0) & (tau < float("inf")), "clop_kernels: temperature is not a positive finite number")
    if not PER_ROW:
        contrastive_sum = tl.sum(contrastive, 0)
        distance_sum = tl.sum(distance, 0)
        if MEAN:
            contrastive_sum /= tl.maximum(anchors, 1.0)
            distance_sum /= tl.maximum(labelled, 1.0)
        tl.store(loss, contrastive_sum + prototype_weight * distance_sum)
