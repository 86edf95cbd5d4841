"""Which tile a kernel gets on which GPU: a small table, and no tuning at import or first call.

Each entry compiles without spilling and within the shared memory of its part, which ``python -m benchmarks.resources``
shows for sm_80, sm_90, sm_100 and sm_120 and CI holds. Where several did, the entry is the one with the most flops per
byte of L2, unless measurements decided: ``python -m benchmarks.gpu_check --steps fill-tiles tiles`` makes them.

What an H200 decided, in bfloat16, for sm_90. Of all that were tried the chosen tile is within 3% of the fastest, at each
number of rows (``tiles.csv`` of benchmarks/results/nvidia-h200/2026-11-27-884de6d; tests/test_triton.py holds it):

- gradient, D = 128: 64 x 128 with 4 warps, at 77% of the rate of a plain matrix product for N = 65536 where 128 x 128 with
  8 had 58%. With two stages a processor holds two programs, which together do 1.2 times as much as one with three, but
  for a last round that fills half of them: see :func:`gradient`.
- gradient, D = 256: 128 x 64, and 64 rows where that leaves processors idle, though it leaves more of them idle than
  32 rows do. With three stages four rounds of programs take 0.88 of the time, one and two 1.03 to 1.05; three were not tried.
- softmax, D = 128: three stages at 128 x 64 take 0.75 to 0.83 of the time; for N = 65536 that is 87% of the rate of a matrix
  product.

Not measured yet, so chosen by what follows: other widths, float32, wide rows, other GPUs.

What the reports decided:

- bfloat16 and float16, D <= 256: whole rows stay on chip. On sm_90 a gradient tile of 128 x 128 fits below D = 128;
  elsewhere 128 columns spill, and at D = 256 older and smaller parts take 64 rows.
- float32 takes three TF32 products for one, and the split operands of whole rows spill from D = 64 on (up to 2 KB a
  thread, at D = 256 16 KB): from D > 32 it takes the path of wide rows, in chunks of the width, which also does fewer flops.
- Wide rows pass both operands through L2, so their tiles are square and large where registers allow: 64 flops a byte at
  128 x 128 and 85 at 128 x 256 in bfloat16. `pairs`, a third of the backward pass's flops, stays at 128 x 64, 43 flops a
  byte: its form with both softmax paths spills beyond.
- A program of 128 rows for N = 2048 would leave 116 of 132 processors idle: the tile is the tallest that keeps
  three quarters of them busy, 32 rows at least.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target that a device is; the CPU stands for Triton's interpreter."""
    if device.type == "cpu":
        return Target(0, 1)
    properties = torch.get_device_module(device).get_device_properties(device)
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    capability = 10 * properties.major + properties.minor if is_nvidia else 0
    return Target(capability, getattr(properties, "multi_processor_count", 64))


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current one: Triton launches there, on its current stream."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


ONE_PROGRAM = Tile(256, 1, 1, 4, 1)

_HEIGHTS = (128, 64, 32)


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


def height(n_rows: int, target: Target) -> int:
    """The most rows a program can own that leave at most a quarter of the processors without one."""
    return next((h for h in _HEIGHTS if 4 * cdiv(n_rows, h) >= 3 * target.n_processors), _HEIGHTS[-1])


def softmax(n_rows: int, width: int, dtype: torch.dtype, target: Target) -> Tile:
    rows = height(n_rows, target)
    block = padded(width)
    if is_wide(width, dtype):
        if dtype != torch.float32:
            columns = 32 if rows < 128 else 128 if target.capability == 90 else 64
            return _tile(rows, columns, 64, 3 if rows == 128 else 2, target)
        return _tile(rows, 64, 32, 3, target) if target.is_datacenter else _tile(rows, 32, 32, 2, target)
    if block == 256 and not target.is_datacenter:
        rows = min(rows, 64)
    columns = 32 if block <= 32 and not target.is_datacenter else 64
    is_deep = target.capability == 90 and rows == 128 and block == 128
    return _tile(rows, columns, block, 3 if is_deep else 2, target)


def gradient(n_rows: int, width: int, dtype: torch.dtype, target: Target) -> Tile:
    """For rows that are not wide.

    On sm_90 at D = 128 a round of 64-row programs, one a processor, takes 0.6 of the time of a round of two a processor: one or
    three rounds of one are faster than one or two of two, and no other number is.
    """
    rows = height(n_rows, target)
    block = padded(width)
    if target.capability == 90 and dtype != torch.float32 and block in (128, 256):
        if block == 128:
            rounds = cdiv(cdiv(n_rows, 64), target.n_processors)
            return _tile(64, 128, block, 3 if rounds in (1, 3) else 2, target)
        rounds = cdiv(cdiv(n_rows, 128), target.n_processors)
        return _tile(max(rows, 64), 64, block, 3 if rounds > 2 else 2, target)
    if dtype == torch.float32:
        return _tile(min(rows, 64), 32, block, 2, target)
    if block == 256 and not target.is_datacenter:
        return Tile(min(rows, 64), 32, block, 8 if rows > 32 else 4, 2)
    columns = 32 if block == 256 and rows == 32 else 64
    if target.capability == 90 and rows == 128:
        columns = 128
    return _tile(rows, columns, block, 3 if block <= 64 else 2, target)


def panel(n_rows: int, dtype: torch.dtype) -> int:
    """The side of the square of M that wide rows keep in L2: 32 MB in half precision, 16 MB in float32.

    ``n_rows`` of two sides is that of the longer one.
    """
    return min(2048 if dtype == torch.float32 else 4096, next_power_of_2(max(n_rows, 16)))


def pairs(dtype: torch.dtype) -> Tile:
    return Tile(128, 64, 32 if dtype == torch.float32 else 64, 8, 3)


def product(dtype: torch.dtype, target: Target) -> Tile:
    if dtype != torch.float32:
        return Tile(128, 256 if target.capability == 90 else 128, 64, 8, 3)  # sm_100 spills at 256
    return Tile(64, 64, 32, 4, 3) if target.capability in (100, 103) else Tile(128, 64, 32, 8, 3)


def _tile(rows: int, columns: int, block_k: int, num_stages: int, target: Target) -> Tile:
    """128 rows take 8 warps. Fewer are for small N, where no processor has a second program to save registers for."""
    if rows == 128:
        return Tile(rows, columns, block_k, 8, num_stages)
    return Tile(rows, columns, block_k, 4, num_stages, max_registers=255 if target.capability else None)
