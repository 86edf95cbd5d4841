"""The losses as PyTorch operators: schemas, fakes, the autograd formula, autocast. The backends do the computing.

``clop::loss`` and ``clop::loss_backward`` are opaque to torch.compile (no graph break) and to autograd, whose formula is
registered here. A second derivative raises an error. :class:`Operator` makes such a pair of operators from records whose fields
are declared once, in :mod:`clop_kernels.backends.contract`.

:func:`loss` is the entry point. If only autograd watches the call, it bypasses the operator: for a small batch, the dispatcher
and a registered formula cost more time than the loss itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .backends.contract import Gradients, LossOptions, Needs, Number, Residuals, Sharding, unit_rows


class Call(NamedTuple):
    """One call of a loss, with validated arguments.

    Attributes:
        embeddings: (N, D).
        labels: (B,) int64, or None.
        prototypes: (K, D), or None.
        options: the options of the loss.
        backend: its name, or None for the fastest that can run.
        sharding: how rows are spread over processes; None for one process.
    """

    embeddings: Tensor
    labels: Tensor | None
    prototypes: Tensor | None
    options: LossOptions
    backend: str | None
    sharding: Sharding | None = None

    def packed(self) -> tuple[Any, ...]:
        """The arguments of an operator. Numbers become tensors, so that torch.compile makes one graph for all their values."""
        return self._replace(options=self.options.with_numbers(self._as_tensor)).flat()

    def flat(self) -> tuple[Any, ...]:
        """All fields, in the order of the arguments of an operator."""
        return self.embeddings, self.labels, self.prototypes, *self.options, self.backend, *(self.sharding or ())

    def _as_tensor(self, number: Number) -> Tensor:
        if isinstance(number, Tensor):
            return number
        if not torch.compiler.is_compiling():
            return torch.tensor(number, dtype=torch.float64, device="cpu")
        # torch.compile can turn a product with a float into a product with a tensor, once the float has changed. The result is
        # on the device of the embeddings, because a CUDA graph cannot hold CPU tensors.
        is_cpu = self.embeddings.device.type == "cpu"
        return self.embeddings.new_ones((), dtype=torch.float64 if is_cpu else self.options.accumulate_dtype) * number

    @staticmethod
    def of(arguments: tuple[Any, ...]) -> Call:
        """The inverse of :meth:`flat`."""
        embeddings, labels, prototypes, *rest = arguments
        n_options = len(LossOptions._fields)
        options, backend, sharding = LossOptions(*rest[:n_options]), rest[n_options], rest[n_options + 1 :]
        return Call(embeddings, labels, prototypes, options, backend, Sharding(*sharding) if sharding else None)


def loss(call: Call) -> Tensor:
    """The loss, () or, for ``reduction="none"``, (N,)."""
    embeddings, labels, prototypes, options, _, sharding = call
    if options.has_tensors:
        precise = options.accumulate_dtype
        options = options.with_numbers(lambda x: x.to(precise) if isinstance(x, Tensor) else x)
        call = call._replace(options=options)
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        _refuse_tangents(embeddings, prototypes, *options.numbers)
    temperature = options.temperature
    has_backward = torch.is_grad_enabled() and (
        embeddings.requires_grad
        or (prototypes is not None and prototypes.requires_grad)
        or (isinstance(temperature, Tensor) and temperature.requires_grad)
    )
    if sharding is not None:
        call = call._replace(sharding=sharding._replace(has_backward=has_backward))
        return _first(torch.ops.clop.sharded_loss(*call.packed()))
    if not _runs_directly(embeddings, labels, prototypes, *options.numbers):
        return _first(_entrance()(*call.packed()))
    if has_backward:
        return _first(_DirectLoss.apply(embeddings, prototypes, temperature, call))  # type: ignore[no-untyped-call]
    with without_autocast(embeddings.device.type):
        return _first(_backend_of(call).forward(*_arguments_of(call)))


def _refuse_tangents(*inputs: Any) -> None:
    for x in inputs:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                "clop_kernels' loss has no forward-mode derivative: its kernels would drop the tangent. "
                'Use backend="reference", in N x N memory'
            )


def _first(results: Any) -> Tensor:
    value: Tensor = results[0] if isinstance(results, tuple) else results
    return value


def compute_dtype(embeddings: Tensor) -> torch.dtype:
    """The dtype to which the operands of the matrix products are rounded: that of the embeddings, or of autocast.

    Everything else, including the loss, stays in float32. Autocast does not affect float64.
    """
    if embeddings.dtype != torch.float64 and _is_autocast_on(embeddings.device.type):
        return torch.get_autocast_dtype(embeddings.device.type)
    return embeddings.dtype


_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "xla", "mtia", "maia", "ipu", torch._C._get_privateuse1_backend_name())
DEVICES_WITH_AUTOCAST = frozenset(device_type for device_type in _DEVICES if torch.amp.is_autocast_available(device_type))
"""The device types that have autocast ("meta" has none). Computed once, because torch.compile of torch 2.11 cannot trace it."""


def _is_autocast_on(device_type: str) -> bool:
    return device_type in DEVICES_WITH_AUTOCAST and torch.is_autocast_enabled(device_type)


_NOTHING = nullcontext()


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    return torch.autocast(device_type, enabled=False) if _is_autocast_on(device_type) else _NOTHING


def check_values(labels: Tensor | None, prototypes: Tensor | None, options: LossOptions) -> None:
    """Checks the values of tensors. Raises on a CPU; on other devices asserts on the device, without a synchronisation.

    Raises:
        ValueError: if a label is below -1 or has no prototype, if a temperature is not positive and finite, or if a prototype
            weight is negative or not finite.
    """
    if labels is not None and labels.numel() > 0:
        n_classes = None if prototypes is None else prototypes.shape[0]
        lowest, highest = labels.aminmax()
        if labels.device.type == "cpu":
            if lowest < -1:
                raise ValueError(f"labels contains {int(lowest)}: expected -1 for an unlabelled instance, or a class from 0 up")
            if n_classes is not None and highest >= n_classes:
                raise ValueError(
                    f"labels contains {int(highest)}: expected values below {n_classes}, the number of rows of prototypes"
                )
        else:
            torch._assert_async(lowest >= -1, "clop_kernels: labels contains a value below -1")
            if n_classes is not None:
                torch._assert_async(highest < n_classes, "clop_kernels: labels contains a value >= the number of prototypes")
    tau, weight = options.temperature, options.prototype_weight
    if isinstance(tau, Tensor):
        _check_value("temperature", tau, tau > 0, "a positive finite number")
    if isinstance(weight, Tensor):
        _check_value("prototype_weight", weight, weight >= 0, "a finite number of at least 0")


def _check_value(name: str, value: Tensor, is_in_range: Tensor, expected: str) -> None:
    is_valid = is_in_range & value.isfinite()
    if value.device.type != "cpu":
        torch._assert_async(is_valid, f"clop_kernels: {name} is not {expected}")
    elif not is_valid:
        raise ValueError(f"{name}={value.item()}: expected {expected}")


# ---- a call without the operator --------------------------------------------------------------------------------------------


def _runs_directly(*inputs: Any) -> bool:
    """Whether only autograd watches the operators: no tracer, mode or transform is active, and all tensors are plain.

    A tensor of a plain type may still be lazy (a pending negation) or batched. Its dispatch keys show this, and only the
    dispatcher can make it plain.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None:
        return False
    for x in inputs:
        if type(x) not in _PLAIN:
            return False
        if isinstance(x, Tensor) and torch._C._dispatch_keys(x).raw_repr() != _plain_keys(x.device.type):
            return False
    return True


_PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer, float, type(None)})


@functools.cache
def _plain_keys(device_type: str) -> int:
    """The dispatch keys of an ordinary tensor."""
    with torch.inference_mode(False):
        keys: int = torch._C._dispatch_keys(torch.empty(0, device=device_type)).raw_repr()
    return keys


def _backend_of(call: Call) -> ModuleType:
    """The module that computes the loss. Checks the values of tensors first, if the module does not do so itself."""
    embeddings, labels, prototypes, options, *_ = call
    module = backends.select(call.backend, embeddings.device, options.compute_dtype).load()
    if embeddings.device.type == "cpu" or not module.CHECKS_VALUES:
        check_values(labels, prototypes, options)
    return module


def _arguments_of(call: Call) -> tuple[Tensor, Tensor | None, Tensor | None, LossOptions]:
    """The arguments in the form that :mod:`clop_kernels.backends.contract` promises to a backend."""
    return call.embeddings, _contiguous(call.labels), _contiguous(call.prototypes), known_numbers(call.options)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def known_numbers(options: LossOptions) -> LossOptions:
    """The options with CPU numbers as floats, and with numbers on other devices in the accumulate dtype."""

    def known(number: Number) -> Number:
        if not isinstance(number, Tensor):
            return number
        return number.item() if number.device.type == "cpu" else number.to(options.accumulate_dtype)

    return options.with_numbers(known) if options.has_tensors else options


