"""The PostgreSQL that Debian has; the other tests run on the newest one. Debian 12 has 15, the oldest that Kassa takes (README)."""

from collections.abc import Iterator

import pytest

from flows.messaging.house import HOME, House, put, writer
from kassa.db import embedded
from kassa.db.binaries import newest_of_debian
from kassa.db.migrate import migrate
from kassa.db.pool import connect, open_pool
from kassa.db.schema_check import difference
from kassa.ids import new_id
from kassa.messaging.tables import make_tables, with_schema
from kassa.messaging.work import MessageWork, OutgoingMessage
from sql.test_queries_prepare import PACKAGES, faults

pytestmark = pytest.mark.needs("debian-postgresql")

QUEUE = "post:office"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of its first database."""
    with embedded.temporary_directory("kassa-older-") as home, pytest.MonkeyPatch.context() as patch:
        patch.setenv("KASSA_PG_BIN", str(newest_of_debian()))
        running = embedded.start(home)
        yield running.dsn
        embedded.stop(running)


async def test_database_is_made_and_every_query_prepares(server: str) -> None:
    await migrate(server)

    assert await difference(server) == []
    assert [fault for package, file in PACKAGES for fault in await faults(server, package, file)] == []


async def test_messages_and_events_go_their_way(server: str) -> None:
    await migrate(server)
    pool = await open_pool(server, application="test")
    one, two = await writer(server), await writer(server)
    house = House(server, pool, one, two)
    root = await house.root()
    await house.happen(two, root)
    assert await pool.fetchval("SELECT count(*) FROM event WHERE root = $1", root) == 2
    sent = [OutgoingMessage(new_id(), HOME, QUEUE, f"key-{n % 2}", 4, 0.0, {}, b"{}") for n in range(6)]
    await put(pool, *sent)
    work = MessageWork(pool)

    claimed = await work.claim(QUEUE, 2)
    assert await work.acknowledge(claimed) == {message.id for message in claimed}
    (failed,) = await work.claim(QUEUE, 1)
    assert await work.retry([(failed, 0.0, "not now", True)]) == {failed.id}
    rows = await pool.fetch("SELECT body FROM kassa_receive('post', 'office', 10)")

    assert [row["body"] for row in rows] == ["{}"] * 4
    assert await pool.fetchval("SELECT count(*) FROM message") == 0
    await one.stop()
    await two.stop()
    await pool.close()


async def test_a_service_has_its_own_tables(server: str) -> None:
    connection = await connect(server, application="test")
    await make_tables(connection)
    await connection.close()
    pool = await open_pool(with_schema(server), application="test")

    assert await MessageWork(pool).claim("shop.mails:mailer", 10) == []

    await pool.close()
