"""The O(N D) row-by-row work in plain PyTorch: before, between and after the two passes over pairs.

The backend ``tiled`` and the loss over a process group use it, because their passes over pairs are separate. The compiled kernels
and Triton's fuse this work. There are N rows of width D, indexed by position: sorted by positive group
(:mod:`clop_kernels.groups`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..groups import Groups, instance_groups, label_groups
from .contract import EPS, LOG2_E, Coefficients, Gradients, LossOptions, Needs, Softmax


def groups_of(n_rows: int, labels: Tensor | None, options: LossOptions, device: torch.device) -> Groups:
    """The positive groups of N rows, by label or by instance."""
    if options.positives == "label":
        assert labels is not None
        return label_groups(labels, options.n_views, options.n_left)
    return instance_groups(n_rows // options.n_views, options.n_views, device, options.n_left)


def normalized_rows(embeddings: Tensor, order: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """(N, D) raw rows -> zhat by position, rounded to the compute dtype, and the norms |z|, (N,).

    Each row is first scaled by its largest entry, so that no square overflows and any finite row has a finite direction.
    """
    z = embeddings.index_select(0, order).to(options.accumulate_dtype)  # a copy, so it may be changed in place
    if not options.normalize:
        return z.to(options.compute_dtype), torch.linalg.vector_norm(z, dim=1)
    largest = torch.linalg.vector_norm(z, ord=math.inf, dim=1).clamp(min=EPS)
    z /= largest.unsqueeze(1)
    norms = torch.linalg.vector_norm(z, dim=1)
    z /= torch.maximum(norms, EPS / largest).unsqueeze(1)
    return z.to(options.compute_dtype), norms * largest


def merged(parts: Softmax) -> Softmax:
    """Merges the sums over several sets of columns, (sets, N) each, into the sums over all columns.

    If all sets share one shift, the result has that shift.
    """
    shift = parts.shift.amax(0)
    scale = torch.exp2(parts.shift - shift)
    return Softmax(shift, (parts.negative * scale).sum(0), (parts.positive * scale).sum(0), parts.positive_logits.sum(0))


def contrastive_terms(softmax: Softmax, n_positives: Tensor, is_anchor: Tensor, zhat: Tensor) -> Tensor:
    """lse_i - mean_p s_ip, (N,). Cancellation loses no more digits than the rounding of the statistics already has.

    A row outside A has the term 0. If it holds a NaN or an Inf, its term is NaN, so that the fault stays visible.
    """
    mean_positive = softmax.positive_logits / n_positives.clamp(min=1)
    mantissa, exponent = torch.frexp(softmax.total)  # log2(total) = exponent + log2(mantissa): subtract the large parts first
    log2_ratio = (softmax.shift - mean_positive) + exponent + mantissa.log2()
    is_dominated = (n_positives == 1) & (softmax.negative < softmax.positive)
    terms = torch.where(is_dominated, torch.log1p(softmax.negative / softmax.positive), log2_ratio / LOG2_E)
    return torch.where(is_anchor, terms, 0.0 * zhat.sum(1))


def inverse_totals(softmax: Softmax, is_anchor: Tensor) -> Tensor:
    """1 / total, (N,), and 0 outside A, where the total may be 0."""
    return torch.where(is_anchor, 1 / softmax.total, 0.0)


def coefficients(weights: Tensor, n_positives: Tensor, inverse_total: Tensor, negative: Tensor, shift: Tensor) -> Tensor:
    """The fields of :class:`.contract.Coefficients`, (4, N), from the row weights w_i.

    w_i is the upstream gradient of row i's term, 0 outside A.
    """
    a = weights * inverse_total
    has_one = n_positives == 1
    b = torch.where(has_one, 0.0, a)
    c = torch.where(has_one, a * negative, weights / n_positives.clamp(min=1))
    return torch.stack(Coefficients(a, b, c, shift))


class Pull(NamedTuple):
    """The prototype term of N rows: their labels (-1 for unlabelled), the (K, D) prototypes, and the distance."""

    label: Tensor
    prototypes: Tensor
    distance: str

    @staticmethod
    def of(labels: Tensor | None, prototypes: Tensor | None, order: Tensor, options: LossOptions) -> Pull | None:
        """The prototype term for (B,) labels; None without labels or prototypes."""
        if labels is None or prototypes is None:
            return None
        return Pull(labels.repeat(options.n_views).index_select(0, order), prototypes, options.distance)

    @property
    def is_labelled(self) -> Tensor:
        return self.label >= 0

    def distances(self, zhat: Tensor) -> Tensor:
        """The distance of each row to its own prototype, (N,); 0 for an unlabelled row."""
        offset_or_dot = self._targets(zhat)
        if self.distance == "cosine":
            distances = 1 - _row_dots(zhat, offset_or_dot)
        else:
            order = 2 if self.distance == "euclidean" else 1
            distances = torch.linalg.vector_norm(zhat - offset_or_dot, ord=order, dim=1)
        return torch.where(self.is_labelled, distances, 0.0)

    def gradients(self, zhat: Tensor, weight: Tensor, needs_prototypes: bool) -> tuple[Tensor, Tensor | None]:
        """The gradients of sum_i weight_i d(zhat_i, c) with respect to zhat and to the prototypes; weight is () or (N,)."""
        weight = torch.where(self.is_labelled, weight, 0.0).unsqueeze(1)
        of_rows = self._direction(zhat).mul_(weight)
        if not needs_prototypes:
            return of_rows, None
        # The cosine distance has the gradient -zhat. The other distances depend on zhat - c, so their gradient is -of_rows.
        of_targets = zhat * weight if self.distance == "cosine" else of_rows
        of_prototypes = torch.zeros_like(self.prototypes, dtype=zhat.dtype)
        # On a GPU this sum runs in any order, unless torch.use_deterministic_algorithms(True) is set.
        return of_rows, of_prototypes.index_add_(0, self.label.clamp(min=0), of_targets, alpha=-1)

    def _targets(self, zhat: Tensor) -> Tensor:
        """The prototype of each row, (N, D); an arbitrary prototype for an unlabelled row."""
        return self.prototypes.to(zhat.dtype).index_select(0, self.label.clamp(min=0))

    def _direction(self, zhat: Tensor) -> Tensor:
        """d distance / d zhat as a new tensor, (N, D); zero for a row that lies on its prototype."""
        if self.distance == "cosine":
            return self._targets(zhat).neg_()
        offset = zhat - self._targets(zhat)
        if self.distance == "manhattan":
            return offset.sign_()
        length = torch.linalg.vector_norm(offset, dim=1, keepdim=True)
        return offset.div_(torch.where(length > 0, length, 1.0))


def finish(
    grad: Tensor,
    zhat: Tensor,
    norms: Tensor,
    labels: Tensor | None,
    prototypes: Tensor | None,
    pull_weight: Tensor,
    order: Tensor,
    options: LossOptions,
    needs: Needs,
    dtype: torch.dtype,
) -> Gradients:
    """Turns d L_con / d zhat into the gradients of the inputs.

    ``grad`` is d L_con / d zhat, (N, D) by position, and is overwritten. ``pull_weight``, () or (N,), is the upstream gradient of
    each row's prototype term. The gradient of the raw rows is in ``dtype`` and in the user's row order.
    """
    grad_temperature = grad_prototypes = None
    pull = Pull.of(labels, prototypes, order, options)
    if needs.temperature:  # s_ij is linear in 1/tau and in each of its two rows: dL/dtau = -1/(2 tau) sum_i zhat_i . dL/dzhat_i
        grad_temperature = _row_dots(zhat, grad).sum() / (-2 * options.temperature)
    if pull is not None:
        of_rows, grad_prototypes = pull.gradients(zhat, options.prototype_weight * pull_weight, needs.prototypes)
        grad += of_rows
        del of_rows
    elif needs.prototypes and prototypes is not None:
        grad_prototypes = torch.zeros_like(prototypes, dtype=zhat.dtype)
    if not needs.embeddings:
        return Gradients(None, grad_temperature, grad_prototypes)
    if options.normalize:
        # zhat = z / max(|z|, EPS). Dividing by the norm removes the radial part of the gradient; dividing by EPS does not.
        radial = torch.where(norms < EPS, 0.0, _row_dots(zhat, grad))
        grad.addcmul_(zhat, radial.unsqueeze(1), value=-1)
        grad /= norms.clamp(min=EPS).unsqueeze(1)
    if dtype == torch.float16 and options.normalize:
        # 1 / EPS is beyond float16. A row of zeros gets the largest finite gradient, because with an infinity a gradient scaler
        # would skip every step. Any other row keeps an infinite gradient, which the gradient scaler must see.
        largest = torch.finfo(torch.float16).max
        grad = torch.where((norms < EPS).unsqueeze(1), grad.clamp(-largest, largest), grad)
    grad = grad.to(dtype)
    return Gradients(torch.empty_like(grad).index_copy_(0, order, grad), grad_temperature, grad_prototypes)


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    """(N, D), (N, D) -> (N,)."""
    return torch.linalg.vecdot(a, b)
