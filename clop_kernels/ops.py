"""The loss as PyTorch operators: schema, fake, autograd formula, autocast. A backend computes, nothing here does.

``clop::loss`` and ``clop::loss_backward`` are opaque to torch.compile (no graph break) and to autograd, whose formula is
registered here; a second derivative raises. :func:`loss` is the Python entrance, which reads the state of autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from . import backends
from .backends.contract import Gradients, LossOptions, Needs, Residuals, accumulate_dtype, unit_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

OPTIONS_SCHEMA = (
    "float temperature, Tensor? temperature_tensor, int n_views, str positives, float prototype_weight, str distance, "
    "str reduction, ScalarType compute_dtype, bool normalize, SymInt? n_left, bool negatives_only, str? backend"
)

_library = torch.library.Library("clop", "FRAGMENT")
_library.define(
    f"loss(Tensor embeddings, Tensor? labels, Tensor? prototypes, {OPTIONS_SCHEMA}) "
    "-> (Tensor loss, Tensor normalized, Tensor norms, Tensor shift, Tensor inverse_total, Tensor negative, Tensor groups, "
    "Tensor counts)"
)
_library.define(
    "loss_backward(Tensor grad_loss, Tensor embeddings, Tensor normalized, Tensor norms, Tensor shift, Tensor inverse_total, "
    f"Tensor negative, Tensor groups, Tensor counts, Tensor? labels, Tensor? prototypes, bool[3] needs, {OPTIONS_SCHEMA}) "
    "-> (Tensor grad_embeddings, Tensor grad_temperature, Tensor grad_prototypes)"
)


def loss(
    embeddings: Tensor,
    labels: Tensor | None,
    prototypes: Tensor | None,
    backend: str | None,
    **options: Unpack[OptionArguments],
) -> Tensor:
    """The loss of validated arguments."""
    result: tuple[Tensor, ...] = _entrance()(embeddings, labels, prototypes, *option_arguments(embeddings, **options), backend)
    return result[0]


class OptionArguments(TypedDict):
    """See :class:`clop_kernels.backends.contract.LossOptions`."""

    n_views: int
    positives: str
    temperature: float | Tensor
    prototype_weight: float
    distance: str
    reduction: str
    normalize: bool
    n_left: int | None
    negatives_only: bool


def option_arguments(
    embeddings: Tensor,
    *,
    n_views: int,
    positives: str,
    temperature: float | Tensor,
    prototype_weight: float,
    distance: str,
    reduction: str,
    normalize: bool,
    n_left: int | None,
    negatives_only: bool,
) -> tuple[Any, ...]:
    """What an operator takes as :data:`OPTIONS_SCHEMA`, but for the backend, its last.

    Under autocast the operands of the matrix products are rounded to the autocast dtype; all else, the loss included,
    stays in float32.
    """
    is_tensor = isinstance(temperature, Tensor)
    return (
        0.0 if is_tensor else temperature,
        temperature if is_tensor else None,
        n_views,
        positives,
        prototype_weight,
        distance,
        reduction,
        _compute_dtype(embeddings),
        normalize,
        n_left,
        negatives_only,
    )


_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "xla", "mtia", "maia", "ipu", torch._C._get_privateuse1_backend_name())
DEVICES_WITH_AUTOCAST = frozenset(device_type for device_type in _DEVICES if torch.amp.is_autocast_available(device_type))
"""Types of device; "meta" has none. Asked here and not at each call, which torch.compile of torch 2.11 cannot trace."""


def _compute_dtype(embeddings: Tensor) -> torch.dtype:
    device_type = embeddings.device.type
    if embeddings.dtype != torch.float64 and device_type in DEVICES_WITH_AUTOCAST and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return embeddings.dtype


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    return torch.autocast(device_type, enabled=False) if device_type in DEVICES_WITH_AUTOCAST else nullcontext()


def check_values(labels: Tensor | None, prototypes: Tensor | None, temperature: Tensor | None) -> None:
    """Checks what only the values show: raises on a CPU, asserts on the device without a synchronisation elsewhere.

    Raises:
        ValueError: if a label is below -1 or names a prototype that does not exist, or a temperature is not positive and finite.
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
    if temperature is not None:
        is_valid = (temperature > 0) & temperature.isfinite()
        if temperature.device.type == "cpu":
            if not is_valid:
                raise ValueError(f"temperature={temperature.item()}: expected a positive finite number")
        else:
            torch._assert_async(is_valid, "clop_kernels: temperature is not a positive finite number")


