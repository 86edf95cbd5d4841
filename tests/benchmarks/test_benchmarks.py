"""The benchmarks: what they refuse to time, what they keep, and what they make of it. Nothing here asserts on a time."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from torch import Tensor

from benchmarks import compare, measure, providers, report, resources, resources_cuda, sass, targets
from benchmarks.measure import Outcome
from benchmarks.problems import DTYPES, MODES, PROBLEMS, Case
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.results import Environment, Row, find, markdown_table, memory_ratio, ratio, read_csv, write_csv
from benchmarks.scaling import PowerLaw, memory_law, representative, series_over, time_law
from benchmarks.sweeps import PRESETS, Sweep
from clop_kernels.backends import extension

from ..support import ROOT

CPU = torch.device("cpu")
ENVIRONMENT = Environment("cpu", "a CPU, 2 threads", "2.13.0", "3.11.7", "", "", "", "abc1234", "2026-11-26T10:00:00+00:00")
SMALL = Case(32, 8)


@pytest.fixture(autouse=True)
def _no_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds, and no test asks for it."""
    monkeypatch.setattr(measure, "matrix_tflops", lambda device, dtype: 0.2)


def provider(name: str, change: Callable[[Tensor], Tensor] = lambda loss: loss, pair_arrays: float = 0.0) -> Provider:
    """The plain NT-Xent, with its loss changed."""

    def function(embeddings: Tensor, temperature: float) -> Tensor:
        return change(PROBLEMS["ntxent"].plain(embeddings, temperature))

    return Provider(name, name, "torch", {"ntxent": function}, lambda device, dtype: None, pair_arrays)


def comparison() -> compare.Comparison:
    return compare.Comparison(CPU, ENVIRONMENT, Progress(disable=True))


def synthetic(cases: Iterable[Case], environment: Environment = ENVIRONMENT) -> list[Row]:
    """Rows of known laws: "eager" takes N^2 time and memory and does not fit beyond N = 4096, "cpu" N^2 time and N memory."""
    rows = []
    for case in cases:
        for name, factor, mb in (("eager", 10.0, 16 * (case.N / 1024) ** 2), ("cpu", 1.0, case.N / 64)):
            row = Row(name, "1.0", name == "cpu", case, environment, predicted_mb=mb, matrix_tflops=0.2)
            rows.append(row)
            if name == "eager" and case.N > 4096:
                row.note = f"skipped: needs about {mb:,.0f} MB, more than 60% of 100 MB available"
            else:
                row.seconds = [factor * noise * 1e-3 * (case.N / 1024) ** 2 for noise in (1.0, 1.25, 1.5)]
                row.peak_extra_mb = mb
    return rows


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_a_sweep_is_the_product_of_its_values() -> None:
    sweep = Sweep((64, 128), (8, 16), ("ntxent", "supcon"), ("float32", "bfloat16"), (0.1, 0.5), MODES)
    cases = list(sweep.cases())
    assert len(cases) == len(set(cases)) == 2 * 2 * 2 * 2 * 2 * 3
    assert Case(128, 16, "supcon", "bfloat16", "backward", 0.5) in cases
    assert [case.N for case in cases[:2]] == [64, 128]


def test_presets_name_what_there_is() -> None:
    for sweeps in PRESETS.values():
        for sweep in sweeps:
            assert set(sweep.problems) <= set(PROBLEMS)
            assert set(sweep.dtypes) <= set(DTYPES)
            assert set(sweep.providers or ()) <= set(PROVIDERS)


