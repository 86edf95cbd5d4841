"""Checks of the users' arguments. Each error names the argument, its value, what was expected, and the remedy.

Nothing here reads the values of a tensor; :func:`clop_kernels.ops.check_values` does.
"""

from __future__ import annotations

import math
import numbers
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backends import REFERENCE
from .backends.contract import GRADIENT_SCALES, STRATEGIES, Number, Sharding

if torch.distributed.is_available():
    from . import distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_EMBEDDING_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def sharding(group: ProcessGroup | None, strategy: str, grad_scale: str, check_ranks: bool) -> Sharding | None:
    """The arguments about processes as one record; None without a group.

    :func:`check_strategies` checks the choices later, where an error can be announced to the other ranks.
    """
    if group is None:
        return None
    if not torch.distributed.is_available():
        raise RuntimeError("group is given, but this build of torch has no torch.distributed: expected group=None")
    non_member: Any = torch.distributed.GroupMember.NON_GROUP_MEMBER
    if group is non_member:
        raise ValueError("group: this process is not a member of the group; expected only its members to call the loss")
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"group is a {type(group).__name__}: expected a torch.distributed.ProcessGroup, such as torch.distributed.group.WORLD"
        )
    return Sharding(group.group_name, strategy, grad_scale, bool(check_ranks))


def failures_announced(sharding: Sharding | None) -> AbstractContextManager[Any]:
    """A context in which an error of this rank becomes an error on every rank, so that no rank waits in vain.

    In a compiled graph, only the operator itself can fail. An error during tracing is not announced, unless torch.compile then
    falls back to running the function uncompiled.
    """
    if sharding is None or torch.compiler.is_compiling():
        return _NOTHING
    return distributed.FailuresAnnounced(sharding)


_NOTHING = nullcontext()


def check_spread(backend: str | None) -> None:
    """Raises an error if this call cannot have a group."""
    if backend == REFERENCE:
        raise ValueError('backend="reference" with a group: expected another backend, or all rows in one process')
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise NotImplementedError("group inside a torch.func transform: expected torch.autograd, or all rows in one process")


def check_strategies(strategy: str, grad_scale: str) -> None:
    check_choice("strategy", strategy, STRATEGIES)
    check_choice("grad_scale", grad_scale, GRADIENT_SCALES)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: expected a torch.Tensor")


def check_rows(name: str, rows: Tensor, shape: str = "(N, D)", remedy: str = "") -> None:
    check_tensor(name, rows)
    if rows.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(rows.shape)}: expected 2 dimensions, {shape}{remedy}")
    if rows.dtype not in _EMBEDDING_DTYPES:
        raise TypeError(f"{name} has dtype {rows.dtype}: expected one of {', '.join(map(str, _EMBEDDING_DTYPES))}")
    if rows.shape[1] < 1:
        raise ValueError(f"{name} has shape {tuple(rows.shape)}: expected a width D of at least 1")


def check_sides(left_name: str, left: Tensor, right_name: str, right: Tensor) -> None:
    check_rows(left_name, left)
    check_rows(right_name, right)
    if right.shape[1] != left.shape[1] or right.dtype != left.dtype or right.device != left.device:
        raise ValueError(
            f"{right_name} has width {right.shape[1]}, dtype {right.dtype} and is on {right.device}: expected those of "
            f"{left_name}, {left.shape[1]}, {left.dtype} and {left.device}"
        )


def check_embeddings(embeddings: Tensor, n_views: int) -> None:
    remedy = "; for (B, V, D) features pass torch.cat(features.unbind(1)) with n_views=V"
    is_stacked = isinstance(embeddings, Tensor) and embeddings.dim() == 3
    check_rows("embeddings", embeddings, "(n_views * B, D)", remedy if is_stacked else "")
    if isinstance(n_views, bool) or not isinstance(n_views, int):
        raise TypeError(f"n_views={n_views!r} of type {type(n_views).__name__}: expected an int")
    if n_views < 1:
        raise ValueError(f"n_views={n_views}: expected at least 1")
    if embeddings.shape[0] % n_views != 0:
        raise ValueError(
            f"embeddings has {embeddings.shape[0]} rows, not a multiple of n_views={n_views}: "
            f"expected n_views * B rows, view-major"
        )


def checked_labels(name: str, labels: object, n_instances: int, device: torch.device) -> Tensor:
    check_tensor(name, labels)
    assert isinstance(labels, Tensor)
    if labels.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} has dtype {labels.dtype}: expected an integer dtype; {name}.long() converts")
    if labels.dim() != 1 or labels.shape[0] != n_instances:
        raise ValueError(
            f"{name} has shape {tuple(labels.shape)}: expected ({n_instances},), one label for each instance, not for each row "
            f"(the views of an instance share its label)"
        )
    if labels.device != device:
        raise ValueError(f"{name} is on {labels.device}: expected the device of embeddings, {device}")
    return labels.to(torch.int64)


def check_prototypes(prototypes: Tensor, embeddings: Tensor) -> None:
    check_tensor("prototypes", prototypes)
    width = embeddings.shape[1]
    if prototypes.dim() != 2 or prototypes.shape[1] != width or prototypes.shape[0] < 1:
        raise ValueError(
            f"prototypes has shape {tuple(prototypes.shape)}: expected (K, {width}), K >= 1 rows as wide as embeddings"
        )
    if prototypes.dtype not in _EMBEDDING_DTYPES:
        raise TypeError(f"prototypes has dtype {prototypes.dtype}: expected one of {', '.join(map(str, _EMBEDDING_DTYPES))}")
    if prototypes.device != embeddings.device:
        raise ValueError(f"prototypes is on {prototypes.device}: expected the device of embeddings, {embeddings.device}")


def checked_temperature(temperature: Number, device: torch.device) -> Number:
    if type(temperature) is float and 0 < temperature < math.inf:  # the fast path: with few rows, checks dominate a call
        return temperature
    value = _checked_number("temperature", temperature, device)
    if not isinstance(value, Tensor) and value <= 0:
        raise ValueError(f"temperature={temperature}: expected a positive finite number")
    return value


def checked_prototype_weight(weight: Number, device: torch.device) -> Number:
    if type(weight) is float and 0 <= weight < math.inf:
        return weight
    value = _checked_number("prototype_weight", weight, device)
    if not isinstance(value, Tensor) and value < 0:
        raise ValueError(f"prototype_weight={weight}: expected a number of at least 0")
    return value


def check_weight_is_not_learned(weight: Number) -> None:
    if isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "prototype_weight requires grad: expected a number that is not learned, such as prototype_weight.detach(); "
            'only backend="reference" computes its gradient'
        )


def _checked_number(name: str, value: Number, device: torch.device) -> Number:
    """``value`` as a finite float, or as a 0-dim tensor on the device, whose value is not read."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: expected a 0-dim tensor, such as {name}.squeeze()")
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name} has dtype {value.dtype}: expected a floating dtype")
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}: expected the device of embeddings, {device}, or a float")
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} of type {type(value).__name__}: expected a number")
    if not -math.inf < value < math.inf:  # torch.compile does not trace isfinite()
        raise ValueError(f"{name}={value}: expected a finite number")
    return float(value)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")
