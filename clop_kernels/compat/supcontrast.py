"""SupContrast's SupCon and SimCLR loss: ``from clop_kernels.compat.supcontrast import SupConLoss``.

The authors' code: HobbitLong/SupContrast, losses.py (arXiv 2004.11362).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import clop_loss
from ._conventions import unsupported, without_special_labels

CONTRAST_MODES = ("all", "one")


class SupConLoss(nn.Module):
    """Features of V views, as they are; without labels the views of an instance are its positives (SimCLR).

    Conventions: the features are not normalised here; the loss is temperature / base_temperature times the mean over *all*
    anchors, of which those without positives count as 0; -1 is a label like any other.

    Args:
        temperature: tau > 0.
        contrast_mode: "all", every view of every instance is an anchor; "one", the first view only, compared with all views.
        base_temperature: > 0.
        backend: as for :func:`clop_kernels.clop_loss`.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if contrast_mode not in CONTRAST_MODES:
            raise ValueError(f"contrast_mode={contrast_mode!r}: expected one of {', '.join(map(repr, CONTRAST_MODES))}")
        if not base_temperature > 0:
            raise ValueError(f"base_temperature={base_temperature}: expected a positive number")
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature
        self.backend = backend

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, V, ...) features, and B integer labels, of any shape, or None -> the loss, ().

        Raises:
            NotImplementedError: for a ``mask``: it is an array of B x B, which may be anything.
        """
        if features.dim() < 3:
            raise ValueError(
                f"features has shape {tuple(features.shape)}: expected at least 3 dimensions, (B, V, ...), as of "
                f"features.unsqueeze(1) for one view"
            )
        if mask is not None:
            if labels is not None:
                raise ValueError("labels and mask are both given: expected one of them, or neither")
            raise unsupported("mask", "...", "an arbitrary mask of positives needs an array of B x B", "Pass labels")
        n_instances, n_views = features.shape[:2]
        if labels is not None:
            (labels,) = without_special_labels(labels.reshape(-1) if isinstance(labels, Tensor) else labels)
        terms = clop_loss(
            torch.cat(features.flatten(2).unbind(1)),
            labels,
            n_views=n_views,
            positives="instance" if labels is None else "label",
            temperature=self.temperature,
            normalize=False,
            reduction="sum" if self.contrast_mode == "all" else "none",
            backend=self.backend,
        )
        n_anchors = n_instances * (n_views if self.contrast_mode == "all" else 1)
        total = terms if self.contrast_mode == "all" else terms[:n_instances].sum()
        return total * (self.temperature / self.base_temperature / max(n_anchors, 1))
