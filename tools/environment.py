"""Installs what a target of make needs into the environment that runs this: ``python tools/environment.py GROUP``.

GROUP is an extra of pyproject.toml, or ``all`` for the extras of ALL. ``package`` means torch, the build tools and this checkout,
which is compiled and installed in place. Every step is printed before it starts, because the first one downloads a lot.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
ALL = ("test", "bench", "demo", "dev", "docs", "recipes", "wheels")
BUILD = ("torch", "ninja", "setuptools>=77")  # a build without isolation takes them from the environment


def main(group: str) -> None:
    """Installs one group. Parallel targets of make wait for each other, because pip must not run twice in one environment."""
    with (Path(sys.prefix) / "installing").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if group == "package":
            say(f"installing {', '.join(BUILD)}; PyPI's torch for Linux brings the CUDA libraries, some gigabytes")
            install(BUILD)
            run(str(ROOT / "tools" / "native_build.py"))  # says what is built, and how long it takes
            say("installing this checkout in place")
            pip("--no-deps", "--no-build-isolation", "--editable", str(ROOT))
        else:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            requirements = sorted({requirement for name in (ALL if group == "all" else [group]) for requirement in extras[name]})
            say(f"installing the group `{group}`: {', '.join(requirements)}")
            install(requirements)


def install(requirements: list[str] | tuple[str, ...]) -> None:
    """In the versions of constraints.txt. A torch that requires a Triton of its own keeps that."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    if "torch" in requirements or torch_requires_triton():
        lines = [line for line in lines if not line.startswith("triton")]
    constraints = Path(sys.prefix) / "constraints.txt"
    constraints.write_text("\n".join([*lines, ""]))
    pip("--constraint", str(constraints), *requirements)


def torch_requires_triton() -> bool:
    """True of PyPI's torch for Linux; false of the CPU build, to which constraints.txt adds a version of Triton."""
    try:
        required = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        return False
    return any(requirement.startswith("triton==") for requirement in required)


def pip(*arguments: str) -> None:
    run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)


def run(*arguments: str) -> None:
    status = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False).returncode
    if status != 0:
        raise SystemExit(status)


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit(130) from None
