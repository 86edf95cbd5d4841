"""open_clip's loss of image and text features: ``from clop_kernels.compat.open_clip import ClipLoss``. Written against 3.3."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..functional import clip_loss
from ._conventions import unsupported


class ClipLoss(nn.Module):
    """The mean of the cross entropies of image to text and text to image, from one pass over the logits.

    Convention: the features are not normalised here; ``logit_scale`` is the inverse of a temperature.

    Args:
        local_loss, gather_with_grad, rank: of no effect in one process, as in the original.
        cache_labels: of no effect: there are no labels to cache.
        world_size: 1 only.
        use_horovod: False only.
        backend: as for :func:`clop_kernels.clop_loss`.

    Raises:
        NotImplementedError: for features of several processes.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, only in (("world_size", world_size, 1), ("use_horovod", use_horovod, False)):
            if value != only:
                raise unsupported(
                    name,
                    value,
                    "features are not gathered from other processes",
                    "Gather them, with torch.distributed.nn.all_gather, and pass them to a ClipLoss of world_size=1",
                )
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """(B, D) features of both sides -> the loss, (), or {"contrastive_loss": the loss}.

        Args:
            image_features, text_features: (B, D), row i of one belongs to row i of the other.
            logit_scale: > 0, a number or a tensor of one element, which may require grad.
            logit_bias: adds the same number to all logits, which changes neither a softmax nor any gradient.
            output_dict: return a dictionary.
        """
        if isinstance(logit_scale, Tensor):
            if logit_scale.numel() != 1:
                raise ValueError(f"logit_scale has shape {tuple(logit_scale.shape)}: expected one element")
            logit_scale = logit_scale.reshape(())
        # What is on a GPU is not read; there the kernels look at the temperature that is made of it.
        is_read = not isinstance(logit_scale, Tensor) or (logit_scale.device.type == "cpu" and not torch.compiler.is_compiling())
        if is_read and not 0 < logit_scale < math.inf:
            raise ValueError(f"logit_scale={float(logit_scale)}: expected a positive finite number")
        loss = clip_loss(image_features, text_features, temperature=1.0 / logit_scale, normalize=False, backend=self.backend)
        if isinstance(logit_bias, Tensor):
            loss = loss + 0.0 * logit_bias.sum()  # part of the graph, with a gradient of zero
        return {"contrastive_loss": loss} if output_dict else loss
