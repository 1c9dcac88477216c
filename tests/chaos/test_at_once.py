"""Many at once: refunds of one payment, one key from everywhere, callback against query against close, two processes."""

import asyncio
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from chaos.house import Client, House, hurried, hurry, judge, settle, until
from kassa.ids import new_id

MANY = 100
REFUNDS_ARE_DUE = """
UPDATE timer SET due = now() WHERE (entity, kind) IN
    (SELECT entity, kind FROM timer WHERE kind = 'refund' AND leased_until IS NULL FOR UPDATE SKIP LOCKED)
"""


async def test_a_hundred_refunds_of_one_wallet_payment(house: House) -> None:
    """Of a hundred that want 3 of 100, thirty-three get it."""
    async with house.shop() as client:
        wallet = await client.wallet(100)
        payment = await client.pay_from(wallet, 100)

        answers = await _refunds(client, payment, 3)

        assert Counter(answer.status_code for answer in answers) == {201: 33, 409: MANY - 33}
        assert {answer.json()["code"] for answer in answers if answer.status_code == 409} == {"refund.exceeds_paid"}
        assert (await client.get(f"/v1/wallets/{wallet}"))["balance"] == 99
        assert (await client.get(f"/v1/payments/{payment['id']}"))["amount_refunded"] == 99
        await judge(client)


async def test_a_hundred_refunds_of_one_channel_payment(house: House) -> None:
    """The channel takes fifty of one payment, one a minute: one is sent, the others wait their turn."""
    async with house.shop() as client:
        payment = await client.order(100)
        await client.pay(payment)
        await client.until(f"/v1/payments/{payment['id']}", "succeeded")
        began = time.monotonic()

        def sent_max() -> int:
            """One, unless the machine is so slow that a minute is over."""
            return 1 + int((time.monotonic() - began) / 60)

        answers = await _refunds(client, payment, 1)

        assert Counter(answer.status_code for answer in answers) == {201: 50, 409: MANY - 50}
        refunding = (await client.get(f"/v1/payments/{payment['id']}"))["amount_refunding"]
        assert 50 - sent_max() <= refunding <= 50
        await settle(house)
        states = Counter(refund["state"] for refund in (await client.get("/v1/refunds?limit=100"))["data"])
        assert 1 <= states["succeeded"] <= sent_max()
        assert states == {"succeeded": states["succeeded"], "reserved": 50 - states["succeeded"]}
        books = await client.door("/books", method="GET")
        assert {refund["state"] for refund in books["refunds"]} == {"SUCCESS"}
        assert states["succeeded"] <= len(books["refunds"]) <= sent_max()


async def test_one_key_from_everywhere_has_one_effect(house: House) -> None:
    async with house.shop() as client:
        wallet = await client.wallet(1000)
        body = {"order_id": new_id(), "amount": 7, "currency": "CNY", "channel": "wallet", "payer": {"wallet": wallet}}
        key = new_id()

        from_wallet = await asyncio.gather(*(client.once("POST", "/v1/payments", body, key) for _ in range(MANY)))

        assert (await client.get(f"/v1/wallets/{wallet}"))["balance"] == 993
        _same(from_wallet)

        body = {"order_id": new_id(), "amount": 7, "currency": "CNY", "channel": "wechat", "method": "native"}
        through_channel = await asyncio.gather(
            *(client.once("POST", "/v1/payments", body, new_key) for new_key in [new_id()] * MANY)
        )

        _same([answer for answer in through_channel if answer.status_code != 409])
        codes = {answer.json()["code"] for answer in through_channel if answer.status_code == 409}
        assert codes <= {"idempotency.in_progress"}
        books = await client.door("/books", method="GET")
        assert len(books["charges"]) == 2


async def test_one_key_of_a_refund_from_everywhere_has_one_effect(house: House) -> None:
    """From a wallet payment and through the channel."""
    async with house.shop() as client:
        bought = await client.pay_from(await client.wallet(100), 100)
        paid = await client.order(100)
        await client.pay(paid)
        await client.until(f"/v1/payments/{paid['id']}", "succeeded")
        for payment in (bought, paid):
            path, key = f"/v1/payments/{payment['id']}/refunds", new_id()
            body = {"amount": 7, "refund_id": new_id()}

            answers = await asyncio.gather(*(client.once("POST", path, body, key) for _ in range(MANY)))

            _same([answer for answer in answers if answer.status_code != 409])
            codes = {answer.json()["code"] for answer in answers if answer.status_code == 409}
            assert codes <= {"idempotency.in_progress"}
            now = await client.get(f"/v1/payments/{payment['id']}")
            assert now["amount_refunded"] + now["amount_refunding"] == 7
        await judge(client)


@pytest.mark.long
async def test_fifty_refunds_of_one_channel_payment_all_go_out_in_the_end(house: House) -> None:
    """A minute passes at the provider, and all that wait are tried at once, forty-nine times: the provider takes one and
    refuses the others, and a refusal that only says «later» fails none of them."""
    async with house.shop() as client:
        await client.listen()
        await client.door("/settings", {"refund_delay_ms": 50, "signtest_every": 0})
        payment = await client.order(100)
        await client.pay(payment)
        await client.until(f"/v1/payments/{payment['id']}", "succeeded")
        await _refunds(client, payment, 1)
        while await _one_more_refund(house) < 50:
            await client.door("/clock", {"advance_s": 61})

        shown = await client.get(f"/v1/payments/{payment['id']}")
        assert (shown["amount_refunded"], shown["amount_refunding"]) == (50, 0)
        await judge(client)


