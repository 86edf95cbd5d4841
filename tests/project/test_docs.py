"""The documentation does what it says: its code runs, its commands run, and it names every environment variable there is."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

import clop_kernels
from benchmarks import providers
from clop_kernels import compat

from ..support import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"
FENCE = re.compile(r"^ *```+(\w*)", re.MULTILINE)


TRAINED = ("lightning_module", "mixed_precision", "sentence_pairs")
"""Examples that tests/examples runs in their short mode: here their commands are parsed alone."""


def run_commands(example: Example) -> None:
    """Runs each line in the root of the repository: examples in their short mode, and with a scratch folder for their output."""
    scratch = example.namespace["scratch"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    for line in str(example.parsed).splitlines():
        command = shlex.split(line, comments=True)
        if not command:
            continue
        scripts = [word for word in command if word.startswith("examples/")]
        if scripts and (name := Path(scripts[0]).stem) in TRAINED:
            importlib.import_module(name).parse_arguments(command[command.index(scripts[0]) + 1 :])
            continue
        if scripts:
            command.append("--short")
        for at, option in enumerate(command):
            if option == "--output":
                command[at + 1] = str(scratch / Path(command[at + 1]).name)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


SYBIL = Sybil(parsers=[PythonCodeBlockParser(), CodeBlockParser("bash", run_commands)])
"""Python blocks of one page share their names, in order; what is not Python or bash is not code that anyone could run."""


@contextmanager
def settings_restored() -> Iterator[None]:
    """A page may change settings of torch; the tests after it must not see that."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="module", autouse=True)
def _libraries() -> None:
    """Those that pages compare with warn when they are imported, and lightly asks for a torchvision that loads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        providers.lightly_loss()
        importlib.import_module("pytorch_metric_learning.losses")


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_every_code_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.stem == "recipes" and not all(map(find_spec, ("lightning", "sentence_transformers"))):
        pytest.skip("the extra `recipes` is not installed")
    document: Document = SYBIL.parse(page)
    document.namespace["scratch"] = tmp_path
    monkeypatch.chdir(tmp_path)
    examples = list(document.examples())
    languages = FENCE.findall(page.read_text())[::2]
    assert all(language in ("python", "bash", "text") for language in languages), f"{page.name} has fences of {set(languages)}"
    assert len(examples) == sum(language != "text" for language in languages)
    with settings_restored():
        for example in examples:
            example.evaluate()


def test_every_file_that_the_readme_links_to_is_there() -> None:
    """Pages are checked when they are built."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)|(?:href|src)=\"(?!https?:)([^\"#]+)", README.read_text())
    assert links
    missing = [path for pair in links if not (ROOT / (path := "".join(pair))).exists()]
    assert not missing


def test_every_environment_variable_is_in_the_table() -> None:
    """Those that Python, C++ or make read; other names that begin so are macros of the C++ sources."""
    read = re.compile(r"""(?:environ(?:\.get)?|getenv|wanted|setting|option)\w*[\[(]\s*["'](CLOP_[A-Z_]+|TRITON_INTERPRET)["']""")
    sources = [*ROOT.glob("setup.py"), *ROOT.glob("tests/host/*.py")]
    for folder, endings in (("clop_kernels", "py"), ("csrc", "cpp"), ("tools", "py"), ("benchmarks", "py")):
        sources += ROOT.glob(f"{folder}/**/*.{endings}")
    found = {name for source in sources for name in read.findall(source.read_text())}
    rows = re.findall(r"^\| `(\w+)", (ROOT / "docs/environment.md").read_text(), re.MULTILINE)
    assert found
    assert len(rows) == len(set(rows))
    assert found <= set(rows)
    assert {row for row in rows if row.startswith("CLOP_")} <= found


def test_every_public_name_is_in_the_interface() -> None:
    documented = re.findall(r"^::: clop_kernels\.(\w+)((?:\.\w+)*)", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in documented if name != "compat") == sorted(clop_kernels.__all__)
    of_other_libraries = {path.split(".")[1] for name, path in documented if name == "compat"}
    assert of_other_libraries == set(compat.__all__)


def test_pages_build_without_a_warning_and_ask_no_other_host(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        built = (tmp_path / f"{page.stem}.html").read_text()
        assert not re.search(r"arithmatex|\$\$|:(?:math|func|class|mod|meth):|^&gt;&gt;&gt; ", built, re.MULTILINE), page.name
        assert not re.search(r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//', built), page.name
        assert not re.search(r'<link[^>]*rel="(?:stylesheet|preconnect|preload)"[^>]*href="(?:https?:)?//', built), page.name
