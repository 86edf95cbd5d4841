"""The CLIP loss of open_clip: ``from clop_kernels.compat.open_clip import ClipLoss``. Written for open_clip 3.3."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..functional import clip_loss
from ._conventions import all_processes, failures_announced, unsupported


class ClipLoss(nn.Module):
    """The mean of the cross entropies of image to text and text to image, from one pass over the logits.

    Conventions of open_clip: the features are not normalised here, and ``logit_scale`` is the inverse of a temperature.

    Args:
        local_loss: with several processes, True returns the mean over this process's own features, False over all features.
        gather_with_grad: with several processes, whether features receive the gradient of their part in other processes' losses.
            True: averaged over processes, the gradients of parameters are those of one process with all features. False, without
            ``local_loss``: 1 / world_size of that gradient, as in the original.
        cache_labels: has no effect, since there are no labels to cache.
        rank: has no effect, since the process group knows the rank.
        world_size: the number of processes. Above 1 it must be the size of the default process group.
        use_horovod: only False is supported.
        backend: "cuda", "triton", "cpu", "tiled" or "reference". None takes the fastest one that can run here.
        strategy: how a process obtains the others' features: "gather", "ring" or "auto", as for :func:`clop_kernels.clop_loss`.
        check_ranks: True: processes first compare their sizes and options, so that a mismatch is an error and not a hang.

    Raises:
        NotImplementedError: for horovod, and for ``local_loss`` without ``gather_with_grad``, whose result is not the gradient of
            any loss.
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
        strategy: str = "auto",
        check_ranks: bool = True,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise unsupported(
                "use_horovod", True, "features are gathered by torch.distributed", "Start one of its process groups"
            )
        if world_size > 1 and local_loss and not gather_with_grad:
            raise unsupported(
                "gather_with_grad",
                False,
                "with local_loss the features would miss the gradient of their part in other processes' losses",
                "gather_with_grad=True gives the whole gradient, at no further cost here",
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.world_size = world_size
        self.backend = backend
        self.strategy = strategy
        self.check_ranks = check_ranks

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of B images and their B texts.

        Args:
            image_features: (B, D), float64, float32, float16 or bfloat16, normalised by the caller.
            text_features: (B, D), with the same dtype and device; row i belongs to row i of ``image_features``.
            logit_scale: > 0, a number or a tensor of one element. A tensor may require grad.
            logit_bias: adds the same number to all logits. This changes neither the loss nor any gradient.
            output_dict: True returns a dictionary.

        Returns:
            The loss, of shape (), or {"contrastive_loss": the loss}; float32, or float64 for float64 features.

        Raises:
            TypeError, ValueError: the message names the argument, its value and what was expected.
        """
        group = all_processes() if self.world_size > 1 else None
        n_processes = 1 if group is None else group.size()
        with failures_announced(group, self.check_ranks):
            if n_processes != self.world_size:
                raise ValueError(f"world_size={self.world_size}: expected that of the default process group, {n_processes}")
            if isinstance(logit_scale, Tensor):
                if logit_scale.numel() != 1:
                    raise ValueError(f"logit_scale has shape {tuple(logit_scale.shape)}: expected one element")
                logit_scale = logit_scale.reshape(())
            # The host does not read a scale on a GPU; the kernels check the temperature that is computed from it.
            on_gpu = isinstance(logit_scale, Tensor) and logit_scale.device.type != "cpu"
            is_traced = isinstance(logit_scale, Tensor) and torch.compiler.is_compiling()
            if not (on_gpu or is_traced) and not 0 < logit_scale < math.inf:
                raise ValueError(f"logit_scale={float(logit_scale)}: expected a positive finite number")
        if n_processes > 1 and not self.gather_with_grad:
            image_features, text_features = (_with_part_of_gradient(x, 1 / n_processes) for x in (image_features, text_features))
        is_local = group is not None and self.local_loss
        loss = clip_loss(
            image_features,
            text_features,
            temperature=1.0 / logit_scale,
            reduction="none" if is_local else "mean",
            normalize=False,
            backend=self.backend,
            group=group,
            strategy=self.strategy,
            check_ranks=self.check_ranks,
        )
        if is_local:
            loss = loss.mean()
        if isinstance(logit_bias, Tensor):
            loss = loss + 0.0 * logit_bias.sum()  # part of the graph, with a gradient of zero
        return {"contrastive_loss": loss} if output_dict else loss


def _with_part_of_gradient(features: Tensor, share: float) -> Tensor:
    result = features.view_as(features)
    if result.requires_grad:
        result.register_hook(lambda grad: grad * share)
    return result
