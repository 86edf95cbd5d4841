"""A Triton kernel of one matrix product, for tests/gpu/test_losses.py; apart, for Triton need not be installed."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def add_product_kernel(a: Any, b: Any, c: Any) -> None:
    """c += a b, of 16 x 16 each. Of one warp, so that it is the instruction that the CUDA kernels have."""
    offsets = 16 * tl.arange(0, 16)[:, None] + tl.arange(0, 16)[None, :]
    tl.store(c + offsets, tl.dot(tl.load(a + offsets), tl.load(b + offsets), tl.load(c + offsets), input_precision="tf32"))
