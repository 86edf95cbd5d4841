"""benchmarks.gpu_check: what becomes of a process that fails, hangs or is killed, and what is made of the journal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import tile_table
from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import processes, summary
from benchmarks.gpu_check.journal import WHOLE, Journal, Result, read
from benchmarks.gpu_check.plan import PLAN, Machine
from benchmarks.gpu_check.processes import RENEW, Job, Runner
from benchmarks.problems import Case
from benchmarks.results import Environment, Row
from benchmarks.tile_candidates import Tile

ENVIRONMENT = Environment("cpu", "a stand-in", "2.13.0", "3.11.7", "", "", "", "abc1234", "2026-11-27T10:00:00+00:00")

WORKER = f"""
import json, os, sys, time
sys.path.insert(0, {str(processes.ROOT)!r})
from benchmarks.gpu_check.journal import Journal, Result
for index, item in enumerate(json.loads(sys.argv[1])):
    print("begin", index, flush=True)
    if item == "dies":
        os.abort()
    if item == "hangs":
        time.sleep(60)
    journal = Journal.of_process()
    journal.add(Result(journal.step, item, "done"))
    if item == "asks for another process":
        sys.exit({RENEW})
"""


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(processes, "SHORTEST", 0.5)
    return Runner(Journal(tmp_path / "results.jsonl", ENVIRONMENT), tmp_path, 60.0)


def outcomes(runner: Runner) -> dict[str, str]:
    return {result.name: result.outcome for result, _ in read(runner.journal.path)}


def worker(*items: str, limit: float = 30.0) -> Job:
    return Job("worker", (sys.executable, "-c", WORKER), limit, items=items)


# ---- processes -------------------------------------------------------------------------------------------------------


def test_a_process_that_dies_costs_one_result(runner: Runner) -> None:
    runner.run("step", worker("a", "dies", "asks for another process", "b"))
    assert outcomes(runner) == {"a": "done", "worker dies": "crashed", "asks for another process": "done", "b": "done"}
    results = [result for result, _ in read(runner.journal.path)]
    assert {result.step for result in results} == {"step"}
    assert results[1].details.startswith(f"exit {-signal.SIGABRT}: ")


def test_a_process_that_hangs_is_ended_at_its_limit_with_what_it_has_started(runner: Runner, tmp_path: Path) -> None:
    script = (
        f"import pathlib, subprocess, time; p = subprocess.Popen(['sleep', '60']); "
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(p.pid)); time.sleep(60)"
    )
    runner.run("step", Job("alone", (sys.executable, "-c", script), 3.0))
    assert outcomes(runner) == {"alone": "out of time"}
    pid = int((tmp_path / "pid").read_text())
    assert soon(lambda: not is_running(pid))
    runner.run("step", worker("a", "hangs", "never", limit=6.0))
    assert outcomes(runner) == {"alone": "out of time", "a": "done", "worker hangs": "out of time"}


def test_nothing_is_begun_that_the_budget_does_not_cover(runner: Runner) -> None:
    runner.kill_all()
    runner.run("step", worker("a", "b"))
    ((result, _),) = read(runner.journal.path)
    assert (result.outcome, result.details) == ("left out", "no time was left for 2 items")


def test_a_failure_says_why(runner: Runner) -> None:
    runner.run("step", Job("x", (sys.executable, "-c", "print('the reason'); raise SystemExit(7)"), 30.0))
    runner.run("step", Job("y", (sys.executable, "-c", ""), 30.0, is_result=True))
    (x, _), (y, _) = read(runner.journal.path)
    assert (x.outcome, x.details, x.is_good) == ("failed", "exit 7: the reason\n", False)
    assert (y.name, y.outcome, y.is_good) == ("y", "passed", True)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def soon(is_so: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.1)
    return is_so()


# ---- the journal -----------------------------------------------------------------------------------------------------


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "results.jsonl", ENVIRONMENT)
    journal.add(Result("canary", "a", "right", 1.5, {"loss": "1e-7"}))
    text = journal.path.read_text()
    journal.path.write_text(text + text[: len(text) // 2])
    ((result, environment),) = read(journal.path)
    assert result == Result("canary", "a", "right", 1.5, {"loss": "1e-7"})
    assert environment == ENVIRONMENT


TESTS = """
import pytest
def test_right(record_property):
    record_property("error", "1e-7")
