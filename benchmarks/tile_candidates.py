"""The tiles that :mod:`benchmarks.tile_sweep` tries beside the shipped ones, as data: what is added is compiled and measured."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tile:
    """A tile that was launched, or is to be. The fields are columns of the sweep's table, the first ones as in tiles.Tile.

    Attributes:
        block_m, block_n: rows and columns.
        block_k: how much of the width it takes at a time; None is the whole width, padded.
        num_warps, num_stages: Triton's.
        max_registers: what a thread may take; None leaves it to the compiler.
        n_splits: over how many programs the columns of its rows are split; None is what the package chooses for it.
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
    """Tiles of one kernel that are compared with each other.

    Attributes:
        kernel: a function of tiles.py: "softmax", "gradient"; of wide rows "pairs", "product".
        form: "plain", NT-Xent of two views; "two-sided", CLIP's loss. The temperature is a number, 0.1.
        dtype, D: of the embeddings.
        candidates: what is tried beside the shipped tile, the most promising first.
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
    """From rows, columns, warps, stages, and where they are not all that there are registers."""
    return tuple(Tile(m, n, depth, warps, stages, *registers) for m, n, warps, stages, *registers in columns)


def _split(tile: Tile, *counts: int) -> tuple[Tile, ...]:
    """A tile with its columns split over so many programs, whatever the package would choose."""
    return tuple(replace(tile, n_splits=n) for n in counts)


# Where a processor can hold two programs of 8 warps, 128 registers make it do so; 4 warps of 255 registers are two anyway.
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
"""In the order of their value: a budget cuts from the end."""

OF_STAND_IN = (
    Group("gradient", "plain", "float16", 16, _tiles((32, 32, 4, 2), (32, 64, 4, 2))),
    Group("softmax", "two-sided", "float16", 16, _tiles((32, 32, 4, 2), (64, 32, 4, 2))),
    Group("pairs", "plain", "float32", 40, _tiles((32, 32, 4, 2), depth=16)),
    Group("product", "plain", "float32", 40, _tiles((32, 32, 4, 2), depth=16)),
)
"""What the CPU runs in Triton's interpreter, which has no bfloat16."""
