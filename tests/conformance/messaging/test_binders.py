"""What every binder promises: one suite, run against each of the registry."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta

import pytest
from msgspec.structs import replace

from conformance.messaging.house import HOME, PATIENCE_S, Bench, collect, key_of_another_lane, record, until
from kassa.db.pool import connect
from kassa.errors import BrokerUnreachable, KassaError, QueueNotFound, RequestInvalid
from kassa.ids import Id, new_id
from kassa.journal.change import Change, InboxDone, Message
from kassa.messaging import breaker, lookout, supplied
from kassa.messaging.binder import Elsewhere, Subscription
from kassa.messaging.binders.postgres import Parked, PostgresBinder, queue_name
from kassa.messaging.consumer import Consumer, Handler, Unavailable
from kassa.messaging.model import Ack, Confirmed, Dead, Delivery, Failed, Record, RetryAfter, Settlement
from kassa.messaging.relay import MessageRelay, send_surely
from kassa.messaging.replies import CORRELATION, REPLY_TO
from kassa.messaging.supplied import CREDIT, SuppliedSubscription
from kassa.messaging.topology import CLASSES, Topic, class_of, lane
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import Leased, MessageWork

DEADLINE_S = 60.0
FIRST_S = 120.0
"""Until a new consumer has its first record: Kafka's and RocketMQ's groups take their time."""
HOUR_S = 3600.0
"""What is put off for so long does not come by itself."""
LATE_S = 1.0
"""What is due comes sooner."""


async def send(bench: Bench, *records: Record) -> None:
    """Sends in batches that the binder takes, and insists on the receipts."""
    limit = bench.binder.traits.batch_max
    for start in range(0, len(records), limit):
        batch = records[start : start + limit]
        receipts = await bench.binder.send(bench.topic.name, batch, deadline_s=DEADLINE_S)
        assert receipts == [Confirmed()] * len(batch)


def ids(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.record.id for delivery in deliveries]


async def warm(bench: Bench) -> Subscription:
    """A consumer that has had a record of each class: from now on it receives at once, whatever finding together took."""
    subscription = await bench.binder.subscribe(bench.topic.name, "shop")
    await send(bench, *(record(f"warm-{priority}", priority=priority) for priority in (9, 4, 0)))
    deliveries = await collect(subscription, 3)
    await subscription.settle([(delivery, Ack()) for delivery in deliveries])
    return subscription


async def is_empty(bench: Bench) -> bool:
    return (await bench.binder.depth(bench.topic.name, "shop")).waiting == 0


async def has_effects(bench: Bench, count: int) -> bool:
    return await bench.count() >= count


async def has_depth(bench: Bench, waiting: int) -> bool:
    return (await bench.binder.depth(bench.topic.name, "shop")).waiting == waiting


async def has_dead(bench: Bench, count: int) -> bool:
    return (await bench.binder.depth(bench.topic.name, "shop")).dead >= count


async def drain(bench: Bench, handler: Handler, is_done: Callable[[], Awaitable[bool]] | None = None) -> Consumer:
    """A consumer that takes batches until the claim is true, or one. The first may take a broker some seconds: its consumers
    have to find together."""
    subscription = await bench.binder.subscribe(bench.topic.name, "shop")
    consumer = Consumer(subscription, "shop", bench.journal, handler, batch=100)
    await step_until(consumer, is_done)
    await subscription.close(1.0)
    return consumer


async def step_until(consumer: Consumer, is_done: Callable[[], Awaitable[bool]] | None) -> None:
    await consumer.step(FIRST_S)
    async with asyncio.timeout(FIRST_S):
        while is_done is not None and not await is_done():
            await consumer.step(0.1)


class Gathered:
    """A subscription whose first batch has so many records, so that what comes of it does not hang on how they travelled."""

    def __init__(self, inner: Subscription, count: int) -> None:
        self._inner = inner
        self._count = count

    async def receive(self, limit: int, wait_s: float) -> list[Delivery]:
        count, self._count = self._count, 0
        return await collect(self._inner, count) if count else await self._inner.receive(limit, wait_s)

    async def settle(self, settled: Sequence[tuple[Delivery, Settlement]]) -> list[bool]:
        return await self._inner.settle(settled)

    async def close(self, drain_s: float) -> None:
        await self._inner.close(drain_s)


async def test_record_arrives_as_it_was_sent(bench: Bench) -> None:
    sent = record("r-1", key="k", priority=7, body=b"\x00\xff{}")
    await send(bench, sent)

    subscription = await bench.binder.subscribe(bench.topic.name, "shop")
    (delivery,) = await subscription.receive(10, FIRST_S)

    assert delivery.record == sent
    assert delivery.attempts == 0
    assert await subscription.settle([(delivery, Ack())]) == [True]
    assert await subscription.receive(10, 0) == []


async def test_topic_that_nobody_receives_is_a_failure_not_a_loss(bench: Bench) -> None:
    (receipt,) = await bench.binder.send("nowhere", [record("r-1")], deadline_s=DEADLINE_S)

    assert isinstance(receipt, Failed) and not receipt.is_retryable
    with pytest.raises(QueueNotFound):
        await bench.binder.subscribe(bench.topic.name, "nobody")


async def test_provisioning_twice_changes_nothing_and_verifying_creates_nothing(bench: Bench) -> None:
    other = bench.topic._replace(groups=("shop", "books"))

    assert await bench.binder.provision([bench.topic]) == []
    missing = await bench.binder.provision([other], verify_only=True)
    assert f"missing: {bench.topic.name}:books" in missing
    assert all(line.endswith(":books") for line in missing), (
        "its classes are topics of their own where the broker has them"
    )
    assert await bench.binder.provision([other]) == [line.replace("missing", "created") for line in missing]
    assert await bench.binder.provision([other]) == []


async def test_request_is_answered_at_the_address_that_it_names(bench: Bench) -> None:
    """Whoever asked knows each answer by the number that he gave."""
    asked = {str(number): f"r-{number}" for number in range(20)}
    address = Topic(f"{bench.topic.name}-answers", ("asker",), "Answers.", lanes=1, keyed=False, declaration="durable")
    await bench.binder.provision([address])
    asker = await bench.binder.subscribe(address.name, "asker")
    await send(bench, *(said(record(id), number, {REPLY_TO: address.name}) for number, id in asked.items()))

    server = await bench.binder.subscribe(bench.topic.name, "shop")
    requests = await collect(server, len(asked))
    for request in reversed(requests):
        headers = request.record.headers
        answer = said(record(f"a-{request.record.id}", body=request.record.id.encode()), headers[CORRELATION])
        assert await bench.binder.reply(headers[REPLY_TO], [answer], deadline_s=DEADLINE_S) == [Confirmed()]
    await server.settle([(request, Ack()) for request in requests])
    answers = await collect(asker, len(asked))
    (receipt,) = await bench.binder.reply("nobody-asked", [record("a-1")], deadline_s=DEADLINE_S)

    assert {one.record.headers[CORRELATION]: one.record.body.decode() for one in answers} == asked
    assert await asker.settle([(answer, Ack()) for answer in answers]) == [True] * len(asked)
    assert isinstance(receipt, Failed)


def said(one: Record, number: str, more: dict[str, str] | None = None) -> Record:
    """With the number of a question."""
    return replace(one, headers=one.headers | {CORRELATION: number} | (more or {}))


async def test_each_group_gets_every_record_once(bench: Bench) -> None:
    await bench.binder.provision([bench.topic._replace(groups=("shop", "books"))])
    await send(bench, record("r-1"))

    for group in ("shop", "books"):
        subscription = await bench.binder.subscribe(bench.topic.name, group)
        assert ids(await subscription.receive(10, FIRST_S)) == ["r-1"]
        assert await subscription.receive(10, 0) == []


async def test_records_of_one_key_come_in_order(bench: Bench) -> None:
    await send(bench, *(record(f"r-{number}", key=f"k{number % 3}") for number in range(30)))

    subscription = await bench.binder.subscribe(bench.topic.name, "shop")
    seen: list[Delivery] = []
    async with asyncio.timeout(FIRST_S):
        while len(seen) < 30:
            deliveries = await subscription.receive(7, FIRST_S)
            seen += deliveries
            await subscription.settle([(delivery, Ack()) for delivery in deliveries])

    for key in ("k0", "k1", "k2"):
        numbers = [int(delivery.record.id[2:]) for delivery in seen if delivery.record.key == key]
        assert numbers == sorted(numbers) and len(numbers) == 10


async def test_a_key_has_one_holder(bench: Bench) -> None:
    """Who had it while the group was still finding together has it no more once another has it."""
    other = key_of_another_lane("k", bench.topic.lanes)
    await send(bench, *(record(f"r-{number}", key="k") for number in range(4)), record("other", key=other))

    subscriptions = [await bench.binder.subscribe(bench.topic.name, "shop") for _ in range(2)]
    in_hand: list[list[Delivery]] = [[], []]
    holders: dict[str, set[int]] = {}
    async with asyncio.timeout(FIRST_S):
        while len(holders) < 2:
            for number, subscription in enumerate(subscriptions):
                in_hand[number] += await subscription.receive(10, 0.1)
            if len({delivery.record.key for hand in in_hand for delivery in hand} | holders.keys()) < 2:
                continue
            for number, subscription in enumerate(subscriptions):
                ends: list[tuple[Delivery, Settlement]] = [(delivery, Ack()) for delivery in in_hand[number]]
                for delivery, is_ours in zip(in_hand[number], await subscription.settle(ends), strict=True):
                    if is_ours:
                        holders.setdefault(delivery.record.key, set()).add(number)
                in_hand[number] = []

    assert {key: len(numbers) for key, numbers in holders.items()} == {"k": 1, other: 1}


async def test_failed_record_parks_its_key_only(bench: Bench) -> None:
    await send(bench, record("a-1", key="a"), record("a-2", key="a"), record("b-1", key="b"))
    subscription = await bench.binder.subscribe(bench.topic.name, "shop")
    first = {delivery.record.id: delivery for delivery in await collect(subscription, 3)}
    ends: list[tuple[Delivery, Settlement]] = [
        (first["a-1"], RetryAfter(HOUR_S, "no")),
        (first["b-1"], Ack()),
        (first["a-2"], RetryAfter(HOUR_S, None, counts=False)),
    ]
    await subscription.settle(ends)
    await send(bench, record("a-3", key="a"), record("b-2", key="b"))

    assert ids(await collect(subscription, 1)) == ["b-2"]
    assert await subscription.receive(10, 0.3) == []
    await bench.pool.execute("UPDATE message SET due = now()")
    again: list[Delivery] = []
    async with asyncio.timeout(FIRST_S):
        # What came late waits until those before it are settled.
        while len(again) < 3:
            deliveries = await subscription.receive(10, FIRST_S)
            again += deliveries
            await subscription.settle([(delivery, Ack()) for delivery in deliveries])
    assert ids(again) == ["a-1", "a-2", "a-3"]
    assert [delivery.attempts for delivery in again] == [1, 0, 0]


async def test_envelope_is_handed_out_in_parts_and_what_failed_in_one_holds_up_the_next(bench: Bench) -> None:
    topic = bench.topic._replace(name=f"{bench.topic.name}-letters", envelopes=True, classes=False)
    await bench.binder.provision([topic])
    same_lane = next(key for key in map(str, range(1000)) if lane(key, topic.lanes) == lane("a", topic.lanes))
    sent = [record(f"r-{number}", key=("a", same_lane)[number % 2]) for number in range(30)]
    receipts = await bench.binder.send(topic.name, sent, deadline_s=DEADLINE_S)
    assert receipts == [Confirmed()] * len(sent)

    subscription = await bench.binder.subscribe(topic.name, "shop")
    done: list[Delivery] = []
    async with asyncio.timeout(FIRST_S):
        while len(done) < 15:
            deliveries = await subscription.receive(4, FIRST_S)
            assert len(deliveries) <= 4
            ends: list[tuple[Delivery, Settlement]] = [
                (one, Ack() if one.record.key == "a" else RetryAfter(HOUR_S, "no")) for one in deliveries
            ]
            assert await subscription.settle(ends) == [True] * len(ends)
            done += [one for one, end in ends if isinstance(end, Ack)]

    assert ids(done) == [one.id for one in sent if one.key == "a"]
    assert await subscription.receive(4, 0.3) == []
    again: list[Delivery] = []
    await bench.pool.execute("UPDATE message SET due = now()")
    async with asyncio.timeout(FIRST_S):
        while len(again) < 15:
            deliveries = await subscription.receive(4, FIRST_S)
            again += deliveries
            await subscription.settle([(delivery, Ack()) for delivery in deliveries])
    assert ids(again) == [one.id for one in sent if one.key == same_lane]


async def test_records_of_a_key_that_failed_together_are_due_together(bench: Bench) -> None:
    """However long their rows take to be written: else the first would come back alone, and be one batch of its own."""
    await bench.pool.execute(
        "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(0.01); RETURN NEW; END $$;"
        " CREATE TRIGGER slowly BEFORE INSERT OR UPDATE ON message FOR EACH ROW EXECUTE FUNCTION slowly();"
    )
    await send(bench, *(record(f"a-{number}", key="a") for number in range(5)))
    subscription = await bench.binder.subscribe(bench.topic.name, "shop")
    deliveries = await collect(subscription, 5)

    await subscription.settle([(delivery, RetryAfter(HOUR_S, "no")) for delivery in deliveries])

    assert await bench.pool.fetchval("SELECT count(*) FROM message") == 5
    assert await bench.pool.fetchval("SELECT count(DISTINCT due) FROM message") == 1


async def test_record_waits_behind_what_another_consumer_has_just_parked(bench: Bench) -> None:
    """Whoever received all the time and knew that nothing is parked does not rely on it for long: nobody tells him."""
    subscription = await warm(bench)
    deaf = Wakeups(lambda: connect("", application="nobody"))
    elsewhere = PostgresBinder(bench.pool, deaf)
    await elsewhere.park(bench.topic.name, "shop", [Parked(record("a-1", key="a"), 60.0, 1, "not now")])
    # As long as it may still believe what it knew before.
    await asyncio.sleep(2 * supplied.FRESH_S)

    await send(bench, record("a-2", key="a"), record("b-1", key="b"))

    assert ids(await collect(subscription, 1)) == ["b-1"]
    assert await subscription.receive(10, 0.5) == []
    assert (await bench.binder.depth(bench.topic.name, "shop")).waiting >= 2


async def test_what_a_consumer_put_off_comes_first_at_the_one_who_has_its_lane_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although that one believes for a while that nothing waits. Some keys are of lanes that it gets only then."""
    monkeypatch.setattr(supplied, "FRESH_S", 2.0)
    monkeypatch.setattr(supplied, "SEEN_S", 3.0)
    keys: list[str] = []
    topic = bench.topic._replace(name=f"{bench.topic.name}-plain", classes=False)
    await bench.binder.provision([topic])
    first, second = [await bench.binder.subscribe(topic.name, "shop") for _ in range(2)]
    seen: tuple[list[str], list[str]] = ([], [])
    held: list[Delivery] = []

    async def receive(subscription: Subscription, ids: list[str]) -> None:
        while True:
            deliveries = await subscription.receive(10, 1.0)
            ids += [delivery.record.id for delivery in deliveries]
            keeps = [subscription is first and delivery.record.key.startswith("a-") for delivery in deliveries]
            held.extend(delivery for delivery, keep in zip(deliveries, keeps, strict=True) if keep)
            await subscription.settle(
                [(delivery, Ack()) for delivery, keep in zip(deliveries, keeps, strict=True) if not keep]
            )

    async def send_all(*records: Record) -> None:
        assert await bench.binder.send(topic.name, records, deadline_s=DEADLINE_S) == [Confirmed()] * len(records)

    async def others() -> None:
        for number in range(10_000):
            await send_all(*(record(f"b-{number}-{key}", key=f"b-{key}") for key in range(16)))
            await asyncio.sleep(0.05)

    async def have_come(number: int, ids: list[str]) -> bool:
        return {f"{key} {number}" for key in keys} <= set(ids)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(receive(one, ids)) for one, ids in zip((first, second), seen, strict=True)]
        tasks.append(group.create_task(others()))
        await until(lambda: have_all(seen, 50), FIRST_S)
        async with asyncio.timeout(FIRST_S):
            while not held:
                # The other one may be the quicker for all of them.
                more = [f"a-{len(keys) + number}" for number in range(16)]
                keys += more
                await send_all(*(record(f"{key} 1", key=key) for key in more))
                # Time for all of them to come to somebody.
                await asyncio.sleep(1.0)
        tasks[0].cancel()
        await first.settle([(delivery, RetryAfter(2.0, "not now")) for delivery in held])
        await first.close(0.0)
        await send_all(*(record(f"{key} 2", key=key) for key in keys))
        await until(lambda: have_come(1, seen[1]), FIRST_S)
        await until(lambda: have_come(2, seen[1]), FIRST_S)
        for task in tasks:
            task.cancel()

    order = list(dict.fromkeys(seen[1]))
    assert [key for key in keys if order.index(f"{key} 1") > order.index(f"{key} 2")] == []


