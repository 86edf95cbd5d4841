"""The tile of each kernel on each GPU, and the number of programs that share the columns. Nothing is tuned at run time.

A tile depends on the width, the dtype and the GPU, but never on the number of rows: another batch size compiles nothing. Every
tile compiles without spilling and fits in the shared memory of its GPU. ``python -m benchmarks.resources`` shows this for sm_80,
sm_90, sm_100 and sm_120, and CI checks it. If several tiles qualify, the entry has the most flops per byte of L2, unless
measurements decided. ``python -m benchmarks.tile_sweep`` makes the measurements, and a test in tests/benchmarks
checks the entries against them.

Decided by measurements on an H200 (sm_90), in bfloat16 (benchmarks/results/tiles/sm_90.csv, made before columns were split):

- gradient, D = 128: 64 x 128 with 4 warps and two stages, of which a processor holds two programs. At N = 65536 it reaches 77% of
  the rate of a plain matrix product; 128 x 128 with 8 warps had 58%.
- gradient, D = 256: 128 x 64. At N = 65536 (four rounds of programs), three stages take 0.88 of the time of two.
- softmax, D = 128: at 128 x 64, three stages take 0.75 to 0.83 of the time of two. At N = 65536 this is 87% of the rate of a
  matrix product.

Not measured yet, and so decided by the compiler's resource reports below: other widths, float32, wide rows, other GPUs, and split
columns everywhere.

Decided by the resource reports:

- bfloat16 and float16, D <= 256: whole rows stay on chip. On sm_90 a gradient tile of 128 x 128 fits below D = 128. On other GPUs
  128 columns spill, and at D = 256 older and smaller GPUs take 64 rows.
- float32 needs three TF32 products for one. The split operands of whole rows spill from D = 64 on (up to 2 KB a thread; 16 KB at
  D = 256). For D > 32, float32 therefore takes the path of wide rows, in chunks of the width, which also needs fewer flops.
- Wide rows load both operands through L2, so their tiles are square, and as large as registers allow: in bfloat16, 64 flops a
  byte at 128 x 128 and 85 at 128 x 256. `pairs`, a third of the flops of the backward pass, stays at 128 x 64 and 43 flops a
  byte: it contains both softmax paths, and spills in larger tiles.
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
        block_k: the part of the width that is taken at a time; the whole padded width if it fits.
        num_warps, num_stages: the options of Triton with these names.
        max_registers: the limit for a thread. None: the compiler decides, and spills a few to fit two programs on a processor.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def at_once(self, itemsize: int, target: Target) -> int:
        """The number of programs that the GPU runs at a time, limited by registers and shared memory."""
        n_warps = 2048 // (self.max_registers or 255)
        shared = (self.block_m + self.num_stages * self.block_n) * self.block_k * itemsize
        return target.n_processors * max(1, min(n_warps // self.num_warps, target.shared_memory // shared))


@dataclass(frozen=True)
class Target:
    """The properties of a GPU on which the choice of a tile depends.

    Attributes:
        capability: for an NVIDIA GPU, 90 for sm_90; 0 for any other device.
        n_processors: the number of streaming multiprocessors, or of the vendor's equivalent.
    """

    capability: int
    n_processors: int

    @property
    def is_datacenter(self) -> bool:
        """Whether the GPU is sm_90, sm_100 or sm_103: 227 KB of shared memory, and matrix units that read from it."""
        return self.capability in (90, 100, 103)

    @property
    def is_ampere(self) -> bool:
        """Whether the GPU is sm_80 to sm_89, where the kernels of wide rows spill at some tiles that other GPUs use."""
        return 80 <= self.capability < 90

    @property
    def shared_memory(self) -> int:
        """The bytes of shared memory on a processor. An unknown GPU counts as 64 KB."""
        return 1024 * (227 if self.is_datacenter else {80: 163, 86: 99, 89: 99, 120: 99}.get(self.capability, 64))


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target of a device. A CPU (for Triton's interpreter) counts as four processors, so that tests split columns."""
    if device.type == "cpu":
        return Target(0, 4)
    properties = torch.get_device_module(device).get_device_properties(device)
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    capability = 10 * properties.major + properties.minor if is_nvidia else 0
    return Target(capability, getattr(properties, "multi_processor_count", 64))


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current one, because Triton launches on the current device and its current stream."""
    if device.type == "cpu" or device.index == torch.get_device_module(device).current_device():
        return _NOTHING
    return torch.get_device_module(device).device(device)


_NOTHING = nullcontext()


BY_ROW = Tile(128, 1, 1, 4, 1)
"""The tile of kernels that read a few numbers for each row."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own cdiv is made for kernels, and takes 20 times as long on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def padded(width: int) -> int:
    """The width of a tile of whole rows: a power of two, and at least 16, the minimum of matrix units."""
    return max(16, next_power_of_2(width))


