"""The loss over a process group in use: DDP, FSDP2, torch.compile, learned temperatures, other libraries' classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import clop_kernels
from clop_kernels import compat
from clop_kernels.backends.contract import LossOptions, Sharding
from clop_kernels.ops import Call

from ..support.world import World

Group = distributed.ProcessGroup


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 8))


def batches(n_steps: int, n_instances: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Two views and labels, a third of them -1."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(n_steps):
        x = torch.randn(n_instances, 10, generator=generator)
        noise = torch.randn(2, n_instances, 10, generator=generator)
        labels = torch.randint(-1, 2, (n_instances,), generator=generator)
        result.append((x + 0.3 * noise[0], x + 0.3 * noise[1], labels))
    return result


def train(
    model: nn.Module, criterion: nn.Module, steps: list[tuple[Tensor, Tensor, Tensor]], learned: nn.Module
) -> tuple[list[float], list[Tensor]]:
    """Losses, and the parameters after the last step. ``learned``: criterion, or its wrapper that averages gradients."""
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1, momentum=0.9)
    losses = []
    for x_1, x_2, labels in steps:
        optimizer.zero_grad()
        z = model(torch.cat([x_1, x_2]))
        loss = learned(z, labels=labels, n_views=2)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [parameter.detach().clone() for parameter in [*model.parameters(), *criterion.parameters()]]


def criterion_for(group: Group | None, strategy: str = "auto", positives: str = "label") -> clop_kernels.CLOPLoss:
    generator = torch.Generator().manual_seed(2)
    return clop_kernels.CLOPLoss(
        2, 8, 0.2, positives=positives, learnable_temperature=True, generator=generator, group=group, strategy=strategy
    )


def train_on_a_rank(group: Group, strategy: str, positives: str, parts: tuple[int, ...]) -> tuple[list[float], list[Tensor]]:
    rank = distributed.get_rank(group)
    steps = [
        (x_1.split(parts)[rank], x_2.split(parts)[rank], labels.split(parts)[rank])
        for x_1, x_2, labels in batches(20, sum(parts))
    ]
    criterion = criterion_for(group, strategy, positives)
    model = DistributedDataParallel(encoder(), process_group=group)
    return train(model, criterion, steps, DistributedDataParallel(criterion, process_group=group))


@pytest.mark.parametrize("parts", [(8, 8), (11, 5)], ids=str)
@pytest.mark.parametrize(("strategy", "positives"), [("gather", "label"), ("ring", "label"), ("gather", "instance")])
def test_ddp_follows_one_process(strategy: str, positives: str, parts: tuple[int, ...], ranks: World) -> None:
    criterion = criterion_for(None, positives=positives)
    losses, parameters = train(encoder(), criterion, batches(20, sum(parts)), criterion)
    for losses_of_rank, parameters_of_rank in ranks.run(2, train_on_a_rank, strategy, positives, parts):
        torch.testing.assert_close(torch.tensor(losses_of_rank), torch.tensor(losses), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parameters_of_rank, parameters, rtol=1e-4, atol=1e-5)
    assert losses[-1] < losses[0]


def accumulated(group: Group) -> list[Tensor]:
    rank = distributed.get_rank(group)
    model = DistributedDataParallel(encoder(), process_group=group)
    first, second = batches(2, 8)
    with model.no_sync():
        criterion_for(group)(model(torch.cat([x[rank::2] for x in first[:2]])), labels=first[2][rank::2]).backward()
    criterion_for(group)(model(torch.cat([x[rank::2] for x in second[:2]])), labels=second[2][rank::2]).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_gradient_accumulation(ranks: World) -> None:
    model = encoder()
    for x_1, x_2, labels in batches(2, 8):
        criterion_for(None)(model(torch.cat([x_1, x_2])), labels=labels).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    for grads in ranks.run(2, accumulated):
        torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-6)


def sharded_step(group: Group) -> list[Tensor]:
    from torch.distributed.device_mesh import DeviceMesh

    rank = distributed.get_rank(group)
    mesh = DeviceMesh.from_group(group, "cpu")
    model = encoder()
    fully_shard(model, mesh=mesh)
    x_1, x_2, labels = (x[rank::2] for x in batches(1, 8)[0])
    criterion_for(group)(model(torch.cat([x_1, x_2])), labels=labels).backward()
    return [parameter.grad.full_tensor() for parameter in model.parameters()]  # type: ignore[union-attr]


def test_fsdp(ranks: World) -> None:
    model = encoder()
    x_1, x_2, labels = batches(1, 8)[0]
    criterion_for(None)(model(torch.cat([x_1, x_2])), labels=labels).backward()
    for grads in ranks.run(2, sharded_step):
        torch.testing.assert_close(grads, [parameter.grad for parameter in model.parameters()], rtol=1e-4, atol=1e-6)


def cached_step(group: Group, strategy: str) -> list[Tensor]:
    rank = distributed.get_rank(group)
    model = DistributedDataParallel(encoder(), process_group=group)
    x_1, x_2, labels = (x.split((13, 5))[rank] for x in batches(1, 18)[0])
    z_1, z_2 = clop_kernels.gradcache.encode(model, x_1, x_2, sub_batch=4)
    criterion_for(group, strategy)(z_1, z_2, labels=labels).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_gradient_caching(strategy: str, ranks: World) -> None:
    """Ranks of 26 and 10 rows, 4 at a time through the encoder, against one process with 36 at once."""
    model = encoder()
    x_1, x_2, labels = batches(1, 18)[0]
    criterion_for(None)(model(torch.cat([x_1, x_2])), labels=labels).backward()
    for grads in ranks.run(2, cached_step, strategy):
        torch.testing.assert_close(grads, [parameter.grad for parameter in model.parameters()], rtol=1e-4, atol=1e-6)


# ---- torch.compile -----------------------------------------------------------------------------------------------------------


def compiled_and_not(group: Group, strategy: str, sides: int) -> None:
    """Different numbers of rows from call to call, and from rank to rank."""

    def step(x: Tensor, y: Tensor, tau: Tensor) -> Tensor:
        if sides == 2:
            return 2 * clop_kernels.clip_loss(2 * x, y, temperature=tau, group=group, strategy=strategy)
        return 2 * clop_kernels.ntxent_loss(torch.cat([2 * x, y]), temperature=tau, group=group, strategy=strategy)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    for n in (6 + distributed.get_rank(group), 9 + 2 * distributed.get_rank(group)):
        inputs = [torch.randn(n, 5), torch.randn(n, 5), torch.tensor(0.3)]
        results = []
        for function in (step, compiled):
            leaves = [x.clone().requires_grad_() for x in inputs]
            loss = function(*leaves)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_compile_without_a_graph_break(strategy: str, sides: int, ranks: World) -> None:
    ranks.run(2, compiled_and_not, strategy, sides)


def compiled_losses(group: Group) -> None:
    """Several of a graph, that Inductor must leave in order where ranks' sizes differ."""

    def step(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
        z = torch.relu(x @ x.T @ x)
        instances = clop_kernels.ntxent_loss(z, group=group, strategy="ring")
        classes = clop_kernels.supcon_loss(y + z, labels, n_views=2, group=group, strategy="gather")
        return instances + 2 * classes + clop_kernels.clip_loss(z, y, group=group) ** 2

    from torch._inductor import config

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    for n in (6, 60):
        n_mine = n * (distributed.get_rank(group) + 1) ** 3
        x, y = (torch.randn(2 * n_mine, 5, requires_grad=True) for _ in range(2))
        labels = torch.randint(-1, 3, (n_mine,))
        with config.patch(reorder_for_peak_memory=False):
            results = [
                (loss.detach(), *torch.autograd.grad(loss, (x, y))) for loss in (f(x, y, labels) for f in (step, compiled))
            ]
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_several_losses_of_one_compiled_graph(ranks: World) -> None:
    ranks.run(3, compiled_losses)


def compiled_module(group: Group) -> None:
    torch._dynamo.reset()
    z, labels = torch.randn(12, 8), torch.arange(6) % 2
    criterion = criterion_for(group)
    torch.testing.assert_close(torch.compile(criterion, fullgraph=True)(z, labels=labels), criterion(z, labels=labels))


def test_compiled_modules(ranks: World) -> None:
    ranks.run(2, compiled_module)


def check_operators(group: Group) -> None:
    z = torch.randn(8, 5, requires_grad=True)
    for positives, n_left in (("instance", None), ("label", None), ("instance", 4)):
        labels = torch.arange(4) % 3 if positives == "label" else None
        options = LossOptions(0.5, n_views=2, positives=positives, n_left=n_left)
        sharding = Sharding(group.group_name, "gather", "ddp", check_ranks=False, has_backward=True)
        arguments = Call(z, labels, None, options, "tiled", sharding).packed()
        # Of the sizes that only the ranks together know, the fake results have none.
        tests = ("test_schema", "test_autograd_registration")
        torch.library.opcheck(torch.ops.clop.sharded_loss, arguments, test_utils=tests)


def test_operators(ranks: World) -> None:
    ranks.run(1, check_operators)


def second_derivative(group: Group) -> None:
    z = torch.randn(8, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(clop_kernels.ntxent_loss(z, group=group), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        grad.sum().backward()


def test_a_second_derivative_is_refused(ranks: World) -> None:
    ranks.run(2, second_derivative)


# ---- other libraries' classes --------------------------------------------------------------------------------------------------


class AllGather(torch.autograd.Function):
    """Of all ranks; the gradient is summed over them, as those libraries' gathers with gradient do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        everyone = [torch.empty_like(x) for _ in range(group.size())]
        distributed.all_gather(everyone, x, group=group)
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        distributed.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[distributed.get_rank(ctx.group)], None


def all_gather(x: Tensor, group: Group) -> Tensor:
    result: Tensor = AllGather.apply(x, group)  # type: ignore[no-untyped-call]
    return result


def open_clip_by_formula(
    group: Group, image: Tensor, text: Tensor, scale: Tensor, local_loss: bool, gather_with_grad: bool
) -> Tensor:
    """open_clip 3.3's loss of several ranks, written out."""
    rank = distributed.get_rank(group)
    images, texts = all_gather(image, group), all_gather(text, group)
    if not gather_with_grad:
        mine = slice(rank * len(image), (rank + 1) * len(image))
        images, texts = images.detach().clone(), texts.detach().clone()
        images[mine], texts[mine] = image, text
    if local_loss:
        labels = torch.arange(len(image)) + rank * len(image)
        logits = scale * image @ texts.T, scale * text @ images.T
    else:
        labels = torch.arange(len(images))
        logits = scale * images @ texts.T, scale * texts @ images.T
    return (F.cross_entropy(logits[0], labels) + F.cross_entropy(logits[1], labels)) / 2


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def rows_of(group: Group, n_inputs: int, n_rows: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(distributed.get_rank(group))
    return [torch.randn(n_rows, 6, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(n_inputs)]


def with_default_group(group: Group, check: Callable[[Group], None]) -> None:
    """The group in the place of the default one, which is what those classes take."""
    default = distributed.group.WORLD
    distributed.group.WORLD = group
    try:
        check(group)
    finally:
        distributed.group.WORLD = default


def check_open_clip(group: Group) -> None:
    for local_loss, gather_with_grad in ((False, False), (False, True), (True, True)):
        image, text = (F.normalize(x, dim=1) for x in rows_of(group, 2))
        image, text = image.detach().requires_grad_(), text.detach().requires_grad_()
        scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
        ours = compat.open_clip.ClipLoss(local_loss, gather_with_grad, rank=distributed.get_rank(group), world_size=group.size())
        loss = ours(image, text, scale)
        expected = open_clip_by_formula(group, image, text, scale, local_loss, gather_with_grad)
        torch.testing.assert_close(loss, expected)
        *of_features, of_scale = gradients(loss, image, text, scale)
        *expected_features, expected_scale = gradients(expected, image, text, scale)
        torch.testing.assert_close(of_features, expected_features)
        # Of a parameter that all ranks share the mean over ranks counts.
        for grad in (of_scale, expected_scale):
            distributed.all_reduce(grad, group=group)
        torch.testing.assert_close(of_scale, expected_scale)


def check_lightly(group: Group) -> None:
    from benchmarks.providers import lightly_loss

    original = lightly_loss()(temperature=0.3, gather_distributed=True)
    ours = compat.lightly.NTXentLoss(temperature=0.3, gather_distributed=True)
    x, y = rows_of(group, 2)
    loss, expected = ours(x, y), original(x, y)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, x, y), gradients(expected, x, y))
    alone = compat.lightly.NTXentLoss(temperature=0.3)
    torch.testing.assert_close(alone(x, y), clop_kernels.ntxent_loss(torch.cat([x, y]), temperature=0.3))


def check_published_clop(group: Group) -> None:
    torch.manual_seed(distributed.get_rank(group))
    ours = compat.clop.CLOPLoss(3, 6)
    anchors = all_gather(ours.anchors.detach(), group).chunk(group.size())
    assert all(torch.equal(each, ours.anchors) for each in anchors)
    x, y = rows_of(group, 2)
    labels = torch.tensor([0, 1, 2, -1, 0, 1, 2]) if distributed.get_rank(group) == 0 else torch.full((7,), -1)
    loss = ours(x, y, labels)
    mine = clop_kernels.clop_loss(torch.cat([x, y]), torch.cat([labels, labels]), ours.anchors, n_views=1)
    total = mine.detach().clone()
    distributed.all_reduce(total, group=group)
    torch.testing.assert_close(loss.detach(), total / group.size())
    torch.testing.assert_close(gradients(loss, x, y), gradients(mine / group.size(), x, y))


@pytest.mark.parametrize("check", [check_open_clip, check_lightly, check_published_clop])
def test_other_libraries_classes(check: Callable[[Group], None], ranks: World) -> None:
    ranks.run(4, with_default_group, check)
