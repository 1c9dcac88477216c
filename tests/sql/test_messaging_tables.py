"""A service's own tables of messaging, and those that an earlier version of Kassa made."""

import pytest

from flows.messaging.house import put
from kassa.db.pool import connect, open_pool
from kassa.ids import new_id
from kassa.messaging.tables import SCHEMA, make_tables, with_schema
from kassa.messaging.work import MessageWork, OutgoingMessage


@pytest.mark.parametrize("had", ["leases", "lapses", "claims ahead"])
async def test_tables_of_an_earlier_version_get_what_came_later(database_url: str, had: str) -> None:
    connection = await connect(database_url, application="test")
    assert await make_tables(connection)
    assert not await make_tables(connection)
    await connection.execute(f"SET search_path = {SCHEMA}")
    await connection.execute("DROP FUNCTION acknowledge_messages; ALTER TABLE message_lease DROP COLUMN places")
    if had != "claims ahead":
        await connection.execute("DROP FUNCTION claim_messages(text, bigint, interval, integer)")
        await connection.execute(
            "CREATE FUNCTION claim_messages(text, bigint, interval) RETURNS integer LANGUAGE sql AS 'SELECT 1'"
        )
    if had == "leases":
        await connection.execute("ALTER TABLE message DROP COLUMN lapses")

    assert await make_tables(connection)

    assert not await make_tables(connection)
    await connection.close()
    pool = await open_pool(with_schema(database_url), application="test")
    work = MessageWork(pool)
    await put(pool, OutgoingMessage(new_id(), 1, "shop.mails:mailer", "key", 4, 0.0, {}, b"{}"))
    claimed = await work.claim("shop.mails:mailer", 10)
    assert await work.acknowledge(claimed) == {claimed[0].id}
    await pool.close()
