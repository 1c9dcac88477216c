"""ZeroMQ: what watches and what beats goes on, whatever goes wrong once."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from brokers.test_zeromq import DEADLINE_S, parts, query
from brokers.test_zeromq_places import ORDERS, hub_with
from conformance.messaging.house import collect, record
from kassa.ids import new_id
from kassa.messaging.binder import Resources
from kassa.messaging.binders import zeromq
from kassa.messaging.binders.zeromq import BATCH_BYTES, BEAT_S, CALL_S, ZeroMQBinder, make_binder, make_keys, read_url
from kassa.messaging.model import Ack, Confirmed, Delivery
from kassa.messaging.topology import Topic
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import LAPSES_ALONE, LAPSES_MAX
from kassa.supervisor import end_tasks
from servers.server import free_ports

__all__ = ["parts"]


BREAK_GIVING_BACK = """
    CREATE FUNCTION refuse_to_give_back() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'a lock was taken the other way round' USING ERRCODE = 'deadlock_detected';
    END $$;
    CREATE TRIGGER refuse_to_give_back BEFORE UPDATE ON message
        FOR EACH ROW WHEN (OLD.topic = 'broken:shop') EXECUTE FUNCTION refuse_to_give_back();
    CREATE TRIGGER refuse_to_give_back BEFORE UPDATE ON message_lease
        FOR EACH ROW WHEN (OLD.topic = 'broken:shop') EXECUTE FUNCTION refuse_to_give_back();
