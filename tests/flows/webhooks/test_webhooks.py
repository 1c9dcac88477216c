"""Webhooks end to end: a real database, a real receiver, verified by the standard's own library."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiohttp import web
from standardwebhooks.webhooks import Webhook

from flows.webhooks.house import HOME, Kassa, Shop, Taken, until
from kassa.errors import EventNotFound, IdempotencyKeyReused, RequestInvalid, WebhookEndpointNotFound
from kassa.ids import Id, new_id
from kassa.journal.change import OnceKey
from kassa.notifications import model
from kassa.notifications.records import WebhookDelivery
from kassa.workers import webhooks


async def status(code: int) -> web.StreamResponse:
    return web.Response(status=code)


async def settled(kassa: Kassa, endpoint: Id, state: str, count: int = 1) -> list[WebhookDelivery]:
    """The endpoint's deliveries once `count` of them are in a state."""
    found: list[WebhookDelivery] = []

    async def enough() -> bool:
        found[:] = await kassa.webhooks.deliveries(HOME, endpoint, 100, state=state)
        return len(found) >= count

    await until(enough)
    return found


async def tried(kassa: Kassa, endpoint: Id, tries: int) -> WebhookDelivery:
    """The endpoint's delivery of a first event once it was tried so often."""
    found: list[WebhookDelivery] = []

    async def enough() -> bool:
        all_ = await kassa.webhooks.deliveries(HOME, endpoint, 10)
        found[:] = [one for one in all_ if one.event_sequence == 1 and one.tries == tries]
        return bool(found)

    await until(enough)
    return found[0]


async def test_webhook_verifies_with_the_standards_own_library(kassa: Kassa, shop: Shop) -> None:
    made = await kassa.webhooks.create(HOME, shop.url, ["*"])
    async with kassa.running():
        wallet = await kassa.open_wallet()
        (taken,) = await shop.wait(1)
        (delivery,) = await settled(kassa, made.endpoint.id, "delivered")

    event = Webhook(made.secret).verify(taken.body, taken.headers)
    assert event["type"] == "wallet.created"
    assert event["root"] == f"wal_{wallet}"
    assert event["sequence"] == 1
    assert event["data"]["object"] == "wallet"
    assert event["id"] == taken.headers["webhook-id"] == delivery.event
    assert (delivery.last_status, delivery.tries, delivery.last_error) == (204, 1, None)
    assert delivery.last_at is not None and delivery.last_duration_ms is not None


async def test_only_events_that_the_filter_takes_are_sent(kassa: Kassa, shop: Shop) -> None:
    await kassa.webhooks.create(HOME, shop.url, ["wallet.paid", "refund.*"])
    async with kassa.running():
        wallet = await kassa.open_wallet()
        await kassa.happen(wallet, "wallet.paid", 2)
        await kassa.happen(wallet, "refund.created", 3)
        await shop.wait(2)
        await asyncio.sleep(0.1)

    assert [taken.event["type"] for taken in shop.taken] == ["wallet.paid", "refund.created"]


async def test_another_merchants_events_are_not_sent(kassa: Kassa, shop: Shop) -> None:
    await kassa.webhooks.create(HOME, shop.url, ["*"])
    async with kassa.running():
        await kassa.open_wallet(home=8)
        await kassa.open_wallet()
        await shop.wait(1)
        await asyncio.sleep(0.1)

    assert len(shop.taken) == 1


async def test_events_of_one_object_arrive_in_order_even_when_the_first_fails(kassa: Kassa, shop: Shop) -> None:
    failing = [True]

    async def answer(taken: Taken) -> web.StreamResponse:
        return await status(500 if failing[0] else 200)

    shop.answer = answer
    made = await kassa.webhooks.create(HOME, shop.url, ["*"])
    async with kassa.running():
        wallet = await kassa.open_wallet()
        for number in (2, 3):
            await kassa.happen(wallet, "wallet.paid", number)
        await shop.wait(1)
        other = await kassa.open_wallet()

        async def other_is_told() -> bool:
            return any(taken.event["root"] == f"wal_{other}" for taken in shop.taken)

        await until(other_is_told)
        found = await settled(kassa, made.endpoint.id, "due", 4)
        tried = {delivery.event_sequence: delivery for delivery in found if delivery.event_root == wallet}
        assert (tried[2].tries, tried[3].tries) == (0, 0)
        failing[0] = False
        await asyncio.sleep(0.1)
        for delivery in found:
            if delivery.event_sequence == 1:
                await kassa.soon(delivery.id)
        await settled(kassa, made.endpoint.id, "delivered", 4)

    told = [taken.event["sequence"] for taken in shop.taken if taken.event["root"] == f"wal_{wallet}"]
    # The first may have been tried once more by itself meanwhile.
    assert told[:2] == [1, 1] and told[-3:] == [1, 2, 3] and set(told[:-2]) == {1}


