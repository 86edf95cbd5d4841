"""Train a sentence-transformers model with in-batch negatives, and measure retrieval before and after.

:class:`InBatchNegatives` replaces ``MultipleNegativesRankingLoss(model, directions=("query_to_doc", "doc_to_query"),
partition_mode="per_direction")``, the mean of both directions, which used to be ``MultipleNegativesSymmetricRankingLoss``. It has
the same values and gradients, with or without hard negatives, but builds no B x B matrix. It can do two things more:

- A column "label" in the training set marks pairs with the same text. They become positives of each other, not false negatives.
- ``sub_batch`` encodes that many texts at a time with ``clop_kernels.gradcache``, like the ``mini_batch_size`` of
  ``CachedMultipleNegativesRankingLoss``. Batches can then be larger than their activations would allow.

The texts come from Python's standard library: the first lines of docstrings, and the names that they describe. The model averages
embeddings of hashed words and trigrams, and starts from random weights. Nothing is downloaded, and no files remain::

    python examples/sentence_pairs.py
    python examples/sentence_pairs.py --sub-batch 64    # with gradient caching
    python examples/sentence_pairs.py --short           # fewer texts, for CI
    python examples/sentence_pairs.py --help

Needs ``pip install '.[recipes]'``. Everything runs on the CPU and takes about a minute on one core.
"""

from __future__ import annotations

import script  # noqa: F401

# isort: split
import argparse
import ast
import math
import re
import sysconfig
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision_loads  # noqa: F401
from arguments import COUNT, SEED, number
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from clop_kernels import clip_loss, gradcache

# isort: split
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.modules import InputModule, Pooling
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

BUCKETS, WIDTH = 2**15, 128
LEARNING_RATE = 3e-3
TEST_SHARE = 0.2
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


# ---- the loss -------------------------------------------------------------------------------------------------------


class InBatchNegatives(nn.Module):
    """Both directions of in-batch negatives over cosines, for ``SentenceTransformerTrainer(loss=...)``.

    Columns are anchors, positives and any number of hard negatives. An optional label belongs to a row's anchor and positive;
    rows with the same label are positives of each other.

    Args:
        model: The model whose "sentence_embedding" is compared.
        scale: Factor of the cosines, the inverse of a temperature.
        sub_batch: How many texts the model encodes at a time. None means all. Needs features with one row per text.
    """

    def __init__(self, model: nn.Module, scale: float = 20.0, sub_batch: int | None = None) -> None:
        super().__init__()
        self.model = model  # the trainer replaces it by its wrapped model
        self.scale = scale
        self.sub_batch = sub_batch

    def embed(self, **features: Any) -> Tensor:
        embeddings: Tensor = self.model(features)["sentence_embedding"]
        return embeddings

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        columns = list(sentence_features)
        if len(columns) < 2:
            raise ValueError(f"sentence_features has {len(columns)} columns: expected anchors, positives and any hard negatives")
        if self.sub_batch is None:
            anchors, *others = (self.embed(**features) for features in columns)
        else:
            anchors, *others = gradcache.encode(self.embed, *columns, sub_batch=self.sub_batch, module=self.model)
        if labels is None and len(others) == 1:
            return clip_loss(anchors, others[0], temperature=1 / self.scale)
        if labels is None:
            labels = torch.arange(len(anchors), device=anchors.device)
        of_others = labels.new_full((len(others), len(labels)), -1)  # a hard negative belongs to no anchor
        of_others[0] = labels
        return clip_loss(anchors, torch.cat(others), labels, of_others.flatten(), temperature=1 / self.scale)

    def get_config_dict(self) -> dict[str, Any]:
        """For the trainer's model card."""
        return {"scale": self.scale, "sub_batch": self.sub_batch}


# ---- texts ----------------------------------------------------------------------------------------------------------


@dataclass
class Pairs:
    """Full names, the sentences that describe them, and a number for each different sentence."""

    sentences: list[str]
    names: list[str]
    labels: list[int]


def described(tree: ast.AST, prefix: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The first line of each docstring, and the full name of its function or class."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            path = (*prefix, node.name)
            lines = (ast.get_docstring(node) or "").strip().splitlines()
            if lines and len(re.findall("[a-z]+", lines[0].lower())) >= 3:
                yield lines[0], ".".join(path)
            yield from described(node, path)


def load_pairs(every: int, seed: int) -> tuple[Pairs, Pairs]:
    """(training, test) pairs from each ``every``-th module of the standard library. Modules are read, never imported.

    Each name occurs once. All names with the same sentence are in the same part, so training sees no text of the test pairs.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules = [path for path in sorted(root.rglob("*.py")) if not SKIPPED & set(path.relative_to(root).parts)]
    by_name: dict[str, str] = {}
    for path in modules[::every]:
        tree = ast.parse(path.read_bytes(), path)
        for sentence, name in described(tree, path.relative_to(root).with_suffix("").parts):
            by_name.setdefault(name, sentence)
    number_of = {sentence: label for label, sentence in enumerate(dict.fromkeys(by_name.values()))}
    order = torch.randperm(len(number_of), generator=torch.Generator().manual_seed(seed)).tolist()
    n_test = math.ceil(TEST_SHARE * len(order))
    halves = (Pairs([], [], []), Pairs([], [], []))
    for name, sentence in by_name.items():
        label = order[number_of[sentence]]
        half = halves[label < n_test]
        half.sentences.append(sentence)
        half.names.append(name)
        half.labels.append(label)
    return halves


# ---- the model ------------------------------------------------------------------------------------------------------


class HashedNgrams(InputModule):
    """Embeds a text's words and their trigrams. The hash of each selects one of ``BUCKETS`` embeddings."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.embedding = nn.Embedding(BUCKETS, WIDTH)

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, Tensor | Any]:
        rows = [torch.tensor(self.places((prompt or "") + text)) for text in inputs]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        return {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long()}

    @staticmethod
    def places(text: str) -> list[int]:
        words = re.findall("[a-z]+|[0-9]+", re.sub("([a-z])([A-Z])", r"\1 \2", text).lower())
        grams = [f" {word} "[i : i + 3] for word in words for i in range(len(word))]
        return [zlib.crc32(part.encode()) % BUCKETS for part in (*words, *grams)] or [0]

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        return features | {"token_embeddings": self.embedding(features["input_ids"])}

    def get_embedding_dimension(self) -> int:
        return WIDTH

    def save(self, output_path: str, *_: Any, safe_serialization: bool = True, **__: Any) -> None:
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)


