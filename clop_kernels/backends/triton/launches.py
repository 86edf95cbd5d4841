"""The launches of one call, as data: which kernel, on what grid, with which arguments and tiles.

:mod:`clop_kernels.backends.triton` runs them; ``python -m benchmarks.resources`` compiles the very same ones ahead of time
for GPUs that need not be there.

A kernel is compiled anew for each type and constant among its arguments. Those depend on the width, the dtypes and the GPU
alone, for the first kernel on the strides of the embeddings too; what else a loss is told are numbers and tensors, empty ones
where there is none.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import DISTANCES, LossOptions, Residuals
from ..positions import Upstream, allows_tf32, logit_scale
from . import tiles
from .device import LARGEST_UNSHIFTED_LOGIT, LOG2_E
from .finish import finish_kernel
from .gradient import coefficients_kernel, gradient_kernel
from .prologue import operands_kernel, prologue_kernel
from .prototype_gradient import prototype_kernel
from .softmax import loss_kernel, softmax_kernel
from .tiles import Target, Tile
from .wide import pair_kernel, product_kernel

RANKED_INSTANCES = 4096
"""Up to so many labels the prologue orders the rows itself: B^2 comparisons, against the several launches of a sort."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch: all arguments of the kernel by name, constexprs too, and how it is to be compiled."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> Any:
        """Returns what Triton has compiled; its interpreter compiles nothing."""
        return self.kernel[self.grid](**self.arguments, **self.options)


def _launch(kernel: Any, grid: tuple[int, ...], tile: Tile, arguments: Mapping[str, Any], debug: bool = False) -> Launch:
    """Takes from ``arguments`` what the kernel asks for, blocks from the tile. ``debug``: assertions are compiled in."""
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_D": tile.block_k}
    arguments = {**blocks, **arguments}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True, "debug": debug}
    if tile.max_registers is not None:
        options["maxnreg"] = tile.max_registers
    return Launch(kernel, grid, {name: arguments[name] for name in kernel.arg_names}, options)


class ForwardScratch(NamedTuple):
    """What lives only within the forward pass."""

    statistics: Tensor  # (splits, 4, N) float32
    distances: Tensor  # (N,) float32
    partial_sums: Tensor  # (5, programs of loss_kernel) float32
    n_finished: Tensor  # () int32

    @staticmethod
    def like(zhat: Tensor, options: LossOptions, target: Target) -> ForwardScratch:
        n_rows = zhat.shape[0]
        n_splits = softmax_splits(zhat, _n_left(options), False, target) if _is_compared(n_rows, options) else 1
        return ForwardScratch(
            zhat.new_empty((n_splits, 4, n_rows), dtype=torch.float32),
            zhat.new_empty(n_rows, dtype=torch.float32),
            zhat.new_empty((5, _programs(n_rows, tiles.BY_ROW)), dtype=torch.float32),
            zhat.new_empty((), dtype=torch.int32),
        )


class BackwardScratch(NamedTuple):
    """What lives only within the backward pass, but for the temperature's gradient, which is made in any case."""

    coefficients: Tensor  # (4, N) float32
    sums: Tensor  # (splits, N, D) float32; no splits where nothing is compared
    temperature_sums: Tensor  # (programs of finish_kernel,) float32
    grad_temperature: Tensor  # () float32
    n_finished: Tensor  # () int32

    @staticmethod
    def like(zhat: Tensor, options: LossOptions, target: Target) -> BackwardScratch:
        n_rows, width = zhat.shape
        n_splits = gradient_splits(zhat, _n_left(options), False, target) if _is_compared(n_rows, options) else 0
        return BackwardScratch(
            zhat.new_empty((4, n_rows), dtype=torch.float32),
            zhat.new_empty((n_splits, n_rows, width), dtype=torch.float32),
            zhat.new_empty(_programs(n_rows, tiles.whole_rows(width)), dtype=torch.float32),
            zhat.new_empty((), dtype=torch.float32),
            zhat.new_empty((), dtype=torch.int32),
        )


def softmax_splits(zhat: Tensor, n_left: int, is_one_way: bool, target: Target) -> int:
    """How many summands softmax_kernel leaves of each row's statistics."""
    tile = tiles.softmax(zhat.shape[1], zhat.dtype, target)
    return _splits(zhat, n_left, is_one_way, tile, target)


def gradient_splits(zhat: Tensor, n_left: int, is_one_way: bool, target: Target) -> int:
    """How many summands there are of sum_j M_ij zhat_j: one of wide rows."""
    if tiles.is_wide(zhat.shape[1], zhat.dtype):
        return 1
    return _splits(zhat, n_left, is_one_way, tiles.gradient(zhat.shape[1], zhat.dtype, target), target)


