"""Diagnostics on configurations whose figures are known, and the learning-rate model on both sides of its threshold."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import clop_kernels
from clop_kernels import collapse_report, critical_learning_rate, diagnostics, reference


def simplex(n_points: int, width: int) -> torch.Tensor:
    return clop_kernels.simplex_prototypes(n_points, width, dtype=torch.float64)


def rotation(width: int) -> torch.Tensor:
    return clop_kernels.orthonormal_prototypes(width, width, dtype=torch.float64)


def test_spectrum_and_effective_rank() -> None:
    rank, spectrum = diagnostics.effective_rank, diagnostics.singular_value_spectrum
    assert rank(torch.eye(7)) == pytest.approx(7)
    assert rank(torch.eye(7), center=True) == pytest.approx(6)  # a simplex
    assert rank(torch.eye(3).repeat(10, 1) * 5) == pytest.approx(3)
    assert rank(torch.cat([torch.eye(2, 4), -torch.eye(2, 4)]), center=True) == pytest.approx(2)
    torch.testing.assert_close(spectrum(torch.eye(2, 5)), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(spectrum(torch.eye(2, 5)[[0, 0, 0, 0, 1]]), torch.tensor([2 / 3, 1 / 3, 0, 0, 0]))
    antipodal = torch.tensor([[3.0, 4.0], [-0.3, -0.4]])
    assert rank(antipodal) == rank(antipodal, center=True) == pytest.approx(1)


@pytest.mark.parametrize("n_rows", [2, 9, 1000, 20_000])
@pytest.mark.parametrize("width", [1, 4, 100])
def test_equal_rows_leave_no_rank_but_rounding(n_rows: int, width: int) -> None:
    z = torch.randn(width) * torch.rand(n_rows, 1)
    assert diagnostics.effective_rank(z) == pytest.approx(1, abs=1e-3)
    assert diagnostics.effective_rank(z, center=True) == 0
    assert not diagnostics.singular_value_spectrum(z, center=True).any()
    assert diagnostics.effective_rank(z * 0) == 0


def test_mean_resultant_length_and_pairwise_cosine() -> None:
    length, cosine = diagnostics.mean_resultant_length, diagnostics.mean_pairwise_cosine
    row = torch.randn(1, 5)
    assert length(row.repeat(4, 1)) == pytest.approx(1)
    assert cosine(row.repeat(4, 1)) == pytest.approx(1)
    assert length(torch.cat([row, -3 * row])) == pytest.approx(0, abs=1e-7)
    assert cosine(torch.cat([row, -3 * row])) == pytest.approx(-1)
    assert length(torch.eye(4)) == pytest.approx(0.5)
    assert cosine(torch.eye(4)) == pytest.approx(0, abs=1e-7)
    assert cosine(simplex(6, 8)) == pytest.approx(-1 / 5)
    assert math.isnan(cosine(row))


def test_alignment() -> None:
    z = torch.randn(6, 5)
    assert diagnostics.alignment(torch.cat([z, 2 * z])) == pytest.approx(0, abs=1e-12)
    assert diagnostics.alignment(torch.cat([z, -z])) == pytest.approx(4)
    assert diagnostics.alignment(torch.cat([z, -z]), alpha=1) == pytest.approx(2)
    assert diagnostics.alignment(torch.eye(6), n_views=3) == pytest.approx(2)
    assert diagnostics.alignment(torch.cat([z, z, -z]), n_views=3) == pytest.approx((0 + 4 + 4) / 3)


def test_uniformity() -> None:
    row = torch.randn(1, 5)
    assert diagnostics.uniformity(row.repeat(7, 1)) == pytest.approx(0, abs=1e-6)
    assert diagnostics.uniformity(torch.cat([row, -row])) == pytest.approx(-8)
    assert diagnostics.uniformity(torch.eye(6), t=3) == pytest.approx(-6)
    assert diagnostics.uniformity(simplex(5, 4)) == pytest.approx(-2 * 2 * (1 + 1 / 4))
    assert math.isnan(diagnostics.uniformity(row))


def test_uniformity_is_wang_and_isolas() -> None:
    for z in (torch.randn(50, 7), torch.randn(50, 7) * 0.01 + 1, torch.randn(50, 7).double()):
        zhat = F.normalize(z.double(), dim=1)
        for t in (0.5, 2.0, 10.0):
            expected = float(torch.pdist(zhat).square().mul(-t).exp().mean().log())
            assert diagnostics.uniformity(z, t=t) == pytest.approx(expected, abs=1e-12 if z.dtype == torch.float64 else 4e-6)
    on_the_sphere = torch.randn(4000, 40)
    assert diagnostics.uniformity(on_the_sphere) == pytest.approx(-4 + 8 / 40, abs=0.01)


def test_class_alignment() -> None:
    z, labels = torch.eye(3, 5)[[0, 0, 1, 1, 1, 2]], torch.tensor([4, 4, 0, 0, 0, -1])
    assert diagnostics.class_alignment(z, labels) == pytest.approx((1, 0), abs=1e-7)
    assert diagnostics.class_alignment(simplex(4, 6).repeat(3, 1), torch.arange(4).repeat(3)) == pytest.approx((1, -1 / 3))
    both = diagnostics.class_alignment(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, 1]]), torch.tensor([0, 0, 1, 1]))
    assert both == pytest.approx((0, 0), abs=1e-7)
    one_class, singletons = diagnostics.class_alignment(z, labels * 0), diagnostics.class_alignment(z, torch.arange(6))
    assert one_class.within == pytest.approx(diagnostics.mean_pairwise_cosine(z))
    assert math.isnan(one_class.between)
    assert math.isnan(singletons.within)
    assert singletons.between == pytest.approx(diagnostics.mean_pairwise_cosine(z))
    assert all(map(math.isnan, diagnostics.class_alignment(z, labels * 0 - 1)))


def test_class_alignment_is_the_mean_over_pairs() -> None:
    z, labels = torch.randn(40, 6) + 0.5, torch.randint(-1, 4, (40,))
    zhat = F.normalize(z.double(), dim=1)
    cosines, known = zhat @ zhat.T, (labels[:, None] >= 0) & (labels >= 0) & ~torch.eye(40, dtype=torch.bool)
    same = labels[:, None] == labels
    expected = float(cosines[known & same].mean()), float(cosines[known & ~same].mean())
    assert diagnostics.class_alignment(z, labels) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("degrees", [1e-3, 1.0, 30.0, 89.999, 90.0])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_class_subspace_angles_of_planes(degrees: float, scale: float) -> None:
    """Two planes with the principal angles ``degrees`` and 90, and a line in the first; rows mixed within their span."""
    radians = math.radians(degrees)
    e, turn = torch.eye(6, dtype=torch.float64), rotation(6)
    planes = [e[[0, 1]], torch.stack([e[0] * math.cos(radians) + e[2] * math.sin(radians), e[3]]), e[[0]]]
    rows = torch.cat([torch.randn(20, len(plane), dtype=torch.float64) @ plane @ turn for plane in planes]).float() * scale
    labels = torch.arange(3).repeat_interleave(20) * 5
    smallest = diagnostics.class_subspace_angles(rows, labels, energy=1)
    expected = torch.tensor([[0, degrees, 0], [degrees, 0, degrees], [0, degrees, 0]])
    torch.testing.assert_close(smallest, expected, rtol=1e-5, atol=3e-5)
    mean = diagnostics.class_subspace_angles(rows, labels, rank=4, angle="mean")  # no more than the rows span
    expected[0, 1] = expected[1, 0] = (degrees + 90) / 2
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=3e-5)


def test_class_subspace_angles_leave_out() -> None:
    z = torch.cat([torch.eye(4), 0.1 * torch.eye(4)[:1] + torch.eye(4)[1:2], torch.zeros(1, 4)])
    labels = torch.tensor([7, 0, 0, -1, 7, 9])  # 7: e_0 and mostly e_1; 0: e_1, e_2; 9: nothing
    angles = diagnostics.class_subspace_angles(z, labels)
    assert angles.shape == (3, 3)
    assert torch.equal(angles, angles.T) is False  # NaN
    assert angles[:2, :2].tolist() == [[0, pytest.approx(0, abs=1e-4)], [pytest.approx(0, abs=1e-4), 0]]
    assert angles[2].isnan().all()
    assert angles[:, 2].isnan().all()
    leading = diagnostics.class_subspace_angles(z[[1, 1, 1, 2, 0, 0, 0, 2]], torch.tensor([0] * 4 + [1] * 4), energy=0.7)
    assert float(leading[0, 1]) == pytest.approx(90, abs=1e-4)  # e_1 has 3/4 of the energy of one, e_0 of the other
    assert diagnostics.class_subspace_angles(z, labels * 0 - 1).shape == (0, 0)
    assert diagnostics.class_subspace_angles(torch.zeros(2, 3), torch.tensor([0, 1]), angle="mean").isnan().all()


@pytest.mark.parametrize("angle", ["smallest", "mean"])
def test_class_subspace_angles_of_random_classes(angle: str) -> None:
    """Against the arc cosines, class by class, in float64; ranks differ, and some pairs have more than D dimensions."""
    z = torch.cat(
        [torch.randn(n, k, dtype=torch.float64) @ torch.randn(k, 12, dtype=torch.float64) for n, k in ((30, 2), (9, 5), (40, 9))]
    )
    labels = torch.tensor([0] * 30 + [1] * 9 + [2] * 40)
    angles = diagnostics.class_subspace_angles(z, labels, energy=0.999999999, angle=angle)
    bases = [torch.linalg.svd(F.normalize(z[labels == c], dim=1))[2][:k] for c, k in enumerate((2, 5, 9))]
    for a in range(3):
        for b in range(3):
            cosines = torch.linalg.svdvals(bases[a] @ bases[b].T).clamp(max=1).arccos().rad2deg()
            expected = cosines.min() if angle == "smallest" else cosines.mean()
            assert float(angles[a, b]) == pytest.approx(float(expected), abs=1e-5)


def test_prototypes() -> None:
    c = torch.eye(3, 5)
    z = torch.stack([c[0], 2 * c[1], c[0] + c[2], c[1] + 2 * c[0], torch.eye(5)[4]])
    labels = torch.tensor([0, 1, 2, 1, -1])
    assert diagnostics.prototype_alignment(z, labels, c) == pytest.approx((1 + 1 + 0.5**0.5 + 0.2**0.5) / 4)
    assert diagnostics.nearest_prototype_accuracy(z[:2], labels[:2], c) == 1
    assert diagnostics.nearest_prototype_accuracy(z[[0, 1, 3]], labels[[0, 1, 3]], c) == pytest.approx(2 / 3)


def test_prototypes_take_other_dtypes_and_no_labels() -> None:
    c, z, labels = torch.eye(3, 5), torch.eye(3, 5).double(), torch.tensor([0, 1, 1])
    assert diagnostics.prototype_alignment(z, labels, c) == pytest.approx(2 / 3)
    assert diagnostics.nearest_prototype_accuracy(z.bfloat16(), labels, c.double()) == pytest.approx(2 / 3)
    assert math.isnan(diagnostics.prototype_alignment(z, labels * 0 - 1, c))
    assert math.isnan(diagnostics.nearest_prototype_accuracy(z, labels * 0 - 1, c))


def test_report() -> None:
    z, labels, c = torch.randn(20, 6), torch.randint(-1, 3, (20,)), torch.eye(3, 6)
    report = collapse_report(z.bfloat16(), labels, c)
    numbers = json.loads(json.dumps(report.as_dict()))
    assert numbers == report.as_dict()
    assert numbers["n_rows"] == 20
    assert 1 <= numbers["effective_rank"] <= 6
    assert numbers["centered_effective_rank"] == diagnostics.effective_rank(z.bfloat16(), center=True)
    assert numbers["mean_pairwise_cosine"] == diagnostics.mean_pairwise_cosine(z.bfloat16())
    assert (numbers["within_class_cosine"], numbers["between_class_cosine"]) == diagnostics.class_alignment(z.bfloat16(), labels)
    assert "nearest-prototype accuracy" in str(report)
    assert collapse_report(z).prototype_alignment is None
    assert collapse_report(z, labels).prototype_alignment is None
    assert "between classes" in str(collapse_report(z, labels))
    assert not any(word in str(collapse_report(z)) for word in ("prototype", "classes", "None"))
    assert all(type(value) in (int, float) for value in numbers.values())


def everything(z: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """All numbers that diagnostics have for rows of four views and four classes."""
    return [
        *collapse_report(z, labels, torch.eye(4, z.shape[1], dtype=z.dtype)).as_dict().values(),
        diagnostics.alignment(z, n_views=4),
        diagnostics.uniformity(z),
        *diagnostics.singular_value_spectrum(z).tolist(),
        *diagnostics.singular_value_spectrum(z, center=True).tolist(),
        *diagnostics.class_subspace_angles(z, labels, rank=3).div(90).flatten().tolist(),
        *diagnostics.class_subspace_angles(z, labels, rank=3, angle="mean").div(90).flatten().tolist(),
    ]


def embeddings_of(kind: str, n_rows: int, width: int) -> torch.Tensor:
    z = torch.randn(n_rows, width)
    return {
        "spread out": z,
        "cone": z + 30,
        "fast decay": z * torch.exp(-torch.arange(width) / 4) @ rotation(width).float(),
        "clusters": torch.eye(4, width).repeat(n_rows // 4, 1) + 0.05 * z,
    }[kind]


@pytest.mark.parametrize("kind", ["spread out", "cone", "fast decay", "clusters"])
@pytest.mark.parametrize(("n_rows", "width"), [(40, 64), (2000, 16), (4000, 100)])
def test_float32_is_as_float64(kind: str, n_rows: int, width: int) -> None:
    z, labels = embeddings_of(kind, n_rows, width), torch.arange(4).repeat(n_rows // 4)
    expected = everything(z.double(), labels)
    assert everything(z, labels) == pytest.approx(expected, rel=1e-4, abs=4e-6)
    narrow = z.bfloat16()
    assert everything(narrow, labels) == pytest.approx(everything(narrow.float(), labels), rel=1e-6)


class _Dtypes(TorchDispatchMode):
    """The floating dtypes that operators return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        # Where a mode looks on, the numbers of a loss are 0-dim float64 tensors of the CPU.
        self.seen |= {x.dtype for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim()}
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_dtype_of_the_arithmetic(dtype: torch.dtype) -> None:
    """float64 for float64 alone, which not every device has; and autocast changes nothing."""
    z, labels = torch.randn(40, 8).to(dtype), torch.arange(4).repeat(10)
    with _Dtypes() as dtypes:
        expected = everything(z, labels)
    assert (torch.float64 in dtypes.seen) == (dtype == torch.float64)
    assert torch.bfloat16 not in dtypes.seen
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert everything(z, labels) == pytest.approx(expected, rel=1e-5)


