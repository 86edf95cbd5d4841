"""pytorch-metric-learning's losses: ``from clop_kernels.compat.pytorch_metric_learning import NTXentLoss, SupConLoss``.

Written against pytorch-metric-learning 2.9. Conventions: every label is an ordinary class, -1 too; a batch without positive or
without negative pairs has a loss of 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..functional import clip_loss, clop_loss, negative_logsumexp
from ..groups import label_groups
from ._conventions import unsupported, without_special_labels

Reducer = Callable[[dict[str, Any], Tensor, Tensor], Tensor]


class _MetricLoss(nn.Module, ABC):
    """What both losses have in common: the arguments of the constructor and of the call.

    Args:
        temperature: tau > 0.
        distance: None, the library's CosineSimilarity() or its DotProductSimilarity().
        reducer: None, the loss's default, or one of the library's reducers.
        embedding_regularizer: None only.
        embedding_reg_weight: the weight of that regularizer, so of no effect.
        collect_stats: None or False only.
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
        if collect_stats:
            raise unsupported("collect_stats", collect_stats, "there are no statistics here", "Leave it out, as the library does")
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
        of_others = labels if other_labels is None else other_labels
        # The library takes one positive and one negative pair for none.
        factor = 0.0 if len(labels) * len(of_others) <= 2 else 1.0
        if self.reducer is None:
            return factor * self._mean(embeddings, labels, others, other_labels)
        losses = self._losses(embeddings, labels, others, other_labels)
        losses["losses"] = factor * losses["losses"]
        return self.reducer({"loss": losses}, embeddings, labels)

    @abstractmethod
    def _losses(self, embeddings: Tensor, labels: Tensor, others: Tensor | None, other_labels: Tensor | None) -> dict[str, Any]:
        """One loss for each row or pair, in the form that the library's reducers take."""

    @abstractmethod
    def _mean(self, embeddings: Tensor, labels: Tensor, others: Tensor | None, other_labels: Tensor | None) -> Tensor:
        """What the loss's default reducer makes of them."""


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

    def _mean(self, embeddings: Tensor, labels: Tensor, others: Tensor | None, other_labels: Tensor | None) -> Tensor:
        losses = self._losses(embeddings, labels, others, other_labels)["losses"]
        counts = ~(losses <= 0)  # a NaN counts, so that it shows
        return torch.where(counts, losses, 0.0).sum() / counts.sum().clamp(min=1)


