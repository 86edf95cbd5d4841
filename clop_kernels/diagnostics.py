"""Measures whether a representation collapses, and how large a gradient step it tolerates.

All measures use the unit rows zhat_i = z_i / max(|z_i|, 1e-12). They run on the device of the embeddings, in float32 (float64 for
float64 embeddings), outside autocast. They take O(N D) or O(N D^2) time (only :func:`uniformity` takes O(N^2 D)) and never N x N
memory. Each call synchronises the host with the device.
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
"""Singular values of at most this many units of rounding count as 0. Equal rows, centred, leave 1 to 2 (up to N = 65536)."""


# ---- all rows -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def singular_value_spectrum(embeddings: Tensor, *, center: bool = False) -> Tensor:
    r"""The normalised singular values :math:`p_k = \sigma_k / \sum_l \sigma_l` of the unit rows, largest first.

    They are computed from the (N, D) matrix itself, in O(N D min(N, D)) time. Its Gram matrix would lose all singular values
    below the square root of the rounding error.

    Args:
        embeddings: (N, D), N >= 1, float64, float32, float16 or bfloat16.
        center: True subtracts the mean of the unit rows first. With False, a collapse to one point shows as a single nonzero
            singular value.

    Returns:
        (min(N, D),), float32, or float64 for float64 embeddings: values from 0 to 1 whose sum is 1. Values at the level of
        rounding are set to 0. All values are 0 if every row is zero, or with ``center`` if all rows are equal.

    Raises:
        TypeError: if embeddings is not a tensor, or not of these dtypes.
        ValueError: if it is not 2-dimensional, is empty, or holds NaN or infinity.
    """
    zhat = _unit_rows(embeddings)
    if center:
        zhat = zhat - zhat.mean(0)
    singular = torch.linalg.svdvals(zhat)
    rounding = _ROUNDING * torch.finfo(zhat.dtype).eps * len(zhat) ** 0.5  # the squares of N unit rows sum to N
    singular = singular.where(singular > rounding, 0)
    return singular / singular.sum().clamp(min=EPS)


@torch.no_grad()
def effective_rank(embeddings: Tensor, *, center: bool = False) -> float:
    r"""The exponential of the entropy of the spectrum, :math:`\exp(-\sum_k p_k \log p_k)` (Roy and Vetterli, EUSIPCO 2007).

    Args:
        embeddings: (N, D), N >= 1, float64, float32, float16 or bfloat16.
        center: False: the effective number of dimensions that the rows span, 1 if all rows lie on one line through the origin.
            True: the same for the deviations of the unit rows from their mean, which also shows structure inside a narrow cone.

    Returns:
        A float from 1 to min(N, D), with ``center`` to min(N - 1, D); 0 if the whole spectrum is 0.

    Raises:
        The same errors as :func:`singular_value_spectrum`.
    """
    share = singular_value_spectrum(embeddings, center=center)
    if not share.any():
        return 0.0
    return math.exp(float(torch.special.entr(share).sum()))


@torch.no_grad()
def mean_resultant_length(embeddings: Tensor) -> float:
    r"""The length of the mean of the unit rows, :math:`|\frac{1}{N} \sum_i \hat z_i|`, in O(N D) time.

    It is a measure of directional statistics (Mardia and Jupp, 2000).

    Args:
        embeddings: (N, D), N >= 1, float64, float32, float16 or bfloat16.

    Returns:
        A float from 0 (the directions cancel) to 1 (all rows point the same way).

    Raises:
        The same errors as :func:`singular_value_spectrum`.
    """
    return float(_unit_rows(embeddings).mean(0).norm())


@torch.no_grad()
def mean_pairwise_cosine(embeddings: Tensor) -> float:
    r"""The mean cosine of two different rows, :math:`\frac{1}{N (N - 1)} \sum_{i \ne j} \hat z_i \cdot \hat z_j`.

    It is computed as :math:`(|\sum_i \hat z_i|^2 - \sum_i |\hat z_i|^2) / (N (N - 1))`, in O(N D) time.

    Args:
        embeddings: (N, D), N >= 1, float64, float32, float16 or bfloat16.

    Returns:
        A float from -1 / (N - 1) (a simplex, or any rows whose sum is zero) to 1 (all rows point the same way). NaN for one row.

    Raises:
        The same errors as :func:`singular_value_spectrum`.
    """
    zhat = _unit_rows(embeddings)
    n_rows = len(zhat)
    return _ratio(zhat.sum(0).square().sum() - zhat.square().sum(), n_rows * (n_rows - 1))


@torch.no_grad()
def alignment(embeddings: Tensor, *, n_views: int = 2, alpha: float = 2.0) -> float:
    r"""The mean of :math:`|\hat z_i - \hat z_j|^\alpha` over the positive pairs (Wang and Isola, arXiv 2005.10242).

    A positive pair is two views of one instance. Time is O(V N D).

    Args:
        embeddings: (V*B, D), float64, float32, float16 or bfloat16. Rows are view-major as for :func:`clop_kernels.clop_loss`:
            row ``v * B + b`` is view v of instance b.
        n_views: V >= 2, the number of views of each instance.
        alpha: the exponent, > 0. With 2, the measure is 2 - 2 cosine.

    Returns:
        A float from 0 (the views coincide) to 2^alpha.

    Raises:
        The same errors as :func:`singular_value_spectrum`. Also ValueError if alpha is not positive and finite, if n_views < 2,
        or if the number of rows is not a multiple of n_views.
    """
    zhat = _unit_rows(embeddings)
    check_embeddings(embeddings, n_views)
    _check_positive("alpha", alpha)
    if n_views < 2:
        raise ValueError(f"n_views={n_views}: expected at least 2, since a positive pair is two views of one instance")
    pairs = itertools.combinations(zhat.view(n_views, -1, zhat.shape[1]), 2)
    return float(torch.stack([(a - b).norm(dim=1).pow(alpha).mean() for a, b in pairs]).mean())


@torch.no_grad()
def uniformity(embeddings: Tensor, *, t: float = 2.0, backend: str | None = None) -> float:
    r"""The potential :math:`\log \frac{1}{N (N - 1)} \sum_{i \ne j} e^{-t |\hat z_i - \hat z_j|^2}` (Wang and Isola, arXiv
    2005.10242): how evenly the rows cover the sphere.

    The value is exact, over all pairs, in O(N^2 D) time and O(N D) memory. The squared distance is
    :math:`2 - 2 \hat z_i \cdot \hat z_j`, so the sum is a log-sum-exp, which the kernels of the loss compute at the temperature
    1 / (2 t). A zero row counts as orthogonal to all rows.

    Args:
        embeddings: (N, D), N >= 1, float64, float32, float16 or bfloat16.
        t: the steepness of the potential, > 0.
        backend: "cuda", "triton", "cpu", "tiled" or "reference". None takes the fastest one that can run here.

    Returns:
        A float from -4 t (two antipodal points) to 0 (all rows point the same way); smaller is more uniform. NaN for one row.
        Many rows drawn uniformly from the sphere in R^D have the value log 0F1(; D/2; t^2) - 2 t, about -4 + 8 / D for t = 2.

    Raises:
        The same errors as :func:`singular_value_spectrum`. Also ValueError if t is not positive and finite.
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
    """The result of :func:`class_alignment`.

    Attributes:
        within: the mean cosine of two rows of one class.
        between: the mean cosine of two rows of different classes.
    """

    within: float
    between: float