def test_no_graph() -> None:
    z = torch.randn(8, 4, requires_grad=True)
    assert not diagnostics.singular_value_spectrum(z).requires_grad
    assert not diagnostics.class_subspace_angles(z, torch.arange(8) % 2).requires_grad
    assert isinstance(diagnostics.uniformity(z), float)


@pytest.mark.parametrize("norm", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9, 1.1, 1.5])
def test_critical_learning_rate_is_where_the_mean_stops_contracting(share: float, reduction: str, norm: float) -> None:
    """A step of the real loss on nearly uniform embeddings with merged positives, below and above the threshold."""
    tau, n_instances, width = 4.0, 400, 800
    u = F.normalize(torch.randn(n_instances, width, dtype=torch.float64) + 0.1 / width**0.5, dim=1) * norm
    z = u.repeat(2, 1).requires_grad_()
    reference.clop_loss(z, temperature=tau, reduction=reduction).backward()
    assert z.grad is not None
    mu = share * critical_learning_rate(tau, 2 * n_instances, reduction, norm)
    before, after = z.detach().mean(0), (z.detach() - mu * z.grad).mean(0)
    assert float(after.norm() / before.norm()) == pytest.approx(abs(1 - 2 * share), abs=0.05)
    assert (after.norm() < before.norm()) == (share < 1)


def test_critical_learning_rate_values() -> None:
    assert critical_learning_rate(0.1, reduction="sum") == pytest.approx(0.1)
    assert critical_learning_rate(0.1, 256) == pytest.approx(25.6)
    assert clop_kernels.critical_learning_rate(0.5, 10, "mean", 2.0) == pytest.approx(20.0)
