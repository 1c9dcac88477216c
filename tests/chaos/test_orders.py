"""kill -9 between the parts of a request that came over a queue: one payment, and an answer at least once."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from chaos.house import House, until

PLANS = {
    "before the intent is stored": "charge.intended",
    "in the intent's commit": "charge.intended>commit.before",
    "when the intent is stored and nobody knows": "charge.intended>commit.after",
    "while the channel has it": "charge.sent",
    "when the channel has answered": "charge.answered",
    "when the outcome is stored and the answer is not": "charge.answered>commit.after",
    "in the commit of the answer": "charge.answered>commit.after>commit.before",
    "when the answer is stored and not sent": "charge.answered>commit.after>commit.after",
}
QUICK = (
    "when the intent is stored and nobody knows",
    "when the outcome is stored and the answer is not",
    "when the answer is stored and not sent",
)
"""Those that each cover another gap between two commits."""
HURRY = """
UPDATE message SET due = now() WHERE id IN (SELECT id FROM message FOR UPDATE SKIP LOCKED);
UPDATE message_lease SET leased_until = now() WHERE id IN (SELECT id FROM message_lease FOR UPDATE SKIP LOCKED)
"""
"""A dead process keeps its leases for a minute, and what it owed is due some seconds later. Whoever settles meanwhile is not
waited for: he has the lease and wants the message, so that each would wait for the other."""


@pytest.fixture
async def program(tmp_path: Path, database_url: str) -> AsyncIterator[tuple[House, Any]]:
    """`kassa up` on the PostgreSQL binder, and a program that has SQL alone."""
    house = House(tmp_path / "kassa", database_url, "--broker", "postgres")
    try:
        house.start()
        connection = await asyncpg.connect(database_url)
        await connection.execute("SELECT kassa_listen('answers')")
        yield house, connection
        await connection.close()
    finally:
        house.stop()


async def answers(connection: Any, correlation_id: str) -> list[dict[str, Any]]:
    """What has come for a request, with time passing quickly."""
    found: list[dict[str, Any]] = []

    async def has_come() -> bool:
        await connection.execute(HURRY)
        rows = await connection.fetch("SELECT * FROM kassa_receive('answers', at_most => 100)")
        found.extend(json.loads(row["body"]) for row in rows if row["correlation_id"] == correlation_id)
        return bool(found)

    await until(has_come, f"an answer to {correlation_id}")
    return found


async def ask_and_die(house: House, connection: Any, order_id: str, plan: str) -> None:
    """The process dies there with the request in its hands, and is started again."""
    house.crash_at(plan)
    order = json.dumps({"order_id": order_id, "amount": 100})
    await connection.execute("SELECT kassa_send('payment_order', $1, 'answers', $2)", order, order_id)

    async def is_dead() -> bool:
        return not house.is_alive

    await until(is_dead, f"to die at {plan}")
    house.kill()


@pytest.mark.parametrize("names", [QUICK, pytest.param(tuple(PLANS), marks=pytest.mark.long)], ids=["quick", "all"])
async def test_a_request_is_one_payment_and_has_its_answer_wherever_we_die(
    program: tuple[House, Any], names: tuple[str, ...]
) -> None:
    house, connection = program
    for number, name in enumerate(names):
        order_id = f"o-{number}"
        await ask_and_die(house, connection, order_id, PLANS[name])
        await asyncio.to_thread(house.start)

        found = await answers(connection, order_id)

        assert {one["order_id"] for one in found} == {order_id}, name
        assert len({one["id"] for one in found}) == 1, name
        assert found[0]["next_action"]["code_url"].startswith("weixin://"), name
        assert await connection.fetchval("SELECT count(*) FROM payment WHERE order_id = $1", order_id) == 1, name
    async with house.shop() as client:
        charges = (await client.door("/books", method="GET"))["charges"]
    assert len(charges) == len(names)


@pytest.mark.parametrize(
    "name",
    [
        "when the intent is stored and nobody knows",
        pytest.param("when the channel has answered", marks=pytest.mark.long),
    ],
)
async def test_an_answer_is_owed_even_when_the_broker_has_lost_the_request(
    program: tuple[House, Any], name: str
) -> None:
    house, connection = program
    await ask_and_die(house, connection, "lost", PLANS[name])
    await connection.execute("DELETE FROM message WHERE topic = 'payment_order:kassa'")
    await asyncio.to_thread(house.start)

    async with house.shop() as client:
        hurrying = asyncio.create_task(_timers_pass(connection_url=house.told["database"]))
        try:
            found = await answers(connection, "lost")
        finally:
            hurrying.cancel()
        charges = (await client.door("/books", method="GET"))["charges"]

    assert found[0]["next_action"]["code_url"].startswith("weixin://")
    assert len(charges) == 1


async def _timers_pass(connection_url: str) -> None:
    """The attempt's own timer asks the channel, as it does half a minute later."""
    connection = await asyncpg.connect(connection_url)
    try:
        while True:
            await connection.execute("UPDATE timer SET due = now(), leased_until = NULL WHERE kind = 'attempt'")
            await asyncio.sleep(0.5)
    finally:
        connection.terminate()
