"""What the settings call a broker, and whether it is still the one that had the name when Kassa last ran.

Readers of the event log go by the name, and so do answers that are under way. One that is not in the URL comes from the place
among the brokers, so it would be another one's when one is taken out or moved: that is seen by the addresses, and refused.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple, NoReturn
from urllib.parse import unquote, urlsplit, urlunsplit

import asyncpg
import structlog

from kassa.db.queries import load
from kassa.errors import SettingInvalid
from kassa.messaging.registry import REGISTRY
from kassa.messaging.topology import EVENT_BATCHES, EVENTS, PAYMENT_ORDERS
from kassa.settings import without_password

_SQL = load("kassa.messaging")

log = structlog.get_logger("kassa.messaging.broker_names")

OURS = {topic.name: topic for topic in (EVENTS, EVENT_BATCHES, PAYMENT_ORDERS)}
_NAME = re.compile("[a-z0-9][a-z0-9-]{0,30}")
_PORTS = {"amqp": 5672, "amqps": 5671}
_LOCK = 0x4B61736E  # "Kasn": two processes that start together look one after the other.


class Named(NamedTuple):
    """A broker as the settings name it."""

    name: str
    """rabbitmq, kafka …, and with `?name=shop` rabbitmq-shop; a second one of a kind without is `rabbitmq-2`. Readers of the log go
    by it, so it outlives the URL, and nobody else may have it."""
    url: str
    topics: tuple[str, ...]
    is_given: bool = False
    """Whether the name is in the URL, so that it does not depend on the place in the settings."""

    @property
    def kind(self) -> str:
        """rabbitmq, kafka …"""
        return kind_of(self.url)

    @property
    def address(self) -> str:
        """Where it is, however that is written, and without who asks there."""
        parts = urlsplit(self.url)
        hosts = ",".join(sorted(parts.netloc.rpartition("@")[2].lower().split(",")))
        path = parts.path.rstrip("/")
        if parts.scheme in _PORTS:
            hosts, path = hosts or "localhost", f"/{unquote(parts.path[1:]) or '/'}"
            if not re.search(r":\d+$", hosts):
                hosts = f"{hosts}:{_PORTS[parts.scheme]}"
        return f"{self.kind}://{hosts}{path}"

    @property
    def shown(self) -> str:
        """The URL as people may see it."""
        return without_password(self.url)


def read_brokers(urls: Sequence[str]) -> list[Named]:
    """What the setting `brokers` names. Each without topics takes all of ours that no other one names.

    A topic that is not ours carries the messages which Changes have for it. Raises SettingInvalid.
    """
    read = [(*_without_name(url), topics) for url, topics in map(_apart, urls)]
    for url, _, topics in read:
        if brokers := REGISTRY.keys() & set(topics):
            raise SettingInvalid(
                f"{without_password(url)} would have topics called {', '.join(sorted(brokers))}: separate brokers by spaces, "
                "since a comma behind # goes on with its topics.",
                name="brokers",
            )
    given = [f"{kind_of(url)}-{own}" for url, own, _ in read if own]
    for name in given:
        if given.count(name) > 1:
            raise SettingInvalid(
                f"Two brokers are called {name}: give each a name of its own, as ?name=shop.", name="brokers"
            )
    named: list[Named] = []
    for url, own, topics in read:
        name = f"{kind_of(url)}-{own}" if own else _by_place(kind_of(url), named, given)
        named.append(Named(name, url, topics, bool(own)))
    taken = {topic for one in named for topic in one.topics}
    rest = tuple(name for name in OURS if name not in taken)
    return [one if one.topics else one._replace(topics=rest) for one in named]


def kind_of(url: str) -> str:
    """What people call such a broker: rabbitmq, kafka … Raises SettingInvalid for one that Kassa does not know."""
    scheme = urlsplit(url).scheme or url
    module = REGISTRY.get(scheme)
    if module is None:
        known = ", ".join(sorted(REGISTRY))
        raise SettingInvalid(
            f"There is no broker {without_password(url)!r}; these are: {known}. Several hosts of one: each with its port.",
            name="brokers",
        )
    return module.rpartition(".")[2]


async def recognize(pool: "asyncpg.Pool[asyncpg.Record]", named: Sequence[Named]) -> None:
    """Remembers which broker has which name.

    Raises SettingInvalid if one has another name than when Kassa last ran, only because the settings name others now, or in another
    order: it would not get what it has not got yet, and another one would.
    """
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        before = [_Seen._make(row) for row in await connection.fetch(_SQL.brokers_seen)]
        for one in named:
            if not one.is_given and (other := _other_name(one, named, before)) is not None:
                _refuse(one, other)
            if (last := _last_with(one.name, before)) is not None and last.address != one.address:
                log.warning("broker.at_another_address", broker=one.name, was=last.address, now=one.address)
        await connection.execute(
            _SQL.see_brokers, [one.name for one in named], [one.address for one in named],
            [",".join(one.topics) for one in named],
        )  # fmt: skip


class _Seen(NamedTuple):
    """A broker as it was at a start of Kassa."""

    name: str
    address: str
    topics: Sequence[str]
    seen_at: datetime


def _other_name(named: Named, present: Sequence[Named], before: Sequence[_Seen]) -> str | None:
    """What it was called when it was last there, if that is not its name now and nobody goes on in its place."""
    bound = set(named.topics).intersection(OURS)
    seen = [one for one in before if one.address == named.address and bound.intersection(one.topics)]
    latest = max((one.seen_at for one in seen), default=None)
    last = [one for one in seen if one.seen_at == latest]
    if any(one.name == named.name for one in last):
        return None
    for one in last:
        heirs = [other for other in present if other.name == one.name and other.address == one.address]
        left = bound.intersection(one.topics).difference(*(heir.topics for heir in heirs))
        # Answers that are under way wait for somebody at that address, but cannot go to another one.
        if not heirs or left - {PAYMENT_ORDERS.name}:
            return one.name
    return None


def _last_with(name: str, before: Sequence[_Seen]) -> _Seen | None:
    return max((one for one in before if one.name == name), key=lambda one: one.seen_at, default=None)


def _refuse(named: Named, other: str) -> NoReturn:
    kind, _, own = other.partition("-")
    mend = f"Add ?name={own} to its URL" if own else f"Name it before all other {kind} brokers"
    raise SettingInvalid(
        f"The broker {named.shown} was {other} when Kassa last ran, and would be {named.name} now, by its place among the "
        f"brokers: it would miss the events and answers that it has not got yet. {mend}, or give it any other ?name= if it shall "
        "begin anew.",
        name="brokers",
    )


def _apart(given: str) -> tuple[str, tuple[str, ...]]:
    parts = urlsplit(given)
    topics = tuple(dict.fromkeys(topic for topic in parts.fragment.split(",") if topic))
    if not parts.scheme:
        return given.partition("#")[0], topics
    return urlunsplit(parts._replace(fragment="")), topics


def _without_name(url: str) -> tuple[str, str]:
    """The URL as its binder reads it, and the name that is given in it; '' if there is none. Raises SettingInvalid."""
    parts = urlsplit(url)
    if "@" in parts.path:
        # Not shown: what stands there is a part of a password.
        raise SettingInvalid(
            f"A broker's URL ({parts.scheme}) has an @ behind a /: percent-encode what is special in its password.",
            name="brokers",
        )
    options = parts.query.split("&") if parts.query else []
    names = [option.removeprefix("name=") for option in options if option.startswith("name=")]
    if not names:
        return url, ""
    if len(names) > 1 or not _NAME.fullmatch(names[0]):
        raise SettingInvalid(
            f"{without_password(url)}: name is one name of a to z, 0 to 9 and -, which does not begin with -.",
            name="brokers",
        )
    query = "&".join(option for option in options if not option.startswith("name="))
    return urlunsplit(parts._replace(query=query)), names[0]


def _by_place(kind: str, before: Sequence[Named], given: Sequence[str]) -> str:
    """The name of one that is given none: the next number of its kind that nobody has."""
    taken = {*given, *(one.name for one in before)}
    number = 1 + sum(one.kind == kind for one in before)
    while (name := kind if number == 1 else f"{kind}-{number}") in taken:
        number += 1
    return name
