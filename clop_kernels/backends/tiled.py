"""The loss in plain PyTorch, one tile of the similarity matrix at a time: any device, any floating dtype, nothing compiled.

Tile picture. The N x N matrix of similarities is symmetric, so only the tiles on and above its diagonal are visited,
once in the forward pass and once in the backward pass; a tile serves its rows and, transposed, its columns::

            j: 0    1    2    3
    i: 0     [ P    x    x    x ]    S_ij = zhat_i . zhat_j * log2(e) / tau           (T x T, one buffer)
       1     [      P    x    x ]    forward:   sums of 2^S over its rows and over its columns
       2     [           P    x ]    backward:  S becomes M (below);  grad_i += M zhat_j,  grad_j += M^T zhat_i
       3     [                P ]    P: the tiles that hold positives, for rows are sorted by group

Flops: forward N^2 D, backward 3 N^2 D, and N^2 exponentials in all. Bytes: a tile, T^2 numbers, is written and read about
five times forward and ten times backward, in cache; a block of T rows of zhat, and in the backward pass of grad, comes in
once a tile, so main memory sees N^2 D / T numbers at most. Extra memory: a few tiles (1.3 MB each at T = 576) and a handful
of (N, D) arrays; nothing grows with N^2 or with N times the number of tiles.

Rows of two sides: the tiles whose rows are on the left side and whose columns are on the right one, each once, are all there
is, and serve both directions just so. Of M rows against N that is 2 M N D flops forward and 6 M N D backward.

No shift, and one exponential a pair. A product of rows is bounded, |s_ij| <= max |zhat|^2 / tau, so unless the temperature is
tiny (or rows that are not normalised are long) exp(s_ij) neither overflows nor underflows, and its plain sum is as accurate as
a shifted one and needs no pass for a maximum. With w_i the upstream gradient of row i's term, n_i the number of its positives,
q_i = w_i / n_i, and a_i = w_i / sum_j exp s_ij::

    dL/dzhat_i = 1/tau sum_{j != i} M_ij zhat_j,    M_ij = exp(s_ij) (a_i + a_j) - [j in P(i)] (q_i + q_j)

Where `fits_unshifted` says no, and where the temperature is a tensor on a GPU, which the host must not read, it takes
online maxima and two exponentials a pair instead.

Positives come from the tiles and not from the group sums of zhat, which would need no mask. A well-trained positive has
exp(s_ij) a_i close to q_i, and only a subtraction before the product with zhat keeps the small difference: with
near-duplicate views in float32 the group sums' gradient is 10 to 100 times less accurate at the same speed (at N = 80,
D = 64, tau = 0.1: 7e-5 against 1e-6 relative, where plain PyTorch has 1e-6). Where a row has one positive, the difference
is known without any subtraction, exp(s_ij) a_i - q_i = -w_i negative_i / total_i, and its loss is log(1 + negative_i /
exp s_ip): both keep their relative accuracy down to the smallest float.

Products are float32 (float64 for float64 input) on operands rounded to the compute dtype: as accurate as a matrix unit
that accumulates in float32, not as fast. On a GPU this backend is the fallback, and not yet run there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..groups import Groups, instance_groups, label_groups
from .contract import EPS, Gradients, LossOptions, Needs, Residuals

CHECKS_VALUES = False

_LOG2_E = math.log2(math.e)

_LARGEST_UNSHIFTED_LOGIT = {torch.float32: 60.0, torch.float64: 600.0}
"""Room for sums over 2^38 rows: exp(60) * 2^38 is below exp(88), the end of float32; float64 ends at exp(709)."""

_tile_rows: int | None = None


def set_tile_rows(rows: int | None) -> None:
    """Overrides the side of a tile for this process; None goes back to :func:`tile_rows`'s own choice.

    The environment variable CLOP_TILE_ROWS sets it from outside. The result changes by rounding only.
    """
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        raise ValueError(f"rows={rows!r}: expected an int of at least 1, or None for the built-in choice")
    global _tile_rows
    _tile_rows = rows


def chosen_tile_rows() -> int | None:
    """What :func:`set_tile_rows` or the environment chose, None for the built-in choice."""
    return _tile_rows


def _rows_of_environment() -> int | None:
    text = os.environ.get("CLOP_TILE_ROWS", "")
    if text and not (text.isdecimal() and int(text) > 0):
        raise ValueError(f"CLOP_TILE_ROWS={text!r} in the environment: expected an integer of at least 1, or nothing")
    return int(text) if text else None


set_tile_rows(_rows_of_environment())


def tile_rows(n_rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """The side T of a tile: large enough for a matrix product to run at full rate, small enough to stay in cache.

    The width does not enter: from D = 128 to 4096 no smaller side was faster (AVX2, two cores: 128, 256, 384 against 576).
    """
    if _tile_rows is not None:
        rows = _tile_rows
    elif device.type == "cpu":
        rows = 576 if dtype != torch.float64 else 384
    else:
        rows = 4096  # launches are what costs there; two tiles take 128 MB
    return max(1, min(rows, n_rows))


def fits_unshifted(norms: Tensor, options: LossOptions) -> bool:
    """Whether exp(s) needs no shift: |s| <= max |zhat|^2 / tau is small enough. What is on a GPU is not read: False."""
    needs_reading = not options.normalize or isinstance(options.temperature, Tensor)
    if needs_reading and norms.device.type != "cpu":
        return False
    largest_norm = 1.0 if options.normalize or len(norms) == 0 else float(norms.max())
    return largest_norm**2 / float(options.temperature) <= _LARGEST_UNSHIFTED_LOGIT[options.accumulate_dtype]


def forward(
    embeddings: Tensor, labels: Tensor | None, prototypes: Tensor | None, options: LossOptions
) -> tuple[Tensor, Residuals]:
    """(N, D) embeddings, (B,) int64 labels, (K, D) prototypes -> the loss, and what the backward pass needs."""
    groups = _groups(embeddings.shape[0], labels, options, embeddings.device)
    # index_select makes the copy that is normalised in place
    zhat = embeddings.index_select(0, groups.order).to(options.accumulate_dtype)
    zhat, norms = _normalize(zhat) if options.normalize else (zhat, torch.linalg.vector_norm(zhat, dim=1))
    normalized = zhat.to(options.compute_dtype)
    zhat = normalized.to(options.accumulate_dtype)

    softmax = _softmax(zhat, norms, groups, options)
    is_anchor = softmax.total != 0 if options.negatives_only else groups.n_positives > 0
    # A row that is no anchor has a plain zero, unless it holds a NaN or an Inf, which must stay visible.
    contrastive = torch.where(is_anchor, _contrastive_terms(softmax, groups), 0.0 * zhat.sum(1))

    prototype = torch.zeros_like(contrastive)
    counts = contrastive.new_zeros(2)
    counts[0] = is_anchor.sum()
    if labels is not None and prototypes is not None:
        label = _labels_of_rows(labels, groups, options)
        is_labelled = label >= 0
        counts[1] = is_labelled.sum()
        distances = _distances(zhat, _targets(prototypes, label, zhat), options.distance)
        prototype = torch.where(is_labelled, distances, 0.0)

    if options.reduction == "mean":
        divisors = counts.clamp(min=1)
        loss = contrastive.sum() / divisors[0] + options.prototype_weight * (prototype.sum() / divisors[1])
    else:
        per_row = contrastive + options.prototype_weight * prototype
        loss = per_row.sum() if options.reduction == "sum" else torch.empty_like(per_row).index_copy_(0, groups.order, per_row)
    table = groups.table() if groups.size is None else groups.order.new_empty((3, 0), dtype=torch.int32)
    return loss, Residuals(normalized, norms, softmax.shift, softmax.total, softmax.negative, table, counts)


def backward(
    grad_loss: Tensor,
    embeddings: Tensor,
    residuals: Residuals,
    labels: Tensor | None,
    prototypes: Tensor | None,
    options: LossOptions,
    needs: Needs,
) -> Gradients:
    """The upstream gradient, () or (N,), to the gradients of the raw embeddings, the temperature and the prototypes."""
    zhat = residuals.normalized.to(options.accumulate_dtype)
    if options.positives == "label":
        groups = Groups.of_table(residuals.groups, options.n_left)
    else:
        groups = _groups(zhat.shape[0], None, options, zhat.device)
    grad_loss = grad_loss.to(zhat.dtype)
    if options.reduction == "none":
        grad_loss = grad_loss.index_select(0, groups.order)
    shares = grad_loss / residuals.counts.clamp(min=1) if options.reduction == "mean" else (grad_loss, grad_loss)
    is_anchor = residuals.total != 0 if options.negatives_only else groups.n_positives > 0
    weights = torch.where(is_anchor, shares[0], 0.0)  # w_i

    # The gradient of zhat first, and at last, in place, that of the raw rows.
    grad = _similarity_gradient(zhat, residuals, weights, groups, options).div_(options.temperature)
    grad_temperature = None
    if needs.temperature:  # s_ij is linear in 1/tau and in each of its two rows: dL/dtau = -1/(2 tau) sum_i zhat_i . dL/dzhat_i
        grad_temperature = _row_dots(zhat, grad).sum() / (-2 * options.temperature)

    grad_prototypes = None
    if needs.prototypes:
        assert prototypes is not None
        grad_prototypes = torch.zeros_like(prototypes, dtype=zhat.dtype)
    if labels is not None and prototypes is not None:
        label = _labels_of_rows(labels, groups, options)
        pull = torch.where(label >= 0, options.prototype_weight * shares[1], 0.0).unsqueeze(1)
        direction = _distance_gradient(zhat, _targets(prototypes, label, zhat), options.distance).mul_(pull)
        grad += direction
        if grad_prototypes is not None:
            # The distances depend on zhat - c, all but the cosine, whose gradient is -zhat.
            from_rows = zhat * pull if options.distance == "cosine" else direction
            grad_prototypes.index_add_(0, label.clamp(min=0), from_rows, alpha=-1)
        del direction

    if not needs.embeddings:
        return Gradients(None, grad_temperature, grad_prototypes)
    if options.normalize:
        # zhat = z / max(|z|, EPS): the norm takes the radial part out of the gradient, where it is not below EPS.
        radial = torch.where(residuals.norms < EPS, 0.0, _row_dots(zhat, grad))
        grad.addcmul_(zhat, radial.unsqueeze(1), value=-1)
        grad /= residuals.norms.clamp(min=EPS).unsqueeze(1)
    if embeddings.dtype == torch.float16 and options.normalize:
        # 1 / EPS is beyond float16. A row of zeros gets the largest gradient there is, not an infinity that would cost every
        # step; any other row's overflow stays infinite, for a gradient scaler to see.
        largest = torch.finfo(torch.float16).max
        grad = torch.where((residuals.norms < EPS).unsqueeze(1), grad.clamp(-largest, largest), grad)
    grad = grad.to(embeddings.dtype)
    return Gradients(torch.empty_like(grad).index_copy_(0, groups.order, grad), grad_temperature, grad_prototypes)


# ---- pairs: O(N^2 D) ------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """One tile of S, and a second buffer of its shape. Both are overwritten by the next tile, or by whoever gets this one.

    ``positives`` is the (rows, columns) mask of positive pairs, or None where there are none.
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
    """The tiles on and above the diagonal of S = zhat zhat^T log2(e) / tau, row of tiles by row of tiles.

    Of two sides: those of the left rows and the right columns. Positives that are no pairs have S = -inf and are not marked.

    ``unshifted``, S is small, and the rows are scaled. Else the products are: scaled rows would round S_ij and S_ji apart, an
    ulp of S, which for S in the thousands is a visible part of exp(s).
    """
    n_rows = zhat.shape[0]
    if n_rows == 0 or not options.has_pairs:
        return
    n_left, temperature = groups.n_left, options.temperature
    side = tile_rows(n_rows, zhat.dtype, zhat.device)
    # In float32 the factor's own rounding would be an error of one sign in every S_ij, as if of another temperature. In
    # float64 each element rounds for itself. Apple's GPUs have no float64.
    wide = torch.float64 if zhat.device.type != "mps" else zhat.dtype
    scale = _LOG2_E / (temperature.to(wide) if isinstance(temperature, Tensor) else temperature)
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
                if i == j:  # nor need a library's product of a matrix with itself be symmetric to the last bit
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
    """Whether a run of positives reaches from the rows to the columns. True where only a GPU knows."""
    if rows == columns:
        return groups.size != 1
    if groups.size is not None and groups.n_left is not None:
        return rows.start + groups.n_left < columns.stop and columns.start < rows.stop + groups.n_left
    if groups.size is not None:
        return (rows.stop - 1) // groups.size == columns.start // groups.size
    if groups.starts.device.type != "cpu":
        return True
    return bool(groups.ends[rows.stop - 1] > columns.start and groups.starts[rows.start] < columns.stop)


