"""What every backend is given and what it gives back. A backend is a module with these two functions::

    forward(embeddings, labels, prototypes, options) -> (loss, Residuals)
    backward(grad_loss, embeddings, residuals, labels, prototypes, options, needs) -> Gradients

    CHECKS_VALUES: bool    # whether forward asserts on a GPU what ops.check_values checks, which is then not called there

and, for a loss whose rows are spread over processes (:mod:`clop_kernels.distributed`), with its two passes over pairs alone, by
the same kernels::

    pair_softmax(zhat, groups, n_left, options) -> Softmax
    pair_gradient(zhat, groups, n_left, coefficients, options) -> Tensor

All run below autograd and autocast, on validated input, and must neither synchronise with the host on a GPU nor
allocate anything that grows with N^2. The definition they compute is :mod:`clop_kernels.reference`. ``embeddings`` have any
strides; ``labels``, int64, ``prototypes``, of any floating dtype, and ``grad_loss`` are contiguous, which the operators see to.

The passes over pairs take rows that are normalised, rounded and in the order of their positive groups already. They compare
``zhat``, (M, D) contiguous in the compute dtype, with itself if ``n_left`` is None; else its first ``n_left`` rows with the other
ones, and give results for those ``n_left`` only: one way. Neither side is empty. ``groups``, (3, M) int32 contiguous, is
:meth:`clop_kernels.groups.Groups.table`, of which only the runs of rows that get a result are read: where their positives begin
and end, as positions in ``zhat``, neither of which goes down from row to row; without sides a run holds the row itself, with
sides it may be empty, but lies within the right one. ``options`` have positives="label", and no sides or negatives of their own.

    pair_softmax: the sums over the pairs of each row. Where one shift fits all rows, they have that one, whatever they are
        compared with; it depends on ``options`` alone. The caller merges the sums of several calls.
    pair_gradient: sum_j M_ij zhat_j, (M, D) or (n_left, D) in the accumulate dtype, of :class:`Coefficients`, (4, M) float32 or
        float64, contiguous, whose shifts are as pair_softmax gives them. Their weights w_i are at most 1: M may be rounded to
        float16.
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

# Constants of all backends. csrc/common/constants.h has those of the compiled ones, and tests hold them equal.

EPS = 1e-12
"""Smallest norm that a row is divided by; the same constant as in :mod:`clop_kernels.reference`."""

LOG2_E = math.log2(math.e)

LARGEST_UNSHIFTED_LOGIT = {torch.float32: 60.0, torch.float64: 600.0}
"""Up to it exp s needs no shift: sums over 2^38 rows stay below exp(88), the end of float32; float64 ends at exp(709)."""

FLOAT16_SCALE = 2.0**14
"""What M is multiplied by before it is rounded to float16, which ends at 65504 and 6e-8; M <= 2."""

RANKED_INSTANCES = 4096
"""On a GPU so many labels at most are put in order by counting: B^2 comparisons in one launch, against the several of a sort."""


Number = float | Tensor
"""A number that changes during training: a float, or a 0-dim tensor on the device of the embeddings.

A GPU's is never read on the host. Where the host is to know the number it is a float: of a tensor on a CPU its value.
"""


class LossOptions(NamedTuple):
    """The loss that is asked for, apart from its tensors: an option is declared here, in csrc/common/options.h, and nowhere else.

    From this table come the schemas of all operators and how they pack and read their arguments (:mod:`clop_kernels.ops`), what
    ranks compare before a loss over a process group, and what the compiled extension is told.

    Attributes:
        temperature: tau > 0.
        prototype_weight: lambda >= 0, the factor of the prototype term.
        n_views: V; row ``v * B + b`` of the embeddings is view v of instance b.
        positives: one of :data:`POSITIVES`.
        distance: one of :data:`DISTANCES`, from a unit row to its prototype.
        reduction: one of :data:`REDUCTIONS`.
        compute_dtype: the operands of the N x N matrix products are rounded to it: that of the embeddings, or autocast's.
        normalize: whether zhat_i is z_i / max(|z_i|, EPS), or z_i itself.
        n_left: where the rows have two sides, how many are on the left, the first ones: a row is compared with those of the other
            side only, and its positives are there. None: with all other rows.
        negatives_only: positives are no pairs at all, and the term of each row is log sum exp s_ij over its negatives, 0 if it
            has none; A is the rows that have some.
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
        """False where no row can have a positive, so that there is nothing to compare: the prototype term stands alone."""
        return self.positives == "label" or self.n_views > 1 or self.negatives_only

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """The dtype of sums, losses, lse and norms: float32, or float64 where the products are float64."""
        return accumulate_dtype(self.compute_dtype)

    @property
    def numbers(self) -> tuple[Number, ...]:
        """Those of :data:`NUMBERS`."""
        numbers: tuple[Any, ...] = self[: len(NUMBERS)]
        return numbers

    @property
    def has_tensors(self) -> bool:
        """Whether a number is a tensor."""
        return not _FLOAT.issuperset(map(type, self.numbers))

    def with_numbers(self, new: Callable[[Any], Any]) -> LossOptions:
        """With ``new`` of each of :data:`NUMBERS`."""
        return LossOptions(*map(new, self.numbers), *self[len(NUMBERS) :])

    def without_numbers(self) -> LossOptions:
        """What stays the same while a training changes its numbers."""
        return self.with_numbers(lambda _: 0.0)

    def of_pairs(self, n_left: int | None = None) -> LossOptions:
        """The options of a pass over pairs alone, of rows in the order of their positive groups."""
        return self._replace(n_views=1, positives="label", n_left=n_left, negatives_only=False)


