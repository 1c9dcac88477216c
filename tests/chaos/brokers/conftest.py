"""A chain behind each broker of the registry. The servers are for these tests alone, since they are killed."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from brokers.kafka_house import OwnKafka
from chaos.brokers.chain import Chain, running
from chaos.brokers.posts import Database, HubPost, KafkaPost, Post, Rabbit, Rocket
from kassa.db import embedded
from kassa.db.migrate import migrate
from servers import RabbitMQ, RocketMQ, Server

NEEDS = {"amqp": "rabbitmq", "kafka": "kafka", "rocketmq": "rocketmq"}
KINDS: dict[str, type[Server]] = {"amqp": RabbitMQ, "kafka": OwnKafka, "rocketmq": RocketMQ}
SLOW = ("kafka", "rocketmq")
"""A server of these that comes back takes up to half a minute, so all their rows are long ones."""
SCHEMES = ("amqp", "kafka", "rocketmq", "zeromq", "postgres")


@pytest.fixture(scope="session")
def own_servers() -> Iterator[Callable[[str], Server]]:
    """A server of each kind, started when it is first asked for, and again when a test has left it dead."""
    with ExitStack() as stack:
        started: dict[str, Server] = {}

        def server(scheme: str) -> Server:
            if scheme not in started:
                directory = stack.enter_context(embedded.temporary_directory(f"kassa-{NEEDS[scheme]}-"))
                started[scheme] = KINDS[scheme](directory / NEEDS[scheme])
                stack.callback(started[scheme].kill)
            return started[scheme].start()

        yield server


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One row per broker; it needs its server."""
    if "scheme" in metafunc.fixturenames:
        only = [marker.args for marker in metafunc.definition.iter_markers("brokers")]
        rows = [pytest.param(scheme, marks=_marks(scheme)) for scheme in (only[0] if only else SCHEMES)]
        metafunc.parametrize("scheme", rows, scope="session")


def _marks(scheme: str) -> list[pytest.MarkDecorator]:
    needed = [pytest.mark.needs(NEEDS[scheme])] if scheme in NEEDS else []
    return [*needed, pytest.mark.long] if scheme in SLOW else needed


def _post_of(server: Server) -> Post:
    match server:
        case OwnKafka():
            return KafkaPost(server)
        case RabbitMQ():
            return Rabbit(server)
        case RocketMQ():
            return Rocket(server)
    raise TypeError(f"{server} has no post")


@pytest.fixture
async def post(
    scheme: str, own_servers: Callable[[str], Server], database_url: str, tmp_path: Path
) -> AsyncIterator[Post]:
    """The broker."""
    match scheme:
        case "postgres":
            with embedded.temporary_directory("kassa-chain-") as directory:
                database = Database(directory)
                try:
                    await migrate(database.running.dsn)
                    yield database
                finally:
                    database.end()
        case "zeromq":
            hub = HubPost(database_url)
            yield hub
            hub.end()
        case _:
            server = own_servers(scheme)
            yield _post_of(server)


@pytest.fixture
async def chain(post: Post, tmp_path: Path, database_url: str, empty_database_url: str) -> AsyncIterator[Chain]:
    """The whole chain, working."""
    url = post.running.dsn if isinstance(post, Database) else database_url
    async with running(tmp_path / "kassa", url, post, empty_database_url) as chain:
        yield chain
