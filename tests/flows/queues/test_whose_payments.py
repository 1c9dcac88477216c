"""Whose payments come over the queue, and what else its settings say. While nobody can say whose, requests wait."""

from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from flows.api.support import House, Shop, running
from flows.queues.house import Client, Till, client_of, until
from flows.wechat_sandbox import SandboxProcess
from kassa.api import queue
from kassa.messaging.topology import PAYMENT_ORDERS
from kassa.workers import orders

QUEUE = "payment_order:kassa"
LONG_S = 1.0
"""More than several tries take where tries are counted: the first ones follow each other at once."""
on_two_kinds = pytest.mark.parametrize("broker_url", ["postgres", "memory"], indirect=True)
"""Our own tables, and a broker beside them."""


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who the merchant is, is asked for each request, and a worker notices within moments."""
    monkeypatch.setattr(queue, "MERCHANT_S", 0.0)
    monkeypatch.setattr(orders, "WAIT_S", 0.1)
    monkeypatch.setattr(orders, "PAUSE_S", 0.1)


@pytest.fixture
async def house(database_url: str) -> AsyncIterator[House]:
    """An API without any broker, to make merchants with."""
    async with running(database_url) as house:
        yield house


def wallet_order(order_id: str, wallet: str) -> dict[str, object]:
    return {"order_id": order_id, "amount": 30, "channel": "wallet", "payer": {"wallet": wallet}}


async def client_at(house: House) -> Client:
    (broker,) = house.app.brokers
    return await client_of(broker)


async def waiting(house: House) -> int:
    return (await house.app.queues.one(QUEUE)).waiting


async def nothing_was_tried(house: House) -> bool:
    tried = "SELECT count(*) FROM message WHERE topic = $1 AND (attempts > 0 OR lapses > 0)"
    return await house.app.pool.fetchval(tried, QUEUE) == 0 and (await house.app.queues.one(QUEUE)).dead == 0


async def test_with_two_merchants_requests_wait_for_the_setting_in_their_order(house: House, database_url: str) -> None:
    first, second = await house.shop("First"), await house.shop("Second")
    wallet = await second.wallet(100)
    async with running(database_url, brokers=("postgres",)) as unclear:
        client = await client_at(unclear)
        pay = await client.send(wallet_order("1", wallet))
        refund = await client.send({"action": "refund", "order_id": "1", "refund_id": "r-1", "amount": 10})
        assert await client.hears_nothing(LONG_S)
        assert await waiting(unclear) == 2
        assert await nothing_was_tried(unclear)

    named = f"mch_{second.merchant.id}"
    async with running(database_url, brokers=("postgres",), order_merchant=named) as clear:
        (broker,) = clear.app.brokers
        binder = await broker.binder()
        answers = await binder.subscribe(client.address, "client")
        again = Client(binder, PAYMENT_ORDERS._replace(name=client.address), answers)
        got = {answer.correlation_id: answer for answer in await again.answers(2)}

        assert await again.hears_nothing(LONG_S)
        assert await waiting(clear) == 0
    assert (got[pay].headers["kassa-status"], got[pay].body["object"]) == ("201", "payment")
    assert (got[refund].headers["kassa-status"], got[refund].body["object"]) == ("201", "refund")
    assert (await second.get(f"/v1/wallets/{wallet}")).json()["balance"] == 80
    assert len((await second.get("/v1/payments")).json()["data"]) == 1
    assert (await first.get("/v1/payments")).json()["data"] == []


@on_two_kinds
async def test_a_second_merchant_stops_the_queue_and_the_log_says_once_what_to_set(till: Till) -> None:
    wallet = await till.shop.wallet(1000)
    await till.client.ask(wallet_order("before", wallet))
    with capture_logs() as logs:
        await till.house.shop("Second")
        for number in range(5):
            await till.client.send(wallet_order(f"after-{number}", wallet), reply_to=None if number else "")
        assert await till.client.hears_nothing(LONG_S)
        assert await waiting(till.house) == 5
        assert await nothing_was_tried(till.house)

        till.house.app.order_merchant = f"mch_{till.shop.merchant.id}"
        (answer,) = await till.client.answers()

        async def all_are_done() -> bool:
            return await waiting(till.house) == 0

        await until(all_are_done, "all are done")
    assert answer.body["order_id"] == "after-0"
    (said,) = [one for one in logs if one["event"] == "orders.wait"]
    assert (said["log_level"], said["setting"], said["broker"]) == ("warning", "order_merchant", till.broker.name)
    assert "KASSA_ORDER_MERCHANT" in said["do"]
    assert [one["event"] for one in logs if one["event"] == "orders.go_on"] == ["orders.go_on"]
    assert (await till.shop.get(f"/v1/wallets/{wallet}")).json()["balance"] == 1000 - 6 * 30
    assert await till.dead(QUEUE) == []


@on_two_kinds
async def test_requests_for_a_merchant_that_is_not_active_wait_until_it_is(till: Till) -> None:
    wallet = await till.shop.wallet(100)
    await till.client.ask(wallet_order("before", wallet))

    await set_state(till, "suspended")
    await till.client.send(wallet_order("meanwhile", wallet), correlation_id="c-1")
    assert await till.client.hears_nothing(LONG_S)
    assert await waiting(till.house) == 1
    assert await nothing_was_tried(till.house)
    await set_state(till, "active")
    (answer,) = await till.client.answers()

    assert (answer.correlation_id, answer.body["order_id"]) == ("c-1", "meanwhile")
    assert await till.client.hears_nothing()
    assert await till.pool.fetchval("SELECT count(*) FROM payment WHERE order_id = 'meanwhile'") == 1


async def set_state(till: Till, state: str) -> None:
    """No command does this; whoever wrote to the table has."""
    await till.pool.execute("UPDATE merchant SET state = $2 WHERE id = $1", till.shop.merchant.id, state)


async def test_the_setting_says_whose_payments_they_are(house: House, database_url: str) -> None:
    first, second = await house.shop("First"), await house.shop("Second")
    for shop, other in ((first, second), (second, first)):
        named = f"mch_{shop.merchant.id}"
        wallet = await shop.wallet(100)
        async with running(database_url, brokers=("postgres",), order_merchant=named) as named_house:
            await (await client_at(named_house)).ask(wallet_order(named, wallet))

        assert len((await shop.get("/v1/payments", order_id=named)).json()["data"]) == 1
        assert (await other.get("/v1/payments", order_id=named)).json()["data"] == []


async def test_a_request_without_channel_goes_through_that_of_the_setting(database_url: str) -> None:
    async with running(database_url, brokers=("postgres",), order_channel="wallet") as house:
        wallet = await (await house.shop()).wallet(100)
        client = await client_at(house)

        answer = await client.ask({"order_id": "1", "amount": 30, "payer": {"wallet": wallet}})
        other = await client.ask({"order_id": "2", "amount": 30, "channel": "wechat", "method": "native"})

    assert (answer.body["state"], answer.body["channel"]) == ("succeeded", "wallet")
    assert other.body["code"] == "channel.not_found"


async def test_a_request_without_currency_is_in_that_of_the_setting(database_url: str) -> None:
    async with running(database_url, brokers=("postgres",), order_currency="JPY") as house:
        shop = await house.shop()
        yen, yuan = await shop.wallet(100, "JPY"), await shop.wallet(100)
        client = await client_at(house)

        answer = await client.ask(wallet_order("1", yen))
        other = await client.ask(wallet_order("2", yuan) | {"currency": "CNY"})

    assert (answer.body["state"], answer.body["currency"]) == ("succeeded", "JPY")
    assert (other.body["state"], other.body["currency"]) == ("succeeded", "CNY")


async def test_a_request_without_method_has_that_of_the_setting(database_url: str, sandbox: SandboxProcess) -> None:
    async with running(database_url, brokers=("postgres",), order_method="h5") as house:
        await at_wechat(await house.shop(), sandbox)
        client = await client_at(house)

        answer = await client.ask({"order_id": "1", "amount": 30, "payer": {"ip": "192.0.2.7"}})
        other = await client.ask({"order_id": "2", "amount": 30, "method": "native", "channel": "wechat"})

    assert answer.body["next_action"]["type"] == "redirect"
    assert other.body["next_action"]["code_url"].startswith("weixin://")


async def at_wechat(shop: Shop, sandbox: SandboxProcess) -> None:
    await shop.app.merchants.set_channel(shop.merchant.id, "wechat", sandbox.credentials)
