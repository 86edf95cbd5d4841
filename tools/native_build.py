"""Builds the native extension, csrc/ into clop_kernels/_native.abi3.so, with ninja. setup.py gets its arguments here.

Needs Linux, torch >= 2.11 in the environment that builds (so no build isolation), a C++17 compiler, ninja, and for the CUDA
half nvcc with its static runtime. What is missing is named, and the package is installed without that part.

Environment:
    CLOP_NATIVE: auto (build if it can be built; the default), 1 (fail, with the reason, if it cannot), 0 (do not).
    CLOP_CUDA: the same for the CUDA half.
    CLOP_CUDA_ARCHS: what nvcc compiles for, ``80;90;100;120+PTX`` by default.
    CLOP_SANITIZE: ``address,undefined`` instruments the host code.
    CLOP_LOCAL_VERSION: ``cu130`` makes the version 0.1.0+cu130; tools/build_wheels.py sets it.
    CUDA_HOME or CUDA_PATH, CXX, MAX_JOBS: as everywhere.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"

EXTENSION = "clop_kernels._native"
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 11)
"""The stable ABIs that the extension is compiled against: it runs on these and all that come after."""

OLDEST_SETUPTOOLS = 77  # as in pyproject.toml, which only an isolated build heeds

DEFAULT_ARCHS = "80;90;100;120+PTX"
"""Code for 80 runs on all of 8.x, and that for 100 on 10.3 too; with an "a" it would not, and no kernel needs one yet."""

OLDEST_ARCH = 80

LEVELS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512",
}
"""SIMD level -> what csrc/cpu/level.cpp is compiled with for it. Other machines than x86-64 have the first only."""

HOW_TO_BUILD = "`pip install --no-build-isolation .` builds it, with torch, ninja and setuptools >= 77 installed"


class UnavailableError(Exception):
    """Something cannot be built here; the message says why and what would help."""


# ---- what there is to build with -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit, and what it is to compile for.

    Attributes:
        nvcc: the compiler.
        version: of the toolkit, "13.0".
        archs: as in CLOP_CUDA_ARCHS, ("80", "90", "120+PTX").
        include: its headers.
        libraries: where libcudart_static.a is.
    """

    nvcc: Path
    version: str
    archs: tuple[str, ...]
    include: Path
    libraries: Path

    @property
    def tag(self) -> str:
        """cu130 for CUDA 13.0."""
        return "cu" + self.version.replace(".", "")


@dataclass(frozen=True)
class Plan:
    """All that the native part is built from.

    Attributes:
        cxx: the C++ compiler's command.
        ninja: ninja's command.
        torch: torch's directory.
        torch_version: its version.
        cuda: the toolkit, or why there will be no CUDA half.
        sanitize: as in CLOP_SANITIZE, or empty.
    """

    cxx: list[str]
    ninja: list[str]
    torch: Path
    torch_version: str
    cuda: Cuda | str
    sanitize: str

    @property
    def directory(self) -> Path:
        """The build directory: one for each variant, so that none finds another's objects."""
        parts = ["native-torch{}.{}".format(*OLDEST_TORCH)]
        parts += ["cpu"] if isinstance(self.cuda, str) else [self.cuda.tag, *self.cuda.archs]
        parts += self.sanitize.split(",") if self.sanitize else []
        return ROOT / "build" / "-".join(parts)

    def describe(self) -> str:
        """One line for a person."""
        text = f"building the native extension against torch {self.torch_version} with {shlex.join(self.cxx)}"
        if isinstance(self.cuda, str):
            return f"{text}; without its CUDA half: {self.cuda}"
        return f"{text}, and with {self.cuda.nvcc} (CUDA {self.cuda.version}) for {';'.join(self.cuda.archs)}"


