"""Builds the native extension with ninja: csrc/ becomes clop_kernels/_native.abi3.so. setup.py gets its arguments from here.

The build needs Linux, a C++17 compiler, ninja, and torch >= 2.11 in the same environment (so no build isolation). The CUDA half
also needs nvcc and its static runtime. If something is missing, the build names it and leaves that part out.

``python tools/native_build.py`` prints what an installation would build, and how long it takes.

Environment:
    CLOP_NATIVE: auto (build the extension if possible; the default), 1 (fail with the reason if impossible), 0 (do not build it).
    CLOP_CUDA: the same for the CUDA half.
    CLOP_CUDA_ARCHS: the GPU architectures that nvcc compiles for; ``80;90;100;120+PTX`` by default.
    CLOP_SANITIZE: ``address,undefined`` instruments the host code.
    CLOP_LOCAL_VERSION: ``cu130`` appends ``+cu130`` to the version; tools/build_wheels.py sets it.
    CUDA_HOME or CUDA_PATH: the CUDA toolkit. CXX: the C++ compiler. MAX_JOBS: how many compilers run at the same time.
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
"""The extension is compiled against the stable ABIs of these versions, and runs on them and on every later version."""

OLDEST_SETUPTOOLS = 77  # as in pyproject.toml, which only an isolated build reads

DEFAULT_ARCHS = "80;90;100;120+PTX"
"""Code for 80 runs on every 8.x GPU, and code for 100 also runs on 10.3. "100a" would not, and no kernel needs an "a" yet."""

OLDEST_ARCH = 80
ARCH = r"(\d+)[af]?(\+PTX)?"
"""An item of CLOP_CUDA_ARCHS."""

SECONDS_CPU, SECONDS_PER_ARCH = 10, 20
"""About how long a build takes on 2 cores: measured 9 s without the CUDA half, 85 s with four architectures."""

LEVELS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512",
}
"""SIMD level -> the compiler flags of csrc/cpu/level.cpp. Machines other than x86-64 have only the first level."""

HOW_TO_BUILD = "`pip install --no-build-isolation .` builds it, with torch, ninja and setuptools >= 77 installed"


class UnavailableError(Exception):
    """Something cannot be built here; the message gives the reason and the remedy."""


# ---- finding the tools -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit, and the architectures to compile for.

    Attributes:
        nvcc: the compiler.
        version: the toolkit's version, "13.0".
        archs: the architectures of CLOP_CUDA_ARCHS, ("80", "90", "120+PTX").
        include: the folder of the headers.
        libraries: the folder of libcudart_static.a.
    """

    nvcc: Path
    version: str
    archs: tuple[str, ...]
    include: Path
    libraries: Path

    @property
    def tag(self) -> str:
        """The local version of a wheel: cu130 for CUDA 13.0."""
        return "cu" + self.version.replace(".", "")


@dataclass(frozen=True)
class Plan:
    """The tools and settings of one build.

    Attributes:
        cxx: the command of the C++ compiler.
        ninja: the command of ninja.
        torch: torch's folder.
        torch_version: torch's version.
        cuda: the CUDA toolkit, or the reason why the CUDA half is not built.
        sanitize: the value of CLOP_SANITIZE, or empty.
    """

    cxx: list[str]
    ninja: list[str]
    torch: Path
    torch_version: str
    cuda: Cuda | str
    sanitize: str

    @property
    def directory(self) -> Path:
        """The build directory. Every variant has its own, because their object files differ."""
        parts = ["native-torch{}.{}".format(*OLDEST_TORCH)]
        parts += ["cpu"] if isinstance(self.cuda, str) else [self.cuda.tag, *self.cuda.archs]
        parts += self.sanitize.split(",") if self.sanitize else []
        return ROOT / "build" / "-".join(parts)

    def describe(self) -> str:
        """What will be built and about how long it takes, for a person."""
        text = f"building the native extension against torch {self.torch_version} with {shlex.join(self.cxx)}"
        if isinstance(self.cuda, str):
            return f"{text}, in about {SECONDS_CPU} seconds; without its CUDA half: {self.cuda}"
        n_archs = len(self.cuda.archs)
        text += f", and with {self.cuda.nvcc} (CUDA {self.cuda.version}) for {';'.join(self.cuda.archs)}"
        text += f", in about {SECONDS_CPU + n_archs * SECONDS_PER_ARCH} seconds on 2 cores"
        if _is_cpu_build(self.torch) and os.environ.get("CLOP_CUDA") != "1":
            text += ". This torch is a CPU build, which cannot run CUDA kernels: CLOP_CUDA=0 leaves them out"
        return text


