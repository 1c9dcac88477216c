"""Queues for operators: how they are doing, what died in them, and trying it again."""

import asyncio
import base64
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import click
import msgspec

from kassa.cli.directory import recall
from kassa.cli.options import Command, Result, broker_option, opened, place_options, run, settings_of
from kassa.cli.output import encoded, json_option, note, show, table, when
from kassa.cli.watch import Line, Picture, document, lasting, picture
from kassa.errors import QueueNotFound
from kassa.messaging.activity import PUBLISH_S, Flows, counted
from kassa.messaging.broker_names import Named, read_brokers
from kassa.messaging.brokers import Brokers
from kassa.messaging.queues import AGAIN_MAX, Dead, Peeked, Purged, Queue, Queues, Waiting
from kassa.messaging.topology import PAYMENT_ORDERS, Declaration

UNREAD_S = 10.0
"""Events that wait so long and have no reader are worth a word."""
BEGINNING = 60
"""Characters of a body that people see in a table."""
TIMES = click.DateTime(formats=["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d"])


@click.group()
def queue() -> None:
    """Queues and dead letters."""


def queue_options(command: Command) -> Command:
    """Which system, over which brokers, and for whom the answer is."""
    return broker_option(place_options(json_option(command)))


class Place(NamedTuple):
    """Which system a command is for."""

    directory: str | None
    database_url: str | None
    brokers: tuple[str, ...]


def at_queues(place: Place, work: "Callable[[Queues, Any], Awaitable[Result]]") -> Result:
    """Does something with the queues of a system. Brokers are looked at as they are: nothing is made there."""

    async def opened_queues() -> Result:
        async with opened(place.directory, place.database_url) as app:
            named = _brokers(*place)
            brokers = Brokers(named, app.pool, app.wakeups, PAYMENT_ORDERS, topology="leave")
            try:
                return await work(Queues(app.pool, brokers, app.wakeups), app)
            finally:
                await brokers.close()

    return run(opened_queues())


@queue.command("list")
@queue_options
def list_queues(brokers: tuple[str, ...], directory: str | None, database_url: str | None, as_json: bool) -> None:
    """How every queue is doing: what groups get of topics, what is on its way to brokers, and who reads the event log."""

    async def work(queues: Queues, app: Any) -> list[Queue]:
        return await queues.all()

    found = at_queues(Place(directory, database_url, brokers), work)
    rows = [msgspec.to_builtins(one) for one in found]

    def people() -> None:
        heads = ("queue", "broker", "waiting", "in hand", "delayed", "failed", "dead", "oldest", "")
        table(heads, [_line(one) for one in found], right=heads[2:8])
        for sentence in dict.fromkeys(one.says for one in found if one.says):
            note(f"! {sentence}")
        if any(one.dead for one in found):
            note("`kassa queue dead QUEUE` says what died and why, `kassa queue replay QUEUE --all` tries it again.")

    show({"data": rows}, as_json, people)


def _line(one: Queue) -> tuple[object, ...]:
    waiting = f"{one.waiting}+?" if one.elsewhere is None else one.waiting
    state = (
        "paused" if one.paused else "nobody reads" if one.is_read is False and (one.oldest_s or 0) > UNREAD_S else ""
    )
    age = "" if one.oldest_s is None else lasting(one.oldest_s)
    broker = ", ".join(one.brokers)
    return one.name, broker, waiting, one.in_flight, one.delayed, one.retrying, one.dead, age, state


@queue.command()
@click.argument("name", metavar="QUEUE")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@queue_options
def peek(
    name: str, limit: int, brokers: tuple[str, ...], directory: str | None, database_url: str | None, as_json: bool
) -> None:
    """The oldest records of a queue, without touching them."""

    async def work(queues: Queues, app: Any) -> Peeked:
        return await queues.peek(name, limit)

    found = at_queues(Place(directory, database_url, brokers), work)
    rows = [_record(one) for one in found.records]

    def people() -> None:
        heads = ("id", "key", "state", "since (UTC)", "tries", "body")
        table(
            heads,
            [
                (one.id, one.key, one.state, when(one.created_at), one.attempts, _begins(one.body))
                for one in found.records
            ],
            right=("tries",),
        )
        if found.elsewhere:
            note(f"{found.elsewhere} more wait at the broker, where nobody can look at them without taking them.")
        elif found.elsewhere is None:
            note("What waits at the broker is not known.")

    show({"data": rows, "elsewhere": found.elsewhere}, as_json, people)


@queue.command()
@click.argument("name", metavar="QUEUE")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@queue_options
def dead(
    name: str, limit: int, brokers: tuple[str, ...], directory: str | None, database_url: str | None, as_json: bool
) -> None:
    """What was given up in a queue, newest first, and why."""

    async def work(queues: Queues, app: Any) -> list[Dead]:
        return await queues.dead(name, limit)

    found = at_queues(Place(directory, database_url, brokers), work)

    def people() -> None:
        table(
            ("id", "key", "died (UTC)", "tries", "reason"),
            [(one.id, one.key, when(one.died_at), one.attempts, one.reason) for one in found],
            right=("tries",),
        )

    show({"data": [_record(one) for one in found]}, as_json, people)


