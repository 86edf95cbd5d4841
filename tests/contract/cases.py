"""What the contract asks: problems by name, each in a group that says what it varies."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import clop_kernels
from clop_kernels.backends.contract import DISTANCES, POSITIVES, REDUCTIONS

from ..support.oracle import Problem, near_duplicates, negatives_problem, random_problem, shaped_problem, two_sided_problem

WARM, COLD = 0.1, 0.01
"""Temperatures on both sides of the softmax's switch, from a fixed shift to a running maximum, in float32."""


@dataclass(frozen=True)
class Case:
    """A problem, made when it is needed, and what a test must know before.

    ``make`` takes ``temperature=``. ``is_hard`` marks an ill-conditioned problem: a backend may err as much there as a small
    multiple of plain PyTorch's own error (``assert_accurate``). A gradient whose norm is below ``floor`` is nothing but
    rounding; its error is divided by ``floor`` instead of by the norm.
    """

    make: Callable[..., Problem]
    n_rows: int
    width: int
    temperature: float = WARM
    is_hard: bool = False
    floor: float = 1e-7

    @property
    def suits_half_precision(self) -> bool:
        """Whether plain PyTorch in half precision is a fair rival. Where logits are large, both results are mostly rounding."""
        return self.temperature >= (1.0 if self.is_hard else WARM)

    def problem(self, dtype: torch.dtype) -> Problem:
        """The problem. float64 switches the softmax at a colder temperature, so it gets COLD / 10 instead of COLD."""
        is_colder = self.temperature == COLD and dtype == torch.float64
        return self.make(temperature=COLD / 10 if is_colder else self.temperature)


Cases = dict[str, Case]


def at(temperatures: tuple[float, ...], name: str, make: Callable[..., Problem], n_rows: int, width: int, **known: Any) -> Cases:
    """One case for each temperature."""
    return {f"{name}, tau={t:.4g}": Case(make, n_rows, width, t, **known) for t in temperatures}


def merged(parts: list[Cases]) -> Cases:
    """All of them, with no name twice."""
    found = {name: case for part in parts for name, case in part.items()}
    assert len(found) == sum(map(len, parts))
    return found


# ---- shapes ------------------------------------------------------------------------------------------------------------

# (V, B, D). From one row to several tiles of any backend, most of them ragged. Among the widths are odd ones, multiples of
# what a vector unit takes, widths that the kernels keep on chip, and wide ones.
SHAPES = [
    *((v, b, 37) for v, b in ((1, 1), (2, 1), (1, 63), (2, 32), (5, 13), (1, 127), (3, 43), (7, 43))),
    *((5, 13, width) for width in (3, 7, 16, 64, 100, 128, 129, 250, 256, 300, 1024)),
    *((7, 43, width) for width in (128, 200)),
]
# A GPU has room for more: many tiles, and rows of 4096 numbers.
GPU_SHAPES = [
    (1, 1, 3), (2, 1, 16), (5, 13, 37), (7, 43, 64), (3, 129, 128), (2, 777, 250), (2, 301, 256), (2, 300, 512), (2, 65, 1000),
    (2, 2100, 128), (2, 70, 4096),
]  # fmt: skip


def shapes(n_rows: int, sizes: list[tuple[int, int, int]] = SHAPES) -> Cases:
    """The distance, the reduction and the kind of positives vary with the shape; ``n_rows`` does not enter."""
    return merged([at((WARM, COLD), f"{v}x{b}x{d}", partial(shaped_problem, (v, b), d), v * b, d) for v, b, d in sizes])


