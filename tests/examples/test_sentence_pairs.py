"""examples/sentence_pairs.py: its loss is sentence-transformers' own, its texts are split cleanly, and it learns to retrieve."""

from __future__ import annotations

import socket
import warnings
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

if find_spec("sentence_transformers") is None:
    pytest.skip("sentence-transformers is not installed", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other libraries warn when they are imported
    import sentence_pairs
    from sentence_transformers.sentence_transformer import losses as library


def no_network(*_: object) -> None:
    raise AssertionError("a recipe reaches out")


@pytest.fixture(autouse=True)
def _nothing_reaches_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", no_network)


def gradients_of(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


SENTENCES = ["Return the sum of its parts.", "Close the file.", "Open a file by name.", "Split a string at spaces."]
NAMES = ["math.fsum", "io.IOBase.close", "io.open", "str.split"]
NEGATIVES = ["math.prod", "socket.close", "os.close", "str.join"]


@pytest.mark.parametrize("sub_batch", [None, 3])
@pytest.mark.parametrize("columns", [[SENTENCES, NAMES], [SENTENCES, NAMES, NEGATIVES]], ids=["pairs", "triplets"])
def test_in_batch_negatives_are_the_library_s_of_both_directions(columns: list[list[str]], sub_batch: int | None) -> None:
    model = sentence_pairs.make_model()
    features = [model.preprocess(texts) for texts in columns]
    original = library.MultipleNegativesRankingLoss(
        model, scale=20.0, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    expected = original([dict(x) for x in features], torch.empty(0))
    expected_gradients = gradients_of(expected, model)
    loss = sentence_pairs.InBatchNegatives(model, 20.0, sub_batch)(features)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected_gradients, rtol=1e-5, atol=1e-5)


def test_in_batch_negatives_are_the_symmetric_loss_that_it_replaces() -> None:
    model = sentence_pairs.make_model()
    features = [model.preprocess(texts) for texts in (SENTENCES, NAMES)]
    with pytest.warns(DeprecationWarning, match="MultipleNegativesSymmetricRankingLoss is deprecated"):
        original = library.MultipleNegativesSymmetricRankingLoss(model)
    expected = original([dict(x) for x in features], torch.empty(0))
    torch.testing.assert_close(sentence_pairs.InBatchNegatives(model)(features), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [[SENTENCES, NAMES], [SENTENCES, NAMES, NEGATIVES]], ids=["pairs", "triplets"])
def test_rows_of_one_label_are_positives_of_each_other(columns: list[list[str]]) -> None:
    model = sentence_pairs.make_model()
    labels = torch.tensor([0, 1, 0, 2])
    anchors, others = (
        model.encode(texts, convert_to_tensor=True) for texts in (columns[0], [text for column in columns[1:] for text in column])
    )
    logits = 20 * nn.functional.normalize(anchors) @ nn.functional.normalize(others).T
    belongs = (labels[:, None] == torch.cat([labels, torch.full((len(others) - 4,), -1)])).float()
    by_row = logits.logsumexp(1) - (belongs * logits).sum(1) / belongs.sum(1)
    by_column = (logits.logsumexp(0) - (belongs * logits).sum(0) / belongs.sum(0))[:4]
    expected = torch.cat([by_row, by_column]).mean()
    loss = sentence_pairs.InBatchNegatives(model)([model.preprocess(texts) for texts in columns], labels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_one_column_is_an_error() -> None:
    model = sentence_pairs.make_model()
    with pytest.raises(ValueError, match="sentence_features has 1 columns: expected anchors, positives"):
        sentence_pairs.InBatchNegatives(model)([model.preprocess(SENTENCES)])


def test_no_text_of_a_test_pair_is_in_training() -> None:
    training, test = sentence_pairs.load_pairs(every=8, seed=0)
    assert len(test.names) > 100
    for half in (training, test):
        assert len(set(half.names)) == len(half.names)
        assert len(set(zip(half.sentences, half.labels, strict=True))) == len(set(half.sentences)) == len(set(half.labels))
    assert len(set(training.sentences)) < len(training.sentences)  # there are false negatives to mend
    assert not set(training.sentences) & set(test.sentences)
    assert not set(training.names) & set(test.names)


def test_sentence_pairs_learns_to_retrieve() -> None:
    before, after = sentence_pairs.main(["--short"])
    assert after["recall@1"] > before["recall@1"] + 0.02
    assert after["recall@10"] > before["recall@10"] + 0.04
    assert after["MRR"] > before["MRR"] + 0.04


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "0"], "argument --scale: '0': expected a positive finite number"),
        (["--sub-batch", "x"], "argument --sub-batch: 'x': expected an integer of at least 1"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sentence_pairs.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_more_pairs_a_step_than_there_are() -> None:
    with pytest.raises(SystemExit, match=r"--batch-size 100000: expected at most 1[0-9]{3}, the training pairs"):
        sentence_pairs.main(["--short", "--batch-size", "100000"])
