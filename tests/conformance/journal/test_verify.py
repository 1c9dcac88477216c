"""A change to any past row is found, whichever row it is."""

import tracemalloc

import asyncpg
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from conformance.journal.house import HOME, NOW, TABLES, committed, funded, paid, payment, refunded, wallet
from kassa.ids import new_id
from kassa.journal.change import Change
from kassa.journal.verify import Report, verify, write_anchor
from kassa.journal.writer import PostgresJournal
from kassa.ledger import chart
from kassa.ledger.model import HoldKey, hold, release

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)


async def _some_history(url: str) -> None:
    journal = PostgresJournal(lambda: asyncpg.connect(url), TABLES)
    await journal.start()
    purse = wallet()
    committed(await journal.commit(funded(purse, 1000)))
    order = payment("o-1", 300, purse.id)
    committed(await journal.commit(paid(order)))
    committed(await journal.commit(paid(payment("o-2", 200, purse.id))))
    committed(await journal.commit(refunded(order, 100)))
    committed(await journal.commit(refunded(order, 50)))
    key = HoldKey(new_id(), 0)
    account, other = chart.wallet(HOME, purse.id, "CNY"), chart.payable(HOME, "CNY")
    committed(await journal.commit(Change(home=HOME, transfers=(hold(1, account, other, 80, key),))))
    committed(await journal.commit(Change(home=HOME, transfers=(release(1, key),))))
    await journal.stop()


async def _verified(url: str) -> Report:
    connection = await asyncpg.connect(url)
    try:
        return await verify(connection, TABLES, KEY.public_key())
    finally:
        await connection.close()


async def test_an_honest_history_is_proven(database_url: str) -> None:
    await _some_history(database_url)
    connection = await asyncpg.connect(database_url)
    await write_anchor(connection, KEY, NOW)
    await connection.close()

    report = await _verified(database_url)

    assert report.faults == []
    assert report.anchored_at == NOW
    assert (report.batches, report.accounts) == (7, 3)


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE transfer SET amount = amount + 1 WHERE kind = 1 AND seq = 2",
        "UPDATE transfer SET root = NULL WHERE seq = 2",
        "DELETE FROM transfer WHERE seq = 3",
        "UPDATE account SET credits_posted = credits_posted + 1 WHERE code = 1",
        "UPDATE account SET debits_pending = debits_pending + 1 WHERE code = 1",
        "UPDATE payment SET amount = amount * 2 WHERE order_id = 'o-1'",
        "UPDATE payment SET order_id = 'other' WHERE order_id = 'o-2'",
        "UPDATE payment SET amount_refunded = 0 WHERE order_id = 'o-1'",
        "UPDATE payment SET state = 'closed' WHERE order_id = 'o-2'",
        "DELETE FROM payment WHERE order_id = 'o-2'",
        "UPDATE payment SET version = 0, amount_refunded = 0 WHERE order_id = 'o-1'",
        "INSERT INTO hold SELECT uuid(md5('x')), 0, debit, credit, 1, NULL, 'open' FROM transfer LIMIT 1",
        'INSERT INTO payment SELECT (jsonb_populate_record(p, \'{"writer": 60, "order_id": "forged", '
        '"id": "01900000-0000-7000-8000-000000000000"}\')).* FROM payment AS p LIMIT 1',
        "DELETE FROM move WHERE version = 1",
        "UPDATE move SET event = 'else' WHERE version = 2",
        "UPDATE event SET data = '{\"amount\": 1}'::bytea WHERE sequence = 1",
        "DELETE FROM event WHERE sequence = 2",
        "INSERT INTO event SELECT writer, seq + 100, ord, home, root, sequence + 100, at, type, data FROM event LIMIT 1",
        "UPDATE refund SET amount = amount + 1",
        "UPDATE wallet SET \"user\" = 'thief'",
        "DELETE FROM chain WHERE batch = 7",
        "DELETE FROM chain WHERE batch = 3",
        "UPDATE chain SET digests = replace(digests, 'transfer', 'transfers') WHERE batch = 2",
    ],
)
async def test_a_change_to_a_past_row_is_found(database_url: str, tampering: str) -> None:
    await _some_history(database_url)
    connection = await asyncpg.connect(database_url)
    await write_anchor(connection, KEY, NOW)
    done = await connection.execute(tampering)
    await connection.close()
    assert not done.endswith(" 0")

    report = await _verified(database_url)

    assert not report.is_sound
    assert report.faults


@pytest.mark.parametrize(
    "tampering", ["DELETE FROM chain WHERE batch > 1", "DELETE FROM chain WHERE batch IN (2, 3, 4, 5)"]
)
async def test_rows_that_belong_to_no_batch_are_counted_and_not_kept(database_url: str, tampering: str) -> None:
    """Whoever takes the end of a long chain away, or a piece of it, does not bring the verification down."""
    await _some_history(database_url)
    connection = await asyncpg.connect(database_url)
    await connection.execute(tampering)
    await connection.execute(
        "INSERT INTO event SELECT writer, 3, 100 + n, home, root, 100 + n, at, type, decode(repeat('61', 2000), 'hex') "
        "FROM (SELECT * FROM event LIMIT 1) AS e CROSS JOIN generate_series(1, 30000) AS n"
    )
    await connection.close()
    tracemalloc.start()

    report = await _verified(database_url)

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    strays = [fault for fault in report.faults if "rows of event" in fault and "belong to no batch" in fault]
    assert len(strays) == 1 and int(strays[0].split(": ")[1].split()[0]) > 30_000
    # The rows are 60 MB.
    assert peak < 20_000_000


async def test_a_chain_that_was_written_anew_contradicts_its_anchor(database_url: str) -> None:
    """Whoever has the database but not the anchor key cannot forge a whole history."""
    await _some_history(database_url)
    connection = await asyncpg.connect(database_url)
    await write_anchor(connection, Ed25519PrivateKey.generate(), NOW)
    await connection.close()

    report = await _verified(database_url)

    assert report.faults == ["Anchor 1 is not signed by the anchor key."]
    assert report.anchored_at is None