async def have_all(seen: Sequence[Sequence[str]], count: int) -> bool:
    return all(len(ids) >= count for ids in seen)


async def test_dead_record_lets_its_key_go_on_and_is_kept_with_its_reason(bench: Bench) -> None:
    await send(bench, record("a-1", key="a"), record("a-2", key="a"))
    subscription = await bench.binder.subscribe(bench.topic.name, "shop")
    (delivery, *_) = await subscription.receive(1, FIRST_S)
    await subscription.settle([(delivery, Dead("it is poison"))])

    assert ids(await subscription.receive(10, FIRST_S)) == ["a-2"]
    (letter,) = await bench.letters.browse(f"{bench.topic.name}:shop")
    assert (letter.reason, letter.attempts, letter.body) == ("it is poison", 1, b"{}")
    assert letter.headers["x"] == "ü"
    assert (await bench.binder.depth(bench.topic.name, "shop")).dead == 1


async def test_delays_are_kept_however_they_are_mixed(bench: Bench) -> None:
    """To the second, while nothing else happens. The best of some rounds, since one may meet a busy machine."""
    subscription = await warm(bench)
    await send(bench, record("next hour", delay_s=HOUR_S))
    worst_s = FIRST_S
    for number in range(5):
        if worst_s < LATE_S:
            break
        worst_s = max(await lateness(bench, subscription, number))

    assert worst_s < LATE_S
    assert (await bench.binder.depth(bench.topic.name, "shop")).delayed == 1


