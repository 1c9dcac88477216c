"""`kassa up`: PostgreSQL, migrations, API and workers in one process, sandboxes beside it.

Everything that it needs to go on is in DIR, so it may be killed at any moment and started again.
"""

import asyncio
import os
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import msgspec
import structlog

from kassa import heap
from kassa.app import App
from kassa.cli import directory as places
from kassa.cli.database import Database, database
from kassa.cli.directory import Remembered
from kassa.cli.node import api_of, log_to_stderr, stop_signal
from kassa.cli.options import broker_option, place_options, run
from kassa.cli.output import encoded, json_option, note
from kassa.cli.sandboxes import SANDBOXES, Sandbox, is_alive
from kassa.db import embedded
from kassa.db.migrate import migrate
from kassa.errors import BrokerUnreachable, KassaError, MerchantNotFound
from kassa.ids import Id, read_id
from kassa.merchants.records import Merchant
from kassa.messaging.brokers import Brokers
from kassa.messaging.topology import PAYMENT_ORDERS
from kassa.settings import Loaded, load, make_anchor_key, make_secrets_key

CARE_S = 1.0
"""How often the parts that are other processes are looked at."""
MERCHANT_NAME = "My shop"

log = structlog.get_logger("kassa.up")


@click.command()
@place_options
@click.option("--port", type=click.IntRange(0, 65535), help="Port of the API; 0: a free one, kept for DIR.")
@click.option(
    "--sandbox", "sandboxes", multiple=True, type=click.Choice(list(SANDBOXES)), help="Which; wechat unless told."
)
@broker_option
@json_option
def up(
    directory: str | None,
    database_url: str | None,
    port: int | None,
    sandboxes: tuple[str, ...],
    brokers: tuple[str, ...],
    as_json: bool,
) -> None:
    """Everything in one place, in the foreground; Ctrl-C stops it, and the same command goes on where it stopped."""
    loaded = load({"database_url": database_url, "port": port, "brokers": brokers or None}, directory=directory)
    place = Path(loaded.settings.dir).absolute()
    places.make(place)
    run(_up(loaded, place, sandboxes or ("wechat",), as_json))


async def _up(loaded: Loaded, directory: Path, names: tuple[str, ...], as_json: bool) -> None:
    settings = loaded.settings
    log_to_stderr(settings, "json" if as_json else "human")
    told = stop_signal()
    with ExitStack() as stack:
        stack.enter_context(places.alone(directory))
        if settings.database_url is not None:
            _remember(directory, database_url=settings.database_url)
        found, sandboxes = await _started(stack, directory, settings.database_url, names)
        await migrate(found.url)
        make_secrets_key(settings)
        make_anchor_key(settings)
        port = _port(loaded, directory)
        app = App(
            msgspec.structs.replace(
                settings,
                dir=str(directory),
                database_url=found.url,
                port=port,
                webhook_allow_private=True,
                order_queue=settings.order_queue or "plain",
            )
        )
        await app.start()
        try:
            merchant, key = await _set_up(app, directory, sandboxes)
            app.order_merchant = settings.order_merchant or f"mch_{merchant.id}"
            await _open_brokers(app, directory)
            _remember(directory, brokers=settings.brokers, order_queue=app.settings.order_queue)
            _warn(app)
            from kassa.workers import loops

            async with api_of(app, loops.NAMES) as api:
                document = _document(api.url, key, merchant, found.url, directory, sandboxes, app.brokers)
                heap.settle()
                if as_json:
                    print(encoded(document), flush=True)
                else:
                    _banner(document)
                await _care(told, app, merchant, found, sandboxes)
                note("stopping …")
        finally:
            await app.stop()


async def _open_brokers(app: App, directory: Path) -> None:
    """A broker that is away at the first start is told at once: its URL may be wrong. Started again with the same ones, payments
    over the API go on, and what travels over the broker waits until it is back."""
    try:
        await app.brokers.open()
    except BrokerUnreachable as error:
        if places.recall(directory).brokers != app.settings.brokers:
            raise
        note(f"! {error.detail}")
        note("It was there at the last start, so everything else goes on; what travels over it waits until it is back.")


async def _started(
    stack: ExitStack, directory: Path, url: str | None, names: tuple[str, ...]
) -> tuple[Database, list[Sandbox]]:
    """The database and the sandboxes, started side by side; the stack stops them, sandboxes first."""
    (directory / "sandboxes").mkdir(mode=0o700, exist_ok=True)
    sandboxes = [Sandbox(name, directory) for name in names]
    starting = [asyncio.create_task(sandbox.ensure()) for sandbox in sandboxes]
    try:
        found = await asyncio.to_thread(stack.enter_context, database(directory, url, note, make=True))
    finally:
        results = await asyncio.gather(*starting, return_exceptions=True)
        for sandbox in sandboxes:
            stack.callback(sandbox.stop)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return found, sandboxes


def _remember(directory: Path, **facts: Any) -> Remembered:
    before = places.recall(directory)
    after = msgspec.structs.replace(before, **facts)
    if after != before:
        places.remember(directory, after)
    return after


def _port(loaded: Loaded, directory: Path) -> int:
    """The port of the settings; when they say 0 or nothing, the one that DIR had, else for 0 a free one.

    Payments that are under way were told this port for their callbacks, so it is kept.
    """
    asked = loaded.settings.port
    is_default = next(origin.source for origin in loaded.origins if origin.name == "port") == "default"
    before = places.recall(directory).port
    if asked != 0 and not is_default:
        port = asked
    elif before is not None and _is_free(loaded.settings.host, before):
        port = before
    elif asked != 0 and before is None:
        port = asked
    else:
        if before is not None:
            note(f"Port {before} of {directory} is taken by another program, so another one is used.")
        port = _free_port(loaded.settings.host)
    _remember(directory, port=port)
    return port


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