def temperatures(n_rows: int) -> Cases:
    """Both sides of each switch of the softmax, 1/60 in most backends and log2(e)/55 in ``cuda``, and far from them."""
    found = (1 / 60.0001, 1 / 59.9999, 0.0262, 0.0263, 0.05, 0.5, 1.0)
    return merged(
        [at(found, kind, partial(random_problem, 2, n_rows // 2, 20, positives=kind), n_rows, 20) for kind in POSITIVES]
    )


# ---- options -----------------------------------------------------------------------------------------------------------


def options(n_rows: int) -> Cases:
    """Every distance with every reduction and kind of positives."""
    found: Cases = {}
    for positives, distance, reduction in itertools.product(POSITIVES, DISTANCES, REDUCTIONS):
        chosen: dict[str, Any] = {"positives": positives, "distance": distance, "reduction": reduction}
        found[", ".join(chosen.values())] = Case(partial(random_problem, 3, n_rows // 3, 20, n_classes=3, **chosen), n_rows, 20)
    return found


def forms(n_rows: int) -> Cases:
    """Every combination of positives, sides, negatives_only and normalize, all with prototypes."""
    found = []
    crossed = [
        *itertools.product(POSITIVES, (None, n_rows // 2), (False, True), (True, False)),
        ("label", 0, True, False),
        ("label", n_rows, True, True),
    ]
    for number, (positives, n_left, negatives_only, normalize) in enumerate(crossed):
        form = {"positives": positives, "n_left": n_left, "negatives_only": negatives_only, "normalize": normalize}
        name, n_views = ", ".join(map(str, form.values())), 2 if positives == "instance" else 1
        # The longest of unnormalised rows decides which softmax is taken; here it changes between the temperatures 1 and 0.1.
        for turn, temperature in enumerate((WARM, COLD) if normalize else (1.0, WARM)):
            mixed: dict[str, Any] = form | {"reduction": REDUCTIONS[number % 3], "distance": DISTANCES[(number + turn) % 3]}
            make = partial(random_problem, n_views, n_rows // n_views, 21, **mixed)
            found.append(at((temperature,), name, make, n_rows, 21, is_hard=not normalize))
    return merged(found)


# Rows on the left, rows on the right, width, whether positives are by label. Among them: one row, no row, unequal sides.
SIDES = [
    *((n, n, width, False) for n, width in ((1, 5), (17, 37), (33, 129), (65, 100), (65, 256), (130, 7), (130, 300), (0, 3))),
    *((*rows, 40, True) for rows in ((1, 40), (40, 1), (0, 7), (6, 0), (1, 1), (17, 130), (65, 33), (130, 3), (0, 0))),
]  # fmt: skip


GPU_SIDES = [
    *((n, n, width, False) for n, width in ((1, 16), (33, 24), (777, 128), (300, 512))),
    *((1, 65, 37, True), (301, 1000, 256, True), (2100, 300, 128, True), (0, 5, 8, True), (5, 0, 8, True), (300, 300, 512, True)),
]  # fmt: skip


def two_sides(n_rows: int, sides: list[tuple[int, int, int, bool]] = SIDES) -> Cases:
    """CLIP's loss, row by row and by label; ``n_rows`` does not enter."""
    found = []
    for left, right, width, labelled in sides:
        name, reduction = f"{left}-{right}-{width}{', label' * labelled}", REDUCTIONS[(left + right) % 3]
        make = partial(two_sided_problem, left, right, width, labelled=labelled, reduction=reduction)
        found.append(at((WARM, COLD), name, make, left + right, width))
    return merged(found)


def _relabelled(n_rows: int, label: int | None, temperature: float) -> Problem:
    """Negatives alone, of random labels or of one label for all rows."""
    problem = negatives_problem(n_rows, 24, temperature=temperature)
    return problem if label is None else replace(problem, labels=torch.full((n_rows,), label))


def negatives(n_rows: int) -> Cases:
    """negative_logsumexp with some labels; with one class, so that no row has a negative; with none; and of few rows."""
    kinds = {"some": (2 * n_rows, None), "one class": (n_rows, 0), "no labels": (n_rows, -1)}
    return merged(
        [
            *(at((WARM, COLD), name, partial(_relabelled, n, label), n, 24) for name, (n, label) in kinds.items()),
            *(at((WARM,), f"{n} rows", partial(_relabelled, n, None), n, 24) for n in (0, 1, 2)),
        ]
    )


def prototypes(n_rows: int) -> Cases:
    """One view and positives by instance: there are no pairs."""
    found = []
    for (distance, reduction), normalize in itertools.product(zip(DISTANCES, REDUCTIONS, strict=True), (True, False)):
        make = partial(random_problem, 1, n_rows, 20, distance=distance, reduction=reduction, normalize=normalize)
        name = f"{distance}, {reduction}{', unnormalised' * (not normalize)}"
        found.append(at((WARM,), name, make, n_rows, 20, is_hard=not normalize))
    return merged(found)


# ---- numbers -----------------------------------------------------------------------------------------------------------


def duplicates(n_rows: int) -> Cases:
    """Views that nearly agree, until the loss is as small as float64 can resolve. Positives then dominate the softmax."""
    crossed = [
        ((views, 8, noise), taus)
        for views in ((2, n_rows // 2), (3, n_rows // 3))
        for noise, taus in ((1e-3, (WARM,)), (1e-2, (WARM,)), (0.3, (0.02, WARM)))
    ] + [((views, 40, noise), (0.02, WARM)) for views in ((2, n_rows // 2), (3, n_rows // 3)) for noise in (1e-3, 1e-2, 0.3)]
    return merged(
        [
            at(taus, f"{v}x{b}x{width}, noise {noise}", partial(near_duplicates, v, b, width, noise), v * b, width, is_hard=True)
            for ((v, b), width, noise), taus in crossed
        ]
    )


def _lengthened(problem: Problem, length: float, temperature: float) -> Problem:
    z = problem.embeddings * length / problem.embeddings.shape[1] ** 0.5
    return replace(problem, embeddings=z.float().double(), temperature=temperature)


def long_rows(n_rows: int) -> Cases:
    """Unnormalised rows, some several times longer than 30. Similarities reach thousands, and nothing bounds them in advance."""
    kinds = {
        "instance": random_problem(2, n_rows // 2, 40, normalize=False, distance="euclidean"),
        "label": random_problem(1, n_rows, 21, normalize=False, positives="label"),
        "wide": random_problem(1, n_rows, 300, normalize=False, positives="label"),
        "two sides": two_sided_problem(n_rows // 2, n_rows // 2, 21, labelled=True, normalize=False),
        "negatives": negatives_problem(n_rows, 21, normalize=False),
    }
    found = []
    for (kind, problem), (length, tau) in itertools.product(kinds.items(), ((1.0, 0.07), (30.0, 1.0), (30.0, 0.1))):
        make, width = partial(_lengthened, problem, length), problem.embeddings.shape[1]
        found.append(at((tau,), f"{kind}, length {length}", make, n_rows, width, is_hard=True))
    return merged(found)


GROUPS: dict[str, Callable[[int], Cases]] = {
    "shapes": shapes, "options": options, "forms": forms, "two sides": two_sides, "negatives": negatives,
    "prototypes": prototypes, "temperatures": temperatures, "duplicates": duplicates, "long rows": long_rows,
}  # fmt: skip


GPU_GROUPS = GROUPS | {"shapes": partial(shapes, sizes=GPU_SHAPES), "two sides": partial(two_sides, sides=GPU_SIDES)}


# ---- the edges of the input --------------------------------------------------------------------------------------------


def edges(n_rows: int) -> dict[str, Problem]:
    """Input that breaks a careless loss: ``n_rows``, an even number, or fewer."""
    generator, n = torch.Generator().manual_seed(0), n_rows // 2
    z = random_problem(2, n).embeddings
    labels = torch.randint(0, 4, (n,), generator=generator)
    c = clop_kernels.orthonormal_prototypes(4, 24, dtype=torch.float64, generator=generator)
    identity = torch.eye(4, 24, dtype=torch.float64)  # unit rows without rounding: a distance of exactly zero
    scales = torch.logspace(-4, 4, n_rows, dtype=torch.float64)[torch.randperm(n_rows, generator=generator)].unsqueeze(1)
    zeros = z.clone()
    zeros[[0, 5, n + 7]] = 0.0
    duplicates = torch.cat([z[:n], z[:n] * (1 + 1e-4)])
    antipodes = torch.cat([z[:n], -z[:n]])
    return {
        "zero rows": Problem(zeros, labels, c),
        "all zero": Problem(torch.zeros_like(z), labels, c),
        "one row": Problem(z[:1], labels[:1], c, options={"n_views": 1}),
        "one instance": Problem(z[:2], labels[:1], c),
        "no rows": Problem(z[:0], labels[:0], c),
        "no rows, no labels": Problem(z[:0]),
        "no positives": Problem(z, torch.arange(n_rows), None, options={"n_views": 1, "positives": "label"}),
        "all unlabelled": Problem(z, torch.full((n,), -1), c, options={"positives": "label"}),
        "all unlabelled, one view": Problem(z, torch.full((n_rows,), -1), c, options={"positives": "label", "n_views": 1}),
        "all rows equal": Problem(z[:1].repeat(n_rows, 1), labels, c),
        "one class": Problem(z, torch.zeros(n, dtype=torch.int64), c, options={"positives": "label"}),
        "norms 1e-4 to 1e4": Problem(z * scales, labels, c),
        "norms 1e18": Problem(z * 1e18, labels, c),
        "near-duplicates, tau 0.01": Problem(duplicates, labels, c, 0.01),
        "antipodes, tau 0.01": Problem(antipodes, labels, c, 0.01),
        "antipodes only, tau 0.01": Problem(torch.cat([z[:1], -z[:1]]), labels[:1], c, 0.01),
        "on the prototypes": Problem(3 * identity[labels.repeat(2)], labels, identity),
        "int32 labels": Problem(z, labels.int(), c),
    }


NEAR_PROTOTYPES = ("on the prototypes", "zero rows", "one row", "near-duplicates, tau 0.01", "norms 1e18", "no rows")

EDGES = [
    *((name, "cosine") for name in edges(66)),
    *itertools.product(NEAR_PROTOTYPES, ("euclidean", "manhattan")),
]
"""Each input once, and with the other distances where a row's distance to its prototype is what may break."""


# ---- the passes over pairs alone ---------------------------------------------------------------------------------------

# Rows, rows on the left (None: there are no sides), width. Among them: ragged tiles, one row a side, every padded width that
# the kernels keep on chip, and wide rows.
PAIRS = [
    (1, None, 24), (2, None, 3), (70, None, 24), (131, None, 7), (150, None, 128), (2, 1, 3), (66, 33, 24), (140, 70, 37),
    (67, 50, 129), (133, 3, 16), (150, 147, 256), (131, None, 300), (67, 50, 301),
]  # fmt: skip

GPU_PAIRS = [
    (1, None, 24), (131, None, 24), (1000, None, 128), (700, None, 300), (67, 50, 129), (150, 3, 16), (3000, 1000, 256),
    (700, 300, 512),
]  # fmt: skip

# Temperature, classes (0: no row of a side has positives on the other), normalize, whether the temperature is on the device.
PASSES = [(WARM, 4, True, False), (COLD, 0, True, True), (WARM, 0, False, True), (COLD, 4, False, False)]
