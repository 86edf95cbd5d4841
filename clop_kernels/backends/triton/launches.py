"""The launches of a call as data: the kernels, with their grids, arguments and tiles.

A :class:`Plan` depends only on a :class:`Problem`, which holds no tensors and no numbers that change during training. Plans are
therefore cached: :mod:`clop_kernels.backends.triton` fills in the tensors of a call, and launches kernels that are already
compiled. ``python -m benchmarks.resources`` compiles the same launches ahead of time, for GPUs that need not be present.

Triton compiles a kernel again for every new combination of argument types and compile-time constants. These depend only on the
width, the dtypes and the GPU; for the first kernel also on the strides of the embeddings. All other arguments are run-time
numbers and tensors. A missing tensor is passed as an empty one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import DISTANCES, FLOAT16_SCALE, LARGEST_UNSHIFTED_LOGIT, LOG2_E, RANKED_INSTANCES, LossOptions, Number, Residuals
from ..positions import Upstream, allows_tf32, logit_scale
from . import tiles
from .finish import finish_kernel
from .gradient import coefficients_kernel, gradient_kernel
from .prologue import operands_kernel, prologue_kernel
from .prototype_gradient import prototype_kernel
from .softmax import loss_kernel, softmax_kernel
from .tiles import Target, Tile
from .wide import pair_kernel, product_kernel

Values = dict[str, Any]
"""Arguments of kernels by name: the tensors and the numbers of a call."""


class Problem(NamedTuple):
    """Everything on which the launches of a call depend.

    Attributes:
        options: the options, with their numbers set to 0.
        n_rows, width: the shape of zhat.
        pitch: the distance from one row of zhat to the next, in numbers.
        dtype, strides: those of the embeddings.
        n_classes: the number of prototypes; 0 without labels.
        is_labelled: whether there are labels.
        is_one_way: for a separate pass over pairs: right rows get no results.
        precision: see :func:`precision`.
        device: the device on which compiled kernels are loaded.
        target: see :class:`.tiles.Target`.
    """

    options: LossOptions
    n_rows: int
    width: int
    pitch: int
    dtype: torch.dtype
    strides: tuple[int, int]
    n_classes: int
    is_labelled: bool
    is_one_way: bool
    precision: str
    device: torch.device
    target: Target

    @property
    def n_left(self) -> int:
        """The number of left rows, in the form that kernels take: -1 without sides."""
        return -1 if self.options.n_left is None else self.options.n_left

    @property
    def n_results(self) -> int:
        """The number of rows that get results."""
        return self.n_left if self.is_one_way else self.n_rows

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.options.compute_dtype

    @property
    def is_compared(self) -> bool:
        """Whether any pair exists."""
        return self.options.has_pairs and self.options.n_left not in (0, self.n_rows)

    @property
    def is_ranked(self) -> bool:
        """Whether the prologue kernel sorts the rows by label."""
        by_label = self.options.positives == "label" and self.options.n_left is None
        return by_label and self.is_labelled and self.n_rows // self.options.n_views <= RANKED_INSTANCES

    @property
    def is_per_row(self) -> bool:
        return self.options.reduction == "none"

    @staticmethod
    def of(
        embeddings: Tensor, zhat: Tensor, labels: Tensor | None, prototypes: Tensor | None, options: LossOptions, target: Target
    ) -> Problem:
        """The problem of a loss. ``prototypes`` is None if there are no labels."""
        n_classes = 0 if prototypes is None else prototypes.shape[0]
        strides = embeddings.stride()
        n_rows, width = zhat.shape
        return Problem(
            options.without_numbers(),
            n_rows,
            width,
            zhat.stride(0),
            embeddings.dtype,
            (strides[0], strides[1]),
            n_classes,
            labels is not None,
            False,
            precision(zhat.dtype, target),
            zhat.device,
            target,
        )

    @staticmethod
    def of_pairs(zhat: Tensor, n_left: int | None, options: LossOptions, target: Target) -> Problem:
        """The problem of a separate pass over pairs, which with two sides is one way."""
        options = options.of_pairs(n_left)
        problem = Problem.of(zhat, zhat, None, None, options, target)
        return problem._replace(is_one_way=n_left is not None)


def precision(dtype: torch.dtype, target: Target) -> str:
    """The input_precision of tl.dot for operands of ``dtype``.

    If the matrix units have TF32, exact float32 takes three TF32 products. Emulated on a CPU, they are as accurate as float32
    products: for D from 32 to 512 and temperatures of 0.1 and 0.02, gradient errors are 2.6e-7 to 9e-7, within 10% of float32's.
    """
    if dtype != torch.float32 or target.capability < 80:
        return "ieee"
    return "tf32" if allows_tf32() else "tf32x3"


def m_scale(dtype: torch.dtype) -> float:
    """The factor of M before it is rounded."""
    return FLOAT16_SCALE if dtype == torch.float16 else 1.0


# ---- the parts of a plan ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One kernel launch: all arguments of the kernel by name, including constexprs, and the compile options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> Any:
        """Launches the kernel, and returns its compiled form; the interpreter compiles nothing."""
        return self.kernel[self.grid](**self.arguments, **self.options)


@dataclass
class Step:
    """A launch whose tensors are not yet known.

    Attributes:
        kernel: the Triton kernel.
        grid: the grid of programs.
        constants: all arguments by the kernel's names; None for arguments that come with a call.
        options: the compile options.
        names: for arguments that come with a call: the kernel's name -> the name in :data:`Values`.
        compiled: the compiled kernel, once the step has run.
    """

    kernel: Any
    grid: tuple[int, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    names: dict[str, str]
    compiled: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        self._template = list(self.constants.values())
        self._slots = [(index, self.names[name]) for index, name in enumerate(self.constants) if name in self.names]
        self._grid = (*self.grid, 1, 1)[:3]

    def launch(self, values: Values) -> Launch:
        return Launch(self.kernel, self.grid, self.constants | {k: values[v] for k, v in self.names.items()}, self.options)

    def run_compiled(self, values: Values) -> None:
        arguments = self._template.copy()
        for index, name in self._slots:
            arguments[index] = values[name]
        self.compiled[self._grid](*arguments)


class Scratch(NamedTuple):
    """Device memory that a call allocates for itself.

    Attributes:
        is_zero: whether it must start as zeros.
        is_result: whether it is returned, and so outlives the launches.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    strides: tuple[int, ...] | None = None
    is_zero: bool = False
    is_result: bool = False


