"""The definition of the loss in plain PyTorch. Every test and every backend is compared with it.

It builds the full N x N similarity matrix, so time and memory grow with N^2. Autograd computes every gradient, so the loss can
be differentiated any number of times. This module imports nothing else from the package.

Notation. Sources: CLOP is Li, Nguyen, Pimentel-Alarcon, arXiv 2403.18699; NT-Xent is Chen et al., arXiv 2002.05709; SupCon is
Khosla et al., arXiv 2004.11362, eq. 2, with the mean over positives outside the logarithm. Rows are view-major: row
``v * B + b`` is view ``v`` of instance ``b``::

    zhat_i = z_i / max(|z_i|, 1e-12)            s_ij = zhat_i . zhat_j / tau
    P(i)   = the other rows of the positive group of row i,  n_i = |P(i)|
    A      = {i : n_i > 0}                      lse_i = log sum_{j != i} exp s_ij
    L_con  = 1/|A| sum_{i in A} (lse_i - 1/n_i sum_{p in P(i)} s_ip)
    L_pro  = 1/|S| sum_{i in S} d(zhat_i, c_{y_i})        S = the rows whose label is >= 0
    L      = L_con + prototype_weight * L_pro

With two sides (CLIP: Radford et al., arXiv 2103.00020), a row is compared only with rows of the other side, and its positives
are on that side. Pairs that are not compared, such as a row and itself, are *excluded*: they are neither in lse_i nor in P(i).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-12
"""The smallest norm by which a row is divided, as in ``torch.nn.functional.normalize``."""


def clop_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    prototypes: Tensor | None = None,
    *,
    n_views: int = 2,
    positives: str = "instance",
    temperature: float | Tensor = 0.1,
    prototype_weight: float = 1.0,
    distance: str = "cosine",
    reduction: str = "mean",
    normalize: bool = True,
    n_left: int | None = None,
    negatives_only: bool = False,
) -> Tensor:
    """The CLOP loss by its definition.

    The arguments are those of :func:`clop_kernels.clop_loss`. The last two, ``n_left`` and ``negatives_only``, are explained in
    :class:`clop_kernels.backends.contract.LossOptions`.

    Normalisation and the softmax run in float32 (float64 for float64 input). The matrix product runs in the dtype of
    ``embeddings``, or in that of autocast, as in plain PyTorch code.

    Returns:
        ``()`` for ``reduction`` "mean" and "sum", ``(V*B,)`` for "none"; float32, or float64 for float64 input.
    """
    n_rows = embeddings.shape[0]
    n_instances = n_rows // n_views
    precise = torch.promote_types(embeddings.dtype, torch.float32)
    rows = torch.arange(n_rows, device=embeddings.device)
    if labels is None:
        labels = torch.full((n_instances,), -1, device=embeddings.device)
    label = labels.repeat(n_views)
    is_labelled = label >= 0

    zhat = embeddings
    if normalize:
        zhat = torch.nn.functional.normalize(embeddings.to(precise), dim=1, eps=EPS).to(embeddings.dtype)
    similarity = (zhat @ zhat.T).to(precise) / temperature

    instance = rows % max(n_instances, 1)
    is_positive = instance[:, None] == instance[None, :]
    if positives == "label":
        is_positive = is_positive | ((label[:, None] == label[None, :]) & is_labelled[:, None])
    is_excluded = rows[:, None] == rows[None, :]
    if n_left is not None:
        is_excluded = is_excluded | ((rows < n_left)[:, None] == (rows < n_left)[None, :])
    is_positive = is_positive & ~is_excluded
    if negatives_only:
        is_excluded, is_positive = is_excluded | is_positive, torch.zeros_like(is_positive)
    has_none = is_excluded.all(1)
    n_positives = is_positive.sum(1)
    is_anchor = ~has_none if negatives_only else n_positives > 0

    # The mask is a factor and not a selection, so that a NaN anywhere in the matrix reaches the loss.
    if n_rows > 0:
        # A row without any pairs gets some finite number here; the mask below removes it.
        lse = similarity.masked_fill(is_excluded & ~has_none[:, None], -math.inf).logsumexp(1)
        contrastive = (lse - (similarity * is_positive).sum(1) / n_positives.clamp(min=1)) * is_anchor
    else:
        contrastive = similarity.sum(1)

    if prototypes is None:
        prototype = torch.zeros_like(contrastive)
    else:
        target = prototypes.to(precise)[label.clamp(min=0)]
        prototype = _distance(zhat.to(precise), target, distance) * is_labelled

    if reduction == "mean":
        mean_contrastive = contrastive.sum() / is_anchor.sum().clamp(min=1)
        return mean_contrastive + prototype_weight * prototype.sum() / is_labelled.sum().clamp(min=1)
    per_row = contrastive + prototype_weight * prototype
    return per_row.sum() if reduction == "sum" else per_row


def _distance(zhat: Tensor, target: Tensor, distance: str) -> Tensor:
    """The distance of each unit row to its own prototype: (N, D), (N, D) -> (N,)."""
    if distance == "cosine":
        return 1 - (zhat * target).sum(1)
    if distance == "euclidean":
        return torch.linalg.vector_norm(zhat - target, dim=1)
    return torch.linalg.vector_norm(zhat - target, ord=1, dim=1)
