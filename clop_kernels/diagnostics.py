"""Is a representation collapsing, and how large a step can it take? Plain measurements on embeddings.

All are of the unit rows zhat_i = z_i / max(|z_i|, 1e-12), on the device of the embeddings, in float32 (float64 for float64
embeddings) and outside autocast. They take O(N D) or O(N D^2) time, :func:`uniformity` alone O(N^2 D), and no N x N memory. The
host waits for each.
"""

from __future__ import annotations

import itertools
import math
import numbers
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .backends.contract import EPS, accumulate_dtype
from .functional import negative_logsumexp
from .validation import INTEGER_DTYPES, check_embeddings, check_prototypes, check_rows, check_tensor

_ROUNDING = 8
"""Singular values of at most so many units of rounding count as 0. Equal rows, centred, leave 1 to 2, seen up to N = 65536."""


# ---- all rows -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def singular_value_spectrum(embeddings: Tensor, *, center: bool = False) -> Tensor:
    r"""The normalised singular values :math:`p_k = \sigma_k / \sum_l \sigma_l` of the unit rows, largest first.

    From the (N, D) matrix itself, in O(N D min(N, D)): its Gram matrix would lose what is below the root of the rounding.

    Args:
        embeddings: (N, D), N >= 1, float64, float32, float16 or bfloat16.
        center: whether the mean of the unit rows is subtracted first. Without, collapse to one point is one singular value.

    Returns:
        (min(N, D),), from 0 to 1, of sum 1; what is not above rounding is 0, as all are if nothing is left: if every row is zero
        or, with ``center``, all are equal.

    Raises:
        TypeError: if embeddings is not a tensor of these dtypes.
        ValueError: if it is not 2-dimensional, is empty, or holds values that are not finite.
    """
    zhat = _unit_rows(embeddings)
    if center:
        zhat = zhat - zhat.mean(0)
    singular = torch.linalg.svdvals(zhat)
    rounding = _ROUNDING * torch.finfo(zhat.dtype).eps * len(zhat) ** 0.5  # as unit rows have, whose squares sum to N
    singular = singular.where(singular > rounding, 0)
    return singular / singular.sum().clamp(min=EPS)


@torch.no_grad()
def effective_rank(embeddings: Tensor, *, center: bool = False) -> float:
    r""":math:`\exp(-\sum_k p_k \log p_k)`, the exponential of the entropy of the spectrum (Roy and Vetterli, EUSIPCO 2007).

    Args:
        embeddings: (N, D), as for :func:`singular_value_spectrum`.
        center: False: the number of dimensions that the rows span, 1 if they collapse to one point or line. True: the same of
            their deviations from the mean, which a narrow cone does not hide.

    Returns:
        From 1 to min(N, D), with ``center`` to min(N - 1, D); 0 if the spectrum is.

    Raises:
        As :func:`singular_value_spectrum`.
    """
    share = singular_value_spectrum(embeddings, center=center)
    if not share.any():
        return 0.0
    return math.exp(float(torch.special.entr(share).sum()))


@torch.no_grad()
def mean_resultant_length(embeddings: Tensor) -> float:
    r""":math:`|\frac{1}{N} \sum_i \hat z_i|` of directional statistics (Mardia and Jupp, 2000), in O(N D).

    Args:
        embeddings: (N, D), as for :func:`singular_value_spectrum`.

    Returns:
        From 0 (directions cancel) to 1 (all rows point the same way).

    Raises:
        As :func:`singular_value_spectrum`.
    """
    return float(_unit_rows(embeddings).mean(0).norm())


