"""Positive groups: from labels and views to runs of rows, without a host synchronisation.

The positives of a row are the other rows of its group (:mod:`clop_kernels.reference`). With ``positives="instance"`` the
V views of one instance are a group; with ``positives="label"`` all views of all instances of one label are, and each
unlabelled instance is a group of its own.

Rows are put into the order of their groups, so that a group is a contiguous run and the positives of a row lie next to
it: in the matrix of similarities they are blocks along the diagonal, and a tile off the diagonal holds none of them
unless a group reaches from its rows to its columns.

Rows of two sides keep them apart: the left side's positions come first, and each side is sorted by group, so that the positives
of a row are a run of the other side's positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """The positives of N rows, sorted by group. Position k is row ``order[k]`` of the input.

    Attributes:
        order: (N,) int64, a permutation of the rows that sorts them by group, and before that by side; stable, so the same from
            run to run.
        starts: (N,) int64, the first position of the run that holds the positives of each position. Without sides that is its
            own group, itself included.
        ends: (N,) int64, one past the last position of that run.
        size: the number of rows in every run where the host knows it, else None.
        n_left: how many rows are on the left side; None without sides.
    """

    order: Tensor
    starts: Tensor
    ends: Tensor
    size: int | None
    n_left: int | None = None

    @property
    def n_positives(self) -> Tensor:
        """(N,) int64, n_i of each position: the rows of its run less itself."""
        return self.ends - self.starts - (1 if self.n_left is None else 0)

    def table(self) -> Tensor:
        """(3, N) int32: order, starts, ends."""
        return torch.stack([self.order, self.starts, self.ends]).to(torch.int32)

    @staticmethod
    def of_table(table: Tensor, n_left: int | None = None) -> Groups:
        """The inverse of :meth:`table`."""
        order, starts, ends = table.to(torch.int64).unbind()
        return Groups(order, starts, ends, None, n_left)


def instance_groups(n_instances: int, n_views: int, device: torch.device, n_left: int | None = None) -> Groups:
    """``positives="instance"``: the V views of one instance are each other's positives.

    With ``n_left`` = ``n_instances``, of two views: each is on a side of its own.
    """
    rows = torch.arange(n_views * n_instances, device=device)
    if n_left is not None:
        starts = rows.roll(n_left)
        return Groups(rows, starts, starts + 1, 1, n_left)
    order = rows.view(n_views, n_instances).T.reshape(-1)
    starts = rows - rows % n_views
    return Groups(order, starts, starts + n_views, n_views)


def label_groups(labels: Tensor, n_views: int, n_left: int | None = None) -> Groups:
    """``positives="label"``: (B,) int64 labels, of any value from 0 up; negative means unlabelled.

    With ``n_left`` of one view: the first labels are those of the left side.
    """
    n_instances = labels.shape[0]
    instance = torch.arange(n_instances, device=labels.device)
    key = torch.where(labels >= 0, labels, -1 - instance)  # unlabelled: a key that no other instance has
    if n_left is not None:
        return _two_sided_groups(key, n_left)
    key, order = torch.sort(key, stable=True)
    view_offsets = n_instances * torch.arange(n_views, device=labels.device)
    return Groups(
        (order[:, None] + view_offsets).reshape(-1),
        (n_views * torch.searchsorted(key, key)).repeat_interleave(n_views),
        (n_views * torch.searchsorted(key, key, right=True)).repeat_interleave(n_views),
        None,
    )


def _two_sided_groups(key: Tensor, n_left: int) -> Groups:
    left, left_order = torch.sort(key[:n_left], stable=True)
    right, right_order = torch.sort(key[n_left:], stable=True)

    def bounds(after_equals: bool) -> Tensor:
        of_left = n_left + torch.searchsorted(right, left, right=after_equals)
        return torch.cat([of_left, torch.searchsorted(left, right, right=after_equals)])

    return Groups(torch.cat([left_order, n_left + right_order]), bounds(False), bounds(True), None, n_left)