@pytest.mark.parametrize(
    "case", [replace(SMALL, problem=name, dtype=d) for name in PROBLEMS for d in ("float64", "float32")], ids=str
)
def test_all_providers_compute_the_same(case: Case) -> None:
    others = [p for p in PROVIDERS.values() if p.name != "triton" and not p.compiles_per_shape]  # an interpreter; its own tests
    able = [p for p in others if p.obstacle(CPU, DTYPES[case.dtype]) is None]
    run = comparison()
    steps = run.prepare(case, able)
    assert {"eager", "tiled"} <= set(steps) or case.problem == "sigmoid"
    assert [row.note for row in run.rows] == [""] * len(run.rows)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_computes_its_mode(mode: str) -> None:
    case = replace(SMALL, mode=mode)  # type: ignore[arg-type]
    inputs = case.make_inputs(CPU)
    plain = PROBLEMS["ntxent"].plain(*inputs, case.temperature)
    (gradient,) = torch.autograd.grad(plain, inputs)
    step = measure.step(provider("plain"), case, inputs)
    for _ in range(2):
        step.prepare()
        step()
        outcome = Outcome.of("plain", step)
        assert torch.equal(outcome.loss, plain.detach().double())
        assert len(outcome.gradients) == (0 if mode == "forward" else 1)
        assert all(torch.equal(found, gradient.double()) for found in outcome.gradients)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda loss: loss * 1.001, "loss of other"),
        (lambda loss: loss + (loss * 1.01 - (loss * 1.01).detach()), "gradient of other"),
        (lambda loss: loss * torch.nan, "loss of other"),
    ],
    ids=["wrong loss", "wrong gradient", "nan"],
)
def test_what_differs_is_timed_and_counts_nowhere(change: Callable[[Tensor], Tensor], what: str) -> None:
    run = comparison()
    rows = run.run(SMALL, [provider("right"), provider("other", change), provider("too")], repeats=2)
    assert [len(row.seconds) for row in rows] == [2, 2, 2]
    assert rows[1].note.startswith(f"wrong: {what} on {SMALL}")
    assert ratio(rows[1], rows[0]) is ratio(rows[0], rows[1]) is rows[1].share_of_matrix_rate() is None
    assert rows[0].note == rows[2].note == ""


def test_what_would_not_fit_is_not_run() -> None:
    def must_not_run(loss: Tensor) -> Tensor:
        raise AssertionError("it ran")

    case = replace(SMALL, N=64)
    too_large = provider("large", must_not_run, pair_arrays=1e12)
    rows = comparison().run(case, [provider("small"), too_large], repeats=1)
    assert rows[1].note.startswith("skipped: needs about 16,384,000,000 MB")
    assert rows[1].predicted_mb == pytest.approx((1e12 * 64**2 + measure.ROW_ARRAYS * 64 * 8) * 4e-6)
    assert (rows[1].seconds, rows[1].peak_extra_mb) == ([], None)
    assert len(rows[0].seconds) == 1


def test_a_library_that_is_not_installed_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.losses", None)
    providers._metric_learning.cache_clear()
    reason = PROVIDERS["metric-learning"].obstacle(CPU, torch.float32)
    assert reason is not None
    assert "pip install pytorch-metric-learning" in reason


def test_rounds_end_with_their_time() -> None:
    inputs = SMALL.make_inputs(CPU)
    steps = {"plain": measure.step(provider("plain"), SMALL, inputs)}
    assert len(measure.alternate(steps, repeats=3)["plain"]) == 3
    assert len(measure.alternate(steps, repeats=3, most_seconds=0.0)["plain"]) == 1


# ---- the command -----------------------------------------------------------------------------------------------------


def run_command(*arguments: str, folder: Path) -> tuple[int, list[Row]]:
    status = compare.main([*arguments, "--device", "cpu", "--output", str(folder)])
    return status, read_csv(folder.glob("*-compare.csv"))


def test_command_writes_every_column(tmp_path: Path) -> None:
    status, rows = run_command(
        *("--rows", "32", "64", "--dim", "8", "--mode", "forward", "backward"),
        *("--repeats", "2", "--providers", "eager", "tiled"),
        folder=tmp_path,
    )
    assert status == 0
    assert len(rows) == 2 * 2 * 2
    assert all(len(row.seconds) == 2 and row.note == "" for row in rows)
    (path,) = tmp_path.glob("*.csv")
    with path.open(newline="") as file:
        header, first, *_ = csv.reader(file)
    wanted = {"provider", "N", "D", "dtype", "mode", "median_ms", "q25_ms", "q75_ms", "peak_extra_mb"}
    assert wanted | {"device", "torch", "triton", "cuda", "driver", "commit", "date"} <= set(header)
    columns = dict(zip(header, first, strict=True))
    assert all(columns[name] for name in wanted | {"device", "torch", "commit", "date"})