@pytest.mark.long
async def test_callback_against_query_against_close_many_times(house: House) -> None:
    """As below, with the moments by chance, and a refund on top of those that are paid."""
    async with house.shop() as client:
        await client.listen()
        async with hurried(house):
            for _ in range(15):
                payments = [await client.order(100) for _ in range(20)]
                await asyncio.gather(*(_race(client, payment) for payment in payments), hurry(house))
        await judge(client)
        await _closed_or_paid(client)


async def test_callback_against_query_against_close(house: House) -> None:
    """The payer pays in the very moment in which the merchant closes and we ask: the provider decides, once."""
    async with house.shop() as client:
        await client.listen()
        payments = [await client.order(100) for _ in range(20)]

        await asyncio.gather(
            *(client.door("/pay", {"out_trade_no": payment["attempts"][0]["number"]}) for payment in payments),
            *(client.once("POST", f"/v1/payments/{payment['id']}/close") for payment in payments),
            hurry(house),
        )

        await judge(client)
        states = Counter([(await client.get(f"/v1/payments/{payment['id']}"))["state"] for payment in payments])
        assert states.keys() <= {"succeeded", "closed"}
        books = await client.door("/books", method="GET")
        paid = [charge for charge in books["charges"] if charge["state"] == "SUCCESS"]
        assert states["succeeded"] == len(paid)


async def test_two_processes_on_one_database(house: House, tmp_path: Path) -> None:
    """The same orders through both, and the workers of both on the same timers and events."""
    other = House(tmp_path / "other", house.database_url)
    try:
        other.start()
        async with house.shop() as client, other.shop() as twin:
            await client.listen()
            merchant = other.told | {"api_key": house.told["api_key"]}
            twin.house.told = merchant
            wallet = await client.wallet(1000)
            bodies: list[dict[str, Any]] = [
                {"order_id": new_id(), "amount": 5, "currency": "CNY", "channel": "wallet", "payer": {"wallet": wallet}}
                for _ in range(50)
            ]

            answers = await asyncio.gather(
                *(
                    door.once("POST", "/v1/payments", body, body["order_id"])
                    for body in bodies
                    for door in (client, twin)
                )
            )

            assert {answer.status_code for answer in answers} == {201}
            assert len({answer.json()["id"] for answer in answers}) == 50
            assert (await twin.get(f"/v1/wallets/{wallet}"))["balance"] == 750
            await judge(client)
            assert await _deliveries_per_event(house) == 1
    finally:
        other.stop()


async def _refunds(client: Client, payment: dict[str, Any], amount: int) -> list[httpx.Response]:
    path = f"/v1/payments/{payment['id']}/refunds"
    asked = [client.once("POST", path, {"amount": amount, "refund_id": new_id()}) for _ in range(MANY)]
    return await asyncio.gather(*asked)


def _same(answers: list[httpx.Response]) -> None:
    assert {answer.status_code for answer in answers} == {201}, [answer.text for answer in answers][:3]
    assert len({answer.json()["id"] for answer in answers}) == 1
    first = [answer for answer in answers if "idempotent-replayed" not in answer.headers]
    assert len(first) == 1


async def _one_more_refund(house: House) -> int:
    """How many have succeeded, once it is one more than now; all the others are tried meanwhile, and none fails."""
    connection = await asyncpg.connect(house.told["database"])
    try:
        states: Counter[str] = Counter()

        async def count() -> int:
            states.clear()
            states.update(dict(await connection.fetch("SELECT state, count(*) FROM refund GROUP BY state")))
            assert states.keys() <= {"reserved", "sending", "processing", "unknown", "succeeded"}
            return states["succeeded"]

        before = await count()

        async def is_one_more() -> bool:
            await connection.execute(REFUNDS_ARE_DUE)
            return await count() > before

        await until(is_one_more, f"another refund than {states}")
        return states["succeeded"]
    finally:
        await connection.close()


async def _race(client: Client, payment: dict[str, Any]) -> None:
    """The payer pays and the merchant closes at nearly the same moment; who is paid gives some of it back."""

    async def pay() -> None:
        await asyncio.sleep(random.uniform(0, 0.1))
        await client.door("/pay", {"out_trade_no": payment["attempts"][0]["number"]})

    async def close() -> None:
        await asyncio.sleep(random.uniform(0, 0.1))
        await client.once("POST", f"/v1/payments/{payment['id']}/close")
        path = f"/v1/payments/{payment['id']}/refunds"
        await client.once("POST", path, {"amount": 30, "refund_id": new_id()})

    await asyncio.gather(pay(), close())


async def _closed_or_paid(client: Client) -> None:
    """Every payment has ended as the provider decided."""
    connection = await asyncpg.connect(client.house.told["database"])
    try:
        states = {
            row[0]: row[1] for row in await connection.fetch("SELECT state, count(*) FROM payment GROUP BY state")
        }
    finally:
        await connection.close()
    books = await client.door("/books", method="GET")
    charges = Counter(charge["state"] in ("SUCCESS", "REFUND") for charge in books["charges"])
    assert states == {"succeeded": charges[True], "closed": charges[False]}
    assert charges[True] and charges[False]


async def _deliveries_per_event(house: House) -> int:
    connection = await asyncpg.connect(house.told["database"])
    try:
        most: int = await connection.fetchval(
            "SELECT max(count) FROM (SELECT count(*) FROM webhook_delivery GROUP BY event) AS counted"
        )
        return most
    finally:
        await connection.close()