async def test_event_that_came_while_the_one_before_was_on_its_way_follows_at_once(kassa: Kassa, shop: Shop) -> None:
    """It is woken by the one before: by itself it would look again in an hour only."""
    may_answer = asyncio.Event()

    async def answer(taken: Taken) -> web.StreamResponse:
        await may_answer.wait()
        return await status(200)

    async def waits_for_its_turn() -> bool:
        return bool(
            await kassa.pool.fetchval(
                "SELECT count(*) FROM timer WHERE kind = 'webhook' AND due > clock_timestamp() + interval '30 minutes'"
            )
        )

    shop.answer = answer
    await kassa.webhooks.create(HOME, shop.url, ["*"])
    async with kassa.running(turn_s=3600.0):
        wallet = await kassa.open_wallet()
        await shop.wait(1)
        await kassa.happen(wallet, "wallet.paid", 2)
        await until(waits_for_its_turn)
        may_answer.set()
        await shop.wait(2)

    assert [taken.event["sequence"] for taken in shop.taken] == [1, 2]


async def test_no_event_waits_for_a_look_when_many_objects_have_several(kassa: Kassa, shop: Shop) -> None:
    """However deliveries and their followers cross, nobody is left waiting: a second look would come in an hour."""
    await kassa.webhooks.create(HOME, shop.url, ["*"])
    async with kassa.running(turn_s=3600.0):
        wallets = [await kassa.open_wallet() for _ in range(6)]
        for number in range(2, 12):
            await asyncio.gather(*(kassa.happen(wallet, "wallet.paid", number) for wallet in wallets))
        await shop.wait(66, timeout_s=300.0)

    for wallet in wallets:
        told = [taken.event["sequence"] for taken in shop.taken if taken.event["root"] == f"wal_{wallet}"]
        assert told == list(range(1, 12))


@pytest.mark.parametrize(
    ("code", "said"), [(500, "answered 500"), (404, "answered 404"), (302, "redirects are not followed")]
)
async def test_anything_but_2xx_is_tried_again(kassa: Kassa, shop: Shop, code: int, said: str) -> None:
    async def answer(taken: Taken) -> web.StreamResponse:
        return web.Response(status=code, headers={"location": shop.url} if code == 302 else {})

    shop.answer = answer
    made = await kassa.webhooks.create(HOME, shop.url, ["*"])
    async with kassa.running():
        await kassa.open_wallet()
        await shop.wait(1)
        delivery = await tried(kassa, made.endpoint.id, 1)

    assert len(shop.taken) == 1
    assert (delivery.state, delivery.last_status) == ("due", code)
    assert delivery.last_error is not None and said in delivery.last_error
    assert delivery.next_at is not None and delivery.last_at is not None
    assert 4.4 < (delivery.next_at - delivery.last_at).total_seconds() < 5.6


@pytest.mark.parametrize("answer_s", [1.0])
async def test_slow_receiver_is_cut_off_and_tried_again(kassa: Kassa, shop: Shop) -> None:
    async def answer(taken: Taken) -> web.StreamResponse:
        await asyncio.sleep(3 if len(shop.taken) == 1 else 0)
        return web.Response()

    shop.answer = answer
    made = await kassa.webhooks.create(HOME, shop.url, ["*"])
    async with kassa.running():
        await kassa.open_wallet()
        await shop.wait(1)
        delivery = await tried(kassa, made.endpoint.id, 1)
        assert delivery.last_error == "no answer within 1 s"
        await kassa.soon(delivery.id)
        await settled(kassa, made.endpoint.id, "delivered")


async def test_endless_answer_is_not_read_to_its_end(kassa: Kassa, shop: Shop) -> None:
    async def answer(taken: Taken) -> web.StreamResponse:
        return web.Response(status=200, body=b"x" * 20_000_000)

    shop.answer = answer
    made = await kassa.webhooks.create(HOME, shop.url, ["*"])
    async with kassa.running():
        await kassa.open_wallet()
        await settled(kassa, made.endpoint.id, "delivered")


