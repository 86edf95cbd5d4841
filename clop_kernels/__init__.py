"""Fused contrastive losses for PyTorch: NT-Xent, SupCon and CLOP in O(N D) memory."""

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
