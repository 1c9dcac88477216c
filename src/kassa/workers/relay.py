"""What leaves over a broker: events to everybody, messages to their topics, answers to who asked. One loop each.

A broker that is away stops its own loops where they stand and nothing else: the log and the queues are the memory.
"""

import asyncio
from collections.abc import Sequence

import structlog

from kassa.app import App
from kassa.db.away import AWAY
from kassa.errors import BrokerUnreachable, KassaError, QueueMismatch, QueueNotFound, SettingInvalid
from kassa.ids import Id
from kassa.messaging.binder import Binder
from kassa.messaging.broker_names import OURS
from kassa.messaging.brokers import Broker
from kassa.messaging.log import GroupReader, Halt, LogGroup
from kassa.messaging.model import LogRecord
from kassa.messaging.pace import Pace
from kassa.messaging.relay import EventRelay, MessageRelay
from kassa.messaging.replies import ReplyRelay
from kassa.messaging.topology import EVENT_BATCHES, EVENTS, PAYMENT_ORDERS
from kassa.messaging.wake import EVENTS as NEW_EVENTS
from kassa.messaging.work import MessageWork
from kassa.supervisor import Loop

log = structlog.get_logger("kassa.workers.relay")

PAUSE_S = 0.5
PAUSE_MAX_S = 5.0
"""Between tries to reach a broker."""
GROUPS_S = 30.0
"""How often it is looked whether somebody subscribed a group that this process does not look after yet."""
LOOK_S = 2.0
"""How often a relay that nobody listens to looks whether somebody does now."""


def group_name(broker: str, topic: str) -> str:
    """The group in the event log whose cursor says what a broker has got."""
    return f"relay:{broker}:{topic}"


async def opened(broker: Broker) -> Binder:
    """The broker's binder, as soon as it can be reached and has what Kassa needs."""
    pause_s = PAUSE_S
    while True:
        try:
            binder = await broker.binder()
        except (BrokerUnreachable, SettingInvalid, QueueMismatch, QueueNotFound) as error:
            broker.is_away(str(error))
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, PAUSE_MAX_S)
        else:
            broker.is_back()
            return binder


async def prepare(app: App) -> None:
    """From now on each broker's events are kept for it: those of before it was named it does not get. Raises SettingInvalid as
    `Brokers.recognize` does."""
    # Again where they have been opened before: `kassa serve` never opens them.
    await app.brokers.recognize()
    for broker in app.brokers:
        if EVENTS.name in broker.topics:
            await LogGroup(app.pool, group_name(broker.name, EVENTS.name)).create(from_now=True)


async def listen(app: App, broker: Broker, topic: str, group: str) -> list[str]:
    """One more group of a topic, from now on; says what was made for it. Raises BrokerUnreachable."""
    if topic == EVENT_BATCHES.name:
        await LogGroup(app.pool, group_name(broker.name, topic)).create(from_now=True)
    return await broker.subscribe_group(topic, group)


def relays(app: App, broker: Broker) -> dict[str, Loop]:
    """The loops of one broker, by name."""
    work = MessageWork(app.pool, meters=app.metrics.meters)
    found: dict[str, Loop] = {"groups": lambda: _learn_groups(broker)}
    if EVENTS.name in broker.topics:
        found[EVENTS.name] = lambda: _relay_events(app, broker, EVENTS.name)
    if EVENT_BATCHES.name in broker.topics:
        found[EVENT_BATCHES.name] = lambda: _relay_batches(app, broker)
    if PAYMENT_ORDERS.name in broker.topics:
        found["replies"] = ReplyRelay(work, broker, Looks(app), app.wakeups, meters=app.metrics.meters).run
    for topic in broker.topics:
        if topic not in OURS:
            found[topic] = _messages(app, work, broker, topic)
    return found


class Looks:
    """How the thing stands that an answer tells of. Calls itself with home, noun and id; None: it is not answered yet."""

    def __init__(self, app: App) -> None:
        self._payments = app.payments

    async def __call__(self, home: int, noun: str, resource: Id) -> bytes | None:
        if noun == "refund":
            found = await self._payments.get_refund(home, resource)
        else:
            found = await self._payments.get_payment(home, resource)
        return None if found.running else found.body


def _messages(app: App, work: MessageWork, broker: Broker, topic: str) -> Loop:
    async def relay() -> None:
        await MessageRelay(work, await opened(broker), topic, topic, app.wakeups, meters=app.metrics.meters).run()

    return relay


async def _learn_groups(broker: Broker) -> None:
    while True:
        await asyncio.sleep(GROUPS_S)
        try:
            if await broker.learn_groups():
                log.info("relay.groups_learned", broker=broker.name)
        except (*AWAY, BrokerUnreachable, SettingInvalid, QueueMismatch, QueueNotFound) as error:
            log.info("relay.groups_not_learned", broker=broker.name, reason=str(error))


async def _relay_batches(app: App, broker: Broker) -> None:
    """Envelopes are made only where somebody takes them; until then the log is passed over.

    Only what was there before we looked, so that a new group misses nothing of what comes after it.
    """
    group = LogGroup(app.pool, group_name(broker.name, EVENT_BATCHES.name))
    is_wanted = False
    while not is_wanted:
        await group.create(from_now=True)
        heads = await group.heads()
        is_wanted = await broker.subscribed(EVENT_BATCHES.name)
        if not is_wanted:
            await group.skip(heads)
            await asyncio.sleep(LOOK_S)
    await _relay_events(app, broker, EVENT_BATCHES.name)


async def _relay_events(app: App, broker: Broker, topic: str) -> None:
    group = LogGroup(app.pool, group_name(broker.name, topic))
    await group.create(from_now=True)
    binder = await opened(broker)
    relay = EventRelay(binder, topic)
    passage = app.metrics.meters.passage(topic, group.name)

    async def handle(records: Sequence[LogRecord]) -> list[str | None]:
        try:
            answers = await relay.handle(records)
            if None not in answers and (lack := await _lack(binder, broker, topic)):
                # The records are all right: none is parked, and dies, for what somebody has to make first.
                raise Halt(lack)
        except Halt as halt:
            broker.is_away(halt.reason)
            raise
        broker.is_back()
        sent = [record.at for record, failure in zip(records, answers, strict=True) if failure is None]
        passage.took_since(sent, app.clock.now())
        passage.retried += len(records) - len(sent)
        passage.received += len(records)
        return answers

    pace = Pace(app.pool, app.settings.relay_backlog_per_s)
    await GroupReader(group, handle, app.wakeups.watch(NEW_EVENTS).wait, pace=pace).run()


async def _lack(binder: Binder, broker: Broker, topic: str) -> str:
    """What is missing at a broker that answers and took nothing of a batch; '' when all is there: the batch was wrong."""
    declared = [one for one in await broker.topology() if one.name == topic]
    try:
        return "; ".join(await binder.provision(declared, verify_only=True))
    except KassaError as error:
        return str(error)