async def lateness(bench: Bench, subscription: Subscription, number: int) -> list[float]:
    """How late records come whose delays are mixed, in the order of these. None is early."""
    delays_s = {f"{delay_s} in {number}": delay_s for delay_s in (2.4, 0.0, 1.0, 1.7)}
    began = time.monotonic()
    await send(bench, *(record(id, delay_s=delay_s) for id, delay_s in delays_s.items()))
    sent = time.monotonic()
    came: dict[str, float] = {}
    async with asyncio.timeout(FIRST_S):
        while len(came) < len(delays_s):
            deliveries = await subscription.receive(10, FIRST_S)
            came |= dict.fromkeys(ids(deliveries), time.monotonic())
            await subscription.settle([(delivery, Ack()) for delivery in deliveries])

    assert came.keys() == delays_s.keys()
    assert all(came[id] >= began + delay_s for id, delay_s in delays_s.items())
    return [at - sent - delays_s[id] for id, at in came.items()]


async def test_delay_of_days_is_over_when_the_days_are(bench: Bench) -> None:
    """By the database's clock, which the test puts forward by putting what waits back."""
    subscription = await warm(bench)
    await send(bench, record("r-1", key="a", delay_s=72 * HOUR_S), record("r-2", key="b"))
    (other,) = await collect(subscription, 1)
    await subscription.settle([(other, Ack())])

    await bench.pool.execute("UPDATE message SET due = due - interval '71 hours'")
    early = await subscription.receive(10, 0.5)
    await bench.pool.execute("UPDATE message SET due = due - interval '1 hour'")
    (delivery,) = await collect(subscription, 1)

    assert other.record.id == "r-2" and early == []
    assert (delivery.record.id, delivery.record.key, delivery.attempts) == ("r-1", "a", 0)
    assert await subscription.settle([(delivery, Ack())]) == [True]
    await until(lambda: is_empty(bench))


