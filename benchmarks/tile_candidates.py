"""The tiles that :mod:`benchmarks.tile_sweep` tries beside the shipped ones. To try another tile, add it here."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tile:
    """A tile. Its fields are columns of the sweep's table; the first ones are those of tiles.Tile.

    Attributes:
        block_m, block_n: Rows and columns.
        block_k: How much of the width it loads at a time. None means the whole width, padded.
        num_warps, num_stages: Triton's launch options.
        max_registers: The most registers per thread. None leaves it to the compiler.
        n_splits: Over how many programs the columns are split. None leaves it to the package.
    """

    block_m: int
    block_n: int
    block_k: int | None
    num_warps: int
    num_stages: int
    max_registers: int | None = 255
    n_splits: int | None = None

    def __str__(self) -> str:
        depth = "" if self.block_k is None else f"x{self.block_k}"
        registers = "" if self.max_registers in (None, 255) else f", {self.max_registers} registers"
        splits = "" if self.n_splits is None else f", columns in {self.n_splits}"
        return f"{self.block_m}x{self.block_n}{depth}, {self.num_warps} warps, {self.num_stages} stages{registers}{splits}"


@dataclass(frozen=True)
class Group:
    """Tiles of one kernel, to be compared with each other.

    Attributes:
        kernel: A function of tiles.py: "softmax" or "gradient"; for wide rows "pairs" or "product".
        form: "plain" is NT-Xent of two views, "two-sided" is CLIP's loss. The temperature is the number 0.1.
        dtype, D: Dtype and width of the embeddings.
        candidates: The tiles to try beside the shipped one, the most promising first.
    """

    kernel: str
    form: str
    dtype: str
    D: int
    candidates: tuple[Tile, ...]

    @property
    def name(self) -> str:
        return f"{self.kernel}-{self.form}-{self.dtype}-{self.D}"


def _tiles(*columns: tuple[int, ...], depth: int | None = None) -> tuple[Tile, ...]:
    """Tiles from tuples of rows, columns, warps, stages and, optionally, the most registers per thread."""
    return tuple(Tile(m, n, depth, warps, stages, *registers) for m, n, warps, stages, *registers in columns)


def _split(tile: Tile, *counts: int) -> tuple[Tile, ...]:
    """A tile with its columns split over each of these numbers of programs, instead of the package's choice."""
    return tuple(replace(tile, n_splits=n) for n in counts)


# A limit of 128 registers lets a processor hold two programs of 8 warps, if nothing else prevents it. Two programs of 4 warps fit
# even with 255 registers.
GROUPS = (
    Group(
        "gradient", "plain", "bfloat16", 128,
        _tiles(
            (64, 128, 4, 2), (64, 128, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2),
            (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 2), (128, 32, 8, 3, 128), (64, 256, 4, 2), (64, 256, 8, 2),
        )
        + _split(Tile(64, 128, None, 4, 2), 1, 2, 4),
    ),
    Group(
        "softmax", "plain", "bfloat16", 128,
        _tiles(
            (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (128, 256, 8, 2),
            (256, 64, 8, 2), (256, 128, 8, 2), (64, 128, 4, 2), (64, 128, 4, 3), (64, 256, 4, 2), (64, 64, 4, 3),
            (128, 64, 8, 3, 128),
        )
        + _split(Tile(128, 64, None, 8, 3, 128), 1, 2, 4),
    ),
    Group(
        "gradient", "plain", "bfloat16", 256,
        _tiles(
            (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 4), (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 3),
            (64, 128, 8, 2),
        )
        + _split(Tile(128, 64, None, 8, 3), 1, 2, 4),
    ),
    Group(
        "softmax", "plain", "bfloat16", 256,
        _tiles(
            (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (256, 64, 8, 2), (64, 128, 4, 2), (64, 64, 4, 2),
            (64, 64, 4, 3), (128, 32, 8, 3),
        ),
    ),
    Group(
        "gradient", "plain", "bfloat16", 64,
        _tiles(
            (128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 4, 2), (64, 128, 4, 3),
            (64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3, 128), (64, 256, 4, 2),
        ),
    ),
    Group(
        "softmax", "plain", "bfloat16", 64,
        _tiles(
            (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 256, 8, 2),
            (256, 64, 8, 2), (256, 128, 8, 2), (64, 128, 4, 3), (64, 256, 4, 2), (128, 64, 8, 3, 128),
        ),
    ),
    Group(
        "pairs", "plain", "bfloat16", 512,
        _tiles((128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 3), (64, 128, 4, 3), depth=64),
    ),
    Group(
        "product", "plain", "bfloat16", 512,
        _tiles((128, 256, 8, 3), (128, 256, 8, 4), (128, 128, 8, 3), (128, 128, 8, 4), (64, 256, 4, 3), depth=64),
    ),
    Group(
        "softmax", "plain", "bfloat16", 512,
        _tiles((128, 128, 8, 3), (128, 128, 8, 4), (128, 64, 8, 3), (128, 64, 8, 4), (128, 256, 8, 3), (64, 128, 4, 3), depth=64),
    ),
    Group("pairs", "plain", "float32", 128, _tiles((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (128, 128, 8, 2), depth=32)),
    Group(
        "product", "plain", "float32", 128,
        _tiles((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 128, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3), depth=32),
    ),
    Group(
        "softmax", "plain", "float32", 128,
        _tiles((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (128, 128, 8, 2), (128, 32, 8, 3), depth=32),
    ),
    Group(
        "gradient", "plain", "float32", 32,
        _tiles((64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (128, 32, 8, 2), (128, 64, 8, 2)),
    ),
    Group("softmax", "plain", "float32", 32, _tiles((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2))),
    Group(
        "gradient", "two-sided", "bfloat16", 128,
        _tiles((64, 128, 4, 2), (64, 128, 4, 3), (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3)),
    ),
    Group(
        "softmax", "two-sided", "bfloat16", 128,
        _tiles((128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 128, 4, 3), (64, 64, 4, 3)),
    ),
)  # fmt: skip
"""The most valuable groups first, since a budget leaves out groups from the end."""

OF_STAND_IN = (
    Group("gradient", "plain", "float16", 16, _tiles((32, 32, 4, 2), (32, 64, 4, 2))),
    Group("softmax", "two-sided", "float16", 16, _tiles((32, 32, 4, 2), (64, 32, 4, 2))),
    Group("pairs", "plain", "float32", 40, _tiles((32, 32, 4, 2), depth=16)),
    Group("product", "plain", "float32", 40, _tiles((32, 32, 4, 2), depth=16)),
)
"""Groups for the CPU with Triton's interpreter, which does not support bfloat16."""