def make_model() -> SentenceTransformer:
    return SentenceTransformer(modules=[HashedNgrams(), Pooling(WIDTH, "mean")], device="cpu")


# ---- training and retrieval -----------------------------------------------------------------------------------------


class Bar(TrainerCallback):
    """Shows a trainer's steps in a progress bar."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("train", total=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.update(self.task, completed=state.global_step, total=state.max_steps)


def train(
    model: SentenceTransformer, loss: nn.Module, pairs: Pairs, epochs: int, batch_size: int, seed: int, progress: Progress
) -> None:
    data = Dataset.from_dict({"anchor": pairs.sentences, "positive": pairs.names, "label": pairs.labels})
    with tempfile.TemporaryDirectory() as folder:
        settings = SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=LEARNING_RATE,
            dataloader_drop_last=True,  # a smaller last batch would have few negatives
            seed=seed,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
        )
        trainer = SentenceTransformerTrainer(model, settings, train_dataset=data, loss=loss, callbacks=[Bar(progress)])
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def retrieval(model: SentenceTransformer, pairs: Pairs) -> dict[str, float]:
    """Each different sentence is a query for the names that it describes, among all names of ``pairs``."""
    relevant: dict[str, set[str]] = {}
    for name, label in zip(pairs.names, pairs.labels, strict=True):
        relevant.setdefault(str(label), set()).add(name)
    queries: dict[str, Any] = {str(label): sentence for label, sentence in zip(pairs.labels, pairs.sentences, strict=True)}
    corpus: dict[str, Any] = dict(zip(pairs.names, pairs.names, strict=True))
    evaluator = InformationRetrievalEvaluator(
        queries,
        corpus,
        relevant,
        mrr_at_k=[len(corpus)],
        ndcg_at_k=[10],
        accuracy_at_k=[1],
        precision_recall_at_k=[1, 10],
        map_at_k=[10],
        batch_size=256,
        write_csv=False,
    )
    figures = evaluator(model)
    return {
        "recall@1": figures["cosine_recall@1"],
        "recall@10": figures["cosine_recall@10"],
        "MRR": figures[f"cosine_mrr@{len(corpus)}"],
    }


def report(before: dict[str, float], after: dict[str, float], train_pairs: Pairs, test_pairs: Pairs) -> Table:
    n_test, n_names = len(set(test_pairs.labels)), len(test_pairs.names)
    table = Table(title="Finding the name that a sentence describes", caption_justify="left")
    table.caption = (
        f"{n_test} sentences are queries for their names among {n_names}. Training used {len(train_pairs.names)} other pairs. "
        f"Chance would give a recall@1 of {1 / n_names:.2%}; random weights do better, because related texts share letters."
    )
    for name in ("", "random weights", "trained"):
        table.add_column(name, justify="right" if name else "left")
    for name in before:
        form = ".3f" if name == "MRR" else ".1%"
        table.add_row(name, format(before[name], form), format(after[name], form))
    return table


# ---- command line ---------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    batch_size = number(int, lambda n: n >= 2, "an integer of at least 2")
    scale = number(float, lambda s: 0 < s < math.inf, "a positive finite number")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--epochs", type=COUNT, help="passes over the training pairs (default: 20; 8 with --short)")
    add("--batch-size", type=batch_size, default=256, help="pairs per step, negatives of each other (default: %(default)s)")
    add("--sub-batch", type=COUNT, help="encode this many texts at a time, with gradient caching (default: all)")
    add("--scale", type=scale, default=20.0, help="factor of the cosines, the inverse of a temperature (default: %(default)s)")
    add("--seed", type=SEED, default=0, help="seed of weights, test pairs and batches (default: %(default)s)")
    add("--short", action="store_true", help="use one in four modules of the standard library, for CI")
    options = parser.parse_args(arguments)
    options.epochs = options.epochs or (8 if options.short else 20)
    return options


def main(arguments: list[str] | None = None) -> tuple[dict[str, float], dict[str, float]]:
    options = parse_arguments(arguments)
    torch.set_num_threads(1)  # tensors are small: a second thread gains little, and waits if other programs use the cores
    torch.manual_seed(options.seed)
    train_pairs, test_pairs = load_pairs(4 if options.short else 1, options.seed)
    if options.batch_size > len(train_pairs.names):
        raise SystemExit(f"--batch-size {options.batch_size}: expected at most {len(train_pairs.names)}, the training pairs")
    model = make_model()
    before = retrieval(model, test_pairs)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        loss = InBatchNegatives(model, options.scale, options.sub_batch)
        train(model, loss, train_pairs, options.epochs, options.batch_size, options.seed, progress)
    after = retrieval(model, test_pairs)
    console.print(report(before, after, train_pairs, test_pairs))
    return before, after


if __name__ == "__main__":
    main()
