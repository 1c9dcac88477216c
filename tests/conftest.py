"""One PostgreSQL for the whole test run, and a fresh database for each test that asks. Pure tests never start it.

Likewise one of each broker's server, started when the first test asks for it: `rabbitmq`, `kafka`, `rocketmq`. Tests
share it, so each names its queues and topics itself. With KASSA_TEST_RABBITMQ_URL (…) it is the one with that URL,
which `make servers` has started.

What is not tested is told at the end, by name; on CI (CI=true) it is a failure.

With several workers (`scripts/test.sh`) each has a PostgreSQL, and what needs a broker's server is done by one of them.
"""

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings

import hang
import tally
from conformance.messaging import report as binders
from kassa.db import embedded
from kassa.db.binaries import newest_of_debian
from kassa.db.migrate import migrate
from servers import Kafka, RabbitMQ, RocketMQ, Server, ServerUnavailable, is_installed
from servers import running as running_servers

NEEDS: Mapping[str, Callable[[], bool]] = {
    "debian-postgresql": lambda: newest_of_debian() is not None,
    "tmpfs": lambda: _can_mount(),
    "curl": lambda: shutil.which("curl") is not None,
    "java": lambda: is_installed("java"),
    "kafka": lambda: is_installed("kafka"),
    "promtool": lambda: shutil.which("promtool") is not None,
    "rabbitmq": lambda: is_installed("rabbitmq"),
    "rocketmq": lambda: is_installed("rocketmq"),
}
"""What a test marked `needs(name)`, or with a fixture of that name, must find on the machine; it is skipped, and told
so, when it does not."""

BROKERS = ("rabbitmq", "kafka", "rocketmq")
WORDS = {
    "rocketmq": "rocketmq", "kafka": "kafka", "rabbitmq": "rabbitmq", "amqp": "rabbitmq", "pika": "rabbitmq",
    "flows/bench/": "rabbitmq", "flows/cli/test_brokers": "rabbitmq", "tests/examples/": "rabbitmq",
}  # fmt: skip
"""Whose server a test needs, by what its name has in it."""

SLOW = (
    "tests/simulation/",
    "tests/chaos/",
    "tests/conformance/",
    "tests/sql/",
    "tests/flows/cli/",
    "tests/flows/api/test_openapi",
)
"""Files that take a minute or two."""

# A busy machine is no fault of the code under test.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

S = TypeVar("S", bound=Server)