def _splits(zhat: Tensor, n_left: int, is_one_way: bool, tile: Tile, target: Target) -> int:
    n_rows = zhat.shape[0]
    n_columns = n_rows if n_left < 0 else n_rows - n_left if is_one_way else max(n_left, n_rows - n_left)
    n_tiles = tiles.cdiv(n_columns, tile.block_n)
    n_blocks, at_once = _blocks(n_rows, n_left, is_one_way, tile), tile.at_once(zhat.element_size(), target)
    return tiles.splits(n_blocks, n_tiles, at_once, target.n_processors)


def m_scale(dtype: torch.dtype) -> float:
    """What M is multiplied by before it is rounded: M <= 2, and float16 ends at 65504 and 6e-8."""
    return 2.0**14 if dtype == torch.float16 else 1.0


def precision(dtype: torch.dtype, target: Target) -> str:
    """tl.dot's input_precision for operands of ``dtype``.

    Exact float32 takes three TF32 products where the matrix units have TF32. Emulated on a CPU they are as accurate as float32
    products: gradient errors of 2.6e-7 to 9e-7 at D of 32 to 512 and temperatures of 0.1 and 0.02, float32's own to 10%.
    """
    if dtype != torch.float32 or target.capability < 80:
        return "ieee"
    return "tf32" if allows_tf32() else "tf32x3"