@torch.no_grad()
def mean_pairwise_cosine(embeddings: Tensor) -> float:
    r""":math:`\frac{1}{N (N - 1)} \sum_{i \ne j} \hat z_i \cdot \hat z_j`, in O(N D) as
    :math:`(|\sum_i \hat z_i|^2 - \sum_i |\hat z_i|^2) / (N (N - 1))`.

    Args:
        embeddings: (N, D), as for :func:`singular_value_spectrum`.

    Returns:
        From -1 / (N - 1) (a simplex, or any rows whose sum is zero) to 1 (all rows point the same way); NaN for one row.

    Raises:
        As :func:`singular_value_spectrum`.
    """
    zhat = _unit_rows(embeddings)
    n_rows = len(zhat)
    return _ratio(zhat.sum(0).square().sum() - zhat.square().sum(), n_rows * (n_rows - 1))


@torch.no_grad()
def alignment(embeddings: Tensor, *, n_views: int = 2, alpha: float = 2.0) -> float:
    r"""Mean of :math:`|\hat z_i - \hat z_j|^\alpha` over the positive pairs, two views of one instance (Wang and Isola, arXiv
    2005.10242), in O(V N D).

    Args:
        embeddings: (V*B, D), view-major as for :func:`clop_kernels.clop_loss`: row v*B + b is view v of instance b.
        n_views: V >= 2.
        alpha: > 0, the exponent; 2 makes it 2 - 2 cosine.

    Returns:
        From 0 (views coincide) to 2^alpha.

    Raises:
        As :func:`singular_value_spectrum`; ValueError also if alpha is not positive and finite, n_views < 2, or N not a multiple.
    """
    zhat = _unit_rows(embeddings)
    check_embeddings(embeddings, n_views)
    _check_positive("alpha", alpha)
    if n_views < 2:
        raise ValueError(f"n_views={n_views}: expected at least 2, for a positive pair is two views of one instance")
    pairs = itertools.combinations(zhat.view(n_views, -1, zhat.shape[1]), 2)
    return float(torch.stack([(a - b).norm(dim=1).pow(alpha).mean() for a, b in pairs]).mean())


@torch.no_grad()
def uniformity(embeddings: Tensor, *, t: float = 2.0, backend: str | None = None) -> float:
    r""":math:`\log \frac{1}{N (N - 1)} \sum_{i \ne j} e^{-t |\hat z_i - \hat z_j|^2}`, the potential of Wang and Isola, arXiv
    2005.10242.

    Exact, over all pairs: O(N^2 D) time but O(N D) memory, for the squared distance is :math:`2 - 2 \hat z_i \cdot \hat z_j`, and
    so this is a log-sum-exp by the kernels of the loss at temperature 1 / (2 t). A zero row counts as orthogonal to all.

    Args:
        embeddings: (N, D), as for :func:`singular_value_spectrum`.
        t: > 0, how steep the potential is.
        backend: as for :func:`clop_kernels.clop_loss`.

    Returns:
        From -4 t (two antipodal points) to 0 (all rows point the same way); less is more uniform; NaN for one row. Many rows
        drawn uniformly from the sphere of R^D have log 0F1(; D/2; t^2) - 2 t, which for t = 2 is about -4 + 8 / D.

    Raises:
        As :func:`singular_value_spectrum`; ValueError also if t is not positive and finite.
    """
    _check_finite("embeddings", embeddings)
    _check_positive("t", t)
    n_rows = len(embeddings)
    if n_rows < 2:
        return math.nan
    alone = torch.full((n_rows,), -1, device=embeddings.device)
    with torch.autocast(embeddings.device.type, enabled=False):
        rows = embeddings.to(accumulate_dtype(embeddings.dtype))
        others = negative_logsumexp(rows, alone, temperature=1 / (2 * t), backend=backend)
    return float(others.logsumexp(0)) - math.log(n_rows * (n_rows - 1)) - 2 * t


# ---- classes --------------------------------------------------------------------------------------------------------


class ClassAlignment(NamedTuple):
    """What :func:`class_alignment` measured.

    Attributes:
        within: mean cosine of two rows of one class.
        between: mean cosine of two rows of different classes.
    """

    within: float
    between: float