def test_interruption_keeps_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alternate, calls = measure.alternate, []

    def interrupted(
        steps: dict[str, measure.Step], repeats: int, seconds: dict[str, list[float]], *rest: object, **named: object
    ) -> None:
        calls.append(steps)
        alternate(steps, 1, seconds)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(measure, "alternate", interrupted)
    status, rows = run_command("--rows", "32", "64", "128", "--dim", "8", "--providers", "eager", "tiled", folder=tmp_path)
    assert status == 130
    assert [(row.case.N, len(row.seconds), row.note) for row in rows] == [
        (32, 1, ""), (32, 1, ""), (64, 1, "interrupted"), (64, 1, "interrupted"),
    ]  # fmt: skip


def test_command_tells_wrong_from_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = replace(provider("tiled", lambda loss: 2 * loss), name="tiled")
    monkeypatch.setitem(PROVIDERS, "tiled", wrong)
    status, rows = run_command("--rows", "32", "--dim", "8", "--providers", "eager", "tiled", folder=tmp_path)
    assert status == 1
    assert "relative error 1 against eager" in " ".join(capsys.readouterr().out.split())
    assert [row.is_wrong for row in rows] == [False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "7"], "expected a multiple of 2"),
        (["--dim", "0"], "at least 1"),
        (["--temperature", "nan"], "expected a positive finite number"),
        (["--preset", "quick", "--rows", "64"], "expected no other option for what to measure"),
    ],
)
def test_command_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert message in capsys.readouterr().err


# ---- what is made of it ----------------------------------------------------------------------------------------------


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = synthetic([Case(4096), Case(8192, mode="forward", temperature=0.5)])
    write_csv([row.columns() for row in rows[:2]], tmp_path / "a.csv")
    write_csv([row.columns() for row in rows[2:]], tmp_path / "a.csv")
    found = read_csv([tmp_path / "a.csv"])
    assert [row.columns() for row in found] == [row.columns() for row in rows]
    assert found[0].seconds == pytest.approx(rows[0].seconds, rel=1e-5)


def test_the_newest_run_of_a_case_counts(tmp_path: Path) -> None:
    newer = replace(ENVIRONMENT, date="2026-11-27T10:00:00+00:00")
    rows = [*synthetic([Case(4096)], newer)[1:], *synthetic([Case(2048), Case(4096)])]
    write_csv([row.columns() for row in rows], tmp_path / "a.csv")
    found = read_csv([tmp_path / "a.csv"])
    assert [(row.case.N, row.environment.date[:10]) for row in found] == [
        (4096, "2026-11-27"), (2048, "2026-11-26"), (2048, "2026-11-26"),
    ]  # fmt: skip


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns of benchmarks"):
        read_csv([tmp_path / "b.csv"])


def test_ratios_are_of_rounds_in_one_run() -> None:
    slow, fast = synthetic([Case(4096)])
    slow.seconds, fast.seconds = [1.0, 4.0, 9.0], [1.0, 2.0]  # the last round was interrupted
    assert ratio(slow, fast) == 1.5
    assert ratio(slow, replace(fast, environment=replace(ENVIRONMENT, date="2026-11-27"))) is None
    assert ratio(slow, replace(fast, seconds=[])) is None
    assert memory_ratio(slow, fast) == 4.0