@torch.no_grad()
def class_alignment(embeddings: Tensor, labels: Tensor) -> ClassAlignment:
    r"""The mean cosine of two labelled rows, once for pairs with equal labels and once for pairs with different labels.

    With the class sums :math:`u_c = \sum_{y_i = c} \hat z_i`, both take O(N D) time. The cosines of equal labels sum to
    :math:`\sum_c |u_c|^2 - \sum_i |\hat z_i|^2`, those of different labels to :math:`|\sum_c u_c|^2 - \sum_c |u_c|^2`.

    Args:
        embeddings: (N, D), N >= 1, float64, float32, float16 or bfloat16.
        labels: (N,) integers on the device of ``embeddings``, one label for each row. A row with label -1 is in no pair.

    Returns:
        A :class:`ClassAlignment` of two floats from -1 to 1. ``within`` is 1 if each class is one point. ``between`` is 0 for
        classes in orthogonal subspaces, and -1 / (C - 1) for C points on the vertices of a simplex. Without pairs a value is NaN.

    Raises:
        The same errors as :func:`singular_value_spectrum`. Also TypeError or ValueError for labels of another shape, dtype or
        device.
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
    r"""The principal angles between the subspaces of the classes (Bjorck and Golub, Math. Comp. 1973), in degrees.

    The leading right singular vectors of a class's unit rows, which are not centred, span its subspace. Let
    :math:`Q_a, Q_b` (D, k) be orthonormal bases of two of them. The cosines of the principal angles are the singular values of
    :math:`Q_a^T Q_b`, and their sines are those of :math:`(I - Q_a Q_a^T) Q_b`. Using both makes small and large angles accurate
    to rounding. This takes O(N D^2 + C^2 k^2 D) time and O(N D + C k D) memory.

    Args:
        embeddings: (N, D), N >= 1, float64, float32, float16 or bfloat16.
        labels: (N,) integers on the device of ``embeddings``, one label for each row. Rows with label -1 are left out.
        rank: k >= 1, the dimension of each subspace; a class whose rows span fewer dimensions gets that number. None: ``energy``
            chooses k for each class.
        energy: a share, above 0 and at most 1. k is the smallest number of dimensions whose squared singular values sum to at
            least this share of the total.
        angle: "smallest": the smallest angle. It is 0 if two subspaces share a direction, which is certain if together they have
            more than D dimensions. "mean": the mean of all min(k_a, k_b) angles. Both are 90 only for orthogonal subspaces.

    Returns:
        (C, C), symmetric, from 0 to 90, one row for each class that occurs, by ascending label. The diagonal is 0. A class whose
        rows are all zero has NaN.

    Raises:
        The same errors as :func:`class_alignment`. Also TypeError or ValueError for a rank < 1, an energy not in (0, 1], or
        another angle.
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
    q = torch.nn.utils.rnn.pad_sequence(bases, batch_first=True)  # (C, largest k, D), padded with zero rows
    degrees = q.new_zeros(len(bases), len(bases))
    for a, basis in enumerate(bases[:-1]):
        degrees[a, a + 1 :] = _principal_angles(basis, q[a + 1 :], ranks[a + 1 :], angle)
    degrees = degrees + degrees.T
    degrees[ranks == 0] = degrees[:, ranks == 0] = math.nan
    return degrees


