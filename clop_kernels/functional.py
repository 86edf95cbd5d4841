"""The losses as functions. Each one checks its arguments (:mod:`clop_kernels.validation`) and calls the operator.

These checks read no tensor's values. :func:`clop_kernels.ops.check_values` does: it finds labels without a prototype, and
temperatures or weights out of range. It raises on a CPU and never synchronises on a GPU.
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
    r"""Contrastive loss plus a pull of each labelled row towards the prototype of its class (CLOP, arXiv 2403.18699).

    Let :math:`\hat z_i = z_i / \max(|z_i|, 10^{-12})` and :math:`s_{ij} = \hat z_i \cdot \hat z_j / \tau`. P(i) holds the
    positives of row i, and :math:`n_i = |P(i)|`. A holds the anchors: the rows with :math:`n_i > 0`. S holds the labelled rows.

    .. math::
        L = \frac{1}{|A|} \sum_{i \in A} \Big( \log \sum_{j \ne i} e^{s_{ij}} - \frac{1}{n_i} \sum_{p \in P(i)} s_{ip} \Big)
            + \lambda \frac{1}{|S|} \sum_{i \in S} d(\hat z_i, c_{y_i})

    If A or S is empty, its term is zero. With N = V * B rows, every backend except "reference" takes O(N^2 D) time and O(N D)
    memory. Under autocast, the matrix products run in autocast's dtype, except for float64 embeddings. The loss stays in float32.

    Args:
        embeddings: (V*B, D), float64, float32, float16 or bfloat16, D >= 1; need not be contiguous. Rows are view-major: row
            ``v * B + b`` is view v of instance b, as ``torch.cat([view_0, view_1])`` lays them out. Interleaved rows
            (a0 a1 b0 b1) give a different loss, and no check can detect them.
        labels: (B,) integers on the device of ``embeddings``, one label for each instance; -1 means unlabelled. None: all
            instances are unlabelled.
        prototypes: (K, D), a floating dtype, on the device of ``embeddings``. They are not normalised. None: no prototype term.
            See :func:`clop_kernels.orthonormal_prototypes`.
        n_views: V >= 1, the number of views of each instance. The default 2 fits pairs of augmented views.
        positives: "instance" (NT-Xent): the positives of a row are the other views of its instance. "label" (SupCon, the
            form with the mean over positives outside the logarithm): all other rows with the same label. The positives of an
            unlabelled row are the other views of its instance.
        temperature: tau > 0, a number, or a 0-dim floating tensor on the device of ``embeddings``. A tensor may require grad.
        prototype_weight: lambda >= 0, a number, or a 0-dim floating tensor on the device of ``embeddings``. A tensor may
            require grad only with ``backend="reference"``.
        distance: d, "cosine" (1 - zhat . c), "euclidean" (|zhat - c|_2) or "manhattan" (|zhat - c|_1).
        reduction: "mean": L above. "none": (V*B,), each row's contrastive term (0 outside A) + lambda * its prototype term
            (0 outside S). "sum": the sum of these terms.
        normalize: True scales each row to unit length. False takes the rows as they are (unnormalised): zhat is z. If the rows
            have unit length already, the loss is the same, but the gradient keeps its component along the row.
        backend: "cuda", "triton", "cpu", "tiled" or "reference". None takes the fastest one that can run here. See
            ``python -m clop_kernels info``.
        group: the process group over which the rows are spread. The loss is then exactly the loss of all rows of all ranks, and
            every rank returns the same number ("none": the terms of its own rows). Ranks may have different numbers of rows, or
            no rows. All views of an instance must be on one rank. None: the loss of this process alone. See
            :mod:`clop_kernels.distributed`.
        strategy: how this rank obtains other ranks' rows. "gather": all at once, in O(N D) memory; the backward pass exchanges
            only a few numbers for each row. "ring": one rank's rows at a time, while it computes with the previous ones, in
            O(N_local D) memory; the backward pass sends the rows again. "auto": "gather" if the gathered rows take at most one
            sixteenth of the device's memory, else "ring".
        grad_scale: gradient scaling with a ``group``. "ddp" multiplies by the world size, so that averaging over ranks
            (DistributedDataParallel, FSDP) restores the gradient of one process with all rows. "none" does not multiply; sum the
            gradients over the ranks. In both cases the gradients of ``temperature`` and ``prototypes`` are this rank's part of a
            sum over the ranks, and are scaled in the same way. With ``reduction="none"``, each rank makes a scalar of its terms.
            The gradients are those of the sum of these scalars over all ranks, and ``grad_scale`` has no effect. Every rank must
            run the backward pass. For "mean" and "sum", all ranks must have the same upstream gradient.
        check_ranks: True: ranks first tell each other their sizes and options, so that a mismatch is an error on every rank
            instead of a hang. This is one small exchange. On a GPU it waits for queued work, unless the group has a CPU backend
            too, as ``init_process_group("cpu:gloo,cuda:nccl")`` gives it. ``temperature`` and ``prototype_weight`` are not
            compared if they are GPU tensors, since the host does not read those; under torch.compile on a GPU they always are.
            False: nothing is checked. All ranks must then have equal numbers of rows and, for ``strategy="auto"``, devices with
            equal memory.

    Returns:
        A tensor of shape (), or (V*B,) for ``reduction="none"``; float32, or float64 for float64 embeddings. Gradients are exact
        for ``embeddings``, ``temperature`` and ``prototypes``. Only ``backend="reference"`` has second derivatives; the others
        raise NotImplementedError.

    Raises:
        TypeError, ValueError: the message names the argument, its value and what was expected. Values on a GPU are checked by
        a device-side assertion, without a synchronisation.
        clop_kernels.BackendUnavailableError: if ``backend`` cannot run here; the message says why.

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
            raise ValueError('labels=None with positives="label": expected (B,) integers, with -1 for an unlabelled instance')
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
    """NT-Xent, the loss of SimCLR (arXiv 2002.05709): each row against all others, with its instance's other views as positives.

    This is :func:`clop_loss` without labels and prototypes.

    Args:
        embeddings: (V*B, D), float64, float32, float16 or bfloat16, D >= 1; need not be contiguous. Rows are view-major: row
            ``v * B + b`` is view v of instance b, as ``torch.cat([view_0, view_1])`` lays them out. Interleaved rows
            (a0 a1 b0 b1) give a different loss, and no check can detect them.
        n_views: V >= 1, the number of views of each instance. The default 2 fits pairs of augmented views.
        temperature: tau > 0, a number, or a 0-dim floating tensor on the device of ``embeddings``. A tensor may require grad.
        reduction: "mean": over the anchors, which are all rows if V > 1. "none": (V*B,), each row's term. "sum": their sum.
        normalize: True scales each row to unit length. False takes the rows as they are (unnormalised).
        backend: "cuda", "triton", "cpu", "tiled" or "reference". None takes the fastest one that can run here. See
            ``python -m clop_kernels info``.
        group: the process group over which the rows are spread; the loss is then that of all rows of all ranks. All views of an
            instance must be on one rank. None: the loss of this process alone.
        strategy: how this rank obtains other ranks' rows: "gather" (all at once), "ring" (one rank's rows at a time, in less
            memory), or "auto". Details are under :func:`clop_loss`.
        grad_scale: gradient scaling with a ``group``. "ddp" multiplies by the world size, so that averaging over ranks
            (DistributedDataParallel, FSDP) restores the gradient of one process with all rows. "none" does not multiply; sum the
            gradients over the ranks.
        check_ranks: True: ranks first compare their sizes and options, so that a mismatch is an error and not a hang. False:
            nothing is checked, and all ranks must have equal numbers of rows. Details are under :func:`clop_loss`.

    Returns:
        A tensor of shape (), or (V*B,) for ``reduction="none"``; float32, or float64 for float64 embeddings. Gradients are exact
        for ``embeddings`` and ``temperature``.

    Raises:
        The same errors as :func:`clop_loss`: TypeError, ValueError or BackendUnavailableError.

    Example:
        >>> loss = ntxent_loss(torch.cat([encoder(view_1), encoder(view_2)]), temperature=0.5)
    """
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
    """SupCon (arXiv 2004.11362, eq. 2): each row against all others, with the rows of its label as positives.

    This is :func:`clop_loss` with ``positives="label"`` and without prototypes. It differs from the authors' code in two ways:
    there is no factor temperature / base_temperature, and rows without positives are not in the mean.

    Args:
        embeddings: (V*B, D), float64, float32, float16 or bfloat16, D >= 1; need not be contiguous. Rows are view-major: row
            ``v * B + b`` is view v of instance b, as ``torch.cat([view_0, view_1])`` lays them out.
        labels: (B,) integers on the device of ``embeddings``, one label for each instance. -1 means unlabelled: the only
            positives of the instance are its own other views.
        n_views: V >= 1, the number of views of each instance. The default 1 means one row and one label for each instance.
        temperature: tau > 0, a number, or a 0-dim floating tensor on the device of ``embeddings``. A tensor may require grad.
        reduction: "mean": over the anchors, the rows that have a positive. "none": (V*B,), each row's term, 0 for a row without
            positives. "sum": their sum.
        normalize: True scales each row to unit length. False takes the rows as they are (unnormalised).
        backend: "cuda", "triton", "cpu", "tiled" or "reference". None takes the fastest one that can run here. See
            ``python -m clop_kernels info``.
        group: the process group over which the rows are spread; the loss is then that of all rows of all ranks. A row's
            positives may be on any rank. All views of an instance must be on one rank. None: the loss of this process alone.
        strategy: how this rank obtains other ranks' rows: "gather" (all at once), "ring" (one rank's rows at a time, in less
            memory), or "auto". Details are under :func:`clop_loss`.
        grad_scale: gradient scaling with a ``group``. "ddp" multiplies by the world size, so that averaging over ranks
            (DistributedDataParallel, FSDP) restores the gradient of one process with all rows. "none" does not multiply; sum the
            gradients over the ranks.
        check_ranks: True: ranks first compare their sizes and options, so that a mismatch is an error and not a hang. False:
            nothing is checked, and all ranks must have equal numbers of rows. Details are under :func:`clop_loss`.

    Returns:
        A tensor of shape (), or (V*B,) for ``reduction="none"``; float32, or float64 for float64 embeddings. Gradients are exact
        for ``embeddings`` and ``temperature``. A batch without any positive pair has the loss 0.

    Raises:
        The same errors as :func:`clop_loss`: TypeError, ValueError or BackendUnavailableError.

    Example:
        >>> loss = supcon_loss(encoder(images), labels)
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
    r"""Two-sided contrastive loss (CLIP, arXiv 2103.00020): left rows against right rows and the reverse, in one pass.

    :math:`\hat x_i` and :math:`\hat y_j` are the left and right rows at unit length, and
    :math:`s_{ij} = \hat x_i \cdot \hat y_j / \tau`. P(i) holds the positives of row i, all of them on the other side. A holds the
    anchors: the rows of both sides that have a positive. A left row has the term
    :math:`\ell(x_i) = \log \sum_j e^{s_{ij}} - \frac{1}{|P(i)|} \sum_{p \in P(i)} s_{ip}`; for a right row
    :math:`y_j`, the sum runs over the left rows i.

    .. math:: L = \frac{1}{|A|} \Big( \sum_{x_i \in A} \ell(x_i) + \sum_{y_j \in A} \ell(y_j) \Big)

    Without labels, L is the mean of the cross entropies of both directions. Every backend except "reference" takes O(M N D) time
    and O((M + N) D) memory.

    Args:
        left: (M, D), float64, float32, float16 or bfloat16, D >= 1; need not be contiguous. For example, image embeddings.
        right: (N, D), with the dtype and device of ``left``. For example, text embeddings.
        left_labels: (M,) integers on the device of ``left``. The positives of a row are the rows of the other side with the same
            label; a row with label -1 has no positives. If both label arguments are None, then M = N, and row i of one side is
            the positive of row i of the other.
        right_labels: (N,) integers on the device of ``left``. Give the labels of both sides, or of neither.
        temperature: tau > 0, a number, or a 0-dim floating tensor on the device of ``left``. A tensor may require grad. It is the
            inverse of CLIP's logit scale.
        reduction: "mean": L above. "none": (M + N,), the terms of the left rows, then those of the right rows, 0 outside A.
            "sum": the sum of these terms.
        normalize: True scales each row to unit length. False takes the rows as they are (unnormalised).
        backend: "cuda", "triton", "cpu", "tiled" or "reference". None takes the fastest one that can run here. See
            ``python -m clop_kernels info``.
        group: the process group over which the rows are spread. A row is then compared with the other side's rows of all ranks.
            Without labels, each rank needs equally many left and right rows. None: the loss of this process alone.
        strategy: how this rank obtains other ranks' rows: "gather" (all at once), "ring" (one rank's rows at a time, in less
            memory), or "auto". Details are under :func:`clop_loss`.
        grad_scale: gradient scaling with a ``group``. "ddp" multiplies by the world size, so that averaging over ranks
            (DistributedDataParallel, FSDP) restores the gradient of one process with all rows. "none" does not multiply; sum the
            gradients over the ranks.
        check_ranks: True: ranks first compare their sizes and options, so that a mismatch is an error and not a hang. False:
            nothing is checked, and all ranks must have equal numbers of rows. Details are under :func:`clop_loss`.

    Returns:
        A tensor of shape (), or (M + N,) for ``reduction="none"``; float32, or float64 for float64 rows. Gradients are exact for
        ``left``, ``right`` and ``temperature``.

    Raises:
        The same errors as :func:`clop_loss`: TypeError, ValueError or BackendUnavailableError.

    Example:
        >>> loss = clip_loss(image_encoder(images), text_encoder(texts), temperature=0.07)
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
                f"left has {left.shape[0]} rows and right {right.shape[0]}: expected equal numbers of rows, "
                f"or labels of both sides"
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
    r"""For each row, :math:`\log \sum_{j : y_j \ne y_i} e^{s_{ij}}` over its negatives, the rows with other labels.

    It is a building block for losses whose denominators exclude positives. :math:`s_{ij}` is the cosine of rows i and j divided
    by the temperature, as in :func:`clop_loss`.

    Args:
        embeddings: (N, D), float64, float32, float16 or bfloat16, D >= 1; need not be contiguous.
        labels: (N,) integers on the device of ``embeddings``. A row with label -1 is a negative of every other row.
        others: (M, D), the rows j to compare with; the dtype and device of ``embeddings``. None: the rows of ``embeddings``, each
            compared with the others.
        other_labels: (M,) integers; required with ``others``.
        temperature: tau > 0, a number, or a 0-dim floating tensor on the device of ``embeddings``. A tensor may require grad.
        normalize: True scales each row to unit length. False takes the rows as they are (unnormalised): s is the plain product of
            the rows over the temperature.
        backend: "cuda", "triton", "cpu", "tiled" or "reference". None takes the fastest one that can run here. See
            ``python -m clop_kernels info``.

    Returns:
        (N,), 0 for a row without negatives; float32, or float64 for float64 embeddings. Gradients are exact, and memory is
        O((N + M) D).

    Raises:
        The same errors as :func:`clop_loss`: TypeError, ValueError or BackendUnavailableError.
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
    """Checks the arguments that all losses share, then calls the operator or the reference."""
    with validation.failures_announced(sharding):
        validation.check_choice("reduction", options.reduction, REDUCTIONS)
        if backend is not None:
            validation.check_choice("backend", backend, backends.NAMES)
        if sharding is not None:
            validation.check_spread(backend)
        if not isinstance(options.normalize, bool):
            raise TypeError(f"normalize={options.normalize!r} of type {type(options.normalize).__name__}: expected a bool")
        temperature = validation.checked_temperature(options.temperature, embeddings.device)
        if temperature is not options.temperature:  # an int became a float
            options = options._replace(temperature=temperature)
        if backend != backends.REFERENCE:
            validation.check_weight_is_not_learned(options.prototype_weight)
    if backend != backends.REFERENCE:
        return ops.loss(ops.Call(embeddings, labels, prototypes, options, backend, sharding))
    if not torch.compiler.is_compiling():
        ops.check_values(labels, prototypes, options)
    definition = options._asdict()
    del definition["compute_dtype"]  # the reference multiplies in the dtype that plain PyTorch would take
    return reference.clop_loss(embeddings, labels, prototypes, **definition)