@torch.no_grad()
def class_alignment(embeddings: Tensor, labels: Tensor) -> ClassAlignment:
    r"""Mean cosines of the pairs i != j of labelled rows: of equal labels, and of different ones.

    In O(N D), with the class sums :math:`u_c = \sum_{y_i = c} \hat z_i`: the cosines of equal labels sum to
    :math:`\sum_c |u_c|^2 - \sum_i |\hat z_i|^2`, those of different labels to :math:`|\sum_c u_c|^2 - \sum_c |u_c|^2`.

    Args:
        embeddings: (N, D), as for :func:`singular_value_spectrum`.
        labels: (N,) integers, one a row, -1 = unlabelled: such a row is in no pair.

    Returns:
        ``within``, from -1 to 1, is 1 where each class is one point; ``between``, from -1 to 1, is 0 for classes in orthogonal
        subspaces, and -1 / (C - 1) for C points on the vertices of a simplex. NaN where there is no such pair.

    Raises:
        As :func:`singular_value_spectrum`, and for labels of another shape, dtype or device.
    """
    classes = _classes(embeddings, labels)
    if not classes:
        return ClassAlignment(math.nan, math.nan)
    counts = [len(rows) for rows in classes]
    sums = torch.stack([rows.sum(0) for rows in classes])
    itself = sum(rows.square().sum() for rows in classes)
    of_classes, of_all = sums.square().sum(), sums.sum(0).square().sum()
    pairs_within = sum(count * (count - 1) for count in counts)
    pairs_between = sum(counts) ** 2 - sum(count**2 for count in counts)
    return ClassAlignment(_ratio(of_classes - itself, pairs_within), _ratio(of_all - of_classes, pairs_between))


