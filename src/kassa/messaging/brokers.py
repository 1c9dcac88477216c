"""The brokers of an installation: which there are, what travels over each, and whether each is there at the moment.

Nothing that a request needs is here: when a broker is away, events wait in the log and messages in their queues.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import asyncpg
import structlog

from kassa.db.queries import load
from kassa.errors import BrokerUnreachable, QueueNotFound, SettingInvalid
from kassa.messaging.binder import Binder, Resources
from kassa.messaging.broker_names import OURS, Named, kind_of, recognize
from kassa.messaging.registry import make_binder
from kassa.messaging.topology import PAYMENT_ORDERS, Topic
from kassa.messaging.wake import Wakeups
from kassa.observability.meters import Meters

_SQL = load("kassa.messaging")

log = structlog.get_logger("kassa.messaging.brokers")


Mode = Literal["create", "verify", "leave"]
"""What is done at a broker about what is missing: made, only looked for, or nothing."""


def _is_kept_here(url: str) -> bool:
    """Whether a broker's topics are nowhere but in Kassa's own tables, where nobody else makes them."""
    return kind_of(url) in ("postgres", "zeromq")


class Broker:
    """One broker of this process: opened when it is first needed, and watched."""

    def __init__(
        self, named: Named, pool: "asyncpg.Pool[asyncpg.Record]", wakeups: Wakeups, orders: Topic, *, topology: Mode,
        meters: Meters | None = None,
    ) -> None:  # fmt: skip
        """orders: the topic payment_order as this installation declares it. meters: where what passes is counted."""
        self.named = named
        self.name = named.name
        self.shown = named.shown
        self.topics = named.topics
        self.away_since: float | None = None
        """By the monotonic clock; None: nothing is wrong as far as we know."""
        self.reason = ""
        self._pool = pool
        self._wakeups = wakeups
        self._orders = orders
        self._mode = topology
        self._meters = meters
        self._binder: Binder | None = None
        self._provisioned: tuple[Topic, ...] = ()
        """What the binder was told of."""
        self._opening = asyncio.Lock()

    async def binder(self) -> Binder:
        """Connected, with everything there that travels over it. Raises BrokerUnreachable, SettingInvalid, and what the
        broker says of a queue that is there in another form."""
        async with self._opening:
            if self._binder is None:
                topology = await self.topology()
                binder = self._made(topology)
                try:
                    await binder.open()
                    await self._provision(binder, topology)
                except BaseException:
                    await binder.close()
                    raise
                self._binder = binder
                self._provisioned = topology
            return self._binder

    async def learn_groups(self) -> bool:
        """Groups that somebody subscribed since are looked after here, too; whether there were any. Raises what `binder` raises,
        QueueNotFound."""
        binder = await self.binder()
        topology = await self.topology()
        if topology == self._provisioned:
            return False
        await self._provision(binder, topology)
        self._provisioned = topology
        return True

    @property
    def is_open(self) -> bool:
        """Whether this process has connected to it."""
        return self._binder is not None

    async def topology(self) -> tuple[Topic, ...]:
        """Its topics with their groups: our own ones, and those that somebody subscribed."""
        declared: list[Topic] = []
        for name in self.topics:
            topic = self._orders if name == PAYMENT_ORDERS.name else OURS.get(name) or Topic(name, (), "Messages.")
            groups = [row["group_name"] for row in await self._pool.fetch(_SQL.groups_of_topic, name)]
            declared.append(topic._replace(groups=tuple(dict.fromkeys((*topic.groups, *groups)))))
        return tuple(declared)

    async def subscribed(self, topic: str) -> bool:
        """Whether any group receives a topic."""
        return bool(await self._pool.fetch(_SQL.groups_of_topic, topic))

    async def subscribe_group(self, topic: str, group: str) -> list[str]:
        """A group of a topic, from now on; says what was made for it. Raises BrokerUnreachable, QueueNotFound."""
        binder = await self.binder()
        declared = next(one for one in await self.topology() if one.name == topic)
        return await self._make_sure(binder, [declared._replace(groups=(group,))])

    async def close(self) -> None:
        """Lets go of every connection."""
        if self._binder is not None:
            await self._binder.close()
            self._binder = None

    def is_back(self) -> None:
        """It answered."""
        if self.away_since is not None:
            log.info("broker.back", broker=self.name, away_s=round(time.monotonic() - self.away_since, 1))
            self.away_since = None
            self.reason = ""

    def is_away(self, reason: str) -> None:
        """It did not answer."""
        if self.away_since is None:
            log.warning("broker.away", broker=self.name, url=self.shown, reason=reason)
            self.away_since = time.monotonic()
        self.reason = reason

    def _made(self, topology: tuple[Topic, ...]) -> Binder:
        try:
            return make_binder(self.named.url, Resources(self._pool, self._wakeups, topology, self._meters))
        except ImportError as error:
            raise SettingInvalid(
                f"The client of {self.name} is not installed ({error.name}): install Kassa with the extra "
                f"`{self.named.kind}` (docs/guides/queues.md).",
                name="brokers",
            ) from error

    async def _provision(self, binder: Binder, topology: Sequence[Topic]) -> None:
        if self._mode == "leave":
            return
        await self._make_sure(binder, topology)

    async def _make_sure(self, binder: Binder, topology: Sequence[Topic]) -> list[str]:
        """Makes what is missing, and says what; where others make it, raises QueueNotFound instead."""
        said = await binder.provision(topology, verify_only=self._mode == "verify")
        if self._mode == "verify" and said:
            raise QueueNotFound(
                f"{self.name} lacks what Kassa needs, and broker_topology is `verify`: {'; '.join(said)}.",
                broker=self.name,
            )
        for line in said:
            log.info("broker.provisioned", broker=self.name, says=line)
        return said


class Brokers:
    """All brokers of this process."""

    def __init__(
        self,
        named: Sequence[Named],
        pool: "asyncpg.Pool[asyncpg.Record]",
        wakeups: Wakeups,
        orders: Topic,
        *,
        topology: Mode = "create",
        meters: Meters | None = None,
    ) -> None:
        """orders: the topic payment_order as this installation declares it. topology: of those where others can make something.
        meters: where what passes is counted."""
        self._pool = pool
        self._all = [
            Broker(
                one, pool, wakeups, orders, meters=meters,
                topology="create" if topology == "verify" and _is_kept_here(one.url) else topology,
            )
            for one in named
        ]  # fmt: skip

    def __iter__(self) -> Iterator[Broker]:
        return iter(self._all)

    async def recognize(self) -> None:
        """Remembers which broker has which name. Raises SettingInvalid as `broker_names.recognize` does."""
        await recognize(self._pool, [broker.named for broker in self._all])

    def of_topic(self, topic: str) -> list[Broker]:
        """Those over which a topic travels."""
        return [broker for broker in self._all if topic in broker.topics]

    async def open(self) -> None:
        """Connects to each, and makes or looks for what travels over it, unless one would have another name. Raises what
        `Broker.binder` and `recognize` raise, with what to do."""
        await self.recognize()
        for broker in self._all:
            try:
                await broker.binder()
            except BrokerUnreachable as error:
                raise BrokerUnreachable(
                    f"The broker {broker.shown} cannot be reached ({_why(error)}). Start it, or correct its URL: "
                    "--broker, KASSA_BROKERS, or `brokers` in kassa.toml.",
                    broker=broker.name,
                ) from error

    async def close(self) -> None:
        """Lets go of every connection."""
        for broker in self._all:
            await broker.close()


def _why(error: BrokerUnreachable) -> str:
    facts = [str(fact) for name, fact in error.facts.items() if name in ("reason", "error", "detail")]
    generic = (BrokerUnreachable.__doc__ or "").strip()
    return "; ".join(facts) or (error.detail if error.detail != generic else repr(error.__cause__ or "no answer"))
