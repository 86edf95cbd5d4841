"""Positive groups: from labels and views to runs of rows, without a host synchronisation.

The positives of a row are the other rows of its group (:mod:`clop_kernels.reference`). With ``positives="instance"`` the
V views of one instance are a group; with ``positives="label"`` all views of all instances of one label are, and each
unlabelled instance is a group of its own.

Rows are put into the order of their groups, so that a group is a contiguous run and the positives of a row lie next to
it: in the matrix of similarities they are blocks along the diagonal, and a tile off the diagonal holds none of them
unless a group reaches from its rows to its columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """The positive groups of N = V * B rows, sorted by group. Position k is row ``order[k]`` of the input.

    Attributes:
        order: (N,) int64, a permutation of the rows that sorts them by group; stable, so the same from run to run.
        starts: (N,) int64, the first position of the group that each position is in: names the group.
        ends: (N,) int64, one past its last position.
        size: the number of rows in every group where the host knows it, else None.
    """

    order: Tensor
    starts: Tensor
    ends: Tensor
    size: int | None

    @property
    def n_positives(self) -> Tensor:
        """(N,) int64, n_i of each position: the rows of its group less itself."""
        return self.ends - self.starts - 1

    def table(self) -> Tensor:
        """(3, N) int32: order, starts, ends."""
        return torch.stack([self.order, self.starts, self.ends]).to(torch.int32)

    @staticmethod
    def of_table(table: Tensor) -> Groups:
        """The inverse of :meth:`table`."""
        order, starts, ends = table.to(torch.int64).unbind()
        return Groups(order, starts, ends, None)


def instance_groups(n_instances: int, n_views: int, device: torch.device) -> Groups:
    """``positives="instance"``: the V views of one instance are each other's positives."""
    rows = torch.arange(n_views * n_instances, device=device)
    order = rows.view(n_views, n_instances).T.reshape(-1)
    starts = rows - rows % n_views
    return Groups(order, starts, starts + n_views, n_views)


def label_groups(labels: Tensor, n_views: int) -> Groups:
    """``positives="label"``: (B,) int64 labels, of any value from 0 up; negative means unlabelled."""
    n_instances = labels.shape[0]
    instance = torch.arange(n_instances, device=labels.device)
    key = torch.where(labels >= 0, labels, -1 - instance)  # unlabelled: a key that no other instance has
    key, order = torch.sort(key, stable=True)
    view_offsets = n_instances * torch.arange(n_views, device=labels.device)
    return Groups(
        (order[:, None] + view_offsets).reshape(-1),
        (n_views * torch.searchsorted(key, key)).repeat_interleave(n_views),
        (n_views * torch.searchsorted(key, key, right=True)).repeat_interleave(n_views),
        None,
    )
