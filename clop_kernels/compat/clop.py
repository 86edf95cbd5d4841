"""The prototype term as its authors publish it: ``from clop_kernels.compat.clop import CLOPLoss`` (arXiv 2403.18699).

Add it to a contrastive loss. :class:`clop_kernels.CLOPLoss` contains both terms.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from ..functional import clop_loss
from ._conventions import all_processes

if distributed.is_available():
    from ..collectives import Ranks


class CLOPLoss(nn.Module):
    """``lambda_value`` times the mean distance of the labelled rows of both views to the anchors of their classes.

    Here, an anchor is a prototype, as in the authors' code.

    Several processes (the default process group) all use the anchors of the first one. Every process returns the mean of all
    processes' terms. As in the original, a process receives only the gradient of its own share, 1 / world_size of its own term;
    DistributedDataParallel then averages, which divides by world_size once more. :class:`clop_kernels.CLOPLoss` with a ``group``
    has no such factor. Unlike in the original, a process whose rows are all unlabelled takes part.

    Args:
        num_classes: K, the number of anchors; K <= D.
        embedding_dim: D, the width of the embeddings.
        lambda_value: the factor of the term, >= 0.
        distance: "cosine", "euclidean" or "manhattan".
        etf: False: orthonormal anchors, from the singular value decomposition of a random matrix; torch's seed determines them.
            True: the first K rows of I - 1/D, which have equal angles but not unit length.
        backend: "cuda", "triton", "cpu", "tiled" or "reference". None takes the fastest one that can run here.

    Attributes:
        anchors: (K, D), a parameter that does not require grad, as in the original's state_dict.

    Raises:
        ValueError: if K < 1 or K > D.
    """

    def __init__(
        self,
        num_classes: int = 100,
        embedding_dim: int = 128,
        lambda_value: float = 1.0,
        distance: str = "cosine",
        etf: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= num_classes <= embedding_dim:
            raise ValueError(f"num_classes={num_classes}: expected 1 to embedding_dim={embedding_dim}, one anchor for each class")
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        self.lambda_value = lambda_value
        self.distance = distance
        self.backend = backend
        if etf:
            anchors = (torch.eye(embedding_dim) - 1.0 / embedding_dim)[:num_classes]
        else:
            anchors = torch.linalg.svd(torch.randn(num_classes, embedding_dim), full_matrices=False).Vh
        group = all_processes()
        if group is not None:
            anchors = Ranks(group.group_name).agreed_on("anchors", anchors)
        self.anchors = nn.Parameter(anchors, requires_grad=False)

    def forward(self, z_i: Tensor, z_j: Tensor, labels: Tensor | None) -> Tensor:
        """The prototype term of two views.

        Args:
            z_i: (B, D), the first view, float64, float32, float16 or bfloat16. It is normalised here.
            z_j: (B, D), the second view.
            labels: (B,) integers, -1 for unlabelled. None: all unlabelled.

        Returns:
            A tensor of shape (); float32, or float64 for float64 views. If no row is labelled, it is 0, and backward works.

        Raises:
            TypeError, ValueError: the message names the argument, its value and what was expected.
        """
        if z_i.shape != z_j.shape:
            raise ValueError(f"z_j has shape {tuple(z_j.shape)}: expected that of z_i, {tuple(z_i.shape)}")
        term = clop_loss(
            torch.cat([z_i, z_j]),
            None if labels is None else labels.repeat(2),
            self.anchors,
            n_views=1,  # no row has a positive, so the loss is the prototype term alone
            prototype_weight=self.lambda_value,
            distance=self.distance,
            backend=self.backend,
        )
        group = all_processes()
        if group is None:
            return term
        mine = term / group.size()
        total = mine.detach().clone()
        distributed.all_reduce(total, group=group)
        return mine + (total - mine.detach())
