"""Which tile a kernel gets on which GPU, and over how many programs columns are split: no tuning at import or first call.

A tile depends on the width, the dtype and the GPU, and never on the number of rows: nothing is compiled when that changes.
Each compiles without spilling and within the shared memory of its part, which ``python -m benchmarks.resources``
shows for sm_80, sm_90, sm_100 and sm_120 and CI holds. Where several did, the entry is the one with the most flops per
byte of L2, unless measurements decided: ``python -m benchmarks.tile_sweep`` makes them, and tests/test_tile_sweep.py holds them.

What an H200 decided, in bfloat16, for sm_90 (benchmarks/results/tiles/sm_90.csv, where columns were not split yet):

- gradient, D = 128: 64 x 128 with 4 warps and two stages, of which a processor holds two programs: 77% of the rate of a plain
  matrix product for N = 65536, where 128 x 128 with 8 warps had 58%.
- gradient, D = 256: 128 x 64. With three stages four rounds of programs take 0.88 of the time of two.
- softmax, D = 128: three stages at 128 x 64 take 0.75 to 0.83 of the time of two; for N = 65536 that is 87% of the rate of a
  matrix product.

Not measured yet, so chosen by what follows: other widths, float32, wide rows, other GPUs, and split columns anywhere.

What the reports decided:

- bfloat16 and float16, D <= 256: whole rows stay on chip. On sm_90 a gradient tile of 128 x 128 fits below D = 128;
  elsewhere 128 columns spill, and at D = 256 older and smaller parts take 64 rows.
- float32 takes three TF32 products for one, and the split operands of whole rows spill from D = 64 on (up to 2 KB a
  thread, at D = 256 16 KB): from D > 32 it takes the path of wide rows, in chunks of the width, which also does fewer flops.
- Wide rows pass both operands through L2, so their tiles are square and large where registers allow: 64 flops a byte at
  128 x 128 and 85 at 128 x 256 in bfloat16. `pairs`, a third of the backward pass's flops, stays at 128 x 64, 43 flops a
  byte: its form with both softmax paths spills beyond.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Tile:
    """The tile of one program.

    Attributes:
        block_m, block_n: rows and columns.
        block_k: how much of the width it takes at a time: the whole, padded, where that fits.
        num_warps, num_stages: Triton's.
        max_registers: what a thread may take; None leaves it to the compiler, which spills a few to fit two programs a processor.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def at_once(self, itemsize: int, target: Target) -> int:
        """How many programs the GPU holds at a time, by their registers and their shared memory."""
        n_warps = 2048 // (self.max_registers or 255)
        shared = (self.block_m + self.num_stages * self.block_n) * self.block_k * itemsize
        return target.n_processors * max(1, min(n_warps // self.num_warps, target.shared_memory // shared))


@dataclass(frozen=True)
class Target:
    """What the choice of a tile depends on.

    Attributes:
        capability: of an NVIDIA GPU, 90 for sm_90; 0 for any other device.
        n_processors: streaming multiprocessors, or what the vendor calls them.
    """

    capability: int
    n_processors: int

    @property
    def is_datacenter(self) -> bool:
        """sm_90 and sm_100: 227 KB of shared memory, and matrix units that read it."""
        return self.capability in (90, 100, 103)

    @property
    def is_ampere(self) -> bool:
        """sm_80 to sm_89, for which wide rows' kernels spill at some of the others' tiles."""
        return 80 <= self.capability < 90

    @property
    def shared_memory(self) -> int:
        """Bytes a processor has for the tiles of its programs; 64 KB stand for a GPU of which nothing is known."""
        return 1024 * (227 if self.is_datacenter else {80: 163, 86: 99, 89: 99, 120: 99}.get(self.capability, 64))


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target that a device is. The CPU, for Triton's interpreter, has several processors, so that columns are split."""
    if device.type == "cpu":
        return Target(0, 4)
    properties = torch.get_device_module(device).get_device_properties(device)
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    capability = 10 * properties.major + properties.minor if is_nvidia else 0
    return Target(capability, getattr(properties, "multi_processor_count", 64))


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current one: Triton launches there, on its current stream."""
    if device.type == "cpu" or device.index == torch.get_device_module(device).current_device():
        return _NOTHING
    return torch.get_device_module(device).device(device)


_NOTHING = nullcontext()


BY_ROW = Tile(128, 1, 1, 4, 1)
"""Of kernels that have a few numbers a row."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; Triton's own, made for kernels, takes 20 times as long on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def padded(width: int) -> int:
    """The width that a tile of whole rows has: a power of two, and 16 at least, which matrix units ask for."""
    return max(16, next_power_of_2(width))


def is_wide(width: int, dtype: torch.dtype) -> bool:
    """Whether whole rows do not fit on chip as operands of both products."""
    return width > (32 if dtype == torch.float32 else 256)


def whole_rows(width: int) -> Tile:
    """For passes over rows, O(N D): about 4096 elements a program, wide rows with more warps."""
    block = padded(width)
    return Tile(max(1, min(32, 4096 // block)), 1, block, min(16, max(4, block // 512)), 1)


MOST_ROUNDS = 4
"""Split columns make at most so many rounds of programs, which bounds the memory of their sums."""

TILES_OF_A_PROGRAM = 3
"""What a program costs besides its tiles, in tiles: loads of its rows and of the first columns, stores of its sums."""


ALONE = 0.6
"""The time of a program that has a processor for itself, where two fit, in that of two: D = 128 on an H200."""


def time_of(n_blocks: int, n_tiles: int, at_once: int, n_processors: int, n_splits: int) -> float:
    """How long a pass takes, in tiles: programs run in rounds of ``at_once``, a round as long as the tiles of one program."""
    n_rounds, rest = divmod(n_blocks * n_splits, at_once)
    of_rest = 0 if rest == 0 else ALONE if rest <= n_processors < at_once else 1
    return (n_rounds + of_rest) * (cdiv(n_tiles, n_splits) + TILES_OF_A_PROGRAM)


@functools.cache
def splits(n_blocks: int, n_tiles: int, at_once: int, n_processors: int) -> int:
    """Over how many programs the columns of a block of rows are split.

    One program a block leaves processors idle where there are fewer blocks, or a few more, than a round has: 2048 rows are 16
    blocks of 128, on 132 processors. The choice is the fewest splits of those that take the least time by :func:`time_of`; no GPU
    has confirmed it yet.

    Args:
        n_blocks: of rows, in both sides.
        n_tiles: of columns, that the block with the most walks over.
        at_once: programs the GPU holds at a time.
        n_processors: of the GPU.
    """
    in_int32 = (2**31 - 1) // max(1, n_tiles)  # the kernels multiply tiles by splits
    most = max(1, min(n_tiles, MOST_ROUNDS * at_once // max(1, n_blocks), in_int32))
    return min(range(1, most + 1), key=lambda n_splits: time_of(n_blocks, n_tiles, at_once, n_processors, n_splits))


def softmax(width: int, dtype: torch.dtype, target: Target) -> Tile:
    block = padded(width)
    if is_wide(width, dtype):
        if dtype != torch.float32:
            return _tile(128, 128 if target.capability == 90 else 64, 64, 2 if target.is_ampere else 3, target)
        return _tile(128, 64, 32, 3, target) if target.is_datacenter else _tile(128, 32, 32, 2, target)
    rows = 64 if block == 256 and not target.is_datacenter else 128
    columns = 32 if block in (16, 32, 256) and not target.is_datacenter else 64
    tile = _tile(rows, columns, block, 3 if target.capability == 90 and block == 128 else 2, target)
    if target.capability == 90 and block <= 128 and dtype != torch.float32:
        return replace(tile, max_registers=128)  # two programs a processor, without a spill; elsewhere with one
    return tile


def gradient(width: int, dtype: torch.dtype, target: Target) -> Tile:
    """For rows that are not wide."""
    block = padded(width)
    if dtype == torch.float32:
        return _tile(64, 32, block, 2, target)
    if target.capability == 90 and block >= 128:
        return _tile(64, 128, block, 2, target) if block == 128 else _tile(128, 64, block, 3, target)
    if block == 256:
        return _tile(128, 32, block, 3, target) if target.is_datacenter else Tile(64, 32, block, 8, 2)
    return _tile(128, 128 if target.capability == 90 else 64, block, 3 if block <= 64 else 2, target)


PANEL = 4096
"""The side of the square of M that wide rows keep: 32 MB in half precision, 64 MB in float32, of few rows less."""


def pairs(dtype: torch.dtype) -> Tile:
    return Tile(128, 64, 32 if dtype == torch.float32 else 64, 8, 3)


def product(dtype: torch.dtype, target: Target) -> Tile:
    if dtype != torch.float32:
        return Tile(128, 256 if target.capability == 90 else 128, 32 if target.is_ampere else 64, 8, 3)  # sm_100 spills at 256
    return Tile(64, 64, 32, 4, 3) if target.capability in (100, 103) else Tile(128, 64, 32, 8, 3)


def _tile(rows: int, columns: int, block_k: int, num_stages: int, target: Target) -> Tile:
    """128 rows take 8 warps, and all registers that there are: left to choose, the compiler spills a few for occupancy."""
    return Tile(rows, columns, block_k, 8 if rows == 128 else 4, num_stages, 255 if target.capability else None)
