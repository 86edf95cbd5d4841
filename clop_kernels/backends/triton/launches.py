"""The launches of one call, as data: which kernel, on what grid, with which arguments and tiles.

:mod:`clop_kernels.backends.triton` runs them; ``python -m benchmarks.resources`` compiles the very same ones ahead of time
for GPUs that need not be there.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import LossOptions, Residuals
from ..positions import Upstream, allows_tf32, logit_scale
from . import tiles
from .device import LARGEST_UNSHIFTED_LOGIT
from .finish import finish_kernel
from .gradient import gradient_kernel
from .prologue import operands_kernel, prologue_kernel
from .prototype_gradient import prototype_kernel
from .softmax import loss_kernel, softmax_kernel
from .tiles import Target, Tile
from .wide import pair_kernel, product_kernel

RANKED_INSTANCES = 4096
"""Up to so many labels the prologue orders the rows itself: B^2 comparisons, against the several launches of a sort."""

_OF_A_LOSS = (
    "distances", "labels", "prototype_weight", "n_instances", "n_classes", "PER_ROW", "weights", "total", "negative",
    "shift_out", "total_out", "negative_out", "terms", "partial_sums",
)  # fmt: skip
"""Arguments of the kernels over pairs that a pass which stands alone does without."""


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

    distances: Tensor  # (N,) float32
    partial_sums: Tensor  # (5, programs of softmax_kernel) float32

    @staticmethod
    def like(zhat: Tensor, options: LossOptions, target: Target) -> ForwardScratch:
        n_rows, width = zhat.shape
        n_programs = _span_programs(n_rows, _n_left(n_rows, options), tiles.softmax(n_rows, width, zhat.dtype, target))
        return ForwardScratch(zhat.new_empty(n_rows, dtype=torch.float32), zhat.new_empty((5, n_programs), dtype=torch.float32))


class BackwardScratch(NamedTuple):
    """What lives only within the backward pass; the sum of ``temperature_sums`` is the temperature's gradient."""

    sums: Tensor | None  # (N, D) float32; None where nothing is compared
    temperature_sums: Tensor  # (programs of finish_kernel,) float32

    @staticmethod
    def like(zhat: Tensor, options: LossOptions) -> BackwardScratch:
        n_rows, width = zhat.shape
        sums = None if _pairs(n_rows, options) == "none" else zhat.new_empty((n_rows, width), dtype=torch.float32)
        return BackwardScratch(sums, zhat.new_empty(_programs(n_rows, tiles.whole_rows(width)), dtype=torch.float32))


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
    """The three launches of the forward pass, in TF32 four; each tensor they write is given."""
    n_rows, width = embeddings.shape
    shared = _shared(residuals, labels, prototypes, options, target) | {
        "z": embeddings,
        "stride_z_row": embeddings.stride(0),
        "stride_z_column": embeddings.stride(1),
        "shift_out": residuals.shift,
        "total_out": residuals.total,
        "negative_out": residuals.negative,
        "loss": loss,
        "terms": loss,
        "statistics": None,
        "RANKED": is_ranked(labels, options),
        "PER_ROW": options.reduction == "none",
        "n_partial": scratch.partial_sums.shape[1],
        **scratch._asdict(),
    }
    whole = _tile_for_form(tiles.whole_rows(width), shared, target)
    yield _launch(prologue_kernel, (_programs(n_rows, whole),), whole, shared | {"BLOCK_B": max(16, 1024 // whole.block_m)})
    tile = _tile_for_form(tiles.softmax(n_rows, width, residuals.normalized.dtype, target), shared, target)
    of_pairs = yield from _for_matrix_units(shared)
    yield _launch(softmax_kernel, (_span_programs(n_rows, shared["n_left"], tile),), tile, of_pairs)
    yield _launch(loss_kernel, (1,), tiles.ONE_PROGRAM, shared | {"BLOCK": tiles.ONE_PROGRAM.block_m}, debug=True)


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
    """The launches that make the gradient of the embeddings: two, or for wide rows a few a panel; one if nothing is compared.

    In TF32 one more, for the forward pass may have had another precision.
    """
    n_rows, width = residuals.normalized.shape
    shared = _shared(residuals, labels, prototypes, options, target) | {
        "weights": upstream.weights,
        "coefficients": None,
        "upstream": upstream.unit,
        "grad_z": grad_embeddings,
        **scratch._asdict(),
    }
    if shared["PAIRS"] != "none":
        yield from _pairwise_sums(shared, target)
    whole = _tile_for_form(tiles.whole_rows(width), shared, target)
    yield _launch(finish_kernel, (_programs(n_rows, whole),), whole, shared)


def pair_softmax(
    zhat: Tensor, groups: Tensor, n_left: int | None, options: LossOptions, statistics: Tensor, target: Target
) -> Iterator[Launch]:
    """The launches of the pass over pairs alone that leaves ``statistics``, (4, rows): contract.Softmax."""
    shared = yield from _for_matrix_units(_alone(zhat, groups, n_left, options, target) | {"statistics": statistics})
    n_rows, width = statistics.shape[1], zhat.shape[1]
    tile = _with_all_registers(tiles.softmax(n_rows, width, zhat.dtype, target), target)
    yield _launch(softmax_kernel, (_programs(n_rows, tile),), tile, shared)


def pair_gradient(
    zhat: Tensor, groups: Tensor, n_left: int | None, coefficients: Tensor, options: LossOptions, sums: Tensor, target: Target
) -> Iterator[Launch]:
    """The launches of the pass over pairs alone that makes ``sums``, (rows, D), of coefficients with M_SCALE in them."""
    shared = _alone(zhat, groups, n_left, options, target)
    yield from _pairwise_sums(shared | {"coefficients": coefficients, "shift": coefficients[3], "sums": sums}, target)


def _pairwise_sums(shared: dict[str, Any], target: Target) -> Iterator[Launch]:
    """sum_j M_ij zhat_j into ``shared["sums"]``."""
    shared = yield from _for_matrix_units(shared)
    zhat, n_rows = shared["zhat"], shared["sums"].shape[0]
    width = zhat.shape[1]
    if tiles.is_wide(width, zhat.dtype):
        yield from _wide_products(shared, target)
    else:
        tile = _tile_for_form(tiles.gradient(n_rows, width, zhat.dtype, target), shared, target)
        if tile.block_n == 128 and shared["n_left"] is not None and not shared["NORMALIZE"]:
            tile = replace(tile, block_n=64, num_stages=3)  # this form has the most to keep: with 128 it spills on Triton 3.8
        n_programs = _programs(n_rows, tile) if shared["PAIRS"] == "one-way" else _span_programs(n_rows, shared["n_left"], tile)
        yield _launch(gradient_kernel, (n_programs,), tile, shared)


def _for_matrix_units(shared: dict[str, Any]) -> Generator[Launch, None, dict[str, Any]]:
    """The arguments of a pass over pairs, after the launch that rounds its rows, if there must be one: see device.as_operand."""
    if shared["PRECISION"] != "tf32" or shared["PAIRS"] == "none":
        return shared
    zhat = shared["zhat"]
    operands = zhat.new_empty_strided(zhat.shape, zhat.stride())
    whole = tiles.whole_rows(zhat.shape[1])
    yield _launch(operands_kernel, (_programs(zhat.shape[0], whole),), whole, shared | {"operands": operands})
    return shared | {"zhat": operands}


def _wide_products(shared: dict[str, Any], target: Target) -> Iterator[Launch]:
    """sum_j M_ij zhat_j into ``shared["sums"]``, panel by panel."""
    zhat, n_left = shared["zhat"], shared["n_left"]
    n_rows, width = zhat.shape
    row_end, column_base = (n_rows, 0) if n_left is None else (n_left, n_left)
    panel = tiles.panel(max(row_end, n_rows - column_base), zhat.dtype)
    shared = shared | {"PANEL": panel, "pairs": zhat.new_empty(panel, panel)}
    pair_tile, product_tile = _tile_for_form(tiles.pairs(zhat.dtype), shared, target), tiles.product(zhat.dtype, target)

    def product(to: range, of: range, transposed: bool, add: bool) -> Launch:
        strides = {"stride_row": 1, "stride_column": panel} if transposed else {"stride_row": panel, "stride_column": 1}
        ends = {"first_row": to.start, "row_end": to.stop, "first_column": of.start, "column_end": of.stop, "ADD": add}
        grid = (_programs(len(to), product_tile), tiles.cdiv(width, product_tile.block_n))
        return _launch(product_kernel, grid, product_tile, shared | strides | ends)

    for i in range(0, row_end, panel):
        for j in range(i if n_left is None else column_base, n_rows, panel):
            rows, columns = range(i, min(i + panel, row_end)), range(j, min(j + panel, n_rows))
            grid = (_programs(len(rows), pair_tile), tiles.cdiv(len(columns), pair_tile.block_n))
            yield _launch(pair_kernel, grid, pair_tile, shared | {"first_row": i, "first_column": j})
            # The first row of panels meets every block of columns for the first time, the first column those of a left side.
            yield product(rows, columns, transposed=False, add=j > column_base)
            if j > i and shared["PAIRS"] != "one-way":
                yield product(columns, rows, transposed=True, add=i > 0)


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
    shared = _shared(residuals, None, prototypes, options, target) | {
        "by_class": by_class,
        "bounds": bounds,
        "weights": upstream.weights,
        "upstream": upstream.unit,
        "partial_gradients": partial_gradients,
        "SPLITS": n_parts,
    }
    return _launch(prototype_kernel, (n_classes, n_parts), tiles.whole_rows(width), shared)


def prototype_parts(n_classes: int, target: Target) -> int:
    """Of so many parts each class is the sum: four programs a processor, where there are not more classes."""
    return max(1, 4 * target.n_processors // n_classes)


def _shared(
    residuals: Residuals, labels: Tensor | None, prototypes: Tensor | None, options: LossOptions, target: Target
) -> dict[str, Any]:
    """The arguments that several kernels have in common, under the names that all of them use."""
    return _shared_by_pairs(residuals.normalized, residuals.groups, options, target) | {
        "norms": residuals.norms,
        "shift": residuals.shift,
        "total": residuals.total,
        "negative": residuals.negative,
        "counts": residuals.counts,
        "labels": labels,
        "prototypes": prototypes,
        "prototype_weight": options.prototype_weight,
        "n_instances": residuals.normalized.shape[0] // options.n_views,
        "n_classes": 0 if prototypes is None else prototypes.shape[0],
        "DISTANCE": options.distance,
        "MEAN": options.reduction == "mean",
    }


def _alone(zhat: Tensor, groups: Tensor, n_left: int | None, options: LossOptions, target: Target) -> dict[str, Any]:
    """The arguments of a pass over pairs that stands alone. What the kernels read or write of a loss is None."""
    shared = _shared_by_pairs(zhat, groups, replace(options, n_left=n_left), target)
    one_way = {} if n_left is None else {"PAIRS": "one-way"}
    return dict.fromkeys(_OF_A_LOSS) | shared | one_way


def _shared_by_pairs(zhat: Tensor, groups: Tensor, options: LossOptions, target: Target) -> dict[str, Any]:
    """Those of them that say which rows there are, and who is compared."""
    n_rows, width = zhat.shape
    scale, scale_rest = logit_scale(options.temperature)
    return {
        "zhat": zhat,
        "groups": groups if options.positives == "label" else None,
        "temperature": options.temperature if isinstance(options.temperature, Tensor) else None,
        "scale": scale,
        "scale_rest": scale_rest,
        "n_rows": n_rows,
        "n_left": _n_left(n_rows, options),
        "VIEWS": options.n_views if options.n_left is None else 1,  # of an instance, side by side
        "PAIRS": _pairs(n_rows, options),
        "NORMALIZE": options.normalize,
        "WIDTH": width,
        "PITCH": zhat.stride(0),  # between its rows nothing is read: contract.unit_rows
        "SOFTMAX": _softmax_path(options),
        "PRECISION": precision(zhat.dtype, target),
        "EXACT_SCALE": zhat.dtype == torch.float32,
        "M_SCALE": m_scale(zhat.dtype),
    }


def _pairs(n_rows: int, options: LossOptions) -> str:
    """Who is compared, as kernels take it: see device.py."""
    if not options.has_pairs or options.n_left in (0, n_rows):
        return "none"
    return "negatives" if options.negatives_only else "all"


def _n_left(n_rows: int, options: LossOptions) -> int | None:
    return None if _pairs(n_rows, options) == "none" else options.n_left


def _softmax_path(options: LossOptions) -> str:
    """Rows of any length have similarities of any size; others are below 1/tau, which of a tensor only the device can read."""
    if not options.normalize:
        return "online"
    if isinstance(options.temperature, Tensor):
        return "device"
    return "unshifted" if 1.0 / options.temperature <= LARGEST_UNSHIFTED_LOGIT.value else "online"


def _tile_for_form(tile: Tile, shared: dict[str, Any], target: Target) -> Tile:
    """The tile, with all registers that there are in the forms where the compiler, left to choose, would spill for occupancy."""
    has_its_choice = shared["n_left"] is None and shared["PAIRS"] != "negatives" and shared["NORMALIZE"]
    return tile if has_its_choice else _with_all_registers(tile, target)


def _with_all_registers(tile: Tile, target: Target) -> Tile:
    return replace(tile, max_registers=255 if target.capability else None)


def _programs(n_rows: int, tile: Tile) -> int:
    return tiles.cdiv(n_rows, tile.block_m)


def _span_programs(n_rows: int, n_left: int | None, tile: Tile) -> int:
    """Programs that own rows of one side each: span_of."""
    if n_left is None:
        return _programs(n_rows, tile)
    return _programs(n_left, tile) + _programs(n_rows - n_left, tile)
