"""Positive groups: from labels and views to dense group ids, counts and group sums, without a host synchronisation.

The positives of a row are the other rows of its group (:mod:`clop_kernels.reference`). A group is a set of
*instances*, each with its ``V`` views, so everything here works on ``B`` instances and not on ``V * B`` rows: with
``positives="instance"`` every instance is a group of its own; with ``positives="label"`` the instances of one label
are a group, and each unlabelled instance is again a group of its own.

Group sums replace the N x N mask of positives: ``sum_{p in P(i)} s_ip = zhat_i . (u_i - zhat_i) / tau``, with ``u_i``
the sum of ``zhat`` over the group of row ``i``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """The positive groups of ``B`` instances with ``V`` views each. ``G <= B`` groups exist, and ``G`` stays on the device.

    Attributes:
        n_views: V, the number of rows of each instance.
        ids: (B,) int64, the dense id in [0, G) of the group of each instance, or None where instance b is group b.
        order: (B,) int64, the instances sorted by group id (stable), or None as above.
        offsets: (B + 1,) int64, group g is ``order[offsets[g]:offsets[g + 1]]``; empty from G on. None as above.
        n_positives: (B,) int64, n_i of any row of the instance: the rows of its group less itself.
    """

    n_views: int
    ids: Tensor | None
    order: Tensor | None
    offsets: Tensor | None
    n_positives: Tensor

    def sums(self, rows: Tensor) -> Tensor:
        """Sums ``rows`` over groups: (V*B, D) -> (B, D), for each instance the sum over all rows of its group.

        The order of summation is fixed, so the result is the same from run to run on every device.
        """
        width = rows.shape[1]
        instances = rows.view(self.n_views, -1, width).sum(0)
        if self.ids is None or instances.shape[0] == 0:
            return instances
        # A segment sum over the sorted instances. Unlike index_add_, embedding_bag is parallel on a CPU and uses no
        # atomics on a GPU; it does not need the number of groups, since the bags beyond the last one are empty.
        assert self.order is not None and self.offsets is not None
        bags = torch.nn.functional.embedding_bag(self.order, instances, self.offsets[:-1], mode="sum")
        return torch.index_select(bags, 0, self.ids, out=instances)


def instance_groups(n_instances: int, n_views: int, device: torch.device) -> Groups:
    """The groups of ``positives="instance"``: the V views of one instance are each other's positives."""
    n_positives = torch.full((n_instances,), n_views - 1, dtype=torch.int64, device=device)
    return Groups(n_views, None, None, None, n_positives)


def label_groups(labels: Tensor, n_views: int) -> Groups:
    """The groups of ``positives="label"``: (B,) int64 labels, any value from 0 up; negative means unlabelled."""
    n_instances = labels.shape[0]
    instance = torch.arange(n_instances, device=labels.device)
    key = torch.where(labels >= 0, labels, -1 - instance)  # unlabelled: a key that no other instance has
    key, order = torch.sort(key, stable=True)
    is_first = torch.ones_like(key, dtype=torch.bool)
    torch.ne(key[1:], key[:-1], out=is_first[1:])
    sorted_ids = is_first.cumsum(0) - 1
    offsets = torch.searchsorted(sorted_ids, torch.arange(n_instances + 1, device=labels.device))
    ids = torch.empty_like(order).scatter_(0, order, sorted_ids)
    n_positives = n_views * (offsets[1:] - offsets[:-1])[ids] - 1
    return Groups(n_views, ids, order, offsets, n_positives)
