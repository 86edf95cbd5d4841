"""Fused contrastive losses for PyTorch: NT-Xent, SupCon, CLIP and CLOP in O(N D) memory.

The losses are functions (:func:`ntxent_loss`, :func:`supcon_loss`, :func:`clip_loss`, :func:`clop_loss`) and modules
(:class:`NTXentLoss`, :class:`SupConLoss`, :class:`CLOPLoss`). :mod:`clop_kernels.gradcache` encodes batches that the encoder
cannot hold at once. :func:`collapse_report` measures embeddings. :mod:`clop_kernels.compat` has the losses of other libraries.

>>> from clop_kernels import NTXentLoss
>>> loss = NTXentLoss(temperature=0.5)(z_1, z_2)  # two views of a batch, (B, D) each
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as _error:
    if _error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "clop_kernels needs PyTorch 2.11 or newer, and torch is not installed: `pip install torch`", name="torch"
    ) from None

from . import gradcache
from .backends import BackendUnavailableError
from .backends.tiled import set_tile_rows
from .diagnostics import (
    ClassAlignment,
    CollapseReport,
    alignment,
    class_alignment,
    class_subspace_angles,
    collapse_report,
    critical_learning_rate,
    effective_rank,
    mean_pairwise_cosine,
    mean_resultant_length,
    nearest_prototype_accuracy,
    prototype_alignment,
    singular_value_spectrum,
    uniformity,
)
from .functional import clip_loss, clop_loss, negative_logsumexp, ntxent_loss, supcon_loss
from .losses import CLOPLoss, NTXentLoss, SupConLoss
from .prototypes import orthonormal_prototypes, simplex_prototypes

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "CLOPLoss",
    "ClassAlignment",
    "CollapseReport",
    "NTXentLoss",
    "SupConLoss",
    "alignment",
    "class_alignment",
    "class_subspace_angles",
    "clip_loss",
    "clop_loss",
    "collapse_report",
    "critical_learning_rate",
    "effective_rank",
    "gradcache",
    "mean_pairwise_cosine",
    "mean_resultant_length",
    "nearest_prototype_accuracy",
    "negative_logsumexp",
    "ntxent_loss",
    "orthonormal_prototypes",
    "prototype_alignment",
    "set_tile_rows",
    "simplex_prototypes",
    "singular_value_spectrum",
    "supcon_loss",
    "uniformity",
]
