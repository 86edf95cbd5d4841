"""Numbers that change during training, under torch.compile: few graphs, and never a value of an earlier step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import clop_kernels
from clop_kernels import compat

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's default backend needs g++")

LABELS = torch.arange(6) % 3
OF_ROWS = LABELS.repeat(2)
PROTOTYPES = torch.eye(3, 8)

Step = Callable[[Any, Tensor, float], Tensor]
"""(module or None, rows, a number in [0.1, 1]) -> a loss."""


@dataclass(frozen=True)
class Schedule:
    """A step, and before it, outside of what is compiled, the attributes of a module that a training sets."""

    step: Step
    module: Any = None
    attributes: Callable[[float], dict[str, float]] = lambda p: {}


def _of_rows(criterion: Any, z: Tensor, p: float) -> Tensor:
    return criterion(z, OF_ROWS)


# Tensors meet the number elsewhere too, and arithmetic is done with it: that is what torch.compile got wrong.
SCHEDULES = {
    "ntxent_loss": Schedule(lambda _, z, p: clop_kernels.ntxent_loss(z, temperature=0.55 - 0.4 * p)),
    "supcon_loss": Schedule(lambda _, z, p: clop_kernels.supcon_loss(z, OF_ROWS, temperature=p)),
    "clop_loss": Schedule(
        lambda _, z, p: clop_kernels.clop_loss(
            z, LABELS, PROTOTYPES, positives="label", distance="euclidean", temperature=0.55 - 0.4 * p, prototype_weight=2 * p
        )
    ),
    "clip_loss": Schedule(lambda _, z, p: clop_kernels.clip_loss(z[:6], z[6:], temperature=1 / (1 + 10 * p))),
    "negative_logsumexp": Schedule(lambda _, z, p: clop_kernels.negative_logsumexp(z, OF_ROWS, temperature=0.5 * p).sum()),
    "NTXentLoss": Schedule(lambda m, z, p: m(z), clop_kernels.NTXentLoss(), lambda p: {"temperature": 0.55 - 0.4 * p}),
    "SupConLoss": Schedule(_of_rows, clop_kernels.SupConLoss(), lambda p: {"temperature": p}),
    "CLOPLoss": Schedule(
        lambda m, z, p: m(z, LABELS), clop_kernels.CLOPLoss(3, 8), lambda p: {"temperature": p, "prototype_weight": 2 * p}
    ),
    "clop": Schedule(lambda m, z, p: m(z[:6], z[6:], LABELS), compat.clop.CLOPLoss(3, 8), lambda p: {"lambda_value": 3 * p}),
    "lightly": Schedule(lambda m, z, p: m(z[:6], z[6:]), compat.lightly.NTXentLoss(), lambda p: {"temperature": 0.55 - 0.4 * p}),
    "supcontrast": Schedule(
        lambda m, z, p: m(F.normalize(z, dim=1).view(6, 2, 8), LABELS),
        compat.supcontrast.SupConLoss(),
        lambda p: {"temperature": p},
    ),
    "open_clip": Schedule(lambda m, z, p: m(*F.normalize(z, dim=1).chunk(2), 1 + 10 * p), compat.open_clip.ClipLoss()),
    "pytorch_metric_learning": Schedule(_of_rows, compat.pytorch_metric_learning.SupConLoss(), lambda p: {"temperature": p}),
}

INDUCTOR = pytest.param("clop_loss", "inductor", marks=needs_compiler)


def losses_and_gradients(schedule: Schedule, z: Tensor, values: list[Any], step: Step | None = None) -> list[Tensor]:
    """Of each value; ``step``: compiled."""
    found = []
    for p in values:
        z = z.detach().requires_grad_()
        for name, value in schedule.attributes(p).items():
            setattr(schedule.module, name, value)
        loss = (step or schedule.step)(schedule.module, z, p)
        found += [loss.detach(), *torch.autograd.grad(loss, z)]
    return found


@pytest.mark.parametrize(("name", "compiler"), [*((name, "aot_eager") for name in SCHEDULES), INDUCTOR])
def test_a_number_that_changes_each_step(name: str, compiler: str) -> None:
    """14 values make at most 3 graphs, all of them right."""
    torch._dynamo.reset()
    schedule = SCHEDULES[name]
    n_graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal n_graphs
        n_graphs += 1
        return torch._dynamo.lookup_backend(compiler)(graph, inputs)

    def step(module: Any, z: Tensor, p: float) -> Tensor:
        return schedule.step(module, z, p) + p * z.square().mean()

    z, values = torch.randn(12, 8), [0.1 + k / 20 for k in range(14)]
    expected = losses_and_gradients(schedule, z, values, step)
    actual = losses_and_gradients(schedule, z, values, torch.compile(step, fullgraph=True, backend=count))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert n_graphs <= 3
    assert len(set(map(float, expected[::2]))) == len(values)


def test_numbers_as_tensors_make_one_graph() -> None:
    torch._dynamo.reset()
    schedule = SCHEDULES["clop_loss"]
    z, values = torch.randn(12, 8), list(torch.linspace(0.1, 1, 14))
    compiled = torch.compile(schedule.step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = losses_and_gradients(schedule, z, values, compiled)
    torch.testing.assert_close(actual, losses_and_gradients(schedule, z, values), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_numbers_as_tensors_are_the_same_as_floats(reduction: str, backend: str) -> None:
    z = torch.randn(12, 8, dtype=torch.float64)

    def losses(make: Callable[[float], Any]) -> list[Tensor]:
        def step(_: None, z: Tensor, p: float) -> Tensor:
            numbers = {"temperature": make(p), "prototype_weight": make(3 * p)}
            return clop_kernels.clop_loss(z, LABELS, PROTOTYPES, **numbers, reduction=reduction, backend=backend).sum()

        return losses_and_gradients(Schedule(step), z, [0.1, 0.7])

    torch.testing.assert_close(losses(lambda x: torch.tensor(x, dtype=torch.float64)), losses(float), rtol=0, atol=0)


def test_the_backward_pass_has_the_numbers_of_its_own_forward_pass() -> None:
    criterion = clop_kernels.CLOPLoss(3, 8)
    z = torch.randn(12, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(criterion(z, labels=LABELS), z)
    loss = criterion(z, labels=LABELS)
    criterion.temperature, criterion.prototype_weight = 0.7, 9.0
    torch.testing.assert_close(torch.autograd.grad(loss, z), (expected,), rtol=0, atol=0)


@pytest.mark.parametrize("learnable", [False, True])
def test_a_module_takes_another_temperature(learnable: bool) -> None:
    criterion = clop_kernels.NTXentLoss(0.1, learnable_temperature=learnable)
    criterion.temperature = 0.5
    z = torch.randn(12, 8)
    torch.testing.assert_close(criterion(z), clop_kernels.ntxent_loss(z, temperature=0.5))
    assert len(list(criterion.parameters())) == learnable
    with pytest.raises(ValueError, match=r"temperature=-1\.0: expected a positive finite number"):
        criterion.temperature = -1.0


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(1), ValueError, r"prototype_weight has shape \(1,\): expected a 0-dim tensor"),
        (torch.tensor(1), TypeError, "prototype_weight has dtype torch.int64: expected a floating dtype"),
        (torch.tensor(1.0, device="meta"), ValueError, "prototype_weight is on meta: expected the device of embeddings"),
        (torch.tensor(1.0, requires_grad=True), ValueError, r"prototype_weight requires grad: .*prototype_weight\.detach\(\)"),
        (torch.tensor(-1.0), ValueError, r"prototype_weight=-1\.0: expected a finite number of at least 0"),
        (torch.tensor(torch.inf), ValueError, "prototype_weight=inf: expected a finite number of at least 0"),
    ],
)
def test_a_wrong_weight_is_refused(weight: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        clop_kernels.clop_loss(torch.randn(12, 8), LABELS, PROTOTYPES, prototype_weight=weight)


def test_the_reference_has_the_gradient_of_a_weight() -> None:
    weight, z = torch.tensor(0.5, requires_grad=True), torch.randn(12, 8)
    loss = clop_kernels.clop_loss(z, LABELS, PROTOTYPES, prototype_weight=weight, backend="reference")
    assert torch.autograd.grad(loss, weight)[0] > 0
    with torch.no_grad():
        torch.testing.assert_close(clop_kernels.clop_loss(z, LABELS, PROTOTYPES, prototype_weight=weight), loss)
