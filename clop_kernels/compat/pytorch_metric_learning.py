"""Losses of pytorch-metric-learning: ``from clop_kernels.compat.pytorch_metric_learning import NTXentLoss, SupConLoss``.

Written for pytorch-metric-learning 2.9. Conventions of the library: every label is an ordinary class, including -1. A batch
without positive pairs, or without negative pairs, has the loss 0.
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
    """The part that both losses share: the arguments of the constructor and of the call.

    Args:
        temperature: tau > 0.
        distance: the library's CosineSimilarity() or DotProductSimilarity(). None: CosineSimilarity().
        reducer: one of the library's reducers. None: the default of the loss.
        embedding_regularizer: only None is supported.
        embedding_reg_weight: the weight of that regularizer; has no effect.
        collect_stats: only None and False are supported.
        backend: "cuda", "triton", "cpu", "tiled" or "reference". None takes the fastest one that can run here.

    Raises:
        NotImplementedError: for another distance, a regularizer or statistics.
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
                "there are no regularizers here",
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
        """The loss of a batch of embeddings and their labels.

        Args:
            embeddings: (N, D), float64, float32, float16 or bfloat16.
            labels: (N,) integers, one label for each row.
            indices_tuple: only None is supported, because the pairs of a miner are arbitrary.
            ref_emb: (M, D), the rows that the embeddings are compared with. None: the embeddings are compared with each other.
            ref_labels: (M,) integers, required with ``ref_emb``.

        Returns:
            A tensor of shape (), or the result of ``reducer``; float32, or float64 for float64 embeddings.

        Raises:
            NotImplementedError: for the pairs of a miner. Also if ``ref_labels`` is the same tensor as ``labels``: the library
                then leaves out the pairs (i, i).
            TypeError, ValueError: the message names the argument, its value and what was expected.
        """
        if indices_tuple is not None:
            raise unsupported(
                "indices_tuple", "...", "the pairs of a miner are arbitrary", "Leave the miner out: all pairs take part"
            )
        if labels is None:
            raise ValueError("labels=None: expected (N,) integers")
        if ref_emb is None:
            (labels,) = without_special_labels(labels)
            return self._reduced(embeddings, labels, None, None)
        if ref_labels is None:
            raise ValueError("ref_labels=None: expected (M,) integers, one for each row of ref_emb")
        if ref_labels is labels:
            raise unsupported(
                "ref_labels", "labels", "the same tensor for both would mean that (i, i) is no pair", "Pass labels.clone()"
            )
        labels, ref_labels = without_special_labels(labels, ref_labels)
        return self._reduced(embeddings, labels, ref_emb, ref_labels)

    def _reduced(self, embeddings: Tensor, labels: Tensor, others: Tensor | None, other_labels: Tensor | None) -> Tensor:
        of_others = labels if other_labels is None else other_labels
        # With only one positive and one negative pair, the library returns 0.
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
        """The result of the default reducer for the losses of :meth:`_losses`."""


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
    """(N,) bool: whether a row with another label exists."""
    if of_others.numel() == 0:
        return torch.zeros_like(labels, dtype=torch.bool)
    lowest, highest = of_others.aminmax()
    return (labels != lowest) | (labels != highest)


class SupConLoss(_MetricLoss):
    """SupCon as in pytorch-metric-learning: the mean over the rows whose loss is above 0.

    The loss of row a is the mean, over its positives p, of -log(exp s_ap / sum_j exp s_aj); j runs over all other rows.

    Args:
        temperature: tau > 0.
        options: the keyword arguments distance, reducer, embedding_regularizer, embedding_reg_weight, collect_stats and backend,
            as in the library. ``distance`` is the library's CosineSimilarity() or DotProductSimilarity(); None means the first.
            ``reducer`` is None or one of the library's reducers. A regularizer and statistics are not supported. ``backend`` is
            as for :func:`clop_kernels.clop_loss`.
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
        counts = ~(losses <= 0)  # a NaN counts too, so that it reaches the loss
        return torch.where(counts, losses, 0.0).sum() / counts.sum().clamp(min=1)


class NTXentLoss(_MetricLoss):
    """NT-Xent as in pytorch-metric-learning: the mean over all positive pairs.

    The term of a positive pair (a, p) is -log(exp s_ap / (exp s_ap + sum_n exp s_an)); n runs over the negatives of a.

    This loss is slower than the others. Only the sums over negatives are fused. The positives take a second pass in
    plain PyTorch, over tiles of T rows against the whole classes of these rows, up to C rows. The backward pass
    computes the tiles again. This takes O(N D + T C) memory and one synchronisation with a GPU. A reducer of the
    library takes another O(P) memory for P positive pairs. If each row has exactly one positive,
    :class:`clop_kernels.NTXentLoss` is the same loss without these costs.

    Args:
        temperature: tau > 0.
        options: the keyword arguments distance, reducer, embedding_regularizer, embedding_reg_weight, collect_stats and backend,
            as in the library. ``distance`` is the library's CosineSimilarity() or DotProductSimilarity(); None means the first.
            ``reducer`` is None or one of the library's reducers. A regularizer and statistics are not supported. ``backend`` is
            as for :func:`clop_kernels.clop_loss`.
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
        """Yields tiles of the rows, sorted by label, with all columns that hold their positives. There is at least one tile."""
        negatives = negative_logsumexp(
            embeddings,
            labels,
            others,
            other_labels,
            temperature=self.temperature,
            normalize=self.normalize,
            backend=self.backend,
        )
        # A row without negatives gets -inf, whose exp is 0: its denominators hold only the positive.
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
        # Starts and ends are sorted, so a tile's columns begin at the start of its first row and end at the end of its last row.
        last = torch.arange(ROWS_AT_A_TIME, n_rows + ROWS_AT_A_TIME, ROWS_AT_A_TIME, device=labels.device).clamp(max=n_rows) - 1
        bounds = torch.stack([starts[::ROWS_AT_A_TIME], ends[last]]).T.tolist()  # synchronises with the device
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
        """The rows as the sums over negatives use them: rounded to the dtype of the embeddings."""
        precise = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        return F.normalize(precise, dim=1).to(embeddings.dtype).to(precise.dtype) if self.normalize else precise


ROWS_AT_A_TIME = 512


@dataclass(frozen=True)
class _PositiveTile:
    """R rows against C columns, which include all positives of the rows.

    Attributes:
        rows, columns: (R, D) and (C, D), in the form in which they are compared.
        negatives: (R,), log sum exp over the negatives of each row.
        starts, ends: (R,), the bounds of the columns with each row's label.
        itself: the column that is the same row as the tile's first row; the next column is the second row, and so on. None if
            rows and columns come from different tensors.
        row_names, column_names: (R,) and (C,), the indices in the user's tensors.
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
        """The number of positive pairs."""
        return (self.ends - self.starts).sum() - (0 if self.itself is None else len(self.rows))

    def losses(self) -> Tensor:
        """(R, C), the losses of the pairs; pairs outside the mask have arbitrary values."""
        return F.softplus(self.negatives[:, None] - self.rows @ self.columns.T / self.temperature)

    def sum(self) -> Tensor:
        return torch.where(self.mask(), self.losses(), 0.0).sum()
