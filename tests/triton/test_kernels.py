"""The backend ``triton`` in Triton's interpreter, beyond the contract: TF32, long rows, torch.compile, why it cannot run.

tests/conftest.py switches the interpreter on where there is no GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import clop_kernels
from clop_kernels import backends
from clop_kernels.backends import contract
from clop_kernels.backends.contract import LossOptions

from ..support.interpreter import (
    TRITON,
    interpreted,
    keep_rows_apart,
    round_products_once,
    set_wide,
    shrink_tiles,
    without_numpy_warnings,
)
from ..support.oracle import (
    Problem,
    assert_accurate,
    assert_negations_are_seen,
    op_call,
    random_problem,
    relative_error,
)

pytestmark = without_numpy_warnings


@pytest.fixture(autouse=True)
def _rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_rows_apart(monkeypatch)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_tiles(monkeypatch)


@pytest.fixture(params=[False, True], ids=["narrow", "wide"])
def is_wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both paths at any width."""
    set_wide(monkeypatch, request.param)
    return bool(request.param)


# ---- numbers -------------------------------------------------------------------------------------------------------


@interpreted
def test_ranking_and_sorting_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from clop_kernels.backends.triton import launches

    problem = random_problem(3, 40, 16, positives="label", n_classes=5)
    ranked = problem.solve("triton", torch.float32)
    monkeypatch.setattr(launches, "RANKED_INSTANCES", 0)
    TRITON.load().plan_of.cache_clear()
    by_sort = problem.solve("triton", torch.float32)
    assert all(torch.equal(ranked[name], by_sort[name]) for name in ranked)


@interpreted
def test_parts_of_the_prototypes_gradient_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from clop_kernels.backends.triton import launches

    problem = random_problem(3, 40, 16, n_classes=2, distance="euclidean")
    monkeypatch.setattr(launches, "prototype_parts", lambda n_classes, target: 5)
    assert_accurate(problem, "triton")


def rows_so_long_that_logits_are_in_thousands() -> Problem:
    problem = random_problem(1, 67, 20, positives="label", normalize=False)
    problem = replace(problem, embeddings=(problem.embeddings * 45 / 20**0.5).float().double())
    assert (problem.embeddings @ problem.embeddings.T).abs().max() > 10_000 * problem.temperature
    return problem


