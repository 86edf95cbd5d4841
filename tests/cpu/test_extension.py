"""The compiled extension: its SIMD levels, the accuracy of its exponential, threads, memory, wrong calls."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import clop_kernels
from clop_kernels.backends import contract, extension
from clop_kernels.backends.contract import NUMBERS, LossOptions, Number
from clop_kernels.backends.extension import native_options
from clop_kernels.groups import label_groups

from ..support import ROOT
from ..support.oracle import (
    Problem,
    assert_accurate,
    assert_pairs_accurate,
    named_options,
    negatives_problem,
    random_problem,
    relative_error,
    two_sided_problem,
)

pytestmark = pytest.mark.skipif(extension.obstacle() is not None, reason=f"no compiled extension: {extension.obstacle()}")

LEVELS = ("portable", "avx2", "avx512")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CLOP_SIMD", request.param)
    try:
        torch.ops.clop_native.build_info()
    except RuntimeError as error:
        pytest.skip(f"this CPU has no {request.param}: {error}")
    return str(request.param)


@pytest.mark.parametrize("positives", ["instance", "label"])
@pytest.mark.parametrize("shape", [(2, 1, 4), (1, 70, 5), (3, 43, 37), (2, 333, 130), (2, 40, 600)], ids=str)
def test_every_level_is_right(shape: tuple[int, int, int], positives: str, level: str) -> None:
    for temperature in (0.01, 0.1):
        for distance in ("cosine", "euclidean", "manhattan"):
            assert_right(random_problem(*shape, temperature=temperature, positives=positives, distance=distance))


@pytest.mark.parametrize(
    "problem",
    [
        two_sided_problem(333, 333, 37, labelled=False),
        two_sided_problem(70, 900, 20, labelled=True),
        two_sided_problem(700, 3, 20, labelled=True),
        negatives_problem(333, 20),
    ],
)
def test_every_level_is_right_of_two_sides_and_of_negatives(problem: Problem, level: str) -> None:
    for temperature in (0.01, 0.1):
        for normalize in (True, False):
            assert_right(replace(problem, temperature=temperature).with_options(normalize=normalize))


@pytest.mark.parametrize("sides", [(333, None), (333, 70), (700, 660), (403, 3)], ids=str)
def test_every_level_is_right_of_pairs_alone(sides: tuple[int, int | None], level: str) -> None:
    for temperature, normalize in itertools.product((0.01, 0.1), (True, False)):
        for dtype, width in ((torch.float64, 37), (torch.float32, 128), (torch.float16, 20)):
            assert_pairs_accurate("cpu", dtype, *sides, width, temperature=temperature, normalize=normalize)


def assert_right(problem: Problem) -> None:
    assert_accurate(problem, "cpu", ill_conditioned=problem.options.get("normalize") is False)
    exact, expected = problem.solve("cpu", torch.float64), problem.solve("reference", torch.float64)
    for name, value in expected.items():
        assert relative_error(exact[name], value, 1.0) < 1e-10, name


@pytest.mark.parametrize(("dtype", "lowest", "highest"), [(torch.float32, -126, 127.49), (torch.float64, -1022, 1023.49)])
def test_exp2_to_its_stated_accuracy(dtype: torch.dtype, lowest: float, highest: float, level: str) -> None:
    """Over the range whose result is a normal number, against float64 (and for float64, against the integer part split off)."""
    x = torch.cat([torch.linspace(lowest, highest, 2_000_001), torch.linspace(-1, 1, 200_001)]).to(dtype)
    whole = x.double().round()
    mantissa = torch.exp2(x.double() - whole)  # in [0.7, 1.42]
    actual = torch.ldexp(torch.ops.clop_native.cpu_exp2(x).double(), -whole)  # exact
    ulp = torch.finfo(dtype).eps * torch.where(mantissa < 1, 0.5, 1.0)
    allowed = 1.5 if level == "portable" else 1.0  # without fused multiply-adds each step rounds twice
    assert float(((actual - mantissa).abs() / ulp).max()) <= allowed + (dtype == torch.float64)  # the reference's own ulp
    assert torch.ops.clop_native.cpu_exp2(torch.tensor([torch.nan], dtype=dtype)).isnan()


@pytest.mark.parametrize(
    "problem",
    [
        random_problem(2, 1000, 40, positives="instance"),
        random_problem(2, 1000, 40, positives="label"),
        two_sided_problem(1000, 1000, 40, labelled=False),
        two_sided_problem(300, 2000, 40, labelled=True),
        two_sided_problem(2000, 300, 40, labelled=True),
    ],
)
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_any_number_of_threads_gives_the_same_bits(problem: Problem, temperature: float) -> None:
    problem = replace(problem, temperature=temperature)
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        try:
            results += [problem.solve("cpu", torch.float32), problem.solve("cpu", torch.float32)]
        finally:
            torch.set_num_threads(1)
    for name, value in results[0].items():
        assert all(torch.equal(other[name], value) for other in results[1:]), name


@pytest.mark.parametrize("n_left", [None, 300, 2000])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_any_number_of_threads_gives_the_same_bits_of_pairs_alone(n_left: int | None, temperature: float) -> None:
    n = 2300
    groups = label_groups(torch.arange(n) % 7, 1, n_left).table()
    zhat, coefficients = torch.nn.functional.normalize(torch.randn(n, 40), dim=1), torch.rand(4, n)
    options = native_options(LossOptions(temperature).of_pairs(n_left))
    softmax, gradient = torch.ops.clop_native.cpu_pair_softmax, torch.ops.clop_native.cpu_pair_gradient
    results = [
        (*softmax(zhat, groups, *options, 0, threads), gradient(zhat, groups, coefficients, *options, 0, threads))
        for threads in (1, 2, 2, 7, 7)
    ]
    for result in results[1:]:
        assert all(torch.equal(actual, expected) for actual, expected in zip(result, results[0], strict=True))


def test_half_precision_conversions_are_those_of_torch() -> None:
    """zhat is rounded as torch rounds it: one row per float16 and bfloat16 number, its direction +-1."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        z = torch.stack([every, torch.ones_like(every)], dim=1)[every.isfinite()].unsqueeze(1).flatten(0, 1)[:4000]
        loss, zhat = _forward(z)
        assert loss.isfinite()
        expected = z.float() / z.float().norm(dim=1, keepdim=True)
        torch.testing.assert_close(zhat, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


def _forward(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    empty = torch.empty((3, 0), dtype=torch.int32)
    options = native_options(LossOptions(compute_dtype=z.dtype))
    loss, zhat, *_ = torch.ops.clop_native.cpu_forward(z, empty, None, None, *options, 0, 1)
    return loss, zhat


# ---- what is declared twice ----------------------------------------------------------------------------------------------

SCHEMA_TYPES = {Number: "float", int: "int", str: "int", torch.dtype: "int", bool: "bool", int | None: "int"}
"""Of LossOptions, and what torch calls the type of the argument that stands for it; a dtype is an int to it."""


def all_operators() -> list[str]:
    info = extension.build_info()
    names = ["cpu_forward", "cpu_backward", "cpu_pair_softmax", "cpu_pair_gradient"]
    if info is not None and info["cuda"] is not None:
        names += ["cuda_" + name for name in CUDA_OPERATORS]
    return names


CUDA_OPERATORS = (
    "groups", "prologue", "forward", "backward", "prototype_gradient", "pair_softmax", "pair_gradient", "pair_coefficients",
    "panel_softmax", "panel_loss", "coefficients", "panel_pairs", "panel_finish",
)  # fmt: skip


def test_every_operator_takes_the_options_that_python_declares() -> None:
    declared = [(name, SCHEMA_TYPES[kind]) for name, kind in get_type_hints(LossOptions).items()]
    after = {"cpu": ["tile_rows", "n_threads"], "cuda": [*(f"{name}_tensor" for name in NUMBERS), "is_tf32"]}
    for operator in all_operators():
        schema = getattr(torch.ops.clop_native, operator).default._schema.arguments
        names = [argument.name for argument in schema]
        first = names.index("temperature")
        options = schema[first : first + len(declared)]
        assert [(argument.name, str(argument.type)) for argument in options] == declared, operator
        assert names[first + len(declared) :] == after[operator.partition("_")[0]], operator
        assert all(str(argument.type) != "float" for argument in schema[:first]), operator


def test_constants_are_those_of_python() -> None:
    constants = json.loads(torch.ops.clop_native.constants())
    names = ("EPS", "LOG2_E", "FLOAT16_SCALE")
    choices = ("POSITIVES", "DISTANCES", "REDUCTIONS")
    assert constants == {
        **{name: getattr(contract, name) for name in names},
        **{name: list(getattr(contract, name)) for name in choices},
        "LARGEST_UNSHIFTED_LOGIT": [contract.LARGEST_UNSHIFTED_LOGIT[dtype] for dtype in (torch.float32, torch.float64)],
    }
    assert set(contract.CHOICES.values()) == {getattr(contract, name) for name in choices}


def test_how_options_are_packed() -> None:
    options = LossOptions(0.3, 0.5, positives="label", distance="manhattan", reduction="none", compute_dtype=torch.float16)
    packed: dict[str, Any] = {
        "temperature": 0.3,
        "prototype_weight": 0.5,
        "positives": 1,
        "distance": 2,
        "reduction": 2,
        "n_left": -1,
    }
    assert named_options(options) | packed == named_options(options)
    on_device = options._replace(prototype_weight=torch.tensor(0.5), n_left=3)
    packed |= {"prototype_weight": 0.0, "n_left": 3, "compute_dtype": torch.float16}
    assert named_options(on_device) | packed == named_options(on_device)
    assert extension.number_tensors(on_device) == (None, on_device.prototype_weight)


# ---- wrong calls -----------------------------------------------------------------------------------------------------------


WRONG_CALLS = [
    ({"n_views": 3}, "expected \\(n_views \\* B, D\\)"),
    ({"temperature": 0.0}, "out of its range"),
    ({"distance": 3}, "distance: expected 0, 1 or 2"),
    ({"reduction": -1}, "reduction: expected 0, 1 or 2"),
    ({"positives": 2}, "positives: expected 0 or 1"),
    ({"n_threads": 0}, "out of its range"),
    ({"n_left": 3}, "n_left: expected"),
    ({"n_left": -2}, "n_left: expected"),
    ({"n_left": 9, "positives": 1, "groups": torch.zeros((3, 8), dtype=torch.int32)}, "n_left: expected"),
    ({"compute_dtype": torch.int32}, "compute_dtype: expected float64"),
    ({"positives": 1, "groups": torch.full((3, 8), 9, dtype=torch.int32)}, "groups holds an index"),
    ({"positives": 1, "groups": torch.zeros((3, 7), dtype=torch.int32)}, "groups has the wrong"),
    ({"positives": 1}, "groups has the wrong"),
    ({"labels": torch.full((4,), 2), "prototypes": torch.eye(2, 4)}, "a value without a prototype"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels has the wrong"),
    ({"prototypes": torch.eye(2, 3)}, "prototypes has the wrong"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_CALLS)
def test_a_wrong_call_of_the_operator_is_an_exception(wrong: dict[str, object], message: str) -> None:
    right = {
        "embeddings": torch.randn(8, 4), "groups": torch.empty((3, 0), dtype=torch.int32), "labels": None, "prototypes": None,
        **named_options(LossOptions(prototype_weight=1.0, n_views=2)), "tile_rows": 0, "n_threads": 1,
    }  # fmt: skip
    torch.ops.clop_native.cpu_forward(*right.values())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.clop_native.cpu_forward(*(right | wrong).values())


WRONG_CALLS_OF_PAIRS = [
    ({"zhat": torch.randn(8)}, "zhat: expected"),
    ({"zhat": torch.randn(4, 8).T}, "zhat: expected"),
    ({"zhat": torch.randn(8, 0)}, "zhat: expected"),
    ({"zhat": torch.zeros((8, 4), dtype=torch.int32)}, "zhat: expected a tensor of compute_dtype"),
    ({"compute_dtype": torch.int32}, "compute_dtype: expected float64"),
    ({"positives": 0}, "out of its range"),
    ({"n_views": 2}, "out of its range"),
    ({"negatives_only": True}, "out of its range"),
    ({"groups": torch.empty((3, 0), dtype=torch.int32)}, "groups has the wrong"),
    ({"groups": torch.zeros(3, 8)}, "groups has the wrong"),
    ({"groups": torch.full((3, 8), 9, dtype=torch.int32)}, "groups holds an index"),
    ({"groups": torch.full((3, 8), -1, dtype=torch.int32), "n_left": -1}, "groups holds an index"),
    ({"coefficients": torch.zeros(3, 8)}, "coefficients has the wrong"),
    ({"coefficients": torch.zeros((4, 8), dtype=torch.float64)}, "coefficients has the wrong"),
    ({"temperature": 0.0}, "out of its range"),
    ({"temperature": torch.nan}, "out of its range"),
    ({"n_left": 0}, "n_left: expected"),
    ({"n_left": 8}, "n_left: expected"),
    ({"n_left": 9}, "n_left: expected"),
    ({"n_left": -2}, "n_left: expected"),
    ({"tile_rows": -1}, "out of its range"),
    ({"n_threads": 0}, "out of its range"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_CALLS_OF_PAIRS)
def test_a_wrong_call_of_the_passes_over_pairs_is_an_exception(wrong: dict[str, object], message: str) -> None:
    groups = torch.full((3, 8), 99, dtype=torch.int32)
    groups[1:, :3] = 5  # of the left rows; the order, and what is on the right, nobody reads
    right = {
        "zhat": torch.randn(8, 4), "groups": groups, "coefficients": torch.rand(4, 8),
        **named_options(LossOptions().of_pairs(3)), "tile_rows": 0, "n_threads": 1,
    }  # fmt: skip
    softmax, gradient = torch.ops.clop_native.cpu_pair_softmax, torch.ops.clop_native.cpu_pair_gradient
    assert gradient(**right).isfinite().all()
    with pytest.raises(RuntimeError, match=message):
        gradient(**right | wrong)
    without_coefficients = {name: value for name, value in (right | wrong).items() if name != "coefficients"}
    if "coefficients" in wrong:
        assert all(x.shape == (3,) and x.isfinite().all() for x in softmax(**without_coefficients))
    else:
        with pytest.raises(RuntimeError, match=message):
            softmax(**without_coefficients)


def test_an_unknown_level_is_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOP_SIMD", "sse9")
    with pytest.raises(RuntimeError, match=r"CLOP_SIMD='sse9' in the environment: expected one of .*portable"):
        clop_kernels.ntxent_loss(torch.randn(4, 3), backend="cpu")


OUT_OF_MEMORY = """
import resource, torch, clop_kernels
z = torch.randn(400_000, 128)
clop_kernels.ntxent_loss(torch.randn(4, 3), backend="cpu")
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000, used + 300_000_000))
try:
    clop_kernels.ntxent_loss(z, backend="cpu")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_memory_that_is_not_to_be_had_is_an_exception() -> None:
    command = [sys.executable, "-W", "ignore", "-c", OUT_OF_MEMORY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "out of memory" in done.stdout


BROKEN = """
import sys, warnings
import torch, importlib.util
import clop_kernels.backends.extension as extension
extension._EXTENSION = "broken_extension"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import clop_kernels
    a, b = clop_kernels.ntxent_loss(torch.ones(4, 3)), clop_kernels.ntxent_loss(torch.ones(4, 3))
print(float(a), len([w for w in caught if "does not load" in str(w.message)]), extension.obstacle())
"""


def test_an_extension_that_does_not_load_warns_once_and_breaks_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken_extension.py").write_text("raise ImportError('GLIBC_2.99 not found')")
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]" + BROKEN,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    value, n_warnings, reason = done.stdout.split(maxsplit=2)
    assert float(value) == pytest.approx(1.0986123)  # log 3
    assert n_warnings == "1"
    assert "GLIBC_2.99 not found" in reason