DIRECT_DEVICES = ("cuda",)
"""Devices on which Triton's launchers accept an address in place of a tensor."""

_ALIGNMENT = 128
"""The alignment of the parts of one allocation, in bytes."""


@dataclass(frozen=True)
class Plan:
    """The launches of a pass, in order, and their scratch memory by name."""

    steps: tuple[Step, ...]
    scratch: dict[str, Scratch]

    def launches(self, values: Values) -> Iterator[Launch]:
        """The launches with their tensors. ``values`` come from :func:`values_of_loss` and others; scratch is added here."""
        values = values | self._allocated(values["zhat"], self.scratch)
        for step in self.steps:
            yield step.launch(values)

    def run(self, values: Values) -> Values:
        """Launches all steps, and returns the results.

        At each launch, Triton searches for the compiled kernel that fits the arguments. Within one plan this is always the same
        kernel, if all tensors start at multiples of 16 bytes. From the second run on, the plan therefore launches that kernel
        directly. It passes addresses, which Triton need not inspect, and takes its scratch from one allocation, because each call
        to PyTorch costs host time.
        """
        like = values["zhat"]
        is_usual = like.device.type in DIRECT_DEVICES and all(values[name].data_ptr() % 16 == 0 for name in self._aligned)
        if is_usual and all(step.compiled is not None for step in self.steps):
            return self._run_compiled(values, like)
        values = values | self._allocated(like, self.scratch)
        for step in self.steps:
            compiled = step.launch(values).run()
            if is_usual:
                step.compiled = compiled
        return values

    def _run_compiled(self, values: Values, like: Tensor) -> Values:
        addresses = {name: x.data_ptr() if isinstance(x, Tensor) else x for name, x in values.items()}
        offsets, n_bytes, others = self._pool
        found = self._allocated(like, others)
        pool = like.new_empty(n_bytes, dtype=torch.uint8)
        begin = pool.data_ptr()
        for name, offset in offsets.items():
            addresses[name] = begin + offset
        for name, tensor in found.items():
            addresses[name] = tensor.data_ptr()
        for step in self.steps:
            step.run_compiled(addresses)
        return found

    @functools.cached_property
    def _aligned(self) -> list[str]:
        """The tensors of a call whose alignment affects compilation. Scratch is left out, since torch allocates it aligned."""
        found = [
            step.names[parameter.name]
            for step in self.steps
            for parameter in getattr(step.kernel, "params", ())  # the interpreter has none
            if parameter.name in step.names and not parameter.do_not_specialize_on_alignment
        ]
        return sorted(set(found) - set(self.scratch) - set(NUMBERS_OF_KERNELS))

    @functools.cached_property
    def _pool(self) -> tuple[dict[str, int], int, dict[str, Scratch]]:
        """The offsets of scratch in one shared allocation, the size of that allocation, and the scratch outside it."""
        offsets, n_bytes, others = {}, 0, {}
        for name, one in self.scratch.items():
            if one.is_zero or one.is_result:
                others[name] = one
                continue
            offsets[name] = n_bytes
            n_numbers = math.prod(one.shape) if one.strides is None else one.shape[0] * one.strides[0]
            n_bytes += tiles.cdiv(n_numbers * one.dtype.itemsize, _ALIGNMENT) * _ALIGNMENT
        return offsets, n_bytes, others

    @staticmethod
    def _allocated(like: Tensor, scratch: Mapping[str, Scratch]) -> Values:
        memory = {}
        for name, (shape, dtype, strides, is_zero, _) in scratch.items():
            if strides is not None:
                memory[name] = like.new_empty_strided(shape, strides, dtype=dtype)
            else:
                memory[name] = like.new_zeros(shape, dtype=dtype) if is_zero else like.new_empty(shape, dtype=dtype)
        return memory