def find_plan() -> Plan | str:
    """What to build the native part from, or why it is not built."""
    wanted = _wanted("CLOP_NATIVE")
    if wanted == "0":
        return "CLOP_NATIVE=0"
    try:
        torch, torch_version = _find_torch()
        cxx, ninja = _find_compiler(), _find_ninja()
    except UnavailableError as reason:
        if wanted == "1":
            raise SystemExit(f"CLOP_NATIVE=1, but the native extension cannot be built: {reason}") from None
        return f"{reason}; {HOW_TO_BUILD}"
    return Plan(cxx, ninja, torch, torch_version, find_cuda(), os.environ.get("CLOP_SANITIZE", ""))


def find_cuda() -> Cuda | str:
    """The CUDA toolkit, or why there is none."""
    wanted = _wanted("CLOP_CUDA")
    if wanted == "0":
        return "CLOP_CUDA=0"
    try:
        return _find_cuda()
    except UnavailableError as reason:
        if wanted == "1":
            raise SystemExit(f"CLOP_CUDA=1, but the CUDA kernels cannot be built: {reason}") from None
        return str(reason)


def _wanted(variable: str) -> str:
    value = os.environ.get(variable) or "auto"
    if value not in ("auto", "1", "0"):
        raise SystemExit(f"{variable}={value!r} in the environment: expected auto, 1 or 0")
    return value


def _find_torch() -> tuple[Path, str]:
    if sys.platform != "linux":
        raise UnavailableError(f"it builds on Linux, and this is {sys.platform}")
    spec = importlib.util.find_spec("torch")  # importing torch would take seconds, at each step of an installation
    if spec is None or spec.origin is None:
        raise UnavailableError("torch is not installed where this is built (an isolated build does not see yours)")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        raise UnavailableError("it needs torch {}.{} or newer, and {} is installed".format(*OLDEST_TORCH, version))
    return Path(spec.origin).parent, version