class _Softmax(NamedTuple):
    """Row statistics of S, (N,) each: sums of 2^(S_ij - shift_i), and the sum of the positives' S_ip itself."""

    shift: Tensor
    negative: Tensor
    positive: Tensor
    positive_logits: Tensor

    @property
    def total(self) -> Tensor:
        return self.negative + self.positive


def _softmax(zhat: Tensor, norms: Tensor, groups: Groups, options: LossOptions) -> _Softmax:
    """The forward pass over pairs: (N, D) -> four (N,)."""
    negative, positive, positive_logits = (zhat.new_zeros(zhat.shape[0]) for _ in range(3))
    unshifted = fits_unshifted(norms, options)
    # Without a shift it stays zero. Else a running maximum, at first finite, so that no infinities are subtracted.
    shift = torch.zeros_like(negative) if unshifted else torch.full_like(negative, torch.finfo(zhat.dtype).min / 2)
    for tile in _tiles(zhat, groups, options, unshifted):
        directions = ((1, tile.rows),) if tile.on_diagonal else ((1, tile.rows), (0, tile.columns))
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
    return _Softmax(shift, negative, positive, positive_logits)


def _contrastive_terms(softmax: _Softmax, groups: Groups) -> Tensor:
    """lse_i - mean_p s_ip, (N,), in a form that cancels only what the inputs' rounding has left: any value outside A."""
    mean_positive = softmax.positive_logits / groups.n_positives.clamp(min=1)
    mantissa, exponent = torch.frexp(softmax.total)  # log2(total) = exponent + log2(mantissa): subtract the large parts first
    log2_ratio = (softmax.shift - mean_positive) + exponent + mantissa.log2()
    is_dominated = (groups.n_positives == 1) & (softmax.negative < softmax.positive)
    return torch.where(is_dominated, torch.log1p(softmax.negative / softmax.positive), log2_ratio / _LOG2_E)