@interpreted
def test_long_rows(is_wide: bool, small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accurate as any others, where s_ij and s_ji are the same bits: in float64, and rounded once, they are."""
    round_products_once(monkeypatch)
    assert_accurate(rows_so_long_that_logits_are_in_thousands(), "triton", ill_conditioned=True)


@interpreted
def test_long_rows_and_a_product_that_is_not_symmetric(is_wide: bool, small_tiles: None) -> None:
    """Row j's softmax is of s_ji, and row i's gradient takes its share by s_ij: what these differ by is a relative error of it.

    The interpreter's own product sums in another order for them on CPUs without AVX-512: an error of a rounding of the logit.
    """
    problem = rows_so_long_that_logits_are_in_thousands()
    largest = float((problem.embeddings @ problem.embeddings.T).abs().max() / problem.temperature)
    expected, actual = problem.solve("reference", torch.float64), problem.solve("triton", torch.float32)
    for name, value in expected.items():
        assert relative_error(actual[name], value) < largest * torch.finfo(torch.float32).eps, name


@interpreted
@pytest.mark.parametrize("temperature", [1e30, 1e46, 1e300])
def test_passes_over_pairs_at_a_temperature_whose_inverse_float32_does_not_hold(temperature: float) -> None:
    """A float is not taken for a tensor."""
    groups = torch.stack([torch.arange(12), torch.arange(12) // 2 * 2, torch.arange(12) // 2 * 2 + 2]).int()
    options = LossOptions(temperature, positives="label", compute_dtype=torch.float32)
    zhat = torch.nn.functional.normalize(torch.randn(12, 4), dim=1)
    assert (TRITON.load().pair_softmax(zhat, groups, None, options).total == 11).all()


@interpreted
def test_negations_that_are_put_off() -> None:
    """Kernels are given memory, of which only the dispatcher knows that it holds the opposite."""
    assert_negations_are_seen("triton")


# ---- as a user and torch.compile meet it -------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction: str) -> None:
    """Backends make the results, so of each the operator is looked at."""
    call = op_call("triton", reduction, torch.float32)
    if reduction == "none":  # and rows as they are, of two sides
        options = call.options._replace(n_views=1, normalize=False, n_left=4)
        call = call._replace(labels=torch.arange(10) % 3, options=options)
    arguments = call.packed()
    torch.library.opcheck(torch.ops.clop.loss.default, arguments)
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    loss, *residuals = torch.ops.clop.loss(*detached)
    needs = [True, True, True]
    torch.library.opcheck(torch.ops.clop.loss_backward.default, (torch.ones_like(loss), *residuals, *detached, needs))


@interpreted
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's default backend needs g++")
def test_compiles_without_a_graph_break() -> None:
    problem = random_problem(2, 9, 6)

    def loss(z: torch.Tensor) -> torch.Tensor:
        return clop_kernels.ntxent_loss(2 * z, backend="triton")

    z = problem.embeddings.float().requires_grad_()
    (expected,) = torch.autograd.grad(loss(z), z)
    (actual,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(z), z)
    torch.testing.assert_close(actual, expected)


@interpreted
def test_autocast_rounds_the_operands_alone() -> None:
    problem = random_problem(2, 9, 6)
    z = problem.embeddings.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = clop_kernels.ntxent_loss(z, backend="triton")
    (grad,) = torch.autograd.grad(loss, z)
    assert (loss.dtype, grad.dtype) == (torch.float32, torch.float32)
    exact = clop_kernels.ntxent_loss(z, backend="triton")
    assert 0 < (loss - exact).abs().item() < 1e-2


@interpreted
def test_labels_are_checked() -> None:
    z, prototypes = torch.randn(6, 4), torch.randn(2, 4)
    for bad in (-2, 2):
        with pytest.raises(ValueError, match=f"labels contains {bad}"):
            clop_kernels.clop_loss(z, torch.tensor([0, 1, bad]), prototypes, backend="triton")


# ---- TF32 ------------------------------------------------------------------------------------------------------------


@interpreted
def test_float32_takes_one_product_for_three_where_torch_would(request: pytest.FixtureRequest) -> None:
    from clop_kernels.backends.triton import launches, tiles

    target = tiles.Target(90, 132)
    assert launches.precision(torch.float32, target) == "tf32x3"
    request.getfixturevalue("tf32")
    assert launches.precision(torch.float32, target) == "tf32"


@pytest.fixture
def units_that_cut_off(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """TF32 with operands cut off after ten bits of the mantissa, as matrix units do. The last of the list is the precision."""
    from triton.runtime import interpreter

    from clop_kernels.backends.triton import launches

    multiply = interpreter.InterpreterBuilder.create_dot
    precisions = ["tf32"]

    def cut_off(x: Any) -> Any:
        return interpreter.TensorHandle((x.data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32), x.dtype)

    def create_dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        if precisions[-1] == "tf32":
            a, b = cut_off(a), cut_off(b)
        return multiply(builder, a, b, *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(launches, "precision", lambda dtype, target: precisions[-1])
    return precisions


@interpreted
@pytest.mark.parametrize("of_forward", ["tf32", "tf32x3"])
def test_tf32_is_unbiased(of_forward: str, is_wide: bool, small_tiles: None, units_that_cut_off: list[str]) -> None:
    """Operands that are cut off, not rounded, are all too small: the loss was 2e-4 off on a GPU. A pass has its own precision."""
    problem = random_problem(2, 60, 24)
    assert problem.prototypes is not None
    expected = problem.solve("reference", torch.float64)
    tensors = (problem.embeddings, problem.prototypes, torch.tensor(problem.temperature))
    z, prototypes, tau = (x.float().requires_grad_() for x in tensors)
    units_that_cut_off.append(of_forward)
    loss = problem.loss(z, problem.labels, prototypes, tau, "triton")
    units_that_cut_off.append("tf32")
    gradients = torch.autograd.grad(loss, (z, prototypes, tau))
    actual = dict(zip(("loss", "embeddings", "prototypes", "temperature"), (loss.detach(), *gradients), strict=True))
    for name, allowed in (("loss", 1e-5), ("temperature", 1e-4), ("embeddings", 5e-4), ("prototypes", 1e-6)):
        assert relative_error(actual[name], expected[name]) < allowed, name


@interpreted
def test_tf32_is_unbiased_in_passes_over_pairs_alone(is_wide: bool, small_tiles: None, units_that_cut_off: list[str]) -> None:
    zhat = torch.nn.functional.normalize(torch.randn(80, 24), dim=1)
    groups = torch.stack([torch.arange(80), torch.arange(80) // 2 * 2, torch.arange(80) // 2 * 2 + 2]).int()
    options = LossOptions(0.1, positives="label", compute_dtype=torch.float32)
    triton, tiled = TRITON.load(), next(b for b in backends.BACKENDS if b.name == "tiled").load()
    expected, actual = (b.pair_softmax(zhat, groups, None, options) for b in (tiled, triton))
    bias = (actual.negative.log() + actual.shift - expected.negative.log() - expected.shift).mean()
    assert abs(bias) < 3e-4  # of operands cut off 2.4e-3
    coefficients = torch.stack([1 / (expected.negative + expected.positive), *torch.zeros(2, 80), expected.shift])
    gradients = [b.pair_gradient(zhat, groups, None, coefficients, options) for b in (tiled, triton)]
    assert relative_error(gradients[1], gradients[0].double()) < 8e-4


@interpreted
def test_operands_of_tf32_are_rounded(units_that_cut_off: list[str]) -> None:
    """To the nearest of ten bits; what is not a number stays none."""
    from clop_kernels.backends.triton import launches, tiles

    zhat = contract.unit_rows(torch.empty(2, 5), torch.float32)
    zhat.copy_(torch.tensor([1 + 2.0**-11, -1 - 2.0**-12, 2.0**-130, float("inf"), float("nan")]))
    zhat.view(torch.int32)[1, 4] = 0x7FFFFFFF  # a GPU's NaN
    options = LossOptions(0.1, positives="label", compute_dtype=torch.float32)
    groups = torch.zeros(3, 2, dtype=torch.int32)
    problem = launches.Problem.of_pairs(zhat, None, options, tiles.Target(0, 1))
    values = launches.values_of_pairs(zhat, groups, options.temperature)
    launch = next(launches.pair_softmax(problem).launches(values))
    launch.run()
    expected = torch.tensor([1 + 2.0**-10, -1, 2.0**-130, float("inf"), float("nan")]).expand(2, 5)
    torch.testing.assert_close(launch.arguments["operands"], expected, rtol=0, atol=0, equal_nan=True)


# ---- why it cannot run ---------------------------------------------------------------------------------------------------


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    reason = TRITON.obstacle(cpu, torch.float32)
    assert reason is not None
    with pytest.raises(clop_kernels.BackendUnavailableError, match="backend='triton' cannot run on cpu"):
        clop_kernels.ntxent_loss(torch.randn(4, 3), backend="triton")
    monkeypatch.setattr(backends, "_is_installed", lambda package: False)
    assert "pip install triton" in str(TRITON.obstacle(gpu, torch.float32))
    monkeypatch.setattr(backends, "_is_installed", lambda package: True)
    assert "supports float32, float16 and bfloat16" in str(TRITON.obstacle(gpu, torch.float64))
    assert "TRITON_INTERPRET=1" in str(TRITON.obstacle(cpu, torch.float32))
    assert "cuda and xpu" in str(TRITON.obstacle(torch.device("mps"), torch.float32))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "rounds bfloat16" in str(TRITON.obstacle(cpu, torch.bfloat16))
    monkeypatch.setattr(backends, "_capability", lambda index: (7, 5))
    assert "8.0 or higher, and this GPU has 7.5" in str(TRITON.obstacle(gpu, torch.float32))
    monkeypatch.setattr(backends, "_capability", lambda index: (9, 0))
    versions: dict[str, str] = {}
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(__version__=versions[name]))
    for triton, numpy, device, expected in (
        ("3.5.1", "2.3.5", gpu, "it needs Triton 3.6 or newer, and 3.5 is installed"),
        ("3.6.0", "2.5.2", gpu, None),
        ("3.10.0+git1", "2.5.2", gpu, None),
        ("3.6.0", "2.3.5", cpu, None),
        ("3.6.0", "2.4.0", cpu, "Triton's interpreter needs Triton 3.7 for NumPy 2.4 or newer: `pip install 'numpy<2.4'`"),
        ("3.7.0", "2.4.0", cpu, None),
    ):
        versions |= {"triton": triton, "numpy": numpy}
        backends._version_of.cache_clear()
        assert TRITON.obstacle(device, torch.float32) == expected
    backends._version_of.cache_clear()


@interpreted
def test_the_interpreter_runs_by_name_only() -> None:
    assert backends.select(None, torch.device("cpu"), torch.float32).name != "triton"
    z = torch.randn(6, 4)
    torch.testing.assert_close(clop_kernels.ntxent_loss(z), clop_kernels.ntxent_loss(z, backend="triton"))