async def test_urgent_record_overtakes_ten_thousand_that_wait(bench: Bench) -> None:
    """At once on PostgreSQL; on a broker, once that has handed it over, after what was fetched ahead, which is one batch at
    most."""
    subscription = await warm(bench)
    await send(bench, *(record(f"r-{number}", key=f"k{number % 50}") for number in range(10_000)))
    await send(bench, record("urgent", key="vip", priority=9), record("whenever", key="low", priority=0))

    await until(lambda: has_fetched(subscription, "urgent"))
    seen: list[str] = []
    async with asyncio.timeout(FIRST_S):
        while "urgent" not in seen:
            deliveries = await subscription.receive(10, FIRST_S)
            seen += ids(deliveries)
            # Nothing goes before what it should follow, though it may come while nothing else is there yet.
            classes = [CLASSES.index(class_of(delivery.record.priority)) for delivery in deliveries]
            assert classes == sorted(classes)
            await subscription.settle([(delivery, Ack()) for delivery in deliveries])

    assert len(seen) <= CREDIT + 10
    assert "whenever" not in seen[:-1]


async def has_fetched(subscription: Subscription, id: str) -> bool:
    """Whether it is up to us when it comes."""
    return not isinstance(subscription, SuppliedSubscription) or any(
        one.packet.id == id for ahead in subscription._ahead for one in ahead.arrivals
    )


