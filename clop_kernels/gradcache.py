"""Gradient caching: encodes a batch that is too large for the encoder's memory (GradCache, arXiv 2101.06983).

A contrastive loss needs the embeddings of the whole batch. It does not need all activations of the encoder at once: the backward
pass of a sub-batch needs only the activations of that sub-batch. So the encoder runs twice. The first pass visits all sub-batches
without a graph and gives the embeddings. Once the loss has their gradients, the second pass visits each sub-batch again, with a
graph that is used and dropped at once::

    x ---- sub-batches, no graph ----> z ---> loss        forward
    x ---- sub-batches, each: forward, backward of dL/dz  backward

Both passes form one autograd function. Gradient caching therefore works with any loss, labels, a learned temperature, a gradient
scaler, Lightning or accelerate. It costs one more forward pass of the encoder, and keeps the activations of one sub-batch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from .ops import DEVICES_WITH_AUTOCAST

Inputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
"""The input of an encoder: ``encoder(x)`` for a tensor, ``encoder(*x)`` for a sequence, ``encoder(**x)`` for a mapping."""

_Item = TypeVar("_Item")


@overload
def encode(
    encoder: Callable[..., Tensor],
    inputs: Inputs,
    /,
    *,
    sub_batch: int,
    module: nn.Module | None = None,
    progress: bool = False,
) -> Tensor: ...


@overload
def encode(
    encoder: Callable[..., Tensor],
    inputs: Inputs,
    more: Inputs,
    /,
    *others: Inputs,
    sub_batch: int,
    module: nn.Module | None = None,
    progress: bool = False,
) -> tuple[Tensor, ...]: ...


def encode(
    encoder: Callable[..., Tensor],
    /,
    *inputs: Inputs,
    sub_batch: int,
    module: nn.Module | None = None,
    progress: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Computes ``encoder(x)`` for each input in the memory of one sub-batch, with the same gradients as one large batch.

    >>> z_1, z_2 = encode(encoder, view_1, view_2, sub_batch=256)
    >>> loss = criterion(z_1, z_2, labels=labels)
    >>> loss.backward()  # or scaler.scale(loss).backward(): runs the encoder again, sub-batch by sub-batch

    Pass all inputs of one encoder in one call. Give each of several encoders (CLIP) its own call.

    - *Randomness.* Both passes draw the same dropout masks. ``backward`` leaves the random state as it found it.
    - *Buffers.* The second pass uses the buffers of the first pass and does not change them: running statistics are updated once
      a step. BatchNorm in training mode normalises with the statistics of a sub-batch, not of the batch, as with gradient
      accumulation, and as each GPU does under data parallelism. ``sub_batch`` is then part of the model. GroupNorm and LayerNorm
      are not affected.
    - *Autocast.* The autocast that is active around this call applies to both passes. ``backward`` may stand outside, as usual.
    - *Distributed.* An encoder under DistributedDataParallel or ``fully_shard`` reduces its gradients once, in the last sub-batch
      of the second pass. Until that sub-batch, FSDP holds unsharded gradients. After ``backward``, FSDP's gradient
      synchronisation is on. With FSDP, all ranks need the same number of sub-batches.
    - *torch.compile.* Compile the encoder, or the loss. Compiling the step around this call works, but breaks the graph many
      times.
    - *Without gradients.* If ``torch.no_grad()`` is active, or nothing requires grad (a frozen encoder), there is only one pass.
    - *Not possible.* ``torch.autograd.grad`` with respect to parameters, and second derivatives. Weights must not change, and
      inputs must not be overwritten in place, between this call and ``backward``.

    Args:
        encoder: a module, a method of a module (``model.encode_image``), or another callable together with ``module``. Called
            with up to ``sub_batch`` rows, it returns their (rows, D) embeddings. A row's embedding must not depend on other rows.
        inputs: one or more inputs. Each is a tensor, a sequence of positional arguments, or a mapping of keyword arguments.
            Tensors are cut along dimension 0, which must be equal within one input. 0-dim tensors and other objects are passed
            on unchanged. Inputs may have different numbers of rows, and may require grad.
        sub_batch: the number of rows that the encoder sees at a time, at least 1. The last sub-batch of an input may be smaller.
        module: the module that holds the parameters used by ``encoder``. None: ``encoder`` is a module, or a method of one.
        progress: True shows a progress bar over the sub-batches of each pass; this needs tqdm.

    Returns:
        For one input, its embeddings, (N, D) in the encoder's dtype. For several inputs, a tuple of them, in order.

    Raises:
        TypeError, ValueError: the message names the argument, its value and what was expected.
        RuntimeError: in ``backward``, if the embeddings depend on nothing that requires grad.
        ModuleNotFoundError: for ``progress=True`` without tqdm.
    """
    if isinstance(sub_batch, bool) or not isinstance(sub_batch, int) or sub_batch < 1:
        raise ValueError(f"sub_batch={sub_batch!r}: expected an int of at least 1, the rows that the encoder sees at a time")
    if not inputs:
        raise TypeError("no inputs: expected at least one, as in encode(encoder, images, sub_batch=256)")
    if progress and importlib.util.find_spec("tqdm") is None:
        raise ModuleNotFoundError("progress=True needs tqdm: expected it to be installed (pip install tqdm), or progress=False")
    owner = _owner(encoder, module)
    calls: list[_Call] = []
    tensors: list[Tensor] = []
    for position, x in enumerate(inputs):
        call, its_tensors = _parse(f"inputs[{position}]", x, len(tensors))
        calls.append(call)
        tensors += its_tensors
    parameters = list(owner.parameters())
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    if learns and any(isinstance(part, DistributedDataParallel) and part.static_graph for part in owner.modules()):
        raise ValueError(
            "encoder is DistributedDataParallel with static_graph=True, whose no_sync() fails (PyTorch's issue 143580): expected "
            "static_graph=False, which is enough here, since each sub-batch is a forward and a backward pass of its own"
        )
    plan = _Plan(encoder, owner, calls, sub_batch, {x.device for x in (*tensors, *parameters)}, progress)
    # The outputs of an autograd function require grad only if one of its inputs does. The parameters are no inputs; they get
    # their gradients inside the backward pass. This empty tensor stands for all of them.
    trainable = torch.empty(0, requires_grad=learns)
    embeddings: tuple[Tensor, ...] = _Encode.apply(plan, trainable, *tensors)  # type: ignore[no-untyped-call]
    return embeddings if len(inputs) > 1 else embeddings[0]


