"""Which rank has which rows of a loss that is spread over a process group, and how a rank's rows meet those of the other ranks.

A rank holds its own rows by position, sorted by positive group (:mod:`clop_kernels.groups`). The rows of other
ranks arrive in blocks: one block with the rows of all ranks ("gather"), or one block for each rank ("ring"). The
rows of a block are sorted by group too, so that the positives of a row are a run of the block.
:mod:`clop_kernels.distributed` decides which kernel compares them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .backends import Backend
from .backends.contract import CHOICES, GRADIENT_SCALES, NUMBERS, STRATEGIES, LossOptions, Sharding
from .collectives import DTYPES, Field, Ranks, Sizes, memory_of

GATHERED_SHARE = 1 / 16
"""strategy="auto" gathers if the rows of all ranks and their sorted copy take at most this share of a device's memory."""


class Side(NamedTuple):
    """Rows of this rank, and the columns that they are compared with: rows of one side, of every rank."""

    rows: slice  # of local positions
    columns: slice  # of local positions: this rank's share of the columns
    n_columns: Sizes  # the share of every rank
    with_own: bool  # whether this rank's own columns are included; without sides, they have a pass of their own

    @property
    def n_rows(self) -> int:
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True)
class Plan:
    """The knowledge that all ranks share after the header: how many rows each rank has on each side, and the strategy.

    Attributes:
        n_left: for every rank, the number of rows on the left side, or on the only one.
        n_right: for every rank, the number of rows on the right side; () without sides.
    """

    ranks: Ranks
    options: LossOptions
    n_left: Sizes
    n_right: Sizes
    is_ring: bool

    @staticmethod
    def agreed(embeddings: Tensor, prototypes: Tensor | None, options: LossOptions, sharding: Sharding, backend: Backend) -> Plan:
        ranks = Ranks(sharding.group_name)
        n_rows, width = embeddings.shape
        n_left = n_rows if options.n_left is None else options.n_left
        sizes: list[Sizes] = [(n,) * ranks.size for n in (n_left, n_rows - n_left)]
        memory = memory_of(embeddings.device)
        if sharding.check_ranks:
            header = _header(embeddings, prototypes, options, sharding, backend)
            assert len(header) == N_FIELDS
            of_left, of_right, of_memory, *_ = ranks.exchange(header, embeddings.device)
            sizes, memory = [tuple(of_left), tuple(of_right)], min(of_memory)
        n_gathered = sum(ranks.size * max(side) + sum(side) for side in sizes)  # the padded rows, and the sorted copy
        n_bytes = n_gathered * width * options.compute_dtype.itemsize
        is_ring = sharding.strategy == "ring" or (sharding.strategy == "auto" and n_bytes > GATHERED_SHARE * memory)
        return Plan(ranks, options, sizes[0], () if options.n_left is None else sizes[1], is_ring)

    def table(self) -> Tensor:
        """(3, world) int64 on the CPU: both sizes of each rank, and whether the strategy is "ring"."""
        return torch.tensor([self.n_left, self.n_right or (0,) * self.ranks.size, (int(self.is_ring),) * self.ranks.size])

    @staticmethod
    def of_table(table: Tensor, options: LossOptions, sharding: Sharding) -> Plan:
        n_left, n_right, (is_ring, *_) = table.tolist()
        ranks = Ranks(sharding.group_name)
        return Plan(ranks, options, tuple(n_left), () if options.n_left is None else tuple(n_right), bool(is_ring))

    @property
    def sides(self) -> tuple[Side, ...]:
        """The sides that have pairs."""
        n_left = self.n_left[self.ranks.rank]
        left = slice(0, n_left)
        if not self.options.has_pairs:
            return ()
        if not self.n_right:
            return (Side(left, left, self.n_left, with_own=False),)
        right = slice(n_left, n_left + self.n_right[self.ranks.rank])
        return Side(left, right, self.n_right, with_own=True), Side(right, left, self.n_left, with_own=True)

    @property
    def has_keys(self) -> bool:
        """Whether a row can have positives on other ranks or on the other side."""
        return self.options.positives == "label" or bool(self.n_right)

    def keys(self, labels: Tensor | None, order: Tensor) -> Tensor:
        """An ascending key for each position. Positives of each other have the same key; -1: no positives elsewhere.

        Empty without ``has_keys``.
        """
        if not self.has_keys:
            return order[:0].clone()
        if self.options.positives == "label":
            assert labels is not None
            return labels.repeat(self.options.n_views).index_select(0, order).clamp(min=-1)
        first = sum(self.n_left[: self.ranks.rank])  # the index of this rank's first pair in the world
        return first + order % max(self.n_left[self.ranks.rank], 1)


