"""The backend ``triton`` in Triton's interpreter on this CPU, with tiles so small that a small problem has many."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clop_kernels import backends
from clop_kernels.backends import contract

from .oracle import with_nan_between_rows

TRITON = next(b for b in backends.BACKENDS if b.name == "triton")
OBSTACLE = TRITON.obstacle(torch.device("cpu"), torch.float32)

interpreted = pytest.mark.skipif(OBSTACLE is not None, reason=f"needs Triton's interpreter: {OBSTACLE}")

# Values past the end of a tile may become infinite before they are masked, and NumPy, which the interpreter runs on, warns.
without_numpy_warnings = pytest.mark.filterwarnings(
    "ignore:.* encountered in:RuntimeWarning", "ignore:All-NaN slice encountered:RuntimeWarning"
)


def keep_rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lays zhat out as on a GPU, with NaN between its rows, which no kernel may read."""
    monkeypatch.setattr(contract, "DENSE_DEVICES", ())
    if OBSTACLE is None:
        monkeypatch.setattr(TRITON.load(), "unit_rows", lambda z, dtype: with_nan_between_rows(contract.unit_rows(z, dtype)))


def round_products_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes s_ij and s_ji the same bits, as on a GPU. NumPy's float32 product sums them in different orders on some CPUs."""
    from triton.runtime import interpreter

    def product(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(dtype)

    monkeypatch.setattr(interpreter, "np", SimpleNamespace(**vars(np) | {"matmul": product}))


def shrink_tiles(monkeypatch: pytest.MonkeyPatch, splits_columns: bool = False, in_panel: int = 16) -> None:
    """Sets tiles of 16 x 16, panels of 32, and in these tiles of ``in_panel``.

    ``splits_columns`` splits the columns by 1, 2 or 3, by the number of blocks.
    """
    from clop_kernels.backends.triton import tiles

    def tile(width: int, dtype: torch.dtype) -> tiles.Tile:
        return tiles.Tile(16, 16, 16 if tiles.is_wide(width, dtype) else tiles.padded(width), 4, 1)

    monkeypatch.setattr(tiles, "softmax", lambda width, dtype, target: tile(width, dtype))
    monkeypatch.setattr(tiles, "gradient", lambda width, dtype, target: tile(width, dtype))
    monkeypatch.setattr(tiles, "splits", lambda n_blocks, *_: 1 + n_blocks % 3 if splits_columns else 1)
    monkeypatch.setattr(tiles, "pairs", lambda dtype: tiles.Tile(in_panel, in_panel, 16, 4, 1))
    monkeypatch.setattr(tiles, "product", lambda dtype, target: tiles.Tile(in_panel, in_panel, 16, 4, 1))
    monkeypatch.setattr(tiles, "PANEL", 32)


def set_wide(monkeypatch: pytest.MonkeyPatch, is_wide: bool) -> None:
    """Takes the path of wide rows, or that of narrow ones, at any width."""
    from clop_kernels.backends.triton import tiles

    monkeypatch.setattr(tiles, "is_wide", lambda width, dtype: is_wide)
