"""The loss in plain PyTorch, one tile of the similarity matrix at a time: any device, any floating dtype, nothing compiled.

Tile picture. The N x N matrix of similarities is symmetric, so only the tiles on and above its diagonal are visited,
in the forward pass and again in the backward pass; a tile serves its rows and, transposed, its columns::

            j: 0    1    2    3        S_ij = zhat_i . zhat_j * log2(e) / tau     (T x T, one buffer)
    i: 0     [ \\    x    x    x ]
       1     [      \\    x    x ]     forward:   sum over rows into rows i, over columns into rows j
       2     [           \\    x ]     backward:  S becomes M = 2^S (a_i + a_j);  grad_i += M zhat_j,  grad_j += M^T zhat_i
       3     [                \\ ]

Flops: forward N^2 D, backward 3 N^2 D, and N^2 exponentials in all. Extra memory: two tiles and a handful of (N, D)
arrays; nothing grows with N^2 or with N times the number of tiles.

No shift and one exponential. A cosine is bounded, |s_ij| <= 1/tau, so for temperatures that are not tiny exp(s_ij)
neither overflows nor underflows, and the plain sum of exponentials is as accurate as a shifted one and needs no pass
for a maximum. With a_i = w_i exp(-lse_i), for w_i the upstream gradient of row i's term, the backward pass needs one
exponential a pair: w_i p_ij + w_j p_ji = exp(s_ij) (a_i + a_j). Below the temperature of `fits_unshifted`, and where the
temperature is a tensor that the host must not read, it takes online maxima and two exponentials a pair instead.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from ..groups import Groups, instance_groups, label_groups
from .contract import EPS, Gradients, LossOptions, Needs, Residuals

_LOG2_E = math.log2(math.e)

_LARGEST_UNSHIFTED_LOGIT = {torch.float32: 60.0, torch.float64: 600.0}
"""exp(+-60) * 2^38 is still a normal float32 (its range is exp(+-87)); likewise exp(+-600) in float64 (exp(+-708))."""

_tile_rows: int | None = int(os.environ["CLOP_TILE_ROWS"]) if os.environ.get("CLOP_TILE_ROWS") else None


def set_tile_rows(rows: int | None) -> None:
    """Overrides the side of a tile for this process; None goes back to :func:`tile_rows`'s own choice.

    The environment variable CLOP_TILE_ROWS sets it from outside. The result changes by rounding only.
    """
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        raise ValueError(f"rows={rows!r}: expected an int of at least 1, or None for the built-in choice")
    global _tile_rows
    _tile_rows = rows


def tile_rows(n_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> int:
    """The side T of a tile: large enough for a matrix product to run at full rate, small enough to stay in cache."""
    if _tile_rows is not None:
        rows = _tile_rows
    elif device.type == "cpu":
        rows = 512 if dtype != torch.float64 else 384
    else:
        rows = 4096  # launches are what costs there; two tiles take 128 MB
    return max(1, min(rows, n_rows))


def fits_unshifted(temperature: float | Tensor, dtype: torch.dtype) -> bool:
    """Whether exp(s) needs no shift: |s| <= 1/tau is small enough for ``dtype``. A GPU's tensor is not read: False."""
    if isinstance(temperature, Tensor) and temperature.device.type != "cpu":
        return False
    return 1.0 / float(temperature) <= _LARGEST_UNSHIFTED_LOGIT[dtype]


def forward(
    embeddings: Tensor, labels: Tensor | None, prototypes: Tensor | None, options: LossOptions
) -> tuple[Tensor, Residuals]:
    """(N, D) embeddings, (B,) int64 labels, (K, D) prototypes -> the loss, and what the backward pass needs."""
    normalized, norms = _normalize(embeddings, options)
    zhat = normalized.to(options.accumulate_dtype)
    lse = _row_logsumexp(zhat, options.temperature)

    groups = _groups(labels, zhat.shape[0], zhat.device, options)
    others = _per_view(groups.sums(zhat), zhat) - zhat  # (N, D), the sum of the positives of each row
    n_positives = _per_row(groups.n_positives, options)
    is_anchor = n_positives > 0
    positive = _row_dots(zhat, others) / options.temperature / n_positives.clamp(min=1)
    # Where a row has no positives, `others` is an exact zero unless the row holds a NaN or Inf, which so stays visible.
    contrastive = torch.where(is_anchor, lse, 0.0) - positive
    del others

    prototype = torch.zeros_like(contrastive)
    n_labelled: int | Tensor = 1
    if labels is not None and prototypes is not None:
        is_labelled = _per_row(labels >= 0, options)
        n_labelled = is_labelled.sum().clamp(min=1)
        target = _per_view(prototypes.to(zhat.dtype)[labels.clamp(min=0)], zhat)
        prototype = torch.where(is_labelled, _distances(zhat, target, options.distance), 0.0)

    if options.reduction == "mean":
        mean_contrastive = contrastive.sum() / is_anchor.sum().clamp(min=1)
        loss = mean_contrastive + options.prototype_weight * (prototype.sum() / n_labelled)
    else:
        per_row = contrastive + options.prototype_weight * prototype
        loss = per_row.sum() if options.reduction == "sum" else per_row
    return loss, Residuals(normalized, norms, lse)


