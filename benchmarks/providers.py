"""What is measured: the plain loss, torch.compile of it, and the backends of clop_kernels, on the same embeddings."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import clop_kernels
from clop_kernels import reference
from clop_kernels.backends import BACKENDS

N_VIEWS = 2
TEMPERATURE = 0.1
WIDTH = 128

LossFunction = Callable[[Tensor, int, float], Tensor]
Obstacle = Callable[[torch.device, torch.dtype], str | None]


@dataclass(frozen=True)
class Provider:
    """One implementation of the loss.

    Attributes:
        name: what the command line and the results call it.
        summary: one line for a person.
        obstacle: (device, dtype) -> why it cannot run on such embeddings here, or None if it can.
        function: (embeddings, n_views, temperature) -> the loss, ().
        pair_arrays: how many N x N arrays it holds at its peak, as measured and rounded up; 0 if its memory is O(N D).
        compiles_per_shape: the first call on a shape compiles code for it, which is neither its time nor its memory.
    """

    name: str
    summary: str
    obstacle: Obstacle
    function: LossFunction
    pair_arrays: float = 0.0
    compiles_per_shape: bool = False


@dataclass(frozen=True)
class Tolerance:
    """How far two providers may lie apart: relative errors, the gradient's in the Frobenius norm."""

    loss: float
    gradient: float


TOLERANCES = {
    torch.float64: Tolerance(loss=1e-10, gradient=1e-9),
    torch.float32: Tolerance(loss=1e-5, gradient=1e-4),
    torch.float16: Tolerance(loss=1e-2, gradient=2e-2),
    torch.bfloat16: Tolerance(loss=1e-2, gradient=5e-2),
}


def make_embeddings(n_rows: int, width: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Normal embeddings, (n_rows, width), that require a gradient; drawn on the CPU, so the same on any device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_rows, width, generator=generator).to(device, dtype).requires_grad_()


def check_equal(providers: Sequence[Provider], embeddings: Tensor, temperature: float) -> None:
    """Holds the loss and gradient of every provider to those of the first.

    Raises:
        AssertionError: naming the provider, its error and the tolerance. A NaN never passes.
    """
    if len(providers) < 2:
        return
    tolerance = TOLERANCES[embeddings.dtype]
    first, *others = providers
    expected_loss, expected_gradient = _loss_and_gradient(first, embeddings, temperature)
    for provider in others:
        loss, gradient = _loss_and_gradient(provider, embeddings, temperature)
        for what, value, expected, limit in (
            ("loss", loss, expected_loss, tolerance.loss),
            ("gradient", gradient, expected_gradient, tolerance.gradient),
        ):
            error = float((value - expected).norm() / expected.norm())
            if not error <= limit:
                raise AssertionError(
                    f"{what} of {provider.name} at {tuple(embeddings.shape)}, {embeddings.dtype}: relative error "
                    f"{error:.2g} against {first.name}, expected at most {limit:.2g}"
                )


def _loss_and_gradient(provider: Provider, embeddings: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    loss = provider.function(embeddings, N_VIEWS, temperature)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    return loss.detach().double(), gradient.double()


def _eager(embeddings: Tensor, n_views: int, temperature: float) -> Tensor:
    return reference.clop_loss(embeddings, n_views=n_views, temperature=temperature)


@functools.cache
def _compiled() -> LossFunction:
    # One code for each shape, as a training run with its one batch size gets it.
    return torch.compile(_eager, fullgraph=True, dynamic=False)


def _obstacle_to_compile(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton on a GPU, which is not installed"
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX"), "g++", "clang++") if compiler):
        return "torch.compile needs a C++ compiler: no g++ or clang++ on the PATH, and CXX names none"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "torch.compile needs the headers of Python: there is no Python.h"
    return None


def _backend_function(name: str) -> LossFunction:
    def function(embeddings: Tensor, n_views: int, temperature: float) -> Tensor:
        return clop_kernels.clop_loss(embeddings, n_views=n_views, temperature=temperature, backend=name)

    return function


_ALL = (
    Provider("eager", "the plain loss, N x N and all", lambda device, dtype: None, _eager, pair_arrays=6),
    Provider(
        "compile",
        "torch.compile of the plain loss",
        _obstacle_to_compile,
        lambda embeddings, n_views, temperature: _compiled()(embeddings, n_views, temperature),
        pair_arrays=1.5,
        compiles_per_shape=True,
    ),
    *(Provider(b.name, b.summary, b.obstacle, _backend_function(b.name)) for b in BACKENDS),
)

PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in _ALL}
"""By name, the one that the others are checked against first."""
