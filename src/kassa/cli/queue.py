"""Queues for operators: how they are doing, what died in them, and trying it again."""

from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import msgspec

from kassa.api import asyncapi
from kassa.api.server import RAW
from kassa.cli.directory import recall
from kassa.cli.options import broker_option, opened, place_options, run, settings_of
from kassa.cli.output import json_option, show, table, when
from kassa.errors import QueueNotFound
from kassa.ids import Id, read_id
from kassa.messaging.brokers import Brokers, Named, read_brokers
from kassa.messaging.topology import PAYMENT_ORDERS
from kassa.messaging.work import DeadLetters, MessageWork
from kassa.workers.relay import listen

TIMES = click.DateTime(formats=["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d"])


@click.group()
def queue() -> None:
    """Queues and dead letters."""


@queue.command("list")
@place_options
@json_option
def list_queues(directory: str | None, database_url: str | None, as_json: bool) -> None:
    """How every queue is doing."""

    async def work() -> list[Any]:
        async with opened(directory, database_url) as app:
            found: list[Any] = await MessageWork(app.pool).queues()
            return found

    heads = ("topic", "depth", "in_flight", "delayed", "dead", "oldest_s")
    rows = [dict(zip(heads, one, strict=True)) for one in run(work())]
    show({"data": rows}, as_json, lambda: table(heads, [list(row.values()) for row in rows], right=heads[1:]))


@queue.command()
@click.argument("topic")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@place_options
@json_option
def dead(topic: str, limit: int, directory: str | None, database_url: str | None, as_json: bool) -> None:
    """What was given up in a queue, newest first, and why."""

    async def work() -> list[Any]:
        async with opened(directory, database_url) as app:
            found: list[Any] = await DeadLetters(app.pool).browse(topic, limit)
            return found

    found = run(work())
    rows = [
        {
            "id": f"msg_{letter.id}",
            "key": letter.key,
            "died_at": letter.died_at,
            "attempts": letter.attempts,
            "reason": letter.reason,
            "first_error": letter.first_error,
            "last_error": letter.last_error,
        }
        for letter in found
    ]

    def people() -> None:
        table(
            ("id", "key", "died (UTC)", "tries", "reason"),
            [(row["id"], row["key"], when(row["died_at"]), row["attempts"], row["reason"]) for row in rows],
            right=("tries",),
        )

    show({"data": rows}, as_json, people)


@queue.command()
@click.argument("topic")
@click.argument("names", nargs=-1, metavar="[ID]…")
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.option("--from", "died_from", type=TIMES, help="Those that died since (UTC).")
@click.option("--to", "died_to", type=TIMES, help="Those that died before (UTC).")
@click.option(
    "--rate", type=click.IntRange(1, 100_000), default=1000, show_default=True, help="At most so many a second."
)
@place_options
@json_option
def replay(
    topic: str,
    names: tuple[str, ...],
    everything: bool,
    died_from: datetime | None,
    died_to: datetime | None,
    rate: int,
    directory: str | None,
    database_url: str | None,
    as_json: bool,
) -> None:
    """Puts dead letters back: those named, those of a time, or --all. What was handled already is not handled twice."""
    if not names and not everything and died_from is None and died_to is None:
        raise click.UsageError("Say which: ids, --from, --to, or --all.")
    ids = [_letter(name) for name in names] or None

    async def work() -> int:
        async with opened(directory, database_url) as app:
            replayed: int = await DeadLetters(app.pool).replay(
                topic, ids=ids, died_from=_utc(died_from), died_to=_utc(died_to), per_second=rate
            )
            return replayed

    replayed = run(work())
    show({"replayed": replayed}, as_json, lambda: print(f"{replayed} put back."))


@queue.command()
@click.argument("name")
@click.option("--keys-dir", type=click.Path(file_okay=False, path_type=Path), default=Path(), show_default="here")
@json_option
def keys(name: str, keys_dir: Path, as_json: bool) -> None:
    """A new pair of CURVE keys for a ZeroMQ hub or peer. The secret one stays with its owner; a hub keeps the public ones
    of its peers in one directory, and reads them when it starts."""
    from kassa.messaging.binders.zeromq import make_keys

    if (keys_dir / f"{name}.key_secret").exists():
        raise click.ClickException(f"{keys_dir / name}.key_secret exists already, and is not overwritten.")
    public, secret = make_keys(keys_dir, name)
    show({"public": str(public), "secret": str(secret)}, as_json, lambda: print(f"public  {public}\nsecret  {secret}"))


@queue.command()
@click.argument("topic")
@click.argument("group")
@broker_option
@place_options
@json_option
def subscribe(
    topic: str, group: str, brokers: tuple[str, ...], directory: str | None, database_url: str | None, as_json: bool
) -> None:
    """One more GROUP receives TOPIC (kassa.events, kassa.events.batch) from now on, on every broker that carries it.

    On PostgreSQL a group that nobody reads for grows for ever.
    """

    async def work() -> list[str]:
        async with opened(directory, database_url) as app:
            named = _brokers(directory, database_url, brokers)
            found = Brokers(named, app.pool, app.wakeups, PAYMENT_ORDERS, topology="leave")
            carrying = found.of_topic(topic)
            if not carrying:
                raise QueueNotFound(
                    f"No broker carries {topic}: name one with --broker, KASSA_BROKERS or kassa.toml.", topic=topic
                )
            try:
                await found.open()
                return [f"{one.name}: {line}" for one in carrying for line in await listen(app, one, topic, group)]
            finally:
                await found.close()

    said = run(work())
    show({"said": said}, as_json, lambda: print("\n".join(said) or f"{group} receives {topic} already."))


@queue.command("asyncapi")
@broker_option
@place_options
def print_asyncapi(brokers: tuple[str, ...], directory: str | None, database_url: str | None) -> None:
    """The AsyncAPI 3 document of what travels over the brokers, as GET /asyncapi.json has it."""
    named = _brokers(directory, database_url, brokers)
    document = asyncapi.document(named, version=version("kassa"), raw=RAW)
    print(msgspec.json.format(msgspec.json.encode(document)).decode())


def _brokers(directory: str | None, database_url: str | None, given: tuple[str, ...]) -> list[Named]:
    """Those of the settings, else those with which `kassa up` was started on DIR."""
    settings = settings_of(directory, database_url, brokers=given or None).settings
    return read_brokers(settings.brokers or recall(Path(settings.dir)).brokers)


def _utc(at: datetime | None) -> datetime | None:
    return None if at is None else at.replace(tzinfo=UTC)


def _letter(name: str) -> Id:
    inner = read_id("msg_", name)
    if inner is None:
        raise QueueNotFound("There is no such dead letter.", id=name)
    return inner
