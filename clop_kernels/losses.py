"""The losses as modules. The prototypes are a buffer, the temperature is a number or a parameter. A call takes the views."""

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
    """The keyword arguments that all modules pass on to the loss functions."""

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
    """The shared part of the three losses: checked options, the temperature, and the stacking of views."""

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
        # The logarithm is learned, so that no optimiser step can make the temperature negative.
        self.log_temperature = nn.Parameter(torch.tensor(math.log(self._temperature))) if learnable_temperature else None

    @property
    def temperature(self) -> float | Tensor:
        """tau, a float. With ``learnable_temperature``: a 0-dim tensor, exp of ``log_temperature``. Assign a float to set it."""
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature = _checked_float(value)
        if self.log_temperature is not None:
            with torch.no_grad():
                self.log_temperature.fill_(math.log(self._temperature))

    def _stack(self, views: tuple[Tensor, ...], labels: Tensor | None, n_views: int | None) -> tuple[Tensor, Tensor | None, int]:
        """Stacks the views into one view-major tensor. A last positional tensor of integers is taken as the labels."""
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
            raise ValueError(f"n_views={n_views} with {len(views)} views: expected n_views=None, or one stacked tensor")
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
        memo[id(self.group)] = self.group  # a process group cannot be copied, so the copy shares it
        result = self.__class__.__new__(self.__class__)
        memo[id(self)] = result
        result.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return result

    def extra_repr(self) -> str:
        tau = math.exp(self.log_temperature.item()) if self.log_temperature is not None else self._temperature
        learned = " (learned)" if self.log_temperature is not None else ""
        return f"temperature={tau:g}{learned}, n_views={self.n_views}, reduction={self.reduction!r}, backend={self.backend!r}"


class NTXentLoss(_ContrastiveLoss):
    """NT-Xent, the loss of SimCLR (arXiv 2002.05709), as a module; the function is :func:`clop_kernels.ntxent_loss`.

    >>> criterion = NTXentLoss(temperature=0.5)
    >>> loss = criterion(z_1, z_2)  # two views, (B, D) each

    Args:
        temperature: tau > 0. With ``learnable_temperature`` it is the initial value.
        n_views: V, the number of views in one stacked (V*B, D) tensor. If views are separate arguments, they are counted.
        reduction: "mean" over the anchors, "sum", or "none": each row's term, (V*B,).
        learnable_temperature: True makes ``log_temperature``, the logarithm of tau, a parameter.
        backend: "cuda", "triton", "cpu", "tiled" or "reference". None takes the fastest one that can run here.
        group: the process group over which the rows are spread. Initialise the group first, then build the module. None: the
            loss of this process alone.
        strategy, grad_scale, check_ranks: how the ranks of ``group`` work together, as for :func:`clop_kernels.clop_loss`.

    Raises:
        TypeError, ValueError: the message names the argument, its value and what was expected.
    """

    def forward(self, *views: Tensor, n_views: int | None = None) -> Tensor:
        """The loss of some views, each a tensor or all stacked in one.

        Args:
            views: two or more (B, D) tensors of one dtype, one tensor for each view; or one view-major (V*B, D) tensor, whose
                row ``v * B + b`` is view v of instance b.
            n_views: V of one stacked tensor. None: the constructor's ``n_views``. Leave it out if views are separate arguments.

        Returns:
            A tensor of shape (), or (V*B,) for ``reduction="none"``; float32, or float64 for float64 views.

        Raises:
            TypeError, ValueError: the message names the argument, its value and what was expected.
            clop_kernels.BackendUnavailableError: if ``backend`` cannot run here.
        """
        with self._failures_announced():
            embeddings, labels, n_views = self._stack(views, None, n_views)
            if labels is not None:
                raise TypeError("NTXentLoss takes no labels: expected views only. SupConLoss and CLOPLoss take labels")
        return functional.ntxent_loss(embeddings, **self._arguments(n_views))