async def test_delivery_is_given_up_after_the_last_try_and_the_next_event_goes_on(kassa: Kassa, shop: Shop) -> None:
    async def answer(taken: Taken) -> web.StreamResponse:
        return await status(500 if taken.event["sequence"] == 1 else 200)

    shop.answer = answer
    made = await kassa.webhooks.create(HOME, shop.url, ["*"])
    async with kassa.running():
        wallet = await kassa.open_wallet()
        await kassa.happen(wallet, "wallet.paid", 2)
        for tries in range(1, 10):
            await kassa.soon((await tried(kassa, made.endpoint.id, tries)).id)
        (exhausted,) = await settled(kassa, made.endpoint.id, "exhausted")
        await settled(kassa, made.endpoint.id, "delivered")

    assert exhausted.tries == 10
    assert exhausted.next_at is None


async def test_both_secrets_sign_while_one_rotates(kassa: Kassa, shop: Shop) -> None:
    made = await kassa.webhooks.create(HOME, shop.url, ["*"])
    fresh = await kassa.webhooks.rotate_secret(HOME, made.endpoint.id)
    async with kassa.running():
        await kassa.open_wallet()
        (taken,) = await shop.wait(1)

    assert fresh.secret != made.secret
    assert Webhook(made.secret).verify(taken.body, taken.headers)
    assert Webhook(fresh.secret).verify(taken.body, taken.headers)
    assert len(taken.headers["webhook-signature"].split()) == 2
    assert made.secret.encode() not in (await kassa.webhooks.get(HOME, made.endpoint.id)).secrets


async def test_creating_again_under_the_same_key_shows_the_same_endpoint(kassa: Kassa, shop: Shop) -> None:
    once = OnceKey("POST /v1/webhook_endpoints", "k-1", b"one")

    first = await kassa.webhooks.create(HOME, shop.url, ["*"], once=once)
    again = await kassa.webhooks.create(HOME, shop.url, ["*"], once=once)

    assert (again.endpoint.id, again.secret, again.is_repeat) == (first.endpoint.id, first.secret, True)
    with pytest.raises(IdempotencyKeyReused):
        await kassa.webhooks.create(HOME, shop.url, ["*"], once=once._replace(digest=b"two"))


async def test_one_event_can_be_sent_again(kassa: Kassa, shop: Shop) -> None:
    made = await kassa.webhooks.create(HOME, shop.url, ["*"])
    once = OnceKey("redeliver", "k-1", b"one")
    async with kassa.running():
        await kassa.open_wallet()
        (taken,) = await shop.wait(1)
        await settled(kassa, made.endpoint.id, "delivered")
        (again,) = await kassa.webhooks.redeliver(HOME, taken.event["id"], once=once)
        repeated = await kassa.webhooks.redeliver(HOME, taken.event["id"], once=once)
        await settled(kassa, made.endpoint.id, "delivered", 2)

    assert again.replay == 1
    assert repeated == []
    assert [one.body for one in shop.taken] == [taken.body, taken.body]


async def test_redelivering_another_merchants_event_is_not_found(kassa: Kassa, shop: Shop) -> None:
    await kassa.webhooks.create(HOME, shop.url, ["*"])
    await kassa.open_wallet(home=8)
    (event,) = await kassa.events.of_home(8, 10)

    with pytest.raises(EventNotFound):
        await kassa.webhooks.redeliver(HOME, event.name)
    with pytest.raises(EventNotFound):
        await kassa.webhooks.redeliver(HOME, "evt_nonsense")


