"""The gradient of trained prototypes: a segment sum over the rows of each class.

Tile picture: the rows of class k are divided into n_splits parts, and program (k, s) adds the rows of part s,
BLOCK_M whole rows at a time. PyTorch then adds the parts. The order is always the same and there are no atomics,
so the bits are the same from run to run.
Bytes: each labelled row of zhat once, and n_splits K D partial sums. Flops: O(N D).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import known_weight, load_rows
from .finish import distance_gradient


@triton.jit(
    do_not_specialize=["n_rows", "n_classes", "n_splits", "is_weighted", "distance", "is_mean"],
    do_not_specialize_on_alignment=["by_class", "bounds", "row_weights", "prototypes", "upstream", "weight"],
)
def prototype_kernel(
    zhat,  # (N, D), by position
    by_class,  # (N,) int64: positions, sorted by label
    bounds,  # (K + 1,) int64: class k is by_class[bounds[k]:bounds[k + 1]]
    row_weights,  # (N,) float32, read if is_weighted; else all weights are 1
    prototypes,  # (K, D) float32
    upstream,  # as in finish_kernel; so is the next one
    counts,
    weight,  # device.known_weight
    prototype_weight,
    partial_gradients,  # (n_splits, K, D) float32, written
    n_rows,
    n_classes,
    n_splits,
    is_weighted,
    distance,  # index into contract.DISTANCES
    is_mean,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    width = tl.arange(0, BLOCK_D)
    in_width = width < WIDTH
    begin = tl.load(bounds + k)
    finish = tl.load(bounds + k + 1)
    share = tl.cdiv(finish - begin, n_splits)
    begin += split * share
    finish = tl.minimum(begin + share, finish)
    target = tl.load(prototypes + k * WIDTH + width, mask=in_width, other=0.0)[None, :]
    pull = tl.load(upstream) * known_weight(weight, prototype_weight)
    if is_mean != 0:
        pull /= tl.maximum(tl.load(counts + 1), 1.0)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(begin, finish, BLOCK_M):
        place = first + tl.arange(0, BLOCK_M)
        is_row = place < finish
        rows = tl.load(by_class + place, mask=is_row, other=n_rows)
        unit = load_rows(zhat, rows, n_rows, width, PITCH, WIDTH, BLOCK_D).to(tl.float32)
        # The cosine distance has the derivative -zhat with respect to c. The other distances depend on zhat - c.
        direction = unit
        if distance != 0:
            direction = distance_gradient(unit, target, distance)
        w = tl.load(row_weights + rows, mask=place < finish * is_weighted, other=1.0)
        sums -= tl.sum(direction * tl.where(is_row, w, 0.0)[:, None], 0)
    pointers = partial_gradients + (split * n_classes + k) * WIDTH + width
    tl.store(pointers, sums * pull, mask=in_width)
