"""How many kernels Triton compiles, by a stand-in for its driver: :mod:`tests.support.standin`, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from clop_kernels import __main__

from ..support import ROOT

MOST_OF_THE_GPU_TESTS = 400
"""A GPU takes about a second of a core for each. On November 28, 2026 they were 987, and then 335."""


def run(*arguments: str, **environment: str) -> str:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", *arguments]
    environment = os.environ | environment | {"TRITON_INTERPRET": "0"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False).stdout


def test_a_training_compiles_in_its_first_step_alone() -> None:
    """Whatever the loss, the number of rows, the labels and the schedules: a kernel a width and dtype."""
    found: dict[str, Any] = json.loads(run("tests.support.standin", "training"))
    assert found.keys() == {"128 torch.bfloat16", "768 torch.float32"}
    for of_width in found.values():
        assert len(of_width["counts"]) == 50
        assert len(set(of_width["counts"])) == 1, of_width["counts"]
        assert set(of_width["kernels"].values()) == {1}, of_width["kernels"]


@pytest.mark.compiles
def test_the_tests_of_a_gpu_compile_few_variants(tmp_path: Path) -> None:
    """Those that need more than launches fail there, after they have launched; their verdict is not asked for."""
    path = tmp_path / "variants.json"
    chosen = "triton and not sanitizer and not past_2 and not 131072 and not memory_grows"
    options = (
        "-p",
        "tests.support.standin",
        "-m",
        "gpu",
        "tests/contract",
        "tests/gpu/test_losses.py",
        "-k",
        chosen,
        "--tb=no",
        "-p",
        "no:cacheprovider",
    )
    printed = run("pytest", "-q", *options, CLOP_VARIANTS=str(path))
    passed = re.search(r" (\d+) passed", printed)
    assert passed is not None, printed[-2000:]
    assert int(passed[1]) >= 151, printed[-2000:]
    counts = {name: len(keys) for name, keys in json.loads(path.read_text()).items()}
    assert counts.keys() >= {"softmax_kernel", "gradient_kernel", "pair_kernel", "product_kernel", "prototype_kernel"}
    assert 200 < sum(counts.values()) <= MOST_OF_THE_GPU_TESTS, counts


@pytest.mark.compiles
def test_nothing_is_left_to_compile_after_a_warm_up(tmp_path: Path) -> None:
    """Of a width of 16, which compiles fastest, for an H200."""
    cache = {"TRITON_CACHE_DIR": str(tmp_path)}
    printed = run("clop_kernels", "warm-up", "--dims", "16", "--dtype", "bfloat16", "--sm", "90", **cache)
    assert "7 kernels are in Triton's cache" in printed
    assert run("tests.support.standin", "cached", **cache).split() == ["0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "there is no GPU here"),
        (("--jobs", "0"), "0: expected 1 or more"),
        (("--sm", "9000"), "invalid choice: 9000"),
        (("--dtype", "float64"), "invalid choice: 'float64'"),
    ],
    ids=str,
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_warm_up_says_what_is_wrong(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit):
        __main__.main(["warm-up", "--dims", "16", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["1", "true"])
def test_a_warm_up_does_not_take_the_interpreter_for_a_compiler(
    value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", value)
    with pytest.raises(SystemExit):
        __main__.main(["warm-up", "--dims", "16", "--sm", "90"])
    assert "the interpreter compiles nothing" in capsys.readouterr().err
