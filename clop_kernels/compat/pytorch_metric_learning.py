"""pytorch-metric-learning's losses: ``from clop_kernels.compat.pytorch_metric_learning import NTXentLoss, SupConLoss``.

Written against pytorch-metric-learning 2.9. Conventions: every label is an ordinary class, -1 too; a batch without positive or
without negative pairs has a loss of 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import clip_loss, clop_loss, negative_logsumexp
from ..groups import label_groups
from ._conventions import unsupported, without_special_labels

Reducer = Callable[[dict[str, Any], Tensor, Tensor], Tensor]


class _MetricLoss(nn.Module):
    """What both losses have in common: the arguments of the constructor and of the call.

    Args:
        temperature: tau > 0.
        distance: None, the library's CosineSimilarity() or its DotProductSimilarity().
        reducer: None, the loss's default, or one of the library's reducers.
        embedding_regularizer: None only.
        embedding_reg_weight: of no effect.
        collect_stats: of no effect; the library's default is not to.
        backend: as for :func:`clop_kernels.clop_loss`.
    """

    def __init__(
        self,
        temperature: float,
        *,
        distance: Any = None,
        reducer: Reducer | None = None,
        embedding_regularizer: Any = None,
        embedding_reg_weight: float = 1.0,
        collect_stats: bool | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if embedding_regularizer is not None:
            raise unsupported(
                "embedding_regularizer",
                embedding_regularizer,
                "there is none here",
                "Add its value to the loss in the training step",
            )
        self.temperature = temperature
        self.normalize = _is_normalizing(distance)
        self.reducer = reducer
        self.backend = backend

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """(N, D) embeddings and (N,) integer labels -> the loss, ().

        Args:
            embeddings: (N, D).
            labels: (N,) integers.
            indices_tuple: None only: the pairs of a miner may be any.
            ref_emb: (M, D), what the embeddings are compared with; None: each other.
            ref_labels: (M,) integers.

        Raises:
            NotImplementedError: for the pairs of a miner, and for references that share the very tensor of labels, where the
                library leaves out pair (i, i).
        """
        if indices_tuple is not None:
            raise unsupported("indices_tuple", "...", "pairs of a miner may be any", "Leave the miner out: all pairs take part")
        if labels is None:
            raise ValueError("labels=None: expected (N,) integers")
        if ref_emb is None:
            (labels,) = without_special_labels(labels)
            return self._reduced(embeddings, labels, None, None)
        if ref_labels is None:
            raise ValueError("ref_labels=None: expected (M,) integers, one for each row of ref_emb")
        if ref_labels is labels:
            raise unsupported("ref_labels", "labels", "one tensor for both says that (i, i) is no pair", "Pass labels.clone()")
        labels, ref_labels = without_special_labels(labels, ref_labels)
        return self._reduced(embeddings, labels, ref_emb, ref_labels)

    def _reduced(self, embeddings: Tensor, labels: Tensor, others: Tensor | None, other_labels: Tensor | None) -> Tensor:
        losses = self._losses(embeddings, labels, others, other_labels)
        of_others = labels if other_labels is None else other_labels
        if len(labels) * len(of_others) <= 2:  # the library takes one positive and one negative pair for none
            losses["losses"] = 0.0 * losses["losses"]
        return (
            self._default_reduction(losses["losses"])
            if self.reducer is None
            else self.reducer({"loss": losses}, embeddings, labels)
        )

    def _losses(self, embeddings: Tensor, labels: Tensor, others: Tensor | None, other_labels: Tensor | None) -> dict[str, Any]:
        """In the form that the library's reducers take."""
        raise NotImplementedError

    def _default_reduction(self, losses: Tensor) -> Tensor:
        raise NotImplementedError


def _is_normalizing(distance: Any) -> bool:
    if distance is None:
        return True
    is_product = type(distance).__name__ in ("CosineSimilarity", "DotProductSimilarity")
    if not is_product or (distance.p, distance.power) != (2, 1):
        raise unsupported(
            "distance", distance, "rows are compared by their product", "Take CosineSimilarity() or DotProductSimilarity()"
        )
    return bool(distance.normalize_embeddings)