def test_power_laws_are_found() -> None:
    law = PowerLaw.fit((n, 3.0 * n**1.5) for n in (64, 4, 16))
    assert law is not None
    assert law.exponent == pytest.approx(1.5)
    assert law.sizes == (4, 16, 64)
    assert PowerLaw.fit([(4, 1.0), (8, 2.0)]) is None
    rows = synthetic(Case(n) for n in (512, 1024, 2048, 4096, 8192, 16384))
    (series,) = series_over("N", rows)
    of = series.by_provider()
    times, memory = time_law(of["cpu"]), memory_law(of["cpu"])
    assert times is not None
    assert memory is not None
    assert times.exponent == pytest.approx(2.0)
    assert memory.exponent == pytest.approx(1.0)
    assert times.sizes == memory.sizes == (2048, 4096, 8192, 16384)  # 16 MB at N = 1024 is too little
    assert time_law(of["eager"]) is None  # of its sizes only two are large enough
    assert series_over("D", rows) == []


def test_representative_is_the_size_with_most() -> None:
    rows = synthetic([Case(2048), Case(4096), Case(4096, mode="forward"), Case(8192), Case(64, problem="supcon")])
    assert representative(rows) == [Case(4096), Case(4096, mode="forward"), Case(64, problem="supcon")]


def test_targets_are_judged() -> None:
    rows = synthetic([Case(8192), Case(65536)])
    judged = {line["target"]: (line["measured"], line["verdict"]) for line in targets.verdicts(rows)}
    assert judged["cpu on " + str(Case(8192)) + ": at most 60 MB extra"] == ("128.00", "MISSED")
    assert judged["cpu on " + str(Case(65536)) + ": at most 200 MB extra"] == ("1024.00", "MISSED")
    assert judged["cpu on " + str(Case(8192)) + ": 15 times as fast as eager"] == ("not measured", "")
    assert not any("cuda" in target for target in judged)
    fast = find(rows, "cpu", Case(8192))
    assert fast is not None
    fast.peak_extra_mb = 32.0
    slow = replace(fast, provider="eager", seconds=[20 * s for s in fast.seconds])
    judged = {line["target"]: (line["measured"], line["verdict"]) for line in targets.verdicts([fast, slow])}
    assert judged["cpu on " + str(Case(8192)) + ": 15 times as fast as eager"] == ("20.00", "met")
    assert judged["cpu on " + str(Case(8192)) + ": at most 60 MB extra"] == ("32.00", "met")


