"""What an operator does with queues, over each broker: look, pause, throw away, try again. And who may."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from flows.api.support import House, Shop
from flows.messaging.house import put
from flows.queues.house import Till, until
from kassa.errors import QueueNotFound, QueueNotPausable, QueueNotPurgeable, RequestInvalid
from kassa.ids import new_id
from kassa.messaging.binder import Elsewhere
from kassa.messaging.metered import MeteredBinder
from kassa.messaging.model import Ack, Record
from kassa.messaging.queues import Purged, Queue, Replayed
from kassa.messaging.topology import EVENTS
from kassa.messaging.work import MessageWork, OutgoingMessage
from kassa.workers.relay import listen

QUEUE = "payment_order:kassa"
HOUR_S = 3600.0
PAUSED_S = 2.5
"""What a consumer asked for before the pause may still come for two seconds."""


class Operator:
    """Somebody with a key of the house."""

    def __init__(self, house: House, key: str) -> None:
        self._http = httpx.AsyncClient(base_url=house.api.url, headers={"Authorization": f"Bearer {key}"}, timeout=60.0)

    async def get(self, path: str) -> Any:
        answer = await self._http.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def post(self, path: str, body: Any = None, *, expect: int = 200) -> Any:
        answer = await self._http.post(path, json=body)
        assert answer.status_code == expect, answer.text
        return answer.json()

    async def close(self) -> None:
        await self._http.aclose()


async def operator_of(house: House) -> Operator:
    return Operator(house, (await house.app.merchants.create_operator_key(label="night shift")).key)


async def queue_of(till: Till, name: str = QUEUE) -> Queue:
    return await till.house.app.queues.one(name)


async def test_paused_queue_shows_what_waits_and_goes_on_when_it_is_resumed(till: Till) -> None:
    queues = till.house.app.queues
    await queues.pause(QUEUE)
    await asyncio.sleep(PAUSED_S)
    await till.client.send({"order_id": "paused-1", "amount": 100})

    async def waits() -> bool:
        return (await queue_of(till)).waiting == 1

    await until(waits, "the request waits")
    shown = await queue_of(till)
    assert (shown.paused, shown.brokers, shown.kind) == (True, [till.broker.name], "group")
    assert await till.client.hears_nothing()

    await queues.resume(QUEUE)

    (answer,) = await till.client.answers()
    assert answer.body["order_id"] == "paused-1"

    async def is_done() -> bool:
        found = await queue_of(till)
        return found.waiting == 0 and not found.paused

    await until(is_done, "nothing waits any more")


async def test_what_died_is_browsed_and_replayed_over_the_api(till: Till) -> None:
    operator = await operator_of(till.house)
    await till.client.send({"order_id": "", "amount": 100}, reply_to=None)

    async def died() -> bool:
        return (await queue_of(till)).dead == 1

    await until(died, "it died")
    (dead,) = (await operator.get(f"/v1/queues/{QUEUE}/dead"))["data"]
    assert "order_id" in dead["reason"] and "amount" in dead["body"]

    assert await operator.post(f"/v1/queues/{QUEUE}/replay", {"ids": [dead["id"]]}) == {
        "replayed": 1, "left": 0,
    }  # fmt: skip
    await until(died, "it died again, for the same reason")
    refused = await operator.post(f"/v1/queues/{QUEUE}/replay", {}, expect=400)
    assert refused["errors"][0]["field"] == "all"
    both = await operator.post(f"/v1/queues/{QUEUE}/replay", {"ids": [dead["id"]], "all": True}, expect=400)
    assert "not both" in both["errors"][0]["message"]

    assert await operator.post(f"/v1/queues/{QUEUE}/purge", {"dead": True}) == {"gone": 1, "left": 0}
    assert (await operator.get(f"/v1/queues/{QUEUE}/dead"))["data"] == []
    await operator.close()


async def test_what_died_is_replayed_by_time_and_as_a_whole_and_what_a_limit_leaves_is_told(till: Till) -> None:
    """Each dies again for the same reason, and is younger then; so times tell them apart."""
    operator = await operator_of(till.house)

    async def are_dead(count: int) -> None:
        async def died() -> bool:
            return (await queue_of(till)).dead == count

        await until(died, f"{count} are dead")

    async def replay(**which: Any) -> tuple[int, int]:
        answer = await operator.post(f"/v1/queues/{QUEUE}/replay", which)
        return answer["replayed"], answer["left"]

    for number in range(3):
        await till.client.send({"order_id": "", "amount": number}, reply_to=None)
        await are_dead(number + 1)
    newest, *older = (await operator.get(f"/v1/queues/{QUEUE}/dead"))["data"]
    since = newest["died_at"]

    assert await replay(died_to=since, limit=1) == (1, 1)
    await are_dead(3)
    assert await replay(died_to=since) == (1, 0)
    await are_dead(3)
    assert await replay(died_to=since) == (0, 0)
    assert await replay(died_from=since, limit=2) == (2, 1)
    await are_dead(3)
    assert await replay(all=True, limit=2) == (2, 1)
    await are_dead(3)
    assert await replay(all=True) == (3, 0)
    await are_dead(3)
    left = (await operator.get(f"/v1/queues/{QUEUE}/dead"))["data"]
    assert {one["id"] for one in left} == {newest["id"], *(one["id"] for one in older)}
    assert all(one["died_at"] > since for one in left)
    await operator.close()


async def test_purge_takes_what_nobody_holds_and_the_rest_stays(till: Till) -> None:
    """A running consumer of a broker has its lane, and what it fetched; so together they are what was there."""
    queues = till.house.app.queues
    await queues.pause(QUEUE)
    await asyncio.sleep(PAUSED_S)
    for number in range(5):
        await till.client.send({"order_id": f"purged-{number}", "amount": 100})

    async def wait() -> bool:
        return (await queue_of(till)).waiting == 5

    await until(wait, "they wait")
    purged = await queues.purge(QUEUE)
    assert purged.gone + purged.left == 5
    binder = await till.broker.binder()
    assert isinstance(binder, MeteredBinder)
    assert purged.left == 0 or isinstance(binder.inner, Elsewhere)

    await queues.resume(QUEUE)
    answers = await till.client.answers(purged.left) if purged.left else []
    answered = {one.body["order_id"] for one in answers}
    assert len(answered) == purged.left
    assert await till.client.hears_nothing()
    for number in range(5):
        assert bool(await till.payments(f"purged-{number}")) is (f"purged-{number}" in answered)


async def test_purge_of_a_queue_without_consumers_takes_all_of_it_wherever_it_waits(till: Till) -> None:
    queues, group = till.house.app.queues, f"purged-{new_id()[-12:]}"
    name = f"{EVENTS.name}:{group}"
    await listen(till.house.app, till.broker, EVENTS.name, group)

    async def waits() -> bool:
        return (await queue_of(till, name)).waiting == 3

    for number in range(3):
        await till.client.ask({"order_id": f"{group}-{number}", "amount": 100})
    await until(waits, "three events wait, one of each payment")

    assert await queues.purge(name) == Purged(3, 0)

    subscription = await (await till.broker.binder()).subscribe(EVENTS.name, group)
    assert await subscription.receive(10, 2.0) == []
    await till.client.ask({"order_id": f"{group}-last", "amount": 100})
    (event,) = await subscription.receive(10, 60.0)
    assert json.loads(event.record.body)["order_id"] == f"{group}-last"


async def test_forgetting_the_dead_counts_those_that_were_not_replayed(till: Till) -> None:
    for _ in range(2):
        await till.client.send({"order_id": "", "amount": 100}, reply_to=None)

    async def died() -> bool:
        return (await queue_of(till)).dead == 2

    await until(died, "both died")
    one = "SELECT id FROM dead_letter WHERE topic = $1 LIMIT 1"
    await till.pool.execute(f"UPDATE dead_letter SET replayed_at = now() WHERE id = ({one})", QUEUE)

    assert (await queue_of(till)).dead == 1
    assert await till.house.app.queues.forget_dead(QUEUE) == 1
    assert await till.house.app.queues.forget_dead(QUEUE) == 0


async def test_purging_answers_leaves_those_that_are_owed_and_not_due(till: Till) -> None:
    name = f"replies:{till.broker.name}"
    headers = {"reply-to": "nobody-is-here"}
    owed = {"kassa-owed": f"payment {new_id()}"}
    await put(
        till.pool,
        OutgoingMessage(new_id(), 1, name, "", 4, HOUR_S, headers, b"{}"),
        OutgoingMessage(new_id(), 1, name, "", 4, HOUR_S, headers | owed, b"{}"),
    )

    purged = await till.house.app.queues.purge(name)

    assert (purged.gone, purged.left) == (1, 1)
    (left,) = await MessageWork(till.pool).peek(name)
    assert "kassa-owed" in left.headers


async def test_records_are_counted_where_they_pass(till: Till) -> None:
    for number in range(3):
        await till.client.ask({"order_id": f"counted-{number}", "amount": 100})

    async def page() -> str:
        return (await till.house.http.get("/metrics")).text

    async def is_counted() -> bool:
        return 'kassa_queue_latency_seconds_count{group="kassa",topic="payment_order"} 3.0' in await page()

    await until(is_counted, "three were handled")
    lines = (await page()).splitlines()
    for line in (
        'kassa_queue_handled_total{group="kassa",topic="payment_order"} 3.0',
        'kassa_queue_received_total{group="kassa",topic="payment_order"} 3.0',
        'kassa_queue_given_up_total{group="kassa",topic="payment_order"} 0.0',
        'kassa_queue_sent_confirmed_total{topic="replies"} 3.0',
        f'kassa_broker_up{{broker="{till.broker.name}"}} 1.0',
    ):
        assert line in lines
    assert any(line.startswith('kassa_queue_length{group="kassa",topic="payment_order"} ') for line in lines)


async def test_groups_of_the_log_are_queues_too(till: Till) -> None:
    """A relay whose broker refuses an event for good parks it, gives it up in the end, and tries again when it is told to."""
    queues = till.house.app.queues
    name = f"relay:{till.broker.name}:kassa.events"
    await till.client.ask({"order_id": "log-1", "amount": 100})

    async def is_read() -> bool:
        found = await queue_of(till, name)
        return found.waiting == 0 and bool(found.is_read)

    await until(is_read, "the relay has sent the events")
    await queues.pause(name)
    await till.client.ask({"order_id": "log-2", "amount": 100})
    paused = await until(lambda: _behind(till, name), "its events wait")
    assert paused.paused and paused.is_read is False
    with pytest.raises(QueueNotPurgeable):
        await queues.purge(name)

    peeked = await queues.peek(name, 10)
    assert b"log-2" in b"".join(one.body for one in peeked.records)
    await queues.resume(name)

    await until(is_read, "the relay goes on")


async def _behind(till: Till, name: str) -> Queue | None:
    found = await queue_of(till, name)
    return found if found.waiting and found.paused and not found.is_read else None


async def test_what_died_in_a_group_of_the_log_is_replayed_by_the_same_command(till: Till) -> None:
    queues, name = till.house.app.queues, f"relay:{till.broker.name}:kassa.events"
    for number in range(2):
        await till.client.ask({"order_id": f"dead-{number}", "amount": 100})

    async def is_sent() -> bool:
        found = await queue_of(till, name)
        return found.waiting == 0 and bool(found.is_read)

    await until(is_sent, "the relay has sent the events")
    rows = await till.pool.fetch("SELECT home, root, writer, seq, ord, sequence FROM event ORDER BY at DESC LIMIT 2")
    await till.pool.executemany(
        "INSERT INTO parked (group_name, home, root, writer, seq, ord, sequence, attempts, due, parked_at, first_reason,"
        " reason, state) VALUES ($1, $2, $3, $4, $5, $6, $7, 6, now(), now(), 'first', 'too large', 'dead')",
        [(name, *row) for row in rows],
    )  # fmt: skip

    dead = await queues.dead(name, 10)
    assert [(one.reason, one.first_error, one.attempts) for one in dead] == [("too large", "first", 6)] * 2
    assert (await queue_of(till, name)).dead == 2
    with pytest.raises(RequestInvalid, match="evt_"):
        await queues.replay(name, ids=["msg_1"])

    assert await queues.replay(name, ids=[one.id for one in dead], limit=1) == Replayed(1, 1)
    assert await queues.replay(name, limit=1) == Replayed(1, 0)

    async def is_over() -> bool:
        found = await queue_of(till, name)
        return found.dead == 0 and found.waiting == 0

    await until(is_over, "it was sent at last")


async def test_a_relay_sends_again_what_its_broker_has_lost_under_the_same_ids(till: Till) -> None:
    queues, name = till.house.app.queues, f"relay:{till.broker.name}:kassa.events"
    since = (await till.pool.fetchval("SELECT clock_timestamp()")).isoformat()
    binder, group = await till.broker.binder(), f"again-{new_id()[-12:]}"
    await binder.provision([EVENTS._replace(groups=(group,))])
    subscription = await binder.subscribe(EVENTS.name, group)
    payment = (await till.client.ask({"order_id": "lost-1", "amount": 100})).body["id"]
    heard: list[str] = []

    async def hear(wanted: int) -> list[str]:
        async with asyncio.timeout(120):
            while len(heard) < wanted:
                found = await subscription.receive(10, 1.0)
                heard.extend(one.record.id for one in found if one.record.headers["ce-subject"] == payment)
                await subscription.settle([(one, Ack()) for one in found])
        return heard

    first = list(await hear(1))
    operator = await operator_of(till.house)
    answer = await operator.post(f"/v1/queues/{name}/replay", {"since": since})
    wrong = await operator.post(f"/v1/queues/{QUEUE}/replay", {"since": since}, expect=400)
    both = await operator.post(f"/v1/queues/{name}/replay", {"since": since, "all": True}, expect=400)

    assert answer["replayed"] >= 1
    assert (await hear(2))[1] == first[0]
    assert wrong["errors"][0]["field"] == "since" and both["errors"][0]["field"] == "all"
    assert (await queues.one(name)).dead == 0
    await operator.close()


async def test_wrong_names_and_impossible_wishes_are_told_with_what_to_do(till: Till) -> None:
    queues = till.house.app.queues
    with pytest.raises(QueueNotFound, match=QUEUE):
        await queues.one("payment_orders")
    with pytest.raises(QueueNotPausable, match="kassa worker relay"):
        await queues.pause(f"replies:{till.broker.name}")
    with pytest.raises(RequestInvalid, match="msg_"):
        await queues.replay(QUEUE, ids=["evt_1"])


async def test_only_a_key_of_the_house_opens_the_queues_and_nothing_else(till: Till) -> None:
    """A merchant's key, whatever its scopes, sees no queue: other merchants' records are in there. And the other way round."""
    house = till.house
    secret = Record("s-1", "", b'{"order_id": "another merchant\'s"}', {})
    await (await till.broker.binder()).send("payment_order", [secret], deadline_s=60.0)
    operator = await operator_of(house)
    thief: Shop = await house.shop("Thief")
    tried = 0
    for route in house.api.routes:
        path = route.pattern.replace("{name}", QUEUE).replace("{id}", "x")
        if route.pattern.startswith("/v1/queues"):
            tried += 1
            answer = await thief.http.request(route.method, path, json={"all": True})
            assert (answer.status_code, answer.json()["code"]) == (403, "auth.forbidden"), path
            assert "another merchant" not in answer.text
        elif route.scope is not None:
            answer = await operator._http.request(route.method, path)
            assert (answer.status_code, answer.json()["code"]) == (403, "auth.forbidden"), path
    assert tried == 7
    with pytest.raises(RequestInvalid, match="--operator"):
        await house.app.merchants.create_key(thief.merchant.id, scopes="read operator")
    assert [one.name for one in await house.app.merchants.all()] == ["Shop", "Thief"]
    await operator.close()


async def test_every_example_of_the_queues_is_a_good_request_and_shows_its_queue(till: Till) -> None:
    operator = await operator_of(till.house)
    for route in till.house.api.routes:
        if route.pattern.startswith("/v1/queues") and route.example is not None:
            await operator.post(route.pattern.replace("{name}", QUEUE), route.example)
    (found,) = [one for one in (await operator.get("/v1/queues"))["data"] if one["name"] == QUEUE]
    peeked = await operator.get(f"/v1/queues/{QUEUE}?limit=5")
    assert (found["paused"], found["topic"], found["group"]) == (False, "payment_order", "kassa")
    assert peeked["queue"]["name"] == QUEUE
    await operator.close()