def fetched_ahead(subscription: SuppliedSubscription) -> int:
    """Packets at this process that nobody has asked for: with us, and in a stream that keeps some by itself."""
    return sum(len(ahead.arrivals) + len(getattr(ahead.stream, "_ready", ())) for ahead in subscription._ahead)


async def test_who_is_asked_for_no_more_has_a_bounded_lot(bench: Bench) -> None:
    """However many wait, and however long it is not asked."""
    await send(bench, *(record(f"r-{number}", key=f"k{number % 50}") for number in range(2000)))
    subscription = await bench.binder.subscribe(bench.topic.name, "shop")
    handed = await subscription.receive(10, FIRST_S)

    assert 0 < len(handed) <= 10
    if not isinstance(subscription, SuppliedSubscription):
        await asyncio.sleep(0.5)
        assert (await bench.binder.depth(bench.topic.name, "shop")).in_flight == len(handed)
        return
    for _ in range(20):
        # Of each class CREDIT; an answer to a stream's last question may be on its way when that is full.
        assert fetched_ahead(subscription) <= 2 * CREDIT
        await asyncio.sleep(0.1)
    assert fetched_ahead(subscription) > 0


async def test_long_queue_behind_one_held_key_does_not_hide_the_others(bench: Bench) -> None:
    await send(bench, *(record(f"r-{number}", key="hot") for number in range(1000)))
    await send(bench, record("cold", key=key_of_another_lane("hot", bench.topic.lanes)))
    one = await bench.binder.subscribe(bench.topic.name, "shop")
    two = await bench.binder.subscribe(bench.topic.name, "shop")

    seen: set[str] = set()
    async with asyncio.timeout(FIRST_S):
        # Either lane may be the first; nothing is settled, so whoever has the hot key keeps it.
        while "cold" not in seen or len(seen) == 1:
            seen.update(ids(await one.receive(10, 0.05) + await two.receive(10, 0.05)))

    assert "cold" in seen and any(id.startswith("r-") for id in seen)


async def test_paused_group_gets_nothing_and_loses_nothing(bench: Bench) -> None:
    await bench.binder.pause(bench.topic.name, "shop")
    await send(bench, record("r-1"))
    subscription = await bench.binder.subscribe(bench.topic.name, "shop")

    assert await subscription.receive(10, 0.3) == []
    await bench.binder.resume(bench.topic.name, "shop")
    assert ids(await subscription.receive(10, FIRST_S)) == ["r-1"]


async def test_depth_counts_what_waits(bench: Bench) -> None:
    await send(bench, record("r-1"), record("r-2"), record("r-3", delay_s=HOUR_S))
    subscription = await bench.binder.subscribe(bench.topic.name, "shop")
    await collect(subscription, 2)

    async def is_counted() -> bool:
        depth = await bench.binder.depth(bench.topic.name, "shop")
        return (depth.waiting, depth.delayed, depth.dead) == (3, 1, 0)

    await until(is_counted)
    if bench.binder.traits.acknowledges_in_change:
        depth = await bench.binder.depth(bench.topic.name, "shop")
        assert depth.in_flight == 2
        assert depth.oldest_s is not None and 0 < depth.oldest_s < HOUR_S


async def test_purge_throws_away_what_nobody_holds_and_the_topic_goes_on(bench: Bench) -> None:
    await send(bench, *(record(f"r-{number}", f"k{number}", priority=number % 10) for number in range(30)))

    is_interrupted = False
    gone = await MessageWork(bench.pool).purge(queue_name(bench.topic.name, "shop"))
    if isinstance(bench.binder, Elsewhere):
        async with asyncio.timeout(FIRST_S):
            # A broker that is slow, or for a moment does not answer, is asked again, as by an operator.
            while gone < 30 and not (is_interrupted and await is_empty(bench)):
                try:
                    gone += await bench.binder.purge_elsewhere(bench.topic.name, "shop", FIRST_S)
                except BrokerUnreachable:
                    is_interrupted = True

    # Of a purge that was interrupted nobody says how many it has thrown away.
    assert gone == 30 or (is_interrupted and gone < 30)
    await until(lambda: is_empty(bench))
    await send(bench, record("after", "k1"))
    subscription = await bench.binder.subscribe(bench.topic.name, "shop")
    assert ids(await collect(subscription, 1)) == ["after"]


async def test_record_that_is_sent_again_has_its_effect_once(bench: Bench) -> None:
    """A sender that does not know whether its batch arrived sends it again under the same ids."""

    async def handler(records: Sequence[Record]) -> list[Change]:
        return [bench.effect(one) for one in records]

    await send(bench, record("r-1"))
    assert await send_surely(bench.binder, bench.topic.name, [record("r-1")], DEADLINE_S) == [Confirmed()]
    consumer = await drain(bench, handler, lambda: is_empty(bench))

    assert await bench.effects() == ["r-1"]
    assert consumer.counts.repeated == (0 if bench.binder.traits.deduplicates else 1)