def _has_negatives(labels: Tensor, of_others: Tensor) -> Tensor:
    """(N,) whether a row of another label is there."""
    if of_others.numel() == 0:
        return torch.zeros_like(labels, dtype=torch.bool)
    lowest, highest = of_others.aminmax()
    return (labels != lowest) | (labels != highest)


class SupConLoss(_MetricLoss):
    """A row's loss is the mean of -log(exp s_ap / the sum of exp s_aj over all others) over its positives p; then the mean over
    rows whose loss is > 0. Options and call: :class:`_MetricLoss`.
    """

    def __init__(self, temperature: float = 0.1, **options: Any) -> None:
        super().__init__(temperature, **options)

    def _losses(self, embeddings: Tensor, labels: Tensor, others: Tensor | None, other_labels: Tensor | None) -> dict[str, Any]:
        options: dict[str, Any] = {
            "temperature": self.temperature, "normalize": self.normalize, "reduction": "none", "backend": self.backend
        }  # fmt: skip
        if others is None:
            terms = clop_loss(embeddings, labels, n_views=1, positives="label", **options)
        else:
            terms = clip_loss(embeddings, others, labels, other_labels, **options)[: len(labels)]
        any_negatives = _has_negatives(labels, labels if other_labels is None else other_labels).any()
        return {
            "losses": torch.where(any_negatives, terms, 0.0),
            "indices": torch.arange(len(labels), device=labels.device),
            "reduction_type": "element",
        }

    def _default_reduction(self, losses: Tensor) -> Tensor:
        counts = ~(losses <= 0)  # a NaN counts, so that it shows
        return torch.where(counts, losses, 0.0).sum() / counts.sum().clamp(min=1)


class NTXentLoss(_MetricLoss):
    """One term for each positive pair (a, p): -log(exp s_ap / (exp s_ap + the sum of exp s_an over negatives)); their mean.

    The sums over negatives take O(N D) memory; the P positive pairs are enumerated, which takes O(P D) memory and a
    synchronisation with a GPU. :class:`clop_kernels.NTXentLoss` is SimCLR's, and the same where each row has one positive.
    Options and call: :class:`_MetricLoss`.
    """

    def __init__(self, temperature: float = 0.07, **options: Any) -> None:
        super().__init__(temperature, **options)

    def _losses(self, embeddings: Tensor, labels: Tensor, others: Tensor | None, other_labels: Tensor | None) -> dict[str, Any]:
        negatives = negative_logsumexp(
            embeddings,
            labels,
            others,
            other_labels,
            temperature=self.temperature,
            normalize=self.normalize,
            backend=self.backend,
        )
        anchors, positives = positive_pairs(labels, other_labels)
        rows = self._rows(embeddings)
        other_rows = rows if others is None else self._rows(others)
        similarity = torch.linalg.vecdot(rows[anchors], other_rows[positives]) / self.temperature
        is_compared = _has_negatives(labels, labels if other_labels is None else other_labels)
        losses = torch.where(is_compared[anchors], F.softplus(negatives[anchors] - similarity), 0.0)
        return {"losses": losses, "indices": (anchors, positives), "reduction_type": "pos_pair"}

    def _rows(self, embeddings: Tensor) -> Tensor:
        """As the sums over negatives see them: rounded to the dtype of the embeddings."""
        precise = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        return F.normalize(precise, dim=1).to(embeddings.dtype).to(precise.dtype) if self.normalize else precise

    def _default_reduction(self, losses: Tensor) -> Tensor:
        return losses.sum() / max(losses.numel(), 1)


def positive_pairs(labels: Tensor, other_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(P,) anchors and (P,) positives: the pairs of rows, or of a row and another side's row, with the same label."""
    n_left = None if other_labels is None else len(labels)
    groups = label_groups(labels if other_labels is None else torch.cat([labels, other_labels]), 1, n_left)
    starts, sizes = groups.starts[:n_left], (groups.ends - groups.starts)[:n_left]
    before = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    position = torch.repeat_interleave(torch.arange(len(sizes), device=labels.device), sizes)
    positive = torch.arange(len(position), device=labels.device) - before + starts[position]
    anchors, positives = groups.order[position], groups.order[positive]
    if n_left is not None:
        return anchors, positives - n_left
    is_pair = position != positive
    return anchors[is_pair], positives[is_pair]
