"""The classes of other libraries against those libraries themselves, or where one is not installed against its formula."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clop_kernels
from benchmarks import providers
from clop_kernels import compat

from ..support.oracle import DROP_INS, relative_error

pml = pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, losses, reducers  # noqa: E402

TOLERANCE = 1e-5
Loss = Callable[..., Any]


def assert_same(ours: Loss, theirs: Loss, *rows: Tensor, floor: float = 1e-3) -> None:
    """Values and gradients of all ``rows``: in float64 to 1e-8, in float32 to 1e-5 of the original in float64.

    ``floor``: a gradient that is nothing but rounding is compared with this number instead of its own norm.
    """
    exact = values_and_gradients(theirs, *rows)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, TOLERANCE)):
        for actual, expected in zip(values_and_gradients(ours, *(x.to(dtype) for x in rows)), exact, strict=True):
            assert relative_error(actual, expected, floor) <= tolerance


def values_and_gradients(loss: Loss, *rows: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in rows]
    value = loss(*leaves)
    assert value.dim() == 0
    assert value.requires_grad
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))]


def rows(*shape: int, seed: int = 0) -> Tensor:
    """Float32 numbers in float64, so that both precisions have the same problem."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def labels_of(kind: str, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return {
        "pairs": torch.arange(n) // 2,
        "classes": torch.randint(0, 4, (n,), generator=generator),
        "with -1": torch.randint(-1, 3, (n,), generator=generator),
        "singletons": torch.where(torch.arange(n) < n // 2, torch.arange(n), n + torch.arange(n) % 3),
        "far apart": torch.randint(0, 3, (n,), generator=generator) * 10**12 - 10**12,
        "one class": torch.full((n,), -7),
        "all different": torch.arange(n) - 5,
    }[kind]


LABELS = ["pairs", "classes", "with -1", "singletons", "far apart", "one class", "all different"]
TEMPERATURES = [0.02, 0.07, 0.5]


# ---- pytorch-metric-learning -------------------------------------------------------------------------------------------

METRIC_LOSSES = [
    (compat.pytorch_metric_learning.SupConLoss, losses.SupConLoss),
    (compat.pytorch_metric_learning.NTXentLoss, losses.NTXentLoss),
]
by_metric_loss = pytest.mark.parametrize(("ours", "theirs"), METRIC_LOSSES, ids=["SupConLoss", "NTXentLoss"])


@by_metric_loss
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("n", [2, 3, 40])
def test_metric_learning(ours: Any, theirs: Any, kind: str, temperature: float, n: int) -> None:
    labels = labels_of(kind, n)
    ours, theirs = ours(temperature), theirs(temperature)
    assert_same(lambda z: ours(z, labels), lambda z: theirs(z, labels), rows(n, 9))


@by_metric_loss
def test_metric_learning_defaults(ours: Any, theirs: Any) -> None:
    labels = labels_of("classes", 30)
    assert_same(lambda z: ours()(z, labels), lambda z: theirs()(z, labels), rows(30, 9))
    assert ours().temperature == theirs().temperature


@by_metric_loss
@pytest.mark.parametrize("reducer", [reducers.MeanReducer, reducers.SumReducer, reducers.AvgNonZeroReducer,
                                     lambda: reducers.ThresholdReducer(low=1.0, high=3.0),
                                     reducers.PerAnchorReducer])  # fmt: skip
def test_metric_learning_reducers(ours: Any, theirs: Any, reducer: Any) -> None:
    if reducer is reducers.SumReducer and not hasattr(reducers, "SumReducer"):
        pytest.skip("no SumReducer in this version")
    labels = labels_of("singletons", 30)
    ours, theirs = ours(reducer=reducer()), theirs(reducer=reducer())
    assert_same(lambda z: ours(z, labels), lambda z: theirs(z, labels), rows(30, 9))


@by_metric_loss
@pytest.mark.parametrize("make", [distances.CosineSimilarity, distances.DotProductSimilarity,
                                  lambda: distances.DotProductSimilarity(normalize_embeddings=False)])  # fmt: skip
