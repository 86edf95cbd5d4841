"""Every misuse raises an error that names the argument, its value and what was expected."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import clop_kernels
from clop_kernels import (
    BackendUnavailableError,
    CLOPLoss,
    NTXentLoss,
    SupConLoss,
    clip_loss,
    clop_loss,
    negative_logsumexp,
    supcon_loss,
)
from clop_kernels.backends import BACKENDS

Z = torch.randn(8, 4)
LABELS = torch.tensor([0, 1, 2, -1])
C = torch.eye(3, 4)

BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"embeddings": [[1.0]]}, TypeError, "embeddings is a list: expected a torch.Tensor"),
    ({"embeddings": Z[0]}, ValueError, r"embeddings has shape \(4,\): expected 2 dimensions"),
    ({"embeddings": Z.view(4, 2, 4)}, ValueError, r"embeddings has shape \(4, 2, 4\).*torch.cat\(features.unbind\(1\)\)"),
    ({"embeddings": Z.long()}, TypeError, "embeddings has dtype torch.int64: expected one of torch.float64"),
    ({"embeddings": Z.to(torch.complex64)}, TypeError, "embeddings has dtype torch.complex64"),
    ({"embeddings": Z[:, :0]}, ValueError, r"embeddings has shape \(8, 0\): expected a width D of at least 1"),
    ({"n_views": 3}, ValueError, "embeddings has 8 rows, not a multiple of n_views=3"),
    ({"n_views": 0}, ValueError, "n_views=0: expected at least 1"),
    ({"n_views": 2.0}, TypeError, "n_views=2.0 of type float: expected an int"),
    ({"n_views": True}, TypeError, "n_views=True of type bool: expected an int"),
    ({"labels": LABELS.repeat(2)}, ValueError, r"labels has shape \(8,\): expected \(4,\), one label for each instance"),
    ({"labels": LABELS[:, None]}, ValueError, r"labels has shape \(4, 1\): expected \(4,\)"),
    ({"labels": LABELS.float()}, TypeError, "labels has dtype torch.float32: expected an integer dtype"),
    ({"labels": LABELS >= 0}, TypeError, "labels has dtype torch.bool: expected an integer dtype"),
    ({"labels": [0, 1, 2, -1]}, TypeError, "labels is a list: expected a torch.Tensor"),
    ({"labels": LABELS + 1}, ValueError, "labels contains 3: expected values below 3, the number of rows of prototypes"),
    ({"labels": LABELS - 1}, ValueError, "labels contains -2: expected -1 for an unlabelled instance"),
    ({"labels": LABELS.to("meta")}, ValueError, "labels is on meta: expected the device of embeddings, cpu"),
    ({"labels": None, "positives": "label"}, ValueError, 'labels=None with positives="label"'),
    ({"prototypes": C[:, :3]}, ValueError, r"prototypes has shape \(3, 3\): expected \(K, 4\)"),
    ({"prototypes": C[:0]}, ValueError, r"prototypes has shape \(0, 4\): expected \(K, 4\), K >= 1"),
    ({"prototypes": C[0]}, ValueError, r"prototypes has shape \(4,\)"),
    ({"prototypes": C.long()}, TypeError, "prototypes has dtype torch.int64"),
    ({"prototypes": C.to("meta")}, ValueError, "prototypes is on meta: expected the device of embeddings"),
    ({"prototypes": C.numpy()}, TypeError, "prototypes is a ndarray: expected a torch.Tensor"),
    ({"temperature": 0.0}, ValueError, "temperature=0.0: expected a positive finite number"),
    ({"temperature": -1}, ValueError, "temperature=-1: expected a positive finite number"),
    ({"temperature": math.nan}, ValueError, "temperature=nan: expected a finite number"),
    ({"temperature": math.inf}, ValueError, "temperature=inf: expected a finite number"),
    ({"temperature": "0.1"}, TypeError, "temperature='0.1' of type str: expected a number"),
    ({"temperature": True}, TypeError, "temperature=True of type bool: expected a number"),
    ({"temperature": torch.tensor([0.1])}, ValueError, r"temperature has shape \(1,\): expected a 0-dim tensor"),
    ({"temperature": torch.tensor(1)}, TypeError, "temperature has dtype torch.int64: expected a floating dtype"),
    ({"temperature": torch.tensor(0.1, device="meta")}, ValueError, "temperature is on meta: expected the device"),
    ({"temperature": torch.tensor(-0.5)}, ValueError, "temperature=-0.5: expected a positive finite number"),
    ({"temperature": torch.tensor(math.nan)}, ValueError, "temperature=nan: expected a positive finite number"),
    ({"prototype_weight": -1.0}, ValueError, "prototype_weight=-1.0: expected a number of at least 0"),
    ({"prototype_weight": math.nan}, ValueError, "prototype_weight=nan: expected a finite number"),
    ({"prototype_weight": None}, TypeError, "prototype_weight=None of type NoneType: expected a number"),
    ({"positives": "class"}, ValueError, "positives='class': expected one of 'instance', 'label'"),
    ({"distance": "l2"}, ValueError, "distance='l2': expected one of 'cosine', 'euclidean', 'manhattan'"),
    ({"reduction": "avg"}, ValueError, "reduction='avg': expected one of 'mean', 'sum', 'none'"),
    ({"normalize": 1}, TypeError, "normalize=1 of type int: expected a bool"),
    ({"backend": "fast"}, ValueError, "backend='fast': expected one of 'cuda', 'triton', 'cpu', 'tiled', 'reference'"),
]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("bad", "error", "message"), BAD_ARGUMENTS)
def test_clop_loss(bad: dict[str, Any], error: type[Exception], message: str, backend: str | None) -> None:
    good = {"embeddings": Z, "labels": LABELS, "prototypes": C, "backend": backend}
    clop_loss(**good)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        clop_loss(**(good | bad))


X, Y = torch.randn(3, 4), torch.randn(5, 4)
OF_X, OF_Y = torch.tensor([0, 1, -1]), torch.tensor([0, 0, 1, 2, -1])

BAD_SIDES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"left": [[1.0]]}, TypeError, "left is a list: expected a torch.Tensor"),
    ({"right": Y[0]}, ValueError, r"right has shape \(4,\): expected 2 dimensions, \(N, D\)"),
    ({"right": Y.long()}, TypeError, "right has dtype torch.int64: expected one of torch.float64"),
    ({"right": Y[:, :3]}, ValueError, "right has width 3, .*expected those of left, 4, torch.float32 and cpu"),
    ({"right": Y.double()}, ValueError, "right has .*dtype torch.float64.*expected those of left"),
    ({"right": Y.to("meta")}, ValueError, "right has .*is on meta: expected those of left"),
    ({"left_labels": None}, ValueError, "left_labels=None: expected labels of both sides or of neither"),
    ({"right_labels": None}, ValueError, "right_labels=None: expected labels of both sides or of neither"),
    ({"left_labels": None, "right_labels": None}, ValueError, "left has 3 rows and right 5: expected equal numbers of rows"),
    ({"left_labels": OF_Y}, ValueError, r"left_labels has shape \(5,\): expected \(3,\)"),
    ({"right_labels": OF_Y.float()}, TypeError, "right_labels has dtype torch.float32: expected an integer dtype"),
    ({"right_labels": OF_Y - 1}, ValueError, "labels contains -2: expected -1"),
    ({"temperature": 0}, ValueError, "temperature=0: expected a positive"),
    ({"reduction": "avg"}, ValueError, "reduction='avg': expected one of"),
    ({"normalize": None}, TypeError, "normalize=None of type NoneType: expected a bool"),
    ({"backend": "fast"}, ValueError, "backend='fast': expected one of"),
]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("bad", "error", "message"), BAD_SIDES)
def test_clip_loss(bad: dict[str, Any], error: type[Exception], message: str, backend: str | None) -> None:
    good = {"left": X, "right": Y, "left_labels": OF_X, "right_labels": OF_Y, "backend": backend}
    clip_loss(**good)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        clip_loss(**(good | bad))


def test_negative_logsumexp() -> None:
    for bad, error, message in (
        ({"embeddings": X[0]}, ValueError, r"embeddings has shape \(4,\)"),
        ({"labels": OF_Y}, ValueError, r"labels has shape \(5,\): expected \(3,\)"),
        ({"labels": None}, TypeError, "labels is a NoneType: expected a torch.Tensor"),
        ({"temperature": -1.0}, ValueError, "temperature=-1.0: expected a positive"),
    ):
        with pytest.raises(error, match=message):
            negative_logsumexp(**({"embeddings": X, "labels": OF_X} | bad))


@pytest.mark.parametrize("name", [b.name for b in BACKENDS if b.obstacle(torch.device("cpu"), torch.float32) is not None])
def test_a_forced_backend_that_cannot_run_says_why(name: str) -> None:
    with pytest.raises(BackendUnavailableError, match=f"backend='{name}' cannot run on cpu with torch.float32: .+"):
        clop_loss(Z, backend=name)


def test_supcon_without_labels() -> None:
    with pytest.raises(ValueError, match="labels=None"):
        supcon_loss(Z, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels=None"):
        SupConLoss()(Z)


BAD_MODULES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_classes": 5}, ValueError, "num_classes=5 orthonormal prototypes do not fit into embedding_dim=4"),
    ({"num_classes": 6, "prototypes": "simplex"}, ValueError, "num_classes=6 vertices"),
    ({"prototypes": "random"}, ValueError, "prototypes='random': expected one of 'orthonormal', 'simplex'"),
    ({"prototypes": torch.eye(2, 4)}, ValueError, r"prototypes has shape \(2, 4\).*= \(3, 4\)"),
    ({"prototypes": torch.eye(3, 4).long()}, ValueError, r"dtype torch.int64: expected a floating tensor"),
    ({"temperature": 0}, ValueError, "temperature=0: expected a positive"),
    ({"temperature": torch.tensor(0.1)}, TypeError, "learnable_temperature=True makes it a parameter"),
    ({"n_views": 0}, ValueError, "n_views=0: expected an int of at least 1"),
    ({"reduction": "max"}, ValueError, "reduction='max': expected one of"),
    ({"distance": "l1"}, ValueError, "distance='l1': expected one of"),
    ({"positives": "both"}, ValueError, "positives='both': expected one of"),
    ({"backend": "gpu"}, ValueError, "backend='gpu': expected one of"),
    ({"prototype_weight": -0.1}, ValueError, "prototype_weight=-0.1: expected a number of at least 0"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_MODULES)
def test_module_constructor(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CLOPLoss(**({"num_classes": 3, "embedding_dim": 4} | bad))


def test_module_calls() -> None:
    with pytest.raises(TypeError, match="no views: expected at least one"):
        NTXentLoss()()
    with pytest.raises(ValueError, match=r"view 1 has shape \(3, 4\).*expected those of view 0, \(4, 4\)"):
        NTXentLoss()(Z[:4], Z[:3])
    with pytest.raises(ValueError, match=r"view 1 has .*dtype torch.float64: expected those of view 0"):
        NTXentLoss()(Z, Z.double())
    with pytest.raises(ValueError, match="n_views=3 with 2 views"):
        NTXentLoss()(Z, Z, n_views=3)
    with pytest.raises(TypeError, match=r"view 1 is a list: expected a torch.Tensor"):
        NTXentLoss()(Z, [1])
    with pytest.raises(TypeError, match="NTXentLoss takes no labels"):
        NTXentLoss()(Z, Z, torch.arange(8))


def test_diagnostics() -> None:
    with pytest.raises(TypeError, match=r"embeddings is a list: expected a torch.Tensor"):
        clop_kernels.effective_rank([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"embeddings has dtype torch.int64: expected one of"):
        clop_kernels.mean_resultant_length(LABELS[None])
    with pytest.raises(ValueError, match=r"embeddings has shape \(4,\): expected 2 dimensions"):
        clop_kernels.uniformity(Z[0, :4])
    with pytest.raises(ValueError, match=r"embeddings has 1 of 8 rows with NaN or infinity: expected finite values"):
        clop_kernels.collapse_report(Z.index_fill(0, torch.tensor(3), math.nan))
    with pytest.raises(TypeError, match=r"labels has dtype torch.float32: expected an integer dtype"):
        clop_kernels.class_alignment(Z, Z[:, 0])
    with pytest.raises(ValueError, match=r"labels is on meta: expected the device of embeddings, cpu"):
        clop_kernels.class_alignment(Z, torch.zeros(8, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match=rf"labels has {len(C)}: expected labels below {len(C)}, the number of prototypes"):
        clop_kernels.prototype_alignment(Z, torch.arange(8) * 0 + len(C), C)
    with pytest.raises(ValueError, match=r"prototypes has shape \(2, 1\): expected \(K, "):
        clop_kernels.nearest_prototype_accuracy(Z, torch.zeros(8, dtype=torch.int64), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"prototypes has 1 of 2 rows with NaN or infinity"):
        clop_kernels.prototype_alignment(Z, torch.zeros(8, dtype=torch.int64), C[:2] * torch.tensor([[1.0], [math.inf]]))
    with pytest.raises(ValueError, match="n_views=1: expected at least 2"):
        clop_kernels.alignment(Z, n_views=1)
    with pytest.raises(ValueError, match="not a multiple of n_views=3"):
        clop_kernels.alignment(Z, n_views=3)
    with pytest.raises(ValueError, match="alpha=0: expected a positive finite number"):
        clop_kernels.alignment(Z, alpha=0)
    with pytest.raises(TypeError, match="t='2' of type str: expected a number"):
        clop_kernels.uniformity(Z, t="2")  # type: ignore[arg-type]
    for option, error, message in (
        ({"rank": 0}, ValueError, "rank=0: expected at least 1"),
        ({"rank": 1.5}, TypeError, "rank=1.5 of type float: expected an int"),
        ({"energy": 95}, ValueError, "energy=95: expected a share of at most 1"),
        ({"angle": "max"}, ValueError, "angle='max': expected one of 'smallest', 'mean'"),
    ):
        with pytest.raises(error, match=message):
            clop_kernels.class_subspace_angles(Z, torch.arange(8), **option)
    with pytest.raises(ValueError, match=r"embeddings has shape \(0, 4\)"):
        clop_kernels.collapse_report(Z[:0])
    with pytest.raises(ValueError, match=r"labels has shape \(4,\): expected \(8,\), one label for each row"):
        clop_kernels.collapse_report(Z, LABELS, C)
    for bad in ({"temperature": 0}, {"n_rows": -1}, {"embedding_norm": math.nan}):
        with pytest.raises(ValueError, match="expected a positive finite number"):
            clop_kernels.critical_learning_rate(**({"temperature": 0.1} | bad))
    with pytest.raises(ValueError, match="reduction='none': expected one of 'mean', 'sum'"):
        clop_kernels.critical_learning_rate(0.1, reduction="none")
