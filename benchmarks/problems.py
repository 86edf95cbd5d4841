"""What is computed: the losses to compare, and the cases of a sweep over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from clop_kernels import reference

Mode = Literal["forward", "backward", "forward+backward"]
MODES: tuple[Mode, ...] = get_args(Mode)

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

N_VIEWS = 2
"""Views per instance in NT-Xent. Every N here is a multiple of it."""

N_CLASSES = 100

LossFunction = Callable[..., Tensor]
"""(*inputs of the problem, temperature) -> the loss, of shape ()."""


@dataclass(frozen=True)
class Problem:
    """A loss over N x N similarities.

    Attributes:
        name: Its name on the command line and in results.
        summary: One line for a person.
        make_inputs: (N, D, generator) -> float32 embeddings, which get gradients, and integer labels, all on the CPU.
        plain: The formula in plain PyTorch, with N x N matrices.
    """

    name: str
    summary: str
    make_inputs: Callable[[int, int, torch.Generator], tuple[Tensor, ...]]
    plain: LossFunction


@dataclass(frozen=True)
class Case:
    """One point of a sweep. All providers compute it, on the same inputs."""

    N: int
    D: int = 128
    problem: str = "ntxent"
    dtype: str = "float32"
    mode: Mode = "forward+backward"
    temperature: float = 0.1

    def __str__(self) -> str:
        return f"{self.problem}, {self.mode}, N={self.N}, D={self.D}, {self.dtype}, temperature {self.temperature:g}"

    def make_inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """Random inputs from a fixed seed, drawn on the CPU, so that every device gets the same."""
        inputs = PROBLEMS[self.problem].make_inputs(self.N, self.D, torch.Generator().manual_seed(0))
        dtype = DTYPES[self.dtype]
        return tuple(x.to(device, dtype).requires_grad_() if x.is_floating_point() else x.to(device) for x in inputs)


def _views(n_rows: int, width: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(n_rows, width, generator=generator),)


def _labelled(n_rows: int, width: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return torch.randn(n_rows, width, generator=generator), torch.randint(0, N_CLASSES, (n_rows,), generator=generator)


def _plain_ntxent(embeddings: Tensor, temperature: float) -> Tensor:
    return reference.clop_loss(embeddings, n_views=N_VIEWS, temperature=temperature)


def _plain_supcon(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return reference.clop_loss(embeddings, labels, n_views=1, positives="label", temperature=temperature)


def _pairs(n_rows: int, width: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return torch.randn(n_rows, width, generator=generator), torch.randn(n_rows, width, generator=generator)


def _plain_clip(left: Tensor, right: Tensor, temperature: float) -> Tensor:
    """Does not use the reference, which would compare all 2 N rows with each other."""
    precise = torch.promote_types(left.dtype, torch.float32)
    left, right = (F.normalize(x.to(precise), dim=1).to(x.dtype) for x in (left, right))
    logits = (left @ right.T).to(precise) / temperature
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


SIGMOID_BIAS = -10.0
"""The bias with which SigLIP starts training."""


def _plain_sigmoid(left: Tensor, right: Tensor, temperature: float) -> Tensor:
    precise = torch.promote_types(left.dtype, torch.float32)
    left, right = (F.normalize(x.to(precise), dim=1).to(x.dtype) for x in (left, right))
    logits = (left @ right.T).to(precise) / temperature + SIGMOID_BIAS
    signs = 2 * torch.eye(len(logits), dtype=precise, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


_ALL = (
    Problem("ntxent", f"NT-Xent (SimCLR) with {N_VIEWS} views, N rows in all", _views, _plain_ntxent),
    Problem("supcon", f"SupCon of N rows with {N_CLASSES} classes", _labelled, _plain_supcon),
    Problem("clip", "CLIP's two-sided loss, N rows per side", _pairs, _plain_clip),
    Problem(
        "sigmoid", "SigLIP's loss, N rows per side; only other libraries have it, to compare with clip", _pairs, _plain_sigmoid
    ),
)

PROBLEMS = {problem.name: problem for problem in _ALL}