async def test_record_that_cannot_be_stored_fails_alone(bench: Bench) -> None:
    traits = bench.binder.traits
    bad = record("r-2", key="\0") if traits.acknowledges_in_change else record("r-2", body=bytes(traits.bytes_max + 1))

    receipts = await bench.binder.send(bench.topic.name, [record("r-1"), bad, record("r-3")], deadline_s=DEADLINE_S)

    assert receipts[0] == receipts[2] == Confirmed()
    assert isinstance(receipts[1], Failed) and not receipts[1].is_retryable


async def test_closing_gives_back_what_is_in_hand(bench: Bench) -> None:
    await send(bench, record("r-1"))
    one = await bench.binder.subscribe(bench.topic.name, "shop")
    await one.receive(10, FIRST_S)
    await one.close(0.05)

    two = await bench.binder.subscribe(bench.topic.name, "shop")
    (again,) = await two.receive(10, FIRST_S)
    assert (again.record.id, again.attempts) == ("r-1", 0)


async def test_closing_waits_for_what_is_in_hand_to_be_settled(bench: Bench) -> None:
    await send(bench, record("r-1"))
    one = await bench.binder.subscribe(bench.topic.name, "shop")
    (delivery,) = await one.receive(10, FIRST_S)

    closing = asyncio.create_task(one.close(PATIENCE_S))
    await asyncio.sleep(0.5)
    has_waited = not closing.done()
    settled = await one.settle([(delivery, Ack())])
    await closing

    assert has_waited and settled == [True]
    await send(bench, record("r-2"))
    two = await bench.binder.subscribe(bench.topic.name, "shop")
    assert ids(await collect(two, 1)) == ["r-2"]
    assert await two.receive(10, 0.3) == []


async def test_late_settlement_of_a_delivery_that_was_given_on_changes_nothing(bench: Bench) -> None:
    await send(bench, record("r-1"))
    one = await bench.binder.subscribe(bench.topic.name, "shop")
    (stale,) = await one.receive(10, FIRST_S)
    await one.close(0)
    two = await bench.binder.subscribe(bench.topic.name, "shop")
    (fresh,) = await two.receive(10, FIRST_S)

    assert await one.settle([(stale, Ack())]) == [False]
    assert await two.settle([(fresh, Ack())]) == [True]


# With a consumer: effects


async def test_effect_happens_once_however_often_the_record_comes(bench: Bench) -> None:
    async def handler(records: Sequence[Record]) -> list[Change]:
        return [bench.effect(one) for one in records]

    await send(bench, record("r-1"))
    await drain(bench, handler)
    await send(bench, record("r-1"))
    consumer = await drain(bench, handler)

    assert await bench.effects() == ["r-1"]
    assert consumer.counts.repeated == 1
    await until(lambda: is_empty(bench))


class Killed(BaseException):
    """Nobody gives anything back any more."""


class Dying(MessageWork):
    """Of a relay that is killed when the broker has confirmed what it sent."""

    async def acknowledge(self, claimed: Sequence[Leased]) -> set[Id]:
        raise Killed


async def test_relay_that_dies_with_a_confirmation_in_hand_leaves_all_to_the_next(bench: Bench) -> None:
    """What was confirmed is sent again; it has its effect once, and before what is behind it."""
    messages = tuple(Message(new_id(), "out", f"k{number % 3}", b"%d" % number) for number in range(12))
    await bench.journal.commit(Change(home=HOME, messages=messages))
    relay, next_relay = [
        MessageRelay(work, bench.binder, "out", bench.topic.name, bench.wakeups)
        for work in (Dying(bench.pool), MessageWork(bench.pool))
    ]

    async def handler(records: Sequence[Record]) -> list[Change]:
        return [bench.effect(one) for one in records]

    subscription = await bench.binder.subscribe(bench.topic.name, "shop")
    consumer = Consumer(subscription, "shop", bench.journal, handler)
    with pytest.raises(Killed):
        await relay.step()
    await step_until(consumer, lambda: has_effects(bench, 3))
    await bench.pool.execute("UPDATE message_lease SET leased_until = now() WHERE topic = 'out'")
    while await next_relay.step():
        pass
    await step_until(consumer, lambda: has_effects(bench, len(messages)))

    effects = await bench.effects()
    assert consumer.counts.repeated == 3 and len(effects) == len(messages)
    for key in range(3):
        of_key = [one.id for one in messages if one.key == f"k{key}"]
        assert [id for id in effects if id in of_key] == of_key
    assert await bench.pool.fetchval("SELECT count(*) FROM message WHERE topic = 'out'") == 0


async def test_consumer_that_dies_before_its_commit_leaves_the_record_to_the_next(bench: Bench) -> None:
    await send(bench, record("r-1", key="k"))
    dying = await bench.binder.subscribe(bench.topic.name, "shop")
    await dying.receive(10, FIRST_S)
    await dying.close(0)

    async def handler(records: Sequence[Record]) -> list[Change]:
        return [bench.effect(one) for one in records]

    await drain(bench, handler)

    assert await bench.effects() == ["r-1"]


async def test_consumer_that_dies_after_its_commit_repeats_nothing(bench: Bench) -> None:
    """The effect and the inbox key are durable, the broker was not told: the record comes again."""
    await send(bench, record("r-1", key="k"))
    change = bench.effect(record("r-1"))
    await bench.journal.commit(
        Change(home=HOME, new=change.new, root=change.root, events=change.events, done=(InboxDone("shop", "r-1"),))
    )

    async def handler(records: Sequence[Record]) -> list[Change]:
        return [bench.effect(one) for one in records]

    await drain(bench, handler)

    assert await bench.effects() == ["r-1"]
    await until(lambda: is_empty(bench))


