"""Frozen class prototypes: orthonormal rows (CLOP), or the simplex equiangular tight frame of neural collapse."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal_prototypes(
    num_classes: int,
    embedding_dim: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draws ``num_classes`` orthonormal vectors uniformly (Haar measure), the prototypes of CLOP (arXiv 2403.18699).

    They come from the QR decomposition of a Gaussian matrix, in float64 on the CPU. The signs are fixed so that the draw is
    uniform and the same for every target device (Mezzadri, arXiv math-ph/0609050).

    Args:
        num_classes: K, the number of prototypes, 1 <= K <= embedding_dim.
        embedding_dim: D, the width of the embeddings.
        generator: a CPU generator, for a reproducible draw. None takes torch's global generator.
        device: where the result is placed. None is torch's default device.
        dtype: a floating dtype. None is torch's default dtype.

    Returns:
        (K, D), rows of unit norm, mutually orthogonal to the accuracy of ``dtype``.

    Raises:
        ValueError: if K < 1 or K > D.
        TypeError: if a size is not an int, or ``dtype`` is not floating.
    """
    _check_sizes(num_classes, embedding_dim)
    if num_classes > embedding_dim:
        raise ValueError(
            f"num_classes={num_classes} orthonormal prototypes do not fit into embedding_dim={embedding_dim} dimensions: "
            f"expected num_classes <= embedding_dim. Raise embedding_dim, or pass the prototypes of simplex_prototypes, "
            f"which takes up to embedding_dim + 1 classes"
        )
    return _random_orthonormal_columns(embedding_dim, num_classes, generator).T.contiguous().to(_device(device), _dtype(dtype))


def simplex_prototypes(
    num_classes: int,
    embedding_dim: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The vertices of a randomly rotated regular simplex: unit rows whose pairwise cosine is exactly -1/(K-1).

    This is the simplex equiangular tight frame of neural collapse (Papyan, Han, Donoho, arXiv 2008.08186): K unit vectors as far
    apart as K vectors can be. It spans K - 1 dimensions.

    Args:
        num_classes: K, the number of prototypes, 2 <= K <= embedding_dim + 1.
        embedding_dim: D, the width of the embeddings.
        generator: a CPU generator, for a reproducible rotation. None takes torch's global generator.
        device: where the result is placed. None is torch's default device.
        dtype: a floating dtype. None is torch's default dtype.

    Returns:
        (K, D), rows of unit norm that sum to zero.

    Raises:
        ValueError: if K < 2 or K > D + 1.
        TypeError: if a size is not an int, or ``dtype`` is not floating.
    """
    _check_sizes(num_classes, embedding_dim)
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: a simplex needs at least 2 vertices")
    if num_classes > embedding_dim + 1:
        raise ValueError(
            f"num_classes={num_classes} vertices of a regular simplex do not fit into embedding_dim={embedding_dim} "
            f"dimensions: expected num_classes <= embedding_dim + 1 = {embedding_dim + 1}"
        )
    # The centred standard basis of R^K is a simplex in the K - 1 dimensions orthogonal to the vector of ones. The left singular
    # vectors of the centring matrix, times the singular values, are coordinates in that space.
    centring = torch.eye(num_classes, dtype=torch.float64) - 1.0 / num_classes
    left, singular, _ = torch.linalg.svd(centring)
    vertices = left[:, :-1] * singular[:-1]
    vertices = vertices / torch.linalg.vector_norm(vertices, dim=1, keepdim=True)
    rotation = _random_orthonormal_columns(embedding_dim, num_classes - 1, generator)
    return (vertices @ rotation.T).to(_device(device), _dtype(dtype))


def _random_orthonormal_columns(n_rows: int, n_columns: int, generator: torch.Generator | None) -> Tensor:
    """(n_rows, n_columns) float64 with orthonormal columns, uniformly distributed."""
    gaussian = torch.randn(n_rows, n_columns, dtype=torch.float64, device="cpu", generator=generator)
    q, r = torch.linalg.qr(gaussian)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def _check_sizes(num_classes: int, embedding_dim: int) -> None:
    for name, value in (("num_classes", num_classes), ("embedding_dim", embedding_dim)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r} of type {type(value).__name__}: expected an int")
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")


def _device(device: torch.device | str | None) -> torch.device:
    return torch.get_default_device() if device is None else torch.device(device)


def _dtype(dtype: torch.dtype | None) -> torch.dtype:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype}: expected a floating dtype")
    return dtype