def is_wide(width: int, dtype: torch.dtype) -> bool:
    """Whether rows are too wide to fit on chip as operands of both products."""
    return width > (32 if dtype == torch.float32 else 256)


def whole_rows(width: int) -> Tile:
    """The tile of the O(N D) passes over rows: about 4096 elements for each program, and more warps for wide rows."""
    block = padded(width)
    return Tile(max(1, min(32, 4096 // block)), 1, block, min(16, max(4, block // 512)), 1)


MOST_ROUNDS = 4
"""The largest number of rounds of programs that splitting columns may create. It bounds the memory of their sums."""

TILES_OF_A_PROGRAM = 3
"""The fixed cost of a program, in tiles: it loads its rows and the first columns, and stores its sums."""


ALONE = 0.6
"""If two programs fit on a processor, the time of one that runs there alone, relative to two at once: D = 128 on an H200."""


def time_of(n_blocks: int, n_tiles: int, at_once: int, n_processors: int, n_splits: int) -> float:
    """The time of a pass, in tiles. Programs run in rounds of ``at_once``; a round lasts as long as the tiles of one program."""
    n_rounds, rest = divmod(n_blocks * n_splits, at_once)
    of_rest = 0 if rest == 0 else ALONE if rest <= n_processors < at_once else 1
    return (n_rounds + of_rest) * (cdiv(n_tiles, n_splits) + TILES_OF_A_PROGRAM)


@functools.cache
def splits(n_blocks: int, n_tiles: int, at_once: int, n_processors: int) -> int:
    """The number of programs over which the columns of a block of rows are split.

    With one program for each block, processors are idle if there are fewer blocks than a round holds, or a few more. For example,
    2048 rows are 16 blocks of 128, on 132 processors. The result takes the least time by :func:`time_of`, with as few splits as
    possible. This has not yet been confirmed on a GPU.

    Args:
        n_blocks: the number of blocks of rows, on both sides.
        n_tiles: the largest number of column tiles that a block walks over.
        at_once: the number of programs that the GPU runs at a time.
        n_processors: the number of processors of the GPU.
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
        return replace(tile, max_registers=128)  # two programs fit on a processor without a spill; on other GPUs they spill
    return tile


def gradient(width: int, dtype: torch.dtype, target: Target) -> Tile:
    """The tile of gradient_kernel, for rows that are not wide."""
    block = padded(width)
    if dtype == torch.float32:
        return _tile(64, 32, block, 2, target)
    if target.capability == 90 and block >= 128:
        return _tile(64, 128, block, 2, target) if block == 128 else _tile(128, 64, block, 3, target)
    if block == 256:
        return _tile(128, 32, block, 3, target) if target.is_datacenter else Tile(64, 32, block, 8, 2)
    return _tile(128, 128 if target.capability == 90 else 64, block, 3 if block <= 64 else 2, target)


PANEL = 4096
"""The side of the panel of M that wide rows write to memory: 32 MB in half precision, 64 MB in float32, less for few rows."""


def pairs(dtype: torch.dtype) -> Tile:
    return Tile(128, 64, 32 if dtype == torch.float32 else 64, 8, 3)


def product(dtype: torch.dtype, target: Target) -> Tile:
    if dtype != torch.float32:
        return Tile(128, 256 if target.capability == 90 else 128, 32 if target.is_ampere else 64, 8, 3)  # sm_100 spills at 256
    return Tile(64, 64, 32, 4, 3) if target.capability in (100, 103) else Tile(128, 64, 32, 8, 3)


def _tile(rows: int, columns: int, block_k: int, num_stages: int, target: Target) -> Tile:
    """A tile in which 128 rows take 8 warps, and a thread may use all registers. Without a limit, the compiler spills a few."""
    return Tile(rows, columns, block_k, 8 if rows == 128 else 4, num_stages, 255 if target.capability else None)