class SupConLoss(_ContrastiveLoss):
    """SupCon (arXiv 2004.11362, eq. 2) as a module; the function is :func:`clop_kernels.supcon_loss`.

    >>> criterion = SupConLoss(temperature=0.1)
    >>> loss = criterion(z_1, z_2, labels=labels)  # two views, (B, D) each, and (B,) labels, -1 for unlabelled

    Args:
        temperature: tau > 0. With ``learnable_temperature`` it is the initial value.
        n_views: V, the number of views in one stacked (V*B, D) tensor. If views are separate arguments, they are counted.
        reduction: "mean" over the anchors, "sum", or "none": each row's term, (V*B,).
        learnable_temperature: True makes ``log_temperature``, the logarithm of tau, a parameter.
        backend: "cuda", "triton", "cpu", "tiled" or "reference". None takes the fastest one that can run here.
        group: the process group over which the rows are spread. Initialise the group first, then build the module. None: the
            loss of this process alone.
        strategy, grad_scale, check_ranks: how the ranks of ``group`` work together, as for :func:`clop_kernels.clop_loss`.

    Raises:
        TypeError, ValueError: the message names the argument, its value and what was expected.
    """

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
        """The loss of some views, each a tensor or all stacked in one, and the labels of their instances.

        Args:
            views: one or more (B, D) tensors of one dtype, one tensor for each view; or one view-major (V*B, D) tensor, whose
                row ``v * B + b`` is view v of instance b. The labels may also be the last positional argument.
            labels: (B,) integers on the device of the views, one label for each instance; -1 means unlabelled.
            n_views: V of one stacked tensor. None: the constructor's ``n_views``. Leave it out if views are separate arguments.

        Returns:
            A tensor of shape (), or (V*B,) for ``reduction="none"``; float32, or float64 for float64 views.

        Raises:
            TypeError, ValueError: the message names the argument, its value and what was expected.
            clop_kernels.BackendUnavailableError: if ``backend`` cannot run here.
        """
        with self._failures_announced():
            embeddings, labels, n_views = self._stack(views, labels, n_views)
        return functional.clop_loss(embeddings, labels, positives="label", **self._arguments(n_views))


class CLOPLoss(_ContrastiveLoss):
    """Contrastive loss with frozen prototypes (CLOP, arXiv 2403.18699) as a module; see :func:`clop_kernels.clop_loss`.

    >>> criterion = CLOPLoss(num_classes=10, embedding_dim=128)
    >>> loss = criterion(z_1, z_2, labels=labels)  # two views, (B, D) each, and (B,) labels, -1 for unlabelled

    Args:
        num_classes: K, the number of prototypes.
        embedding_dim: D, the width of the embeddings. Orthonormal prototypes need K <= D, a simplex needs K <= D + 1.
        temperature: tau > 0. With ``learnable_temperature`` it is the initial value.
        prototype_weight: lambda >= 0, the factor of the prototype term, a number.
        distance: "cosine", "euclidean" or "manhattan", from a row to the prototype of its class.
        positives: "instance" (NT-Xent, the paper's default): the other views of an instance. "label" (SupCon): all rows of the
            same label.
        n_views: V, the number of views in one stacked (V*B, D) tensor. If views are separate arguments, they are counted.
        reduction: "mean", "sum", or "none": each row's term, (V*B,).
        learnable_temperature: True makes ``log_temperature``, the logarithm of tau, a parameter.
        prototypes: "orthonormal" or "simplex", drawn at random, or your own (K, D) floating tensor, which is copied.
        generator: a CPU generator, for a reproducible draw of the prototypes. None takes torch's global generator.
        backend: "cuda", "triton", "cpu", "tiled" or "reference". None takes the fastest one that can run here.
        group: the process group over which the rows are spread. Initialise the group first, then build the module on all of its
            ranks together: every rank gets the prototypes of the first rank. None: the loss of this process alone.
        strategy, grad_scale, check_ranks: how the ranks of ``group`` work together, as for :func:`clop_kernels.clop_loss`.
        device: where the prototypes and the learned temperature are made. None is torch's default device, or that of your own
            tensor.
        dtype: the dtype of the prototypes. None is torch's default dtype, or that of your own tensor.

    Attributes:
        prototypes: (K, D), a buffer, part of the state_dict. It is not trained.

    Raises:
        TypeError, ValueError: the message names the argument, its value and what was expected.
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
        """The loss of some views, each a tensor or all stacked in one, and the labels of their instances.

        Args:
            views: one or more (B, D) tensors of one dtype, one tensor for each view; or one view-major (V*B, D) tensor, whose
                row ``v * B + b`` is view v of instance b. The labels may also be the last positional argument.
            labels: (B,) integers on the device of the views, one label for each instance; -1 means unlabelled. None: all
                instances are unlabelled, and there is no prototype term.
            n_views: V of one stacked tensor. None: the constructor's ``n_views``. Leave it out if views are separate arguments.

        Returns:
            A tensor of shape (), or (V*B,) for ``reduction="none"``; float32, or float64 for float64 views.

        Raises:
            TypeError, ValueError: the message names the argument, its value and what was expected.
            clop_kernels.BackendUnavailableError: if ``backend`` cannot run here.
        """
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