@queue.command()
@click.argument("name", metavar="QUEUE")
@click.argument("names", nargs=-1, metavar="[ID]…")
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.option("--from", "died_from", type=TIMES, help="Those that died since (UTC).")
@click.option("--to", "died_to", type=TIMES, help="Those that died before (UTC).")
@click.option(
    "--since",
    type=TIMES,
    help=f"Of relay:BROKER:TOPIC: every event since (UTC, at most {AGAIN_MAX.days} days ago), out of the event log.",
)
@click.option(
    "--beyond-inboxes",
    is_flag=True,
    help="With --since: also events so old that services may have forgotten that they handled them, and do it again.",
)
@click.option(
    "--rate", type=click.IntRange(1, 100_000), default=1000, show_default=True, help="At most so many a second."
)
@queue_options
def replay(
    name: str,
    names: tuple[str, ...],
    everything: bool,
    died_from: datetime | None,
    died_to: datetime | None,
    since: datetime | None,
    beyond_inboxes: bool,
    rate: int,
    brokers: tuple[str, ...],
    directory: str | None,
    database_url: str | None,
    as_json: bool,
) -> None:
    """Puts dead letters back: those named, those of a time, or --all. What was handled already is not handled twice.

    With --since a relay sends events again which its broker had and lost, as after somebody else's purge.
    """
    which = bool(names) or everything or died_from is not None or died_to is not None
    if which == (since is not None):
        raise click.UsageError("Say which: ids, --from, --to, or --all; or --since, of a relay.")
    if names and everything:
        raise click.UsageError("Say ids or --all, not both.")
    if beyond_inboxes and since is None:
        raise click.UsageError("--beyond-inboxes goes with --since.")

    async def work(queues: Queues, app: Any) -> int:
        if since is not None:
            return await queues.send_again(name, since.replace(tzinfo=UTC), beyond_inboxes=beyond_inboxes)
        found = await queues.replay(
            name, ids=names or None, died_from=_utc(died_from), died_to=_utc(died_to), per_second=rate
        )
        return found.replayed

    replayed = at_queues(Place(directory, database_url, brokers), work)
    says = "put back" if since is None else "events are sent again; whoever remembers one drops it"
    show({"replayed": replayed}, as_json, lambda: print(f"{replayed} {says}."))


@queue.command()
@click.argument("name", metavar="QUEUE")
@queue_options
def pause(name: str, brokers: tuple[str, ...], directory: str | None, database_url: str | None, as_json: bool) -> None:
    """Nobody gets anything of a queue until it is resumed; what is sent waits. Holds over restarts."""

    async def work(queues: Queues, app: Any) -> None:
        await queues.pause(name)

    at_queues(Place(directory, database_url, brokers), work)
    show(
        {"name": name, "paused": True},
        as_json,
        lambda: print(f"{name} is paused. `kassa queue resume {name}` ends it."),
    )


@queue.command()
@click.argument("name", metavar="QUEUE")
@queue_options
def resume(name: str, brokers: tuple[str, ...], directory: str | None, database_url: str | None, as_json: bool) -> None:
    """A paused queue goes on at once."""

    async def work(queues: Queues, app: Any) -> None:
        await queues.resume(name)

    at_queues(Place(directory, database_url, brokers), work)
    show({"name": name, "paused": False}, as_json, lambda: print(f"{name} goes on."))


