"""The communication of the loss: agreement of all ranks, the rows of all ranks at once, or the rows of one rank at a time.

Everything uses the collectives of torch.distributed, on the backend that the group has for the tensors' device. Ranks may have
different numbers of rows. They learn each other's numbers from the header, a small exchange before all others.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import distributed_c10d

# all_gather_into_tensor is the older name, deprecated from torch 2.13 on.
_all_gather_single: Callable[..., Any] = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Sizes = tuple[int, ...]
"""The number of rows of each rank."""


@dataclass(frozen=True)
class Field:
    """One number of the header.

    Attributes:
        name: the name in error messages.
        value: this rank's value, a 64-bit int.
        show: turns a value into text for error messages. None: ranks may have different values.
    """

    name: str
    value: int
    show: Callable[[int], str] | None = str

    @staticmethod
    def of_choice(name: str, value: Any, choices: Sequence[Any]) -> Field:
        return Field(name, choices.index(value), lambda index: repr(choices[index]))

    @staticmethod
    def of_float(name: str, value: float | None) -> Field:
        """A float, by its bits. None is a number that the host does not know; it agrees with every value."""
        if value is None:
            return Field(name, _UNKNOWN, _float_text)
        (bits,) = struct.unpack("<q", struct.pack("<d", value))
        return Field(name, bits, _float_text)


(_UNKNOWN,) = struct.unpack("<q", struct.pack("<d", float("nan")))


def _float_text(bits: int) -> str:
    return "a tensor" if bits == _UNKNOWN else repr(struct.unpack("<d", struct.pack("<q", bits))[0])


_GREETING = 0x636C6F70  # the first number of every header; a rank that cannot take part sends _FAILED instead
_FAILED = -1


class Ranks:
    """The ranks of a process group, from the view of this rank.

    Args:
        group_name: the name under which torch registers the group.
    """

    def __init__(self, group_name: str) -> None:
        resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
        self.group: distributed.ProcessGroup = resolve(group_name)
        self.rank = distributed.get_rank(self.group)
        self.size = distributed.get_world_size(self.group)

    # ---- agreement -----------------------------------------------------------------------------------------------------

    def exchange(self, header: Sequence[Field], device: torch.device) -> list[list[int]]:
        """For each field, the values of all ranks. Fields with ``show`` have equal values on all ranks.

        The numbers travel through the group's CPU backend if it has one, as in ``init_process_group("cpu:gloo,cuda:nccl")``.
        Otherwise they travel through the memory of ``device``, and reading them waits for all work that is queued there.

        Raises:
            ValueError: on every rank, if ranks disagree; the message names the first such field and each rank's value.
            RuntimeError: if a rank has called :meth:`announce_failure` instead.
        """
        everyone = self._all_gather([_GREETING, *(field.value for field in header)], device)
        failed = [rank for rank, values in enumerate(everyone) if values[0] == _FAILED]
        if failed:
            raise RuntimeError(f"{_ranks_text(failed)} of the process group raised an error before the loss; see the error there")
        columns = [list(values) for values in zip(*everyone, strict=True)][1:]
        for field, values in zip(header, columns, strict=True):
            if field.show is not None and len(set(values) - {_UNKNOWN}) > 1:
                raise ValueError(
                    f"{field.name} differs between the ranks of the process group: {_who_has_what(values, field.show)}"
                )
        return columns

    def announce_failure(self, n_fields: int) -> None:
        """Takes the place of :meth:`exchange` on a rank that is about to raise an error, so that the other ranks do not wait."""
        self._all_gather([_FAILED] + [0] * n_fields, torch.device(self._device_types()[0]))

    def agreed_on(self, name: str, tensor: Tensor) -> Tensor:
        """The first rank's tensor, on every rank.

        Raises:
            ValueError: on every rank, if the ranks' tensors differ in shape or dtype.
        """
        on_group = tensor if tensor.device.type in self._device_types() else tensor.to(self._device_types()[0])
        header = [Field.of_choice(f"the dtype of {name}", tensor.dtype, DTYPES), Field(f"the dimensions of {name}", tensor.dim())]
        self.exchange(header, on_group.device)
        self.exchange([Field(f"dimension {k} of {name}", n) for k, n in enumerate(tensor.shape)], on_group.device)
        on_group = on_group.detach().clone(memory_format=torch.contiguous_format)
        distributed.broadcast(on_group, group=self.group, group_src=0)
        return on_group.to(tensor.device)

    def _all_gather(self, numbers: list[int], device: torch.device) -> list[list[int]]:
        mine = torch.tensor(numbers, dtype=torch.int64, device="cpu" if "cpu" in self._device_types() else device)
        everyone = mine.new_empty(self.size * len(numbers))
        _all_gather_single(everyone, mine, group=self.group)
        result: list[list[int]] = everyone.view(self.size, -1).tolist()
        return result

    def _device_types(self) -> list[str]:
        """The device types for which the group has a backend."""
        return [each.split(":")[0] for each in distributed.get_backend_config(self.group).split(",")]

    # ---- rows ------------------------------------------------------------------------------------------------------------

    def start_gather(self, rows: Tensor, sizes: Sizes) -> Callable[[], Tensor]:
        """Starts to gather ``rows``, (sizes[rank], ...), from all ranks. Returns a function that waits for the result.

        The result is (size * most, ...), with most = max(sizes). The rows of rank r start at r * most; the padding behind them
        holds arbitrary numbers.
        """
        most = max(sizes)
        if len(rows) < most:
            rows = torch.cat([rows, rows.new_zeros((most - len(rows), *rows.shape[1:]))])
        everyone = rows.new_empty((self.size * most, *rows.shape[1:]))
        work = _all_gather_single(everyone, rows.contiguous(), group=self.group, async_op=True) if most > 0 else None

        def finish() -> Tensor:
            if work is not None:
                work.wait()
            return everyone

        return finish

    def index_of_rows(self, sizes: Sizes, with_own: bool, device: torch.device) -> Tensor:
        """The indices, in the result of a gather, of the rows of all ranks, or of all other ranks, by rank. 1-dim int64."""
        n_own, most = sizes[self.rank], max(sizes)
        if min(sizes) == most:  # the common case, in which no number has to be sent to the device
            index = torch.arange((self.size - (not with_own)) * most, device=device)
            return index if with_own else torch.where(index < self.rank * most, index, index + most)
        counts = [0 if rank == self.rank and not with_own else count for rank, count in enumerate(sizes)]
        n_rows = sum(sizes) - (0 if with_own else n_own)
        ranks = torch.arange(self.size, device=device)
        on_device = torch.tensor(counts, device=device)
        # Row k of the result is row k - (the rows of all earlier ranks) of its own rank.
        offsets = ranks * most - (on_device.cumsum(0) - on_device)
        return torch.arange(n_rows, device=device) + offsets.repeat_interleave(on_device, output_size=n_rows)

    def ring(self, tensors: Sequence[Tensor], sizes: Sizes) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """Yields each rank and its tensors, (sizes[rank], ...): this rank, then the previous one, and so on round the ring.

        The next tensors arrive while the caller works on the current ones. The caller must not change them.
        """
        # A rank without rows sends one dummy row: torch requires that all ranks of a group take part in the first batch of sends
        # and receives, and leaves the behaviour undefined otherwise.
        held: Sequence[Tensor] = [x.contiguous() if len(x) else x.new_zeros((1, *x.shape[1:])) for x in tensors]
        for step in range(self.size):
            owner = (self.rank - step) % self.size
            coming: Sequence[Tensor] = []
            works: list[distributed.Work] = []
            if step + 1 < self.size:
                n_coming = max(sizes[(owner - 1) % self.size], 1)
                coming = [tensor.new_empty((n_coming, *tensor.shape[1:])) for tensor in held]
                works = self._pass_on(held, coming)
            yield owner, [tensor[: sizes[owner]] for tensor in held]
            for work in works:
                work.wait()
            held = coming

    def _pass_on(self, held: Sequence[Tensor], coming: Sequence[Tensor]) -> list[distributed.Work]:
        """Sends to the next rank and receives from the previous one."""
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        operations = [
            distributed.P2POp(transfer, tensor, group=self.group, tag=tag, group_peer=peer)
            for tag, pair in enumerate(zip(held, coming, strict=True))
            for transfer, tensor, peer in zip((distributed.isend, distributed.irecv), pair, (after, before), strict=True)
        ]
        works: list[distributed.Work] = distributed.batch_isend_irecv(operations)
        return works

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        distributed.all_reduce(numbers, group=self.group)
        return numbers

    def largest(self, number: Tensor) -> Tensor:
        """The largest over the ranks, in place."""
        distributed.all_reduce(number, op=distributed.ReduceOp.MAX, group=self.group)
        return number


def _ranks_text(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _who_has_what(values: Sequence[int], show: Callable[[int], str]) -> str:
    who: dict[int, list[int]] = {}
    for rank, value in enumerate(values):
        who.setdefault(value, []).append(rank)
    return "; ".join(f"{show(value)} on {_ranks_text(ranks)}" for value, ranks in who.items())


@functools.cache
def memory_of(device: torch.device) -> int:
    """The total memory of a device, in bytes."""
    if device.type in ("cuda", "xpu"):
        return int(getattr(torch, device.type).get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