# ---- prototypes -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def prototype_alignment(embeddings: Tensor, labels: Tensor, prototypes: Tensor) -> float:
    r"""The mean of :math:`\hat z_i \cdot \hat c_{y_i}`: the cosine of a labelled row and the prototype of its class.

    Time is O(N D).

    Args:
        embeddings: (N, D), N >= 1, float64, float32, float16 or bfloat16.
        labels: (N,) integers on the device of ``embeddings``, one label for each row, below K; -1 means unlabelled.
        prototypes: (K, D), one of the dtypes of embeddings, on their device. The rows are normalised.

    Returns:
        A float from -1 to 1; 1 if each row is on its prototype. NaN if no row is labelled.

    Raises:
        The same errors as :func:`class_alignment`. Also ValueError for prototypes of another width or device, or a label without
        a prototype.
    """
    zhat, label = _labelled(embeddings, labels)
    return float((zhat * _unit_prototypes(embeddings, labels, prototypes)[label]).sum(1).mean())


@torch.no_grad()
def nearest_prototype_accuracy(embeddings: Tensor, labels: Tensor, prototypes: Tensor) -> float:
    r"""The share of labelled rows whose closest prototype is their own: :math:`\arg\max_k \hat z_i \cdot \hat c_k = y_i`.

    Time is O(N K D).

    Args:
        embeddings: (N, D), N >= 1, float64, float32, float16 or bfloat16.
        labels: (N,) integers on the device of ``embeddings``, one label for each row, below K; -1 means unlabelled.
        prototypes: (K, D), one of the dtypes of embeddings, on their device. The rows are normalised.

    Returns:
        A float from 0 to 1. NaN if no row is labelled.

    Raises:
        The same errors as :func:`prototype_alignment`.
    """
    zhat, label = _labelled(embeddings, labels)
    with torch.autocast(embeddings.device.type, enabled=False):
        cosines = zhat @ _unit_prototypes(embeddings, labels, prototypes).T
    return float((cosines.argmax(1) == label).to(zhat.dtype).mean())