class Block(NamedTuple):
    """The arguments of one pass over pairs (:mod:`clop_kernels.backends.contract`); the backward pass adds the coefficients."""

    zhat: Tensor
    groups: Tensor
    n_left: int | None
    coefficients: Tensor | None


@dataclass(frozen=True)
class Rows:
    """This rank's rows by position, in the backward pass also their coefficients, (4, n), and the blocks that they meet.

    Each method yields the passes of one side. Without sides, the first pass compares this rank's rows with each other, while the
    rows of other ranks arrive.
    """

    plan: Plan
    zhat: Tensor
    groups: Tensor
    keys: Tensor
    coefficients: Tensor | None = None

    def nothing(self) -> Block:
        return Block(self.zhat.new_empty((0, self.zhat.shape[1])), self.groups.new_empty((3, 0)), None, None)

    def ring(self, side: Side) -> Iterator[Block]:
        rank, has_keys = self.plan.ranks.rank, self.plan.has_keys
        both = self.zhat.new_empty((side.n_rows + max(side.n_columns), self.zhat.shape[1]))  # reused by all steps
        both[: side.n_rows] = self.zhat[side.rows]
        tensors = [self.zhat[side.columns]]
        if has_keys:
            tensors.append(self.keys[side.columns])
        if self.coefficients is not None:
            tensors.append(self._sent(side))
        for owner, (zhat, *rest) in self.plan.ranks.ring(tensors, side.n_columns):
            if owner == rank and not side.with_own:
                yield from self._alone(side)
                continue
            received = self._received(rest[-1].T) if self.coefficients is not None else None
            table = self._crossing(side, len(zhat), rest[0] if has_keys else None)
            n_both = side.n_rows + len(zhat)
            both[side.n_rows : n_both] = zhat
            yield from self._across(side, both[:n_both], table, received)

    def gather(self, side: Side) -> Iterator[Block]:
        ranks = self.plan.ranks
        finish = ranks.start_gather(self.zhat[side.columns], side.n_columns)
        finish_keys = ranks.start_gather(self.keys[side.columns], side.n_columns) if self.plan.has_keys else None
        yield from self._alone(side)
        places = ranks.index_of_rows(side.n_columns, side.with_own, self.zhat.device)
        keys = None
        if finish_keys is not None:  # sorted by group, so that the positives of a row are a run
            keys, order = torch.sort(finish_keys().index_select(0, places), stable=True)
            places = places.index_select(0, order)
        everyone = finish()
        n_rows, n_columns = side.n_rows, len(places)
        zhat = everyone.new_empty((n_rows + n_columns, everyone.shape[1]))
        zhat[:n_rows] = self.zhat[side.rows]
        torch.index_select(everyone, 0, places, out=zhat[n_rows:])
        del everyone, finish  # finish refers to it too; this frees N D numbers while the caller works on the sorted copy
        table = self._crossing(side, n_columns, keys)
        table[0, n_rows:] = places
        yield from self._across(side, zhat, table, None)

    def gather_coefficients(self, side: Side, zhat: Tensor, table: Tensor) -> Iterator[Block]:
        """The passes of :meth:`gather` again, for the backward pass; ``zhat`` and ``table`` are those of its last block."""
        finish = self.plan.ranks.start_gather(self._sent(side), side.n_columns)
        yield from self._alone(side)
        received = finish().index_select(0, table[0, side.n_rows :].to(torch.int64)).T
        yield from self._across(side, zhat, table, self._received(received))

    def _alone(self, side: Side) -> Iterator[Block]:
        if not side.with_own and side.n_rows > 0:
            yield Block(self.zhat, self.groups, None, self.coefficients)

    def _across(self, side: Side, zhat: Tensor, table: Tensor, received: Tensor | None) -> Iterator[Block]:
        if 0 < side.n_rows < len(zhat):
            both = None
            if self.coefficients is not None and received is not None:
                both = torch.cat([self.coefficients[:, side.rows], received], 1)
            yield Block(zhat, table, side.n_rows, both)

    def _crossing(self, side: Side, n_columns: int, keys: Tensor | None) -> Tensor:
        """(3, rows + columns): the positive run of each row among the columns, which follow the rows. ``keys`` ascend."""
        n_rows = side.n_rows
        table = self.groups.new_full((3, n_rows + n_columns), n_rows)
        if keys is not None:
            own = self.keys[side.rows].contiguous()
            starts = torch.searchsorted(keys, own)
            ends = torch.where(own < 0, starts, torch.searchsorted(keys, own, right=True))
            table[1, :n_rows] += starts
            table[2, :n_rows] += ends
        return table

    def _sent(self, side: Side) -> Tensor:
        """The coefficients that other ranks need from this rank's columns, (columns, 2 or 4). Only positives need b and c."""
        assert self.coefficients is not None
        a, _, _, shift = of_columns = self.coefficients[:, side.columns]
        return (of_columns if self.plan.has_keys else torch.stack([a, shift])).T.contiguous()

    def _received(self, sent: Tensor) -> Tensor:
        """(2 or 4, columns), as received, to (4, columns)."""
        if self.plan.has_keys:
            return sent
        a, shift = sent
        return torch.stack([a, torch.zeros_like(a), torch.zeros_like(a), shift])