def forward(
    embeddings: Tensor,
    labels: Tensor | None,
    prototypes: Tensor | None,
    options: LossOptions,
    loss: Tensor,
    residuals: Residuals,
    scratch: ForwardScratch,
    target: Target,
) -> Iterator[Launch]:
    """The three launches of the forward pass, in TF32 four, without pairs two. Each tensor they write is given."""
    n_rows, width = embeddings.shape
    is_compared = _is_compared(n_rows, options)
    shared = _of_loss(residuals, labels, prototypes, options, target) | {
        "z": embeddings,
        "stride_z_row": embeddings.stride(0),
        "stride_z_column": embeddings.stride(1),
        "shift_out": residuals.shift,
        "inverse_total_out": residuals.inverse_total,
        "negative_out": residuals.negative,
        "loss": loss,
        "n_splits": scratch.statistics.shape[0],
        "n_views": options.n_views,
        "is_ranked": int(is_ranked(labels, options)),
        "is_per_row": int(options.reduction == "none"),
        **scratch._asdict(),
    }
    whole = tiles.whole_rows(width)
    yield _launch(prologue_kernel, (_programs(n_rows, whole),), whole, shared | {"BLOCK_B": max(16, 1024 // whole.block_m)})
    if is_compared:
        yield from _softmax(shared, target)
    else:
        scratch.statistics.zero_()
    yield _launch(loss_kernel, (_programs(n_rows, tiles.BY_ROW),), tiles.BY_ROW, shared, debug=True)


def is_ranked(labels: Tensor | None, options: LossOptions) -> bool:
    """Whether the prologue itself orders the rows by label."""
    if options.positives != "label" or options.n_left is not None:
        return False
    return labels is not None and labels.shape[0] <= RANKED_INSTANCES


def backward(
    upstream: Upstream,
    residuals: Residuals,
    labels: Tensor | None,
    prototypes: Tensor | None,
    options: LossOptions,
    scratch: BackwardScratch,
    grad_embeddings: Tensor,
    target: Target,
) -> Iterator[Launch]:
    """The launches that make the gradient of the embeddings: three, of wide rows two and two a panel; one without pairs.

    In TF32 one more, for the forward pass may have had another precision.
    """
    n_rows, width = residuals.zhat.shape
    shared = _of_loss(residuals, labels, prototypes, options, target) | _of_upstream(upstream, residuals) | {
        "grad_z": grad_embeddings,
        "n_splits": scratch.sums.shape[0],
        **scratch._asdict(),
    }  # fmt: skip
    if _is_compared(n_rows, options):
        yield _launch(coefficients_kernel, (_programs(n_rows, tiles.BY_ROW),), tiles.BY_ROW, shared)
        yield from _pairwise_sums(shared, target)
    else:
        scratch.n_finished.zero_()
    whole = tiles.whole_rows(width)
    yield _launch(finish_kernel, (_programs(n_rows, whole),), whole, shared)


def pair_softmax(
    zhat: Tensor, groups: Tensor, n_left: int | None, options: LossOptions, statistics: Tensor, target: Target
) -> Iterator[Launch]:
    """The launches of the pass over pairs alone that leaves ``statistics``, (splits, 4, rows): contract.Softmax in summands."""
    shared = _of_pairs_alone(zhat, groups, n_left, options, target)
    yield from _softmax(shared | {"statistics": statistics, "n_splits": statistics.shape[0]}, target)


def pair_gradient(
    zhat: Tensor, groups: Tensor, n_left: int | None, coefficients: Tensor, options: LossOptions, sums: Tensor, target: Target
) -> Iterator[Launch]:
    """The launches of the pass over pairs alone that makes ``sums``, (splits, rows, D), times M_SCALE and in summands."""
    shared = _of_pairs_alone(zhat, groups, n_left, options, target)
    yield from _pairwise_sums(shared | {"coefficients": coefficients, "sums": sums, "n_splits": sums.shape[0]}, target)


def _softmax(shared: dict[str, Any], target: Target) -> Iterator[Launch]:
    """The statistics of all rows into ``shared["statistics"]``."""
    shared = yield from _for_matrix_units(shared)
    zhat = shared["zhat"]
    tile = tiles.softmax(zhat.shape[1], zhat.dtype, target)
    yield _launch(softmax_kernel, (_blocks_of(shared, tile), shared["n_splits"]), tile, shared)


def _pairwise_sums(shared: dict[str, Any], target: Target) -> Iterator[Launch]:
    """sum_j M_ij zhat_j into ``shared["sums"]``."""
    shared = yield from _for_matrix_units(shared)
    zhat = shared["zhat"]
    if tiles.is_wide(zhat.shape[1], zhat.dtype):
        yield from _wide_products(shared, target)
    else:
        tile = tiles.gradient(zhat.shape[1], zhat.dtype, target)
        yield _launch(gradient_kernel, (_blocks_of(shared, tile), shared["n_splits"]), tile, shared)


def _for_matrix_units(shared: dict[str, Any]) -> Generator[Launch, None, dict[str, Any]]:
    """The arguments of a pass over pairs, after the launch that rounds its rows, if there must be one: see device.as_operand."""
    if shared["PRECISION"] != "tf32":
        return shared
    zhat = shared["zhat"]
    operands = zhat.new_empty_strided(zhat.shape, zhat.stride())
    whole = tiles.whole_rows(zhat.shape[1])
    yield _launch(operands_kernel, (_programs(zhat.shape[0], whole),), whole, shared | {"operands": operands})
    return shared | {"zhat": operands}


def _wide_products(shared: dict[str, Any], target: Target) -> Iterator[Launch]:
    """sum_j M_ij zhat_j into ``shared["sums"]``, panel by panel."""
    zhat, n_left, side = shared["zhat"], shared["n_left"], tiles.PANEL
    n_rows, width = zhat.shape
    row_end, column_base = (n_rows, 0) if n_left < 0 else (n_left, n_left)
    shared = shared | {"PANEL": side, "panel": zhat.new_empty(min(side, row_end), side)}
    pair_tile, product_tile = tiles.pairs(zhat.dtype), tiles.product(zhat.dtype, target)
    for i in range(0, row_end, side):
        for j in range(i if n_left < 0 else column_base, n_rows, side):
            rows, columns = range(i, min(i + side, row_end)), range(j, min(j + side, n_rows))
            of_panel = shared | {
                "first_row": i,
                "row_end": rows.stop,
                "first_column": j,
                "column_end": columns.stop,
                # The first row of panels meets every block of columns for the first time, the first column those of a left side.
                "adds": int(j > column_base),
                "adds_transposed": int(i > 0),
                "n_straight": _programs(len(rows), product_tile),
            }
            grid = _programs(len(rows), pair_tile), tiles.cdiv(len(columns), pair_tile.block_n)
            yield _launch(pair_kernel, grid, pair_tile, of_panel)
            is_twice = j > i and not shared["is_one_way"]
            n_programs = _programs(len(rows), product_tile) + (_programs(len(columns), product_tile) if is_twice else 0)
            yield _launch(product_kernel, (n_programs, tiles.cdiv(width, product_tile.block_n)), product_tile, of_panel)


def prototypes_backward(
    upstream: Upstream,
    residuals: Residuals,
    by_class: Tensor,
    bounds: Tensor,
    prototypes: Tensor,
    options: LossOptions,
    partial_gradients: Tensor,
    target: Target,
) -> Launch:
    """The launch that makes the prototypes' gradient, in as many parts as ``partial_gradients``, (parts, K, D), has."""
    n_parts, n_classes, width = partial_gradients.shape
    shared = _of_loss(residuals, None, prototypes, options, target) | _of_upstream(upstream, residuals) | {
        "by_class": by_class,
        "bounds": bounds,
        "partial_gradients": partial_gradients,
        "n_splits": n_parts,
    }  # fmt: skip
    return _launch(prototype_kernel, (n_classes, n_parts), tiles.whole_rows(width), shared)


def prototype_parts(n_classes: int, target: Target) -> int:
    """Of so many parts each class is the sum: four programs a processor, where there are not more classes."""
    return max(1, 4 * target.n_processors // n_classes)


_LEAST_SCALE = torch.finfo(torch.float32).tiny
"""Of a temperature that is a float: a scale of 0 says that it is a tensor. All that is below makes similarities of 0 anyway."""


# ---- arguments, under the names that all kernels use ----------------------------------------------------------------------


def _of_loss(
    residuals: Residuals, labels: Tensor | None, prototypes: Tensor | None, options: LossOptions, target: Target
) -> dict[str, Any]:
    """The arguments that kernels of a loss have in common."""
    zhat = residuals.zhat
    return _of_pairs(zhat, residuals.groups, residuals.norms, options, target) | {
        "norms": residuals.norms,
        "shift": residuals.shift,
        "inverse_total": residuals.inverse_total,
        "negative": residuals.negative,
        "counts": residuals.counts,
        "labels": zhat.new_empty(0, dtype=torch.int64) if labels is None else labels,
        "prototypes": zhat.new_empty(0, dtype=torch.float32) if prototypes is None else prototypes,
        "prototype_weight": float(options.prototype_weight),
        "n_instances": zhat.shape[0] // options.n_views,
        "n_classes": 0 if prototypes is None else prototypes.shape[0],
        "is_labelled": int(labels is not None),
        "distance": DISTANCES.index(options.distance),
        "normalize": int(options.normalize),
        "is_mean": int(options.reduction == "mean"),
    }


def _of_upstream(upstream: Upstream, residuals: Residuals) -> dict[str, Any]:
    is_weighted = upstream.weights is not None
    return {
        "upstream": upstream.unit,
        "row_weights": upstream.weights if is_weighted else residuals.norms,
        "is_weighted": int(is_weighted),
    }


def _of_pairs_alone(zhat: Tensor, groups: Tensor, n_left: int | None, options: LossOptions, target: Target) -> dict[str, Any]:
    """The arguments of a pass over pairs that stands alone: of two sides one way."""
    nothing = zhat.new_empty(0, dtype=torch.float32)
    shared = _of_pairs(zhat, groups, nothing, options, target)
    return shared | {"n_left": -1 if n_left is None else n_left, "is_one_way": int(n_left is not None)}


def _of_pairs(zhat: Tensor, groups: Tensor, nothing: Tensor, options: LossOptions, target: Target) -> dict[str, Any]:
    """Those that say which rows there are, who is compared, and on what scale. ``nothing`` stands in for a temperature."""
    scale, scale_rest = logit_scale(options.temperature)
    if not isinstance(options.temperature, Tensor):
        scale = max(scale, _LEAST_SCALE)
    by_label = options.positives == "label"
    return {
        "zhat": zhat,
        "groups": groups,
        "n_rows": zhat.shape[0],
        "n_left": _n_left(options),
        "views": 0 if by_label else 1 if options.n_left is not None else options.n_views,
        "is_one_way": 0,
        "negatives_only": int(options.negatives_only),
        "temperature": options.temperature if isinstance(options.temperature, Tensor) else nothing,
        "scale": scale,
        "scale_rest": scale_rest,
        # Rows of any length have similarities of any size.
        "largest_unshifted": LARGEST_UNSHIFTED_LOGIT.value * LOG2_E.value if options.normalize else 0.0,
        "WIDTH": zhat.shape[1],
        "PITCH": zhat.stride(0),  # between its rows nothing is read: contract.unit_rows
        "PRECISION": precision(zhat.dtype, target),
        "EXACT_SCALE": zhat.dtype == torch.float32,
        "M_SCALE": m_scale(zhat.dtype),
    }


def _is_compared(n_rows: int, options: LossOptions) -> bool:
    """Whether there is a pair to look at."""
    return options.has_pairs and options.n_left not in (0, n_rows)


def _n_left(options: LossOptions) -> int:
    return -1 if options.n_left is None else options.n_left


def _programs(n_rows: int, tile: Tile) -> int:
    return tiles.cdiv(n_rows, tile.block_m)


def _blocks_of(shared: dict[str, Any], tile: Tile) -> int:
    return _blocks(shared["n_rows"], shared["n_left"], bool(shared["is_one_way"]), tile)


def _blocks(n_rows: int, n_left: int, is_one_way: bool, tile: Tile) -> int:
    """Blocks of rows, which are of one side each: span_of."""
    if n_left < 0:
        return _programs(n_rows, tile)
    return _programs(n_left, tile) + (0 if is_one_way else _programs(n_rows - n_left, tile))