def _similarity_gradient(zhat: Tensor, residuals: Residuals, weights: Tensor, groups: Groups, options: LossOptions) -> Tensor:
    """The backward pass over pairs: sum_{j != i} M_ij zhat_j, (N, D)."""
    grad = torch.zeros_like(zhat)
    unshifted = fits_unshifted(residuals.norms, options)
    a = weights / torch.where(weights == 0, 1.0, residuals.total)  # a row that is compared with nothing has a total of 0
    # Of a positive pair M is 2^S (b_i + b_j) - (c_i + c_j).
    has_one = groups.n_positives == 1
    b = torch.where(has_one, 0.0, a)
    c = torch.where(has_one, a * residuals.negative, weights / groups.n_positives.clamp(min=1))
    for rows, columns, m, scratch, positives in _tiles(zhat, groups, options, unshifted):
        of_positives = None
        if unshifted:
            m.exp2_()
            if positives is not None:
                of_positives = m * (b[rows, None] + b[columns])
            m.mul_(torch.add(a[rows, None], a[columns], out=scratch))
        else:
            torch.sub(m, residuals.shift[columns], out=scratch).exp2_()
            m.sub_(residuals.shift[rows, None]).exp2_()
            if positives is not None:
                of_positives = m * b[rows, None] + scratch * b[columns]
            m.mul_(a[rows, None]).add_(scratch.mul_(a[columns]))
        if positives is not None and of_positives is not None:
            of_positives.sub_(c[rows, None] + c[columns])
            torch.where(positives, of_positives, m, out=m)
        if rows == columns:
            m.fill_diagonal_(0.0)
        else:
            grad[columns].addmm_(m.T, zhat[rows])
        grad[rows].addmm_(m, zhat[columns])
    return grad