class NTXentLoss(_MetricLoss):
    """One term for each positive pair (a, p): -log(exp s_ap / (exp s_ap + the sum of exp s_an over negatives)); their mean.

    The slow one. The sums over negatives are fused; the positives take a second pass in plain PyTorch, over tiles of T rows that
    hold the rows' whole classes, of C rows, and are made again in the backward pass: memory O(N D + T C), and one synchronisation
    with a GPU. A reducer of the library takes O(P) memory beside, for P positive pairs. Where each row has one positive,
    :class:`clop_kernels.NTXentLoss`, SimCLR's, is the same loss without all that.

    Options and call: :class:`_MetricLoss`.
    """

    def __init__(self, temperature: float = 0.07, **options: Any) -> None:
        super().__init__(temperature, **options)

    def _losses(self, embeddings: Tensor, labels: Tensor, others: Tensor | None, other_labels: Tensor | None) -> dict[str, Any]:
        losses, anchors, positives = [], [], []
        for tile in self._tiles(embeddings, labels, others, other_labels):
            row, column = tile.mask().nonzero(as_tuple=True)
            losses.append(tile.losses()[row, column])
            anchors.append(tile.row_names[row])
            positives.append(tile.column_names[column])
        return {"losses": torch.cat(losses), "indices": (torch.cat(anchors), torch.cat(positives)), "reduction_type": "pos_pair"}

    def _mean(self, embeddings: Tensor, labels: Tensor, others: Tensor | None, other_labels: Tensor | None) -> Tensor:
        tiles = self._tiles(embeddings, labels, others, other_labels)
        sums, counts = zip(*((checkpoint(tile.sum, use_reentrant=False), tile.count()) for tile in tiles), strict=True)
        return torch.stack(sums).sum() / torch.stack(counts).sum().clamp(min=1)

    def _tiles(
        self, embeddings: Tensor, labels: Tensor, others: Tensor | None, other_labels: Tensor | None
    ) -> Iterator[_PositiveTile]:
        """The rows sorted by label, some at a time, with all columns that hold positives of theirs. One tile at least."""
        negatives = negative_logsumexp(
            embeddings,
            labels,
            others,
            other_labels,
            temperature=self.temperature,
            normalize=self.normalize,
            backend=self.backend,
        )
        # exp of this is 0: what a row without negatives has in its denominators beside the positive.
        is_compared = _has_negatives(labels, labels if other_labels is None else other_labels)
        negatives = torch.where(is_compared, negatives, -torch.inf)
        n_rows = len(labels)
        if others is None or other_labels is None:
            groups, first_column, of_columns = label_groups(labels, 1), 0, embeddings
        else:
            groups, first_column, of_columns = label_groups(torch.cat([labels, other_labels]), 1, n_rows), n_rows, others
        row_names, column_names = groups.order[:n_rows], groups.order[first_column:] - first_column
        rows, columns = self._rows(embeddings)[row_names], self._rows(of_columns)[column_names]
        starts, ends = groups.starts[:n_rows] - first_column, groups.ends[:n_rows] - first_column
        # Both are sorted: the start of a tile's first row and the end of its last are those of the tile.
        last = torch.arange(ROWS_AT_A_TIME, n_rows + ROWS_AT_A_TIME, ROWS_AT_A_TIME, device=labels.device).clamp(max=n_rows) - 1
        bounds = torch.stack([starts[::ROWS_AT_A_TIME], ends[last]]).T.tolist()  # what synchronises
        for index, (begin, end) in enumerate(bounds or [(0, 0)]):
            first = index * ROWS_AT_A_TIME
            some = slice(first, first + ROWS_AT_A_TIME)
            yield _PositiveTile(
                rows[some],
                columns[begin:end],
                negatives[row_names[some]],
                self.temperature,
                starts[some] - begin,
                ends[some] - begin,
                first - begin if others is None else None,
                row_names[some],
                column_names[begin:end],
            )

    def _rows(self, embeddings: Tensor) -> Tensor:
        """As the sums over negatives see them: rounded to the dtype of the embeddings."""
        precise = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        return F.normalize(precise, dim=1).to(embeddings.dtype).to(precise.dtype) if self.normalize else precise


ROWS_AT_A_TIME = 512


@dataclass(frozen=True)
class _PositiveTile:
    """R rows against C columns, among them all positives of the rows.

    Attributes:
        rows, columns: (R, D) and (C, D), as they are compared.
        negatives: (R,), log sum exp over the negatives of each row.
        starts, ends: (R,), the run of columns of each row's class.
        itself: the column that is the first row, as the next is the next one; None where rows and columns differ.
        row_names, column_names: (R,) and (C,), their indices in the user's tensors.
    """

    rows: Tensor
    columns: Tensor
    negatives: Tensor
    temperature: float
    starts: Tensor
    ends: Tensor
    itself: int | None
    row_names: Tensor
    column_names: Tensor

    def mask(self) -> Tensor:
        """(R, C), the positive pairs."""
        column = torch.arange(len(self.columns), device=self.rows.device)
        mask = (self.starts[:, None] <= column) & (column < self.ends[:, None])
        if self.itself is not None:
            mask &= torch.arange(self.itself, self.itself + len(self.rows), device=column.device)[:, None] != column
        return mask

    def count(self) -> Tensor:
        """How many they are."""
        return (self.ends - self.starts).sum() - (0 if self.itself is None else len(self.rows))

    def losses(self) -> Tensor:
        """(R, C); of pairs that are not in the mask, any number."""
        return F.softplus(self.negatives[:, None] - self.rows @ self.columns.T / self.temperature)

    def sum(self) -> Tensor:
        return torch.where(self.mask(), self.losses(), 0.0).sum()