def find_plan() -> Plan | str:
    """The plan of the native extension, or the reason why it is not built."""
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


def find_cuda(home: str | None = None, archs: str | None = None) -> Cuda | str:
    """The toolkit to build the CUDA half with, or the reason why it is not built.

    Args:
        home, archs: --cuda-home and --archs of tools/build_wheels.py. They take precedence over the environment, and an error
            then names the option.
    """
    wanted = _wanted("CLOP_CUDA") if home is None else "1"
    if wanted == "0":
        return "CLOP_CUDA=0"
    try:
        return _find_cuda(home, archs)
    except UnavailableError as reason:
        if wanted == "1":
            given = "CLOP_CUDA=1, but" if home is None else f"--cuda-home {home}:"
            raise SystemExit(f"{given} the CUDA kernels cannot be built: {reason}") from None
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


def _is_cpu_build(torch: Path) -> bool:
    """Reads the file, because importing torch takes seconds."""
    version = torch / "version.py"
    return version.exists() and re.search(r"^cuda\b[^=]*= None", version.read_text(), re.MULTILINE) is not None


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


def _find_cuda(home: str | None, archs: str | None) -> Cuda:
    homes = {"--cuda-home": home, "CUDA_HOME": os.environ.get("CUDA_HOME"), "CUDA_PATH": os.environ.get("CUDA_PATH")}
    name = next((name for name, value in homes.items() if value), None)
    if name is None:
        nvcc = Path(shutil.which("nvcc") or "nvcc")
        where = "on the PATH, and neither CUDA_HOME nor CUDA_PATH is set"
    else:
        nvcc = Path(homes[name] or "") / "bin" / "nvcc"
        where = f"at {nvcc}" if name == "--cuda-home" else f"in {name}={homes[name]}"
    if not nvcc.exists():
        raise UnavailableError(f"there is no nvcc {where}")
    # The nvcc on the PATH may be a link or a script that leads to a toolkit elsewhere.
    top = re.search(r"TOP=(.+)", _output([nvcc, "--dryrun", "-x", "cu", "-E", os.devnull]))
    version = re.search(r"release (\d+\.\d+)", _output([nvcc, "--version"]))
    if top is None or version is None:
        raise UnavailableError(f"{nvcc} does not tell its toolkit's folder and release: is it NVIDIA's nvcc?")
    toolkit = Path(top[1]).resolve()
    places = [toolkit / name for name in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")]
    libraries = next((place for place in places if (place / "libcudart_static.a").exists()), None)
    if libraries is None:
        raise UnavailableError(f"the CUDA toolkit in {toolkit} has no libcudart_static.a")
    return Cuda(nvcc, version[1], _archs(nvcc, version[1], archs), toolkit / "include", libraries)


def _archs(nvcc: Path, version: str, option: str | None) -> tuple[str, ...]:
    given = option or os.environ.get("CLOP_CUDA_ARCHS")
    archs = tuple((given or DEFAULT_ARCHS).split(";"))
    # The list has 90 but not 90a, which every nvcc that knows 90 also has.
    known = {int(number) for number in re.findall(r"sm_(\d+)", _output([nvcc, "--list-gpu-code"]))}
    for arch in archs:
        match = re.fullmatch(ARCH, arch)
        if match is None or int(match[1]) < OLDEST_ARCH or int(match[1]) not in known:
            numbers = ", ".join(str(number) for number in sorted(known) if number >= OLDEST_ARCH)
            expected = f"a list like {DEFAULT_ARCHS} of architectures that nvcc {version} knows: {numbers}"
            if given is None:
                raise UnavailableError(f"the default CLOP_CUDA_ARCHS={DEFAULT_ARCHS} has {arch!r}; set it to {expected}")
            name = f"--archs {given!r}" if option else f"CLOP_CUDA_ARCHS={given!r} in the environment"
            raise SystemExit(f"{name} has {arch!r}: expected {expected}")
    return archs


def _output(command: list[str | Path]) -> str:
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnavailableError(f"`{shlex.join(map(str, command))}` fails: {error}") from None


# ---- building --------------------------------------------------------------------------------------------------------


def build(plan: Plan, target: Path, strip: bool) -> None:
    """Compiles and links the sources that have changed since the last build, and copies the library to ``target``."""
    plan.directory.mkdir(parents=True, exist_ok=True)
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    (plan.directory / "build.ninja").write_text(ninja_file(plan, jobs, strip))
    command = [*plan.ninja, "-C", str(plan.directory), "-j", str(jobs)]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(
            "the native extension did not compile; the compiler's message is above. "
            "CLOP_NATIVE=0 installs the package without the extension, CLOP_CUDA=0 without its CUDA half"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # a process that has loaded the old library keeps it
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
    # -isystem: our warnings do not apply to the headers of others.
    host += ["-isystem", str(plan.torch / "include"), "-isystem", sysconfig.get_path("include")]
    # Error messages name source files. This removes the folders of the build machine from them.
    host += [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={plan.torch / 'include'}/="]
    link = ["-shared", "-pthread", *instrument]
    link += ["-Wl,--gc-sections", "-Wl,--exclude-libs,ALL", f"-L{plan.torch / 'lib'}"]
    # No symbol of libtorch is used by name in a CPU build of torch. In a CUDA build it leads to the stream (cuda/runtime.cpp).
    link += ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu"]
    device = []
    if strip and not plan.sanitize:
        link += ["-s"]
    if cuda is not None:
        host += [f'-DCLOP_CUDA_VERSION="{cuda.version}"', f'-DCLOP_CUDA_ARCHS="{";".join(cuda.archs)}"']
        host += ["-isystem", str(cuda.include)]
        link += [f"-L{cuda.libraries}", "-lcudart_static", "-ldl", "-lrt"]
        device = ["-std=c++17", "-O3", f"-ccbin={plan.cxx[-1]}", *(f"-Xcompiler={flag}" for flag in common[1:])]
        # Every warning is an error, also the warning about a kernel that spills registers.
        device += ["-Werror=all-warnings", "-Xptxas=--warn-on-spills", f"--threads={min(jobs, len(cuda.archs))}"]
        device += [_gencode(arch) for arch in cuda.archs]
        if tuple(int(part) for part in cuda.version.split(".")) >= (12, 8):
            device += ["--compress-mode=size"]  # a fifth of the size; only the code that a GPU loads is unpacked

    lines = [
        "ninja_required_version = 1.5",
        # nvcc starts one thread for each architecture.
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
    """(source, object, extra flags) of each compilation; those that take longest come first."""
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
    """The arguments that setup.py adds to pyproject.toml."""
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
            # Editable installations keep their symbols, because developers profile them.
            build(plan, Path(self.get_ext_fullpath(ext.name)), strip=not self.editable_mode)

    class EggInfo(egg_info):
        def finalize_options(self) -> None:
            if local := os.environ.get("CLOP_LOCAL_VERSION"):
                self.tag_build = f"+{local}"  # set here, because the setup.cfg of a source distribution overrides options
            super().finalize_options()

    arguments: dict[str, Any] = {"cmdclass": {"build_py": BuildPython, "build_ext": BuildNative, "egg_info": EggInfo}}
    if isinstance(plan, Plan):
        arguments["ext_modules"] = [Extension(EXTENSION, [], py_limited_api=True)]
        arguments["options"] = {"bdist_wheel": {"py_limited_api": "cp{}{}".format(*OLDEST_PYTHON)}}
    return arguments


if __name__ == "__main__":
    found = find_plan()
    print(f"no native extension: {found}" if isinstance(found, str) else found.describe())
