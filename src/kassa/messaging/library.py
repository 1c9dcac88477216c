"""Messaging for services of one's own: send inside one's own transaction, receive with the effect in one's own transaction.

    messaging = Messaging("amqp://…", "postgresql://…/shop", topics=[Topic("shop.orders", ("billing",), "Orders.")])

    @messaging.consumer("kassa.events", group="shop", types=["payment.succeeded"])
    async def paid(message, connection):
        await connection.execute("UPDATE orders SET paid = true WHERE number = $1", message.json()["order_id"])

    async with messaging:
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("INSERT INTO orders …")
            await messaging.send("shop.orders", {"number": "1"}, key="1", connection=connection)
        await messaging.run()

What is sent is a row in the service's own database until the broker has it; what is received has its effect and its inbox
key in one commit, so that it happens once however often it comes. Retries, order per key, dead letters, delays and
priorities are those of Kassa, whatever the broker.
"""

import asyncio
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from datetime import datetime, timedelta
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import msgspec
import structlog

from kassa.db.migrate import require_current
from kassa.db.pool import close_pool, connect, open_pool
from kassa.errors import InvariantBroken, KassaError, QueueNotFound, Retry, SettingInvalid
from kassa.ids import Id, new_id
from kassa.messaging import outbox
from kassa.messaging.binder import Binder, Resources, Subscription
from kassa.messaging.breaker import Breaker
from kassa.messaging.broker_names import read_brokers
from kassa.messaging.consumer import PAUSE_S, Unavailable
from kassa.messaging.ladder import message_delay
from kassa.messaging.model import Ack, Dead, Delivery, Record, RetryAfter, Settlement
from kassa.messaging.order import in_waves
from kassa.messaging.packing import UNREADABLE, without_digest
from kassa.messaging.registry import make_binder
from kassa.messaging.relay import MessageRelay
from kassa.messaging.replies import CORRELATION, REPLY_TO, ReplyRelay, reply_queue
from kassa.messaging.tables import make_tables, with_schema
from kassa.messaging.topology import TOPOLOGY, Topic
from kassa.messaging.wake import MESSAGES, Wakeups
from kassa.messaging.work import DeadLetters, MessageWork
from kassa.observability.meters import Meters
from kassa.supervisor import Worker, end_tasks, is_ended, said

log = structlog.get_logger("kassa.messaging")

BATCH = 100
WAIT_S = 5.0
INBOX_KEEP_MAX = timedelta(days=3650)
TIDY_S = 3600.0
CONNECTIONS = 10
"""At most, for one consumer, and one more for each other; unless somebody says another number."""
OWN, OWN_MIN = 4, 2
"""Of these the library's own: what is sent, claimed, settled and answered has one for a moment, and waits for nothing with it. One
would do; with two, a slow statement does not hold up the rest. Handlers have the others, which know nothing of Kassa's tables."""
ASKER = "asker"
"""The group that receives a service's answers."""
NEEDS_MAX = 10_000
"""Messages of which is known whom they wait for; of others it is learnt again with one try each."""
SPREAD = 0.2
"""What waits for one destination comes back so much apart, so that the first ones tell for the others."""
_DATABASES = ("postgres", "postgresql")
"""Schemes of a broker's URL that is a database's. The bare word has none."""
_handled: ContextVar[Any] = ContextVar("kassa_handled", default=None)
"""The connection of the handler that runs. Its end wakes the relay, so what it sends needs no NOTIFY."""


class Message(NamedTuple):
    """What a handler gets."""

    id: str
    """Names it for ever; it has its effect once per group."""
    topic: str
    type: str
    """Of an event, as `payment.succeeded`; '' for what is none."""
    key: str
    body: bytes
    headers: dict[str, str]
    attempts: int
    """Failed ones before this."""
    sent_at: datetime | None

    def json(self) -> Any:
        """The body as JSON. Raises BodyUnreadable: the message is then dead at once."""
        try:
            return msgspec.json.decode(self.body)
        except UNREADABLE as error:
            raise BodyUnreadable(str(error)) from error


