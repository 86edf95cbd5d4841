"""The losses as functions: they check what they are given (:mod:`clop_kernels.validation`), and call the operator.

Nothing here reads a tensor's values. What only the values show (a label without a prototype, a temperature tensor that is not
positive) is checked in :func:`clop_kernels.ops.check_values`, which raises on a CPU and never synchronises on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import backends, ops, reference, validation
from .backends.contract import DISTANCES, POSITIVES, REDUCTIONS, LossOptions, Sharding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def clop_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    prototypes: Tensor | None = None,
    *,
    n_views: int = 2,
    positives: str = "instance",
    temperature: float | Tensor = 0.1,
    prototype_weight: float | Tensor = 1.0,
    distance: str = "cosine",
    reduction: str = "mean",
    normalize: bool = True,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    strategy: str = "auto",
    grad_scale: str = "ddp",
    check_ranks: bool = True,
) -> Tensor:
    r"""Contrastive loss plus a pull of each labelled row to the prototype of its class (CLOP, arXiv 2403.18699).

    With :math:`\hat z_i = z_i / \max(|z_i|, 10^{-12})`, :math:`s_{ij} = \hat z_i \cdot \hat z_j / \tau`, P(i) the other rows of
    row i's positive group, :math:`n_i = |P(i)|`, A the rows with :math:`n_i > 0` and S the rows whose label is not -1:

    .. math::
        L = \frac{1}{|A|} \sum_{i \in A} \Big( \log \sum_{j \ne i} e^{s_{ij}} - \frac{1}{n_i} \sum_{p \in P(i)} s_{ip} \Big)
            + \lambda \frac{1}{|S|} \sum_{i \in S} d(\hat z_i, c_{y_i})

    An empty A or S contributes zero. Time is O(N^2 D) and memory O(N D) for N = V * B, on every backend but "reference".

    Args:
        embeddings: (V*B, D), float64, float32, float16 or bfloat16, D >= 1; need not be contiguous. Rows are view-major: row
            ``v * B + b`` is view v of instance b, as ``torch.cat([view_0, view_1])`` lays them out. Interleaved rows
            (a0 a1 b0 b1) give another loss, which nothing can detect.
        labels: (B,) integers, one an instance, on the device of ``embeddings``; -1 means unlabelled. None: all unlabelled.
        prototypes: (K, D), any floating dtype, used as they are; see :func:`clop_kernels.orthonormal_prototypes`. None: no
            prototype term.
        n_views: V >= 1.
        positives: "instance" (NT-Xent): the other views of the same instance. "label" (SupCon, logs averaged outside the sum):
            all rows of the same label; an unlabelled instance has its own other views only.
        temperature: tau > 0, a number, or a 0-dim floating tensor on the device of ``embeddings``, which may require grad.
        prototype_weight: lambda >= 0, a number, or a 0-dim floating tensor as of ``temperature``, which must not require grad.
        distance: d, "cosine" (1 - zhat . c), "euclidean" (|zhat - c|_2) or "manhattan" (|zhat - c|_1).
        reduction: "mean", L above; "none", (V*B,): each row's contrastive term (0 outside A) + lambda * its prototype term
            (0 outside S); "sum", the sum of those.
        normalize: False takes z itself for zhat. For rows that have unit length already that is the same loss, whose gradient
            keeps its part along the row.
        backend: None takes the fastest that can run; or "cuda", "triton", "cpu", "tiled", "reference". See
            ``python -m clop_kernels info``.
        group: where the rows are spread over processes, their process group: the loss is that of all rows of all ranks, exactly,
            and the same number on every rank. Ranks may have different numbers of rows, or none; an instance has all of its
            views on one rank. None: of this process alone. See :mod:`clop_kernels.distributed`.
        strategy: how rows of other ranks come here. "gather": all at once, O(N D) memory, and backward only the numbers of their
            softmax; "ring": a rank at a time while those before are worked on, O(N_local D) memory, and rows again in the
            backward pass; "auto": gather while that takes no more than a sixteenth of the device's memory.
        grad_scale: what gradients are of. "ddp": of the sum of what all ranks return, each its loss: world size times that of the
            loss, which averaging over ranks, as DistributedDataParallel and FSDP average the gradients of parameters, makes that
            of one process with all rows. "none": of the loss itself, for gradients that are summed over ranks. The gradients of
            ``temperature`` and ``prototypes`` are this rank's share, likewise. With ``reduction="none"`` a rank returns the terms
            of its own rows, and gradients are of the sum of what all ranks make of theirs, either way. All ranks are to
            backpropagate, a scalar with the same upstream gradient.
        check_ranks: tell each other sizes and options first, so that what does not fit together is an error on every rank and not
            a hang. That is one small exchange, which on a GPU waits for queued work, unless the group has a CPU backend too, as
            of ``init_process_group("cpu:gloo,cuda:nccl")``. False: all ranks have as many rows and, for ``strategy="auto"``,
            devices with as much memory, and nothing is checked. A number that is a tensor on a GPU, as under torch.compile all
            are, is not compared: no host reads it.

    Returns:
        () or, for ``reduction="none"``, (V*B,); float32, or float64 for float64 embeddings. Gradients are exact for
        ``embeddings``, ``temperature`` and ``prototypes``. A second derivative takes ``backend="reference"``; elsewhere it raises
        NotImplementedError.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected. Values on a GPU are checked by a
            device-side assertion, without a synchronisation.
        clop_kernels.BackendUnavailableError: if ``backend`` cannot run here, with the reason.

    Example:
        >>> loss = clop_loss(torch.cat([encoder(view_1), encoder(view_2)]), labels, prototypes)
    """
    sharding = validation.sharding(group, strategy, grad_scale, check_ranks)
    with validation.failures_announced(sharding):
        validation.check_strategies(strategy, grad_scale)
        validation.check_embeddings(embeddings, n_views)
        if labels is not None:
            labels = validation.checked_labels("labels", labels, embeddings.shape[0] // n_views, embeddings.device)
        validation.check_choice("positives", positives, POSITIVES)
        validation.check_choice("distance", distance, DISTANCES)
        if positives == "label" and labels is None:
            raise ValueError(
                'labels=None with positives="label": expected (B,) integers, -1 for unlabelled, to find positives by'
            )
        if prototypes is not None:
            validation.check_prototypes(prototypes, embeddings)
        prototype_weight = validation.checked_prototype_weight(prototype_weight, embeddings.device)
    options = LossOptions(
        temperature=temperature,
        prototype_weight=prototype_weight,
        n_views=n_views,
        positives=positives,
        distance=distance,
        reduction=reduction,
        compute_dtype=ops.compute_dtype(embeddings),
        normalize=normalize,
    )
    return _loss(embeddings, labels, prototypes, options, backend, sharding)


def ntxent_loss(
    embeddings: Tensor,
    *,
    n_views: int = 2,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    strategy: str = "auto",
    grad_scale: str = "ddp",
    check_ranks: bool = True,
) -> Tensor:
    """NT-Xent (SimCLR, arXiv 2002.05709): :func:`clop_loss` without labels and prototypes. (V*B, D), view-major rows."""
    return clop_loss(
        embeddings,
        n_views=n_views,
        temperature=temperature,
        reduction=reduction,
        normalize=normalize,
        backend=backend,
        group=group,
        strategy=strategy,
        grad_scale=grad_scale,
        check_ranks=check_ranks,
    )


def supcon_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    n_views: int = 1,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    strategy: str = "auto",
    grad_scale: str = "ddp",
    check_ranks: bool = True,
) -> Tensor:
    """SupCon (arXiv 2004.11362, eq. 2): :func:`clop_loss` with ``positives="label"`` and no prototypes. (V*B, D) and (B,).

    Against the authors' code: no factor temperature / base_temperature, and rows without positives are not in the mean.
    """
    return clop_loss(
        embeddings,
        labels,
        n_views=n_views,
        positives="label",
        temperature=temperature,
        reduction=reduction,
        normalize=normalize,
        backend=backend,
        group=group,
        strategy=strategy,
        grad_scale=grad_scale,
        check_ranks=check_ranks,
    )


def clip_loss(
    left: Tensor,
    right: Tensor,
    left_labels: Tensor | None = None,
    right_labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    strategy: str = "auto",
    grad_scale: str = "ddp",
    check_ranks: bool = True,
) -> Tensor:
    r"""Two-sided contrastive loss (CLIP, arXiv 2103.00020): left rows against right ones, and the other way, in one pass.

    With :math:`\hat x_i`, :math:`\hat y_j` the rows of length 1, :math:`s_{ij} = \hat x_i \cdot \hat y_j / \tau`, P(i) the rows
    of the other side that row i belongs to, A the rows of both sides that have such, and
    :math:`\ell(x_i) = \log \sum_j e^{s_{ij}} - \frac{1}{|P(i)|} \sum_{p \in P(i)} s_{ip}`, which for :math:`y_j` sums over i:

    .. math:: L = \frac{1}{|A|} \Big( \sum_{x_i \in A} \ell(x_i) + \sum_{y_j \in A} \ell(y_j) \Big)

    Without labels that is the mean of the cross entropies of both directions. Time is O(M N D) and memory O((M + N) D), on every
    backend but "reference".

    Args:
        left: (M, D), float64, float32, float16 or bfloat16, D >= 1: images, say; need not be contiguous.
        right: (N, D), of the dtype and device of ``left``: texts, say.
        left_labels: (M,) integers; a row belongs to the rows of the other side that have the same label, -1 to none. None for
            both sides: M = N, and row i of one belongs to row i of the other.
        right_labels: (N,) integers.
        temperature: tau > 0, a number, or a 0-dim floating tensor on the device of ``left``, which may require grad; the inverse
            of CLIP's logit scale.
        reduction: "mean", L above; "none", (M + N,): the left rows' terms, then the right ones', 0 outside A; "sum", their sum.
        normalize: False takes the rows as they are.
        backend, group, strategy, grad_scale, check_ranks: as for :func:`clop_loss`. A row meets the other side of all ranks, and
            without labels as many rows are on both sides of each.

    Returns:
        () or, for ``reduction="none"``, (M + N,); float32, or float64 for float64 rows. Gradients are exact for ``left``,
        ``right`` and ``temperature``.

    Raises:
        As :func:`clop_loss`.
    """
    sharding = validation.sharding(group, strategy, grad_scale, check_ranks)
    with validation.failures_announced(sharding):
        validation.check_strategies(strategy, grad_scale)
        validation.check_sides("left", left, "right", right)
        if (left_labels is None) != (right_labels is None):
            missing = "left_labels" if left_labels is None else "right_labels"
            raise ValueError(f"{missing}=None: expected labels of both sides or of neither")
        if left_labels is None and left.shape[0] != right.shape[0]:
            raise ValueError(
                f"left has {left.shape[0]} rows and right {right.shape[0]}: expected as many, row by row, or labels of both sides"
            )
        labels = None
        if left_labels is not None:
            of_left = validation.checked_labels("left_labels", left_labels, left.shape[0], left.device)
            labels = torch.cat([of_left, validation.checked_labels("right_labels", right_labels, right.shape[0], left.device)])
    options = LossOptions(
        temperature=temperature,
        n_views=2 if labels is None else 1,
        positives="instance" if labels is None else "label",
        reduction=reduction,
        compute_dtype=ops.compute_dtype(left),
        normalize=normalize,
        n_left=left.shape[0],
    )
    return _loss(torch.cat([left, right]), labels, None, options, backend, sharding)


def negative_logsumexp(
    embeddings: Tensor,
    labels: Tensor,
    others: Tensor | None = None,
    other_labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    r"""Of each row :math:`\log \sum_{j : y_j \ne y_i} e^{s_{ij}}`, over rows of other labels: for losses whose denominators leave
    positives out.

    Args:
        embeddings: (N, D), as for :func:`clop_loss`.
        labels: (N,) integers; a row with label -1 is a negative of every other row.
        others: (M, D), the rows j to compare with; None: ``embeddings`` themselves.
        other_labels: (M,) integers, if ``others`` are given.
        temperature, normalize, backend: as for :func:`clop_loss`.

    Returns:
        (N,), 0 for a row without negatives; float32, or float64 for float64 embeddings. Exact gradients, O((N + M) D) memory.

    Raises:
        As :func:`clop_loss`.
    """
    validation.check_rows("embeddings", embeddings)
    n_rows = embeddings.shape[0]
    labels = validation.checked_labels("labels", labels, n_rows, embeddings.device)
    if others is not None:
        validation.check_sides("embeddings", embeddings, "others", others)
        other_labels = validation.checked_labels("other_labels", other_labels, others.shape[0], embeddings.device)
        embeddings, labels = torch.cat([embeddings, others]), torch.cat([labels, other_labels])
    options = LossOptions(
        temperature=temperature,
        positives="label",
        reduction="none",
        compute_dtype=ops.compute_dtype(embeddings),
        normalize=normalize,
        n_left=None if others is None else n_rows,
        negatives_only=True,
    )
    return _loss(embeddings, labels, None, options, backend, None)[:n_rows]


def _loss(
    embeddings: Tensor,
    labels: Tensor | None,
    prototypes: Tensor | None,
    options: LossOptions,
    backend: str | None,
    sharding: Sharding | None,
) -> Tensor:
    """Checks what all losses have in common, and calls the operator, or the reference."""
    with validation.failures_announced(sharding):
        validation.check_choice("reduction", options.reduction, REDUCTIONS)
        if backend is not None:
            validation.check_choice("backend", backend, backends.NAMES)
        if sharding is not None:
            validation.check_spread(backend)
        if not isinstance(options.normalize, bool):
            raise TypeError(f"normalize={options.normalize!r} of type {type(options.normalize).__name__}: expected a bool")
        temperature = validation.checked_temperature(options.temperature, embeddings.device)
        if temperature is not options.temperature:  # an int, say
            options = options._replace(temperature=temperature)
        if backend != backends.REFERENCE:
            validation.check_weight_is_not_learned(options.prototype_weight)
    if backend != backends.REFERENCE:
        return ops.loss(ops.Call(embeddings, labels, prototypes, options, backend, sharding))
    if not torch.compiler.is_compiling():
        ops.check_values(labels, prototypes, options)
    definition = options._asdict()
    del definition["compute_dtype"]  # its products are plain PyTorch's
    return reference.clop_loss(embeddings, labels, prototypes, **definition)
