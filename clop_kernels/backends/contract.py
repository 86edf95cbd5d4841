"""The contract of a backend: its inputs and its results. A backend is a module with these two functions and one constant::

    forward(embeddings, labels, prototypes, options) -> (loss, Residuals)
    backward(grad_loss, embeddings, residuals, labels, prototypes, options, needs) -> Gradients

    CHECKS_VALUES: bool    # True: on a GPU, forward itself asserts what ops.check_values checks; check_values is not called

For a loss whose rows are spread over processes (:mod:`clop_kernels.distributed`), the module also exports its two passes over
pairs, which use the same kernels::

    pair_softmax(zhat, groups, n_left, options) -> Softmax
    pair_gradient(zhat, groups, n_left, coefficients, options) -> Tensor

All four functions run below autograd and autocast, on validated input. They must not synchronise with the host on a GPU, and must
not allocate anything that grows with N^2. :mod:`clop_kernels.reference` defines what they compute. ``embeddings`` may have any
strides. ``labels`` (int64), ``prototypes`` (any floating dtype) and ``grad_loss`` are contiguous; the operators ensure this.

The two passes over pairs receive rows that are already normalised, rounded and sorted by positive group. ``zhat`` is (M, D), in
the compute dtype and contiguous. If ``n_left`` is None, all rows are compared with each other. Otherwise the first ``n_left``
rows are compared with the rest, and only they get results (one way). Neither side is empty. ``groups`` is
:meth:`clop_kernels.groups.Groups.table`, (3, M) int32, contiguous. Only starts and ends are read, and only for rows that get a
result. They are positions in ``zhat``, and both are non-decreasing. Without sides, a row's positive run contains the row itself.
With sides, the run lies within the right side and may be empty. ``options`` says positives="label", n_left=None (the argument
``n_left`` counts) and negatives_only=False.

    pair_softmax: the sums over the pairs of each row. If one shift fits all rows, every row gets that shift in every call,
        because the choice depends on ``options`` alone. The caller merges the sums of several calls.
    pair_gradient: sum_j M_ij zhat_j, (M, D) or (n_left, D) in the accumulate dtype. ``coefficients`` holds the rows of
        :class:`Coefficients`, (4, M) float32 or float64, contiguous. Its shifts are those that pair_softmax returns. The row
        weights w_i in the coefficients are at most 1, so M may be rounded to float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

POSITIVES = ("instance", "label")
DISTANCES = ("cosine", "euclidean", "manhattan")
REDUCTIONS = ("mean", "sum", "none")
STRATEGIES = ("auto", "gather", "ring")
GRADIENT_SCALES = ("ddp", "none")

# Constants that all backends share. csrc/common/constants.h repeats them for the compiled backends; tests compare the two.

EPS = 1e-12
"""The smallest norm by which a row is divided; equal to the constant in :mod:`clop_kernels.reference`."""

LOG2_E = math.log2(math.e)

LARGEST_UNSHIFTED_LOGIT = {torch.float32: 60.0, torch.float64: 600.0}
"""The largest logit s for which exp s needs no shift. Sums over 2^38 rows then stay below exp(88), where float32 overflows;
float64 overflows at exp(709)."""

FLOAT16_SCALE = 2.0**14
"""The factor of M before it is rounded to float16. M is at most 2; the smallest float16 is 6e-8, the largest 65504."""

RANKED_INSTANCES = 4096
"""The largest number of labels that a GPU sorts by counting: B^2 comparisons in one launch; a sort takes several."""


Number = float | Tensor
"""A number that changes during training: a float, or a 0-dim tensor on the device of the embeddings.

