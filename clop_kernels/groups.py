"""Positive groups: from labels and views to runs of rows, without a host synchronisation.

The positives of a row are the other rows of its group (:mod:`clop_kernels.reference`). With ``positives="instance"`` a group is
the V views of one instance. With ``positives="label"`` a group is all views of all instances with one label; each unlabelled
instance is a group of its own.

Rows are sorted by group, so that a group is a contiguous run, and a row's positives are next to it. In the similarity matrix the
positives are blocks along the diagonal. A tile off the diagonal holds positives only if a group reaches from the tile's rows to
its columns.

With two sides, the left side's positions come first, and each side is sorted by group. A row's positives are then a run of
positions on the other side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """The positives of N rows, sorted by group. Position k holds row ``order[k]`` of the input.

    Attributes:
        order: (N,) int64, the permutation that sorts the rows by side, then by group. The sort is stable, so equal inputs
            give equal orders.
        starts: (N,) int64, for each position the first position of its positive run. Without sides, the run is the row's own
            group and includes the row itself.
        ends: (N,) int64, for each position one past the last position of its positive run.
        size: the number of rows in every run, if all runs have one length that the host knows, else None.
        n_left: the number of rows on the left side; None without sides.
    """

    order: Tensor
    starts: Tensor
    ends: Tensor
    size: int | None
    n_left: int | None = None

    @property
    def n_positives(self) -> Tensor:
        """(N,) int64, n_i of each position: the length of its run, without the row itself."""
        return self.ends - self.starts - (1 if self.n_left is None else 0)

    def table(self) -> Tensor:
        """(3, N) int32: order, starts and ends."""
        return torch.stack([self.order, self.starts, self.ends]).to(torch.int32)

    @staticmethod
    def of_table(table: Tensor, n_left: int | None = None) -> Groups:
        """The inverse of :meth:`table`."""
        order, starts, ends = table.to(torch.int64).unbind()
        return Groups(order, starts, ends, None, n_left)


def instance_groups(n_instances: int, n_views: int, device: torch.device, n_left: int | None = None) -> Groups:
    """The groups of ``positives="instance"``: the V views of one instance are each other's positives.

    With sides, ``n_left`` is ``n_instances`` and there are two views: one on each side.
    """
    rows = torch.arange(n_views * n_instances, device=device)
    if n_left is not None:
        starts = rows.roll(n_left)
        return Groups(rows, starts, starts + 1, 1, n_left)
    order = rows.view(n_views, n_instances).T.reshape(-1)
    starts = rows - rows % n_views
    return Groups(order, starts, starts + n_views, n_views)


def label_groups(labels: Tensor, n_views: int, n_left: int | None = None) -> Groups:
    """The groups of ``positives="label"``, from (B,) int64 labels; a negative label means unlabelled.

    With sides, ``n_views`` is 1, and the first ``n_left`` labels are those of the left side.
    """
    n_instances = labels.shape[0]
    instance = torch.arange(n_instances, device=labels.device)
    key = torch.where(labels >= 0, labels, -1 - instance)  # an unlabelled instance gets a key that no other instance has
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
