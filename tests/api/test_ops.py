"""The operators: registration, autograd, autocast, torch.compile, torch.func."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

import clop_kernels
from clop_kernels.backends import contract

from ..support.oracle import Problem, assert_negations_are_seen, negatives_problem, op_call, random_problem, two_sided_problem

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's default backend needs g++")


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_opcheck(learned: bool, reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "DENSE_DEVICES", ())  # rows of zhat are apart, as on a GPU
    call = op_call("tiled", reduction, dtype)
    if not learned:
        call = call._replace(options=call.options.with_numbers(lambda x: x.detach()))
    torch.library.opcheck(torch.ops.clop.loss.default, call.packed())
    arguments = [a.detach() if isinstance(a, Tensor) else a for a in call.packed()]
    loss, *residuals = torch.ops.clop.loss(*arguments)
    torch.library.opcheck(
        torch.ops.clop.loss_backward.default, (torch.ones_like(loss), *residuals, *arguments, [True, learned, True])
    )


@pytest.mark.parametrize("positives", ["instance", "label"])
@pytest.mark.parametrize("distance", ["cosine", "euclidean", "manhattan"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(positives: str, distance: str, reduction: str, backend: str) -> None:
    problem = random_problem(2, 7, 5, positives=positives, distance=distance, reduction=reduction)
    assert problem.prototypes is not None

    def loss(z: Tensor, c: Tensor, tau: Tensor) -> Tensor:
        return clop_kernels.clop_loss(z, problem.labels, c, temperature=tau, backend=backend, **problem.options)

    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    inputs = (problem.embeddings.clone().requires_grad_(), problem.prototypes.clone().requires_grad_(), tau)
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize(
    "problem",
    [
        two_sided_problem(7, 7, 5, labelled=False, reduction="none"),
        two_sided_problem(4, 9, 5, labelled=True, normalize=False),
        negatives_problem(9, 5),
        random_problem(2, 5, 5, normalize=False, positives="label"),
    ],
)
def test_gradcheck_of_sides_negatives_and_rows_as_they_are(problem: Problem, backend: str) -> None:
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    z = problem.embeddings.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z, tau: problem.loss(z, problem.labels, problem.prototypes, tau, backend), (z, tau))


def test_only_the_gradients_asked_for() -> None:
    problem = random_problem(2, 7, 5)
    full = problem.solve("tiled", torch.float64)
    assert problem.prototypes is not None
    for name in ("embeddings", "temperature", "prototypes"):
        tau = torch.tensor(problem.temperature, dtype=torch.float64)
        inputs = {"embeddings": problem.embeddings.clone(), "temperature": tau, "prototypes": problem.prototypes.clone()}
        inputs[name].requires_grad_()
        clop_kernels.clop_loss(labels=problem.labels, **inputs, **problem.options).backward()  # type: ignore[arg-type]
        torch.testing.assert_close(inputs[name].grad, full[name])
        assert all(value.grad is None for key, value in inputs.items() if key != name)


def test_without_grad_there_is_no_graph() -> None:
    assert not clop_kernels.ntxent_loss(torch.randn(4, 3)).requires_grad
    with torch.no_grad():
        assert not clop_kernels.ntxent_loss(torch.randn(4, 3, requires_grad=True)).requires_grad
    empty = clop_kernels.ntxent_loss(torch.randn(0, 3, requires_grad=True))
    assert empty.requires_grad
    assert empty == 0


def test_meta_and_fake_tensors_have_shapes() -> None:
    z = torch.empty(8, 4, device="meta", requires_grad=True)
    loss = clop_kernels.clop_loss(z, torch.empty(4, dtype=torch.int64, device="meta"), reduction="none")
    assert loss.shape == (8,)
    assert loss.device.type == "meta"
    assert torch.autograd.grad(loss.sum(), z)[0].shape == z.shape


def test_a_second_derivative_raises() -> None:
    z = torch.randn(6, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(clop_kernels.ntxent_loss(z), z, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'cannot be differentiated twice.*backend="reference"'):
        grad.sum().backward()


def test_torch_func(backend: str) -> None:
    problem = random_problem(2, 7, 5)
    assert problem.prototypes is not None
    prototypes = problem.prototypes
    expected = problem.solve(backend, torch.float64)

    def loss(z: Tensor, c: Tensor) -> Tensor:
        return clop_kernels.clop_loss(z, problem.labels, c, temperature=problem.temperature, backend=backend, **problem.options)

    grads, value = torch.func.grad_and_value(loss, argnums=(0, 1))(problem.embeddings, prototypes)
    torch.testing.assert_close(value, expected["loss"])
    torch.testing.assert_close(grads[0], expected["embeddings"])
    torch.testing.assert_close(grads[1], expected["prototypes"])
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        torch.func.grad(lambda z: torch.func.grad(loss)(z, prototypes).sum())(problem.embeddings)
    with pytest.raises(NotImplementedError, match="no vmap"):
        torch.vmap(clop_kernels.ntxent_loss)(torch.randn(3, 4, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inside", [True, False], ids=["backward-inside", "backward-outside"])
def test_autocast_rounds_the_operands_and_nothing_else(dtype: torch.dtype, inside: bool, backend: str) -> None:
    z = torch.randn(40, 16, requires_grad=True)
    linear = torch.nn.functional.normalize(z.detach(), dim=1).to(dtype).double().requires_grad_()
    expected = clop_kernels.ntxent_loss(linear, backend="reference")  # the same rounded rows, exactly
    with torch.autocast("cpu", dtype=dtype):
        loss = clop_kernels.ntxent_loss(z, backend=backend)
        double = clop_kernels.ntxent_loss(z.double(), backend=backend)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert loss.dtype == torch.float32
    assert z.grad is not None
    assert z.grad.dtype == torch.float32
    assert z.grad.isfinite().all()
    torch.testing.assert_close(loss.double(), expected, rtol=5e-3, atol=0)
    assert loss != clop_kernels.ntxent_loss(z, backend=backend)
    assert double == clop_kernels.ntxent_loss(z.double(), backend=backend)  # autocast leaves float64 alone


def training_step(z: Tensor, labels: Tensor, c: Tensor, tau: Tensor) -> Tensor:
    return clop_kernels.clop_loss(torch.tanh(z), labels, c, temperature=tau, positives="label") * 2


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_compile_without_a_graph_break_and_with_any_batch_size(compiler: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(training_step, fullgraph=True, dynamic=True, backend=compiler)
    c, tau = torch.eye(3, 4), torch.tensor(0.2, requires_grad=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (6, 10, 11):
            z, labels = torch.randn(2 * n, 4, requires_grad=True), torch.randint(-1, 3, (n,))
            expected = torch.autograd.grad(training_step(z, labels, c, tau), (z, tau))
            actual = torch.autograd.grad(compiled(z, labels, c, tau), (z, tau))
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e)


def test_compiled_module_under_autocast() -> None:
    torch._dynamo.reset()
    criterion = clop_kernels.CLOPLoss(3, 4, learnable_temperature=True)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    views = torch.randn(6, 4), torch.randn(6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(*views, labels=torch.arange(6) % 3), criterion(*views, labels=torch.arange(6) % 3))


def clip_step(left: Tensor, right: Tensor, tau: Tensor) -> Tensor:
    return clop_kernels.clip_loss(torch.tanh(left), right, temperature=tau, normalize=False) * 2


def test_compiled_clip_with_any_batch_size() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(clip_step, fullgraph=True, dynamic=True, backend="aot_eager")
    tau = torch.tensor(0.2, requires_grad=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (6, 10, 11):
            inputs = torch.randn(n, 4, requires_grad=True), torch.randn(n, 4, requires_grad=True), tau
            expected = torch.autograd.grad(clip_step(*inputs), inputs)
            actual = torch.autograd.grad(compiled(*inputs), inputs)
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e)


def test_bad_labels_raise_from_compiled_code() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(clop_kernels.clop_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="labels contains 7"):
        compiled(torch.randn(4, 3), torch.tensor([0, 7]), torch.eye(3))


# ---- what a call without the operator must see ---------------------------------------------------------------------------


def test_a_batch_of_upstream_gradients(backend: str) -> None:
    problem = random_problem(2, 4, 5, reduction="none")
    z, tau = problem.embeddings.clone().requires_grad_(), torch.tensor(0.3, dtype=torch.float64)
    terms = problem.loss(z, problem.labels, problem.prototypes, tau, backend)
    upstream = torch.eye(8, dtype=torch.float64)
    (actual,) = torch.autograd.grad(terms, z, upstream, is_grads_batched=True, retain_graph=True)
    expected = torch.stack([torch.autograd.grad(terms, z, one, retain_graph=True)[0] for one in upstream])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_negations_that_are_put_off(backend: str) -> None:
    assert_negations_are_seen(backend)


@pytest.mark.parametrize("name", ["embeddings", "prototypes", "temperature", "prototype_weight"])
def test_forward_mode_is_refused(name: str, backend: str) -> None:
    inputs = {"embeddings": torch.randn(8, 4), "prototypes": torch.eye(3, 4), "temperature": torch.tensor(0.3)}
    inputs["prototype_weight"] = torch.tensor(0.5)
    labels = torch.arange(4) % 3
    with torch.autograd.forward_ad.dual_level():
        clop_kernels.clop_loss(labels=labels, backend=backend, **inputs)  # type: ignore[arg-type]
        inputs[name] = torch.autograd.forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
        with pytest.raises(NotImplementedError, match=r'no forward-mode derivative.*backend="reference"'):
            clop_kernels.clop_loss(labels=labels, backend=backend, **inputs)  # type: ignore[arg-type]
        loss = clop_kernels.clop_loss(labels=labels, backend="reference", **inputs)  # type: ignore[arg-type]
        assert torch.autograd.forward_ad.unpack_dual(loss).tangent is not None