@torch.no_grad()
def class_subspace_angles(
    embeddings: Tensor, labels: Tensor, *, rank: int | None = None, energy: float = 0.95, angle: str = "smallest"
) -> Tensor:
    r"""Principal angles between the subspaces of the classes (Bjorck and Golub, Math. Comp. 1973), in degrees.

    The subspace of a class is spanned by the leading right singular vectors of its unit rows, not centred. With orthonormal
    bases :math:`Q_a, Q_b` (D, k) the cosines of the principal angles are the singular values of :math:`Q_a^T Q_b`, and their
    sines those of :math:`(I - Q_a Q_a^T) Q_b`: from both, small and large angles alike are accurate to rounding.
    O(N D^2 + C^2 k^2 D) time, O(N D + C k D) memory.

    Args:
        embeddings: (N, D), as for :func:`singular_value_spectrum`.
        labels: (N,) integers, one a row, -1 = unlabelled: such a row is left out.
        rank: k >= 1, the dimensions of each subspace, or as many as the rows of a class span if those are fewer; None: by energy.
        energy: from above 0 to 1: the least k whose squared singular values are this share of the sum of all.
        angle: "smallest", 0 where two subspaces share a direction, as they must if together they have more than D dimensions; or
            "mean", of all min(k_a, k_b) angles. Both are 90 only for orthogonal subspaces.

    Returns:
        (C, C), symmetric, from 0 to 90, for the classes that occur, by ascending label; 0 on the diagonal, NaN for a class whose
        rows are all zero.

    Raises:
        As :func:`class_alignment`; TypeError or ValueError also for a rank < 1, an energy not in (0, 1], or another angle.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise TypeError(f"rank={rank!r} of type {type(rank).__name__}: expected an int, or None to choose it by energy")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank}: expected at least 1, or None to choose it by energy")
    _check_positive("energy", energy)
    if energy > 1:
        raise ValueError(f"energy={energy}: expected a share of at most 1")
    if angle not in ("smallest", "mean"):
        raise ValueError(f"angle={angle!r}: expected one of 'smallest', 'mean'")

    bases = [_leading_directions(rows, rank, energy) for rows in _classes(embeddings, labels)]
    if not bases:
        return embeddings.new_zeros((0, 0), dtype=accumulate_dtype(embeddings.dtype))
    ranks = torch.tensor([len(basis) for basis in bases], device=embeddings.device)
    q = torch.nn.utils.rnn.pad_sequence(bases, batch_first=True)  # (C, most of k, D): a basis a class, zero rows below it
    degrees = q.new_zeros(len(bases), len(bases))
    for a, basis in enumerate(bases[:-1]):
        degrees[a, a + 1 :] = _principal_angles(basis, q[a + 1 :], ranks[a + 1 :], angle)
    degrees = degrees + degrees.T
    degrees[ranks == 0] = degrees[:, ranks == 0] = math.nan
    return degrees


# ---- prototypes -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def prototype_alignment(embeddings: Tensor, labels: Tensor, prototypes: Tensor) -> float:
    r"""Mean of :math:`\hat z_i \cdot \hat c_{y_i}`, the cosine of each labelled row and the prototype of its class, in O(N D).

    Args:
        embeddings: (N, D), as for :func:`singular_value_spectrum`.
        labels: (N,) integers, one a row, less than K, -1 = unlabelled.
        prototypes: (K, D), any of the dtypes of embeddings; rows are normalised.

    Returns:
        From -1 to 1, 1 where each row is on its prototype; NaN without labelled rows.

    Raises:
        As :func:`class_alignment`, and for prototypes of another width or device, or a label without one.
    """
    zhat, label = _labelled(embeddings, labels)
    return float((zhat * _unit_prototypes(embeddings, labels, prototypes)[label]).sum(1).mean())


@torch.no_grad()
def nearest_prototype_accuracy(embeddings: Tensor, labels: Tensor, prototypes: Tensor) -> float:
    r"""Share of the labelled rows with :math:`\arg\max_k \hat z_i \cdot \hat c_k = y_i`, whose closest prototype is their own.

    O(N K D).

    Args:
        embeddings, labels, prototypes: as for :func:`prototype_alignment`.

    Returns:
        From 0 to 1; NaN without labelled rows.

    Raises:
        As :func:`prototype_alignment`.
    """
    zhat, label = _labelled(embeddings, labels)
    with torch.autocast(embeddings.device.type, enabled=False):
        cosines = zhat @ _unit_prototypes(embeddings, labels, prototypes).T
    return float((cosines.argmax(1) == label).to(zhat.dtype).mean())


# ---- the report -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CollapseReport:
    """What :func:`collapse_report` measured; prints as a table, `as_dict` gives the plain numbers.

    Attributes:
        n_rows, embedding_dim: N and D.
        effective_rank, centered_effective_rank: see :func:`effective_rank`, without and with ``center``.
        mean_resultant_length, mean_pairwise_cosine: see the functions.
        within_class_cosine, between_class_cosine: see :func:`class_alignment`; None without labels.
        prototype_alignment, nearest_prototype_accuracy: see the functions; None without labels and prototypes.
    """

    n_rows: int
    embedding_dim: int
    effective_rank: float
    centered_effective_rank: float
    mean_resultant_length: float
    mean_pairwise_cosine: float
    within_class_cosine: float | None = None
    between_class_cosine: float | None = None
    prototype_alignment: float | None = None
    nearest_prototype_accuracy: float | None = None

    def as_dict(self) -> dict[str, int | float | None]:
        return asdict(self)

    def __str__(self) -> str:
        most, most_centered = min(self.n_rows, self.embedding_dim), min(self.n_rows - 1, self.embedding_dim)
        lines = [f"{self.n_rows} embeddings of {self.embedding_dim} dimensions"]
        for name, value, digits, meaning in (
            ("effective rank", self.effective_rank, 2, f"of at most {most}; 1 is full collapse"),
            (
                "  of the centred rows",
                self.centered_effective_rank,
                2,
                f"of at most {most_centered}; 1 is a line, 0 full collapse",
            ),
            ("mean resultant length", self.mean_resultant_length, 4, "0 is spread out, 1 is full collapse"),
            ("mean pairwise cosine", self.mean_pairwise_cosine, 4, "0 is spread out, 1 is full collapse"),
            ("  within classes", self.within_class_cosine, 4, "1 is a point a class"),
            ("  between classes", self.between_class_cosine, 4, "0 is orthogonal classes, 1 is classes in one place"),
            ("prototype alignment", self.prototype_alignment, 4, "mean cosine to the own prototype, 1 is on it"),
            ("nearest-prototype accuracy", self.nearest_prototype_accuracy, 4, "share of labelled rows"),
        ):
            if value is not None:
                lines.append(f"  {name:26}  {value:8.{digits}f}   {meaning}")
        return "\n".join(lines)


def collapse_report(embeddings: Tensor, labels: Tensor | None = None, prototypes: Tensor | None = None) -> CollapseReport:
    """Measures how far embeddings have collapsed, in O(N D min(N, D)).

    Args:
        embeddings: (N, D), as for :func:`singular_value_spectrum`.
        labels: (N,) integers, one a row, -1 = unlabelled; for the figures about classes.
        prototypes: (K, D); with ``labels`` for the two figures about prototypes.

    Raises:
        As :func:`prototype_alignment`.
    """
    within = between = aligned = accuracy = None
    if labels is not None:
        within, between = class_alignment(embeddings, labels)
        if prototypes is not None:
            aligned = prototype_alignment(embeddings, labels, prototypes)
            accuracy = nearest_prototype_accuracy(embeddings, labels, prototypes)
    rank, centered = effective_rank(embeddings), effective_rank(embeddings, center=True)
    length, cosine = mean_resultant_length(embeddings), mean_pairwise_cosine(embeddings)
    n_rows, width = embeddings.shape
    return CollapseReport(n_rows, width, rank, centered, length, cosine, within, between, aligned, accuracy)


# ---- the learning rate ----------------------------------------------------------------------------------------------


def critical_learning_rate(temperature: float, n_rows: int = 1, reduction: str = "mean", embedding_norm: float = 1.0) -> float:
    """The largest stable gradient step on embeddings, in a simplified model of the InfoNCE loss (after arXiv 2403.18699).

    Assumptions: positives are merged (zhat_i = zhat_p), the softmax is nearly uniform, and a step of size mu is taken on the
    embeddings themselves. Then the sum-reduced loss has the gradient 2/tau * mean(zhat), the batch mean follows
    ``mean <- (1 - 2 mu / tau) mean``, and it contracts if and only if 0 < mu < tau, fastest at tau / 2: beyond tau the
    mean grows, which is the collapse to one direction. Reduction "mean" divides the gradient by ``n_rows`` and so
    multiplies the bound by it; raw embeddings of norm |u| see the gradient divided by |u| and turn by the step
    divided by |u|, which multiplies the bound by |u|^2.

    It bounds the step on the embeddings, not the learning rate of the network behind them, which moves them by its own Jacobian.
    The real loss departs from the model, as examples/learning_rate_bound.py shows: beyond the bound its mean stays, but rank does
    not collapse; and what two views differ by contracts only up to half the bound, where the softmax is nearly uniform.

    Args:
        temperature: tau > 0.
        n_rows: N = V * B, used by reduction "mean".
        reduction: "mean" or "sum", that of the loss.
        embedding_norm: |u| > 0, the norm of the raw embeddings.

    Returns:
        The critical step mu; half of it contracts the mean in one step.
    """
    for name, value in (("temperature", temperature), ("n_rows", n_rows), ("embedding_norm", embedding_norm)):
        _check_positive(name, value)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: expected one of 'mean', 'sum'")
    return temperature * embedding_norm**2 * (n_rows if reduction == "mean" else 1)


# ---- parts ----------------------------------------------------------------------------------------------------------


def _unit_rows(embeddings: Tensor, name: str = "embeddings") -> Tensor:
    _check_finite(name, embeddings)
    return torch.nn.functional.normalize(embeddings.to(accumulate_dtype(embeddings.dtype)), dim=1, eps=EPS)


def _labelled(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labelled rows, normalised, and their labels."""
    zhat = _unit_rows(embeddings)
    check_tensor("labels", labels)
    if labels.dtype not in INTEGER_DTYPES:
        raise TypeError(f"labels has dtype {labels.dtype}: expected an integer dtype, as of labels.long()")
    if labels.shape != zhat.shape[:1]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}: expected ({len(zhat)},), one label a row")
    if labels.device != zhat.device:
        raise ValueError(f"labels is on {labels.device}: expected the device of embeddings, {zhat.device}")
    is_labelled = labels >= 0
    return zhat[is_labelled], labels[is_labelled].long()