The host never reads a number that is on a GPU. A number on a CPU reaches the backends as a float.
"""


class LossOptions(NamedTuple):
    """The options of a loss, without its tensors. An option is declared here and in csrc/common/options.h, and nowhere else.

    Three things are generated from this table: the schemas of all operators and the packing of their arguments
    (:mod:`clop_kernels.ops`), the list of options that ranks compare before a loss over a process group, and the arguments of the
    compiled extension.

    Attributes:
        temperature: tau > 0.
        prototype_weight: lambda >= 0, the factor of the prototype term.
        n_views: V; row ``v * B + b`` of the embeddings is view v of instance b.
        positives: one of :data:`POSITIVES`.
        distance: one of :data:`DISTANCES`, from a unit row to its prototype.
        reduction: one of :data:`REDUCTIONS`.
        compute_dtype: the dtype of the operands of the N x N matrix products: that of the embeddings, or of autocast.
        normalize: True: zhat_i is z_i / max(|z_i|, EPS). False: unnormalised, zhat_i is z_i.
        n_left: the number of rows on the left side, which come first. A row is then compared only with the rows of the other
            side, and its positives are there. None: there are no sides, and a row is compared with all other rows.
        negatives_only: True: positives are excluded from the pairs. The term of a row is then log sum exp s_ij over its
            negatives, 0 without negatives, and A holds the rows that have negatives.
    """

    temperature: Number = 0.1
    prototype_weight: Number = 0.0
    n_views: int = 1
    positives: str = "instance"
    distance: str = "cosine"
    reduction: str = "mean"
    compute_dtype: torch.dtype = torch.float32
    normalize: bool = True
    n_left: int | None = None
    negatives_only: bool = False

    @property
    def has_pairs(self) -> bool:
        """False if there are no pairs to compute: no row can have a positive, and ``negatives_only`` is False.

        The loss is then only the prototype term.
        """
        return self.positives == "label" or self.n_views > 1 or self.negatives_only

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """The dtype of sums, losses, lse and norms: float32, or float64 if the products are float64."""
        return accumulate_dtype(self.compute_dtype)

    @property
    def numbers(self) -> tuple[Number, ...]:
        """The values of the options in :data:`NUMBERS`."""
        numbers: tuple[Any, ...] = self[: len(NUMBERS)]
        return numbers

    @property
    def has_tensors(self) -> bool:
        """Whether at least one number is a tensor."""
        return not _FLOAT.issuperset(map(type, self.numbers))

    def with_numbers(self, new: Callable[[Any], Any]) -> LossOptions:
        """A copy in which each number x is replaced by ``new(x)``."""
        return LossOptions(*map(new, self.numbers), *self[len(NUMBERS) :])

    def without_numbers(self) -> LossOptions:
        """A copy with all numbers 0: the part that does not change during training."""
        return self.with_numbers(lambda _: 0.0)

    def of_pairs(self, n_left: int | None = None) -> LossOptions:
        """The options of pair_softmax and pair_gradient, whose rows are sorted by positive group."""
        return self._replace(n_views=1, positives="label", n_left=n_left, negatives_only=False)


_FLOAT = frozenset({float})

CHOICES: dict[str, tuple[str, ...]] = {"positives": POSITIVES, "distance": DISTANCES, "reduction": REDUCTIONS}
"""The allowed values of each option that is a string."""

NUMBERS = tuple(name for name, kind in get_type_hints(LossOptions).items() if kind == Number)
"""The names of the options that may change during training. They are the first fields of LossOptions."""
assert LossOptions._fields[: len(NUMBERS)] == NUMBERS


class Sharding(NamedTuple):
    """How the rows of a loss are spread over processes.

    Attributes:
        group_name: the name under which torch registers the process group; an operator cannot take the group itself.
        strategy: one of STRATEGIES.
        grad_scale: one of GRADIENT_SCALES.
        check_ranks: True: ranks first compare their sizes and options. False: nothing is compared, and all must be equal.
        has_backward: whether a backward pass will follow. All ranks must take part in it.
    """

    group_name: str
    strategy: str
    grad_scale: str
    check_ranks: bool
    has_backward: bool = False


DENSE_DEVICES = ("cpu",)
"""Devices where the rows of zhat have no gaps between them. Elsewhere each row starts at a multiple of 16 bytes, the unit in
which a GPU copies."""


def unit_rows(embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for zhat, (N, D) like the embeddings, in the layout that every backend uses on their device.

    Nothing reads or writes the gaps between rows.
    """
    return embeddings.new_empty_strided(embeddings.shape, (_pitch(embeddings, dtype), 1), dtype=dtype)


