"""The losses as modules: prototypes as a buffer, the temperature as a number or a parameter, views as arguments."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from . import functional, validation
from .backends import NAMES
from .backends.contract import DISTANCES, POSITIVES, REDUCTIONS
from .prototypes import orthonormal_prototypes, simplex_prototypes

if torch.distributed.is_available():
    from .collectives import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self

_PROTOTYPES = {"orthonormal": orthonormal_prototypes, "simplex": simplex_prototypes}


class _Arguments(TypedDict):
    """What the losses pass on to their functions."""

    n_views: int
    temperature: float | Tensor
    reduction: str
    backend: str | None
    group: ProcessGroup | None
    strategy: str
    grad_scale: str
    check_ranks: bool


def _checked_float(temperature: float) -> float:
    if isinstance(temperature, Tensor):
        raise TypeError("temperature is a Tensor: expected a float; learnable_temperature=True makes it a parameter")
    return float(validation.checked_temperature(temperature, torch.device("cpu")))


class _ContrastiveLoss(nn.Module):
    """What the three losses share: options checked once, the temperature, and how views are passed."""

    log_temperature: nn.Parameter | None

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        n_views: int = 2,
        reduction: str = "mean",
        learnable_temperature: bool = False,
        backend: str | None = None,
        group: ProcessGroup | None = None,
        strategy: str = "auto",
        grad_scale: str = "ddp",
        check_ranks: bool = True,
    ) -> None:
        super().__init__()
        validation.check_choice("reduction", reduction, REDUCTIONS)
        if backend is not None:
            validation.check_choice("backend", backend, NAMES)
        if isinstance(n_views, bool) or not isinstance(n_views, int) or n_views < 1:
            raise ValueError(f"n_views={n_views!r}: expected an int of at least 1")
        validation.sharding(group, strategy, grad_scale, check_ranks)
        validation.check_strategies(strategy, grad_scale)
        self.n_views = n_views
        self.reduction = reduction
        self.backend = backend
        self.group = group
        self.strategy = strategy
        self.grad_scale = grad_scale
        self.check_ranks = check_ranks
        self._temperature = _checked_float(temperature)
        # The logarithm is what is learned, so that no step of an optimiser can make the temperature negative.
        self.log_temperature = nn.Parameter(torch.tensor(math.log(self._temperature))) if learnable_temperature else None

    @property
    def temperature(self) -> float | Tensor:
        """tau: a float, or with ``learnable_temperature`` a 0-dim tensor, exp of the parameter ``log_temperature``."""
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature = _checked_float(value)
        if self.log_temperature is not None:
            with torch.no_grad():
                self.log_temperature.fill_(math.log(self._temperature))

    def _stack(self, views: tuple[Tensor, ...], labels: Tensor | None, n_views: int | None) -> tuple[Tensor, Tensor | None, int]:
        """The views as one view-major tensor; a last positional tensor of integers is the labels."""
        for position, view in enumerate(views):
            validation.check_tensor(f"view {position}", view)
        if labels is None and len(views) > 1 and not views[-1].dtype.is_floating_point:
            *rest, labels = views
            views = tuple(rest)
        if not views:
            raise TypeError("no views: expected at least one (B, D) tensor of embeddings")
        for position, view in enumerate(views[1:], start=1):
            if view.shape != views[0].shape or view.dtype != views[0].dtype:
                raise ValueError(
                    f"view {position} has shape {tuple(view.shape)} and dtype {view.dtype}: expected those of view 0, "
                    f"{tuple(views[0].shape)} and {views[0].dtype}"
                )
        if len(views) == 1:
            return views[0], labels, self.n_views if n_views is None else n_views
        if n_views not in (None, len(views)):
            raise ValueError(f"n_views={n_views} with {len(views)} views: expected None, or one stacked tensor")
        return torch.cat(views), labels, len(views)

    def _arguments(self, n_views: int) -> _Arguments:
        return _Arguments(
            n_views=n_views,
            temperature=self.temperature,
            reduction=self.reduction,
            backend=self.backend,
            group=self.group,
            strategy=self.strategy,
            grad_scale=self.grad_scale,
            check_ranks=self.check_ranks,
        )

    def _failures_announced(self) -> AbstractContextManager[Any]:
        return validation.failures_announced(validation.sharding(self.group, self.strategy, self.grad_scale, self.check_ranks))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self.group)] = self.group  # the copy shares it: a process group cannot be copied
        result = self.__class__.__new__(self.__class__)
        memo[id(self)] = result
        result.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return result

    def extra_repr(self) -> str:
        tau = math.exp(self.log_temperature.item()) if self.log_temperature is not None else self._temperature
        learned = " (learned)" if self.log_temperature is not None else ""
        return f"temperature={tau:g}{learned}, n_views={self.n_views}, reduction={self.reduction!r}, backend={self.backend!r}"


class NTXentLoss(_ContrastiveLoss):
    """NT-Xent (SimCLR, arXiv 2002.05709) as a module; see :func:`clop_kernels.ntxent_loss`.

    Args:
        temperature: tau > 0, the initial value where it is learned.
        n_views: V of a stacked tensor; several tensors are counted.
        reduction: "mean", "sum" or "none".
        learnable_temperature: make ``log_temperature`` a parameter.
        backend: None is the fastest that can run.
        group, strategy, grad_scale, check_ranks: as for :func:`clop_kernels.clop_loss`.
    """

    def forward(self, *views: Tensor, n_views: int | None = None) -> Tensor:
        """Any number of (B, D) views, or one view-major (V*B, D) tensor -> the loss."""
        with self._failures_announced():
            embeddings, labels, n_views = self._stack(views, None, n_views)
            if labels is not None:
                raise TypeError("NTXentLoss takes no labels: expected views only. SupConLoss and CLOPLoss take labels")
        return functional.ntxent_loss(embeddings, **self._arguments(n_views))


class SupConLoss(_ContrastiveLoss):
    """SupCon (arXiv 2004.11362) as a module; see :func:`clop_kernels.supcon_loss`. Arguments as of :class:`NTXentLoss`."""

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        n_views: int = 1,
        reduction: str = "mean",
        learnable_temperature: bool = False,
        backend: str | None = None,
        group: ProcessGroup | None = None,
        strategy: str = "auto",
        grad_scale: str = "ddp",
        check_ranks: bool = True,
    ) -> None:
        super().__init__(
            temperature,
            n_views=n_views,
            reduction=reduction,
            learnable_temperature=learnable_temperature,
            backend=backend,
            group=group,
            strategy=strategy,
            grad_scale=grad_scale,
            check_ranks=check_ranks,
        )

    def forward(self, *views: Tensor, labels: Tensor | None = None, n_views: int | None = None) -> Tensor:
        """Any number of (B, D) views, or one view-major (V*B, D) tensor, and (B,) labels -> the loss."""
        with self._failures_announced():
            embeddings, labels, n_views = self._stack(views, labels, n_views)
        return functional.clop_loss(embeddings, labels, positives="label", **self._arguments(n_views))


class CLOPLoss(_ContrastiveLoss):
    """Contrastive loss with frozen orthonormal prototypes (CLOP, arXiv 2403.18699); see :func:`clop_kernels.clop_loss`.

    >>> criterion = CLOPLoss(num_classes=10, embedding_dim=128)
    >>> loss = criterion(z_1, z_2, labels=labels)  # (B, D), (B, D), (B,), -1 for unlabelled

    Args:
        num_classes: K, the number of prototypes.
        embedding_dim: D, the width of the embeddings; K <= D for orthonormal prototypes, K <= D + 1 for a simplex.
        temperature: tau > 0, the initial value where it is learned.
        prototype_weight: lambda >= 0, the factor of the prototype term.
        distance: "cosine", "euclidean" or "manhattan", from a unit row to its prototype.
        positives: "instance" (NT-Xent, the paper's default) or "label" (SupCon).
        n_views: V of a stacked tensor; several tensors are counted.
        reduction: "mean", "sum" or "none".
        learnable_temperature: make ``log_temperature`` a parameter.
        prototypes: "orthonormal", "simplex", or a (K, D) tensor of your own.
        generator: a CPU generator for a reproducible draw of the prototypes.
        backend: None is the fastest that can run.
        group, strategy, grad_scale, check_ranks: as for :func:`clop_kernels.clop_loss`. All ranks of the group get the prototypes
            of its first one, and must make this loss together.
        device, dtype: of the prototypes and the temperature.

    Attributes:
        prototypes: (K, D) buffer, in the state_dict.
    """

    prototypes: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        temperature: float = 0.1,
        prototype_weight: float = 1.0,
        *,
        distance: str = "cosine",
        positives: str = "instance",
        n_views: int = 2,
        reduction: str = "mean",
        learnable_temperature: bool = False,
        prototypes: str | Tensor = "orthonormal",
        generator: torch.Generator | None = None,
        backend: str | None = None,
        group: ProcessGroup | None = None,
        strategy: str = "auto",
        grad_scale: str = "ddp",
        check_ranks: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            temperature,
            n_views=n_views,
            reduction=reduction,
            learnable_temperature=learnable_temperature,
            backend=backend,
            group=group,
            strategy=strategy,
            grad_scale=grad_scale,
            check_ranks=check_ranks,
        )
        validation.check_choice("distance", distance, DISTANCES)
        validation.check_choice("positives", positives, POSITIVES)
        if isinstance(prototype_weight, Tensor):
            raise TypeError("prototype_weight is a Tensor: expected a float; the function clop_loss takes tensors too")
        self.prototype_weight = validation.checked_prototype_weight(prototype_weight, torch.device("cpu"))
        self.distance = distance
        self.positives = positives
        if isinstance(prototypes, Tensor):
            if prototypes.shape != (num_classes, embedding_dim) or not prototypes.dtype.is_floating_point:
                raise ValueError(
                    f"prototypes has shape {tuple(prototypes.shape)} and dtype {prototypes.dtype}: expected a floating tensor of "
                    f"shape (num_classes, embedding_dim) = ({num_classes}, {embedding_dim})"
                )
            buffer = prototypes.detach().to(device=device, dtype=dtype, copy=True)
        else:
            validation.check_choice("prototypes", prototypes, tuple(_PROTOTYPES))
            draw = _PROTOTYPES[prototypes]
            buffer = draw(num_classes, embedding_dim, generator=generator, device=device, dtype=dtype)
        if group is not None:
            buffer = Ranks(group.group_name).agreed_on("prototypes", buffer)
        self.register_buffer("prototypes", buffer)
        if self.log_temperature is not None:
            self.log_temperature.data = self.log_temperature.data.to(device=device)

    def forward(self, *views: Tensor, labels: Tensor | None = None, n_views: int | None = None) -> Tensor:
        """Any number of (B, D) views, or one view-major (V*B, D) tensor, and (B,) labels (None: all unlabelled) -> the loss."""
        with self._failures_announced():
            embeddings, labels, n_views = self._stack(views, labels, n_views)
        return functional.clop_loss(
            embeddings,
            labels,
            self.prototypes,
            positives=self.positives,
            prototype_weight=self.prototype_weight,
            distance=self.distance,
            **self._arguments(n_views),
        )

    def extra_repr(self) -> str:
        classes, width = self.prototypes.shape
        return (
            f"num_classes={classes}, embedding_dim={width}, prototype_weight={self.prototype_weight:g}, "
            f"distance={self.distance!r}, positives={self.positives!r}, {super().extra_repr()}"
        )
