"""A program that has SQL and nothing else: it puts a request in, and gets its answer, in its own transactions."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from flows.api.support import House, running
from flows.queues.house import until
from kassa.ids import event_name, new_id
from kassa.messaging.binders.postgres import message_ids
from kassa.messaging.model import Confirmed, Record


@pytest.fixture
async def house(database_url: str) -> AsyncIterator[House]:
    async with running(database_url, brokers=("postgres",), order_channel="wallet") as running_house:
        yield running_house


@pytest.fixture
async def program(database_url: str, house: House) -> AsyncIterator[Any]:
    """A connection of a role that may call the functions and nothing else."""
    role = f"shop_{database_url.rpartition('_')[2]}"
    await house.app.pool.execute(
        f"CREATE ROLE {role}; GRANT EXECUTE ON FUNCTION kassa_send, kassa_listen, kassa_receive TO {role}"
    )
    connection = await asyncpg.connect(database_url)
    await connection.execute(f"SET SESSION AUTHORIZATION {role}")
    yield connection
    await connection.close()
    await house.app.pool.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_a_request_and_its_answer(house: House, program: Any) -> None:
    shop = await house.shop()
    order = {"order_id": "sql-1", "amount": 40, "payer": {"wallet": await shop.wallet(100)}}

    await program.execute("SELECT kassa_listen('my.answers')")
    await program.fetchval(
        "SELECT kassa_send('payment_order', $1, reply_to => 'my.answers', correlation_id => 'c-1')", json.dumps(order)
    )
    row = await until(lambda: program.fetchrow("SELECT * FROM kassa_receive('my.answers')"), "an answer")

    assert row["correlation_id"] == "c-1"
    assert (json.loads(row["body"])["order_id"], json.loads(row["body"])["state"]) == ("sql-1", "succeeded")
    assert json.loads(row["headers"])["kassa-status"] == "201"
    assert await program.fetch("SELECT * FROM kassa_receive('my.answers')") == []
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await program.fetch("SELECT * FROM message")


async def test_row_of_a_record_is_the_same_whoever_sends_it(house: House, program: Any) -> None:
    await program.execute("SELECT kassa_listen('my.topic')")
    names = [new_id(), event_name(3, 77, 1), "id-1", str(uuid4()), "evt_1"]

    for name in names:
        await program.execute("SELECT kassa_send('my.topic', '{}', id => $1)", name)
    rows = await house.app.pool.fetch("SELECT id FROM message WHERE topic = 'my.topic:client' ORDER BY position")

    assert [row["id"].hex for row in rows] == message_ids("my.topic:client", names)


async def test_a_request_is_part_of_the_program_s_own_transaction(house: House, program: Any) -> None:
    shop = await house.shop()
    order = {"order_id": "sql-2", "amount": 40, "payer": {"wallet": await shop.wallet(100)}}
    await program.execute("SELECT kassa_listen('my.answers')")

    with pytest.raises(ZeroDivisionError):
        async with program.transaction():
            await program.execute("SELECT kassa_send('payment_order', $1, 'my.answers')", json.dumps(order))
            raise ZeroDivisionError
    for _ in range(2):
        await program.execute("SELECT kassa_send('payment_order', $1, 'my.answers', 'c', 'id-1')", json.dumps(order))
    await until(lambda: program.fetchrow("SELECT * FROM kassa_receive('my.answers')"), "an answer")

    assert len((await shop.get("/v1/payments", order_id="sql-2")).json()["data"]) == 1


async def test_an_answer_that_was_rolled_back_is_there_again(house: House, program: Any) -> None:
    await house.shop()
    await program.execute("SELECT kassa_listen('my.answers')")
    await program.execute(
        """SELECT kassa_send('payment_order', '{"action": "query", "order_id": "x"}', 'my.answers')"""
    )

    async def received_and_undone() -> object:
        transaction = program.transaction()
        await transaction.start()
        row = await program.fetchrow("SELECT * FROM kassa_receive('my.answers')")
        await transaction.rollback()
        return row

    undone = await until(received_and_undone, "an answer")
    again = await program.fetchrow("SELECT * FROM kassa_receive('my.answers')")

    assert undone == again
    assert json.loads(again["body"])["code"] == "payment.not_found"


async def test_events_are_read_like_answers(house: House, program: Any) -> None:
    shop = await house.shop()
    wallet = await shop.wallet(100)
    await program.execute("SELECT kassa_listen('kassa.events', 'accounting')")

    paid = (await shop.pay(wallet, 10)).json()
    headers: dict[str, str] = {}
    while headers.get("ce-type") != "payment.succeeded":
        # The relay may have been slow, so that the wallet's event is sent after somebody listens.
        row = await until(
            lambda: program.fetchrow("SELECT * FROM kassa_receive('kassa.events', 'accounting')"), "an event"
        )
        headers = json.loads(row["headers"])

    assert headers["ce-subject"] == paid["id"]
    assert json.loads(row["body"]) == paid


async def test_a_topic_that_nobody_receives_is_refused(program: Any) -> None:
    with pytest.raises(asyncpg.RaiseError, match="nobody receives nowhere"):
        await asyncio.wait_for(program.execute("SELECT kassa_send('nowhere', '{}')"), 60)


async def test_a_body_that_is_no_text_comes_as_base64_and_holds_up_nothing(house: House, program: Any) -> None:
    bodies = [b"\x89PNG\0\xff", b"zero \0 byte", b'{"a": 1}']
    await program.execute("SELECT kassa_listen('my.pictures')")
    (broker,) = house.app.brokers
    records = [Record(new_id(), "", body, {"content-type": "image/png"}) for body in bodies]
    binder = await broker.binder()
    assert await binder.send("my.pictures", records, deadline_s=10.0) == [Confirmed()] * 3

    rows = await program.fetch("SELECT body, headers FROM kassa_receive('my.pictures', at_most => 10)")

    headers = [json.loads(row["headers"]) for row in rows]
    assert [one.get("content-transfer-encoding") for one in headers] == ["base64", "base64", None]
    assert {one["content-type"] for one in headers} == {"image/png"}
    assert [base64.b64decode(row["body"]) for row in rows[:2]] == bodies[:2]
    assert rows[2]["body"] == '{"a": 1}'