# ---- rows: O(N D) ---------------------------------------------------------------------------------------------------


def _normalize(z: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) -> zhat = z / max(|z|, EPS), in place, and the norms |z|, (N,).

    Each row is scaled by its largest entry first, so that no square overflows: any finite row has a finite direction.
    """
    largest = torch.linalg.vector_norm(z, ord=math.inf, dim=1).clamp(min=EPS)
    z /= largest.unsqueeze(1)
    norms = torch.linalg.vector_norm(z, dim=1)
    z /= torch.maximum(norms, EPS / largest).unsqueeze(1)
    return z, norms * largest


def _groups(n_rows: int, labels: Tensor | None, options: LossOptions, device: torch.device) -> Groups:
    if options.positives == "label":
        assert labels is not None
        return label_groups(labels, options.n_views, options.n_left)
    return instance_groups(n_rows // options.n_views, options.n_views, device, options.n_left)


def _labels_of_rows(labels: Tensor, groups: Groups, options: LossOptions) -> Tensor:
    """(B,) labels -> (N,) labels in the order of the groups."""
    return labels.repeat(options.n_views).index_select(0, groups.order)


def _targets(prototypes: Tensor, label: Tensor, zhat: Tensor) -> Tensor:
    """The prototype of each row, (N, D); any prototype for a row without a label."""
    return prototypes.to(zhat.dtype).index_select(0, label.clamp(min=0))


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
