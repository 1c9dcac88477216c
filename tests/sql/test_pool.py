"""A connection either is as Kassa needs it, or the reason is told without the password."""

import socket

import asyncpg
import pytest

from kassa.db import pool as ours
from kassa.db.pool import close_pool, connect, open_pool, without_password
from kassa.errors import DatabaseRefused, DatabaseUnreachable


async def test_a_session_has_kassas_settings(database_url: str) -> None:
    pool = await open_pool(database_url, application="kassa test", size_max=2)

    shown = await pool.fetchrow(
        """SELECT current_setting('application_name'), current_setting('transaction_isolation'),
        current_setting('timezone'), current_setting('jit')"""
    )
    assert tuple(shown) == ("kassa test", "read committed", "UTC", "off")
    await pool.close()


async def test_a_connection_notices_that_the_servers_machine_is_gone(database_url: str) -> None:
    connection = await connect(database_url, application="kassa test")
    one = connection._transport.get_extra_info("socket")

    assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == ours.SILENCE_S * 1000
    assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    await connection.close()


async def test_a_connection_that_nobody_gives_back_keeps_no_pool_open(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "CLOSE_S", 0.1)
    pool = await open_pool(database_url, application="test")
    kept = await pool.acquire()

    await close_pool(pool)

    with pytest.raises(asyncpg.InterfaceError):
        await kept.fetchval("SELECT 1")


async def test_a_server_that_is_not_there_is_unreachable() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"postgresql://kassa:hush@127.0.0.1:{nobody.getsockname()[1]}/kassa"

        with pytest.raises(DatabaseUnreachable) as single:
            await connect(url, application="test")
        with pytest.raises(DatabaseUnreachable) as pool:
            await open_pool(url, application="test")

    assert "hush" not in str(single.value) + str(pool.value)


async def test_a_server_that_does_not_answer_is_unreachable_in_time() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()

        with pytest.raises(DatabaseUnreachable, match="no answer in time"):
            await connect(
                f"postgresql://kassa@127.0.0.1:{silent.getsockname()[1]}/kassa", application="test", timeout_s=0.2
            )


async def test_wrong_credentials_and_unknown_databases_are_refused(database_url: str) -> None:
    for wrong in (database_url.replace("kassa:", "kassa:x"), database_url + "_no_such"):
        with pytest.raises(DatabaseRefused, match="correct the database URL"):
            await connect(wrong, application="test")


@pytest.mark.parametrize(
    ("dsn", "shown"),
    [
        ("postgresql://kassa:hush@127.0.0.1:5432/shop?password=hush", "postgresql://127.0.0.1:5432/shop"),
        ("postgres://kassa:hush@[::1]:5432/shop", "postgresql://[::1]:5432/shop"),
        ("postgresql:///shop?host=/run/postgresql", "postgresql:///shop"),
    ],
)
def test_a_database_url_is_shown_without_its_password(dsn: str, shown: str) -> None:
    assert without_password(dsn) == shown