_numbers = count(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[embedded.Running]:
    """A server of our own. Without fsync: a killed process loses nothing by that, only a machine without power does."""
    with embedded.temporary_directory("kassa-tests-") as directory:
        server = embedded.start(directory, settings={"fsync": "off", "max_connections": "200", "max_wal_size": "256MB"})
        try:
            yield server
        finally:
            embedded.stop(server)


@pytest.fixture(scope="session")
def migrated_template(postgres: embedded.Running) -> str:
    """The name of a database with all migrations, to copy from."""
    embedded.execute(postgres, "CREATE DATABASE migrated;")
    asyncio.run(migrate(database_named(postgres, "migrated")))
    return "migrated"


@pytest.fixture
def database_url(postgres: embedded.Running, migrated_template: str) -> Iterator[str]:
    """A migrated database for one test alone."""
    yield from _database(postgres, migrated_template)


@pytest.fixture
def empty_database_url(postgres: embedded.Running) -> Iterator[str]:
    """A database without any table for one test alone."""
    yield from _database(postgres, "template0")


@pytest.fixture(scope="session")
def servers_directory() -> Iterator[Path]:
    """Where all the brokers' servers have their data."""
    with embedded.temporary_directory("kassa-servers-") as directory:
        yield directory


@pytest.fixture(scope="session")
def rabbitmq(servers_directory: Path) -> Iterator[RabbitMQ]:
    """A real RabbitMQ, shared by all tests."""
    yield from _server(RabbitMQ, servers_directory)


@pytest.fixture(scope="session")
def kafka(servers_directory: Path) -> Iterator[Kafka]:
    """A real Kafka, shared by all tests."""
    yield from _server(Kafka, servers_directory)


@pytest.fixture(scope="session")
def rocketmq(servers_directory: Path) -> Iterator[RocketMQ]:
    """A real RocketMQ, shared by all tests."""
    yield from _server(RocketMQ, servers_directory)


def _server(kind: type[S], directory: Path) -> Iterator[S]:
    url = os.environ.get(f"KASSA_TEST_{kind.name.upper()}_URL")
    if url:
        yield _running(kind, url)
        return
    server = kind(directory / kind.name).start()
    try:
        yield server
    finally:
        # Its data goes too, so there is nothing that it should save first.
        server.kill()


def _running(kind: type[S], url: str) -> S:
    for server in running_servers():
        if isinstance(server, kind) and server.url == url:
            return server
    raise ServerUnavailable(
        kind.name, f"`make servers` has started none at {url}.", fix="See `python -m servers status`."
    )


def database_named(server: embedded.Running, name: str) -> str:
    """The URL of another database of the same server."""
    return server.dsn.rpartition("/")[0] + "/" + name


def _database(server: embedded.Running, template: str) -> Iterator[str]:
    name = f"test_{os.getpid()}_{next(_numbers)}"
    embedded.execute(server, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY;")
    yield database_named(server, name)
    embedded.execute(server, f"DROP DATABASE {name} WITH (FORCE);")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of our own."""
    parser.addoption(
        "--binders-table", type=Path, metavar="FILE", help="Write what each binder can do, as this run finds it."
    )


def pytest_configure(config: pytest.Config) -> None:
    """No test holds up the others for ever, and Ctrl-C ends what they start, also where a shell began us in the background."""
    config.pluginmanager.register(hang)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that nobody waits for one worker at the end."""
    items.sort(key=lambda item: _turn(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of one broker's server stay in one worker, since it is started there; the others by their file."""
    from xdist.scheduler import LoadScopeScheduling

    # xdist has no types.
    class ByServer(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return ByServer(config, log)


def _turn(nodeid: str) -> int:
    if _group(nodeid) in BROKERS:
        return 0
    return 1 if nodeid.startswith(SLOW) else 2


def _group(nodeid: str) -> str:
    """By name alone, since more is not known where work is given out."""
    return next((broker for word, broker in WORDS.items() if word in nodeid), nodeid.partition("::")[0])


def _needed(item: pytest.Item) -> list[str]:
    marked = [name for marker in item.iter_markers("needs") for name in marker.args]
    return marked + [name for name in getattr(item, "fixturenames", []) if name in NEEDS]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out a test whose needs this machine does not meet."""
    for name in _needed(item):
        if not NEEDS[name]():
            pytest.skip(f"needs {name}")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker is done: what it counted is counted here."""
    said = getattr(node, "workeroutput", {})
    tally.COUNTED.update(said.get("counted", {}))
    tally.TOLD.extend(said.get("told", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell what each binder can do, what was counted, what was not tested, and why."""
    binders.tell(terminalreporter, terminalreporter.config.getoption("binders_table"))
    if (counted := tally.told()) is not None:
        terminalreporter.write_line(f"counted: {counted}")
    for line in tally.TOLD:
        terminalreporter.write_line(line)
    missing = _not_tested(terminalreporter)
    terminalreporter.write_line("not tested:" if missing else "not tested: nothing")
    for line in missing:
        terminalreporter.write_line(f"  {line}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """On CI, what was not tested has failed."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["counted"] = dict(tally.COUNTED)
        output["told"] = list(tally.TOLD)
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == pytest.ExitCode.OK and os.environ.get("CI") == "true" and reporter and _not_tested(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _can_mount() -> bool:
    """Whether this process may make a small file system of its own: root may, outside most containers."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], capture_output=True, check=False)
            if mounted.returncode == 0:
                subprocess.run(["umount", directory], check=True)
        except OSError:
            return False
        return mounted.returncode == 0


def _not_tested(reporter: pytest.TerminalReporter) -> list[str]:
    skipped = [
        f"{report.nodeid}: {report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr}"
        for report in reporter.stats.get("skipped", [])
    ]
    return skipped + [f"{report.nodeid}: {report.wasxfail}" for report in reporter.stats.get("xfailed", [])]