def backward(
    grad_loss: Tensor,
    residuals: Residuals,
    labels: Tensor | None,
    prototypes: Tensor | None,
    options: LossOptions,
    needs: Needs,
) -> Gradients:
    """The upstream gradient, () or (N,), to the gradients of the raw embeddings, the temperature and the prototypes."""
    normalized, norms, lse = residuals
    zhat = normalized.to(options.accumulate_dtype)
    grad_loss = grad_loss.to(zhat.dtype)
    groups = _groups(labels, zhat.shape[0], zhat.device, options)
    n_positives = _per_row(groups.n_positives, options)
    is_anchor = n_positives > 0
    scale = grad_loss / is_anchor.sum().clamp(min=1) if options.reduction == "mean" else grad_loss
    weights = torch.where(is_anchor, scale, 0.0)  # (N,), w_i

    grad = _similarity_gradient(zhat, lse, weights, options.temperature)  # of zhat, and at last of the raw rows
    # The positives: each row is pulled by its own term, q_i sum_p zhat_p, and by the terms it is a positive of,
    # sum_p q_p zhat_p, with q_i = w_i / n_i.
    q = (weights / n_positives.clamp(min=1)).unsqueeze(1)
    pulls = _per_view(groups.sums(zhat), zhat).sub_(zhat).mul_(q)
    weighted = zhat * q
    pulls += _per_view(groups.sums(weighted), zhat)
    pulls -= weighted
    grad -= pulls
    grad /= options.temperature
    del pulls, weighted

    grad_temperature = None
    if needs.temperature:
        grad_temperature = _row_dots(zhat, grad).sum() / (-2 * options.temperature)

    grad_prototypes = None
    if labels is not None and prototypes is not None:
        is_labelled = _per_row(labels >= 0, options)
        scale = options.prototype_weight * grad_loss
        scale = scale / is_labelled.sum().clamp(min=1) if options.reduction == "mean" else scale
        pull = torch.where(is_labelled, scale, 0.0).unsqueeze(1)
        target = _per_view(prototypes.to(zhat.dtype)[labels.clamp(min=0)], zhat)
        direction = _distance_gradient(zhat, target, options.distance).mul_(pull)
        grad += direction
        if needs.prototypes:
            # d depends on zhat - c, but for the cosine, whose gradient is -zhat
            from_row = zhat * pull if options.distance == "cosine" else direction
            from_instance = from_row.view(options.n_views, *labels.shape, -1).sum(0)
            grad_prototypes = torch.zeros_like(prototypes, dtype=zhat.dtype)
            grad_prototypes.index_add_(0, labels.clamp(min=0), from_instance, alpha=-1)
    elif needs.prototypes:
        assert prototypes is not None
        grad_prototypes = torch.zeros_like(prototypes, dtype=zhat.dtype)

    if not needs.embeddings:
        return Gradients(None, grad_temperature, grad_prototypes)
    # zhat = z / max(|z|, EPS): the radial part of the gradient is lost in the norm, unless the norm is below EPS
    radial = torch.where(norms < EPS, 0.0, _row_dots(zhat, grad))
    grad.addcmul_(zhat, radial.unsqueeze(1), value=-1)
    grad /= norms.clamp(min=EPS).unsqueeze(1)
    return Gradients(grad, grad_temperature, grad_prototypes)


# ---- pairs: O(N^2 D) ------------------------------------------------------------------------------------------------