def _find_compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(command[0]) is None:
        raise UnavailableError(f"there is no C++ compiler {command[0]!r} (CXX in the environment names another)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise UnavailableError("Python's headers are not installed (python3-dev, or another name for it, has Python.h)")
    return command


def _find_ninja() -> list[str]:
    if (ninja := shutil.which("ninja")) is not None:
        return [ninja]
    if importlib.util.find_spec("ninja") is not None:  # in an environment that is not activated
        return [sys.executable, "-m", "ninja"]
    raise UnavailableError("ninja is not installed (`pip install ninja`)")


def _find_cuda() -> Cuda:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            nvcc = Path(home) / "bin" / "nvcc"
            where = f"in {variable}={home}"
            break
    else:
        nvcc = Path(shutil.which("nvcc") or "nvcc")
        where = "on the PATH, and neither CUDA_HOME nor CUDA_PATH is set"
    if not nvcc.exists():
        raise UnavailableError(f"there is no nvcc {where}")
    # What is on the PATH may be a link to, or a script that calls, the nvcc of a toolkit that is elsewhere.
    top = re.search(r"TOP=(.+)", _output([nvcc, "--dryrun", "-x", "cu", "-E", os.devnull]))
    version = re.search(r"release (\d+\.\d+)", _output([nvcc, "--version"]))
    if top is None or version is None:
        raise UnavailableError(f"{nvcc} says neither where its toolkit is nor which release: is it NVIDIA's?")
    toolkit = Path(top[1]).resolve()
    places = [toolkit / name for name in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")]
    libraries = next((place for place in places if (place / "libcudart_static.a").exists()), None)
    if libraries is None:
        raise UnavailableError(f"the CUDA toolkit in {toolkit} has no libcudart_static.a")
    return Cuda(nvcc, version[1], _archs(nvcc, version[1]), toolkit / "include", libraries)


def _archs(nvcc: Path, version: str) -> tuple[str, ...]:
    given = os.environ.get("CLOP_CUDA_ARCHS")
    archs = tuple((given or DEFAULT_ARCHS).split(";"))
    # It lists 90 but not 90a, which every nvcc that knows the former has.
    known = {int(number) for number in re.findall(r"sm_(\d+)", _output([nvcc, "--list-gpu-code"]))}
    for arch in archs:
        match = re.fullmatch(r"(\d+)[af]?(\+PTX)?", arch)
        if match is None or int(match[1]) < OLDEST_ARCH or int(match[1]) not in known:
            numbers = ", ".join(str(number) for number in sorted(known) if number >= OLDEST_ARCH)
            expected = f"a list like {DEFAULT_ARCHS} of what nvcc {version} knows: {numbers}"
            if given is None:
                raise UnavailableError(f"the default CLOP_CUDA_ARCHS={DEFAULT_ARCHS} has {arch!r}; set it to {expected}")
            raise SystemExit(f"CLOP_CUDA_ARCHS={given!r} in the environment has {arch!r}: expected {expected}")
    return archs


def _output(command: list[str | Path]) -> str:
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnavailableError(f"`{shlex.join(map(str, command))}` fails: {error}") from None


# ---- building --------------------------------------------------------------------------------------------------------


def build(plan: Plan, target: Path, strip: bool) -> None:
    """Compiles and links what has changed since the last time, and puts the library at ``target``."""
    plan.directory.mkdir(parents=True, exist_ok=True)
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    (plan.directory / "build.ninja").write_text(ninja_file(plan, jobs, strip))
    command = [*plan.ninja, "-C", str(plan.directory), "-j", str(jobs)]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(
            "the native extension did not compile; the compiler's message is above. "
            "CLOP_NATIVE=0 installs the package without it, CLOP_CUDA=0 without its CUDA half"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # a process that has the old one loaded keeps it
    shutil.copyfile(plan.directory / "_native.abi3.so", target)
    print(f"clop_kernels: built {target} ({target.stat().st_size / 1e6:.1f} MB)", flush=True)


def ninja_file(plan: Plan, jobs: int, strip: bool) -> str:
    """The text of build.ninja."""
    cuda = None if isinstance(plan.cuda, str) else plan.cuda
    warnings = ["-Wall", "-Wextra", "-Werror"]
    common = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffunction-sections", "-pthread", *warnings]
    instrument = []
    if plan.sanitize:
        instrument = [f"-fsanitize={plan.sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
    host = [*common, "-O2" if plan.sanitize else "-O3", *instrument]
    host += ["-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)]
    host += ["-DPy_LIMITED_API=0x{:02x}{:02x}0000".format(*OLDEST_PYTHON)]
    # Headers of others are not held to our warnings.
    host += ["-isystem", str(plan.torch / "include"), "-isystem", sysconfig.get_path("include")]
    # Messages of errors name source files: without the directories of the machine that built them.
    host += [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={plan.torch / 'include'}/="]
    link = ["-shared", "-pthread", *instrument]
    link += ["-Wl,--gc-sections", "-Wl,--exclude-libs,ALL", f"-L{plan.torch / 'lib'}"]
    # Nothing of libtorch is referred to by name in a CPU build of torch; in others it leads to the stream (cuda/runtime.cpp).
    link += ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu"]
    device = []
    if strip and not plan.sanitize:
        link += ["-s"]
    if cuda is not None:
        host += [f'-DCLOP_CUDA_VERSION="{cuda.version}"', f'-DCLOP_CUDA_ARCHS="{";".join(cuda.archs)}"']
        host += ["-isystem", str(cuda.include)]
        link += [f"-L{cuda.libraries}", "-lcudart_static", "-ldl", "-lrt"]
        device = ["-std=c++17", "-O3", f"-ccbin={plan.cxx[-1]}", *(f"-Xcompiler={flag}" for flag in common[1:])]
        # Warnings are errors, a kernel that spills registers among them.
        device += ["-Werror=all-warnings", "-Xptxas=--warn-on-spills", f"--threads={min(jobs, len(cuda.archs))}"]
        device += [_gencode(arch) for arch in cuda.archs]
        if tuple(int(part) for part in cuda.version.split(".")) >= (12, 8):
            device += ["--compress-mode=size"]  # a fifth of the size; nothing is unpacked but what a GPU loads

    lines = [
        "ninja_required_version = 1.5",
        # nvcc has threads of its own, one for each architecture.
        f"pool nvcc\n  depth = {max(1, jobs // len(cuda.archs)) if cuda else 1}",
        f"rule cxx\n  command = {_command([*plan.cxx, *host])} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = c++ $in $flags",
        f"rule link\n  command = {_command(plan.cxx)} $in {_command(link)} -o $out\n  description = link $out",
    ]
    if cuda is not None:
        lines += [
            f"rule nvcc\n  command = {_command([str(cuda.nvcc), *device])} -MMD -MF $out.d -c $in -o $out",
            f"  pool = nvcc\n  depfile = $out.d\n  deps = gcc\n  description = nvcc $in, {len(cuda.archs)} architectures",
        ]
    objects = []
    for source, name, flags in _compilations(cuda is not None):
        objects.append(name)
        lines.append(f"build {name}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {_path(source)}\n  flags = {flags}")
    lines.append(f"build _native.abi3.so: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _compilations(with_cuda: bool) -> list[tuple[Path, str, str]]:
    """(source, object, its own flags); the longest first."""
    compilations = []
    if with_cuda:
        compilations += [(source, f"cuda-{source.stem}.cu.o", "") for source in sorted(SOURCES.glob("cuda/*.cu"))]
    levels = LEVELS if platform.machine() == "x86_64" else {"portable": ""}
    for level, flags in levels.items():
        compilations.append((SOURCES / "cpu" / "level.cpp", f"cpu-level-{level}.o", f"-DCLOP_LEVEL={level} {flags}".strip()))
    for folder in ("cpu", "cuda") if with_cuda else ("cpu",):
        for source in sorted(SOURCES.glob(f"{folder}/*.cpp")):
            if source.name != "level.cpp":
                compilations.append((source, f"{folder}-{source.stem}.o", ""))
    return [*compilations, (SOURCES / "registration.cpp", "registration.o", "")]


def _gencode(arch: str) -> str:
    number, plus, _ = arch.partition("+PTX")
    return f"-gencode=arch=compute_{number},code=[sm_{number}{f',compute_{number}' if plus else ''}]"


def _command(arguments: list[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def _path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


# ---- setuptools ------------------------------------------------------------------------------------------------------


def setup_arguments() -> dict[str, Any]:
    """What setup.py adds to pyproject.toml."""
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:  # its own message would not say so
        raise SystemExit(
            f"setuptools {OLDEST_SETUPTOOLS} or newer is needed, and {setuptools.__version__} is installed: "
            f"`pip install --upgrade setuptools`"
        )
    plan = find_plan()

    class BuildPython(build_py):
        def run(self) -> None:
            if isinstance(plan, str):
                print(f"clop_kernels: installing without the native extension: {plan}", flush=True)
            super().run()

    class BuildNative(build_ext):
        def build_extension(self, ext: Extension) -> None:
            assert isinstance(plan, Plan)
            print(f"clop_kernels: {plan.describe()}", flush=True)
            # An editable installation is a developer's, who may want to profile it.
            build(plan, Path(self.get_ext_fullpath(ext.name)), strip=not self.editable_mode)

    class EggInfo(egg_info):
        def finalize_options(self) -> None:
            if local := os.environ.get("CLOP_LOCAL_VERSION"):
                self.tag_build = f"+{local}"  # here, because the setup.cfg of a source distribution overrides options
            super().finalize_options()

    arguments: dict[str, Any] = {"cmdclass": {"build_py": BuildPython, "build_ext": BuildNative, "egg_info": EggInfo}}
    if isinstance(plan, Plan):
        arguments["ext_modules"] = [Extension(EXTENSION, [], py_limited_api=True)]
        arguments["options"] = {"bdist_wheel": {"py_limited_api": "cp{}{}".format(*OLDEST_PYTHON)}}
    return arguments


if __name__ == "__main__":  # what an installation would build
    found = find_plan()
    print(f"no native extension: {found}" if isinstance(found, str) else found.describe())
