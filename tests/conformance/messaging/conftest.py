"""Every binder of the registry, on its real server, with a journal to have effects in."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime

import pytest

from brokers.rabbit_house import at_once
from conformance.messaging import report
from conformance.messaging.house import SERVERS, Bench
from kassa.db.pool import connect, open_pool
from kassa.ids import new_id
from kassa.journal.writer import PostgresJournal
from kassa.messaging.binder import Resources
from kassa.messaging.registry import REGISTRY, make_binder
from kassa.messaging.topology import Topic
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import DeadLetters
from kassa.tables import TABLES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What each binder can do, as this run found it; with --binders-table also as a page."""
    run = report.read_run(
        [
            (one.nodeid, outcome)
            for outcome in ("passed", "failed", "error", "skipped")
            for one in terminalreporter.stats.get(outcome, [])
            if outcome != "passed" or one.when == "call"
        ]
    )
    if not run.results:
        return
    terminalreporter.section("binders")
    for line in report.summary(run):
        terminalreporter.write_line(line)
    file = terminalreporter.config.getoption("binders_table")
    if file is None:
        return
    if left_out := [binder for binder in run.binders if run.counts(binder)[report.NOT_TESTED]]:
        terminalreporter.write_line(f"not written: {file}, since not everything was tested on {', '.join(left_out)}")
    else:
        said = [dict(one.user_properties).get(POSTGRES) for one in terminalreporter.stats.get("passed", [])]
        postgres = next(filter(None, said), "")
        report.write(run, file, datetime.now(UTC).date(), report.server_versions(postgres))
        terminalreporter.write_line(f"written: {file}")


POSTGRES = "postgresql"
"""The property of a test that says PostgreSQL's version."""


def schemes() -> list[object]:
    """One parameter per binder, however many schemes it has; it needs its server."""
    binders = {REGISTRY[scheme]: scheme for scheme in sorted(REGISTRY, reverse=True)}
    return [
        pytest.param(scheme, marks=pytest.mark.needs(SERVERS[scheme]) if scheme in SERVERS else ())
        for scheme in sorted(binders.values())
    ]


@pytest.fixture(params=schemes())
async def bench(request: pytest.FixtureRequest, database_url: str) -> AsyncIterator[Bench]:
    server = SERVERS.get(request.param)
    url = request.param if server is None else request.getfixturevalue(server).url
    if request.param == "amqp":
        url = at_once(url)
    # A name of its own, since the servers are shared.
    topic = Topic(f"orders-{new_id()[-12:]}", ("shop",), "Orders, for the tests.", classes=True)
    pool = await open_pool(database_url, application="test")
    version = await pool.fetchval("SELECT split_part(current_setting('server_version'), ' ', 1)")
    request.node.user_properties.append((POSTGRES, version))
    journal = PostgresJournal(lambda: connect(database_url, application="test writer"), TABLES)
    await journal.start()
    wakeups = Wakeups(lambda: connect(database_url, application="test wake"))
    wakeups.follow(journal)
    telling = asyncio.create_task(wakeups.run())
    async with make_binder(url, Resources(pool, wakeups, (topic,))) as binder:
        await binder.provision([topic])
        yield Bench(binder, topic, pool, journal, wakeups, DeadLetters(pool))
    telling.cancel()
    with suppress(asyncio.CancelledError):
        await telling
    await journal.stop()
    await pool.close()