async def test_replay_of_a_time_sends_all_its_events_again_in_order(
    kassa: Kassa, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three pages, the last one not full."""
    for module in (model, webhooks):
        monkeypatch.setattr(module, "REPLAY_PAGE", 20)
    wallet = await kassa.open_wallet()
    for number in range(2, 47):
        await kassa.happen(wallet, "wallet.paid", number)
    made = await kassa.webhooks.create(HOME, shop.url, ["*"])
    now, hour = datetime.now(UTC), timedelta(hours=1)
    async with kassa.running():
        replay = await kassa.webhooks.replay(HOME, made.endpoint.id, now - hour, now + hour)
        await shop.wait(46, 300)
        await settled(kassa, made.endpoint.id, "delivered", 46)

        async def is_done() -> bool:
            done = await kassa.store.replay(HOME, replay.id)
            return done is not None and done.state == "done" and done.deliveries == 46

        await until(is_done)

    assert [taken.event["sequence"] for taken in shop.taken] == list(range(1, 47))


async def test_dead_endpoint_is_paused_and_reported_to_the_others(kassa: Kassa, shop: Shop) -> None:
    dead = await kassa.webhooks.create(HOME, "http://127.0.0.1:9/", ["wallet.*"])
    await kassa.webhooks.create(HOME, shop.url, ["webhook_endpoint.*"])
    async with kassa.running(dead_after=timedelta(0)):
        await kassa.open_wallet()
        await kassa.open_wallet()

        async def is_paused() -> bool:
            for one in await kassa.webhooks.deliveries(HOME, dead.endpoint.id, 10, state="due"):
                await kassa.soon(one.id)
            return (await kassa.webhooks.get(HOME, dead.endpoint.id)).state == "paused"

        await until(is_paused)
        (taken,) = await shop.wait(1)
        for one in await kassa.webhooks.deliveries(HOME, dead.endpoint.id, 10, state="due"):
            await kassa.soon(one.id)
        await settled(kassa, dead.endpoint.id, "dropped", 2)

    assert taken.event["type"] == "webhook_endpoint.paused"
    assert taken.event["data"]["id"] == f"whe_{dead.endpoint.id}"
    enabled = await kassa.webhooks.patch(HOME, dead.endpoint.id, state="enabled")
    assert (enabled.state, enabled.failing_since, enabled.paused_reason) == ("enabled", None, None)


async def test_a_delivery_whose_worker_died_is_sent_again_and_counted_once(kassa: Kassa, shop: Shop) -> None:
    made = await kassa.webhooks.create(HOME, shop.url, ["*"])
    hanging = asyncio.Event()

    async def answer(taken: Taken) -> web.StreamResponse:
        if len(shop.taken) == 1:
            await hanging.wait()
        return web.Response()

    shop.answer = answer
    async with kassa.running():
        await kassa.open_wallet()
        await shop.wait(1)
    hanging.set()
    # As if the time had passed for which the worker had it.
    await kassa.pool.execute("UPDATE timer SET leased_until = clock_timestamp()")
    async with kassa.running():
        (delivery,) = await settled(kassa, made.endpoint.id, "delivered")

    assert len(shop.taken) == 2
    assert shop.taken[0].headers["webhook-id"] == shop.taken[1].headers["webhook-id"]
    assert delivery.tries == 1


async def test_an_event_that_is_dispatched_twice_makes_one_delivery(kassa: Kassa, shop: Shop) -> None:
    made = await kassa.webhooks.create(HOME, shop.url, ["*"])
    async with kassa.running():
        await kassa.open_wallet()
        await settled(kassa, made.endpoint.id, "delivered")
    await kassa.pool.execute("DELETE FROM cursor_position")
    async with kassa.running():
        await asyncio.sleep(0.5)

    assert len(shop.taken) == 1
    assert len(await kassa.webhooks.deliveries(HOME, made.endpoint.id, 10)) == 1


async def test_deleted_endpoint_is_gone_and_gets_nothing(kassa: Kassa, shop: Shop) -> None:
    made = await kassa.webhooks.create(HOME, shop.url, ["*"])
    await kassa.webhooks.delete(HOME, made.endpoint.id)
    async with kassa.running():
        await kassa.open_wallet()
        await asyncio.sleep(0.3)

    assert shop.taken == []
    assert await kassa.webhooks.page(HOME, 10) == []
    for call in (kassa.webhooks.get, kassa.webhooks.delete, kassa.webhooks.rotate_secret):
        with pytest.raises(WebhookEndpointNotFound):
            await call(HOME, made.endpoint.id)


async def test_one_merchant_never_reaches_anothers_endpoint(kassa: Kassa, shop: Shop) -> None:
    id = (await kassa.webhooks.create(HOME, shop.url, ["*"])).endpoint.id
    now = datetime.now(UTC)

    with pytest.raises(WebhookEndpointNotFound):
        await kassa.webhooks.get(8, id)
    with pytest.raises(WebhookEndpointNotFound):
        await kassa.webhooks.patch(8, id, state="disabled")
    with pytest.raises(WebhookEndpointNotFound):
        await kassa.webhooks.rotate_secret(8, id)
    with pytest.raises(WebhookEndpointNotFound):
        await kassa.webhooks.deliveries(8, id, 10)
    with pytest.raises(WebhookEndpointNotFound):
        await kassa.webhooks.replay(8, id, now - timedelta(hours=1), now)
    with pytest.raises(WebhookEndpointNotFound):
        await kassa.webhooks.delete(8, id)


@pytest.mark.parametrize("events", [[], ["payment"], ["payment.*.x"], ["*", "Payment.paid"], ["payment. x"]])
async def test_filters_that_name_nothing_are_refused(kassa: Kassa, shop: Shop, events: list[str]) -> None:
    with pytest.raises(RequestInvalid) as refused:
        await kassa.webhooks.create(HOME, shop.url, events)

    fields: list[dict[str, Any]] = refused.value.facts["errors"]
    assert fields[0]["field"] == "events"


async def test_unknown_endpoint_is_not_found(kassa: Kassa) -> None:
    with pytest.raises(WebhookEndpointNotFound):
        await kassa.webhooks.get(HOME, new_id())
