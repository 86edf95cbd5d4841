"""What several of these classes need: labels of which none is special, the processes there are, and one way to say no."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from .. import validation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def without_special_labels(*labels: Tensor) -> tuple[Tensor, ...]:
    """The labels with other names, none of them negative: this package takes -1 for "unlabelled", others take it for a class.

    What is not a tensor of integers comes back as it is, for the loss to refuse.
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
    """The default process group; None without one, if it is this process alone, or where torch was built without them."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    return distributed.group.WORLD


def failures_announced(group: ProcessGroup | None, check_ranks: bool) -> AbstractContextManager[Any]:
    """As of the loss itself, for what is checked before it."""
    return validation.failures_announced(validation.sharding(group, "auto", "ddp", check_ranks))


def unsupported(argument: str, value: Any, reason: str, remedy: str) -> NotImplementedError:
    return NotImplementedError(f"{argument}={value!r}: {reason}. {remedy}")
