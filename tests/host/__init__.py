"""The CUDA kernels' own source on a CPU: csrc/cuda/ compiled with g++ against simt.h, which runs a grid there.

:func:`load` compiles it, with ninja, and binds it, with pybind11; :class:`Kernels` has the operators of the compiled extension
on top of it, so that the backend ``cuda`` runs on tensors of the CPU.
"""

from __future__ import annotations

import fcntl
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

from ..oracle import with_nan_between_rows

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""In the order of Dtype in csrc/cuda/loss.h."""

ORDERS = ("forward", "reverse", "shuffled")
"""In which the threads of a block may run; set_order of the module."""

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
    import pybind11

    name = "clop_host"
    flags = ["-O2", "-g1", "-fPIC", "-fvisibility=hidden", f"-DMODULE_NAME={name}"]
    flags += [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    if SANITIZE:
        flags += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    library = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    built = _build(
        "host" + (f"-{SANITIZE.replace(',', '-')}" if SANITIZE else ""), "kernels.cpp", library, flags, flags, "-shared"
    )
    spec = importlib.util.spec_from_file_location(name, built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def races() -> Path:
    """The program of races.cpp. The scheduler is not instrumented: what fibers tell each other through it is no race."""
    flags = ["-O1", "-g1"]
    return _build(
        "host-thread", "races.cpp", "races", [*flags, "-fsanitize=thread"], [*flags, "-DCLOP_TSAN"], "-fsanitize=thread"
    )


def _build(variant: str, source: str, target: str, flags: list[str], scheduler_flags: list[str], link: str) -> Path:
    """A source and simt.cpp to a library or a program, in a directory of its own."""
    import ninja

    directory = ROOT / "build" / variant
    directory.mkdir(parents=True, exist_ok=True)
    common = "-std=c++17 -Wall -Wextra -Werror -Wno-unknown-pragmas"
    rules = f"""
cxx = {os.environ.get("CXX", "g++")}
rule compile
  command = $cxx {common} -I{HERE} -I{ROOT / "csrc" / "cuda"} $flags -MMD -MF $out.d -c -x c++ $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx {link} $flags $in -o $out
build kernels.o: compile {HERE / source}
  flags = {" ".join(flags)}
build simt.o: compile {HERE / "simt.cpp"}
  flags = {" ".join(scheduler_flags)}
build {target}: link kernels.o simt.o
  flags = {" ".join(flags)}
