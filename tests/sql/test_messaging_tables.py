"""A service's own tables of messaging, and those that an earlier version of Kassa made."""

import pytest

from kassa.db.pool import connect, open_pool
from kassa.messaging.tables import SCHEMA, make_tables, with_schema
from kassa.messaging.work import MessageWork


@pytest.mark.parametrize("had_lapses", [True, False], ids=["before claims ahead", "before lapses"])
async def test_tables_of_an_earlier_version_get_what_came_later(database_url: str, had_lapses: bool) -> None:
    connection = await connect(database_url, application="test")
    assert await make_tables(connection)
    assert not await make_tables(connection)
    await connection.execute(f"SET search_path = {SCHEMA}")
    await connection.execute("DROP FUNCTION claim_messages(text, bigint, interval, integer)")
    if not had_lapses:
        await connection.execute("ALTER TABLE message DROP COLUMN lapses")
    await connection.execute(
        "CREATE FUNCTION claim_messages(text, bigint, interval) RETURNS integer LANGUAGE sql AS 'SELECT 1'"
    )

    assert await make_tables(connection)

    assert not await make_tables(connection)
    await connection.close()
    pool = await open_pool(with_schema(database_url), application="test")
    assert await MessageWork(pool).claim("shop.mails:mailer", 10) == []
    await pool.close()
