"""The backend ``triton`` in Triton's interpreter on this CPU, with tiles so small that a small problem has many."""

from __future__ import annotations

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


def shrink_tiles(monkeypatch: pytest.MonkeyPatch, splits_columns: bool = False) -> None:
    """Sets tiles of 16 x 16 and panels of 32; ``splits_columns`` splits the columns by 1, 2 or 3, by the number of blocks."""
    from clop_kernels.backends.triton import tiles

    def tile(width: int, dtype: torch.dtype) -> tiles.Tile:
        return tiles.Tile(16, 16, 16 if tiles.is_wide(width, dtype) else tiles.padded(width), 4, 1)

    monkeypatch.setattr(tiles, "softmax", lambda width, dtype, target: tile(width, dtype))
    monkeypatch.setattr(tiles, "gradient", lambda width, dtype, target: tile(width, dtype))
    monkeypatch.setattr(tiles, "splits", lambda n_blocks, *_: 1 + n_blocks % 3 if splits_columns else 1)
    monkeypatch.setattr(tiles, "pairs", lambda dtype: tiles.Tile(16, 16, 16, 4, 1))
    monkeypatch.setattr(tiles, "product", lambda dtype, target: tiles.Tile(16, 16, 16, 4, 1))
    monkeypatch.setattr(tiles, "PANEL", 32)


def set_wide(monkeypatch: pytest.MonkeyPatch, is_wide: bool) -> None:
    """Takes the path of wide rows, or that of narrow ones, at any width."""
    from clop_kernels.backends.triton import tiles

    monkeypatch.setattr(tiles, "is_wide", lambda width, dtype: is_wide)
