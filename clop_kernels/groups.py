"""Positive groups: from labels and views to dense group ids and counts, without a host synchronisation.

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
        ids: (N,) int64, the dense group id of each position, non-decreasing from 0.
        n_positives: (N,) int64, n_i of each position: the rows of its group less itself.
        size: the number of rows in every group where the host knows it, else None.
    """

    order: Tensor
    ids: Tensor
    n_positives: Tensor
    size: int | None


def instance_groups(n_instances: int, n_views: int, device: torch.device) -> Groups:
    """``positives="instance"``: the V views of one instance are each other's positives."""
    rows = torch.arange(n_views * n_instances, device=device)
    order = rows.view(n_views, n_instances).T.reshape(-1)
    ids = rows.div(n_views, rounding_mode="floor")
    return Groups(order, ids, torch.full_like(rows, n_views - 1), n_views)


def label_groups(labels: Tensor, n_views: int) -> Groups:
    """``positives="label"``: (B,) int64 labels, of any value from 0 up; negative means unlabelled."""
    n_instances = labels.shape[0]
    instance = torch.arange(n_instances, device=labels.device)
    key = torch.where(labels >= 0, labels, -1 - instance)  # unlabelled: a key that no other instance has
    key, order = torch.sort(key, stable=True)
    is_first = torch.ones_like(key, dtype=torch.bool)
    torch.ne(key[1:], key[:-1], out=is_first[1:])
    ids = is_first.cumsum(0) - 1
    # Group g is positions starts[g] to starts[g + 1]; how many groups there are stays on the device: B + 1 is enough.
    starts = torch.searchsorted(ids, torch.arange(n_instances + 1, device=labels.device))
    n_positives = n_views * (starts[1:] - starts[:-1])[ids] - 1
    view_offsets = n_instances * torch.arange(n_views, device=labels.device)
    return Groups(
        (order[:, None] + view_offsets).reshape(-1),
        ids.repeat_interleave(n_views),
        n_positives.repeat_interleave(n_views),
        None,
    )