@queue.command()
@click.argument("name", metavar="QUEUE")
@click.option("--dead", "dead_ones", is_flag=True, help="What was given up, instead of what waits.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@queue_options
def purge(
    name: str,
    dead_ones: bool,
    yes: bool,
    brokers: tuple[str, ...],
    directory: str | None,
    database_url: str | None,
    as_json: bool,
) -> None:
    """Throws away what waits in a queue, for good. What is in somebody's hands stays."""
    place = Place(directory, database_url, brokers)

    async def look(queues: Queues, app: Any) -> Queue:
        return await queues.one(name)

    async def work(queues: Queues, app: Any) -> Purged:
        if dead_ones:
            return Purged(await queues.forget_dead(name), 0)
        return await queues.purge(name)

    if not yes:
        found = at_queues(place, look)
        count = f"{found.dead} dead" if dead_ones else f"{found.waiting} waiting"
        if as_json or not sys.stdin.isatty():
            raise click.UsageError(f"This throws away the {count} records of {name} for good: say --yes.")
        click.confirm(f"Throw away the {count} records of {name} for good?", abort=True, err=True)
    purged = at_queues(place, work)

    def people() -> None:
        print(f"{purged.gone} thrown away.")
        if purged.left:
            note(
                f"{purged.left} are left, in somebody's hands. Consumers that run have their lanes of a broker with all that "
                "waits there: stop `kassa worker`, and purge again."
            )

    show({"gone": purged.gone, "left": purged.left}, as_json, people)


@queue.command()
@click.option("--once", is_flag=True, help="One look, over two seconds.")
@queue_options
def watch(once: bool, brokers: tuple[str, ...], directory: str | None, database_url: str | None, as_json: bool) -> None:
    """A live view of every queue: length, throughput, latency from produced to handled. Ctrl-C ends it.

    With --json one document a second, with --once one at all.
    """

    async def work(queues: Queues, app: Any) -> None:
        await Watching(queues, app.pool).run(once=once, as_json=as_json)

    with suppress(KeyboardInterrupt):
        at_queues(Place(directory, database_url, brokers), work)


class Watching:
    """Looks again and again."""

    def __init__(self, queues: Queues, pool: Any) -> None:
        self._queues = queues
        self._pool = pool
        self._flows = Flows()
        self._picture = Picture()
        self._found: list[Queue] = []
        self._look_at = 0.0

    async def run(self, *, once: bool, as_json: bool) -> None:
        """Until it is cancelled, or `once`."""
        await self._look()
        if once:
            # A rate needs two looks, with what each process tells once a second between them.
            await asyncio.sleep(2 * PUBLISH_S + 0.2)
            self._look_at = 0.0
            lines = await self._look()
            show(document(lines, datetime.now(UTC)), as_json, lambda: self._console().print(self._frame(lines)))
        elif as_json:
            while True:
                await asyncio.sleep(1.0)
                print(encoded(document(await self._look(), datetime.now(UTC))), flush=True)
        else:
            await self._live()

    async def _live(self) -> None:
        from rich.live import Live

        console = self._console()
        with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                live.update(self._frame(await self._look(), console.width), refresh=True)
                await asyncio.sleep(1.0)

    def _console(self) -> Any:
        from rich.console import Console

        console = Console(highlight=False, markup=False)
        if not console.is_terminal:
            console.width = 200
        return console

    def _frame(self, lines: list[Line], width: int | None = None) -> Any:
        sent = {topic: flow.sent for (topic, group), flow in self._flows.flows().items() if not group}
        return picture(lines, datetime.now(UTC), width or self._console().width, sent)

    async def _look(self) -> list[Line]:
        """What moves is read each second; how long queues are as often as it costs a tenth of the time."""
        clock = asyncio.get_running_loop().time
        began = clock()
        self._flows.add(await counted(self._pool))
        if began >= self._look_at:
            self._found = await self._queues.all()
            self._look_at = clock() + max(0.0, 9 * (clock() - began) - 1.0)
        return self._picture.lines(self._found, self._flows.flows(), began)


def _record(one: Waiting | Dead) -> dict[str, Any]:
    """A record for programs: its body is text where it is UTF-8, else base64."""
    row: dict[str, Any] = msgspec.structs.asdict(one)
    body = row.pop("body")
    try:
        return row | {"body": body.decode()}
    except UnicodeDecodeError:
        return row | {"body": None, "body_base64": base64.b64encode(body).decode()}


def _begins(body: bytes) -> str:
    text = body[:BEGINNING].decode(errors="replace")
    return "".join(one if one.isprintable() else "·" for one in text) + ("…" if len(body) > BEGINNING else "")


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
    from kassa.workers.relay import listen

    async def work() -> list[str]:
        async with opened(directory, database_url) as app:
            named = _brokers(directory, database_url, brokers)
            mode: Literal["verify", "leave"] = "verify" if app.settings.broker_topology == "verify" else "leave"
            found = Brokers(named, app.pool, app.wakeups, PAYMENT_ORDERS, topology=mode)
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
@queue_options
def print_asyncapi(brokers: tuple[str, ...], directory: str | None, database_url: str | None, as_json: bool) -> None:
    """The AsyncAPI 3 document of what travels over the brokers, as GET /asyncapi.json has it."""
    from kassa.api import asyncapi
    from kassa.api.server import RAW

    settings = settings_of(directory, database_url, brokers=brokers or None).settings
    remembered = recall(Path(settings.dir))
    orders = cast(Declaration, settings.order_queue or remembered.order_queue or "durable")
    named = read_brokers(settings.brokers or remembered.brokers)
    document = asyncapi.document(named, version=version("kassa"), raw=RAW, orders=orders)
    show(document, as_json, lambda: print(msgspec.json.format(msgspec.json.encode(document)).decode()))


def _brokers(directory: str | None, database_url: str | None, given: tuple[str, ...]) -> list[Named]:
    """Those of the settings, else those with which `kassa up` was started on DIR."""
    settings = settings_of(directory, database_url, brokers=given or None).settings
    return read_brokers(settings.brokers or recall(Path(settings.dir)).brokers)


def _utc(at: datetime | None) -> datetime | None:
    return None if at is None else at.replace(tzinfo=UTC)
