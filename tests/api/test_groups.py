"""Positive groups: sorted order and runs, against Python dictionaries."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clop_kernels.groups import Groups, instance_groups, label_groups

LABELS = st.lists(st.integers(-1, 5) | st.sampled_from([2**62, 10**9, 63]), max_size=20)


def check(groups: Groups, keys: list[object]) -> None:
    """``keys[i]`` names the group of row i; the groups must say the same."""
    order, starts, ends = groups.order.tolist(), groups.starts.tolist(), groups.ends.tolist()
    assert sorted(order) == list(range(len(keys)))
    sizes = Counter(keys)
    for position, row in enumerate(order):
        assert starts[position] <= position < ends[position]
        run = [keys[i] for i in order[starts[position] : ends[position]]]
        assert run == [keys[row]] * sizes[keys[row]]
    assert groups.n_positives.tolist() == [sizes[keys[i]] - 1 for i in order]
    restored = Groups.of_table(groups.table())
    assert (restored.order.tolist(), restored.starts.tolist(), restored.ends.tolist()) == (order, starts, ends)


@given(labels=LABELS, n_views=st.integers(1, 4))
def test_label_groups(labels: list[int], n_views: int) -> None:
    n = len(labels)
    groups = label_groups(torch.tensor(labels, dtype=torch.int64), n_views)
    check(groups, [("label", labels[i % n]) if labels[i % n] >= 0 else ("instance", i % n) for i in range(n * n_views)])
    assert groups.size is None


@pytest.mark.parametrize("n_views", [1, 2, 5])
@pytest.mark.parametrize("n_instances", [0, 1, 7])
def test_instance_groups(n_instances: int, n_views: int) -> None:
    groups = instance_groups(n_instances, n_views, torch.device("cpu"))
    check(groups, [i % n_instances for i in range(n_instances * n_views)])
    assert groups.size == n_views


def check_sides(groups: Groups, keys: list[object], n_left: int) -> None:
    """``keys[i]`` names the group of row i; its positives are the rows of that group on the other side."""
    order, starts, ends = groups.order.tolist(), groups.starts.tolist(), groups.ends.tolist()
    assert sorted(order[:n_left]) == list(range(n_left))
    assert sorted(order[n_left:]) == list(range(n_left, len(keys)))
    for position, row in enumerate(order):
        other = range(n_left, len(keys)) if row < n_left else range(n_left)
        expected = {i for i in other if keys[i] == keys[row]}
        assert {order[k] for k in range(starts[position], ends[position])} == expected
        assert groups.n_positives[position] == len(expected)
    assert starts[:n_left] == sorted(starts[:n_left])  # so that a tile can be told by its first and last row
    assert ends[n_left:] == sorted(ends[n_left:])
    restored = Groups.of_table(groups.table(), n_left)
    assert (restored.order.tolist(), restored.starts.tolist(), restored.ends.tolist()) == (order, starts, ends)
    assert torch.equal(restored.n_positives, groups.n_positives)


@given(labels=LABELS, share=st.floats(0, 1))
def test_two_sided_label_groups(labels: list[int], share: float) -> None:
    n_left = round(share * len(labels))
    groups = label_groups(torch.tensor(labels, dtype=torch.int64), 1, n_left)
    check_sides(groups, [label if label >= 0 else ("row", i) for i, label in enumerate(labels)], n_left)


@pytest.mark.parametrize("n", [0, 1, 7])
def test_two_sided_instance_groups(n: int) -> None:
    check_sides(instance_groups(n, 2, torch.device("cpu"), n), [*range(n), *range(n)], n)


def test_order_is_stable() -> None:
    groups = label_groups(torch.tensor([3, -1, 3, 0]), 2)
    assert groups.order.tolist() == [1, 5, 3, 7, 0, 4, 2, 6]