async def test_poison_among_a_hundred_dies_alone(bench: Bench) -> None:
    calls: list[int] = []

    async def handler(records: Sequence[Record]) -> list[Change]:
        calls.append(len(records))
        if any(one.id == "r-57" for one in records):
            raise RequestInvalid("it is poison")
        return [bench.effect(one) for one in records]

    consumer = Consumer(await warm(bench), "shop", bench.journal, handler)
    await send(bench, *(record(f"r-{number}", key=f"k{number % 100}") for number in range(100)))
    batches = handled = 0
    async with asyncio.timeout(FIRST_S):
        while handled < 100:
            handled += await consumer.step(FIRST_S)
            batches += 1

    assert sorted(await bench.effects()) == sorted(f"r-{number}" for number in range(100) if number != 57)
    (letter,) = await bench.letters.browse(f"{bench.topic.name}:shop")
    assert "it is poison" in letter.reason
    assert len(calls) < 20 + batches


async def test_batch_that_is_all_poison_dies_and_what_comes_behind_is_handled(bench: Bench) -> None:
    batches: list[list[str]] = []

    async def handler(records: Sequence[Record]) -> list[Change]:
        if not batches:
            # They come while the poison is in hand, and behind it in its keys.
            await send(bench, *(record(f"good-{number}", key=f"k{number}") for number in range(10)))
        batches.append([one.id for one in records])
        for one in records:
            if one.id.startswith("bad"):
                raise RequestInvalid(f"{one.id} is poison")
        return [bench.effect(one) for one in records]

    bad = [record(f"bad-{number}", key=f"k{number % 10}", body=b"bad-%d" % number) for number in range(50)]
    await send(bench, *bad)
    await drain(bench, handler, lambda: has_effects(bench, 10))

    assert all(id.startswith("bad") for id in batches[0])
    letters = await bench.letters.browse(f"{bench.topic.name}:shop")
    assert sorted(letter.body for letter in letters) == sorted(one.body for one in bad)
    assert all(f"{letter.body.decode()} is poison" in letter.reason and letter.attempts == 1 for letter in letters)
    assert sorted(await bench.effects()) == [f"good-{number}" for number in range(10)]
    assert all([one.id] in batches for one in bad)
    await until(lambda: is_empty(bench))


async def test_order_of_a_key_holds_when_one_of_it_fails(bench: Bench) -> None:
    failures = {"a-1": 2, "a-3": 1}

    async def handler(records: Sequence[Record]) -> list[Change]:
        for one in records:
            if failures.get(one.id, 0):
                failures[one.id] -= 1
                raise ConnectionResetError(one.id)
        return [bench.effect(one) for one in records]

    await send(bench, *(record(f"{key}-{number}", key=key) for number in range(6) for key in ("a", "b")))
    together = Gathered(await bench.binder.subscribe(bench.topic.name, "shop"), 12)
    await step_until(Consumer(together, "shop", bench.journal, handler), lambda: has_effects(bench, 12))

    effects = await bench.effects()
    for key in ("a", "b"):
        assert [one for one in effects if one[0] == key] == [f"{key}-{number}" for number in range(6)]
    assert effects.index("b-5") < effects.index("a-5")


async def test_record_that_keeps_failing_climbs_the_ladder_and_dies_with_its_history(bench: Bench) -> None:
    errors = iter(range(100))

    async def handler(records: Sequence[Record]) -> list[Change]:
        raise ValueError(f"failure {next(errors)}")

    await send(bench, record("r-1", key="k"))
    for _ in range(2):
        subscription = await bench.binder.subscribe(bench.topic.name, "shop")
        consumer = Consumer(subscription, "shop", bench.journal, handler)
        for _ in range(4):
            await bench.pool.execute("UPDATE message SET due = clock_timestamp()")
            await consumer.step(FIRST_S)
        await subscription.close(1.0)

    (letter,) = await bench.letters.browse(f"{bench.topic.name}:shop")
    assert letter.attempts == 8
    assert letter.first_error == "ValueError: failure 0"
    assert letter.last_error == "ValueError: failure 7"


async def test_replay_of_dead_letters_changes_nothing_twice(bench: Bench) -> None:
    is_mended = False

    async def handler(records: Sequence[Record]) -> list[Change]:
        if not is_mended:
            raise RequestInvalid("not yet")
        return [bench.effect(one) for one in records]

    await send(bench, *(record(f"r-{number}", key="k") for number in range(5)))
    await drain(bench, handler, lambda: has_dead(bench, 5))
    is_mended = True
    assert await bench.letters.replay(f"{bench.topic.name}:shop", per_second=1000) == 5
    await drain(bench, handler, lambda: has_effects(bench, 5))
    await bench.pool.execute("UPDATE dead_letter SET replayed_at = NULL")
    assert await bench.letters.replay(f"{bench.topic.name}:shop", per_second=1000) == 5
    await drain(bench, handler, lambda: is_empty(bench))

    assert await bench.effects() == [f"r-{number}" for number in range(5)]
    assert await bench.letters.browse(f"{bench.topic.name}:shop") == []