def test_report_has_every_figure_and_row(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sizes = [Case(n) for n in (1024, 2048, 4096, 8192, 16384)]
    widths = [Case(4096, width) for width in (32, 64)]
    rows = synthetic([*sizes, *widths, Case(4096, mode="forward"), Case(2048, problem="supcon")])
    write_csv([row.columns() for row in rows], tmp_path / "x.csv")
    assert report.main([str(tmp_path / "x.csv"), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    expected = {
        "readme", "ratios-ntxent-float32", "ratios-supcon-float32", "time-ntxent-float32-D128", "memory-ntxent-float32-D128",
        "rate-ntxent-float32-D128", "rate-ntxent-float32-N4096", "width-ntxent-float32-N4096",
    }  # fmt: skip
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == expected
    assert all(f"]({name}.png)" in text for name in expected)
    lines = text.splitlines()
    assert (
        "| ntxent, forward+backward, D=128, float32, temperature 0.1 | clop_kernels, cpu | N^2.00 | 2048 4096 8192 16384 |"
        in text
    )
    assert any(line.startswith("| 16384 | 128 | eager |") and "skipped: needs about 4,096 MB" in line for line in lines)
    assert any(line.startswith("| 4096 | 128 | eager |") and "| 10.00 |" in line for line in lines)
    assert sum(line.startswith(tuple(f"| {row.case.N} | {row.case.D} |" for row in rows)) for line in lines) == len(rows)


def test_report_is_of_one_device(tmp_path: Path) -> None:
    rows = synthetic([Case(64)]) + synthetic([Case(64)], replace(ENVIRONMENT, device="another"))
    with pytest.raises(ValueError, match="expected those of one device"):
        report.write(rows, tmp_path)


def test_report_without_matplotlib_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    text = report.write(synthetic([Case(64)]), tmp_path).read_text()
    assert "matplotlib is not installed" in text
    assert not list(tmp_path.glob("*.png"))


def test_markdown_cells_stay_in_their_row() -> None:
    assert markdown_table([{"a": "x|y", "b": "1\n2"}]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 2 |"
    assert markdown_table([]) == "none"


def test_cuda_resources_of_an_extension_without_its_cuda_half(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extension, "obstacle", lambda: None)
    monkeypatch.setattr(extension, "build_info", lambda: {"cuda": None})
    assert resources_cuda.main([]) == 0
    assert "nothing to report: the extension was built without its CUDA half" in capsys.readouterr().out


# ---- the committed table of Triton's kernels -------------------------------------------------------------------------


LOOP = sass.Loop(1, 16, 96, 32, 288, 32, 27, 17, 12, 1, 217, 706, 706, 1024, 768, 288, 1072, 1072, "shared")


class Kernels:
    """Kernels that take no time to compile: name -> source; ``compiled`` are the sources that the last run compiled."""

    def __init__(self) -> None:
        self.sources = {"softmax_kernel": "s1", "gradient_kernel": "g1", "finish_kernel": "f1"}
        self.spilled_bytes = 0
        self.interrupts_at = ""
        self.compiled: list[str] = []

    def compilations(self, cases: Sequence[resources.Case]) -> list[resources.Compilation]:
        return [resources.Compilation(cases[0], 0, source, name, "64x64") for name, source in self.sources.items()]

    def compile_all(self, wanted: Sequence[resources.Compilation], console: Any) -> Iterator[resources.Report]:
        self.compiled = []
        for one in wanted:
            self.compiled.append(one.source)
            if one.source == self.interrupts_at:
                raise KeyboardInterrupt
            loop = LOOP if one.kernel in resources.MATRIX_KERNELS else None
            yield one.report(168, self.spilled_bytes, 64.5, "wgmma", loop)


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """With their committed table, triton-9.1.0.csv in ``tmp_path``."""
    kernels = Kernels()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("compilations", "compile_all"):
        monkeypatch.setattr(resources, name, getattr(kernels, name))
    monkeypatch.setattr(resources, "triton_version", lambda: "9.1.0")
    monkeypatch.setattr(resources, "TABLES", tmp_path)
    assert resources.main(["--update"]) == 0
    assert kernels.compiled == ["s1", "g1", "f1"]
    return kernels


def test_unchanged_kernels_are_not_compiled(kernels: Kernels) -> None:
    assert resources.main([]) == 0
    assert kernels.compiled == []
    assert resources.main(["--all"]) == 0
    assert kernels.compiled == ["s1", "g1", "f1"]


def test_a_table_without_loops_is_not_up_to_date(kernels: Kernels, tmp_path: Path) -> None:
    path = tmp_path / "triton-9.1.0.csv"
    resources.write_table([replace(report, loop=None) for report in resources.read_table(path)], path)
    assert resources.main([]) == 1
    assert kernels.compiled == ["s1", "g1"]


@pytest.mark.parametrize(
    "sources",
    [
        {"softmax_kernel": "s1", "gradient_kernel": "g2", "finish_kernel": "f1"},
        {"softmax_kernel": "s1", "gradient_kernel": "g1", "finish_kernel": "f1", "pair_kernel": "p1"},
        {"softmax_kernel": "s1", "gradient_kernel": "g1"},
    ],
    ids=["changed", "new", "gone"],
)
def test_a_table_that_is_not_up_to_date_fails(
    sources: dict[str, str], kernels: Kernels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels.sources, path = sources, tmp_path / "triton-9.1.0.csv"
    expected, before = [source for source in sources.values() if source not in ("s1", "g1", "f1")], path.read_text()
    assert resources.main([]) == 1
    assert "`python -m benchmarks.resources --update` writes it" in " ".join(capsys.readouterr().out.split())
    assert kernels.compiled == expected
    assert path.read_text() == before
    assert resources.main(["--dtypes", "float32"]) == 0  # of a part nobody says that the table has it
    assert resources.main(["--update"]) == 0
    assert kernels.compiled == expected
    assert resources.main([]) == 0
    assert [row.source for row in resources.read_table(path)] == list(sources.values())


def test_an_interrupted_update_goes_on(kernels: Kernels) -> None:
    kernels.sources, kernels.interrupts_at = {"softmax_kernel": "s2", "gradient_kernel": "g1", "finish_kernel": "f2"}, "f2"
    with pytest.raises(KeyboardInterrupt):
        resources.main(["--update"])
    kernels.interrupts_at = ""
    assert resources.main(["--update"]) == 0
    assert kernels.compiled == ["f2"]
    assert resources.main([]) == 0


def test_a_committed_fault_fails(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "triton-9.1.0.csv"
    softmax, *others = resources.read_table(path)
    resources.write_table([replace(softmax, spilled_bytes=8), *others], path)
    assert resources.main([]) == 1
    assert kernels.compiled == []
    assert "spills 8 bytes a thread" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(resources, "SPILLS_ALLOWED", {"9.1": 8})
    assert resources.main([]) == 0
    assert "1 kernels spill, up to the 8 bytes allowed on Triton 9.1" in " ".join(capsys.readouterr().out.split())
    resources.write_table([replace(softmax, spilled_bytes=9), *others], path)
    assert resources.main([]) == 1


def test_numbers_that_are_not_what_compiling_gives_fail(kernels: Kernels) -> None:
    kernels.spilled_bytes = 4
    assert resources.main([]) == 0
    assert resources.main(["--all"]) == 1


PLANTED = """
import triton

WIDTH = 4


@triton.jit
def helper(x):
    return x + WIDTH


@triton.jit
def kernel(x):
    return helper(x)
"""


def test_the_hash_of_a_kernel_follows_what_it_compiles_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")

    def code(text: str, name: str) -> str:
        """Of ``kernel`` in a module of that text, imported afresh."""
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("clop_kernels.planted", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "clop_kernels.planted", module)
        spec.loader.exec_module(module)
        return resources.code_of(module.kernel.fn)

    same = code(PLANTED, "first")
    assert code(PLANTED.replace("    return helper", '    """Helps."""\n    # it does\n\n    return helper'), "comments") == same
    for number, (old, new) in enumerate([("x + W", "x - W"), ("= 4", "= 8"), ("helper(x)\n", "helper(x) + 1\n")]):
        assert code(PLANTED.replace(old, new), f"changed_{number}") != same, old


@pytest.mark.compiles
def test_a_changed_kernel_is_compiled_and_no_other(tmp_path: Path) -> None:
    """Of the real kernels, against their committed table: gradient.py computes something else, softmax.py has one more line."""
    pytest.importorskip("triton")
    if not (resources.TABLES / f"triton-{resources.triton_version()}.csv").exists():
        pytest.skip("there is no table of this version of Triton")
    for name in ("clop_kernels", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name, old, new in (
        ("gradient", "tl.store(pointers, products", "tl.store(pointers, 2.0 * products"),
        ("softmax", "import triton\n", "import triton\n\n"),
    ):
        path = tmp_path / "clop_kernels" / "backends" / "triton" / f"{name}.py"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
    arguments = "--targets 90 --dtypes bfloat16 --dims 32"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.resources", *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "7 kernels, 1 of them compiled now" in done.stdout, done.stdout + done.stderr


# ---- what a call costs the host --------------------------------------------------------------------------------------------


def test_host_time() -> None:
    """Of every backend that can be stood in for; nothing is said of how long it takes."""
    command = [sys.executable, "-m", "benchmarks.host_time", "--repeats", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("plain", "definition", "cuda", "triton", "cpu"):
        assert re.search(rf"^{name} +\d+ +\d+ +\d+\.\d\d +\d+\.\d\d$|^left out: {name}: ", done.stdout, re.MULTILINE), done.stdout
    done = subprocess.run([*command[:-1], "0"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "--repeats 0: expected at least 1" in done.stderr