def test_metric_learning_distances(ours: Any, theirs: Any, make: Any) -> None:
    labels = labels_of("classes", 30)
    ours, theirs = ours(0.5, distance=make()), theirs(0.5, distance=make())
    assert_same(lambda z: ours(z, labels), lambda z: theirs(z, labels), rows(30, 9))


@by_metric_loss
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("sizes", [(20, 33), (1, 2), (2, 1), (1, 1), (5, 1)], ids=str)
def test_metric_learning_references(ours: Any, theirs: Any, kind: str, sizes: tuple[int, int]) -> None:
    labels, of_others = labels_of(kind, sizes[0]), labels_of(kind, sizes[1])
    ours, theirs = ours(0.1), theirs(0.1)
    assert_same(
        lambda z, other: ours(z, labels, ref_emb=other, ref_labels=of_others),
        lambda z, other: theirs(z, labels, ref_emb=other, ref_labels=of_others),
        rows(sizes[0], 9),
        rows(sizes[1], 9, seed=1),
    )


def test_metric_learning_pairs_are_those_of_the_library() -> None:
    from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices

    seen: list[tuple[Tensor, Tensor]] = []
    ours = compat.pytorch_metric_learning.NTXentLoss(reducer=lambda losses, *_: seen.append(losses["loss"]["indices"]))
    for kind in LABELS:
        labels, others = labels_of(kind, 17), labels_of(kind, 9)
        seen.clear()
        ours(rows(17, 3), labels)
        ours(rows(17, 3), labels, ref_emb=rows(9, 3), ref_labels=others)
        for pairs, arguments in zip(seen, ((labels,), (labels, others)), strict=True):
            expected = set(zip(*(x.tolist() for x in get_all_pairs_indices(*arguments)[:2]), strict=True))
            assert len(pairs[0]) == len(expected)
            assert set(zip(*(x.tolist() for x in pairs), strict=True)) == expected


@pytest.mark.parametrize("kind", LABELS)
def test_metric_learning_takes_its_positives_some_rows_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, others = labels_of(kind, 40), labels_of(kind, 33)
    ours = compat.pytorch_metric_learning.NTXentLoss()
    calls: list[Loss] = [lambda z: ours(z, labels), lambda z: ours(z, labels, ref_emb=rows(33, 9), ref_labels=others)]
    for call in calls:
        expected = values_and_gradients(call, rows(40, 9))
        with monkeypatch.context() as patch:
            patch.setattr(compat.pytorch_metric_learning, "ROWS_AT_A_TIME", 7)
            for actual, value in zip(values_and_gradients(call, rows(40, 9)), expected, strict=True):
                torch.testing.assert_close(actual, value)


@by_metric_loss
def test_metric_learning_says_what_it_cannot_do(ours: Any, theirs: Any) -> None:
    z, labels = rows(6, 3), torch.arange(6)
    with pytest.raises(NotImplementedError, match=r"indices_tuple=.*Leave the miner out"):
        ours()(z, labels, (labels, labels, labels))
    with pytest.raises(NotImplementedError, match=r"ref_labels=.*Pass labels.clone\(\)"):
        ours()(z, labels, ref_emb=z, ref_labels=labels)
    with pytest.raises(NotImplementedError, match=r"distance=LpDistance.*Take CosineSimilarity"):
        ours(distance=distances.LpDistance())
    with pytest.raises(NotImplementedError, match=r"distance=.*Take CosineSimilarity"):
        ours(distance=distances.CosineSimilarity(power=2))
    with pytest.raises(NotImplementedError, match=r"embedding_regularizer=.*Add its value"):
        ours(embedding_regularizer=nn.Identity())
    with pytest.raises(NotImplementedError, match=r"collect_stats=True.*Leave it out"):
        ours(collect_stats=True)
    with pytest.raises(ValueError, match="labels=None"):
        ours()(z)
    with pytest.raises(ValueError, match="ref_labels=None"):
        ours()(z, labels, ref_emb=z)
    with pytest.raises(TypeError, match="memory"):
        ours(memory=3)


# ---- lightly -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lightly_loss() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies
        try:
            return providers.lightly_loss()
        except ImportError as error:
            pytest.skip(f"lightly cannot be imported: {error}")