def _tiles(zhat: Tensor, temperature: float | Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields (rows, columns, S) for the tiles on and above the diagonal; S = log2(e) s_ij, -inf on the diagonal.

    S is one buffer, overwritten by the next tile; the caller may overwrite it too.
    """
    n_rows, width = zhat.shape
    side = tile_rows(n_rows, width, zhat.dtype, zhat.device)
    scaled_buffer = zhat.new_empty(side, width)
    tile_buffer = zhat.new_empty(side * side)
    for i in range(0, n_rows, side):
        rows = slice(i, min(i + side, n_rows))
        height = rows.stop - rows.start
        scaled = torch.mul(zhat[rows], _LOG2_E / temperature, out=scaled_buffer[:height])
        for j in range(i, n_rows, side):
            columns = slice(j, min(j + side, n_rows))
            tile = tile_buffer[: height * (columns.stop - columns.start)].view(height, -1)
            torch.mm(scaled, zhat[columns].T, out=tile)
            if i == j:
                tile.fill_diagonal_(-math.inf)
            yield rows, columns, tile


def _row_logsumexp(zhat: Tensor, temperature: float | Tensor) -> Tensor:
    """lse_i = log sum_{j != i} exp s_ij: (N, D) -> (N,)."""
    total = zhat.new_zeros(zhat.shape[0])
    if fits_unshifted(temperature, zhat.dtype):
        for rows, columns, tile in _tiles(zhat, temperature):
            tile.exp2_()
            total[rows] += tile.sum(1)
            if rows != columns:
                total[columns] += tile.sum(0)
        return total.log_()
    # Finite, so that a row that has met nothing but itself yet does not subtract infinities.
    maximum = torch.full_like(total, torch.finfo(total.dtype).min / 2)
    scratch = None
    for rows, columns, tile in _tiles(zhat, temperature):
        scratch = torch.empty_like(tile) if scratch is None else scratch
        shifted = scratch.view(-1)[: tile.numel()].view_as(tile)
        _online_update(maximum[rows], total[rows], tile, 1, shifted)
        if rows != columns:
            _online_update(maximum[columns], total[columns], tile, 0, shifted)
    return total.log2_().add_(maximum).div_(_LOG2_E)


def _online_update(maximum: Tensor, total: Tensor, tile: Tensor, dim: int, shifted: Tensor) -> None:
    """Takes a tile into the running maxima and sums of 2^(S - maximum), in place, over dimension ``dim`` of the tile."""
    larger = torch.maximum(maximum, tile.amax(dim))
    torch.sub(tile, larger.unsqueeze(dim), out=shifted).exp2_()
    total.mul_(torch.exp2(maximum - larger)).add_(shifted.sum(dim))
    maximum.copy_(larger)


def _similarity_gradient(zhat: Tensor, lse: Tensor, weights: Tensor, temperature: float | Tensor) -> Tensor:
    """sum_{j != i} (w_i p_ij + w_j p_ji) zhat_j with p_ij = exp(s_ij - lse_i): (N, D), (N,), (N,) -> (N, D)."""
    grad = torch.zeros_like(zhat)
    if zhat.shape[0] < 2:
        return grad
    unshifted = fits_unshifted(temperature, zhat.dtype)
    row_factor = weights * torch.exp(-lse) if unshifted else weights
    shift = lse * _LOG2_E
    scratch = None
    for rows, columns, tile in _tiles(zhat, temperature):
        scratch = torch.empty_like(tile) if scratch is None else scratch
        other = scratch.view(-1)[: tile.numel()].view_as(tile)
        if unshifted:
            tile.exp2_()
            tile *= torch.add(row_factor[rows, None], row_factor[columns], out=other)
        else:
            torch.sub(tile, shift[columns], out=other).exp2_().mul_(row_factor[columns])
            tile.sub_(shift[rows, None]).exp2_().mul_(row_factor[rows, None]).add_(other)
        grad[rows].addmm_(tile, zhat[columns])
        if rows != columns:
            grad[columns].addmm_(tile.T, zhat[rows])
    return grad


# ---- rows: O(N D) ---------------------------------------------------------------------------------------------------


def _normalize(embeddings: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """zhat in the compute dtype, and the norms |z| in the accumulate dtype.

    Each row is scaled by its largest entry first, so that no square overflows: any finite row has a finite direction.
    """
    z = embeddings.to(options.accumulate_dtype)
    largest = torch.linalg.vector_norm(z, ord=math.inf, dim=1).clamp(min=EPS)
    zhat = z / largest.unsqueeze(1)
    norms = torch.linalg.vector_norm(zhat, dim=1)
    zhat /= torch.maximum(norms, EPS / largest).unsqueeze(1)
    return zhat.to(options.compute_dtype), norms * largest


def _groups(labels: Tensor | None, n_rows: int, device: torch.device, options: LossOptions) -> Groups:
    if options.positives == "label":
        assert labels is not None
        return label_groups(labels, options.n_views)
    return instance_groups(n_rows // options.n_views, options.n_views, device)


def _per_row(per_instance: Tensor, options: LossOptions) -> Tensor:
    """(B,) -> (V*B,)."""
    return per_instance.repeat(options.n_views)


def _per_view(per_instance: Tensor, rows: Tensor) -> Tensor:
    """(B, D) -> (V*B, D), in the layout of ``rows``."""
    return per_instance.repeat(rows.shape[0] // max(per_instance.shape[0], 1), 1)


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    """(N, D), (N, D) -> (N,)."""
    return torch.linalg.vecdot(a, b)


def _distances(zhat: Tensor, target: Tensor, distance: str) -> Tensor:
    """Distance of each row to its own prototype: (N, D), (N, D) -> (N,)."""
    if distance == "cosine":
        return 1 - _row_dots(zhat, target)
    return torch.linalg.vector_norm(zhat - target, ord=2 if distance == "euclidean" else 1, dim=1)


def _distance_gradient(zhat: Tensor, target: Tensor, distance: str) -> Tensor:
    """d distance / d zhat, (N, D); zero where a row lies on its prototype. A new tensor."""
    if distance == "cosine":
        return -target
    offset = zhat - target
    if distance == "manhattan":
        return offset.sign_()
    length = torch.linalg.vector_norm(offset, dim=1, keepdim=True)
    return offset.div_(torch.where(length > 0, length, 1.0))