Handler = Callable[[Message, Any], Awaitable[None]]
"""Called in a transaction, with its connection. What it raises rolls it back; the message comes again by the ladder, or is
dead at once for `Reject`, or put off for `Unavailable`."""
Transaction = Callable[[], AbstractAsyncContextManager[Any]]
"""A transaction of the service's own: gives the connection, commits at the end, rolls back on an exception."""


class Reject(Exception):
    """Nothing will ever make this message right: to the dead letters with it, at once."""


class BodyUnreadable(Reject, msgspec.DecodeError):
    """The body is no JSON."""


class NoReply(KassaError):
    """No answer came in time; the request may be done all the same. It has an id: the same one again is safe."""

    code, retry, outcome = "queue.no_reply", Retry.SAME_KEY, "unknown"


class _Consumer(NamedTuple):
    topic: str
    group: str
    types: frozenset[str]
    handler: Handler
    transaction: Transaction | None


class _Seats:
    """Who may keep a connection of the pool while a handler runs: so many at once, and one handler of each consumer at any time.

    A handler may wait for what another consumer of the service does, as for an answer: no consumer takes the last seat of another.
    """

    def __init__(self, seats: int, consumers: Iterable[_Consumer]) -> None:
        """seats: one for each consumer, or more. One that is registered later has none of its own."""
        self._free = seats
        self._consumers = frozenset(consumers)
        self._taken: Counter[_Consumer] = Counter()
        self._turns: defaultdict[_Consumer, deque[asyncio.Future[None]]] = defaultdict(deque)

    @asynccontextmanager
    async def one(self, consumer: _Consumer) -> AsyncIterator[None]:
        """In a consumer's order; where several wait, the one that has the fewest is next."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns[consumer].append(turn)
        self._seat()
        try:
            await turn
            yield
        finally:
            self._leave(consumer, turn)

    def _seat(self) -> None:
        while able := [one for one, turns in self._turns.items() if turns and self._free > self._kept_from(one)]:
            consumer = min(able, key=self._taken.__getitem__)
            self._taken[consumer] += 1
            self._free -= 1
            turn = self._turns[consumer].popleft()
            if not turn.done():
                turn.set_result(None)

    def _kept_from(self, consumer: _Consumer) -> int:
        """Seats that it leaves to others, which have none at the moment."""
        if consumer not in self._consumers:
            return 0
        return sum(not self._taken[other] for other in self._consumers if other != consumer)

    def _leave(self, consumer: _Consumer, turn: asyncio.Future[None]) -> None:
        if turn in self._turns[consumer]:
            self._turns[consumer].remove(turn)
            return
        # Its turn had come, perhaps when it was already cancelled.
        self._taken[consumer] -= 1
        self._free += 1
        self._seat()


class Messaging:
    """One service's part in the messages of a house."""

    def __init__(
        self, broker: str, database_url: str, *, topics: Iterable[Topic] = (), name: str = "service",
        transaction: Transaction | None = None, provision: bool = True, inbox_keep: timedelta = outbox.INBOX_KEEP,
        notify: bool = True, connections: int | None = None,
    ) -> None:  # fmt: skip
        """broker: as for `kassa up --broker`, or `memory`; or the URL of the database of a Kassa whose broker is `postgres`. Bare
        `postgres` is the service's own database, where Kassa's topics never come. topics: those of the service, beside Kassa's
        own. name: of the service; its replies come to a queue of that name. transaction: opens the service's own transactions,
        e.g. `engine.begin` of SQLAlchemy; else asyncpg's. provision: whether topics are made when they are missing. inbox_keep:
        how long it is remembered what was handled, 8 days or more: longer than the broker may bring it again. notify: whether a
        commit wakes the relay; False where transactions are prepared (PREPARE TRANSACTION), which PostgreSQL then refuses.
        connections: at most, beside one that listens: 4 are the library's own, or as few as 2 where consumers need the others;
        each that has no `transaction` of its own needs one, and each handler has one while it runs. None: 10, and one more for
        each consumer but the first.
        Raises SettingInvalid."""
        if not outbox.INBOX_KEEP <= inbox_keep <= INBOX_KEEP_MAX:
            raise SettingInvalid(
                f"What was handled is remembered for {outbox.INBOX_KEEP.days} days or more, at most {INBOX_KEEP_MAX.days}: events "
                "that old may come again.",
                name="inbox_keep",
            )
        self._is_database = urlsplit(broker).scheme in _DATABASES
        # Kassa's name for it, and the topics that it has there, are in the URL for Kassa.
        self._broker_url = broker if self._is_database else read_brokers([broker])[0].url
        self._database_url = database_url
        own = tuple(topics)
        self._own = {topic.name for topic in own}
        """Kassa's own topics are there already, or made with the first group of ours."""
        self._topics = {topic.name: topic for topic in (*TOPOLOGY, *own)}
        self._name = name
        self._transaction = transaction
        self._provision = provision
        self._inbox_keep = inbox_keep
        self._bell = outbox.Bell() if notify else None
        self._connections = connections
        self._breaker = Breaker()
        self._needs: OrderedDict[tuple[str, str], str] = OrderedDict()
        """Whom a message of a group waits for; the latest ones."""
        self.meters = Meters()
        """What passes, per topic and group. For Prometheus: `registry.register(QueueCollector(messaging.meters))`, from
        `kassa.observability.meters`."""
        self.meters.watch_breaker(name, self._breaker)
        self._consumers: list[_Consumer] = []
        self._waiting: dict[str, asyncio.Future[Message]] = {}
        self._asking: asyncio.Task[None] | None = None
        """Makes the queue of the answers, or has made it."""
        self._pool: Any = None
        """Finds the library's tables by their bare names."""
        self._handlers: Any = None
        """The pool of the handlers' connections, which are as the service's URL and role make them."""
        self._queues: Any = None
        """The pool of the database that is the broker, if one is."""
        self._seats = _Seats(0, ())
        self._binder: Binder | None = None
        self._wakeups: Wakeups | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # Setting up

    def consumer(
        self, topic: str, *, group: str, types: Iterable[str] = (), transaction: Transaction | None = None
    ) -> Callable[[Handler], Handler]:
        """Registers a handler: it gets each message of the topic once, in its key's order. types: only these events.

        Consumers of one group share its messages by their types; what none of them wants is done without an effect. So all
        processes of a group have the same consumers. Raises SettingInvalid where two want the same message.
        """
        wanted = frozenset((types,) if isinstance(types, str) else types)

        def register(handler: Handler) -> Handler:
            for other in self._consumers:
                if (other.topic, other.group) == (topic, group):
                    _require_apart(topic, group, wanted, other.types)
            self._consumers.append(_Consumer(topic, group, wanted, handler, transaction or self._transaction))
            return handler

        return register

    async def start(self) -> None:
        """Connects, makes tables and topics that are missing, and begins to send. Raises SettingInvalid, BrokerUnreachable,
        DatabaseUnreachable, DatabaseRefused, and then nothing is left open: it may be tried again."""
        try:
            await self._start()
        except BaseException:
            # Also when it is cancelled: a pool would stay open.
            await self.stop()
            raise

    async def _start(self) -> None:
        url = with_schema(self._database_url)
        keeping = {consumer for consumer in self._consumers if consumer.transaction is None}
        own, seats = self._sizes(len(keeping))
        self._seats = _Seats(seats, keeping)
        self._pool = await open_pool(url, application=f"{self._name} messaging", size_max=own)
        self._handlers = await open_pool(
            self._database_url, application=f"{self._name} handlers", size_min=0, size_max=seats
        )
        async with self._pool.acquire() as connection:
            await make_tables(connection)
        self._wakeups = Wakeups(lambda: connect(url, application=f"{self._name} wake"))
        loops: list[Callable[[], Coroutine[Any, Any, None]]] = [self._wakeups.run, self._tidy]
        if self._is_database:
            self._queues = await open_pool(self._broker_url, application=f"{self._name} queues", size_max=OWN)
            async with self._queues.acquire() as connection:
                await require_current(connection)
            wakeups = Wakeups(lambda: connect(self._broker_url, application=f"{self._name} queues wake"))
            loops.append(wakeups.run)
            self._binder = self._made("postgres", self._queues, wakeups)
        else:
            self._binder = self._made(self._broker_url, self._pool, self._wakeups)
        await self._binder.open()
        consumed = {consumer.topic for consumer in self._consumers}
        needed = [topic for topic in self._declared() if topic.name in self._own or topic.name in consumed]
        await self._make_sure(needed)
        work = MessageWork(self._pool, meters=self.meters)
        way = _Way(self._name, self._binder)
        loops.append(ReplyRelay(work, way, _never_owed, self._wakeups, meters=self.meters).run)
        loops += [
            MessageRelay(work, self._binder, outbox.PREFIX + name, name, self._wakeups, meters=self.meters).run
            for name in self._topics
        ]
        self._tasks = [asyncio.create_task(Worker("messaging", loop).run(), name="messaging") for loop in loops]

    async def stop(self) -> None:
        """Ends what runs; what was not finished is in the database or comes again."""
        if self._asking is not None:
            await end_tasks(self._asking)
            self._asking = None
        await end_tasks(*self._tasks)
        self._tasks = []
        if self._binder is not None:
            await self._binder.close()
            self._binder = None
        for pool in (self._handlers, self._queues, self._pool):
            if pool is not None:
                await close_pool(pool)
        self._handlers = self._queues = self._pool = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # Sending

    async def send(
        self, topic: str, body: Any, *, key: str = "", type: str = "", headers: dict[str, str] | None = None,
        priority: int = 4, delay_s: float = 0.0, connection: Any = None,
    ) -> str:  # fmt: skip
        """Sends once the transaction commits; says the message's id.

        body: bytes, or what JSON can hold. connection: of the service's open transaction (asyncpg, psycopg 3, SQLAlchemy);
        without one the message is committed here. Messages of one key arrive in the order of their commits, if transactions
        that send to it do not overlap. delay_s: by the database's clock; at most 10 years. priority: 0 … 9;
        through a broker only for a topic with `classes=True`, whose urgent messages (7 … 9) come before the others and those
        that can wait (0 … 2) after them, whatever their key.
        """
        message = self._outgoing(topic, body, key, type, headers, priority, delay_s)
        await self._put(message, connection)
        return message.id

    def send_now(
        self, topic: str, body: Any, *, connection: Any, key: str = "", type: str = "",
        headers: dict[str, str] | None = None, priority: int = 4, delay_s: float = 0.0,
    ) -> str:  # fmt: skip
        """Like `send`, for a transaction of psycopg 3 or SQLAlchemy that is not async."""
        message = self._outgoing(topic, body, key, type, headers, priority, delay_s)
        outbox.insert_now(connection, message, wakes=self._rings())
        return message.id

    async def request(
        self, topic: str, body: Any, *, timeout_s: float = 10.0, key: str = "", headers: dict[str, str] | None = None
    ) -> Message:
        """Sends, and waits for the answer. Raises NoReply when none comes in time: then nobody knows whether it was done. The first
        one of a process makes the queue of its answers in that time too; what that raises is raised."""
        name = new_id()
        asked = {**(headers or {}), REPLY_TO: self._replies.name, CORRELATION: name}
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[name] = future
        try:
            async with asyncio.timeout(timeout_s):
                await self._asked()
                await self.send(topic, body, key=key, headers=asked)
                return await future
        except (TimeoutError, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and is_ended():
                raise
            # The time is over, or the messaging was stopped before its answers had a queue.
            raise NoReply(topic=topic, correlation_id=name) from error
        finally:
            del self._waiting[name]

    async def reply(self, message: Message, body: Any, *, connection: Any = None) -> None:
        """Answers a request, in the handler's own transaction if its connection is given. Nothing, if it wants no answer."""
        address = message.headers.get(REPLY_TO)
        if address is None:
            return
        headers = {REPLY_TO: address, CORRELATION: message.headers.get(CORRELATION) or without_digest(message.id)}
        answer = outbox.outgoing(
            "", body, key="", type="", headers=headers, priority=4, delay_s=0.0
        )._replace(topic=reply_queue(self._name))  # fmt: skip
        await self._put(answer, connection)

    async def _put(self, message: outbox.Outgoing, connection: Any) -> None:
        """Into the outbox; the relay is woken when it is committed, whoever does that."""
        if connection is None:
            await outbox.insert(self._started_pool(), message)
            self._wake()
        else:
            await outbox.insert(connection, message, wakes=connection is not _handled.get() and self._rings())

    def _rings(self) -> bool:
        return self._bell is not None and self._bell.rings()

    # Receiving

    async def run(self) -> None:
        """Handles messages until it is cancelled; a service that only sends may run it, too."""
        self._started_pool()
        groups: dict[tuple[str, str], list[_Consumer]] = {}
        for one in self._consumers:
            groups.setdefault((one.topic, one.group), []).append(one)
        running = [
            asyncio.create_task(Worker(topic, partial(self._consume, topic, group, consumers)).run())
            for (topic, group), consumers in groups.items()
        ]
        try:
            await asyncio.gather(*running, asyncio.Event().wait())
        finally:
            await end_tasks(*running)

    @property
    def dead_letters(self) -> DeadLetters:
        """What was received and given up, in queues named `topic:group`: browse, replay, purge."""
        return DeadLetters(self._queues or self._started_pool())

    @property
    def unsent(self) -> DeadLetters:
        """What was sent and taken by no broker, in queues named `outbox:topic`."""
        return DeadLetters(self._started_pool())

    async def _consume(self, topic: str, group: str, consumers: Sequence[_Consumer]) -> None:
        """consumers: all of the group that are here."""
        subscription = await self._started_binder().subscribe(topic, group)
        try:
            while True:
                await self._step(subscription, consumers)
        finally:
            await asyncio.shield(subscription.close(0.0))

    async def _step(self, subscription: Subscription, consumers: Sequence[_Consumer]) -> None:
        deliveries = await subscription.receive(BATCH, WAIT_S)
        ends: list[tuple[Delivery, Settlement]] = []
        stopped: dict[str, RetryAfter] = {}
        for wave in in_waves(deliveries, _key):
            ready = [delivery for delivery in wave if delivery.record.key not in stopped]
            ends += [(delivery, stopped[delivery.record.key]) for delivery in wave if delivery.record.key in stopped]
            answers = await asyncio.gather(*(self._handle(delivery, consumers) for delivery in ready))
            for delivery, end in zip(ready, answers, strict=True):
                ends.append((delivery, end))
                if isinstance(end, RetryAfter) and delivery.record.key:
                    stopped[delivery.record.key] = RetryAfter(end.delay_s, None, counts=False)
        if ends:
            await subscription.settle(ends)

    async def _handle(self, delivery: Delivery, consumers: Sequence[_Consumer]) -> Settlement:
        message = _message(delivery, consumers[0].topic)
        consumer = next((one for one in consumers if not one.types or message.type in one.types), None)
        if consumer is None:
            return Ack()
        waits_for = self._needs.get((consumer.group, message.id))
        if waits_for is not None and (wait_s := self._breaker.wait_s(waits_for, _now())):
            return _put_off(wait_s, f"{waits_for} is away")
        try:
            async with (consumer.transaction or partial(self._own_transaction, consumer))() as connection:
                if await outbox.note(connection, consumer.group, message.id):
                    _handled.set(connection)
                    await consumer.handler(message, connection)
        except Unavailable as away:
            return self._is_away(consumer.group, message.id, away)
        except Reject as error:
            return Dead(said(error))
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and is_ended():
                raise
            # The outermost loop of a message: whatever its handler raises belongs to the message, and must not stop the rest.
            log.warning("messaging.failed", group=consumer.group, message=message.id, error=repr(error))
            delay_s = message_delay(delivery.attempts + 1, random.random())
            reason = said(error)
            return Dead(reason) if delay_s is None else RetryAfter(delay_s, reason)
        if waits_for is not None:
            self._needs.pop((consumer.group, message.id), None)
            self._breaker.succeeded(waits_for)
        self._wake()
        return Ack()

    def _is_away(self, group: str, message: str, away: Unavailable) -> RetryAfter:
        """Puts a message off and notes whom it waits for: it is not tried again while that one is left alone."""
        log.warning("messaging.away", group=group, message=message, destination=away.destination, reason=repr(away))
        self._needs[group, message] = away.destination
        self._needs.move_to_end((group, message))
        if len(self._needs) > NEEDS_MAX:
            self._needs.popitem(last=False)
        if not self._breaker.wait_s(away.destination, _now()):
            # Many are tried side by side: those that fail after it was left alone tell nothing new.
            self._breaker.failed(away.destination, _now())
        return _put_off(max(PAUSE_S, self._breaker.wait_s(away.destination, _now())), str(away))

    @asynccontextmanager
    async def _own_transaction(self, consumer: _Consumer) -> AsyncIterator[Any]:
        async with self._seats.one(consumer), self._handlers.acquire() as connection, connection.transaction():
            yield connection

    # Answers to what was asked here

    @property
    def _replies(self) -> Topic:
        """The queue of this service's answers."""
        return Topic(f"replies.{self._name}", (ASKER,), "Answers.", lanes=1, keyed=False, declaration="durable")

    async def _asked(self) -> None:
        """Returns once the answers have their queue. Who asks first has it made, and who asks meanwhile waits for the same; it is
        made to its end though nobody waits any more, and once more for the next one if that fails."""
        if self._asking is None:
            self._asking = asyncio.create_task(self._listen(), name="answers")
        await asyncio.shield(self._asking)

    async def _listen(self) -> None:
        try:
            await self._make_sure([self._replies])
        except BaseException:
            # Raised again, to all who wait.
            self._asking = None
            raise
        self._tasks.append(asyncio.create_task(Worker("answers", self._hear).run(), name="answers"))

    async def _hear(self) -> None:
        replies = self._replies
        subscription = await self._started_binder().subscribe(replies.name, ASKER)
        try:
            while True:
                deliveries = await subscription.receive(BATCH, WAIT_S)
                for delivery in deliveries:
                    waiting = self._waiting.get(delivery.record.headers.get(CORRELATION, ""))
                    if waiting is not None and not waiting.done():
                        waiting.set_result(_message(delivery, replies.name))
                # One that nobody waits for any more is no use to anybody later.
                await subscription.settle([(delivery, Ack()) for delivery in deliveries])
        finally:
            await asyncio.shield(subscription.close(0.0))

    # Parts

    def _made(self, broker: str, pool: Any, wakeups: Wakeups) -> Binder:
        return make_binder(broker, Resources(pool, wakeups, self._declared(), self.meters))

    async def _make_sure(self, topics: Sequence[Topic]) -> None:
        """Makes what is missing, or where others do that, raises QueueNotFound."""
        missing = await self._started_binder().provision(topics, verify_only=not self._provision)
        if missing and not self._provision:
            raise QueueNotFound(
                f"{self._name} makes no topics (provision=False), and these are not there: {'; '.join(missing)}."
            )

    def _sizes(self, consumers: int) -> tuple[int, int]:
        """Connections of the library's own, and those for handlers, where so many consumers keep one. Raises SettingInvalid."""
        connections = self._connections
        if connections is None:
            connections = max(CONNECTIONS, CONNECTIONS + consumers - 1)
        needed = consumers + OWN_MIN
        if connections < needed:
            raise SettingInvalid(
                f"{connections} connections are too few for {consumers} consumers: give {needed} or more, one for each "
                f"and {OWN_MIN} for what is sent and received meanwhile.",
                name="connections",
            )
        own = max(OWN_MIN, min(OWN, connections - consumers))
        # One is for whoever is registered later.
        return own, max(1, connections - own)

    def _declared(self) -> tuple[Topic, ...]:
        """The topics with the groups that consume here."""
        groups: dict[str, set[str]] = {}
        for consumer in self._consumers:
            groups.setdefault(consumer.topic, set()).add(consumer.group)
        unknown = sorted(set(groups) - set(self._topics))
        if unknown:
            raise SettingInvalid(f"There is no topic {unknown[0]}: give it to Messaging(topics=…).", name="topics")
        for topic in groups:
            self._require_reachable(topic)
        return tuple(
            topic._replace(groups=(*topic.groups, *sorted(groups.get(topic.name, set()) - set(topic.groups))))
            for topic in self._topics.values()
        )

    def _outgoing(
        self, topic: str, body: Any, key: str, type: str, headers: dict[str, str] | None, priority: int, delay_s: float
    ) -> outbox.Outgoing:
        if topic not in self._topics:
            raise SettingInvalid(f"There is no topic {topic}: give it to Messaging(topics=…).", name="topics")
        self._require_reachable(topic)
        return outbox.outgoing(topic, body, key=key, type=type, headers=headers, priority=priority, delay_s=delay_s)

    def _require_reachable(self, topic: str) -> None:
        """Refuses Kassa's topics where Kassa cannot be."""
        if self._broker_url == "postgres" and topic not in self._own:
            raise SettingInvalid(
                f"Over `postgres` messages stay in this service's own database, and {topic} is Kassa's: give the URL of Kassa's "
                "database as the broker.",
                name="broker",
            )

    def _wake(self) -> None:
        if self._wakeups is not None:
            self._wakeups.touch(MESSAGES)

    def _started_pool(self) -> Any:
        if self._pool is None:
            raise InvariantBroken("Start the messaging first: `async with messaging:`.")
        return self._pool

    def _started_binder(self) -> Binder:
        if self._binder is None:
            raise InvariantBroken("Start the messaging first: `async with messaging:`.")
        return self._binder

    async def _tidy(self) -> None:
        """Forgets inbox keys that nothing can bring back, of the groups that consume here: others may keep theirs for longer."""
        groups = sorted({consumer.group for consumer in self._consumers})
        while True:
            await self._started_pool().execute(
                "DELETE FROM inbox WHERE group_name = ANY($2) AND at < now() - $1::interval", self._inbox_keep, groups
            )
            await asyncio.sleep(TIDY_S)


def _require_apart(topic: str, group: str, some: frozenset[str], others: frozenset[str]) -> None:
    """Two consumers of a group want different types. Raises SettingInvalid."""
    both = some & others
    if some and others and not both:
        return
    what = ", ".join(sorted(both)) or "the same messages"
    raise SettingInvalid(
        f"Two consumers of the group {group} want {what} of {topic}, which go to one of them: give one of the two another group, "
        "or each its own types.",
        name="group",
    )


def _now() -> float:
    return asyncio.get_running_loop().time()


def _put_off(delay_s: float, reason: str) -> RetryAfter:
    return RetryAfter(delay_s * (1.0 + SPREAD * random.random()), reason, counts=False)


def _key(delivery: Delivery) -> str | None:
    return delivery.record.key or None


def _message(delivery: Delivery, topic: str) -> Message:
    record: Record = delivery.record
    return Message(
        record.id, topic, record.headers.get("ce-type", ""), record.key, record.body, record.headers,
        delivery.attempts, delivery.sent_at,
    )  # fmt: skip


class _Way:
    """The broker, as the relay of answers knows it."""

    def __init__(self, name: str, binder: Binder) -> None:
        self.name = name
        self._binder = binder

    async def binder(self) -> Binder:
        return self._binder

    def is_away(self, reason: str) -> None:
        log.warning("messaging.broker_away", reason=reason)


async def _never_owed(home: int, noun: str, id: Id) -> bytes | None:
    """Answers of a service are whole when they are written."""
    return None
