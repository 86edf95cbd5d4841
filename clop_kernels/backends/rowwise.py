"""What is done row by row, O(N D), in plain PyTorch: before, between and after the two passes over pairs.

For the backends and the loss over a process group whose passes over pairs stand alone; the compiled kernels fuse all this.
Rows are by position, that is in the order of their positive groups (:mod:`clop_kernels.groups`), N of them, D wide.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..groups import Groups, instance_groups, label_groups
from .contract import EPS, LOG2_E, Coefficients, Gradients, LossOptions, Needs, Softmax


def groups_of(n_rows: int, labels: Tensor | None, options: LossOptions, device: torch.device) -> Groups:
    """The positives of N rows, of (B,) labels or of instances."""
    if options.positives == "label":
        assert labels is not None
        return label_groups(labels, options.n_views, options.n_left)
    return instance_groups(n_rows // options.n_views, options.n_views, device, options.n_left)


def normalized_rows(embeddings: Tensor, order: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """(N, D) raw rows -> zhat by position, rounded to the compute dtype, and the norms |z|, (N,).

    Each row is scaled by its largest entry first, so that no square overflows: any finite row has a finite direction.
    """
    z = embeddings.index_select(0, order).to(options.accumulate_dtype)  # index_select makes the copy that is changed in place
    if not options.normalize:
        return z.to(options.compute_dtype), torch.linalg.vector_norm(z, dim=1)
    largest = torch.linalg.vector_norm(z, ord=math.inf, dim=1).clamp(min=EPS)
    z /= largest.unsqueeze(1)
    norms = torch.linalg.vector_norm(z, dim=1)
    z /= torch.maximum(norms, EPS / largest).unsqueeze(1)
    return z.to(options.compute_dtype), norms * largest


def merged(parts: Softmax) -> Softmax:
    """The sums over several sets of columns, (sets, N) each, as those over all. Of one shift for all rows, that is the shift."""
    shift = parts.shift.amax(0)
    scale = torch.exp2(parts.shift - shift)
    return Softmax(shift, (parts.negative * scale).sum(0), (parts.positive * scale).sum(0), parts.positive_logits.sum(0))


def contrastive_terms(softmax: Softmax, n_positives: Tensor, is_anchor: Tensor, zhat: Tensor) -> Tensor:
    """lse_i - mean_p s_ip, (N,), in a form that cancels only what the inputs' rounding has left.

    A row outside A has a plain zero, unless it holds a NaN or an Inf, which must stay visible.
    """
    mean_positive = softmax.positive_logits / n_positives.clamp(min=1)
    mantissa, exponent = torch.frexp(softmax.total)  # log2(total) = exponent + log2(mantissa): subtract the large parts first
    log2_ratio = (softmax.shift - mean_positive) + exponent + mantissa.log2()
    is_dominated = (n_positives == 1) & (softmax.negative < softmax.positive)
    terms = torch.where(is_dominated, torch.log1p(softmax.negative / softmax.positive), log2_ratio / LOG2_E)
    return torch.where(is_anchor, terms, 0.0 * zhat.sum(1))


def inverse_totals(softmax: Softmax, is_anchor: Tensor) -> Tensor:
    """1 / total, (N,), 0 outside A: a row that is compared with nothing has a total of 0."""
    return torch.where(is_anchor, 1 / softmax.total, 0.0)


def coefficients(weights: Tensor, n_positives: Tensor, inverse_total: Tensor, negative: Tensor, shift: Tensor) -> Tensor:
    """The rows of :class:`.contract.Coefficients`, (4, N), for upstream gradients w_i of the rows' terms, 0 outside A."""
    a = weights * inverse_total
    has_one = n_positives == 1
    b = torch.where(has_one, 0.0, a)
    c = torch.where(has_one, a * negative, weights / n_positives.clamp(min=1))
    return torch.stack(Coefficients(a, b, c, shift))


class Pull(NamedTuple):
    """The prototype term of N rows: their labels, -1 without one, the (K, D) prototypes, and the distance."""

    label: Tensor
    prototypes: Tensor
    distance: str

    @staticmethod
    def of(labels: Tensor | None, prototypes: Tensor | None, order: Tensor, options: LossOptions) -> Pull | None:
        """Of (B,) labels; None where there is no prototype term."""
        if labels is None or prototypes is None:
            return None
        return Pull(labels.repeat(options.n_views).index_select(0, order), prototypes, options.distance)

    @property
    def is_labelled(self) -> Tensor:
        return self.label >= 0

    def distances(self, zhat: Tensor) -> Tensor:
        """Of each row to its own prototype, (N,); 0 without a label."""
        offset_or_dot = self._targets(zhat)
        if self.distance == "cosine":
            distances = 1 - _row_dots(zhat, offset_or_dot)
        else:
            order = 2 if self.distance == "euclidean" else 1
            distances = torch.linalg.vector_norm(zhat - offset_or_dot, ord=order, dim=1)
        return torch.where(self.is_labelled, distances, 0.0)

    def gradients(self, zhat: Tensor, weight: Tensor, needs_prototypes: bool) -> tuple[Tensor, Tensor | None]:
        """Of sum_i weight_i d(zhat_i, c), weight () or (N,), with respect to zhat and to the prototypes."""
        weight = torch.where(self.is_labelled, weight, 0.0).unsqueeze(1)
        of_rows = self._direction(zhat).mul_(weight)
        if not needs_prototypes:
            return of_rows, None
        # The distances depend on zhat - c, all but the cosine, whose gradient is -zhat.
        of_targets = zhat * weight if self.distance == "cosine" else of_rows
        of_prototypes = torch.zeros_like(self.prototypes, dtype=zhat.dtype)
        # On a GPU in any order, but under torch.use_deterministic_algorithms(True), which this sum follows.
        return of_rows, of_prototypes.index_add_(0, self.label.clamp(min=0), of_targets, alpha=-1)

    def _targets(self, zhat: Tensor) -> Tensor:
        """The prototype of each row, (N, D); any prototype for a row without a label."""
        return self.prototypes.to(zhat.dtype).index_select(0, self.label.clamp(min=0))

    def _direction(self, zhat: Tensor) -> Tensor:
        """d distance / d zhat, (N, D); zero where a row lies on its prototype. A new tensor."""
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
    """From d L_con / d zhat, ``grad``, (N, D) by position, which is overwritten, to the gradients of the inputs.

    Those of the raw rows are in ``dtype`` and the rows' own order. ``pull_weight``, () or (N,): the upstream gradient of each
    row's prototype term.
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
        # zhat = z / max(|z|, EPS): the norm takes the radial part out of the gradient, where it is not below EPS.
        radial = torch.where(norms < EPS, 0.0, _row_dots(zhat, grad))
        grad.addcmul_(zhat, radial.unsqueeze(1), value=-1)
        grad /= norms.clamp(min=EPS).unsqueeze(1)
    if dtype == torch.float16 and options.normalize:
        # 1 / EPS is beyond float16. A row of zeros gets the largest gradient there is, not an infinity that would cost every
        # step; any other row's overflow stays infinite, for a gradient scaler to see.
        largest = torch.finfo(torch.float16).max
        grad = torch.where((norms < EPS).unsqueeze(1), grad.clamp(-largest, largest), grad)
    grad = grad.to(dtype)
    return Gradients(torch.empty_like(grad).index_copy_(0, order, grad), grad_temperature, grad_prototypes)


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    """(N, D), (N, D) -> (N,)."""
    return torch.linalg.vecdot(a, b)