def options_of(
    temperature: float,
    temperature_tensor: Tensor | None,
    n_views: int,
    positives: str,
    prototype_weight: float,
    distance: str,
    reduction: str,
    compute_dtype: torch.dtype,
    normalize: bool,
    n_left: int | None,
    negatives_only: bool,
) -> LossOptions:
    value: float | Tensor = temperature
    if temperature_tensor is not None:
        on_device = temperature_tensor.to(accumulate_dtype(compute_dtype))
        value = float(on_device) if on_device.device.type == "cpu" else on_device
    return LossOptions(
        n_views, positives, value, prototype_weight, distance, reduction, compute_dtype, normalize, n_left, negatives_only
    )


def _forward(embeddings: Tensor, labels: Tensor | None, prototypes: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    *option_args, backend = args
    options = options_of(*option_args)
    labels, prototypes = _contiguous(labels), _contiguous(prototypes)
    module = backends.select(backend, embeddings.device, options.compute_dtype).load()
    if embeddings.device.type == "cpu" or not module.CHECKS_VALUES:
        check_values(labels, prototypes, option_args[1])
    with without_autocast(embeddings.device.type):
        value, residuals = module.forward(embeddings, labels, prototypes, options)
    return value, *residuals


def _backward(
    grad_loss: Tensor,
    embeddings: Tensor,
    normalized: Tensor,
    norms: Tensor,
    shift: Tensor,
    inverse_total: Tensor,
    negative: Tensor,
    groups: Tensor,
    counts: Tensor,
    labels: Tensor | None,
    prototypes: Tensor | None,
    needs: list[bool],
    *args: Any,
) -> tuple[Tensor, ...]:
    *option_args, backend = args
    options = options_of(*option_args)
    chosen = backends.select(backend, embeddings.device, options.compute_dtype)
    residuals = Residuals(normalized, norms, shift, inverse_total, negative, groups, counts)
    grad_loss, labels, prototypes = grad_loss.contiguous(), _contiguous(labels), _contiguous(prototypes)
    with without_autocast(embeddings.device.type):
        grads = chosen.load().backward(grad_loss, embeddings, residuals, labels, prototypes, options, Needs(*needs))
    return filled_gradients(grads, embeddings, option_args[1], prototypes, needs)


def _contiguous(x: Tensor | None) -> Tensor | None:
    """As the contract promises backends, whose kernels read one number after the other."""
    return None if x is None else x.contiguous()


def filled_gradients(
    grads: Gradients, embeddings: Tensor, temperature: Tensor | None, prototypes: Tensor | None, needs: list[bool]
) -> tuple[Tensor, ...]:
    """A backend's gradients as an operator returns them: of the inputs' dtypes, and without elements where not needed."""
    unfilled = unfilled_gradients(embeddings, temperature, prototypes, needs)
    return tuple(empty if grad is None else grad.to(empty.dtype) for grad, empty in zip(grads, unfilled, strict=True))


def unfilled_gradients(
    embeddings: Tensor, temperature: Tensor | None, prototypes: Tensor | None, needs: list[bool]
) -> tuple[Tensor, ...]:
    """Tensors of the shapes and dtypes of the gradients; one that is not needed has no elements."""
    return tuple(
        embeddings.new_empty(0) if x is None or not needed else x.new_empty(x.shape)
        for x, needed in zip((embeddings, temperature, prototypes), needs, strict=True)
    )


def _forward_fake(embeddings: Tensor, labels: Tensor | None, prototypes: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    _temperature, _tensor, _n_views, positives, _weight, _distance, reduction, compute_dtype, *_ = args
    n_rows = embeddings.shape[0]
    precise = accumulate_dtype(compute_dtype)
    per_row = [embeddings.new_empty(n_rows, dtype=precise) for _ in range(4)]
    value = embeddings.new_empty((n_rows,) if reduction == "none" else (), dtype=precise)
    groups = embeddings.new_empty((3, n_rows if positives == "label" else 0), dtype=torch.int32)
    counts = embeddings.new_empty(2, dtype=precise)
    return value, unit_rows(embeddings, compute_dtype), *per_row, groups, counts


def _backward_fake(
    grad_loss: Tensor,
    embeddings: Tensor,
    normalized: Tensor,
    norms: Tensor,
    shift: Tensor,
    inverse_total: Tensor,
    negative: Tensor,
    groups: Tensor,
    counts: Tensor,
    labels: Tensor | None,
    prototypes: Tensor | None,
    needs: list[bool],
    *args: Any,
) -> tuple[Tensor, ...]:
    return unfilled_gradients(embeddings, args[1], prototypes, needs)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embeddings, labels, prototypes, temperature, temperature_tensor, *options = inputs
    ctx.save_for_backward(embeddings, *output[1:], labels, prototypes, temperature_tensor)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.options = (temperature, options)


def autograd_formula(backward_operator: Callable[[], Any]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Of an operator of the arguments (embeddings, labels, prototypes, options), the first result of which is the loss.

    Its backward operator takes the upstream gradient, the embeddings, the other results, labels, prototypes, which gradients are
    needed, and the options.
    """

    def formula(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        embeddings, *residuals, labels, prototypes, temperature_tensor = ctx.saved_tensors
        temperature, options = ctx.options
        needs_embeddings, _labels, needs_prototypes, _temperature, needs_temperature, *_rest = ctx.needs_input_grad
        needs = [needs_embeddings, needs_temperature, needs_prototypes]
        if grad_loss is None:
            grads: list[Tensor | None] = [None, None, None]
        else:
            results = backward_operator()(
                grad_loss, embeddings, *residuals, labels, prototypes, needs, temperature, temperature_tensor, *options
            )
            grads = [grad if needed else None for grad, needed in zip(results, needs, strict=True)]
        return grads[0], None, grads[2], None, grads[1], *(None for _ in options)

    return formula


_autograd = autograd_formula(lambda: _entrance(backward=True))


def no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "clop_kernels' loss cannot be differentiated twice: its backward pass is a fused kernel without a derivative of its own. "
        'Take backend="reference", which autograd differentiates any number of times, at N x N memory'
    )


def _no_vmap(*_: Any) -> None:
    raise NotImplementedError(
        'clop_kernels\' loss has no vmap: it is one batch already. Loop over the batches, or take backend="reference"'
    )


class _FunctorchLoss(torch.autograd.Function):
    """The same formula for torch.func.grad, which takes an autograd.Function and not (yet) an operator's registered one."""

    forward = staticmethod(torch.ops.clop.loss)
    setup_context = staticmethod(setup_context)
    backward = staticmethod(_autograd)
    vmap = staticmethod(_no_vmap)


class _FunctorchLossBackward(torch.autograd.Function):
    """As :class:`_FunctorchLoss`, of the backward operator."""

    forward = staticmethod(torch.ops.clop.loss_backward)
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(no_second_derivative)
    vmap = staticmethod(_no_vmap)


def _entrance(backward: bool = False) -> Any:
    """What to call for the loss, or its backward pass: the operator, or inside torch.func's transforms its twin."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _FunctorchLossBackward.apply if backward else _FunctorchLoss.apply
    return torch.ops.clop.loss_backward if backward else torch.ops.clop.loss


_library.impl("loss", _forward, "CompositeExplicitAutograd")
_library.impl("loss_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("clop::loss", _forward_fake, lib=_library)
torch.library.register_fake("clop::loss_backward", _backward_fake, lib=_library)
torch.library.register_autograd("clop::loss", _autograd, setup_context=setup_context, lib=_library)
torch.library.register_autograd("clop::loss_backward", no_second_derivative, lib=_library)