def _owner(encoder: Callable[..., Tensor], module: nn.Module | None) -> nn.Module:
    """The module that owns the encoder's parameters, buffers and wrappers."""
    if not callable(encoder):
        raise TypeError(f"encoder is a {type(encoder).__name__}: expected a module, or another callable with module=")
    owner = module if module is not None else encoder if isinstance(encoder, nn.Module) else getattr(encoder, "__self__", None)
    if not isinstance(owner, nn.Module):
        what = f"encoder={encoder!r} with module=None" if module is None else f"module is a {type(module).__name__}"
        raise TypeError(
            f"{what}: expected an nn.Module or a method of one; for a function, pass module=, which holds its parameters"
        )
    return owner


# ---- the two passes -------------------------------------------------------------------------------------------------


class _Encode(torch.autograd.Function):
    """(plan, trainable, *tensors) -> the embeddings of each input. Its backward is the second pass."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, trainable: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.plan = plan
        ctx.save_for_backward(*tensors)  # also makes an input that is overwritten before the second pass an error
        ctx.set_materialize_grads(False)  # the loss may not use every input
        ctx.buffers = _buffers(plan.owner)
        ctx.random_states = []
        embeddings: dict[_Call, list[Tensor]] = {call: [] for call in plan.calls}
        for call, rows in plan.track(plan.sub_batches(), "encode"):
            ctx.random_states.append(plan.random_state())
            with plan.precision():
                embeddings[call].append(call.embed(plan.encoder, _cut(tensors[call.own], rows), rows))
        return tuple(torch.cat(parts) for parts in embeddings.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        tensors: tuple[Tensor, ...] = ctx.saved_tensors
        sums = [torch.zeros_like(x) if needed else None for x, needed in zip(tensors, ctx.needs_input_grad[2:], strict=True)]
        gradient_of = dict(zip(plan.calls, gradients, strict=True))
        todo = [
            (call, rows, gradient[rows], random_state)
            for (call, rows), random_state in zip(plan.sub_batches(), ctx.random_states, strict=True)
            if (gradient := gradient_of[call]) is not None
        ]
        no_sync = _no_sync(plan.owner)
        random_state_after, buffers_after = plan.random_state(), _buffers(plan.owner)
        try:
            _set_buffers(ctx.buffers)
            for n_done, (call, rows, gradient, random_state) in enumerate(plan.track(todo, "backward"), start=1):
                plan.set_random_state(random_state)
                pieces = _cut(tensors[call.own], rows)
                for piece, total in zip(pieces, sums[call.own], strict=True):
                    if total is not None:
                        piece.requires_grad_()
                        piece.grad = _cut([total], rows)[0]  # a view: autograd adds into ``total`` itself
                with ExitStack() as contexts:
                    for context in no_sync if n_done < len(todo) else ():
                        contexts.enter_context(context())
                    with torch.enable_grad(), plan.precision():
                        z = call.embed(plan.encoder, pieces, rows)
                    if not z.requires_grad:
                        raise RuntimeError(
                            f"the embeddings of {call.name} depend on no parameter and no input that requires grad: expected an "
                            "encoder that does not detach them. If it is frozen on purpose, encode under torch.no_grad()"
                        )
                    torch.autograd.backward(z, gradient)
        finally:
            _set_buffers(buffers_after)
            plan.set_random_state(random_state_after)
        return None, None, *sums


def _cut(tensors: Sequence[Tensor], rows: slice) -> list[Tensor]:
    return [x[rows].detach() if x.dim() else x.detach() for x in tensors]


def _no_sync(owner: nn.Module) -> list[Callable[[], AbstractContextManager[None]]]:
    """Contexts in which DDP and FSDP keep gradients on their rank, and reduce them in a later backward pass."""
    contexts: list[Callable[[], AbstractContextManager[None]]] = []
    for module in owner.modules():
        if isinstance(module, DistributedDataParallel):
            contexts.append(module.no_sync)
        elif hasattr(module, "set_requires_gradient_sync"):  # a module under fully_shard
            contexts.append(partial(_no_fsdp_sync, module))
    return contexts


@contextmanager
def _no_fsdp_sync(module: Any) -> Iterator[None]:
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


_Buffers: TypeAlias = list[tuple[nn.Module, str, Tensor, Tensor]]


def _buffers(owner: nn.Module) -> _Buffers:
    """Every buffer that can change: its module, its name, the tensor, and a copy of its values."""
    named = ((module, name, x) for module in owner.modules() for name, x in module.named_buffers(recurse=False))
    return [(module, name, x, x.detach().clone()) for module, name, x in named if not _is_expanded(x)]


def _is_expanded(x: Tensor) -> bool:
    """Whether elements share memory. Torch refuses to write into expanded tensors."""
    return any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))


def _set_buffers(buffers: _Buffers) -> None:
    for module, name, x, values in buffers:
        x.data.copy_(values)  # .data, because another graph may have saved this buffer and must still run backward
        module._buffers[name] = x


# ---- what both passes share -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Call:
    """How the encoder is called for one input."""

    name: str
    n_rows: int
    own: slice
    """The position of its tensors among the tensors of all inputs."""
    keywords: tuple[str, ...] | None
    """The names of the arguments; None if they are positional."""
    arguments: tuple[Any, ...]
    """The arguments, with None in the place of each tensor."""
    places: tuple[int, ...]
    """The places of the tensors among the arguments."""

    def embed(self, encoder: Callable[..., Tensor], tensors: Sequence[Tensor], rows: slice) -> Tensor:
        arguments = list(self.arguments)
        for place, x in zip(self.places, tensors, strict=True):
            arguments[place] = x
        z = encoder(*arguments) if self.keywords is None else encoder(**dict(zip(self.keywords, arguments, strict=True)))
        n_rows = rows.stop - rows.start
        if not isinstance(z, Tensor):
            raise TypeError(f"encoder returned a {type(z).__name__} for {self.name}: expected one tensor, ({n_rows}, D)")
        if z.dim() != 2 or len(z) != n_rows or not z.is_floating_point():
            raise ValueError(
                f"encoder returned shape {tuple(z.shape)} and dtype {z.dtype} for {n_rows} rows of {self.name}: "
                f"expected a floating tensor of shape ({n_rows}, D), one embedding for each row"
            )
        return z


def _parse(name: str, inputs: Inputs, n_tensors_before: int) -> tuple[_Call, list[Tensor]]:
    """Splits one input into a call and its tensors."""
    keywords = tuple(inputs) if isinstance(inputs, Mapping) else None
    if isinstance(inputs, Tensor):
        arguments: list[Any] = [inputs]
    elif isinstance(inputs, Mapping):
        arguments = list(inputs.values())
    elif isinstance(inputs, Sequence):
        arguments = list(inputs)
    else:
        raise TypeError(f"{name} is a {type(inputs).__name__}: expected a tensor, or a sequence or mapping with tensors in it")
    named = zip(keywords or range(len(arguments)), arguments, strict=True)
    lengths = {key: len(x) for key, x in named if isinstance(x, Tensor) and x.dim()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{name} has tensors of different lengths, {lengths}: expected the same dimension 0 in all of them")
    if not any(lengths.values()):
        kinds = [f"tensor {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__ for x in arguments[:8]]
        raise ValueError(f"{name} has no rows, {kinds}: expected at least one tensor whose dimension 0 is 1 or more")
    places = tuple(place for place, x in enumerate(arguments) if isinstance(x, Tensor))
    tensors = [arguments[place] for place in places]
    for place in places:
        arguments[place] = None
    own = slice(n_tensors_before, n_tensors_before + len(tensors))
    return _Call(name, max(lengths.values()), own, keywords, tuple(arguments), places), tensors


class _Plan:
    """The state that both passes share."""

    def __init__(
        self,
        encoder: Callable[..., Tensor],
        owner: nn.Module,
        calls: list[_Call],
        sub_batch: int,
        devices: set[torch.device],
        progress: bool,
    ) -> None:
        self.encoder = encoder
        self.owner = owner
        self.calls = calls
        self.sub_batch = sub_batch
        self.progress = progress
        self._accelerators = [device for device in devices if device.type not in ("cpu", "meta")]
        kinds = {"cpu", *(device.type for device in devices)}
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in kinds
            if kind in DEVICES_WITH_AUTOCAST
        ]

    def sub_batches(self) -> list[tuple[_Call, slice]]:
        """The sub-batches, in the order of both passes."""
        starts = ((call, start) for call in self.calls for start in range(0, call.n_rows, self.sub_batch))
        return [(call, slice(start, min(start + self.sub_batch, call.n_rows))) for call, start in starts]

    def precision(self) -> ExitStack:
        """Autocast as it was when the plan was made, without its cache.

        With the cache, some versions of torch reuse weights that were cast in a pass without a graph in a pass that needs a graph
        (PyTorch's issue 158232).
        """
        stack = ExitStack()
        for kind, dtype, enabled in self._autocast:
            stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        return stack

    def random_state(self) -> list[Tensor]:
        """The states of the random generators of the CPU and of the accelerators."""
        states = (torch.get_device_module(device).get_rng_state(*_index(device)) for device in self._accelerators)
        return [torch.get_rng_state(), *states]

    def set_random_state(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._accelerators, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, *_index(device))

    def track(self, items: list[_Item], label: str) -> Iterable[_Item]:
        """The items, with a progress bar if the caller wants one."""
        if not self.progress:
            return items
        from tqdm.auto import tqdm

        return tqdm(items, desc=label, unit="sub-batch", leave=False)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # there is one device, and torch.mps takes no argument for it
