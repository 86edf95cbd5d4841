"""The package as a user meets it: the import, the version, the info command, memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

import clop_kernels
from clop_kernels import __main__, backends

from ..support import ROOT

IMPORT_WITH_NOTHING_BUT_TORCH = """
import sys, torch
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "numpy", "scipy", "pandas", "matplotlib", "sklearn", "rich"):
            raise ImportError(name + " is blocked")
before = set(sys.modules)
sys.meta_path.insert(0, Block())
import clop_kernels, clop_kernels.compat
loss = clop_kernels.ntxent_loss(torch.ones(4, 3))
print(float(loss))
"""


def test_import_without_torch_names_the_remedy() -> None:
    script = "import sys; sys.modules['torch'] = None; import clop_kernels"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("torch is not installed: `pip install torch`")


def test_import_needs_nothing_but_torch() -> None:
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_WITH_NOTHING_BUT_TORCH]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(1.0986123)  # log 3


@pytest.mark.parametrize(
    ("file", "pattern"), [("CHANGELOG.md", r"^## (\S+)"), ("CITATION.cff", r"^version: (\S+)$")], ids=["changelog", "citation"]
)
def test_files_name_the_version_of_the_package(file: str, pattern: str) -> None:
    """The version is declared once, in clop_kernels/__init__.py. The changelog's first entry is the newest."""
    named = re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)
    assert named is not None
    assert named[1] == clop_kernels.__version__


def test_metadata_takes_its_version_from_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in text
    assert 'version = { attr = "clop_kernels.__version__" }' in text


def test_hooks_use_the_versions_that_make_installs() -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    hooks = dict(
        re.findall(r"additional_dependencies: \[(ruff|clang-format)==([\d.]+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    )
    assert hooks == {name: pinned[name] for name in ("ruff", "clang-format")}


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    __main__.main(["info"])
    text = capsys.readouterr().out
    for backend in backends.BACKENDS:
        assert backend.name in text
    assert torch.__version__ in text
    assert text.count("<- backend=None takes this") >= 1
    __main__.main(["info", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["clop_kernels"] == clop_kernels.__version__
    assert report["backends"]["cpu"]["tiled"] is None
    assert "CUDA" in report["backends"]["cpu"]["cuda"]


def test_default_is_the_first_that_can_run() -> None:
    cpu = torch.device("cpu")
    runnable = [b for b in backends.BACKENDS if b.obstacle(cpu, torch.float32) is None]
    first = next(b for b in runnable if b.devices is None or "cpu" in b.devices)
    assert backends.select(None, cpu, torch.float32) is first
    assert all(callable(getattr(first.load(), name)) for name in ("forward", "backward"))


@pytest.mark.parametrize(
    ("capability", "preferred"), [((8, 0), "cuda"), ((8, 9), "cuda"), ((9, 0), "triton"), ((10, 0), "triton"), ((12, 0), "cuda")]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_architecture_and_dtype_decide_between_cuda_and_triton(
    capability: tuple[int, int], preferred: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    order = [backend.name for backend in backends.by_preference(torch.device("cuda"), dtype)]
    assert order[0] == ("cuda" if dtype == torch.float32 else preferred)
    assert sorted(order) == sorted(backend.name for backend in backends.BACKENDS)
    assert [name for name in order if name not in ("cuda", "triton")] == ["cpu", "tiled"]


def test_nothing_of_size_n_squared_is_allocated() -> None:
    """An N x N matrix in float32 would take 1.6 GB. Every allocation of both passes is counted."""
    n_rows, width = 20_000, 16
    z = torch.randn(n_rows, width, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        clop_kernels.set_tile_rows(2048)  # a few large tiles make fewer events
        try:
            clop_kernels.ntxent_loss(z).backward()
        finally:
            clop_kernels.set_tile_rows(None)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 2 * 2048 * 2048 * 4 + 6 * n_rows * width * 4