def as_unit_rows(zhat: Tensor) -> Tensor:
    """``zhat`` in the layout of :func:`unit_rows`, copied if necessary: saved or received rows may have another layout."""
    if zhat.stride() == (_pitch(zhat, zhat.dtype), 1) and zhat.data_ptr() % 16 == 0:
        return zhat
    return unit_rows(zhat, zhat.dtype).copy_(zhat)


def _pitch(rows: Tensor, dtype: torch.dtype) -> int:
    """The distance from one row of zhat to the next, in numbers."""
    numbers = 1 if rows.device.type in DENSE_DEVICES else 16 // dtype.itemsize
    return (rows.shape[1] + numbers - 1) // numbers * numbers


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for narrower dtypes."""
    return torch.promote_types(dtype, torch.float32)


class Residuals(NamedTuple):
    """The O(N D) tensors that the forward pass keeps for the backward pass. The backend chooses the order of their rows.

    The softmax is kept as a shift and two sums, not as a logarithm, so that a row with one dominating positive keeps the digits
    of ``negative``. sum_{j != i} exp s_ij is 2^shift_i * total_i; the same sum without the positives is 2^shift_i * negative_i.
    The total is stored as its inverse, so that the backward pass does not divide for every pair.

    Attributes:
        zhat: (N, D) in the compute dtype, the operands of all products, in the layout of :func:`unit_rows`. Without
            ``options.normalize`` it is z itself.
        norms: (N,) in the accumulate dtype, the norms |z_i| of the raw rows, not clamped.
        shift: (N,) in the accumulate dtype.
        inverse_total: (N,) in the accumulate dtype, 1 / total; 0 for a row that is no anchor.
        negative: (N,) in the accumulate dtype.
        groups: (3, N) int32, :meth:`clop_kernels.groups.Groups.table`, if positives="label"; else (3, 0).
        counts: (2,) in the accumulate dtype, the numbers of rows in A and in S, the divisors of the two means.
    """

    zhat: Tensor
    norms: Tensor
    shift: Tensor
    inverse_total: Tensor
    negative: Tensor
    groups: Tensor
    counts: Tensor


class Softmax(NamedTuple):
    """Row statistics, (N,) each in the accumulate dtype. S_ij is s_ij log2(e).

    Attributes:
        shift: the number that is subtracted from every S_ij of a row.
        negative: the sum of 2^(S_ij - shift_i) over the pairs that are not positives.
        positive: the same sum over the positives.
        positive_logits: the sum of S_ij itself over the positives.
    """

    shift: Tensor
    negative: Tensor
    positive: Tensor
    positive_logits: Tensor

    @property
    def total(self) -> Tensor:
        return self.negative + self.positive


class Coefficients(NamedTuple):
    """The coefficients of the pairwise matrix M of the gradient, (N,) each in the accumulate dtype; the rows of a (4, N) tensor.

    M_ij = 2^(S_ij - shift_i) a_i + 2^(S_ij - shift_j) a_j. If j is a positive of i, b takes the place of a, and c_i + c_j is
    subtracted.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    shift: Tensor


class Needs(NamedTuple):
    """Which gradients autograd needs."""

    embeddings: bool
    temperature: bool
    prototypes: bool


class Gradients(NamedTuple):
    """The gradients. One that is not needed may be None.

    Attributes:
        embeddings: (N, D) in the dtype of the embeddings.
        temperature: () in the accumulate dtype.
        prototypes: (K, D) in the accumulate dtype.
    """

    embeddings: Tensor | None
    temperature: Tensor | None
    prototypes: Tensor | None