def _classes(embeddings: Tensor, labels: Tensor) -> list[Tensor]:
    """The unit rows of each class that occurs, by ascending label."""
    zhat, label = _labelled(embeddings, labels)
    counts = label.unique(return_counts=True)[1].tolist()
    return list(zhat[label.argsort(stable=True)].split(counts)) if counts else []


def _unit_prototypes(embeddings: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    check_prototypes(prototypes, embeddings)
    if labels.max() >= len(prototypes):
        raise ValueError(f"labels has {int(labels.max())}: expected labels below {len(prototypes)}, the number of prototypes")
    return _unit_rows(prototypes, "prototypes").to(accumulate_dtype(embeddings.dtype))


def _leading_directions(zhat: Tensor, rank: int | None, energy: float) -> Tensor:
    """(k, D): the leading right singular vectors of unit rows."""
    _, singular, directions = torch.linalg.svd(zhat, full_matrices=False)
    rounding = _ROUNDING * torch.finfo(zhat.dtype).eps * max(zhat.shape) ** 0.5  # relative, as that of the SVD of tall matrices
    most = int((singular > rounding * singular[0]).sum())
    if rank is None:
        cumulative = singular.square().cumsum(0)
        rank = int((cumulative < energy * cumulative[-1]).sum()) + 1
    return directions[: min(rank, most)]


def _principal_angles(basis: Tensor, others: Tensor, ranks: Tensor, angle: str) -> Tensor:
    """(M,) degrees from one basis (k, D) to each of M, (M, most of k, D) with zero rows from ``ranks`` on."""
    with torch.autocast(basis.device.type, enabled=False):
        products = others @ basis.T
        cosines = torch.linalg.svdvals(products)  # (M, ...) descending
        sines = torch.linalg.svdvals(others - products @ basis)  # descending; those of the zero rows are last
    n_angles = cosines.shape[1]
    order = torch.arange(n_angles, device=ranks.device)
    ascending = sines.gather(1, (ranks[:, None] - 1 - order).clamp(min=0))
    degrees = torch.atan2(ascending, cosines).rad2deg()
    if angle == "smallest":
        return degrees[:, 0] if n_angles else degrees.new_zeros(len(ranks))
    is_angle = order < ranks[:, None]
    return degrees.where(is_angle, 0).sum(1) / is_angle.sum(1)


def _ratio(total: Tensor | float, count: int) -> float:
    return float(total) / count if count else math.nan


def _check_finite(name: str, rows: Tensor) -> None:
    check_rows(name, rows)
    if len(rows) == 0:
        raise ValueError(f"{name} has shape {tuple(rows.shape)}: expected (N, D) with at least one row")
    is_bad = ~rows.isfinite().all(1)
    if is_bad.any():
        raise ValueError(f"{name} has {int(is_bad.sum())} of {len(rows)} rows with NaN or infinity: expected finite values")


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} of type {type(value).__name__}: expected a number")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value}: expected a positive finite number")
