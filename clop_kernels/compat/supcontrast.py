"""The SupCon and SimCLR loss of SupContrast: ``from clop_kernels.compat.supcontrast import SupConLoss``.

The authors' code is HobbitLong/SupContrast, losses.py (arXiv 2004.11362).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import clop_loss
from ._conventions import unsupported, without_special_labels

CONTRAST_MODES = ("all", "one")


class SupConLoss(nn.Module):
    """SupCon of V views. Without labels, the positives of a view are the other views of its instance (SimCLR).

    Conventions of the authors' code: the features are not normalised here. The loss is temperature / base_temperature times the
    mean over *all* anchors; an anchor without positives counts as 0. -1 is a label like any other.

    Args:
        temperature: tau > 0.
        contrast_mode: "all": every view of every instance is an anchor. "one": only the first view is, compared with all views.
        base_temperature: > 0; the loss is multiplied by temperature / base_temperature.
        backend: "cuda", "triton", "cpu", "tiled" or "reference". None takes the fastest one that can run here.

    Raises:
        ValueError: for another contrast_mode, or a base_temperature that is not positive.
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
        """The loss of B instances with V views each.

        Args:
            features: (B, V, ...), float64, float32, float16 or bfloat16, as they are. Dimensions after V are flattened.
            labels: B integers of any shape. None: the positives of a view are the other views of its instance.
            mask: only None is supported.

        Returns:
            A tensor of shape (); float32, or float64 for float64 features.

        Raises:
            NotImplementedError: for a ``mask``, a B x B array of arbitrary positives.
            TypeError, ValueError: the message names the argument, its value and what was expected.
        """
        if features.dim() < 3:
            raise ValueError(
                f"features has shape {tuple(features.shape)}: expected at least 3 dimensions, (B, V, ...), such as "
                f"features.unsqueeze(1) for one view"
            )
        if mask is not None:
            if labels is not None:
                raise ValueError("labels and mask are both given: expected one of them, or neither")
            raise unsupported("mask", "...", "an arbitrary mask of positives needs a B x B array", "Pass labels")
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