def test_wrong():
    assert 1 == 2, "that is wrong"
@pytest.mark.skip(reason="not here")
def test_not_here():
    pass
"""


@pytest.mark.parametrize("in_parallel", [False, True])
def test_each_test_is_a_result(in_parallel: bool, runner: Runner, tmp_path: Path) -> None:
    if in_parallel:
        pytest.importorskip("xdist")
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "test_broken.py").write_text("import not_a_module_of_anyone")
    plugins = ("-p", "no:cacheprovider", "-p", "benchmarks.gpu_check.pytest_rows", *(("-n", "2") if in_parallel else ()))
    arguments = ("-q", "--continue-on-collection-errors", "--rootdir", str(tmp_path), *plugins, str(tmp_path))
    runner.run("tests", Job("pytest", (sys.executable, "-m", "pytest", *arguments), 120.0, allowed=(1,)))
    found = {result.name.split("::")[-1].split("/")[-1]: result for result, _ in read(runner.journal.path)}
    assert {name: result.outcome for name, result in found.items()} == {
        "test_right": "passed", "test_wrong": "failed", "test_not_here": "skipped", "test_broken.py": "failed",
    }  # fmt: skip
    assert found["test_right"].figures == {"error": "1e-7"}
    assert "that is wrong" in found["test_wrong"].details
    assert "not here" in found["test_not_here"].details
    assert "not_a_module_of_anyone" in found["test_broken.py"].details


# ---- what is made of it ----------------------------------------------------------------------------------------------


def a_run(folder: Path) -> Journal:
    """One result of every kind, as the workers write them."""
    folder.mkdir()
    journal = Journal(folder / summary.JOURNAL, ENVIRONMENT)
    add = journal.add
    add(Result("machine", "machine", "done", figures={"bfloat16_tflops": 780.0}))
    errors = {"same_bits": True, "loss": "1.0e-07", "plain loss": "2.0e-07"}
    add(Result("canary", "cuda float32 N=66 D=64 {}", "right", figures=errors))
    add(
        Result(
            "canary", "cuda float32 N=66 D=37 {}", "wrong", figures=errors | {"loss": "3.0e-03"}, details="loss: relative error"
        )
    )
    for provider, factor in (("eager", 20), ("triton", 1)):
        for n_rows in (2048, 8192):
            seconds = [factor * 1e-9 * n_rows**2]
            row = Row(provider, "1.0", provider == "triton", Case(n_rows), ENVIRONMENT, seconds, 10.0, 12.0, 0.2, 1.0, 0.5)
            add(Result("speed", f"{provider}: {row.case}", "measured", figures=row.columns()))
    for block_m, microseconds, is_shipped in ((128, 200.0, True), (64, 100.0, False), (128, 210.0, True)):
        tile = Tile(block_m, 64, 128, 4, 2)
        timed = tile_table.Row(
            "gradient", "plain", "bfloat16", 128, 8192, tile, is_shipped, microseconds=microseconds, share_of_matrix_rate=0.5
        )
        add(Result("tiles", timed.name, "measured", figures=timed.figures() | {"sm": 90, "processors": 132}))
    rejected = tile_table.Row("gradient", "plain", "bfloat16", 128, None, Tile(256, 64, None, 4, 2), outcome="rejected")
    add(Result("tiles", rejected.name, "skipped", figures=rejected.figures(), details="spills 64 bytes a thread"))
    add(Result("tests", "tests/gpu/test_losses.py::test_x[a]", "failed", 1.0, details="AssertionError: x | y"))
    add(Result("tests", WHOLE, "done", 95.0))
    add(Result("peers", WHOLE, "left out", details="the budget is spent"))
    return journal


def test_a_report_without_timings_has_no_words_about_them(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    Journal(tmp_path / "run" / summary.JOURNAL, ENVIRONMENT).add(Result("machine", WHOLE, "done", 1.0))
    text = summary.write(tmp_path / "run").read_text()
    assert "No problems in the steps that ran." in text
    assert "| machine | done | 1 |" in text
    assert "other implementations" not in text


def test_the_report_says_what_a_reader_looks_for(tmp_path: Path) -> None:
    a_run(tmp_path / "run")
    assert command.main(["--report", str(tmp_path / "run")]) == 0
    text = (tmp_path / "run" / "report.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "# Results of python -m benchmarks.gpu_check"
    assert lines[2] == f"- {ENVIRONMENT}"
    assert "| canary | 1 right, 1 wrong, did not end |  |" in lines
    assert "| tests | 1 failed | 95 |" in lines
    assert "| peers | left out: the budget is spent |  |" in lines
    assert "| profile | not run |  |" in lines
    assert "| canary | whole step | did not end | interrupted or killed before the end of the step |" in lines
    assert "| canary | cuda float32 N=66 D=37 {} | wrong | loss: relative error |" in lines
    assert "| tests | tests/gpu/test_losses.py::test_x[a] | failed | AssertionError: x \\| y |" in lines
    assert "| cuda float32 | 2 | 3.0e-03 | 2.0e-07 |" in lines
    shipped, fastest = "128x64x128, 4 warps, 2 stages | 200.0 and 210.0", "64x64x128, 4 warps, 2 stages | 100.0 | 2.000 | 0.50"
    assert f"| gradient | plain | bfloat16 | 128 | 8192 | {shipped} | {fastest} |" in lines
    rows = tile_table.read_table(tmp_path / "run" / "tiles.csv")
    assert [row.microseconds for row, _ in rows] == [200.0, 100.0, 210.0, None]
    assert {(where["device"], where["commit"]) for _, where in rows} == {("a stand-in", "abc1234")}
    assert [where["processors"] for _, where in rows[:3]] == ["132"] * 3
    assert any(line.startswith("| 8192 | 128 | eager |") and "| 20.00 |" in line for line in lines)
    with tarfile.open(tmp_path / "run.tar.gz") as file:
        assert {"run/results.jsonl", "run/report.md", "run/speed.csv", "run/tiles.csv", "run/checks.csv"} <= set(file.getnames())
    before = {name: (tmp_path / "run" / name).read_text() for name in summary.CSV_FILES}
    summary.write(tmp_path / "run")  # again: the same files, not longer ones
    assert before == {name: (tmp_path / "run" / name).read_text() for name in summary.CSV_FILES}


def test_a_folder_without_a_journal_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--report", str(tmp_path)])
    assert "expected the journal of a run" in capsys.readouterr().err


# ---- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [Machine(True, 16), Machine(False, 2)], ids=["GPU", "stand-in"])
def test_every_step_is_made_of_processes(machine: Machine) -> None:
    for step in PLAN:
        for job in step.jobs(machine):
            json.dumps(job.items)
            assert 0 < job.limit <= 240
            assert all(isinstance(word, str) for word in job.command)
    names = [step.name for step in PLAN]
    assert len(set(names)) == len(names)
    assert names[:2] == ["machine", "canary"]


def test_the_plan_can_be_read_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(step.name in printed for step in PLAN)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_keeps_what_it_has(how: signal.Signals, tmp_path: Path) -> None:
    """And ends what it has started, even when it cannot any more."""
    folder = tmp_path / "run"
    arguments = [sys.executable, "-m", "benchmarks.gpu_check", "--output", str(folder), "--steps", "canary", "tests"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CLOP_COMMIT": "abc1234"}
    process = subprocess.Popen(arguments, cwd=processes.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    path = folder / summary.JOURNAL

    def canaries() -> int:
        return sum(result.step == "canary" for result, _ in read(path)) if path.exists() else 0

    assert soon(lambda: canaries() > 0, 120)
    process.send_signal(how)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == (-how if how == signal.SIGKILL else 130), printed
    time.sleep(2.5)  # what it has started looks every second whether it is still there
    left = list(read(path))
    time.sleep(2.5)
    assert list(read(path)) == left
    assert {environment.commit for _, environment in left} == {"abc1234"}
    assert not any(result.step == "canary" and result.name == WHOLE for result, _ in left)
    assert command.main(["--report", str(folder)]) == 0
    assert "| canary |" in (folder / "report.md").read_text()
    assert asdict(left[0][1])["device_type"] == "cpu"