class _DirectLoss(torch.autograd.Function):
    """``clop::loss`` as an autograd function of a :class:`Call`.

    The arguments that may need a gradient are passed a second time on their own, because autograd cannot see them in ``call``.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, prototypes: Tensor | None, temperature: Number, call: Call) -> Tensor:
        value: Tensor
        with without_autocast(embeddings.device.type):
            value, residuals = _backend_of(call).forward(*_arguments_of(call))
        _save(ctx, call, residuals)
        return value

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, None, None, None
        needs_embeddings, needs_prototypes, needs_temperature, _ = ctx.needs_input_grad
        needs = Needs(needs_embeddings, needs_temperature, needs_prototypes)
        call, residuals = _saved(ctx, Residuals)
        if torch.is_grad_enabled() or not _runs_directly(grad_loss):
            grads = _by_operator(_entrance(backward=True), grad_loss, residuals, call, needs)
        else:
            grads = _as_needed(_backward(grad_loss, residuals, call, needs), call, needs)
        return grads.embeddings, grads.prototypes, grads.temperature, None


def _save(ctx: Any, call: Call, residuals: tuple[Tensor, ...]) -> None:
    """Saves a call and its residuals. All tensors go through save_for_backward, where hooks and autograd's checks see them."""
    embeddings, labels, prototypes, options, ctx.backend, ctx.sharding = call
    numbers: list[Tensor] = []
    if options.has_tensors:
        numbers = [x for x in options.numbers if isinstance(x, Tensor)]
        options = options.with_numbers(lambda x: None if isinstance(x, Tensor) else x)
    ctx.save_for_backward(embeddings, labels, prototypes, *residuals, *numbers)
    ctx.set_materialize_grads(False)
    ctx.options = options


def _saved(ctx: Any, residuals_type: Any) -> tuple[Call, Any]:
    """The call and the residuals that :func:`_save` was given."""
    embeddings, labels, prototypes, *saved = ctx.saved_tensors
    n_residuals = len(residuals_type._fields)
    options = ctx.options
    if len(saved) > n_residuals:
        numbers = iter(saved[n_residuals:])
        options = options.with_numbers(lambda x: next(numbers) if x is None else x)
        del saved[n_residuals:]
    return Call(embeddings, labels, prototypes, options, ctx.backend, ctx.sharding), residuals_type(*saved)


def _by_operator(operator: Any, grad_loss: Tensor, residuals: tuple[Tensor, ...], call: Call, needs: Needs) -> Gradients:
    results = operator(grad_loss, *residuals, *call.packed(), list(needs))
    return Gradients(*(grad if needed else None for grad, needed in zip(results, needs, strict=True)))


def _backward(grad_loss: Tensor, residuals: Residuals, call: Call, needs: Needs) -> Gradients:
    embeddings, labels, prototypes, options = _arguments_of(call)
    module = backends.select(call.backend, embeddings.device, options.compute_dtype).load()
    with without_autocast(embeddings.device.type):
        grads: Gradients = module.backward(grad_loss.contiguous(), embeddings, residuals, labels, prototypes, options, needs)
    return grads