_FLOAT = frozenset({float})

CHOICES: dict[str, tuple[str, ...]] = {"positives": POSITIVES, "distance": DISTANCES, "reduction": REDUCTIONS}
"""What an option that is a string can be."""

NUMBERS = tuple(name for name, kind in get_type_hints(LossOptions).items() if kind == Number)
"""The options that change during training. They come first."""
assert LossOptions._fields[: len(NUMBERS)] == NUMBERS


class Sharding(NamedTuple):
    """How the rows of a loss are spread over processes.

    Attributes:
        group_name: of the process group, as torch registers it: an operator takes no group.
        strategy: one of STRATEGIES.
        grad_scale: one of GRADIENT_SCALES.
        check_ranks: whether ranks tell each other their sizes and options first. If not, all must have the same.
        has_backward: whether there will be a backward pass, in which all ranks must take part.
    """

    group_name: str
    strategy: str
    grad_scale: str
    check_ranks: bool
    has_backward: bool = False


DENSE_DEVICES = ("cpu",)
"""Where rows of zhat lie side by side. Elsewhere each begins at a multiple of 16 bytes, which is what a GPU copies at a time."""


def unit_rows(embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for zhat, (N, D) like the embeddings, as every backend lays it out on their device.

    What lies between two rows is written and read by no one.
    """
    return embeddings.new_empty_strided(embeddings.shape, (_pitch(embeddings, dtype), 1), dtype=dtype)


def as_unit_rows(zhat: Tensor) -> Tensor:
    """``zhat`` as :func:`unit_rows` lays it out, itself or a copy: rows that were saved or sent may come otherwise."""
    if zhat.stride() == (_pitch(zhat, zhat.dtype), 1) and zhat.data_ptr() % 16 == 0:
        return zhat
    return unit_rows(zhat, zhat.dtype).copy_(zhat)


def _pitch(rows: Tensor, dtype: torch.dtype) -> int:
    """How many numbers a row of zhat is from the next."""
    numbers = 1 if rows.device.type in DENSE_DEVICES else 16 // dtype.itemsize
    return (rows.shape[1] + numbers - 1) // numbers * numbers


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.promote_types(dtype, torch.float32)


class Residuals(NamedTuple):
    """What the forward pass leaves for the backward pass of the same backend: O(N D). The order of the rows is its own affair.

    The softmax is kept as a shift and two sums, not as their logarithm, so that a row with one dominating positive keeps
    its small numbers: sum_{j != i} exp s_ij = 2^shift_i * total_i, and the same over the pairs that are not positives is
    2^shift_i * negative_i. Of the total the backward pass needs only the inverse, so no pass divides by it for every pair.

    Attributes:
        zhat: (N, D) in the compute dtype, the rows as all products see them, z itself without ``options.normalize``;
            laid out as :func:`unit_rows` says.
        norms: (N,) in the accumulate dtype, the norms |z_i| of the raw rows, not clamped.
        shift: (N,) in the accumulate dtype.
        inverse_total: (N,) in the accumulate dtype, 1 / total; 0 of a row that is no anchor.
        negative: (N,) in the accumulate dtype.
        groups: (3, N) int32, :meth:`clop_kernels.groups.Groups.table`, where positives are found by label; else (3, 0).
        counts: (2,) in the accumulate dtype, how many rows are in A and in S: what a mean divides by.
    """

    zhat: Tensor
    norms: Tensor
    shift: Tensor
    inverse_total: Tensor
    negative: Tensor
    groups: Tensor
    counts: Tensor


class Softmax(NamedTuple):
    """Row statistics, (N,) each in the accumulate dtype. With S_ij = s_ij log2(e), sums over j of

    Attributes:
        shift: what is subtracted from every S_ij of a row.
        negative: 2^(S_ij - shift_i) over the pairs that are not positives.
        positive: the same over the positives.
        positive_logits: S_ij itself over the positives.
    """

    shift: Tensor
    negative: Tensor
    positive: Tensor
    positive_logits: Tensor

    @property
    def total(self) -> Tensor:
        return self.negative + self.positive


class Coefficients(NamedTuple):
    """What the pairwise matrix M of the gradient is made of, (N,) each in the accumulate dtype; the rows of one (4, N) tensor.

    M_ij = 2^(S_ij - shift_i) a_i + 2^(S_ij - shift_j) a_j, and where j is a positive of i, the same with b for a, less c_i + c_j.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    shift: Tensor


class Needs(NamedTuple):
    """Which gradients are asked for."""

    embeddings: bool
    temperature: bool
    prototypes: bool


class Gradients(NamedTuple):
    """Gradients, None where not asked for.

    Attributes:
        embeddings: (N, D) in the dtype of the embeddings.
        temperature: () in the accumulate dtype.
        prototypes: (K, D) in the accumulate dtype.
    """

    embeddings: Tensor | None
    temperature: Tensor | None
    prototypes: Tensor | None
