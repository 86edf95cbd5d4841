"""Is a representation collapsing, and how large a step can it take? Plain measurements on embeddings."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .backends.contract import EPS


@torch.no_grad()
def effective_rank(embeddings: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, EUSIPCO 2007): from 1 to min(N, D).

    Args:
        embeddings: (N, D), N >= 1, any floating dtype; rows are normalised, not centred, so that collapse to one point gives 1.

    Returns:
        The effective number of dimensions that the rows span; 0 if every row is zero.
    """
    singular = torch.linalg.svdvals(_unit_rows(embeddings))
    share = singular / singular.sum().clamp(min=EPS)
    if not share.any():
        return 0.0
    return math.exp(float(torch.special.entr(share).sum()))


@torch.no_grad()
def mean_resultant_length(embeddings: Tensor) -> float:
    """|mean of zhat|, (N, D) -> from 0 (directions cancel) to 1 (all rows point the same way)."""
    return float(_unit_rows(embeddings).mean(0).norm())


@torch.no_grad()
def prototype_alignment(embeddings: Tensor, labels: Tensor, prototypes: Tensor) -> float:
    """Mean cosine between each labelled row and the prototype of its class, from -1 to 1; NaN without labelled rows.

    Args:
        embeddings: (N, D). labels: (N,) integers, one a row, -1 = unlabelled. prototypes: (K, D).
    """
    zhat, label = _labelled(embeddings, labels)
    return float((zhat * _unit_rows(prototypes)[label]).sum(1).mean())


@torch.no_grad()
def nearest_prototype_accuracy(embeddings: Tensor, labels: Tensor, prototypes: Tensor) -> float:
    """Share of the labelled rows whose closest prototype by cosine is that of their class; NaN without labelled rows.

    Args:
        embeddings: (N, D). labels: (N,) integers, one a row, -1 = unlabelled. prototypes: (K, D).
    """
    zhat, label = _labelled(embeddings, labels)
    return float(((zhat @ _unit_rows(prototypes).T).argmax(1) == label).double().mean())


@dataclass(frozen=True)
class CollapseReport:
    """What :func:`collapse_report` measured; prints as a table, `as_dict` gives the plain numbers.

    Attributes:
        n_rows, embedding_dim: N and D.
        effective_rank: see :func:`effective_rank`.
        mean_resultant_length: see :func:`mean_resultant_length`.
        prototype_alignment, nearest_prototype_accuracy: see the functions; None without labels and prototypes.
    """

    n_rows: int
    embedding_dim: int
    effective_rank: float
    mean_resultant_length: float
    prototype_alignment: float | None = None
    nearest_prototype_accuracy: float | None = None

    def as_dict(self) -> dict[str, int | float | None]:
        return asdict(self)

    def __str__(self) -> str:
        most = min(self.n_rows, self.embedding_dim)
        lines = [
            f"{self.n_rows} embeddings of {self.embedding_dim} dimensions",
            f"  effective rank              {self.effective_rank:8.2f}   of at most {most}; 1 is full collapse",
            f"  mean resultant length       {self.mean_resultant_length:8.4f}   0 is spread out, 1 is full collapse",
        ]
        if self.prototype_alignment is not None and self.nearest_prototype_accuracy is not None:
            lines += [
                f"  prototype alignment         {self.prototype_alignment:8.4f}   mean cosine to the own prototype, 1 is on it",
                f"  nearest-prototype accuracy  {self.nearest_prototype_accuracy:8.4f}   share of labelled rows",
            ]
        return "\n".join(lines)


def collapse_report(embeddings: Tensor, labels: Tensor | None = None, prototypes: Tensor | None = None) -> CollapseReport:
    """Measures how far embeddings have collapsed.

    Args:
        embeddings: (N, D), N >= 1.
        labels: (N,) integers, one a row, -1 = unlabelled; with ``prototypes`` for the two figures about prototypes.
        prototypes: (K, D).
    """
    about_prototypes: tuple[float, ...] = ()
    if labels is not None and prototypes is not None:
        about_prototypes = (
            prototype_alignment(embeddings, labels, prototypes),
            nearest_prototype_accuracy(embeddings, labels, prototypes),
        )
    n_rows, width = _check_rows(embeddings)
    return CollapseReport(n_rows, width, effective_rank(embeddings), mean_resultant_length(embeddings), *about_prototypes)


def critical_learning_rate(temperature: float, n_rows: int = 1, reduction: str = "mean", embedding_norm: float = 1.0) -> float:
    """The largest stable gradient step on embeddings, in a simplified model of the InfoNCE loss (after arXiv 2403.18699).

    Assumptions: positives are merged (zhat_i = zhat_p), the softmax is nearly uniform, and a step of size mu is taken on the
    embeddings themselves. Then the sum-reduced loss has the gradient 2/tau * mean(zhat), the batch mean follows
    ``mean <- (1 - 2 mu / tau) mean``, and it contracts if and only if 0 < mu < tau, fastest at tau / 2: beyond tau the
    mean grows, which is the collapse to one direction. Reduction "mean" divides the gradient by ``n_rows`` and so
    multiplies the bound by it; raw embeddings of norm |u| see the gradient divided by |u| and turn by the step
    divided by |u|, which multiplies the bound by |u|^2.

    It bounds the step on the embeddings, not the learning rate of the network behind them, which moves them by its own Jacobian.

    Args:
        temperature: tau > 0.
        n_rows: N = V * B, used by reduction "mean".
        reduction: "mean" or "sum", that of the loss.
        embedding_norm: |u| > 0, the norm of the raw embeddings.

    Returns:
        The critical step mu; half of it contracts the mean in one step.
    """
    for name, value in (("temperature", temperature), ("n_rows", n_rows), ("embedding_norm", embedding_norm)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value}: expected a positive finite number")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: expected one of 'mean', 'sum'")
    return temperature * embedding_norm**2 * (n_rows if reduction == "mean" else 1)


def _check_rows(embeddings: Tensor) -> tuple[int, int]:
    if embeddings.dim() != 2 or 0 in embeddings.shape:
        raise ValueError(f"embeddings has shape {tuple(embeddings.shape)}: expected (N, D) with at least one row and one column")
    return embeddings.shape[0], embeddings.shape[1]


def _unit_rows(rows: Tensor) -> Tensor:
    _check_rows(rows)
    return torch.nn.functional.normalize(rows.double(), dim=1, eps=EPS)


def _labelled(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    n_rows, _ = _check_rows(embeddings)
    if labels.shape != (n_rows,):
        raise ValueError(f"labels has shape {tuple(labels.shape)}: expected ({n_rows},), one label a row")
    is_labelled = labels >= 0
    return _unit_rows(embeddings)[is_labelled], labels[is_labelled].long()
