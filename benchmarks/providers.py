"""The implementations to compare: plain PyTorch, torch.compile, other libraries, and the backends of clop_kernels."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import clop_kernels
from clop_kernels.backends import BACKENDS

from .problems import N_VIEWS, PROBLEMS, SIGMOID_BIAS, LossFunction

Obstacle = Callable[[torch.device, torch.dtype], str | None]


@dataclass(frozen=True)
class Provider:
    """One implementation of the losses.

    Attributes:
        name: Its name on the command line and in results.
        summary: Its name in figures and reports.
        package: The package whose version the results state.
        functions: The losses it offers, by problem.
        obstacle: (device, dtype) -> why it cannot run on such embeddings here, or None if it can.
        pair_arrays: How many N x N arrays it holds at its peak, measured at N = 8192 on the problem that needs most and
            rounded up. 0 if its memory is O(N D).
        compiles_per_shape: Whether the first call on a shape compiles code. Its cost is not counted as time or memory.
    """

    name: str
    summary: str
    package: str
    functions: Mapping[str, LossFunction]
    obstacle: Obstacle
    pair_arrays: float = 0.0
    compiles_per_shape: bool = False


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def _compiled(problem: str) -> LossFunction:
    @functools.cache
    def compiled() -> LossFunction:
        # Separate code for each shape, which is what a training run with a fixed batch size gets.
        return torch.compile(PROBLEMS[problem].plain, fullgraph=True, dynamic=False)

    return lambda *inputs: compiled()(*inputs)


def _obstacle_to_compile(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton on a GPU, and Triton is not installed"
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX"), "g++", "clang++") if compiler):
        return "torch.compile needs a C++ compiler: there is no g++ or clang++ on the PATH, and CXX names no compiler"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "torch.compile needs Python's header files: there is no Python.h"
    return None


# ---- other libraries -------------------------------------------------------------------------------------------------


def _library(package: str, load: Callable[[], object], in_float16: str) -> Obstacle:
    def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
        try:
            load()
        except ImportError as error:
            return f"{package} cannot be imported ({error}): pip install {package}"
        return in_float16 if dtype == torch.float16 else None

    return obstacle


@functools.cache
def _metric_learning() -> type[torch.nn.Module]:
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss


def _metric_learning_supcon(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return _metric_learning()(temperature)(embeddings, labels)


def _metric_learning_ntxent(embeddings: Tensor, temperature: float) -> Tensor:
    """Uses its SupConLoss. Its NTXentLoss is a different loss, with only one positive at a time in the denominator."""
    instances = torch.arange(len(embeddings) // N_VIEWS, device=embeddings.device)
    return _metric_learning_supcon(embeddings, instances.repeat(N_VIEWS), temperature)


def _lightly_ntxent(embeddings: Tensor, temperature: float) -> Tensor:
    return lightly_loss()(temperature)(*embeddings.chunk(N_VIEWS))


@functools.cache
def lightly_loss() -> type[torch.nn.Module]:
    _import_torchvision()
    from lightly.loss import NTXentLoss

    return NTXentLoss


@functools.cache
def _import_torchvision() -> torch.library.Library | None:
    """Makes ``import torchvision`` work. lightly imports it, although this loss uses nothing of it.

    The import fails if torchvision's compiled part does not load, for example a CUDA build beside a CPU build of torch,
    because two operators are missing. This declares them for as long as the result lives.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


def _siglip_kernel_sigmoid(left: Tensor, right: Tensor, temperature: float) -> Tensor:
    """The library expects normalised rows, and the logarithm of the logits' scale."""
    left, right = (F.normalize(x.float(), dim=1).to(x.dtype) for x in (left, right))
    scale, bias = (torch.tensor(value, device=left.device) for value in (-math.log(temperature), SIGMOID_BIAS))
    loss: Tensor = siglip_loss()(left, right, scale, bias)
    return loss


@functools.cache
def siglip_loss() -> Callable[..., Tensor]:
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss


def _obstacle_to_siglip_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "siglip-kernel runs only on GPUs"
    return _library("siglip-kernel", siglip_loss, "")(device, dtype)


# ---- clop_kernels ----------------------------------------------------------------------------------------------------


def _backend_functions(backend: str) -> dict[str, LossFunction]:
    def ntxent(embeddings: Tensor, temperature: float) -> Tensor:
        return clop_kernels.ntxent_loss(embeddings, n_views=N_VIEWS, temperature=temperature, backend=backend)

    def supcon(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
        return clop_kernels.supcon_loss(embeddings, labels, temperature=temperature, backend=backend)

    def clip(left: Tensor, right: Tensor, temperature: float) -> Tensor:
        return clop_kernels.clip_loss(left, right, temperature=temperature, backend=backend)

    return {"ntxent": ntxent, "supcon": supcon, "clip": clip}


_ALL = (
    Provider(
        "eager",
        "plain PyTorch",
        "torch",
        {name: problem.plain for name, problem in PROBLEMS.items()},
        lambda device, dtype: None,
        pair_arrays=6,
    ),
    Provider(
        "compile",
        "torch.compile",
        "torch",
        {name: _compiled(name) for name in PROBLEMS},
        _obstacle_to_compile,
        pair_arrays=2,
        compiles_per_shape=True,
    ),
    Provider(
        "metric-learning",
        "pytorch-metric-learning",
        "pytorch-metric-learning",
        {"ntxent": _metric_learning_ntxent, "supcon": _metric_learning_supcon},
        _library("pytorch-metric-learning", _metric_learning, "its softmax runs in float16, which loses gradients below 6e-8"),
        pair_arrays=12,
    ),
    Provider(
        "lightly",
        "lightly",
        "lightly",
        {"ntxent": _lightly_ntxent},
        _library("lightly", lightly_loss, "it sums the rows' losses in float16, which overflows at N = 8192"),
        pair_arrays=5,
    ),
    Provider("siglip-kernel", "siglip-kernel", "siglip-kernel", {"sigmoid": _siglip_kernel_sigmoid}, _obstacle_to_siglip_kernel),
    *(Provider(b.name, f"clop_kernels, {b.name}", "clop_kernels", _backend_functions(b.name), b.obstacle) for b in BACKENDS),
)

PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in _ALL}
"""By name. The other providers are checked against the first one."""


def label(name: str) -> str:
    """The name of a provider in figures and reports. Old rows may name a provider that no longer exists."""
    return PROVIDERS[name].summary if name in PROVIDERS else name
