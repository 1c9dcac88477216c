"""Events for everybody: each once they are committed, in the order of their payment, as CloudEvents that others can read."""

import asyncio
import json
from typing import Any

from cloudevents.core.bindings.http import HTTPMessage, from_http_event
from cloudevents.core.formats.json import JSONFormat

from flows.queues.house import PATIENCE_S, Till, until
from kassa.errors import BrokerUnreachable
from kassa.ids import new_id
from kassa.journal.change import Change
from kassa.messaging.binder import Binder, Subscription
from kassa.messaging.consumer import Consumer
from kassa.messaging.log import EventLog
from kassa.messaging.model import Ack, Delivery, Failed, Packet, Record
from kassa.messaging.topology import EVENT_BATCHES, EVENTS, Topic


async def listener(till: Till, topic: Topic) -> Subscription:
    """A group of its own, from now on."""
    group = f"books-{new_id()[-8:]}"
    await till.broker.subscribe_group(topic.name, group)
    return await (await till.broker.binder()).subscribe(topic.name, group)


async def heard(subscription: Subscription, home_of: set[str], count: int) -> list[Delivery]:
    """The next events of these payments; a shared server may have those of other tests too."""
    found: list[Delivery] = []
    async with asyncio.timeout(PATIENCE_S):
        while len(found) < count:
            deliveries = await subscription.receive(100, 5.0)
            found += [one for one in deliveries if one.record.headers.get("ce-subject") in home_of]
            await subscription.settle([(one, Ack()) for one in deliveries])
    return found


async def test_the_events_of_a_payment_come_in_order_and_the_cloudevents_package_reads_them(till: Till) -> None:
    wallet = await till.shop.wallet(10_000)
    subscription = await listener(till, EVENTS)

    paid = [(await till.shop.pay(wallet, 100)).json() for _ in range(20)]
    for payment in paid:
        for number in range(2):
            body = {"refund_id": f"{payment['id']}-{number}", "amount": 10}
            assert (await till.shop.post(f"/v1/payments/{payment['id']}/refunds", body)).status_code == 201
    log = await EventLog(till.pool).of_home(till.shop.merchant.home, 1000)
    ours = {payment["id"] for payment in paid}
    deliveries = await heard(
        subscription, ours, sum(one.type.partition(".")[0] in ("payment", "refund") for one in log)
    )

    for payment in paid:
        mine = [one.record for one in deliveries if one.record.headers["ce-subject"] == payment["id"]]
        assert [int(one.headers["ce-sequence"]) for one in mine] == list(range(1, len(mine) + 1))
        assert mine[0].headers["ce-type"] == "payment.succeeded"
    record = deliveries[0].record
    event = from_http_event(HTTPMessage(record.headers, record.body), JSONFormat())
    assert (event.get_type(), event.get_source(), event.get_subject()) == (
        record.headers["ce-type"], "kassa", record.headers["ce-subject"],
    )  # fmt: skip
    assert event.get_id().startswith("evt_")
    assert event.get_extension("sequence") == record.headers["ce-sequence"]
    data: Any = event.get_data()
    assert data["object"] in ("payment", "refund")


async def test_envelopes_have_the_same_events_for_who_asked_for_them(till: Till) -> None:
    wallet = await till.shop.wallet(1000)
    subscription = await listener(till, EVENT_BATCHES)
    relay = f"relay:{till.broker.name}:{EVENT_BATCHES.name}"

    async def is_read() -> object:
        return await till.pool.fetchval("SELECT holder FROM log_group WHERE name = $1", relay)

    await until(is_read, "a relay of envelopes")
    paid = [(await till.shop.pay(wallet, 1)).json() for _ in range(30)]
    deliveries = await heard(subscription, {payment["id"] for payment in paid}, 30)

    assert sorted(json.loads(one.record.body)["id"] for one in deliveries) == sorted(one["id"] for one in paid)