"""
    program = shutil.which("ninja", path=ninja.BIN_DIR) or "ninja"
    with (directory / "lock").open("w") as lock:  # pytest may run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        (directory / "build.ninja").write_text(rules)
        built = subprocess.run([program, "-C", str(directory)], capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(f"the kernels do not compile for this CPU:\n{built.stdout}{built.stderr}")
    return directory / target


def _addresses(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in fields.items()}


class Kernels:
    """``torch.ops.clop_native`` as far as the backend ``cuda`` calls it, on a GPU of ``n_processors`` that is this CPU.

    What the kernels write begins as NaN, so that what they leave out shows.
    """

    def __init__(self, n_processors: int = 2) -> None:
        self.n_processors = n_processors
        self.module = load()
        self.shares: dict[str, tuple[int, int, int]] = {}

    @staticmethod
    def _zhat(zhat: Tensor) -> dict[str, Any]:
        """The rows that a pass reads or writes. No kernel reads what is between them."""
        return {"zhat": with_nan_between_rows(zhat), "pitch": zhat.stride(0)}

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
        normalize: bool,
        n_left: int,
        negatives_only: bool,
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
            "normalize": normalize,
            "n_left": n_left,
            "negatives_only": negatives_only,
        }

    def cuda_groups(self, labels: Tensor, n_views: int, n_left: int) -> Tensor:
        groups = torch.full((3, n_views * labels.shape[0]), -1, dtype=torch.int32)
        fields = {"n_instances": labels.shape[0], "n_views": n_views, "n_left": n_left, "labels": labels, "groups": groups}
        self._check(self.module.group(_addresses(fields)))
        return groups

    def cuda_prologue(
        self,
        embeddings: Tensor,
        normalized: Tensor,
        order: Tensor | None,
        labels: Tensor | None,
        prototypes: Tensor | None,
        n_views: int,
        distance: int,
        normalize: bool,
        has_sides: bool,
    ) -> tuple[Tensor, Tensor]:
        n_rows, width = embeddings.shape
        results = {"norms": self._empty(n_rows), "distances": self._empty(n_rows)}
        fields = {
            "embeddings": embeddings,
            "stride_z_row": embeddings.stride(0),
            "stride_z_column": embeddings.stride(1),
            "order": order,
            "labels": labels,
            "prototypes": prototypes,
            "n_rows": n_rows,
            "n_views": n_views,
            "n_classes": 0 if prototypes is None else prototypes.shape[0],
            "width": width,
            "dtype": DTYPES.index(embeddings.dtype),
            "compute_dtype": DTYPES.index(normalized.dtype),
            "distance": distance,
            "normalize": normalize,
            "has_sides": has_sides,
        }
        self._check(self.module.prologue(_addresses(fields | results | self._zhat(normalized.fill_(torch.nan)))))
        return results["norms"], results["distances"]

    def _losses(self, fields: dict[str, Any]) -> dict[str, Tensor]:
        """What a forward pass writes beside zhat and the norms."""
        n_rows = fields["n_rows"]
        return {
            "loss": self._empty(*((n_rows,) if fields["reduction"] == 2 else ())),
            **{name: self._empty(n_rows) for name in ("shift", "inverse_total", "negative")},
            "counts": self._empty(2),
        }

    def _partial_sums(self, fields: dict[str, Any]) -> dict[str, Tensor]:
        return {
            "partial_sums": self._empty(N_PARTIAL_SUMS, self.module.most_blocks(fields["n_rows"])),
            "n_finished": self._counters(fields["n_rows"]),
        }

    def _counters(self, n_rows: int) -> Tensor:
        return torch.full((self.module.n_counters(n_rows),), 77, dtype=torch.int32)

    def _with_split_sums(self, fields: dict[str, Any], kernel: str) -> dict[str, Any]:
        """Exactly as much scratch as the launch asks for; `shares` remembers how many blocks share rows."""
        addresses = _addresses(fields)
        self.shares[kernel] = getattr(self.module, f"{kernel}_shares")(addresses, self.n_processors)
        n_floats = getattr(self.module, f"{kernel}_split_floats")(addresses, self.n_processors)
        return fields | {"split_sums": self._empty(n_floats) if n_floats else None}

    def cuda_forward(self, embeddings: Tensor, normalized: Tensor, *loss: Any) -> tuple[Tensor, ...]:
        fields = self._loss(embeddings, *loss)
        n_rows = embeddings.shape[0]
        losses = self._losses(fields)
        norms = self._empty(n_rows)
        fields |= losses | self._partial_sums(fields) | self._zhat(normalized.fill_(torch.nan))
        fields |= {
            "embeddings": embeddings,
            "stride_z_row": embeddings.stride(0),
            "stride_z_column": embeddings.stride(1),
            "norms": norms,
            "distances": self._empty(n_rows),
        }
        fields = self._with_split_sums(fields, "softmax")
        self._check(self.module.forward(_addresses(fields), self.n_processors))
        loss_value, *softmax, counts = losses.values()
        return loss_value, norms, *softmax, counts

    def cuda_panel_softmax(
        self,
        products: Tensor,
        first_row: int,
        first_column: int,
        statistics: Tensor,
        zhat: Tensor,
        pairs_alone: bool,
        *loss: Any,
    ) -> None:
        fields = self._loss(zhat, *loss) | self._panel(products, first_row, first_column)
        fields |= {"statistics": statistics, "pairs_alone": pairs_alone}
        self._check(self.module.panel_softmax(_addresses(fields)))

    @staticmethod
    def _panel(products: Tensor, first_row: int, first_column: int) -> dict[str, Any]:
        return {
            "products": products,
            "first_row": first_row,
            "first_column": first_column,
            "n_panel_rows": products.shape[0],
            "n_panel_columns": products.shape[1],
        }

    def cuda_panel_loss(self, statistics: Tensor, distances: Tensor, zhat: Tensor, *loss: Any) -> tuple[Tensor, ...]:
        fields = self._loss(zhat, *loss)
        losses = self._losses(fields)
        fields |= losses | self._partial_sums(fields) | {"statistics": statistics, "distances": distances}
        self._check(self.module.panel_loss(_addresses(fields)))
        return tuple(losses.values())

    def _coefficients(self, n_rows: int) -> dict[str, Any]:
        n_padded = self.module.padded_rows(n_rows)
        return {"coefficients": self._empty(6, n_padded), "n_padded": n_padded}

    def _backward(
        self,
        upstream: Tensor | None,
        weights: Tensor | None,
        embeddings: Tensor,
        zhat: Tensor,
        norms: Tensor,
        shift: Tensor,
        inverse_total: Tensor,
        negative: Tensor,
        counts: Tensor,
        needs_temperature: bool,
        *loss: Any,
    ) -> dict[str, Any]:
        fields = self._loss(embeddings, *loss)
        return (
            fields
            | self._partial_sums(fields)
            | self._zhat(zhat)
            | {
                "upstream": upstream,
                "weights": weights,
                "norms": norms,
                "shift": shift,
                "inverse_total": inverse_total,
                "negative": negative,
                "counts": counts,
                "grad_z": self._empty(*embeddings.shape, dtype=embeddings.dtype),
                "grad_temperature": self._empty() if needs_temperature else None,
            }
        )

    def cuda_backward(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        fields = self._backward(*arguments)
        fields = self._with_split_sums(fields | self._coefficients(fields["n_rows"]), "gradient")
        self._check(self.module.backward(_addresses(fields), self.n_processors))
        return fields["grad_z"], fields["grad_temperature"]

    def cuda_coefficients(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        fields = self._backward(*arguments)
        fields |= self._coefficients(fields["n_rows"])
        self._check(self.module.coefficients(_addresses(fields)))
        return fields["coefficients"], fields["n_finished"]

    def _pairs(
        self,
        zhat: Tensor,
        groups: Tensor,
        n_left: int,
        temperature: Tensor | None,
        scale: float,
        scale_rest: float,
        is_tf32: bool,
        normalize: bool,
    ) -> dict[str, Any]:
        scales = temperature, scale, scale_rest
        loss = self._loss(zhat, groups, None, None, *scales, 1, 0.0, 0, 0, zhat.dtype, is_tf32, normalize, n_left, False)
        return loss | self._zhat(zhat) | {"pairs_alone": True}

    def cuda_pair_softmax(self, zhat: Tensor, *pairs: Any) -> Tensor:
        statistics = self._empty(4, zhat.shape[0])
        fields = self._pairs(zhat, *pairs) | {"statistics": statistics, "n_finished": self._counters(zhat.shape[0])}
        fields = self._with_split_sums(fields, "softmax")
        self._check(self.module.pair_softmax(_addresses(fields), self.n_processors))
        return statistics

    def cuda_pair_coefficients(self, zhat: Tensor, given: Tensor, *pairs: Any) -> Tensor:
        fields = self._pairs(zhat, *pairs) | {"given": given} | self._coefficients(zhat.shape[0])
        self._check(self.module.coefficients(_addresses(fields)))
        coefficients: Tensor = fields["coefficients"]
        return coefficients

    def cuda_pair_gradient(self, zhat: Tensor, given: Tensor, *pairs: Any) -> Tensor:
        fields = self._pairs(zhat, *pairs) | {"given": given} | self._coefficients(zhat.shape[0])
        fields["sums"] = self._empty(zhat.shape[0] if fields["n_left"] < 0 else fields["n_left"], zhat.shape[1])
        fields = self._with_split_sums(fields | {"n_finished": self._counters(zhat.shape[0])}, "gradient")
        self._check(self.module.backward(_addresses(fields), self.n_processors))
        sums: Tensor = fields["sums"]
        return sums

    def cuda_panel_pairs(
        self, products: Tensor, first_row: int, first_column: int, coefficients: Tensor, zhat: Tensor, *loss: Any
    ) -> Tensor:
        pairs = self._empty(*products.shape, dtype=zhat.dtype)
        fields = self._loss(zhat, *loss) | self._panel(products, first_row, first_column)
        fields |= {"coefficients": coefficients, "n_padded": coefficients.shape[1], "pairs": pairs}
        self._check(self.module.panel_pairs(_addresses(fields)))
        return pairs

    def cuda_panel_finish(self, sums: Tensor, n_finished: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        fields = self._backward(*arguments) | {"sums": sums, "n_finished": n_finished}
        self._check(self.module.panel_finish(_addresses(fields)))
        return fields["grad_z"], fields["grad_temperature"]

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
        fields |= self._zhat(zhat) | {
            "upstream": upstream,
            "weights": weights,
            "counts": counts,
            "by_class": by_class,
            "bounds": bounds,
            "n_parts": parts.shape[0],
            "partial_gradients": parts,
        }
        self._check(self.module.prototype_gradient(_addresses(fields)))
        return parts
