"""The CUDA kernels' own source on a CPU: csrc/cuda/ compiled with g++ against simt.h, which runs a grid there.

All of csrc/cuda/ is compiled, except for its runtime.cpp: the kernels, their launches, and the operators. The runtime.cpp of this
folder registers the operators for CPU tensors as ``torch.ops.clop_host``. :func:`load` compiles all of this, with ninja. In a
test the backend ``cuda`` calls :class:`Kernels`, which puts NaN between the rows of zhat that operators are given.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from clop_kernels import backends
from clop_kernels.backends import contract, cuda

from ..support.oracle import with_nan_between_rows

if TYPE_CHECKING:
    import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of embeddings."""

ORDERS = ("forward", "reverse", "shuffled")
"""The orders in which the threads of a block may run; the module's set_order takes them."""

SANITIZE = os.environ.get("CLOP_HOST_SANITIZE", "")
"""The sanitizers to compile with, as -fsanitize= takes them. Their runtimes must load before Python (see `make sanitize`)."""


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
    """The module of kernels.cpp, with the operators ``clop_host``, compiled if a source is newer than it."""
    import pybind11

    name = "clop_host"
    flags = ["-O2", "-g1", "-fPIC", f"-DMODULE_NAME={name}"]
    flags += [f"-isystem {path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
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
    """The program of races.cpp, for ThreadSanitizer.

    The scheduler is not instrumented, so ThreadSanitizer reports no race in the scheduler's own data, which all fibers share.
    """
    flags = ["-O1", "-g1", "-fsanitize=thread"]
    return _build("host-thread", "races.cpp", "races", flags, ["-O1", "-g1", "-DCLOP_TSAN"], "-fsanitize=thread")


def _build(variant: str, source: str, target: str, flags: list[str], scheduler_flags: list[str], link: str) -> Path:
    """Compiles a source, the operators and simt.cpp into a library or a program, in a directory of its own."""
    import ninja

    directory = ROOT / "build" / variant
    directory.mkdir(parents=True, exist_ok=True)
    common = "-std=c++17 -pthread -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas"
    package = Path(torch.__file__).parent
    # The oldest torch whose stable ABI the extension takes, as in tools/native_build.py.
    of_torch = f"-isystem {package / 'include'} -DTORCH_TARGET_VERSION=0x020b000000000000"
    libraries = f"-L{package / 'lib'} -Wl,-rpath,{package / 'lib'} -ltorch -ltorch_cpu -lc10"
    objects = {
        "kernels.o": (HERE / source, flags),
        "bindings.o": (ROOT / "csrc" / "cuda" / "bindings.cpp", flags),
        "runtime.o": (HERE / "runtime.cpp", flags),
        "simt.o": (HERE / "simt.cpp", scheduler_flags),
    }
    rules = f"""
cxx = {os.environ.get("CXX", "g++")}
rule compile
  command = $cxx {common} -I{HERE} -I{ROOT / "csrc" / "cuda"} {of_torch} $flags -MMD -MF $out.d -c -x c++ $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx {link} $flags $in {libraries} -o $out
"""
    for name, (path, its_flags) in objects.items():
        rules += f"build {name}: compile {path}\n  flags = {' '.join(its_flags)}\n"
    rules += f"build {target}: link {' '.join(objects)}\n  flags = {' '.join(flags)}\n"
    program = shutil.which("ninja", path=ninja.BIN_DIR) or "ninja"
    with (directory / "lock").open("w") as lock:  # pytest may run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        (directory / "build.ninja").write_text(rules)
        built = subprocess.run([program, "-C", str(directory)], capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(f"the kernels do not compile for this CPU:\n{built.stdout}{built.stderr}")
    return directory / target


@contextmanager
def as_backend(monkeypatch: pytest.MonkeyPatch, n_processors: int = 1, in_panels: bool = False) -> Iterator[Kernels]:
    """The backend ``cuda`` on this CPU, with zhat laid out as on a GPU; memory that it allocates begins as NaN.

    On a GPU of one processor no blocks share rows. With many processors, blocks share rows where that saves time. ``in_panels``
    takes the path of wide rows at any width, in panels of 32 rows.
    """
    kernels = Kernels(n_processors)
    here = tuple(
        dataclasses.replace(b, obstacle=lambda device, dtype: None, module=".cuda") if b.name == "cuda" else b
        for b in backends.BACKENDS
    )
    monkeypatch.setattr(contract, "DENSE_DEVICES", ())
    monkeypatch.setattr(cuda, "kernels", kernels)
    monkeypatch.setattr(backends, "BACKENDS", here)
    if in_panels:
        monkeypatch.setattr(cuda, "is_wide", lambda width, compute_dtype: True)
        monkeypatch.setattr(cuda, "panel_rows", lambda compute_dtype: 32)
    torch.use_deterministic_algorithms(True)
    try:
        yield kernels
    finally:
        kernels.module.set_order("forward", 0)
        torch.use_deterministic_algorithms(False)


def stub_launches() -> None:
    """From now on the backend ``cuda`` takes CPU tensors and launches nothing: only the host's work in a call remains."""
    load().set_launches(False)
    cuda.kernels = torch.ops.clop_host


class Kernels:
    """Stands in for ``torch.ops.clop_native``: runs the operators on this CPU, as on a GPU with ``n_processors`` processors.

    What the kernels write begins as NaN, so that numbers which they leave out show. The gaps between the rows of zhat are NaN
    too, so that a kernel which reads them shows.
    """

    def __init__(self, n_processors: int = 2) -> None:
        self.module = load()
        self.n_processors = n_processors

    @property
    def n_processors(self) -> int:
        return self._n_processors

    @n_processors.setter
    def n_processors(self, n_processors: int) -> None:
        self._n_processors = n_processors
        self.module.set_n_processors(n_processors)

    @property
    def shares(self) -> dict[str, tuple[int, int, int]]:
        """For the last "softmax" and "gradient" launch: how many blocks share left and right rows, and all blocks."""
        shares: dict[str, tuple[int, int, int]] = self.module.shares()
        return shares

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return _with_nan_around_zhat(getattr(torch.ops.clop_host, name))


@functools.cache
def _with_nan_around_zhat(operator: Any) -> Callable[..., Any]:
    arguments = {argument.name: (index, argument) for index, argument in enumerate(operator.default._schema.arguments)}
    if "zhat" not in arguments:
        of_other_tensors: Callable[..., Any] = operator
        return of_other_tensors
    index, argument = arguments["zhat"]
    is_result = argument.alias_info is not None

    def call(*given: Any) -> Any:
        if is_result:
            given[index].fill_(torch.nan)
        with_nan_between_rows(given[index])
        return operator(*given)

    return call