async def test_what_another_version_says_is_read_as_far_as_it_is_understood(till: Till) -> None:
    """Two versions of Kassa on one topic: a field, a header and a type that ours does not know, in both kinds of packets."""
    handled: list[Record] = []
    binder = await till.broker.binder()
    topic = Topic(f"mixed-{new_id()[-8:]}", ("books",), "Both versions.", envelopes=True)
    await binder.provision([topic])
    headers = {"content-type": "application/json", "ce-specversion": "1.0", "ce-id": "evt_x", "ce-source": "kassa"}
    known = Record("evt_1", "k", b'{"id": "pay_1", "colour": "red"}', {**headers, "ce-type": "payment.succeeded"})
    unknown = Record("evt_2", "k", b'{"id": "thing_1"}', {**headers, "ce-type": "thing.happened", "ce-colour": "red"})
    envelope = [
        {
            "specversion": "1.0", "id": "evt_3", "source": "kassa", "type": "thing.happened", "subject": "thing_1",
            "colour": "red", "datacontenttype": "application/json", "data": {"id": "thing_1"}, "kassakey": "k",
        }
    ]  # fmt: skip
    raw = Record("evt_3", "", json.dumps(envelope).encode(), {"content-type": "application/cloudevents-batch+json"})

    async def handler(records: Any) -> list[Any]:
        handled.extend(records)
        return [Change(home=7) for _ in records]

    consumer = Consumer(await binder.subscribe(topic.name, "books"), "books", till.house.app.journal, handler)
    receipts = await binder.send(topic.name, [known, unknown], deadline_s=60)
    assert [type(one).__name__ for one in receipts] == ["Confirmed"] * 2
    await _as_it_is(till, binder, topic, raw)
    async with asyncio.timeout(PATIENCE_S):
        while len(handled) < 3:
            await consumer.step(1.0)

    assert [one.id for one in handled if one.id != "evt_3"] == ["evt_1", "evt_2"]
    assert {one.headers.get("ce-type") for one in handled} == {"payment.succeeded", "thing.happened"}
    assert await till.dead(f"{topic.name}:books") == []


async def _as_it_is(till: Till, binder: Binder, topic: Topic, raw: Record) -> None:
    """Sends a packet that another version made, past our own packing."""
    foreign = topic._replace(envelopes=False)
    transport = getattr(binder, "transport", None)
    if transport is None:
        item = json.loads(raw.body)[0]
        record = Record(
            item["id"], "k", json.dumps(item["data"]).encode(), {"ce-type": item["type"], "ce-colour": "red"}
        )
        await binder.send(topic.name, [record], deadline_s=60)
        return
    await transport.send(foreign, [Packet(raw.id, "", raw.body, raw.headers)], deadline_s=60, must_arrive=True)


async def test_while_a_broker_is_away_payments_are_taken_and_afterwards_every_event_arrives(till: Till) -> None:
    """The broker answers no send for a while; the real ones are killed in tests/brokers."""
    wallet = await till.shop.wallet(1000)
    subscription = await listener(till, EVENTS)
    binder = await till.broker.binder()
    send = binder.send

    async def away(*_: Any, **__: Any) -> Any:
        return [Failed(str(BrokerUnreachable(broker=till.broker.name)), is_retryable=True)] * len(_[1])

    binder.send = away  # type: ignore[method-assign]
    paid = [(await till.shop.pay(wallet, 1)).json() for _ in range(10)]

    async def told() -> bool:
        answer = await till.house.http.get("/readyz")
        checks = {check["name"]: check for check in answer.json()["checks"]}
        return answer.status_code == 200 and not checks[f"broker {till.broker.name}"]["ok"]

    await until(told, "readyz tells of it, and stays ready")
    binder.send = send  # type: ignore[method-assign]
    deliveries = await heard(subscription, {payment["id"] for payment in paid}, 10)

    assert len({one.record.id for one in deliveries}) == 10
