"""A plugin of pytest, ``-p benchmarks.gpu_check.pytest_rows``: each test's outcome goes into the journal when it is known.

Under pytest-xdist it is the controlling process that writes; a run that is killed loses only the tests that were running.
"""

from __future__ import annotations

import os

import pytest

from .journal import Journal, Result
from .processes import end_with_parent


def pytest_configure() -> None:
    end_with_parent()


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome == "failed" and "PYTEST_XDIST_WORKER" not in os.environ:
        journal = Journal.of_process()
        journal.add(Result(journal.step, report.nodeid, "failed", details=str(report.longrepr)[-1500:]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.outcome == "passed"):
        return
    details = ""
    if report.outcome == "failed":
        details = str(report.longrepr)[-1500:]
    elif report.outcome == "skipped":
        details = str(report.longrepr[-1]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
    figures = {str(name): value for name, value in report.user_properties}
    journal = Journal.of_process()
    journal.add(Result(journal.step, report.nodeid, report.outcome, round(report.duration, 3), figures, details))
