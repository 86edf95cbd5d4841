"""The CUDA kernels' own source on a CPU: csrc/cuda/ compiled with g++ against simt.h, which runs a grid there.

:func:`load` compiles it, with ninja, and binds it, with pybind11; :class:`Kernels` has the operators of the compiled extension
on top of it, so that the backend ``cuda`` runs on tensors of the CPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""In the order of Dtype in csrc/cuda/loss.h."""

N_PARTIAL_SUMS = 5
SANITIZE = os.environ.get("CLOP_HOST_SANITIZE", "")
"""What to compile with, as -fsanitize= takes it; the runtimes must then be loaded before Python (see `make sanitize`)."""


def obstacle() -> str | None:
    """Why the kernels cannot be compiled for this CPU, or None."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "there is no C++ compiler"
    for package in ("pybind11", "ninja"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    return None


@functools.cache
def load() -> ModuleType:
    """The module of kernels.cpp, compiled if a source is newer than it."""
    import ninja
    import pybind11

    variant = "host" + (f"-{SANITIZE.replace(',', '-')}" if SANITIZE else "")
    directory = ROOT / "build" / variant
    directory.mkdir(parents=True, exist_ok=True)
    name = "clop_host"
    library = directory / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = (HERE, ROOT / "csrc" / "cuda", pybind11.get_include(), sysconfig.get_paths()["include"])
    flags = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += [f"-DMODULE_NAME={name}", *(f"-I{path}" for path in includes)]
    if SANITIZE:
        flags += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    rules = f"""
cxx = {os.environ.get("CXX", "g++")}
flags = {" ".join(flags)}
rule compile
  command = $cxx $flags -MMD -MF $out.d -c -x c++ $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared $flags $in -o $out
build kernels.o: compile {HERE / "kernels.cpp"}
build simt.o: compile {HERE / "simt.cpp"}
build {library.name}: link kernels.o simt.o
"""
    (directory / "build.ninja").write_text(rules)
    program = shutil.which("ninja", path=ninja.BIN_DIR) or "ninja"
    built = subprocess.run([program, "-C", str(directory)], capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(f"the kernels do not compile for this CPU:\n{built.stdout}{built.stderr}")
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _addresses(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in fields.items()}


class Kernels:
    """``torch.ops.clop_native`` as far as the backend ``cuda`` calls it, on a GPU of ``n_processors`` that is this CPU.

    What the kernels write begins as NaN, so that what they leave out shows.
    """

    def __init__(self, n_processors: int = 2) -> None:
        self.n_processors = n_processors
        self.module = load()

    @staticmethod
    def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    def _check(self, error: int) -> None:
        if error != 0:
            raise RuntimeError(f"cudaError_t {error}")

    def _loss(
        self,
        z: Tensor,
        groups: Tensor,
        labels: Tensor | None,
        prototypes: Tensor | None,
        temperature: Tensor | None,
        scale: float,
        scale_rest: float,
        n_views: int,
        prototype_weight: float,
        distance: int,
        reduction: int,
        compute_dtype: torch.dtype,
        is_tf32: bool,
    ) -> dict[str, Any]:
        return {
            "n_rows": z.shape[0],
            "width": z.shape[1],
            "n_views": n_views,
            "n_classes": 0 if prototypes is None else prototypes.shape[0],
            "dtype": DTYPES.index(z.dtype),
            "compute_dtype": DTYPES.index(compute_dtype),
            "is_tf32": is_tf32,
            "groups": groups if groups.numel() else None,
            "labels": labels,
            "prototypes": prototypes,
            "temperature": temperature,
            "scale": scale,
            "scale_rest": scale_rest,
            "prototype_weight": prototype_weight,
            "distance": distance,
            "reduction": reduction,
        }

    def cuda_forward(self, embeddings: Tensor, *loss: Any) -> tuple[Tensor, ...]:
        fields = self._loss(embeddings, *loss)
        n_rows, width = embeddings.shape
        n_blocks = self.module.n_blocks_of(n_rows, self.n_processors)
        results = {
            "loss": self._empty(*((n_rows,) if fields["reduction"] == 2 else ())),
            "zhat": self._empty(n_rows, width, dtype=DTYPES[fields["compute_dtype"]]),
            **{name: self._empty(n_rows) for name in ("norms", "shift", "total", "negative")},
            "counts": self._empty(2),
        }
        scratch = {
            "distances": self._empty(n_rows),
            "partial_sums": self._empty(N_PARTIAL_SUMS, n_blocks),
            "n_finished": torch.full((1,), 77, dtype=torch.int32),
        }
        strides = {"stride_z_row": embeddings.stride(0), "stride_z_column": embeddings.stride(1)}
        fields |= results | scratch | strides | {"embeddings": embeddings}
        self._check(self.module.forward(_addresses(fields), self.n_processors))
        return tuple(results.values())

    def cuda_backward(
        self,
        upstream: Tensor,
        weights: Tensor | None,
        embeddings: Tensor,
        zhat: Tensor,
        norms: Tensor,
        shift: Tensor,
        total: Tensor,
        negative: Tensor,
        counts: Tensor,
        needs_temperature: bool,
        *loss: Any,
    ) -> tuple[Tensor, Tensor]:
        n_rows, width = embeddings.shape
        fields = self._loss(embeddings, *loss)
        n_padded = (n_rows + 127) // 128 * 128
        grad, grad_temperature = self._empty(n_rows, width, dtype=embeddings.dtype), self._empty()
        fields |= {
            "upstream": upstream,
            "weights": weights,
            "zhat": zhat,
            "norms": norms,
            "shift": shift,
            "total": total,
            "negative": negative,
            "counts": counts,
            "grad_z": grad,
            "grad_temperature": grad_temperature if needs_temperature else None,
            "coefficients": self._empty(6, n_padded),
            "n_padded": n_padded,
            "partial_sums": self._empty(self.module.n_blocks_of(n_rows, self.n_processors)),
            "n_finished": torch.full((1,), 77, dtype=torch.int32),
        }
        self._check(self.module.backward(_addresses(fields), self.n_processors))
        return grad, grad_temperature

    def cuda_prototype_gradient(
        self,
        upstream: Tensor,
        weights: Tensor | None,
        zhat: Tensor,
        counts: Tensor,
        by_class: Tensor,
        bounds: Tensor,
        *loss: Any,
    ) -> Tensor:
        fields = self._loss(zhat, *loss)
        parts = self._empty(3, fields["n_classes"], zhat.shape[1])
        fields |= {
            "upstream": upstream,
            "weights": weights,
            "zhat": zhat,
            "counts": counts,
            "by_class": by_class,
            "bounds": bounds,
            "n_parts": parts.shape[0],
            "partial_gradients": parts,
        }
        self._check(self.module.prototype_gradient(_addresses(fields)))
        return parts.sum(0)