def _header(
    embeddings: Tensor, prototypes: Tensor | None, options: LossOptions, sharding: Sharding, backend: Backend
) -> list[Field]:
    n_rows, n_left = embeddings.shape[0], options.n_left
    return [
        Field("rows on the left", n_rows if n_left is None else n_left, None),
        Field("rows on the right", 0 if n_left is None else n_rows - n_left, None),
        Field("memory", memory_of(embeddings.device), None),
        Field("the number of sides that rows have", 1 if n_left is None else 2),
        Field("the width D of the embeddings", embeddings.shape[1]),
        Field.of_choice("the dtype of the embeddings", embeddings.dtype, DTYPES),
        Field("the number of prototypes", 0 if prototypes is None else prototypes.shape[0]),
        Field.of_choice("backend", backend.name, backends.NAMES),
        Field.of_choice("strategy", sharding.strategy, STRATEGIES),
        Field.of_choice("grad_scale", sharding.grad_scale, GRADIENT_SCALES),
        Field.of_choice("whether a gradient is wanted (requires_grad)", sharding.has_backward, (False, True)),
        *(_field_of(name, getattr(options, name)) for name in _AGREED_OPTIONS),
    ]


_AGREED_OPTIONS = tuple(name for name in LossOptions._fields if name != "n_left")
"""``n_left`` is left out, since ranks may have different numbers of left rows."""

N_FIELDS = 11 + len(_AGREED_OPTIONS)


def _field_of(name: str, value: Any) -> Field:
    if name in NUMBERS:
        return Field.of_float(name, None if isinstance(value, Tensor) else value)
    if isinstance(value, torch.dtype):
        return Field.of_choice("the dtype of the matrix products (autocast)", value, DTYPES)
    if isinstance(value, str):
        return Field.of_choice(name, value, CHOICES[name])
    return Field.of_choice(name, value, (False, True)) if isinstance(value, bool) else Field(name, value)