async def test_replay_is_of_the_time_that_is_told_and_never_faster_than_that(bench: Bench) -> None:
    is_mended = False

    async def handler(records: Sequence[Record]) -> list[Change]:
        if not is_mended:
            raise RequestInvalid("not yet")
        return [bench.effect(one) for one in records]

    queue, noon = f"{bench.topic.name}:shop", datetime(2026, 1, 1, 12, tzinfo=UTC)
    await send(bench, *(record(f"r-{number}", key="k", body=b"%d" % number) for number in range(30)))
    await drain(bench, handler, lambda: has_dead(bench, 30))
    died = "$1::timestamptz + convert_from(body, 'UTF8')::int * interval '1 minute'"
    await bench.pool.execute(f"UPDATE dead_letter SET died_at = {died}", noon)
    is_mended = True
    first, last = noon + timedelta(minutes=10), noon + timedelta(minutes=25)
    replayed = await bench.letters.replay(queue, died_from=first, died_to=last, per_second=10)
    await drain(bench, handler, lambda: has_effects(bench, 15))

    assert replayed == 15
    assert await bench.effects() == [f"r-{number}" for number in range(10, 25)]
    assert sorted(int(letter.body) for letter in await bench.letters.browse(queue)) == [*range(10), *range(25, 30)]
    at = [row["replayed_at"] for row in await bench.pool.fetch("SELECT replayed_at FROM dead_letter ORDER BY died_at")]
    # One tenth of a second's lot at a time, so that there is one more in a second at most.
    assert all((later - sooner).total_seconds() >= 1.0 for sooner, later in zip(at[10:], at[21:25], strict=False))


async def test_refusal_that_no_repeat_can_mend_is_dead_at_once(bench: Bench) -> None:
    class NoSuchOrder(KassaError):
        """There is no such order."""

        code = "order.not_found"

    async def handler(records: Sequence[Record]) -> list[Change]:
        raise NoSuchOrder

    await send(bench, record("r-1"))
    await drain(bench, handler)

    (letter,) = await bench.letters.browse(f"{bench.topic.name}:shop")
    assert letter.attempts == 1 and "no such order" in letter.reason


async def test_destination_that_is_away_fills_no_dead_letters(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "OPEN_S", HOUR_S)
    monkeypatch.setattr(breaker, "OPEN_MAX_S", HOUR_S)
    tries = 0

    async def handler(records: Sequence[Record]) -> list[Change]:
        nonlocal tries
        tries += 1
        raise Unavailable("bank", "connection refused")

    await send(bench, *(record(f"r-{number}") for number in range(50)))
    subscription = await bench.binder.subscribe(bench.topic.name, "shop")
    consumer = Consumer(subscription, "shop", bench.journal, handler, destination=lambda _: "bank", batch=10)

    async def is_all_put_off() -> bool:
        return bool(await bench.pool.fetchval("SELECT count(*) = 50 AND min(due) > clock_timestamp() FROM message"))

    await step_until(consumer, is_all_put_off)
    for _ in range(8):
        await bench.pool.execute("UPDATE message SET due = clock_timestamp()")
        assert await consumer.step(FIRST_S) > 0

    # What is parked is settled with the broker a moment later.
    await until(lambda: has_depth(bench, waiting=50))
    assert not await has_dead(bench, 1)
    assert tries < 30
    assert await bench.pool.fetchval("SELECT max(attempts) FROM message") == 0

    circuits = consumer._breaker._circuits
    circuits["bank"] = circuits["bank"]._replace(open_until=0.0)
    tries = 0
    await bench.pool.execute("UPDATE message SET due = clock_timestamp()")
    assert await consumer.step(FIRST_S) > 2
    # The pause is over, and one record tells for all that it is still away: the batch was halved until it stood alone.
    assert 0 < tries <= 5


async def test_several_consumers_share_the_work_and_keep_each_keys_order(bench: Bench) -> None:
    async def handler(records: Sequence[Record]) -> list[Change]:
        await asyncio.sleep(0.001)
        return [bench.effect(one) for one in records]

    sent = 0

    async def send_more() -> None:
        nonlocal sent
        await send(
            bench, *(record(f"{number % 20}-{number}", key=str(number % 20)) for number in range(sent, sent + 200))
        )
        sent += 200

    while sent < 600:
        await send_more()
    consumers = [
        Consumer(await bench.binder.subscribe(bench.topic.name, "shop"), "shop", bench.journal, handler, batch=25)
        for _ in range(4)
    ]
    running = [asyncio.create_task(consumer.run()) for consumer in consumers]

    async with asyncio.timeout(2 * PATIENCE_S):
        # Who comes first may have done all of it before the group has found together.
        while sum(consumer.counts.handled > 0 for consumer in consumers) < 2:
            await until(lambda: is_empty(bench))
            await send_more()
    await until(lambda: is_empty(bench))
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)

    effects = await bench.effects()
    assert len(effects) == len(set(effects)) == sent
    for key in range(20):
        numbers = [int(one.split("-")[1]) for one in effects if one.split("-")[0] == str(key)]
        assert numbers == sorted(numbers)


async def test_waiting_consumer_is_woken_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not because it looks by itself. The quickest of some, since one may meet a busy machine."""
    monkeypatch.setattr(lookout, "POLL_S", HOUR_S)
    monkeypatch.setattr(supplied, "POLL_S", HOUR_S)
    subscription = await bench.binder.subscribe(bench.topic.name, "shop")
    took_s = [FIRST_S]
    for number in range(30):
        if min(took_s) < 0.1:
            break
        waiting = asyncio.create_task(subscription.receive(10, FIRST_S))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await send(bench, record(f"r-{number}"))
        (delivery,) = await waiting
        took_s.append(time.monotonic() - began)
        await subscription.settle([(delivery, Ack())])

    assert min(took_s) < 0.1