def _step(
    kernel: Any, grid: tuple[int, ...], tile: Tile, constants: Values, names: Mapping[str, str] = {}, debug: bool = False
) -> Step:
    """A step of a kernel. Arguments come from ``constants``, block sizes from the tile, and all others from the call.

    ``names`` maps a kernel's argument name to the name in :data:`Values`, if they differ. ``debug`` compiles assertions in.
    """
    constants = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_D": tile.block_k} | constants
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True, "debug": debug}
    if tile.max_registers is not None:
        options["maxnreg"] = tile.max_registers
    arguments = {name: constants.get(name) for name in kernel.arg_names}
    return Step(kernel, grid, arguments, options, {x: names.get(x, x) for x in arguments if x not in constants})


# ---- the plans ---------------------------------------------------------------------------------------------------------------


def forward(p: Problem) -> Plan:
    """The launches of the forward pass: three, with TF32 four, without pairs two."""
    whole, by_row = tiles.whole_rows(p.width), tiles.BY_ROW
    n_splits = softmax_splits(p) if p.is_compared else 1
    constants = _of_loss(p) | {
        "row_stride": p.strides[0],
        "column_stride": p.strides[1],
        "n_splits": n_splits,
        "n_views": p.options.n_views,
        "is_ranked": int(p.is_ranked),
        "is_per_row": int(p.is_per_row),
        "BLOCK_B": max(16, 1024 // whole.block_m),
    }
    scratch = {
        "statistics": Scratch((n_splits, 4, p.n_rows), is_zero=not p.is_compared),
        "distances": Scratch((p.n_rows,)),
        "partial_sums": Scratch((5, _programs(p.n_rows, by_row))),
        "n_finished": Scratch((), torch.int32),
    }
    of_pairs = _softmax(p, constants) if p.is_compared else _NOTHING
    return Plan(
        (
            _step(prologue_kernel, (_programs(p.n_rows, whole),), whole, constants),
            *of_pairs.steps,
            _step(loss_kernel, (_programs(p.n_rows, by_row),), by_row, constants, _WRITTEN, debug=True),
        ),
        scratch | of_pairs.scratch,
    )


_WRITTEN = {f"{name}_out": name for name in ("shift", "inverse_total", "negative")}


def backward(p: Problem, is_weighted: bool) -> Plan:
    """The launches of the backward pass: three; for wide rows two, and two for each panel; without pairs one.

    With TF32 there is one more, because the forward pass may have had another precision. ``is_weighted``: the upstream gradient
    has one number for each row.
    """
    whole, by_row = tiles.whole_rows(p.width), tiles.BY_ROW
    n_splits = gradient_splits(p) if p.is_compared else 0  # 0 tells finish_kernel that there are no pairs
    constants = _of_loss(p) | {"n_splits": n_splits, "is_weighted": int(is_weighted)}
    scratch = {
        "coefficients": Scratch((4, p.n_rows)),
        "sums": Scratch((n_splits, p.n_rows, p.width)),
        "temperature_sums": Scratch((_programs(p.n_rows, whole),)),
        "grad_temperature": Scratch((), is_result=True),
        "n_finished": Scratch((), torch.int32, is_zero=not p.is_compared),
    }
    steps: tuple[Step, ...] = ()
    if p.is_compared:
        of_pairs = _pairwise_sums(p, constants)
        steps = _step(coefficients_kernel, (_programs(p.n_rows, by_row),), by_row, constants), *of_pairs.steps
        scratch |= of_pairs.scratch
    return Plan((*steps, _step(finish_kernel, (_programs(p.n_rows, whole),), whole, constants)), scratch)


def prototypes_backward(p: Problem, is_weighted: bool) -> Plan:
    """The launch for the prototypes' gradient: "partial_gradients", (parts, K, D), which the caller adds up."""
    n_parts = prototype_parts(p.n_classes, p.target)
    constants = _of_loss(p) | {"n_splits": n_parts, "is_weighted": int(is_weighted)}
    step = _step(prototype_kernel, (p.n_classes, n_parts), tiles.whole_rows(p.width), constants)
    return Plan((step,), {"partial_gradients": Scratch((n_parts, p.n_classes, p.width), is_result=True)})


def pair_softmax(p: Problem) -> Plan:
    """The separate forward pass over pairs: "statistics", (splits, 4, rows), a contract.Softmax for each split."""
    n_splits = softmax_splits(p)
    plan = _softmax(p, _of_pairs(p) | {"n_splits": n_splits})
    return Plan(plan.steps, {"statistics": Scratch((n_splits, 4, p.n_results), is_result=True), **plan.scratch})


def pair_gradient(p: Problem) -> Plan:
    """The separate backward pass over pairs: "sums", (splits, rows, D): one summand for each split, multiplied by M_SCALE."""
    n_splits = gradient_splits(p)
    plan = _pairwise_sums(p, _of_pairs(p) | {"n_splits": n_splits})
    return Plan(plan.steps, {"sums": Scratch((n_splits, p.n_results, p.width), is_result=True), **plan.scratch})


def prototype_parts(n_classes: int, target: Target) -> int:
    """The number of parts of each class: four programs for each processor in total, and at least one for each class."""
    return max(1, 4 * target.n_processors // n_classes)


def softmax_splits(p: Problem) -> int:
    """The number of splits of softmax_kernel."""
    return _splits(p, tiles.softmax(p.width, p.compute_dtype, p.target))


def gradient_splits(p: Problem) -> int:
    """The number of summands of sum_j M_ij zhat_j; 1 for wide rows."""
    if tiles.is_wide(p.width, p.compute_dtype):
        return 1
    return _splits(p, tiles.gradient(p.width, p.compute_dtype, p.target))


def _splits(p: Problem, tile: Tile) -> int:
    n_left, n_rows = p.n_left, p.n_rows
    n_columns = n_rows if n_left < 0 else n_rows - n_left if p.is_one_way else max(n_left, n_rows - n_left)
    n_tiles = tiles.cdiv(n_columns, tile.block_n)
    return tiles.splits(_blocks(p, tile), n_tiles, tile.at_once(p.compute_dtype.itemsize, p.target), p.target.n_processors)


_NOTHING = Plan((), {})


def _softmax(p: Problem, constants: Values) -> Plan:
    """The launches that compute "statistics"."""
    rounding, names = _for_matrix_units(p, constants)
    tile = tiles.softmax(p.width, p.compute_dtype, p.target)
    step = _step(softmax_kernel, (_blocks(p, tile), constants["n_splits"]), tile, constants, names)
    return Plan((*rounding.steps, step), rounding.scratch)


def _pairwise_sums(p: Problem, constants: Values) -> Plan:
    """The launches that compute "sums", sum_j M_ij zhat_j."""
    rounding, names = _for_matrix_units(p, constants)
    if tiles.is_wide(p.width, p.compute_dtype):
        products = _wide_products(p, constants, names)
    else:
        tile = tiles.gradient(p.width, p.compute_dtype, p.target)
        grid = _blocks(p, tile), constants["n_splits"]
        products = Plan((_step(gradient_kernel, grid, tile, constants, names),), {})
    return Plan((*rounding.steps, *products.steps), {**rounding.scratch, **products.scratch})


def _for_matrix_units(p: Problem, constants: Values) -> tuple[Plan, dict[str, str]]:
    """The launch that rounds the rows, if one is needed (device.as_operand), and the name that then replaces "zhat"."""
    if p.precision != "tf32":
        return _NOTHING, {}
    whole = tiles.whole_rows(p.width)
    step = _step(operands_kernel, (_programs(p.n_rows, whole),), whole, constants)
    operands = Scratch((p.n_rows, p.width), p.compute_dtype, (p.pitch, 1))
    return Plan((step,), {"operands": operands}), {"zhat": "operands"}


def _wide_products(p: Problem, constants: Values, names: dict[str, str]) -> Plan:
    """The launches that compute "sums" of wide rows, panel by panel."""
    n_left, n_rows, side = p.n_left, p.n_rows, tiles.PANEL
    row_end, column_base = (n_rows, 0) if n_left < 0 else (n_left, n_left)
    constants = constants | {"PANEL": side}
    pair_tile, product_tile = tiles.pairs(p.compute_dtype), tiles.product(p.compute_dtype, p.target)
    steps = []
    for i in range(0, row_end, side):
        for j in range(i if n_left < 0 else column_base, n_rows, side):
            rows, columns = range(i, min(i + side, row_end)), range(j, min(j + side, n_rows))
            of_panel = constants | {
                "first_row": i,
                "row_end": rows.stop,
                "first_column": j,
                "column_end": columns.stop,
                # A panel in the first column of panels writes its rows' sums, and a panel in the first row writes its columns'
                # sums. All other panels add. (Without sides, the rows of a later row of panels were begun, transposed, by the
                # first row.)
                "adds": int(j > column_base),
                "adds_transposed": int(i > 0),
                "n_straight": _programs(len(rows), product_tile),
            }
            grid = _programs(len(rows), pair_tile), tiles.cdiv(len(columns), pair_tile.block_n)
            steps.append(_step(pair_kernel, grid, pair_tile, of_panel, names))
            is_twice = j > i and not p.is_one_way
            n_programs = _programs(len(rows), product_tile) + (_programs(len(columns), product_tile) if is_twice else 0)
            grid = n_programs, tiles.cdiv(p.width, product_tile.block_n)
            steps.append(_step(product_kernel, grid, product_tile, of_panel, names))
    return Plan(tuple(steps), {"panel": Scratch((min(side, row_end), side), p.compute_dtype)})


def _programs(n_rows: int, tile: Tile) -> int:
    return tiles.cdiv(n_rows, tile.block_m)


def _blocks(p: Problem, tile: Tile) -> int:
    """The number of blocks of rows. The rows of a block are on one side, as in device.span_of."""
    if p.n_left < 0:
        return _programs(p.n_rows, tile)
    return _programs(p.n_left, tile) + (0 if p.is_one_way else _programs(p.n_rows - p.n_left, tile))


# ---- arguments, under the names that all kernels use ----------------------------------------------------------------------


def _of_loss(p: Problem) -> Values:
    """The constants that the kernels of a loss share."""
    return _of_pairs(p) | {
        "n_instances": p.n_rows // p.options.n_views,
        "n_classes": p.n_classes,
        "is_labelled": int(p.is_labelled),
        "distance": DISTANCES.index(p.options.distance),
        "normalize": int(p.options.normalize),
        "is_mean": int(p.options.reduction == "mean"),
    }


def _of_pairs(p: Problem) -> Values:
    """The constants about the rows, and about which rows are compared."""
    options = p.options
    return {
        "n_rows": p.n_rows,
        "n_left": p.n_left,
        "views": 0 if options.positives == "label" else 1 if options.n_left is not None else options.n_views,
        "is_one_way": int(p.is_one_way),
        "negatives_only": int(options.negatives_only),
        # Unnormalised rows have unbounded similarities.
        "largest_unshifted": LARGEST_UNSHIFTED_LOGIT[torch.float32] * LOG2_E if options.normalize else 0.0,
        "WIDTH": p.width,
        "PITCH": p.pitch,  # the gaps between rows are never read: contract.unit_rows
        "PRECISION": p.precision,
        "EXACT_SCALE": p.compute_dtype == torch.float32,
        "M_SCALE": m_scale(p.compute_dtype),
    }


NUMBERS_OF_KERNELS = ("scale", "scale_rest", "prototype_weight")
"""The values that change from call to call and are not tensors: see :func:`values_of_pairs` and :func:`values_of_loss`."""

_LEAST_SCALE = torch.finfo(torch.float32).tiny
"""The smallest scale of a temperature that is a float, because a scale of 0 means that the temperature is a tensor. Any smaller
scale gives similarities of 0 anyway."""


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor in the place of a missing one."""
    return torch.empty(0, dtype=dtype, device=device)


def values_of_pairs(zhat: Tensor, groups: Tensor, temperature: Number) -> Values:
    """The values that the passes over pairs read."""
    scale, scale_rest = logit_scale(temperature)
    is_tensor = isinstance(temperature, Tensor)
    return {
        "zhat": zhat,
        "groups": groups,
        "temperature": temperature if is_tensor else _nothing(torch.float32, zhat.device),
        "scale": scale if is_tensor else max(scale, _LEAST_SCALE),
        "scale_rest": scale_rest,
    }


def values_of_loss(residuals: Residuals, labels: Tensor | None, prototypes: Tensor | None, options: LossOptions) -> Values:
    """The values that the kernels of a loss read, and the residuals that the forward pass writes."""
    zhat, weight = residuals.zhat, options.prototype_weight
    return {
        **values_of_pairs(zhat, residuals.groups, options.temperature),
        "norms": residuals.norms,
        "shift": residuals.shift,
        "inverse_total": residuals.inverse_total,
        "negative": residuals.negative,
        "counts": residuals.counts,
        "labels": _nothing(torch.int64, zhat.device) if labels is None else labels,
        "prototypes": _nothing(torch.float32, zhat.device) if prototypes is None else prototypes,
        "weight": weight if isinstance(weight, Tensor) else _nothing(torch.float32, zhat.device),
        "prototype_weight": -1.0 if isinstance(weight, Tensor) else weight,
    }


def values_of_upstream(upstream: Upstream, residuals: Residuals) -> Values:
    return {"upstream": upstream.unit, "row_weights": residuals.norms if upstream.weights is None else upstream.weights}
