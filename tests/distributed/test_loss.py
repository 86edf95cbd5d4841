"""The loss over a process group, against one process that has all rows: worlds of 1 to 4 gloo processes on this CPU."""

from __future__ import annotations

import copy
import gc
import itertools
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

import clop_kernels
from benchmarks.distributed import counted
from clop_kernels import backends, compat
from clop_kernels.backends.contract import POSITIVES, REDUCTIONS

from ..support.oracle import (
    RUNNABLE,
    Problem,
    assert_close_to_reference,
    near_duplicates,
    random_problem,
    relative_error,
    two_sided_problem,
)
from ..support.world import World

TRITON = next(b for b in backends.BACKENDS if b.name == "triton").obstacle(torch.device("cpu"), torch.float32) is None

Parts = tuple[int, ...]
"""How many instances each rank has; of two sides pairs, or with labels rows of the left side."""


# ---- a problem in parts ------------------------------------------------------------------------------------------------


def rows_of_parts(problem: Problem, parts: Parts) -> list[Tensor]:
    """Of each rank the rows of the whole that it has, in its own order."""
    n_left = problem.options.get("n_left")
    n_rows = problem.embeddings.shape[0]
    if n_left is None:
        n_views = problem.options["n_views"]
        rows = torch.arange(n_rows).view(n_views, n_rows // n_views)
        return [part.reshape(-1) for part in rows.split(parts, dim=1)]
    left, right = torch.arange(n_left).split(parts), torch.arange(n_left, n_rows)
    if problem.labels is None:
        return [torch.cat(sides) for sides in zip(left, right.split(parts), strict=True)]
    # Left rows as the parts say, right ones the other way round: sides of one rank are of unequal length.
    backwards = [len(right) - sum(parts[1:]), *parts[1:]] if len(right) >= sum(parts[1:]) else None
    assert backwards is not None
    return [torch.cat(sides) for sides in zip(left, right.split(backwards[::-1]), strict=True)]


def solve_part(
    group: distributed.ProcessGroup,
    problem: Problem,
    all_rows: list[Tensor],
    backend: str,
    dtype: torch.dtype,
    sharding: dict[str, Any],
    device: str = "cpu",
) -> dict[str, Tensor]:
    """On one rank: the loss, and the gradients of what the rank has."""
    rows = all_rows[distributed.get_rank(group)]
    z = problem.embeddings[rows].to(device, dtype).requires_grad_()
    precise = torch.promote_types(dtype, torch.float32)
    tau = torch.tensor(problem.temperature, dtype=precise, device=device, requires_grad=True)
    inputs = {"embeddings": z, "temperature": tau}
    prototypes = problem.prototypes
    if prototypes is not None:
        prototypes = inputs["prototypes"] = prototypes.to(device, precise).requires_grad_()
    options: dict[str, Any] = dict(problem.options)
    n_left = options.pop("n_left", None)
    n_instances = problem.embeddings.shape[0] // options["n_views"]
    labels = None if problem.labels is None else problem.labels[rows[: len(rows) // options["n_views"]] % n_instances].to(device)
    if n_left is None:
        loss = clop_kernels.clop_loss(z, labels, prototypes, temperature=tau, backend=backend, group=group, **options, **sharding)
    else:
        n = int((rows < n_left).sum())
        left_labels, right_labels = (None, None) if labels is None else (labels[:n], labels[n:])
        options = {name: options[name] for name in ("reduction", "normalize") if name in options}
        loss = clop_kernels.clip_loss(
            z[:n], z[n:], left_labels, right_labels, temperature=tau, backend=backend, group=group, **options, **sharding
        )
    upstream = torch.ones(())
    if loss.dim():
        upstream = torch.randn(problem.embeddings.shape[0], generator=torch.Generator().manual_seed(7))[rows]
    grads = torch.autograd.grad(loss, list(inputs.values()), upstream.to(loss))
    return {"loss": loss.detach().cpu()} | {name: grad.cpu() for name, grad in zip(inputs, grads, strict=True)}


def solve(
    ranks: World, problem: Problem, parts: Parts, backend: str, dtype: torch.dtype, device: str = "cpu", **sharding: Any
) -> dict[str, Tensor]:
    """The problem on as many ranks as there are parts, put together as the solution of one process; in float64.

    Each rank's gradients are divided by what grad_scale says they are multiplied by.
    """
    rows = rows_of_parts(problem, parts)
    solutions = ranks.run(len(parts), solve_part, problem, rows, backend, dtype, sharding, device)
    is_scalar = problem.options.get("reduction", "mean") != "none"
    scale = len(parts) if is_scalar and sharding.get("grad_scale", "ddp") == "ddp" else 1
    everyone = torch.cat(rows)
    assert torch.equal(everyone.sort().values, torch.arange(problem.embeddings.shape[0]))

    def whole(name: str) -> Tensor:
        of_rows = torch.cat([solution[name] for solution in solutions]).double()
        return torch.empty_like(of_rows).index_copy_(0, everyone, of_rows)

    result = {"loss": solutions[0]["loss"].double() if is_scalar else whole("loss"), "embeddings": whole("embeddings") / scale}
    for solution in solutions:
        assert not is_scalar or torch.equal(solution["loss"], solutions[0]["loss"]), "every rank returns the same number"
    for name in ("temperature", "prototypes"):
        if name in solutions[0]:
            result[name] = torch.stack([solution[name].double() for solution in solutions]).sum(0) / scale
    return result


def assert_exact(ranks: World, problem: Problem, parts: Parts, backend: str, **sharding: Any) -> None:
    expected = problem.solve("reference", torch.float64)
    actual = solve(ranks, problem, parts, backend, torch.float64, **sharding)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        floor = 1e-3 / problem.temperature ** (2 if name == "temperature" else 1)
        error = relative_error(actual[name], value, floor)
        assert error <= 1e-10, f"{name}: relative error {error:.2e}"


# ---- against one process -------------------------------------------------------------------------------------------------

# Even; uneven; one rank with no rows, first, last and in the middle; most of them empty; one row each, alone with itself.
WORLDS: list[Parts] = [
    (11,),
    (8, 8),
    (0, 9),
    (9, 0),
    (1, 17, 4),
    (5, 0, 8),
    (3, 12, 1, 9),
    (0, 0, 2, 0),
    (1, 1, 1),
]
BACKENDS = RUNNABLE


@pytest.mark.parametrize("parts", WORLDS, ids=str)
@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_exact(parts: Parts, strategy: str, backend: str, ranks: World) -> None:
    n = sum(parts)
    for case, (positives, reduction) in enumerate(itertools.product(POSITIVES, REDUCTIONS)):
        temperature = (0.001, 0.1, 1.0)[(case + n) % 3]  # both softmax paths
        problem = random_problem(1 + case % 3, n, 5 + case, temperature=temperature, positives=positives, reduction=reduction)
        if case % 2:
            problem = problem.with_options(normalize=False, distance="euclidean")
        assert_exact(ranks, problem, parts, backend, strategy=strategy, grad_scale=("ddp", "none")[case % 2])


@pytest.mark.parametrize("parts", WORLDS, ids=str)
@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_sides_in_float64_are_exact(parts: Parts, strategy: str, backend: str, ranks: World) -> None:
    n = sum(parts)
    for case, (labelled, reduction) in enumerate(itertools.product((False, True), REDUCTIONS)):
        n_right = n + 3 if labelled else n
        problem = two_sided_problem(n, n_right, 6, labelled=labelled, temperature=(0.1, 0.001)[case % 2], reduction=reduction)
        assert_exact(ranks, problem.with_options(normalize=case % 3 > 0), parts, backend, strategy=strategy)


# In float32 and below; the values, unlike above, are of ordinary problems.
ACCURATE: list[Parts] = [(13, 5), (6, 0, 6), (7, 7, 7, 7)]


@pytest.mark.parametrize("parts", ACCURATE, ids=str)
@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_accurate(parts: Parts, strategy: str, backend: str, ranks: World) -> None:
    n = sum(parts)
    problems = [
        *(random_problem(2, n, 24, positives=each, temperature=tau) for each in POSITIVES for tau in (0.1, 0.02)),
        two_sided_problem(n, n, 24, labelled=False),
    ]
    for problem in problems:
        assert_close_to_reference(problem, solve(ranks, problem, parts, backend, torch.float32, strategy=strategy))
    problem = near_duplicates(2, n, 24, 1e-3, 0.05)
    assert_close_to_reference(problem, solve(ranks, problem, parts, backend, torch.float32, strategy=strategy), True)


@pytest.mark.skipif(not TRITON, reason="Triton runs on a CPU with TRITON_INTERPRET=1 alone")
@pytest.mark.parametrize("parts", [(12,), (6, 6), (9, 0, 3), (4, 2, 5, 1)], ids=str)
@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_float32_is_accurate_with_triton(parts: Parts, strategy: str, ranks: World) -> None:
    for problem in (
        *(random_problem(2, 12, 20, positives=positives) for positives in POSITIVES),
        two_sided_problem(12, 12, 20, labelled=False),
    ):
        assert_close_to_reference(problem, solve(ranks, problem, parts, "triton", torch.float32, strategy=strategy))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_as_good_as_plain(dtype: torch.dtype, backend: str, ranks: World) -> None:
    for strategy, reduction in (("gather", "mean"), ("ring", "none")):
        problem = random_problem(2, 18, 24, positives="label", reduction=reduction)
        expected, plain = (problem.solve("reference", each) for each in (torch.float64, dtype))
        actual = solve(ranks, problem, (13, 5), backend, dtype, strategy=strategy)
        for name, value in expected.items():
            slack = torch.finfo(dtype).eps / 2 if name == "temperature" else 1e-4
            assert relative_error(actual[name], value) <= 2 * relative_error(plain[name], value) + slack, name


# ---- conventions -----------------------------------------------------------------------------------------------------------


def test_the_strategies_give_the_same_and_auto_is_one_of_them(ranks: World) -> None:
    problem = random_problem(2, 20, 8, positives="label")
    results = [solve(ranks, problem, (12, 8), "tiled", torch.float64, strategy=each) for each in ("auto", "gather", "ring")]
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value, rtol=0, atol=0)
        torch.testing.assert_close(results[2][name], value)


def gathers(group: distributed.ProcessGroup, n_rows: list[int], most_bytes: float) -> bool:
    """Whether "auto" gathers where as many bytes are allowed."""
    from clop_kernels import shards
    from clop_kernels.collectives import memory_of

    n_own, kept, before = n_rows[distributed.get_rank(group)], Kept(), shards.GATHERED_SHARE
    shards.GATHERED_SHARE = most_bytes / memory_of(torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x):
        clop_kernels.ntxent_loss(torch.randn(n_own, 64, requires_grad=True), group=group, backend="tiled")
    shards.GATHERED_SHARE = before
    return kept.n_rows > n_own


class Kept:
    n_rows = 0

    def pack(self, x: Tensor) -> Tensor:
        if x.dim() == 2 and x.shape[1] == 64:
            self.n_rows = max(self.n_rows, x.shape[0])
        return x


def rows_of_others_alive(more_than: int) -> int:
    rows = [x for x in gc.get_objects() if type(x) is Tensor and x.shape[1:] == (37,) and len(x) > more_than]
    return len({x.untyped_storage().data_ptr() for x in rows})


def rows_alive(group: distributed.ProcessGroup) -> list[int]:
    """How many tensors have the rows of all others while those are worked on."""
    from clop_kernels.backends import tiled

    counts = []
    original = tiled.pair_softmax

    def counting(zhat: Tensor, groups: Tensor, n_left: int | None, options: Any) -> Any:
        if n_left is not None:
            deadline = time.monotonic() + 5  # gloo's own thread lets go of what it has gathered a moment after it is there
            while (n_alive := rows_of_others_alive(2 * n_left)) > 1 and time.monotonic() < deadline:
                time.sleep(0.01)
            counts.append(n_alive)
        return original(zhat, groups, n_left, options)

    tiled.pair_softmax = counting
    try:
        clop_kernels.supcon_loss(torch.randn(8, 37), torch.arange(8) % 3, group=group, strategy="gather", backend="tiled")
    finally:
        tiled.pair_softmax = original
    return counts


def test_gathered_rows_are_let_go_once_they_are_sorted(ranks: World) -> None:
    assert ranks.run(4, rows_alive) == [[1]] * 4


@pytest.mark.parametrize("n_rows", [[20, 20, 20], [2, 100, 2]], ids=str)
def test_auto_chooses_by_memory(n_rows: list[int], ranks: World) -> None:
    """Rows come as if each rank had as many as the largest, and are copied into their order: 256 bytes each, twice."""
    n_bytes = 256 * (3 * max(n_rows) + sum(n_rows))
    assert ranks.run(3, gathers, n_rows, n_bytes + 1) == [True] * 3
    assert ranks.run(3, gathers, n_rows, n_bytes - 1) == [False] * 3


def test_equal_ranks_need_no_header(ranks: World) -> None:
    for parts, strategy in itertools.product([(6,), (6, 6), (6, 6, 6)], ("auto", "gather", "ring")):
        problem = random_problem(2, sum(parts), 8, positives=POSITIVES[len(parts) % 2])
        assert_exact(ranks, problem, parts, "tiled", strategy=strategy, check_ranks=False)
        assert_exact(ranks, two_sided_problem(sum(parts), sum(parts), 5, labelled=False), parts, "tiled", check_ranks=False)


def loss_of_a_subgroup(group: distributed.ProcessGroup, z: Tensor) -> Any:
    """Ranks of the world that are others in the group; twice backward, and neither rows nor labels are contiguous."""
    members = distributed.new_group([1, 3])
    if distributed.get_rank() not in (1, 3):
        return None
    mine = z.chunk(2)[distributed.get_rank(members)].T.contiguous().T.requires_grad_()
    torch.manual_seed(distributed.get_rank())
    prototypes = clop_kernels.CLOPLoss(3, z.shape[1], group=members).prototypes
    results = []
    for strategy in ("gather", "ring"):
        loss = clop_kernels.supcon_loss(mine, torch.tensor([0, 2, 0, 3, 1, 4, -1, 5])[::2], group=members, strategy=strategy)
        grads = [torch.autograd.grad(loss, mine, retain_graph=True)[0] for _ in range(2)]
        results.append([loss.detach(), *grads])
    return prototypes, results


def test_ranks_of_a_subgroup_are_others_than_those_of_the_world(ranks: World) -> None:
    z = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    loss = clop_kernels.supcon_loss(z, torch.tensor([0, 0, 1, -1] * 2))
    (grad,) = torch.autograd.grad(loss, z)
    _, (prototypes, of_first), _, (others, of_second) = ranks.run(4, loss_of_a_subgroup, z.detach())
    assert torch.equal(prototypes, others)
    for part, results in zip(grad.chunk(2), (of_first, of_second), strict=True):
        for result in results:
            torch.testing.assert_close(result, [loss.detach(), 2 * part, 2 * part])


def test_without_any_row(ranks: World) -> None:
    for strategy in ("gather", "ring"):
        results = ranks.run(2, loss_of_nothing, strategy)
        assert [loss for loss, _ in results] == [0.0, 0.0]
        assert all(grad.shape == (0, 4) for _, grad in results)


def loss_of_nothing(group: distributed.ProcessGroup, strategy: str) -> tuple[float, Tensor]:
    z = torch.zeros(0, 4, requires_grad=True)
    loss = clop_kernels.ntxent_loss(z, group=group, strategy=strategy)
    loss.backward()
    assert z.grad is not None
    return loss.item(), z.grad


def test_no_label_on_one_rank_and_prototypes_alone(ranks: World) -> None:
    problem = random_problem(1, 12, 8, positives="instance")  # one view: no row has a positive
    assert problem.labels is not None
    for labels in (problem.labels, torch.full((12,), -1), torch.tensor([-1] * 6 + [0, 1, 2, 3, 0, 1])):
        for n_views, positives in ((1, "instance"), (1, "label"), (2, "instance")):
            part = replace(problem, labels=labels[: 12 // n_views]).with_options(n_views=n_views, positives=positives)
            assert_exact(ranks, part, (6 // n_views, 6 // n_views), "tiled")


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_labels_may_be_as_large_as_int64(strategy: str, ranks: World) -> None:
    largest = 2**63 - 1
    labels = torch.tensor([largest, largest - 1, -1, 2**31, largest, -1, 2**31, largest - 1, -1])
    problem = replace(random_problem(2, 9, 5, positives="label"), labels=labels, prototypes=None)
    assert_exact(ranks, problem, (4, 1, 4), "tiled", strategy=strategy)


def prototypes_of(group: distributed.ProcessGroup) -> tuple[Tensor, Tensor]:
    torch.manual_seed(distributed.get_rank(group))
    with_group, alone = clop_kernels.CLOPLoss(3, 8, group=group), clop_kernels.CLOPLoss(3, 8)
    clone = copy.deepcopy(with_group)
    assert clone.group is with_group.group
    assert torch.equal(clone.prototypes, with_group.prototypes)
    return with_group.prototypes, alone.prototypes


def test_modules_of_a_group_have_the_prototypes_of_its_first_rank(ranks: World) -> None:
    results = ranks.run(3, prototypes_of)
    assert all(torch.equal(shared, results[0][0]) for shared, _ in results)
    assert not torch.equal(results[0][1], results[1][1])


def loss_of_modules(group: distributed.ProcessGroup, z: Tensor, labels: Tensor) -> list[Tensor]:
    mine = z.view(2, -1, z.shape[1])[:, distributed.get_rank(group) :: 2]
    y = labels[distributed.get_rank(group) :: 2]
    clop = clop_kernels.CLOPLoss(4, z.shape[1], group=group, strategy="ring", generator=torch.Generator().manual_seed(3))
    return [
        clop(*mine, labels=y),
        clop_kernels.NTXentLoss(group=group)(*mine),
        clop_kernels.SupConLoss(n_views=2, group=group, reduction="sum")(mine.flatten(0, 1), y),
    ]


def test_modules(ranks: World) -> None:
    problem = random_problem(2, 10, 8)
    assert problem.labels is not None
    z, labels = problem.embeddings, problem.labels
    clop = clop_kernels.CLOPLoss(4, 8, generator=torch.Generator().manual_seed(3))
    expected = [
        clop(z, labels=labels),
        clop_kernels.NTXentLoss()(z),
        clop_kernels.SupConLoss(n_views=2, reduction="sum")(z, labels),
    ]
    for losses in ranks.run(2, loss_of_modules, z, labels):
        torch.testing.assert_close(losses, expected)


def received(group: distributed.ProcessGroup, strategy: str, positives: str) -> tuple[int, int]:
    rank = distributed.get_rank(group)
    z = torch.randn(2 * (9, 5, 7)[rank], 32, requires_grad=True)
    labels = torch.zeros((9, 5, 7)[rank], dtype=torch.int64)
    with counted(group) as forward:
        loss = clop_kernels.clop_loss(
            z, labels, positives=positives, group=group, strategy=strategy, backend="tiled", check_ranks=True
        )
    with counted(group) as backward:
        loss.backward()
    return forward.n_bytes, backward.n_bytes


@pytest.mark.parametrize("positives", POSITIVES)
def test_a_ring_moves_no_more_than_is_said(positives: str, ranks: World) -> None:
    """Ranks of 18, 10 and 14 rows; clop_kernels/distributed.py has the formula. No gradient is sent, whatever the strategy."""
    by_label = positives == "label"
    small = 400  # a header and four sums
    for rank, (forward, backward) in enumerate(ranks.run(3, received, "ring", positives)):
        others = 42 - (18, 10, 14)[rank]
        assert 0 <= forward - others * (32 * 4 + 8 * by_label) < small
        assert backward == others * (32 * 4 + (24 if by_label else 8))
    for forward, backward in ranks.run(3, received, "gather", positives):  # as of equal ranks of the most rows
        assert 0 <= forward - 2 * 18 * (32 * 4 + 8 * by_label) < small
        assert backward == 2 * 18 * (16 if by_label else 8)


# ---- errors ------------------------------------------------------------------------------------------------------------------


def loss_with(group: distributed.ProcessGroup, of_ranks: dict[int, dict[str, Any]]) -> None:
    """A loss with other arguments on some ranks."""
    arguments: dict[str, Any] = {"width": 6, "dtype": torch.float32, "n_rows": 8, "requires_grad": False, "backend": "tiled"}
    arguments |= of_ranks.get(distributed.get_rank(group), {})
    shape = arguments.pop("n_rows"), arguments.pop("width")
    z = torch.randn(shape, dtype=arguments.pop("dtype"), requires_grad=arguments.pop("requires_grad"))
    clop_kernels.clop_loss(z, group=group, **arguments)


DIFFERENCES: dict[str, tuple[dict[int, dict[str, Any]], str]] = {
    "D": ({1: {"width": 7}}, r"the width D of the embeddings differs.*: 6 on ranks 0, 2; 7 on rank 1"),
    "dtype": ({0: {"dtype": torch.float64}}, r"dtype of the embeddings differs.*float64 on rank 0; torch.float32 on ranks 1, 2"),
    "temperature": ({2: {"temperature": 0.2}}, r"temperature differs.*: 0.1 on ranks 0, 1; 0.2 on rank 2"),
    "learnable": ({2: {"temperature": torch.tensor(0.2)}}, r"temperature differs.*: 0.1 on ranks 0, 1; 0.2"),
    "n_views": ({0: {"n_views": 4}}, "n_views differs.*: 4 on rank 0; 2 on ranks 1, 2"),
    "reduction": ({0: {"reduction": "sum"}}, "reduction differs.*: 'sum' on rank 0; 'mean' on ranks 1, 2"),
    "strategy": ({0: {"strategy": "ring"}}, "strategy differs.*: 'ring' on rank 0; 'auto' on ranks 1, 2"),
    "grad_scale": ({0: {"grad_scale": "none"}}, "grad_scale differs.*: 'none' on rank 0; 'ddp' on ranks 1, 2"),
    "requires_grad": (
        {1: {"requires_grad": True}},
        r"whether a gradient is wanted \(requires_grad\) differs.*: False on ranks 0, 2; True on rank 1",
    ),
    "prototypes": (
        {1: {"prototypes": torch.eye(3, 6), "labels": torch.zeros(4, dtype=torch.int64)}},
        "the number of prototypes differs.*: 0 on ranks 0, 2; 3 on rank 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_that_differ_all_say_how(name: str, ranks: World) -> None:
    of_ranks, message = DIFFERENCES[name]
    for error in ranks.errors_of(3, loss_with, of_ranks):
        assert isinstance(error, ValueError)
        assert re.search(message, str(error)), str(error)
    ranks.run(3, loss_with, {})  # and can go on


@pytest.mark.parametrize(
    "wrong",
    [
        {"distance": "far"},
        {"n_rows": 7},
        {"temperature": -1.0},
        {"backend": "cuda"},
        {"reduction": "max"},
        {"strategy": "star"},
        {"grad_scale": "mean"},
        {"labels": torch.tensor([0, 1, 5, 0]), "prototypes": torch.eye(3, 6)},
    ],
    ids=str,
)
def test_an_error_of_one_rank_is_one_of_all(wrong: dict[str, Any], ranks: World) -> None:
    for rank, error in enumerate(ranks.errors_of(3, loss_with, {1: wrong})):
        if rank == 1:
            assert isinstance(error, ValueError | clop_kernels.BackendUnavailableError)
        else:
            assert isinstance(error, RuntimeError)
            assert "rank 1 of the process group raised an error" in str(error)
    ranks.run(3, loss_with, {})


def loss_of_views(group: distributed.ProcessGroup, name: str) -> None:
    """A module's loss of two views, that on rank 1 are of different lengths."""
    x, y = torch.randn(8, 6), torch.randn(7 if distributed.get_rank(group) == 1 else 8, 6)
    modules: dict[str, Callable[[], Any]] = {
        "NTXentLoss": lambda: clop_kernels.NTXentLoss(group=group)(x, y),
        "SupConLoss": lambda: clop_kernels.SupConLoss(group=group)(x, y, labels=torch.zeros(8, dtype=torch.int64)),
        "CLOPLoss": lambda: clop_kernels.CLOPLoss(2, 6, group=group)(x, y),
        "lightly": lambda: compat.lightly.NTXentLoss(gather_distributed=True)(x, y),
        "open_clip": lambda: compat.open_clip.ClipLoss(True, True, world_size=4)(x, x, len(y) - 7.0),
    }
    modules[name]()


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss", "CLOPLoss", "lightly", "open_clip"])
def test_an_error_of_one_rank_in_a_module_is_one_of_all(name: str, ranks: World) -> None:
    for rank, error in enumerate(ranks.errors_of(4, loss_of_views, name)):
        assert isinstance(error, ValueError if rank == 1 else RuntimeError)
        assert rank == 1 or "rank 1 of the process group raised an error" in str(error)


def transformed(group: distributed.ProcessGroup) -> None:
    torch.func.grad(lambda z: clop_kernels.ntxent_loss(z, group=group))(torch.randn(4, 3))


def test_transforms_of_torch_func_take_no_group(ranks: World) -> None:
    for error in ranks.errors_of(2, transformed):
        assert isinstance(error, NotImplementedError)
        assert "torch.func transform" in str(error)


def loss_of_a_group_of_others(group: distributed.ProcessGroup) -> None:
    others = distributed.new_group([1])
    if distributed.get_rank(group) == 0:
        clop_kernels.ntxent_loss(torch.randn(4, 3), group=others)


def test_arguments_of_groups(ranks: World) -> None:
    z = torch.randn(4, 3)
    with pytest.raises(TypeError, match=r"group is a str: expected a torch.distributed.ProcessGroup"):
        clop_kernels.ntxent_loss(z, group="world")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strategy='star': expected one of 'auto', 'gather', 'ring'"):
        clop_kernels.ntxent_loss(z, strategy="star")
    with pytest.raises(ValueError, match="grad_scale='mean': expected one of 'ddp', 'none'"):
        clop_kernels.NTXentLoss(grad_scale="mean")
    error, _, _, _ = ranks.errors_of(4, loss_of_a_group_of_others)
    assert isinstance(error, ValueError)
    assert "this process is not a member of the group" in str(error)
    (error,) = ranks.errors_of(1, loss_with, {0: {"backend": "reference"}})
    assert isinstance(error, ValueError)
    assert "all rows in one process" in str(error)


def die_or_wait(rank: int, store: str, strategy: str, when: str, answers: Any) -> None:
    """Rank 1 ends before the loss, or between its passes; rank 0 says what it gets to see."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=20))
    z = torch.randn(8, 4, requires_grad=True)
    group = distributed.group.WORLD
    try:
        if rank == 1 and when == "forward":
            os._exit(1)
        loss = clop_kernels.ntxent_loss(z, group=group, strategy=strategy, backend="tiled")
        if rank == 1:
            os._exit(1)
        loss.backward()
    except Exception as error:
        answers.put(f"{type(error).__module__}.{type(error).__name__}: {error}")
    else:
        answers.put("no error")
    answers.close()
    answers.join_thread()
    os._exit(0)


@pytest.mark.parametrize(("strategy", "when"), [("gather", "forward"), ("gather", "backward"), ("ring", "backward")])
def test_a_rank_that_dies_is_an_error_of_the_others(strategy: str, when: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=die_or_wait, args=(rank, str(tmp_path / "store"), strategy, when, answers)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    message = answers.get(timeout=60)
    for process in processes:
        process.join(10)
    assert "no error" not in message
    assert re.search("closed|reset|timed out|Timed out|refused", message), message
