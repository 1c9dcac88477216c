"""A test that never ends fails, and tells what each task was waiting for, so that it does not hold up the others.

The limits are far from what any test needs, on any machine; none of them is a claim about speed. What does not even hear
a signal is ended with its process by pytest's `faulthandler_timeout` (pyproject.toml).
"""

import asyncio
import io
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

LIMIT_S = 600
LIMIT_LONG_S = 3_600
"""Of one phase (set-up, call, teardown) of a test, and of one marked `long`."""
AGAIN_S = 30


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Watch the fixtures' beginning."""
    with _watched(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Watch the test."""
    with _watched(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Watch the fixtures' end."""
    with _watched(item):
        return (yield)


@contextmanager
def _watched(item: pytest.Item) -> Iterator[None]:
    limit_s = LIMIT_LONG_S if item.get_closest_marker("long") else LIMIT_S

    def fail(*_: object) -> None:
        pytest.fail(f"{item.nodeid} was not done after {limit_s} s.\n{_waiting()}")

    before = signal.signal(signal.SIGALRM, fail)
    # Again and again, since a task may take the failure for its own.
    signal.setitimer(signal.ITIMER_REAL, limit_s, AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _waiting() -> str:
    """Where each task of the running loop stands."""
    try:
        tasks = asyncio.all_tasks()
    except RuntimeError:
        return "No event loop was running."
    told = io.StringIO()
    for task in tasks:
        task.print_stack(file=told)
    return told.getvalue()
