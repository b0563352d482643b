"""Counts the tests that compare kernels' results with a reference, by operator; ``--require-numeric`` insists on them.

Where a kernel's tests are skipped, or fail to be collected, the rest is green and nothing is proven.
"""

from __future__ import annotations

from collections import Counter

import pytest

OPERATORS = (
    "lift_forward",
    "nearest",
    "dense_match",
    "propagate_labels",
    "cosine_loss",
    "image_encoder (CUDA C++)",
    "dense_match (CUDA C++)",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-numeric",
        action="store_true",
        help="fail if of any operator's numeric kernel tests none passed, or one was skipped",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(NumericCount(config), "numeric-count")


class NumericCount:
    """Counts reports, not tests: in pytest-xdist tests run in the workers, and reports come to the controller too."""

    def __init__(self, config: pytest.Config) -> None:
        self.required = config.getoption("require_numeric") and not config.option.collectonly
        self.counts: dict[str, Counter[str]] = {operator: Counter() for operator in OPERATORS}

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        marker = item.get_closest_marker("numeric")
        if marker is None:
            return
        if len(marker.args) != 1 or marker.args[0] not in OPERATORS:
            expected, given = (", ".join(map(repr, names)) for names in (OPERATORS, marker.args))
            raise pytest.UsageError(
                f"{item.nodeid}: numeric takes one of {expected}, got {given}; add a new operator to OPERATORS here"
            )
        item.user_properties.append(("numeric", marker.args[0]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        operator = dict(report.user_properties).get("numeric")
        # Setup and teardown report as well.
        if operator is not None and (report.when == "call" or not report.passed):
            self.counts[operator][report.outcome] += 1

    def complaints(self) -> list[str]:
        """Sentences."""
        found = [f"No numeric kernel test of {name} passed." for name in OPERATORS if not self.counts[name]["passed"]]
        skipped = {name: self.counts[name]["skipped"] for name in OPERATORS if self.counts[name]["skipped"]}
        return found + [f"Numeric kernel tests of {name} were skipped: {count}." for name, count in skipped.items()]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        # Only the controller has everything.
        if not self.required or hasattr(session.config, "workerinput") or not self.complaints():
            return
        if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        passed = ", ".join(f"{name} {counts['passed']}" for name, counts in self.counts.items() if counts)
        if passed:
            terminalreporter.write_line(f"numeric kernel tests passed: {passed}")
        for complaint in self.complaints() if self.required else ():
            terminalreporter.write_line(complaint, red=True)