def _as_needed(grads: Gradients, call: Call, needs: Needs) -> Gradients:
    """The gradients that autograd needs, each in the dtype of its input."""
    inputs: tuple[Any, ...] = call.embeddings, call.options.temperature, call.prototypes
    return Gradients(
        *(
            grad.to(x.dtype) if is_needed and grad is not None else None
            for grad, x, is_needed in zip(grads, inputs, needs, strict=True)
        )
    )


# ---- the operators ------------------------------------------------------------------------------------------------------------

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Number: "Tensor",
    torch.dtype: "ScalarType",
    str: "str",
    int: "int",
    bool: "bool",
    int | None: "SymInt?",
}


def _declared(record: Any) -> str:
    """The fields of a record, as text for a schema."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(record).items())


class Operator:
    """A pair of operators, ``clop::NAME`` and ``clop::NAME_backward``.

    The first takes the arguments of :meth:`Call.packed`, and returns the loss and its residuals. The second takes the upstream
    gradient, the residuals, the arguments again, and flags for the gradients that are needed. It returns the gradients; one that
    is not needed has no elements.

    Args:
        name: NAME.
        residuals: the NamedTuple of tensors that the first operator leaves for the second.
        forward: (call) -> the loss and its residuals.
        backward: (grad_loss, residuals, call, needs) -> :class:`.contract.Gradients`.
        fake: the same as ``forward``, for tensors without data.
        is_sharded: whether a call has a :class:`.contract.Sharding`.
        entrance: gives the operator that computes gradients; None: ``clop::NAME_backward``.
    """

    def __init__(
        self,
        name: str,
        residuals: Any,
        forward: Callable[[Call], tuple[Tensor, tuple[Tensor, ...]]],
        backward: Callable[[Tensor, Any, Call, Needs], Gradients],
        fake: Callable[[Call], tuple[Tensor, tuple[Tensor, ...]]],
        is_sharded: bool = False,
        entrance: Callable[[], Any] | None = None,
    ) -> None:
        self.residuals, self.forward, self.backward, self.fake = residuals, forward, backward, fake
        options = ", ".join([_declared(LossOptions), "str? backend", *([_declared(Sharding)] if is_sharded else [])])
        inputs = f"Tensor embeddings, Tensor? labels, Tensor? prototypes, {options}"
        library = self._library = torch.library.Library("clop", "FRAGMENT")
        library.define(f"{name}({inputs}) -> (Tensor loss, {_declared(residuals)})")
        library.define(
            f"{name}_backward(Tensor grad_loss, {_declared(residuals)}, {inputs}, bool[3] needs) "
            "-> (Tensor grad_embeddings, Tensor grad_temperature, Tensor grad_prototypes)"
        )
        backward_operator = getattr(torch.ops.clop, f"{name}_backward")
        self._entrance = entrance or (lambda: backward_operator)
        library.impl(name, self._run, "CompositeExplicitAutograd")
        library.impl(f"{name}_backward", self._run_backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"clop::{name}", self._run_fake, lib=library)
        torch.library.register_fake(f"clop::{name}_backward", self._run_backward_fake, lib=library)
        torch.library.register_autograd(f"clop::{name}", self.formula, setup_context=self.setup_context, lib=library)
        torch.library.register_autograd(f"clop::{name}_backward", _no_second_derivative, lib=library)

    def _run(self, *arguments: Any) -> tuple[Tensor, ...]:
        call = Call.of(arguments)
        with without_autocast(call.embeddings.device.type):
            value, residuals = self.forward(call)
        return value, *residuals

    def _run_fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        value, residuals = self.fake(Call.of(arguments))
        return value, *residuals

    def _run_backward(self, grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        residuals, call, needs = self._of_backward(arguments)
        with without_autocast(call.embeddings.device.type):
            grads = _as_needed(self.backward(grad_loss, residuals, call, needs), call, needs)
        return tuple(call.embeddings.new_empty(0) if grad is None else grad for grad in grads)

    def _run_backward_fake(self, grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        _, call, needs = self._of_backward(arguments)
        return tuple(
            x.new_empty(x.shape) if needed and isinstance(x, Tensor) else call.embeddings.new_empty(0)
            for x, needed in zip((call.embeddings, call.options.temperature, call.prototypes), needs, strict=True)
        )

    def _of_backward(self, arguments: tuple[Any, ...]) -> tuple[Any, Call, Needs]:
        *arguments_of_call, needs = arguments
        n_residuals = len(self.residuals._fields)
        residuals = self.residuals(*arguments_of_call[:n_residuals])
        return residuals, Call.of(tuple(arguments_of_call[n_residuals:])), Needs(*needs)

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, Call.of(inputs), output[1:])
        ctx.mark_non_differentiable(*output[1:])

    def formula(self, ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """The autograd formula: the gradients of all arguments of a call."""
        nothing: Any = Call.of((None,) * len(ctx.needs_input_grad))
        if grad_loss is None:
            return nothing.flat()
        needed = Call.of(ctx.needs_input_grad)
        needs = Needs(bool(needed.embeddings), bool(needed.options.temperature), bool(needed.prototypes))
        call, residuals = _saved(ctx, self.residuals)
        grads = _by_operator(self._entrance(), grad_loss, residuals, call, needs)
        options = nothing.options._replace(temperature=grads.temperature)
        results = nothing._replace(embeddings=grads.embeddings, prototypes=grads.prototypes, options=options)
        return results.flat()


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "clop_kernels' loss cannot be differentiated twice: its backward pass is a fused kernel without a derivative of its own. "
        'Use backend="reference", which autograd can differentiate any number of times, in N x N memory'
    )


def _fake(call: Call) -> tuple[Tensor, Residuals]:
    embeddings, options = call.embeddings, call.options
    n_rows, precise = embeddings.shape[0], options.accumulate_dtype
    norms, shift, inverse_total, negative = (embeddings.new_empty(n_rows, dtype=precise) for _ in range(4))
    value = embeddings.new_empty((n_rows,) if options.reduction == "none" else (), dtype=precise)
    groups = embeddings.new_empty((3, n_rows if options.positives == "label" else 0), dtype=torch.int32)
    counts = embeddings.new_empty(2, dtype=precise)
    return value, Residuals(unit_rows(embeddings, options.compute_dtype), norms, shift, inverse_total, negative, groups, counts)


LOSS = Operator(
    "loss",
    Residuals,
    forward=lambda call: _backend_of(call).forward(*_arguments_of(call)),
    backward=_backward,
    fake=_fake,
    entrance=lambda: _entrance(backward=True),
)


# ---- inside torch.func's transforms -------------------------------------------------------------------------------------------


def _no_vmap(*_: Any) -> None:
    raise NotImplementedError(
        'clop_kernels\' loss has no vmap: it takes one whole batch. Loop over the batches, or use backend="reference"'
    )


class _FunctorchLoss(torch.autograd.Function):
    """The same formula for torch.func.grad, which needs an autograd.Function and does not (yet) take a registered formula."""

    forward = staticmethod(torch.ops.clop.loss)
    setup_context = staticmethod(LOSS.setup_context)
    backward = staticmethod(LOSS.formula)
    vmap = staticmethod(_no_vmap)


class _FunctorchLossBackward(torch.autograd.Function):
    """The counterpart of :class:`_FunctorchLoss` for the backward operator."""

    forward = staticmethod(torch.ops.clop.loss_backward)
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(_no_second_derivative)
    vmap = staticmethod(_no_vmap)


def _entrance(backward: bool = False) -> Any:
    """The function to call for the loss or its backward pass: the operator, or its twin inside torch.func's transforms."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _FunctorchLossBackward.apply if backward else _FunctorchLoss.apply
    return torch.ops.clop.loss_backward if backward else torch.ops.clop.loss