# ---- the report -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CollapseReport:
    """The result of :func:`collapse_report`. It prints as a table; ``as_dict()`` gives the plain numbers.

    Attributes:
        n_rows, embedding_dim: N and D.
        effective_rank, centered_effective_rank: :func:`effective_rank` without and with ``center``.
        mean_resultant_length, mean_pairwise_cosine: the results of the functions of these names.
        within_class_cosine, between_class_cosine: the results of :func:`class_alignment`; None without labels.
        prototype_alignment, nearest_prototype_accuracy: the results of the functions of these names; None without labels and
            prototypes.
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
            ("  within classes", self.within_class_cosine, 4, "1 is one point for each class"),
            ("  between classes", self.between_class_cosine, 4, "0 is orthogonal classes, 1 is all classes in one place"),
            ("prototype alignment", self.prototype_alignment, 4, "mean cosine to the own prototype; 1 is on it"),
            ("nearest-prototype accuracy", self.nearest_prototype_accuracy, 4, "share of labelled rows"),
        ):
            if value is not None:
                lines.append(f"  {name:26}  {value:8.{digits}f}   {meaning}")
        return "\n".join(lines)


def collapse_report(embeddings: Tensor, labels: Tensor | None = None, prototypes: Tensor | None = None) -> CollapseReport:
    """Measures how far embeddings have collapsed, in O(N D min(N, D)) time.

    Args:
        embeddings: (N, D), N >= 1, float64, float32, float16 or bfloat16.
        labels: (N,) integers on the device of ``embeddings``, one label for each row; -1 means unlabelled. None leaves out the
            measures of classes and prototypes.
        prototypes: (K, D), used together with ``labels``. None leaves out the measures of prototypes.

    Returns:
        A :class:`CollapseReport`. Print it, or take its attributes.

    Raises:
        The same errors as :func:`prototype_alignment`.
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
    """The largest stable gradient step on the embeddings, in a simplified model of the InfoNCE loss (after arXiv 2403.18699).

    The model assumes that positives have merged (zhat_i = zhat_p), that the softmax is nearly uniform, and that a step of size mu
    is taken on the embeddings themselves. The sum-reduced loss then has the gradient 2/tau * mean(zhat), and a step changes the
    batch mean to ``(1 - 2 mu / tau) * mean``. The mean contracts if and only if 0 < mu < tau, fastest at tau / 2. Beyond tau it
    grows, which is the collapse to one direction.

    The reduction "mean" divides the gradient by ``n_rows``, and so multiplies the bound by ``n_rows``. Raw embeddings of norm |u|
    receive the gradient divided by |u|, and turn by the step divided by |u|; this multiplies the bound by |u|^2.

    The bound concerns the step on the embeddings. The learning rate of the network is another quantity: the network moves the
    embeddings through its own Jacobian. The real loss departs from the model, as examples/learning_rate_bound.py shows. Beyond
    the bound its mean stays, but the rank does not collapse. And the difference between two views contracts only up to half the
    bound, where the softmax is nearly uniform.

    Args:
        temperature: tau > 0.
        n_rows: N = V * B, the number of rows in a batch; used by the reduction "mean".
        reduction: "mean" or "sum", the reduction of the loss.
        embedding_norm: |u| > 0, the norm of the raw embeddings. The default 1 fits rows of unit length.

    Returns:
        A float, the critical step mu. Half of it contracts the mean in one step.

    Raises:
        TypeError: if a number is not a number.
        ValueError: if a number is not positive and finite, or for another reduction.
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
        raise TypeError(f"labels has dtype {labels.dtype}: expected an integer dtype; labels.long() converts")
    if labels.shape != zhat.shape[:1]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}: expected ({len(zhat)},), one label for each row")
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
    rounding = _ROUNDING * torch.finfo(zhat.dtype).eps * max(zhat.shape) ** 0.5  # relative error of the SVD of a tall matrix
    most = int((singular > rounding * singular[0]).sum())
    if rank is None:
        cumulative = singular.square().cumsum(0)
        rank = int((cumulative < energy * cumulative[-1]).sum()) + 1
    return directions[: min(rank, most)]


def _principal_angles(basis: Tensor, others: Tensor, ranks: Tensor, angle: str) -> Tensor:
    """(M,) degrees between one basis (k, D) and each of M bases, (M, largest k, D), whose rows from ``ranks`` on are zero."""
    with torch.autocast(basis.device.type, enabled=False):
        products = others @ basis.T
        cosines = torch.linalg.svdvals(products)  # (M, ...) descending
        sines = torch.linalg.svdvals(others - products @ basis)  # descending; those of the zero rows come last
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
