"""Last launch of the backward pass: turns the pairwise sums into the gradient of the raw embeddings.

For each row it adds the contrastive part, 1/tau sum_j M_ij zhat_j, and the pull of the prototype, applies the derivative of the
normalisation, and stores the result once, in the dtype of the input, at the row's place in the user's tensor::

    dz_i = (g_i - (zhat_i . g_i) zhat_i) / |z_i|,    g_i = dL_contrastive/dzhat_i + w_i lambda dd(zhat_i, c)/dzhat_i

Unnormalised rows have dz_i = g_i.

The gradient of the temperature needs the same dot products. S is linear in 1/tau and in each of its two rows, so
dL/dtau = -1/(2 tau) sum_i zhat_i . dL_contrastive/dzhat_i. Each program stores a partial sum. The last program to finish adds all
of them, in a fixed order. This needs no further launch, and gives the same bits from run to run.

Tile picture: a program takes BLOCK_M whole rows. Bytes: 4 N D of sums for each split, N D of zhat in, N D out. Flops: O(N D).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..contract import EPS as _EPS
from .device import LN_2, from_position, known_weight, load_rows, logit_scale, row_of
from .prologue import load_targets
from .softmax import sum_of

EPS = tl.constexpr(_EPS)
LARGEST_FLOAT16 = tl.constexpr(65504.0)


@triton.jit
def distance_gradient(unit, target, distance):
    """d distance / d zhat, (M, BLOCK_D) float32; zero for a row that lies on its prototype."""
    offset = unit - target
    if distance == 0:
        offset = -target + tl.zeros_like(unit)
    elif distance == 1:
        length = tl.sqrt_rn(tl.sum(offset * offset, 1))
        offset = offset / tl.where(length == 0.0, 1.0, length)[:, None]
    else:
        offset = tl.where(offset > 0, 1.0, tl.where(offset < 0, -1.0, offset))
    return offset


@triton.jit(
    do_not_specialize=[
        "n_rows", "n_instances", "n_classes", "views", "n_splits", "is_weighted", "normalize", "distance", "is_mean",
    ],
    do_not_specialize_on_alignment=["row_weights", "groups", "labels", "prototypes", "upstream", "temperature", "weight"],
)  # fmt: skip
def finish_kernel(
    sums,  # (splits, N, D) float32, by position: sum_j M_ij zhat_j times M_SCALE, over the columns of each split
    zhat,  # (N, D), by position
    norms,  # (N,), by position
    row_weights,  # (N,) float32, by position: w_i, read if is_weighted; else all weights are 1
    groups,  # (3, N) int32, read if ``views`` is 0
    labels,  # (B,) int64
    prototypes,  # (K, D) float32 contiguous; empty if n_classes is 0
    upstream,  # () float32: the unit of w_i
    counts,  # (2,) float32: the numbers of anchors and of labelled rows
    temperature,  # this and the next two: the arguments of device.logit_scale
    scale,
    scale_rest,
    weight,  # this and the next one: the arguments of device.known_weight
    prototype_weight,
    grad_embeddings,  # (N, D) contiguous, by row, written
    temperature_sums,  # (programs,) float32, written: each program's part of dL/dtau
    grad_temperature,  # () float32, written: dL/dtau
    n_finished,  # () int32, 0 at the start: the number of programs that have finished
    n_rows,
    n_instances,
    n_classes,
    views,  # as in device.Pairs
    n_splits,  # 0: there are no pairs
    is_weighted,
    normalize,
    distance,  # index into contract.DISTANCES
    is_mean,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    M_SCALE: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < n_rows
    row = row_of(rows, groups, n_instances, views, is_row)
    width = tl.arange(0, BLOCK_D)
    scale = logit_scale(temperature, scale, scale_rest)
    inverse_temperature = (scale.value + scale.rest) * LN_2

    of_contrastive = tl.load(upstream) * inverse_temperature * (1.0 / M_SCALE)
    of_prototypes = tl.load(upstream) * known_weight(weight, prototype_weight)
    if is_mean != 0:
        of_contrastive /= tl.maximum(tl.load(counts), 1.0)
        of_prototypes /= tl.maximum(tl.load(counts + 1), 1.0)
    unit = load_rows(zhat, rows, n_rows, width, PITCH, WIDTH, BLOCK_D).to(tl.float32)
    gradient = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for split in range(0, n_splits):
        gradient += load_rows(from_position(sums, split * n_rows.to(tl.int64), WIDTH), rows, n_rows, width, WIDTH, WIDTH, BLOCK_D)
    gradient *= of_contrastive
    dots = tl.sum(gradient * unit, 1)
    tl.store(temperature_sums + tl.program_id(0), tl.sum(tl.where(is_row, dots, 0.0), 0) * (-0.5 * inverse_temperature))
    if n_classes > 0:
        label = tl.load(labels + row % n_instances, mask=is_row, other=-1)
        target = load_targets(prototypes, label, width, n_classes, WIDTH)
        w = tl.load(row_weights + rows, mask=rows < n_rows * is_weighted, other=1.0)
        pull = tl.where(label >= 0, of_prototypes * w, 0.0)
        gradient += distance_gradient(unit, target, distance) * pull[:, None]

    if normalize != 0:
        # zhat = z / max(|z|, EPS). Dividing by the norm removes the radial part of the gradient; dividing by EPS does not.
        norm = tl.load(norms + rows, mask=is_row, other=1.0)
        radial = tl.where(norm < EPS, 0.0, tl.sum(gradient * unit, 1))
        gradient = (gradient - radial[:, None] * unit) / tl.maximum(norm, EPS)[:, None]
        if grad_embeddings.dtype.element_ty == tl.float16:
            # 1 / EPS is beyond float16. A row of zeros gets the largest finite gradient, because with an infinity a gradient
            # scaler would skip every step. Any other row keeps an infinite gradient, which the gradient scaler must see.
            bounded = tl.minimum(tl.maximum(gradient, -LARGEST_FLOAT16), LARGEST_FLOAT16)
            gradient = tl.where((norm < EPS)[:, None] & (gradient == gradient), bounded, gradient)
    pointers = grad_embeddings + row.to(tl.int64)[:, None] * WIDTH + width[None, :]
    tl.store(pointers, gradient.to(grad_embeddings.dtype.element_ty), mask=is_row[:, None] & (width[None, :] < WIDTH))

    tl.debug_barrier()  # for the same reason as in loss_kernel
    if tl.atomic_add(n_finished, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(grad_temperature, sum_of(temperature_sums, 0, tl.num_programs(0), 256))
