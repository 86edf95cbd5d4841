"""The contract: the loss and the gradients of every backend, in every setting, against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import clop_kernels
from clop_kernels import backends

from ..support.interpreter import without_numpy_warnings
from ..support.oracle import (
    GRADIENT_TOLERANCE,
    assert_pairs_accurate,
    negatives_problem,
    random_problem,
    relative_error,
    solve_below_the_operator,
    two_sided_problem,
)
from . import cases
from .settings import FLOAT32, FLOAT64, GPU, HALF, Setting

pytestmark = without_numpy_warnings


def test_loss_and_gradients(
    setting: Setting, dtype: torch.dtype, case: cases.Case, record_property: Callable[[str, object], None]
) -> None:
    setting.check(case.problem(dtype), dtype, record_property, ill_conditioned=case.is_hard, floor=case.floor)


def test_edges_are_finite_and_right(setting: Setting, dtype: torch.dtype, edge: tuple[str, str]) -> None:
    name, distance = edge
    problem = cases.edges(setting.rows)[name].with_options(distance=distance)
    expected, actual = problem.solve("reference", FLOAT64), problem.solve(setting.backend, dtype, setting.device)
    for number, value in actual.items():
        assert value.isfinite().all(), number
        if name != "all zero" or number == "loss":  # there the gradient is 1e12 times a sum that cancels
            tolerance = 1e-9 if dtype == FLOAT64 else 2e-5
            scale = 1e12 if name == "zero rows" and number == "embeddings" else 1.0 / problem.temperature
            torch.testing.assert_close(value, expected[number], rtol=tolerance, atol=tolerance * scale)


def test_passes_over_pairs_alone(
    setting: Setting, dtype: torch.dtype, pairs: tuple[int, int | None, int], passes: tuple[float, int, bool, bool]
) -> None:
    """The two passes that the loss over a process group is made of."""
    temperature, n_classes, normalize, on_device = passes
    on_gpu = setting.device == GPU
    known: dict[str, Any] = {"normalize": normalize, "n_classes": n_classes, "device": setting.device}
    if dtype in HALF and setting.is_of_kernels:  # M is rounded to the dtype, by half a unit an entry; more in the interpreter
        units = 1.0 if on_gpu else 2.0 if setting.backend == "triton" else 0.5
        known["gradient_tolerance"] = units * torch.finfo(dtype).eps
    if on_gpu:
        known["slack"] = 16.0  # matrix units cut their sums off where others round
    tau = torch.tensor(temperature) if on_device and setting.is_of_kernels else temperature
    assert_pairs_accurate(setting.backend, dtype, *pairs, temperature=tau, **known)


@pytest.mark.takes(as_shipped=True, width=1)
def test_width_one(setting: Setting) -> None:
    """Every cosine is 1 or -1, and every gradient zero."""
    assert_right_at_width(setting, 1, floor=1.0)


@pytest.mark.takes(as_shipped=True, width=4096)
def test_width_4096(setting: Setting) -> None:
    assert_right_at_width(setting, 4096)


def assert_right_at_width(setting: Setting, width: int, floor: float = 0.0) -> None:
    problem = random_problem(2, 7, width)
    expected, actual = problem.solve("reference", FLOAT64), problem.solve(setting.backend, FLOAT32, setting.device)
    assert relative_error(actual["loss"], expected["loss"]) < 1e-6
    for name in ("embeddings", "temperature", "prototypes"):
        assert relative_error(actual[name], expected[name], floor) < GRADIENT_TOLERANCE, name


@pytest.mark.takes(width=20)
@pytest.mark.parametrize("temperature", [1e-6, 1e-4, 1e-3, 1e3, 1e6])
def test_extreme_temperatures(temperature: float, setting: Setting, record_property: Callable[[str, object], None]) -> None:
    problem = random_problem(2, setting.rows // 4, 20, temperature=temperature)
    for value in problem.solve(setting.backend, FLOAT32, setting.device).values():
        assert value.isfinite().all()
    if temperature >= 1e-3:  # at lower temperatures a similarity of 1/tau has no digits left behind the point
        setting.check(problem, FLOAT32, record_property, ill_conditioned=temperature < 0.01)


@pytest.mark.takes(as_shipped=True)
@pytest.mark.parametrize("temperature", [1e30, 1e46, 1e300])
def test_temperatures_whose_inverse_float32_does_not_hold(temperature: float, setting: Setting) -> None:
    z = torch.randn(12, 4, device=setting.device, requires_grad=True)
    loss = clop_kernels.ntxent_loss(z, temperature=temperature, backend=setting.backend)
    torch.testing.assert_close(loss.detach().cpu(), torch.tensor(11.0).log())
    assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-29


def test_far_negatives_are_not_lost_beside_near_positives(setting: Setting) -> None:
    """A positive's exp(s) is 1e87 times a negative's: in float32, one sum over both would lose the negative."""
    z = torch.cat([torch.eye(1, 4), torch.eye(1, 4), -torch.eye(1, 4)]).to(setting.device)
    labels = torch.tensor([0, 0, 1], device=setting.device)
    lse = clop_kernels.negative_logsumexp(z, labels, temperature=0.01, backend=setting.backend)
    torch.testing.assert_close(lse.cpu(), torch.tensor([-100.0, -100.0, -100.0 + 0.6931472]))


@pytest.mark.takes(as_shipped=True)
@pytest.mark.parametrize("form", ["clip", "clip by label", "negatives", "negatives of others"])
def test_the_public_functions_are_these_problems(form: str, setting: Setting) -> None:
    problem = {
        "clip": two_sided_problem(9, 9, 5, labelled=False),
        "clip by label": two_sided_problem(7, 11, 5, labelled=True),
        "negatives": negatives_problem(18, 5),
        "negatives of others": negatives_problem(18, 5, n_left=8),
    }[form]
    device, n, tau = setting.device, problem.options.get("n_left"), problem.temperature
    z, labels = problem.embeddings.float().to(device), problem.labels
    labels = None if labels is None else labels.to(device)
    known: dict[str, Any] = {"temperature": tau, "backend": setting.backend}
    if form == "negatives":
        assert labels is not None
        loss = clop_kernels.negative_logsumexp(z, labels, **known)
    elif form == "negatives of others":
        assert labels is not None
        loss = clop_kernels.negative_logsumexp(z[:n], labels[:n], z[n:], labels[n:], **known)
    else:
        of_sides = () if labels is None else (labels[:n], labels[n:])
        loss = clop_kernels.clip_loss(z[:n], z[n:], *of_sides, **known)
    expected = problem.solve("reference", FLOAT64)["loss"]
    torch.testing.assert_close(loss.cpu().double(), expected[: len(loss)] if loss.dim() else expected, rtol=1e-5, atol=1e-5)


# ---- numbers in tensors that the host does not read ----------------------------------------------------------------------

READ = {
    "positives by label": random_problem(2, 17, 20, positives="label", reduction="none"),
    "two sides": two_sided_problem(13, 21, 20, labelled=True),
    "negatives": negatives_problem(34, 20),
    "unnormalised": random_problem(1, 34, 20, positives="label", normalize=False),
    "no pairs": random_problem(1, 34, 20),
}


@pytest.mark.takes(width=20, kernels=True)
@pytest.mark.parametrize(("form", "temperature"), [*((form, 0.01) for form in READ), ("two sides", 0.1)])
def test_the_kernels_read_the_temperature(form: str, temperature: float, setting: Setting) -> None:
    module = next(b for b in backends.BACKENDS if b.name == setting.backend).load()
    tau = float(torch.tensor(temperature))
    as_tensor, as_float = (
        solve_below_the_operator(module, READ[form], given, device=setting.device) for given in (torch.tensor(tau), tau)
    )
    for name, value in as_float.items():
        if form != "no pairs" or name != "temperature":
            assert relative_error(as_tensor[name], value) < 1e-6, name
    if form == "no pairs":
        assert as_tensor["temperature"] == 0


@pytest.mark.takes(width=20, kernels=True)
@pytest.mark.parametrize(("positives", "distance", "reduction"), [("label", "cosine", "none"), ("instance", "manhattan", "mean")])
def test_the_kernels_read_the_weight(positives: str, distance: str, reduction: str, setting: Setting) -> None:
    """A weight on the device gives the same bits as the same weight as a float."""
    module = next(b for b in backends.BACKENDS if b.name == setting.backend).load()
    problem = random_problem(2, 9, 20, positives=positives, distance=distance, reduction=reduction)
    expected, actual, other = (
        solve_below_the_operator(module, problem, 0.1, weight, setting.device)
        for weight in (0.75, torch.tensor(0.75), torch.tensor(0.5))
    )
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert not torch.equal(other["loss"], expected["loss"])
