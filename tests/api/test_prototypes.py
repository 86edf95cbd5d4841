"""Prototypes: exact geometry, reproducible draws, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from clop_kernels import orthonormal_prototypes, simplex_prototypes


@pytest.mark.parametrize(("k", "d"), [(1, 1), (3, 3), (10, 128), (100, 129)])
def test_orthonormal(k: int, d: int) -> None:
    c = orthonormal_prototypes(k, d, dtype=torch.float64)
    assert c.shape == (k, d)
    torch.testing.assert_close(c @ c.T, torch.eye(k, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("k", "d"), [(2, 1), (4, 3), (10, 128), (100, 99)])
def test_simplex(k: int, d: int) -> None:
    c = simplex_prototypes(k, d, dtype=torch.float64)
    expected = torch.full((k, k), -1 / (k - 1), dtype=torch.float64).fill_diagonal_(1.0)
    assert c.shape == (k, d)
    torch.testing.assert_close(c @ c.T, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("draw", [orthonormal_prototypes, simplex_prototypes])
def test_draws_follow_the_generator(draw: Callable[..., torch.Tensor]) -> None:
    def make(seed: int) -> torch.Tensor:
        return draw(4, 8, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(make(3), make(3))
    assert not torch.allclose(make(3), make(4))
    assert make(3).dtype == torch.float32
    assert draw(4, 8, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_orthonormal_draw_is_uniform() -> None:
    """QR alone has a sign convention that biases the first column; a uniform draw has mean zero in each entry."""
    generator = torch.Generator().manual_seed(0)
    first = torch.stack([orthonormal_prototypes(1, 2, generator=generator)[0] for _ in range(2000)])
    assert first.mean(0).abs().max() < 0.1


@pytest.mark.parametrize(
    ("draw", "k", "d", "message"),
    [
        (orthonormal_prototypes, 5, 4, r"num_classes=5 .*embedding_dim=4.*<= embedding_dim"),
        (orthonormal_prototypes, 0, 4, "num_classes=0: expected at least 1"),
        (simplex_prototypes, 6, 4, r"num_classes=6 .*embedding_dim=4.*embedding_dim \+ 1 = 5"),
        (simplex_prototypes, 1, 4, "num_classes=1: a simplex needs at least 2"),
    ],
)
def test_bad_sizes(draw: Callable[..., torch.Tensor], k: int, d: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(k, d)


def test_bad_types() -> None:
    with pytest.raises(TypeError, match=r"num_classes=2.5 .*expected an int"):
        orthonormal_prototypes(2.5, 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype=torch.int64: expected a floating dtype"):
        simplex_prototypes(2, 4, dtype=torch.int64)
