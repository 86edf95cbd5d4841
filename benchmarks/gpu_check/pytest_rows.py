"""A pytest plugin, ``-p benchmarks.gpu_check.pytest_rows``, that writes each test's outcome to the journal.

With pytest-xdist, the controlling process writes. A killed run loses only the tests that were running.
"""

from __future__ import annotations

import pytest

from .journal import Journal, Result
from .processes import end_with_parent


def pytest_configure(config: pytest.Config) -> None:
    end_with_parent()
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist
        config.pluginmanager.register(Rows(Journal.of_process()))


class Rows:
    """Writes the reports of pytest."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def _add(self, *arguments: object, **named: object) -> None:
        self._journal.add(Result(self._journal.step, *arguments, **named))  # type: ignore[arg-type]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome == "failed":
            self._add(report.nodeid, "failed", details=str(report.longrepr)[-1500:])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        details = ""
        if report.outcome == "failed":
            details = str(report.longrepr)[-1500:]
        elif report.outcome == "skipped":
            details = str(report.longrepr[-1]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
        figures = {str(name): value for name, value in report.user_properties}
        self._add(report.nodeid, report.outcome, round(report.duration, 3), figures, details)
