"""The loss in plain PyTorch, one tile of the similarity matrix at a time: any device, any floating dtype, nothing compiled.

Tile picture. The N x N matrix of similarities is symmetric, so only the tiles on and above its diagonal are visited, once in the
forward pass and once in the backward pass. A tile serves its rows and, transposed, its columns::

            j: 0    1    2    3
    i: 0     [ P    x    x    x ]    S_ij = zhat_i . zhat_j * log2(e) / tau           (T x T, one buffer)
       1     [      P    x    x ]    forward:   sums of 2^S over its rows and over its columns
       2     [           P    x ]    backward:  S becomes M (below);  grad_i += M zhat_j,  grad_j += M^T zhat_i
       3     [                P ]    P: tiles that hold positives, because rows are sorted by group

Flops: forward N^2 D, backward 3 N^2 D, and N^2 exponentials in all. Bytes: a tile of T^2 numbers is written and read about five
times forward and ten times backward, in cache. A block of T rows of zhat (backward also of grad) is loaded once for each tile, so
main memory sees at most N^2 D / T numbers. Extra memory: a few tiles (1.3 MB each at T = 576) and a handful of (N, D) arrays.
Nothing grows with N^2, or with N times the number of tiles.

With two sides, the loop visits the tiles of left rows and right columns, each once. A tile serves both directions in the same
way. For L rows against R rows this is 2 L R D flops forward and 6 L R D backward.

No shift, and one exponential for each pair. The logits are bounded, |s_ij| <= max |zhat|^2 / tau. Unless the temperature is tiny,
or unnormalised rows are long, exp(s_ij) neither overflows nor underflows. Its plain sum is then as accurate as a shifted sum, and
needs no pass for a maximum. Let w_i be the upstream gradient of row i's term, n_i the number of its positives, q_i = w_i / n_i,
and a_i = w_i / sum_j exp s_ij::

    dL/dzhat_i = 1/tau sum_{j != i} M_ij zhat_j,    M_ij = exp(s_ij) (a_i + a_j) - [j in P(i)] (q_i + q_j)

If `fits_unshifted` returns False, online maxima and two exponentials for each pair are used instead. It also returns False if the
temperature is a tensor on a GPU, which the host must not read. Under torch.compile every temperature on a GPU is such a tensor.

Positives are subtracted inside the tiles. Group sums of zhat would need no mask, but are less accurate: a well-trained positive
has exp(s_ij) a_i close to q_i, and only a subtraction before the product with zhat keeps the small difference. With
near-duplicate views in float32, the gradient from group sums is 10 to 100 times less accurate at the same speed (at N = 80,
D = 64, tau = 0.1: relative error 7e-5 instead of 1e-6; plain PyTorch has 1e-6). If a row has one positive, the difference is
known without a subtraction: exp(s_ij) a_i - q_i = -w_i negative_i / total_i. Its loss is log(1 + negative_i / exp s_ip). Both
keep their relative accuracy down to the smallest float.

Products are float32 (float64 for float64 input) on operands rounded to the compute dtype. They are as accurate as a matrix unit
that accumulates in float32, but not as fast. On a GPU this backend is the fallback.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..groups import Groups
from . import rowwise
from .contract import LARGEST_UNSHIFTED_LOGIT, LOG2_E, Gradients, LossOptions, Needs, Residuals, Softmax, as_unit_rows

CHECKS_VALUES = False

_tile_rows: int | None = None


def set_tile_rows(rows: int | None) -> None:
    """Sets the side of a tile, in rows, for the backends "tiled" and "cpu" of this process.

    A smaller tile needs less memory. The results change by rounding only. The environment variable CLOP_TILE_ROWS sets the
    initial value.

    Args:
        rows: the side of a tile, an int of at least 1. None restores the built-in choice.

    Raises:
        ValueError: if ``rows`` is not an int of at least 1, or None.
    """
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        raise ValueError(f"rows={rows!r}: expected an int of at least 1, or None for the built-in choice")
    global _tile_rows
    _tile_rows = rows


def chosen_tile_rows() -> int | None:
    """The value from :func:`set_tile_rows` or the environment; None for the built-in choice."""
    return _tile_rows


def _rows_of_environment() -> int | None:
    text = os.environ.get("CLOP_TILE_ROWS", "")
    if text and not (text.isdecimal() and int(text) > 0):
        raise ValueError(f"CLOP_TILE_ROWS={text!r} in the environment: expected an integer of at least 1, or nothing")
    return int(text) if text else None


set_tile_rows(_rows_of_environment())


def tile_rows(n_rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """The side T of a tile: large enough for a matrix product at full rate, small enough to stay in cache.

    It does not depend on the width: from D = 128 to 4096 no smaller side was faster (128, 256 and 384 against 576, measured with
    AVX2 on two cores).
    """
    if _tile_rows is not None:
        rows = _tile_rows
    elif device.type == "cpu":
        rows = 576 if dtype != torch.float64 else 384
    else:
        rows = 4096  # on a GPU the launches dominate; two tiles take 128 MB
    return max(1, min(rows, n_rows))


def fits_unshifted(norms: Tensor, options: LossOptions) -> bool:
    """Whether exp(s) needs no shift, because |s| <= max |zhat|^2 / tau is small. False if only a GPU knows the bound."""
    needs_reading = not options.normalize or isinstance(options.temperature, Tensor)
    if needs_reading and norms.device.type != "cpu":
        return False
    largest_norm = 1.0 if options.normalize or len(norms) == 0 else float(norms.max())
    return largest_norm**2 / float(options.temperature) <= LARGEST_UNSHIFTED_LOGIT[options.accumulate_dtype]


def forward(
    embeddings: Tensor, labels: Tensor | None, prototypes: Tensor | None, options: LossOptions
) -> tuple[Tensor, Residuals]:
    """(N, D) embeddings, (B,) int64 labels, (K, D) prototypes -> the loss and the residuals."""
    groups = rowwise.groups_of(embeddings.shape[0], labels, options, embeddings.device)
    rounded, norms = rowwise.normalized_rows(embeddings, groups.order, options)
    zhat = rounded.to(options.accumulate_dtype)

    softmax = _softmax(zhat, groups, options, fits_unshifted(norms, options))
    is_anchor = softmax.total != 0 if options.negatives_only else groups.n_positives > 0
    contrastive = rowwise.contrastive_terms(softmax, groups.n_positives, is_anchor, zhat)
    pull = rowwise.Pull.of(labels, prototypes, groups.order, options)
    prototype = torch.zeros_like(contrastive) if pull is None else pull.distances(zhat)
    counts = contrastive.new_zeros(2)
    counts[0] = is_anchor.sum()
    if pull is not None:
        counts[1] = pull.is_labelled.sum()

    if options.reduction == "mean":
        divisors = counts.clamp(min=1)
        loss = contrastive.sum() / divisors[0] + options.prototype_weight * (prototype.sum() / divisors[1])
    else:
        per_row = contrastive + options.prototype_weight * prototype
        loss = per_row.sum() if options.reduction == "sum" else torch.empty_like(per_row).index_copy_(0, groups.order, per_row)
    table = groups.table() if groups.size is None else groups.order.new_empty((3, 0), dtype=torch.int32)
    inverse_total = rowwise.inverse_totals(softmax, is_anchor)
    return loss, Residuals(as_unit_rows(rounded), norms, softmax.shift, inverse_total, softmax.negative, table, counts)


def backward(
    grad_loss: Tensor,
    embeddings: Tensor,
    residuals: Residuals,
    labels: Tensor | None,
    prototypes: Tensor | None,
    options: LossOptions,
    needs: Needs,
) -> Gradients:
    """The upstream gradient, () or (N,) -> the gradients of the raw embeddings, the temperature and the prototypes."""
    zhat = residuals.zhat.to(options.accumulate_dtype)
    if options.positives == "label":
        groups = Groups.of_table(residuals.groups, options.n_left)
    else:
        groups = rowwise.groups_of(zhat.shape[0], None, options, zhat.device)
    grad_loss = grad_loss.to(zhat.dtype)
    if options.reduction == "none":
        grad_loss = grad_loss.index_select(0, groups.order)
    shares = grad_loss / residuals.counts.clamp(min=1) if options.reduction == "mean" else (grad_loss, grad_loss)
    is_anchor = residuals.inverse_total != 0 if options.negatives_only else groups.n_positives > 0
    weights = torch.where(is_anchor, shares[0], 0.0)  # w_i
    softmax = residuals.inverse_total, residuals.negative, residuals.shift
    coefficients = rowwise.coefficients(weights, groups.n_positives, *softmax)

    # This is the gradient of zhat. finish() turns it into the gradient of the raw rows, in place.
    grad = _gradient(zhat, groups, coefficients, options, fits_unshifted(residuals.norms, options)).div_(options.temperature)
    return rowwise.finish(
        grad, zhat, residuals.norms, labels, prototypes, shares[1], groups.order, options, needs, embeddings.dtype
    )


def pair_softmax(zhat: Tensor, groups: Tensor, n_left: int | None, options: LossOptions) -> Softmax:
    """See :mod:`clop_kernels.backends.contract`."""
    precise, runs, unshifted = _pairs_of(zhat, groups, n_left, options)
    softmax = _softmax(precise, runs, options, unshifted, one_way=True)
    return softmax if n_left is None else Softmax(*(x[:n_left] for x in softmax))


def pair_gradient(zhat: Tensor, groups: Tensor, n_left: int | None, coefficients: Tensor, options: LossOptions) -> Tensor:
    """See :mod:`clop_kernels.backends.contract`."""
    precise, runs, unshifted = _pairs_of(zhat, groups, n_left, options)
    return _gradient(precise, runs, coefficients, options, unshifted, one_way=True)


# ---- pairs: O(N^2 D) ------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """One tile of S, and a scratch buffer of its shape. The caller may overwrite both; the next tile does.

    ``positives`` is the (rows, columns) mask of positive pairs, or None if the tile holds no positives.
    """

    rows: slice
    columns: slice
    logits: Tensor
    scratch: Tensor
    positives: Tensor | None

    @property
    def on_diagonal(self) -> bool:
        return self.rows == self.columns


def _tiles(zhat: Tensor, groups: Groups, options: LossOptions, unshifted: bool) -> Iterator[_Tile]:
    """The tiles on and above the diagonal of S = zhat zhat^T log2(e) / tau, one row of tiles after the other.

    With two sides, these are the tiles of left rows and right columns. With ``options.negatives_only``, positives have S = -inf
    and are not marked.

    If ``unshifted``, S is small, and the rows are scaled before the product. Otherwise the products are scaled: scaled rows would
    round S_ij and S_ji differently, by an ulp of S, and for S in the thousands that error is visible in exp(s).
    """
    n_rows = zhat.shape[0]
    if n_rows == 0 or not options.has_pairs:
        return
    n_left, temperature = groups.n_left, options.temperature
    side = tile_rows(n_rows, zhat.dtype, zhat.device)
    # In float32 the rounding of the factor would shift every S_ij in the same direction, as a different temperature would. In
    # float64 the errors of the elements are independent. Apple's GPUs have no float64.
    wide = torch.float64 if zhat.device.type != "mps" else zhat.dtype
    scale = LOG2_E / (temperature.to(wide) if isinstance(temperature, Tensor) else temperature)
    rounded = torch.as_tensor(scale, dtype=wide).to(zhat.dtype)
    rest = (scale - rounded.to(wide)).to(zhat.dtype)
    logits_buffer = zhat.new_empty(side * side)
    scratch_buffer = torch.empty_like(logits_buffer)
    position = torch.arange(n_rows, device=zhat.device)
    for i in range(0, n_rows if n_left is None else n_left, side):
        rows = slice(i, min(i + side, n_rows if n_left is None else n_left))
        height = rows.stop - rows.start
        scaled = torch.mul(zhat[rows].to(wide), scale).to(zhat.dtype) if unshifted else zhat[rows]
        for j in range(i if n_left is None else n_left, n_rows, side):
            columns = slice(j, min(j + side, n_rows))
            shape = (height, columns.stop - columns.start)
            logits, scratch = (buffer[: shape[0] * shape[1]].view(shape) for buffer in (logits_buffer, scratch_buffer))
            torch.mm(scaled, zhat[columns].T, out=logits)
            if not unshifted:
                torch.mul(logits, rest, out=scratch)
                logits.mul_(rounded).add_(scratch)
                if i == j:  # a library's product of a matrix with itself may not be exactly symmetric
                    torch.triu(logits, 1, out=scratch)
                    logits.triu_().add_(scratch.T)
            positives = None
            if _may_hold_positives(groups, rows, columns):
                positives = (groups.starts[rows, None] <= position[columns]) & (position[columns] < groups.ends[rows, None])
                if i == j:
                    positives.fill_diagonal_(False)
                if options.negatives_only:
                    logits.masked_fill_(positives, -math.inf)
                    positives = None
            yield _Tile(rows, columns, logits, scratch, positives)


def _may_hold_positives(groups: Groups, rows: slice, columns: slice) -> bool:
    """Whether a positive run reaches from the rows to the columns. True if only a GPU knows."""
    if rows == columns:
        return groups.size != 1
    if groups.size is not None and groups.n_left is not None:
        return rows.start + groups.n_left < columns.stop and columns.start < rows.stop + groups.n_left
    if groups.size is not None:
        return (rows.stop - 1) // groups.size == columns.start // groups.size
    if groups.starts.device.type != "cpu":
        return True
    return bool(groups.ends[rows.stop - 1] > columns.start and groups.starts[rows.start] < columns.stop)


def _pairs_of(zhat: Tensor, groups: Tensor, n_left: int | None, options: LossOptions) -> tuple[Tensor, Groups, bool]:
    """The rows in the accumulate dtype, their positive runs, and whether no shift is needed.

    Unnormalised rows always take a shift here, since no norms bound their logits.
    """
    unshifted = options.normalize and fits_unshifted(zhat.new_empty(0, dtype=options.accumulate_dtype), options)
    return zhat.to(options.accumulate_dtype), Groups.of_table(groups, n_left), unshifted


def _softmax(zhat: Tensor, groups: Groups, options: LossOptions, unshifted: bool, one_way: bool = False) -> Softmax:
    """The forward pass over pairs: (N, D) -> four (N,). With ``one_way``, right rows get no sums."""
    negative, positive, positive_logits = (zhat.new_zeros(zhat.shape[0]) for _ in range(3))
    # Unshifted, it stays zero. Otherwise it is a running maximum. It starts finite, so that no infinities are subtracted.
    shift = torch.zeros_like(negative) if unshifted else torch.full_like(negative, torch.finfo(zhat.dtype).min / 2)
    for tile in _tiles(zhat, groups, options, unshifted):
        is_for_rows = tile.on_diagonal or (one_way and groups.n_left is not None)
        directions = ((1, tile.rows),) if is_for_rows else ((1, tile.rows), (0, tile.columns))
        if tile.positives is not None:
            picked = torch.where(tile.positives, tile.logits, 0.0)
            for dim, owners in directions:
                positive_logits[owners].add_(picked.sum(dim))
        if tile.on_diagonal:
            tile.logits.fill_diagonal_(-math.inf)
        if unshifted:
            tile.logits.exp2_()
        for dim, owners in directions:
            if unshifted:
                powers = tile.logits
            else:
                larger = torch.maximum(shift[owners], tile.logits.amax(dim))
                powers = torch.sub(tile.logits, larger.unsqueeze(dim), out=tile.scratch).exp2_()
                rescale = torch.exp2(shift[owners] - larger)
                negative[owners].mul_(rescale)
                positive[owners].mul_(rescale)
                shift[owners] = larger
            if tile.positives is not None:
                positive[owners].add_(torch.where(tile.positives, powers, 0.0).sum(dim))
                powers = torch.where(tile.positives, 0.0, powers)
            negative[owners].add_(powers.sum(dim))
    return Softmax(shift, negative, positive, positive_logits)


def _gradient(
    zhat: Tensor, groups: Groups, coefficients: Tensor, options: LossOptions, unshifted: bool, one_way: bool = False
) -> Tensor:
    """The backward pass over pairs: sum_{j != i} M_ij zhat_j, (N, D); with ``one_way`` for the left rows only, (n_left, D)."""
    a, b, c, shift = coefficients
    one_way = one_way and groups.n_left is not None
    grad = zhat.new_zeros(groups.n_left if one_way and groups.n_left is not None else zhat.shape[0], zhat.shape[1])
    for rows, columns, m, scratch, positives in _tiles(zhat, groups, options, unshifted):
        of_positives = None
        if unshifted:
            m.exp2_()
            if positives is not None:
                of_positives = m * (b[rows, None] + b[columns])
            m.mul_(torch.add(a[rows, None], a[columns], out=scratch))
        else:
            torch.sub(m, shift[columns], out=scratch).exp2_()
            m.sub_(shift[rows, None]).exp2_()
            if positives is not None:
                of_positives = m * b[rows, None] + scratch * b[columns]
            m.mul_(a[rows, None]).add_(scratch.mul_(a[columns]))
        if positives is not None and of_positives is not None:
            of_positives.sub_(c[rows, None] + c[columns])
            torch.where(positives, of_positives, m, out=m)
        if rows == columns:
            m.fill_diagonal_(0.0)
        elif not one_way:
            grad[columns].addmm_(m.T, zhat[rows])
        grad[rows].addmm_(m, zhat[columns])
    return grad