@pytest.mark.parametrize("temperature", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("n", [1, 2, 33])
def test_lightly(lightly_loss: Any, temperature: float, n: int) -> None:
    ours, theirs = compat.lightly.NTXentLoss(temperature), lightly_loss(temperature)
    assert_same(ours, theirs, rows(n, 9), rows(n, 9, seed=1))


def test_lightly_defaults(lightly_loss: Any) -> None:
    assert_same(compat.lightly.NTXentLoss(), lightly_loss(), rows(20, 9), rows(20, 9, seed=1))
    compat.lightly.NTXentLoss(0.1, 0, True)(rows(4, 3), rows(4, 3))  # gathers from one process: itself
    for bank in (4096, [4096, 128]):
        with pytest.raises(NotImplementedError, match=r"memory_bank_size=.*Take a larger batch"):
            compat.lightly.NTXentLoss(memory_bank_size=bank)
    with pytest.raises(ValueError, match=r"out1 has shape \(3, 3\): expected that of out0, \(4, 3\)"):
        compat.lightly.NTXentLoss()(rows(4, 3), rows(3, 3))


# ---- SupContrast -------------------------------------------------------------------------------------------------------


def supcontrast(labels: Tensor | None, temperature: float, mode: str, base: float, features: Tensor) -> Tensor:
    """The formula of the authors' code, with its conventions."""
    n, n_views = features.shape[:2]
    mask = torch.eye(n, dtype=features.dtype) if labels is None else (labels[:, None] == labels).to(features.dtype)
    contrast = torch.cat(features.flatten(2).unbind(1))
    anchors = contrast if mode == "all" else contrast[:n]
    logits = anchors @ contrast.T / temperature
    is_other = 1 - torch.eye(len(contrast), dtype=features.dtype)[: len(anchors)]
    mask = mask.repeat(n_views, n_views)[: len(anchors)] * is_other
    log_prob = logits - logits.masked_fill(is_other == 0, -torch.inf).logsumexp(1, keepdim=True)
    count = mask.sum(1)
    return -(temperature / base) * ((mask * log_prob).sum(1) / torch.where(count == 0, 1.0, count)).mean()


@pytest.mark.parametrize("kind", [None, *LABELS])
@pytest.mark.parametrize(("n_views", "mode", "unit"), [*itertools.product((1, 2, 3), ("all", "one"), (True, False))])
def test_supcontrast(kind: str | None, n_views: int, mode: str, unit: bool) -> None:
    labels = None if kind is None else labels_of(kind, 21)
    features = rows(21, n_views, 8)
    if unit:
        features = F.normalize(features, dim=2).float().double()
    for options in ((0.07, mode, 0.07), (0.2, mode, 0.07), (1.0, mode, 0.5)):
        ours = compat.supcontrast.SupConLoss(*options)
        assert_same(partial(ours, labels=labels), partial(supcontrast, labels, *options), features)


def test_supcontrast_defaults_and_shapes() -> None:
    features, labels = F.normalize(rows(12, 2, 8), dim=2), labels_of("classes", 12)
    ours = compat.supcontrast.SupConLoss()
    assert (ours.temperature, ours.contrast_mode, ours.base_temperature) == (0.07, "all", 0.07)
    expected = supcontrast(labels, 0.07, "all", 0.07, features)
    for given in (labels, labels[:, None], labels.int()):
        torch.testing.assert_close(ours(features, given), expected)
    torch.testing.assert_close(ours(features.view(12, 2, 2, 2, 2), labels=labels), expected)
    assert ours(features[:0], labels[:0]) == 0


def test_supcontrast_says_what_it_cannot_do() -> None:
    ours, features, labels = compat.supcontrast.SupConLoss(), rows(4, 2, 8), torch.arange(4)
    with pytest.raises(NotImplementedError, match=r"mask=.*Pass labels"):
        ours(features, mask=torch.eye(4))
    with pytest.raises(ValueError, match="labels and mask are both given"):
        ours(features, labels, torch.eye(4))
    with pytest.raises(ValueError, match=r"features has shape \(4, 8\): expected at least 3 dimensions"):
        ours(features[:, 0], labels)
    with pytest.raises(ValueError, match="contrast_mode='two': expected one of 'all', 'one'"):
        compat.supcontrast.SupConLoss(contrast_mode="two")
    with pytest.raises(ValueError, match="base_temperature=0: expected a positive number"):
        compat.supcontrast.SupConLoss(base_temperature=0)
    with pytest.raises(ValueError, match=r"labels has shape \(3,\): expected \(4,\)"):
        ours(features, labels[:3])
    with pytest.raises(TypeError, match=r"labels has dtype torch.float32"):
        ours(features, labels.float())


# ---- open_clip ---------------------------------------------------------------------------------------------------------


def open_clip(image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float = 0.0) -> Tensor:
    logits, target = scale * image @ text.T + bias, torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@pytest.mark.parametrize("n", [1, 2, 35])
@pytest.mark.parametrize("scale", [1.0, 14.285714149475098, 100.0])
def test_open_clip(n: int, scale: float) -> None:
    ours = compat.open_clip.ClipLoss()
    image, text = (F.normalize(rows(n, 9, seed=seed), dim=1).float().double() for seed in (0, 1))
    assert_same(ours, open_clip, image, text, torch.tensor(scale, dtype=torch.float64))
    assert_same(ours, open_clip, image, text, torch.tensor([scale], dtype=torch.float64))  # as nonscalar_logit_scale has it
    assert_same(lambda x, y: ours(x, y, scale), lambda x, y: open_clip(x, y, scale), image, text)
    assert_same(lambda x, y: ours(x, y, 0.3), lambda x, y: open_clip(x, y, 0.3), 3 * image, 2 * text)  # not of length 1
    assert_same(ours, open_clip, image, text, torch.tensor(scale, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64))
    torch.testing.assert_close(ours(image, text, scale, output_dict=True)["contrastive_loss"], ours(image, text, scale))


def test_open_clip_says_what_it_cannot_do() -> None:
    compat.open_clip.ClipLoss(True, True, True, 0, 1, False)
    with pytest.raises(NotImplementedError, match=r"gather_with_grad=False.*gives the whole gradient"):
        compat.open_clip.ClipLoss(local_loss=True, world_size=2)
    with pytest.raises(NotImplementedError, match=r"use_horovod=True.*torch.distributed"):
        compat.open_clip.ClipLoss(use_horovod=True)
    ours, z = compat.open_clip.ClipLoss(), rows(4, 3)
    with pytest.raises(ValueError, match="world_size=2: expected that of the default process group, 1"):
        compat.open_clip.ClipLoss(world_size=2)(z, z, 1.0)
    with pytest.raises(ValueError, match=r"logit_scale=0.0: expected a positive finite number"):
        ours(z, z, 0.0)
    for bad in (-1.0, 0.0, torch.inf, torch.nan):
        with pytest.raises(ValueError, match=rf"logit_scale={bad}: expected a positive finite number"):
            ours(z, z, torch.tensor(bad))
    with pytest.raises(ValueError, match=r"logit_scale has shape \(2,\): expected one element"):
        ours(z, z, torch.ones(2))
    with pytest.raises(ValueError, match="left has 4 rows and right 3: expected equal numbers of rows"):
        ours(z, z[:3], 1.0)


# ---- the published CLOP module -----------------------------------------------------------------------------------------


def published_clop(labels: Tensor, anchors: Tensor, distance: str, weight: float, z_i: Tensor, z_j: Tensor) -> Tensor:
    is_labelled = labels != -1
    if not is_labelled.any():
        return 0.0 * (z_i.sum() + z_j.sum())
    target = anchors[labels[is_labelled]]
    views = torch.stack([F.normalize(z, dim=1)[is_labelled] for z in (z_i, z_j)])
    if distance == "cosine":
        return weight * (1 - (views * target).sum(2)).mean()
    return weight * (views - target).norm(p=2 if distance == "euclidean" else 1, dim=2).mean()


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "manhattan"])
@pytest.mark.parametrize("etf", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_published_clop(distance: str, etf: bool, weight: float) -> None:
    ours = compat.clop.CLOPLoss(5, 12, weight, distance, etf)
    anchors = ours.anchors.double()
    for labels in (torch.tensor([0, 4, -1, 2, 2, 1, -1]), torch.full((7,), -1), torch.arange(7) % 5):
        assert_same(
            partial(ours, labels=labels),
            partial(published_clop, labels, anchors, distance, weight),
            rows(7, 12),
            rows(7, 12, seed=1),
        )
    assert ours(rows(7, 12), rows(7, 12), None) == 0


def test_published_clop_anchors() -> None:
    ours = compat.clop.CLOPLoss()
    assert (ours.num_classes, ours.embedding_dim, ours.lambda_value, ours.distance) == (100, 128, 1.0, "cosine")
    torch.testing.assert_close(ours.anchors @ ours.anchors.T, torch.eye(100), rtol=0, atol=1e-5)
    assert [*ours.state_dict()] == ["anchors"]
    assert not ours.anchors.requires_grad
    torch.manual_seed(3)
    matrix = torch.randn(4, 6)
    torch.manual_seed(3)
    torch.testing.assert_close(compat.clop.CLOPLoss(4, 6).anchors.data, torch.svd(matrix).V[:, :4].T)
    etf = compat.clop.CLOPLoss(3, 6, etf=True).anchors
    torch.testing.assert_close(etf.data, (torch.eye(6) - torch.ones(6, 6) / 6)[:3])
    with pytest.raises(ValueError, match="num_classes=7: expected 1 to embedding_dim=6"):
        compat.clop.CLOPLoss(7, 6)
    with pytest.raises(ValueError, match=r"z_j has shape \(2, 6\): expected that of z_i, \(3, 6\)"):
        compat.clop.CLOPLoss(3, 6)(rows(3, 6), rows(2, 6), torch.arange(3))
    with pytest.raises(ValueError, match="labels contains 5: expected values below 3"):
        compat.clop.CLOPLoss(3, 6)(rows(1, 6), rows(1, 6), torch.tensor([5]))


# ---- all ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DROP_INS)
def test_every_class_raises_as_the_core_does(name: str) -> None:
    make, arguments = DROP_INS[name]
    for bad, error, message in (
        (rows(9, 8).long(), TypeError, "has dtype torch.int64: expected one of torch.float64"),
        (rows(9, 8)[:, :0], ValueError, r"has shape \(\d+, 0\): expected a width D of at least 1|prototypes has shape"),
    ):
        with pytest.raises(error, match=message):
            make()(*arguments(bad))
    with pytest.raises(ValueError, match="backend='fast': expected one of"):
        make(backend="fast")(*arguments(rows(9, 8)))
    if name not in ("open_clip", "clop"):
        with pytest.raises(ValueError, match="temperature=0: expected a positive finite number"):
            make(temperature=0)(*arguments(rows(9, 8)))


@pytest.mark.parametrize("name", DROP_INS)
def test_every_class_takes_a_backend_and_shows_a_nan(name: str, backend: str) -> None:
    make, arguments = DROP_INS[name]
    z = F.normalize(rows(9, 8), dim=1)
    expected = make(backend="reference")
    actual = make(backend=backend)
    actual.load_state_dict(expected.state_dict())
    torch.testing.assert_close(actual(*arguments(z)), expected(*arguments(z)))
    z[4, 2] = torch.nan
    assert actual(*arguments(z)).isnan()


@pytest.mark.parametrize(
    "name", [name for name in DROP_INS if name != "metric_learning.NTXentLoss"]
)  # its pairs depend on values
def test_every_class_compiles_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    make, arguments = DROP_INS[name]
    criterion, z = make(), F.normalize(torch.randn(9, 8), dim=1).requires_grad_()
    compiled = torch.compile(lambda z: criterion(*arguments(z)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(z), z), torch.autograd.grad(criterion(*arguments(z)), z))


def test_near_duplicates_are_as_good_as_simclr() -> None:
    """pytorch-metric-learning's NT-Xent of pairs is SimCLR's, down to losses of 1e-20."""
    base = rows(20, 16)
    z, labels = torch.cat([base, base * (1 + 1e-9)]), torch.arange(20).repeat(2)
    loss = compat.pytorch_metric_learning.NTXentLoss(0.01)(z, labels)
    expected = clop_kernels.ntxent_loss(z, temperature=0.01)
    assert 0 < expected < 1e-8
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)