# The merchant that a first start makes


async def _set_up(app: App, directory: Path, sandboxes: list[Sandbox]) -> tuple[Merchant, str]:
    """The merchant, its key and its channels: those of the last start as far as they still hold, else new ones.

    Each step is remembered at once, so a crash in between repeats none.
    """
    merchant = await _merchant(app, directory)
    key = await _key(app, directory, merchant)
    for sandbox in sandboxes:
        await _set_channel(app, merchant, sandbox)
    return merchant, key


async def _merchant(app: App, directory: Path) -> Merchant:
    name = places.recall(directory).merchant
    inner = None if name is None else read_id("mch_", name)
    if inner is not None:
        try:
            return await app.merchants.get(inner)
        except MerchantNotFound:
            note(f"{name} is not in this database, so a new merchant is made.")
    merchant = await app.merchants.create(MERCHANT_NAME)
    _remember(directory, merchant=f"mch_{merchant.id}", api_key=None)
    return merchant


async def _key(app: App, directory: Path, merchant: Merchant) -> str:
    key = places.recall(directory).api_key
    if key is not None:
        caller = await app.directory.caller(key)
        if caller is not None and caller.merchant.id == merchant.id:
            return key
        note("The API key of this directory was revoked, so a new one is made.")
    made = await app.merchants.create_key(merchant.id, label="kassa up")
    _remember(directory, api_key=made.key)
    return made.key


async def _set_channel(app: App, merchant: Merchant, sandbox: Sandbox) -> None:
    """The sandbox's credentials for the merchant, if they are not those that it has already."""
    for account in await app.merchants.channels(merchant.id):
        if account.channel == sandbox.name and account.state == "active":
            sealed = app.vault.open(merchant.home, sandbox.name, account.credentials)
            if msgspec.json.decode(sealed) == sandbox.credentials:
                return
    await app.merchants.set_channel(merchant.id, sandbox.name, sandbox.credentials)


# While it runs


async def _care(told: asyncio.Event, app: App, merchant: Merchant, found: Database, sandboxes: list[Sandbox]) -> None:
    """Waits for the signal; starts again what died meanwhile."""
    while not told.is_set():
        try:
            async with asyncio.timeout(CARE_S):
                await told.wait()
        except TimeoutError:
            try:
                await _look_after(app, merchant, found, sandboxes)
            except (KassaError, click.ClickException, OSError) as error:
                log.error("part.not_restarted", error=str(error))


async def _look_after(app: App, merchant: Merchant, found: Database, sandboxes: list[Sandbox]) -> None:
    if found.running is not None and not is_alive(found.running.pid):
        log.warning("postgres.died", pid=found.running.pid)
        found.running = await asyncio.to_thread(embedded.start, found.running.home)
        log.warning("postgres.restarted", pid=found.running.pid)
    for sandbox in sandboxes:
        if await sandbox.ensure():
            log.warning("sandbox.restarted", sandbox=sandbox.name)
            await _set_channel(app, merchant, sandbox)


def _warn(app: App) -> None:
    if app.settings.order_queue == "plain" and any(
        broker.name.startswith("rabbitmq") for broker in app.brokers.of_topic(PAYMENT_ORDERS.name)
    ):
        note(
            "The queue payment_order is not durable, as the simplest programs declare it: requests that wait there do not "
            "survive a restart of RabbitMQ. KASSA_ORDER_QUEUE=durable makes it so; then every program must declare it so."
        )


def _document(
    url: str,
    key: str,
    merchant: Merchant,
    database_url: str,
    directory: Path,
    sandboxes: list[Sandbox],
    brokers: Brokers,
) -> dict[str, Any]:
    return {
        "api": url,
        "api_key": key,
        "merchant": _name(merchant.id),
        "database": database_url,
        "dir": str(directory),
        "pid": os.getpid(),
        "sandboxes": {sandbox.name: sandbox.credentials for sandbox in sandboxes},
        "brokers": {broker.name: {"url": broker.shown, "topics": list(broker.topics)} for broker in brokers},
    }


def _name(merchant: Id) -> str:
    return f"mch_{merchant}"


def _banner(document: dict[str, Any], out: Callable[[str], None] = print) -> None:
    api, key = document["api"], document["api_key"]
    out("")
    out("Kassa is ready. Ctrl-C stops it; the same command goes on where it stopped.")
    out("")
    out(f"  API        {api}")
    out(f"  docs       {api}/docs")
    out(f"  API key    {key}")
    out(f"  merchant   {document['merchant']}")
    for name, credentials in document["sandboxes"].items():
        out(f"  sandbox    {name} at {credentials['base_url']}")
    for name, broker in document["brokers"].items():
        out(f"  broker     {name} at {broker['url']}: {', '.join(broker['topics'])}")
    out(f"  directory  {document['dir']}")
    out("")
    out("A first payment:")
    out("")
    out(f"  curl {api}/v1/payments -H 'Authorization: Bearer {key}' \\")
    out("       -H 'Content-Type: application/json' -H 'Idempotency-Key: first' \\")
    body = '{"order_id": "1", "amount": 100, "currency": "CNY", "channel": "wechat", "method": "native"}'
    out(f"       -d '{body}'")
    for credentials in document["sandboxes"].values():
        out("")
        out("Pay it as the payer would, with the code_url of the answer:")
        out("")
        out(f'  curl {credentials["base_url"]}/_sandbox/pay -d \'{{"code_url": "weixin://…"}}\'')
    out("")
    sys.stdout.flush()
