"""The table of the binders ends every run that had the suite in it, whatever pytest was told to run."""

import io
from pathlib import Path

import pytest
from _pytest.terminal import TerminalReporter

TESTS = Path(__file__).parents[2]


def end_of_run(config: pytest.Config, *names: str) -> str:
    """What tests/conftest.py alone writes below a run with these tests: all that the process has that gives work out."""
    written = io.StringIO()
    reporter = TerminalReporter(config, written)
    reporter.stats["passed"] = [
        pytest.TestReport(name, (name, 0, name), {}, outcome="passed", longrepr=None, when="call") for name in names
    ]
    root = next(
        plugin for plugin in config.pluginmanager.get_plugins()
        if getattr(plugin, "__file__", None) == str(TESTS / "conftest.py")
    )  # fmt: skip
    root.pytest_terminal_summary(reporter)
    return written.getvalue()


def test_the_table_is_told_once_by_who_collects_nothing(pytestconfig: pytest.Config) -> None:
    written = end_of_run(pytestconfig, "tests/conformance/messaging/test_binders.py::test_record_arrives[memory]")

    lines = [line.split() for line in written.splitlines()]
    assert lines.count(["memory", "1", "0", "0"]) == 1
    assert lines.count(["kafka", "0", "0", "1"]) == 1


def test_a_run_without_the_suite_tells_no_table(pytestconfig: pytest.Config) -> None:
    assert "binders" not in end_of_run(pytestconfig, "tests/unit/test_clock.py::test_clock")