"""
"""An error of the database that says nothing about its being away, for one queue alone."""
BROKEN = Topic("broken", ("shop",), "The database does not take back what is sent there.")


@pytest.mark.parametrize("method", ["recv_multipart", "send_multipart"])
@pytest.mark.parametrize("kind", [zmq.ROUTER, zmq.DEALER], ids=["hub", "peer"])
async def test_socket_that_fails_is_replaced(
    parts: tuple[Any, Wakeups], monkeypatch: pytest.MonkeyPatch, kind: int, method: str
) -> None:
    """What was in hand is settled over the new one, and what was sent is there once."""
    works = getattr(zmq.asyncio.Socket, method)
    failed: list[zmq.asyncio.Socket] = []

    async def fails_once(socket: zmq.asyncio.Socket, *arguments: Any, **options: Any) -> Any:
        if socket.type == kind and not failed:
            failed.append(socket)
            raise zmq.ZMQError(zmq.ENOTSOCK)
        return await works(socket, *arguments, **options)

    async with hub_with(parts, ORDERS) as binder:
        subscription = await binder.subscribe(ORDERS.name, "shop")
        assert await binder.send(ORDERS.name, [record("r-1")], deadline_s=DEADLINE_S) == [Confirmed()]
        (first,) = await collect(subscription, 1, DEADLINE_S)

        monkeypatch.setattr(zmq.asyncio.Socket, method, fails_once)

        assert await binder.send(ORDERS.name, [record("r-2")], deadline_s=DEADLINE_S) == [Confirmed()]
        (second,) = await collect(subscription, 1, DEADLINE_S)
        assert await subscription.settle([(first, Ack()), (second, Ack())]) == [True, True]
        assert failed
        assert failed[0].closed
        assert (await binder.depth(ORDERS.name, "shop")).waiting == 0


async def peer_of(hub: ZeroMQBinder, parts: tuple[Any, Wakeups], topics: Sequence[Topic]) -> ZeroMQBinder:
    """A peer with a record of each topic in its hands."""
    peer = ZeroMQBinder(read_url(f"{hub.url}?role=peer"), Resources(*parts))
    await peer.open()
    for topic in topics:
        assert await peer.send(topic.name, [record(new_id())], deadline_s=DEADLINE_S) == [Confirmed()]
        await collect(await peer.subscribe(topic.name, "shop"), 1, DEADLINE_S)
    return peer


async def vanish(peer: ZeroMQBinder) -> None:
    """It says nothing any more, and takes its leave from nobody."""
    await end_tasks(*peer._tasks)
    assert peer._context is not None
    peer._context.destroy(linger=0)


async def test_hub_ends_the_sessions_of_silent_peers_after_the_database_refused_one(parts: tuple[Any, Wakeups]) -> None:
    """What the first one had besides comes to another, and so does what a later one had."""
    async with hub_with(parts, ORDERS, BROKEN) as hub:
        await parts[0].execute(BREAK_GIVING_BACK)
        other = await hub.subscribe(ORDERS.name, "shop")

        for _ in range(2):
            await vanish(await peer_of(hub, parts, (BROKEN, ORDERS)))
            (delivery,) = await collect(other, 1, DEADLINE_S)
            assert await other.settle([(delivery, Ack())]) == [True]


async def next_peer_of(hub: ZeroMQBinder, parts: tuple[Any, Wakeups]) -> tuple[ZeroMQBinder, Delivery]:
    peer = ZeroMQBinder(read_url(f"{hub.url}?role=peer"), Resources(*parts))
    await peer.open()
    (delivery,) = await collect(await peer.subscribe(ORDERS.name, "shop"), 1, DEADLINE_S)
    return peer, delivery


async def test_record_that_ends_its_peers_goes_alone_and_is_given_up(
    parts: tuple[Any, Wakeups], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zeromq, "SILENCE_S", 2.5 * BEAT_S)
    async with hub_with(parts, ORDERS) as hub:
        await hub.send(ORDERS.name, [record("r-1")], deadline_s=DEADLINE_S)
        alone = []

        for _ in range(LAPSES_MAX):
            peer, delivery = await next_peer_of(hub, parts)
            alone.append(delivery.alone)
            await vanish(peer)

        other = await hub.subscribe(ORDERS.name, "shop")
        assert await other.receive(10, 4 * BEAT_S) == []
        assert alone == [lapses >= LAPSES_ALONE for lapses in range(LAPSES_MAX)]
        assert (await hub.depth(ORDERS.name, "shop")).dead == 1


async def test_peer_that_takes_its_leave_has_nothing_counted(parts: tuple[Any, Wakeups]) -> None:
    async with hub_with(parts, ORDERS) as hub:
        await hub.send(ORDERS.name, [record("r-1")], deadline_s=DEADLINE_S)

        for _ in range(LAPSES_ALONE + 1):
            peer, delivery = await next_peer_of(hub, parts)
            assert not delivery.alone
            await peer.close()

        assert await parts[0].fetchval("SELECT lapses FROM message") == 0


async def test_what_a_vanished_peer_was_not_handed_is_not_counted(parts: tuple[Any, Wakeups]) -> None:
    async with hub_with(parts, ORDERS) as hub:
        peer = ZeroMQBinder(read_url(f"{hub.url}?role=peer"), Resources(*parts))
        await peer.open()
        await leave_too_much(peer, ORDERS)
        await vanish(peer)

        await collect(await hub.subscribe(ORDERS.name, "shop"), 2, DEADLINE_S)

        assert [row["lapses"] for row in await parts[0].fetch("SELECT lapses FROM message ORDER BY lapses")] == [0, 1]


async def leave_too_much(peer: ZeroMQBinder, topic: Topic) -> None:
    """A record in its hands, and another that waits at the hub for its next call."""
    long = [record(new_id(), body=bytes(BATCH_BYTES // 2 + 1)) for _ in range(2)]
    assert await peer.send(topic.name, long, deadline_s=DEADLINE_S) == [Confirmed()] * 2
    await collect(await peer.subscribe(topic.name, "shop"), 1, DEADLINE_S)


async def test_hub_that_ends_gives_back_what_the_database_takes(parts: tuple[Any, Wakeups]) -> None:
    """One peer's record that it refuses keeps none of another peer here."""
    url = f"zeromq://127.0.0.1:{free_ports(1)[0]}?lease_s=3600"
    first, second, third = (make_binder(url, Resources(*parts, (ORDERS, BROKEN))) for _ in range(3))
    async with first, second, third:
        await first.provision((ORDERS, BROKEN))
        await parts[0].execute(BREAK_GIVING_BACK)
        await leave_too_much(second, BROKEN)
        await leave_too_much(third, ORDERS)

        await first.close()

        # Answered by the next hub.
        assert await third.send(BROKEN.name, [record(new_id())], deadline_s=DEADLINE_S) == [Confirmed()]
        (delivery,) = await collect(await third.subscribe(ORDERS.name, "shop"), 1, DEADLINE_S)
        assert delivery.attempts == 0


async def test_process_that_could_not_take_over_once_does_so_later(parts: tuple[Any, Wakeups], tmp_path: Path) -> None:
    """Its key was half written just then."""
    public, secret = make_keys(tmp_path, "hub")
    own = tmp_path / "own.key_secret"
    own.write_bytes(secret.read_bytes())
    url = f"zeromq://127.0.0.1:{free_ports(1)[0]}"
    first, second = (
        make_binder(f"{url}?{query(secret=file, peers=tmp_path, server=public)}", Resources(*parts, (ORDERS,)))
        for file in (secret, own)
    )
    async with first, second:
        await second.provision((ORDERS,))
        own.write_text(secret.read_text().rstrip()[:-10] + '"\n')

        await first.close()
        await asyncio.sleep(CALL_S + 3 * BEAT_S)
        own.write_bytes(secret.read_bytes())

        assert await second.send(ORDERS.name, [record("r-1")], deadline_s=DEADLINE_S) == [Confirmed()]
