"""The prototype term as its authors publish it: ``from clop_kernels.compat.clop import CLOPLoss`` (arXiv 2403.18699).

To be added to a contrastive loss. :class:`clop_kernels.CLOPLoss` is both in one.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from ..functional import clop_loss
from ._conventions import all_processes

if distributed.is_available():
    from ..collectives import Ranks


class CLOPLoss(nn.Module):
    """``lambda_value`` times the mean distance of both views' labelled rows to the anchors of their classes.

    With several processes all have the first one's anchors, and return the mean over processes of their terms, of which each has
    the gradient of its own: as in the original, a ``world_size``-th of its own term's. DistributedDataParallel, which averages,
    takes another such factor; with :class:`clop_kernels.CLOPLoss` and its ``group`` there is none. Other than in the original a
    process whose rows have no label takes part.

    Args:
        num_classes: K, the number of anchors; K <= D.
        embedding_dim: D, the width of the embeddings.
        lambda_value: the factor of the term, >= 0.
        distance: "cosine", "euclidean" or "manhattan".
        etf: anchors that are the first K rows of I - 1/D, of equal angles, and not of length 1; False: orthonormal ones, from the
            singular value decomposition of a random matrix, which torch's seed determines.
        backend: as for :func:`clop_kernels.clop_loss`.

    Attributes:
        anchors: (K, D), a parameter that does not require grad, as in the original's state_dict.
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
            raise ValueError(f"num_classes={num_classes}: expected 1 to embedding_dim={embedding_dim}, one anchor a class")
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
        """(B, D) and (B, D) views, not necessarily normalised, and (B,) labels, -1 = unlabelled -> the term, ().

        Zero, with a graph, where no row has a label.
        """
        if z_i.shape != z_j.shape:
            raise ValueError(f"z_j has shape {tuple(z_j.shape)}: expected that of z_i, {tuple(z_i.shape)}")
        term = clop_loss(
            torch.cat([z_i, z_j]),
            None if labels is None else labels.repeat(2),
            self.anchors,
            n_views=1,  # no row has a positive: the prototype term is all there is
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
