"""Helpers that several of these classes share: labels without a special value, the process group, and one kind of refusal."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from .. import validation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def without_special_labels(*labels: Tensor) -> tuple[Tensor, ...]:
    """Shifts labels so that none is negative: -1 means unlabelled in this package, but is an ordinary class in others.

    Anything but integer tensors is returned unchanged; the loss then refuses it.
    """
    if not all(isinstance(x, Tensor) and not x.dtype.is_floating_point and x.dtype != torch.bool for x in labels):
        return labels
    wide = tuple(x.to(torch.int64) for x in labels)
    lowest = [x.amin() for x in wide if x.numel() > 0]
    if not lowest:
        return wide
    offset = torch.stack(lowest).amin().clamp(max=0)
    return tuple(x - offset for x in wide)


def all_processes() -> ProcessGroup | None:
    """The default process group. None if there is none, if it has one process, or if torch was built without distributed."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    return distributed.group.WORLD


def failures_announced(group: ProcessGroup | None, check_ranks: bool) -> AbstractContextManager[Any]:
    """Announces errors of the checks before the loss to the other ranks, as the loss does for its own checks."""
    return validation.failures_announced(validation.sharding(group, "auto", "ddp", check_ranks))


def unsupported(argument: str, value: Any, reason: str, remedy: str) -> NotImplementedError:
    return NotImplementedError(f"{argument}={value!r}: {reason}. {remedy}")
